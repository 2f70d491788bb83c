"""Gradients for every sample against plain autograd, and the masks that are scored by them."""

import math
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from lit_prune.errors import BadInput
from lit_prune.masks import GBLM, GradientNorm, Gram, InputNorm, LayerStatistics, RegionalGradient, Sparsity, Wanda
from lit_prune.models import BlockCall, Home, capture_calls, embed, find_blocks, head, linear_layers, oriented
from lit_prune.modules.gradients import (
    blockwise_gradients,
    frozen,
    load_gradients,
    regional_gradients,
    save_gradients,
    watch_gradients,
    whole_model_gradients,
)
from lit_prune.modules.memory import available_memory, whole_model_memory

CPU = torch.device("cpu")
SAMPLES, SEQUENCE, VOCABULARY = 5, 12, 64
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTH = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": VOCABULARY, **IDS}
COMMON = {**WIDTH, "num_key_value_heads": 1, "intermediate_size": 24, "num_hidden_layers": 3}
OPT = {**WIDTH, "ffn_dim": 24, "num_hidden_layers": 3, "max_position_embeddings": 32}

CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "gpt2": lambda: tf.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=32, vocab_size=VOCABULARY, **IDS),
    "opt": lambda: tf.OPTConfig(**OPT, word_embed_proj_dim=16),
    # as OPT-350m: norms after, and a projection between the last block and the head
    "opt_projected": lambda: tf.OPTConfig(**OPT, word_embed_proj_dim=8, do_layer_norm_before=False),
    # blocks that alternate, and logits that are capped
    "gemma2": lambda: tf.Gemma2Config(**COMMON, head_dim=8, sliding_window=5, final_logit_softcapping=3.0),
    # blocks that return tuples, and a sum that takes the place of a layer's output
    "falcon": lambda: tf.FalconConfig(**WIDTH, num_hidden_layers=3),
}

Norms = list[dict[str, GradientNorm]]


@cache
def model(architecture: str) -> tf.PreTrainedModel:
    """A tiny model whose blocks all matter."""
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def tokens(samples: int = SAMPLES) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, SEQUENCE), generator=torch.Generator().manual_seed(1))


def calls_of(made: tf.PreTrainedModel) -> tuple[nn.ModuleList, list[BlockCall]]:
    blocks = find_blocks(made)
    return blocks, capture_calls(made, blocks, tokens(1).flip(1))


Powers = tuple[Tensor, Tensor]


def add_powers(sums: dict[Any, Powers], layers: dict[Any, nn.Module]) -> None:
    """Take in one sample's gradients as autograd has left them on the weights: absolute values and squares."""
    for name, layer in layers.items():
        gradient = oriented(layer, layer.weight.grad.double())
        absolute, squares = sums.get(name, (0, 0))
        sums[name] = (absolute + gradient.abs(), squares + gradient.square())


@cache
def expected(architecture: str) -> dict[tuple[int, str], Powers]:
    """By block and layer, what autograd makes of one sample after the other."""
    made = model(architecture)
    layers = {(i, name): layer for i, b in enumerate(find_blocks(made)) for name, layer in linear_layers(b).items()}
    sums: dict[tuple[int, str], Powers] = {}
    for sample in tokens().split(1):
        made.zero_grad()
        made(input_ids=sample, labels=sample).loss.backward()
        add_powers(sums, layers)
    made.zero_grad()
    return sums


def check(norm: GradientNorm, powers: Powers, samples: int = SAMPLES) -> None:
    """Equal but for what float32 rounds, relative to the layer's largest entry."""
    exact = powers[0] if norm.p == 1 else powers[1].sqrt()
    assert norm.samples == samples
    assert norm.norm.dtype == torch.float32
    assert exact.max() > 0
    torch.testing.assert_close(norm.norm.double(), exact, rtol=1e-4, atol=2e-6 * float(exact.max()))


def check_all(norms: Norms, architecture: str) -> None:
    reference = expected(architecture)
    assert {(i, name) for i, named in enumerate(norms) for name in named} == reference.keys()
    for (index, name), powers in reference.items():
        check(norms[index][name], powers)


def whole(architecture: str, p: int, batch_size: int) -> Norms:
    made = model(architecture)
    return whole_model_gradients(made, find_blocks(made), tokens(), p, batch_size, CPU)


def blockwise(architecture: str, p: int, batch_size: int, folder: Path) -> Norms:
    made = model(architecture)
    blocks, calls = calls_of(made)
    found = dict(blockwise_gradients(Home(made, blocks), calls, tokens(), p, batch_size, CPU, folder))
    assert list(found) == list(reversed(range(len(blocks))))
    return [found[index] for index in range(len(blocks))]


@pytest.mark.parametrize("batch_size", [1, 2, SAMPLES])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_both_ways_agree_with_autograd_sample_by_sample(
    architecture: str, p: int, batch_size: int, tmp_path: Path
) -> None:
    check_all(whole(architecture, p, batch_size), architecture)
    check_all(blockwise(architecture, p, batch_size, tmp_path), architecture)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_reference_tells_samples_blocks_and_losses_apart(architecture: str) -> None:
    """Else the test above could pass with gradients summed over samples, or of another block."""
    made = model(architecture)
    layers = {(i, name): layer for i, b in enumerate(find_blocks(made)) for name, layer in linear_layers(b).items()}
    made(input_ids=tokens(), labels=tokens()).loss.backward()
    for key, (absolute, squares) in expected(architecture).items():
        summed = oriented(layers[key], layers[key].weight.grad).abs() * SAMPLES
        assert summed.sum() < 0.95 * absolute.sum()
        assert squares.sqrt().sum() < 0.95 * absolute.sum()
        neighbour = expected(architecture)[(key[0] + 1) % 3, key[1]]
        assert not torch.allclose(absolute, neighbour[0], rtol=0.1)
    made.zero_grad()


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_regional_gradients_agree_with_autograd(architecture: str, p: int) -> None:
    made = model(architecture)
    blocks, calls = calls_of(made)
    block, call = blocks[1], calls[1]
    layers = linear_layers(block)
    hidden = embed(made, blocks, tokens())
    before = hidden.clone()
    sums: dict[str, Powers] = {}
    for sample in hidden.split(1):
        block.zero_grad()
        call(block, sample).square().sum().sqrt().backward()
        add_powers(sums, layers)
    made.zero_grad()
    for batch_size in (1, 2, SAMPLES):
        norms = regional_gradients(lambda x: call(block, x), layers, hidden, p, batch_size=batch_size)
        assert norms.keys() == sums.keys()
        for name, powers in sums.items():
            check(norms[name], powers)
    assert torch.equal(hidden, before)
    assert not hidden.requires_grad
    assert all(parameter.grad is None for parameter in made.parameters())


def test_regional_gradients_where_a_block_puts_out_nothing() -> None:
    layer = nn.Linear(3, 3, bias=False)
    nn.init.zeros_(layer.weight)
    norms = regional_gradients(layer, {"only": layer}, torch.ones(2, 4, 3))
    assert norms["only"].norm.tolist() == [[0.0] * 3] * 3


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_head_makes_the_models_logits(architecture: str) -> None:
    made = model(architecture)
    blocks, calls = calls_of(made)
    with torch.no_grad():
        hidden = embed(made, blocks, tokens())
        for block, call in zip(blocks, calls, strict=True):
            hidden = call(block, hidden)
        logits = head(made, blocks, hidden, tokens().flip(1), in_tuple=architecture == "falcon")
        assert torch.equal(logits, made(input_ids=tokens(), use_cache=False).logits)


def flags(module: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in module.parameters()]


@pytest.mark.parametrize("way", ["whole", "blocks", "region"])
def test_nothing_is_left_behind(way: str, tmp_path: Path) -> None:
    """Neither flags, gradients, hooks nor changed weights; what a user has frozen stays frozen."""
    made = model("llama")
    blocks, calls = calls_of(made)
    weights = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    hidden = embed(made, blocks, tokens())
    chosen = [index % 3 != 0 for index, _ in enumerate(made.parameters())]
    with frozen(made.parameters()):  # to get back to what they were
        for parameter, needed in zip(made.parameters(), chosen, strict=True):
            parameter.requires_grad_(needed)
        if way == "whole":
            whole_model_gradients(made, blocks, tokens(), 1, 2, CPU)
        elif way == "blocks":
            for _ in blockwise_gradients(Home(made, blocks), calls, tokens(), 1, 2, CPU, tmp_path):
                assert flags(made) == chosen
                assert torch.is_grad_enabled()
        else:
            regional_gradients(lambda x: calls[0](blocks[0], x), linear_layers(blocks[0]), hidden)
        assert flags(made) == chosen
    assert all(flags(made))
    assert all(parameter.grad is None for parameter in made.parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in made.state_dict().items())
    for module in made.modules():
        assert not [*module._forward_hooks, *module._forward_pre_hooks]
        assert "forward" not in vars(module)
    assert not list(tmp_path.iterdir())


def test_flags_and_hooks_are_restored_after_an_exception() -> None:
    layers = {"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)}
    layers["second"].weight.requires_grad_(False)
    norms = {name: GradientNorm(1) for name in layers}
    seen: list[bool] = []

    def fail() -> None:
        seen.extend(flag for layer in layers.values() for flag in flags(layer))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watch_gradients(layers, norms, 1):
        fail()
    assert seen == [False] * 4
    assert [flags(layer) for layer in layers.values()] == [[True, True], [False, True]]
    assert not any(layer._forward_hooks for layer in layers.values())


def test_weights_take_no_part_in_autograd() -> None:
    """Their gradients over a whole batch would be computed for nothing."""
    layer, norm = nn.Linear(4, 3), GradientNorm(1)
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    with watch_gradients({"only": layer}, {"only": norm}, 2):
        layer(hidden).square().sum().backward()
        layer(hidden.detach())  # no gradient comes back from here
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    assert hidden.grad is not None
    assert norm.samples == 2


def test_layers_that_see_the_tokens_of_all_samples_in_one_row() -> None:
    layer = nn.Linear(4, 3)
    hidden = torch.randn(2, 5, 4, requires_grad=True)
    norms = []
    for inputs in (hidden, hidden.flatten(0, 1)):
        norms.append(GradientNorm(1))
        with watch_gradients({"only": layer}, {"only": norms[-1]}, 2):
            layer(inputs).square().sum().backward()
    assert [norm.samples for norm in norms] == [2, 2]
    torch.testing.assert_close(norms[0].norm, norms[1].norm)


def test_inputs_are_stored_one_file_a_block_until_used(tmp_path: Path) -> None:
    made = model("llama")
    blocks, calls = calls_of(made)
    left = []
    for index, _ in blockwise_gradients(Home(made, blocks), calls, tokens(), 1, 2, CPU, tmp_path / "new"):
        left.append((index, sorted(file.name for file in (tmp_path / "new").iterdir())))
    assert left == [(2, ["000.safetensors", "001.safetensors"]), (1, ["000.safetensors"]), (0, [])]


def test_stored_inputs_go_when_the_walk_is_broken_off(tmp_path: Path) -> None:
    made = model("llama")
    blocks, calls = calls_of(made)
    walk = blockwise_gradients(Home(made, blocks), calls, tokens(), 1, 2, CPU, tmp_path)
    next(walk)
    assert len(list(tmp_path.iterdir())) == 2
    walk.close()  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("p", [1, 2])
def test_gradients_written_and_read(p: int, tmp_path: Path) -> None:
    norms = {"mlp.fc1": GradientNorm(p), "attn": GradientNorm(p)}
    norms["mlp.fc1"].add(torch.randn(3, 5, 4), torch.randn(3, 5, 2))
    norms["attn"].add(torch.randn(2, 5, 2), torch.randn(2, 5, 7))
    file = tmp_path / "gradients" / "000.safetensors"
    save_gradients(file, norms)
    read = load_gradients(file, p)
    assert read.keys() == norms.keys()
    for name, norm in norms.items():
        assert torch.equal(read[name].norm, norm.norm)
        assert (read[name].samples, read[name].p) == (norm.samples, p)
    more = (torch.randn(1, 5, 4), torch.randn(1, 5, 2))
    for either in (read, norms):
        either["mlp.fc1"].add(*more)
    torch.testing.assert_close(read["mlp.fc1"].norm, norms["mlp.fc1"].norm)  # it was rounded in between
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(BadInput, match=r"was damaged \(.*\); remove its folder, and the same command goes on"):
        load_gradients(file, p)


def test_gradients_of_nothing_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no gradient has reached attn"):
        save_gradients(tmp_path / "file", {"attn": GradientNorm(1)})
    assert not list(tmp_path.iterdir())


def really_kept(made: tf.PreTrainedModel, blocks: nn.ModuleList, batch: Tensor) -> int:
    """The bytes of all storages that a forward pass of the whole model leaves behind for the backward pass."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*made.parameters(), *made.buffers()]}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return kept[-1]

    for parameter in made.parameters():
        parameter.requires_grad_(False)
    layers = [layer for block in blocks for layer in linear_layers(block).values()]
    hooks = [layer.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach())) for layer in layers]
    entering = made.get_input_embeddings()(batch).requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = made(inputs_embeds=entering, labels=batch, use_cache=False).loss
    for hook in hooks:
        hook.remove()
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    assert loss.requires_grad
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for address, size in storages.items() if address not in weights)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize(("vocabulary", "sequence"), [(8, 96), (512, 32)])
def test_the_memory_estimate(architecture: str, vocabulary: int, sequence: int) -> None:
    """Against what autograd keeps, and against the most that is allocated at once in the real thing."""
    made = tf.AutoModelForCausalLM.from_config(resized(architecture, vocabulary)).eval()
    blocks = find_blocks(made)
    batch = torch.randint(3, vocabulary, (1, sequence))
    call = capture_calls(made, blocks, batch)[0]
    matrices = [layer.weight for block in blocks for layer in linear_layers(block).values()]
    weights = sum(tensor.nbytes for tensor in [*made.parameters(), *made.buffers()])
    sums = sum(8 * matrix.numel() for matrix in matrices)
    kept = really_kept(made, blocks, batch)
    for batch_size in (1, 3):
        estimate = whole_model_memory(made, blocks, call, embed(made, blocks, batch[:1]), batch_size)
        assert kept * batch_size / 2 < estimate - weights - sums < 2 * kept * batch_size
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            whole_model_gradients(made, blocks, batch.repeat(2 * batch_size, 1), 1, batch_size, CPU)
        peak = highest(profiler)
        assert 0.75 * peak < estimate - weights < 1.33 * peak
    assert all(flags(made))


def resized(architecture: str, vocabulary: int) -> tf.PreTrainedConfig:
    """Four blocks and another vocabulary."""
    config = CONFIGS[architecture]().to_dict()
    changes = {"vocab_size": vocabulary, "num_hidden_layers": 4, "layer_types": None, "max_position_embeddings": 128}
    return type(CONFIGS[architecture]())(**config | changes)


def highest(profiler: profile) -> int:
    """The most bytes that were allocated at once."""
    now = most = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9) if device.index == 1 else (6, 9))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=4, available=3))
    assert [available_memory(torch.device(name)) for name in ("cuda:1", "cuda:0", "cpu")] == [5, 6, 3]


# the masks


class Calibration:
    """Inputs and output gradients of one layer for some samples, and what the definitions make of them, by loops."""

    def __init__(self, seed: int, samples: int, length: int, columns: int, rows: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(samples, length, columns, generator=generator).to(dtype)
        self.output_gradients = (torch.randn(samples, length, rows, generator=generator) / 100).to(dtype)
        self.weight = torch.randn(rows, columns, generator=generator).to(dtype)
        self.samples, self.length = samples, length

    def statistics(self, p: int, times: int = 1) -> LayerStatistics:
        """As they accumulate if all samples come so many times."""
        norm, gradient = InputNorm(), GradientNorm(p)
        for _ in range(times):
            norm.add(self.inputs)
            gradient.add(self.inputs, self.output_gradients)
        return LayerStatistics(norm, gradient)

    def norm_of_input(self, j: int) -> float:
        return math.sqrt(math.fsum(x**2 for sample in self.inputs.double().tolist() for x in (t[j] for t in sample)))

    def gradients(self, i: int, j: int) -> list[float]:
        """One for each sample: the sum over tokens of input times output gradient."""
        pairs = zip(self.inputs.double().tolist(), self.output_gradients.double().tolist(), strict=True)
        return [math.fsum(x[j] * dy[i] for x, dy in zip(xs, dys, strict=True)) for xs, dys in pairs]

    def score(self, of: Callable[[float, int, int], float]) -> Tensor:
        rows = self.weight.double().abs().tolist()
        return torch.tensor(
            [[of(w, i, j) for j, w in enumerate(row)] for i, row in enumerate(rows)], dtype=torch.float64
        )


@st.composite
def calibrations(draw: st.DrawFn) -> tuple[Calibration, str]:
    sparsity = draw(st.sampled_from(["0", "0.29", "0.5", "0.9", "1:4", "2:4", "3:4", "4:8", "5:7"]))
    columns = draw(st.integers(1, 12))
    if ":" in sparsity:
        columns = int(sparsity.split(":")[1]) * draw(st.integers(1, 2))
    sizes = [draw(st.integers(1, most)) for most in (4, 5)]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return Calibration(draw(st.integers(0, 2**32 - 1)), *sizes, columns, draw(st.integers(1, 4)), dtype), sparsity


def compared(score: Tensor, sparsity: str, granularity: str) -> Iterator[tuple[Tensor, int]]:
    """The positions of weights that are compared with each other, and how many of them are to go."""
    positions = torch.arange(score.numel()).reshape(score.shape)
    if ":" in sparsity:
        n, m = map(int, sparsity.split(":"))
        yield from ((group, m - n) for group in positions.reshape(-1, m))
    elif granularity == "row":
        yield from ((row, score.shape[1] * int(100 * float(sparsity)) // 100) for row in positions)
    else:
        yield positions.flatten(), score.numel() * int(100 * float(sparsity)) // 100


def check_pruning(method: GBLM | RegionalGradient, calibration: Calibration, score: Tensor, sparsity: str) -> None:
    weight, statistics = calibration.weight, calibration.statistics(method.p)
    before = weight.clone()
    torch.testing.assert_close(method.score(weight, statistics).double(), score, rtol=1e-4, atol=1e-9)
    pruned = method.prune(weight, statistics, Sparsity(sparsity))
    assert torch.equal(weight, before)
    assert torch.equal(pruned.weight, torch.where(pruned.mask, weight, torch.zeros_like(weight)))
    assert pruned.weight.dtype == weight.dtype
    for group, zeros in compared(score, sparsity, method.granularity):
        kept, scores = pruned.mask.flatten()[group], score.flatten()[group]
        assert int((~kept).sum()) == zeros
        assert not zeros or float(scores[~kept].max()) <= float(scores[kept].min()) * (1 + 1e-3)


alphas = st.sampled_from([0.0, 0.5, 100.0, 1e4])
granularities = st.sampled_from(["row", "matrix"])


@given(calibrations(), st.sampled_from([1, 2]), alphas, granularities)
@settings(max_examples=60)
def test_gblm_scores_by_its_definition(
    problem: tuple[Calibration, str], p: int, alpha: float, granularity: Any
) -> None:
    calibration, sparsity = problem

    def of(weight: float, i: int, j: int) -> float:
        inputs = calibration.norm_of_input(j) * math.sqrt(128 * 2048 / (calibration.samples * calibration.length))
        total = math.fsum(abs(g) ** p for g in calibration.gradients(i, j)) * 128 / calibration.samples
        return weight * (inputs + alpha * total ** (1 / p))

    method = GBLM(alpha, p, granularity=granularity)
    check_pruning(method, calibration, calibration.score(of), sparsity)


@given(calibrations(), alphas, granularities)
@settings(max_examples=60)
def test_regional_gradient_scores_by_its_definition(
    problem: tuple[Calibration, str], alpha: float, granularity: Any
) -> None:
    calibration, sparsity = problem

    def of(weight: float, i: int, j: int) -> float:
        mean = math.fsum(g**2 for g in calibration.gradients(i, j)) / calibration.samples
        return weight * (alpha * math.sqrt(mean) + calibration.norm_of_input(j) / math.sqrt(calibration.samples))

    check_pruning(RegionalGradient(alpha, granularity), calibration, calibration.score(of), sparsity)


@pytest.mark.parametrize("p", [1, 2])
def test_gblm_at_the_published_size_is_the_published_score(p: int) -> None:
    calibration = Calibration(3, 128, 2048, 4, 3, torch.float32)
    statistics = calibration.statistics(p)
    gradients = torch.einsum("sti,stj->sij", calibration.output_gradients.double(), calibration.inputs.double())
    norm = torch.linalg.vector_norm(gradients, ord=p, dim=0)
    score = calibration.weight.abs() * (calibration.inputs.double().square().sum((0, 1)).sqrt() + 100 * norm)
    torch.testing.assert_close(GBLM(p=p).score(calibration.weight, statistics).double(), score, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("make", "alpha"), [(GBLM, 100), (partial(GBLM, p=2), 300), (RegionalGradient, 100)], ids=["p1", "p2", "regional"]
)
def test_samples_that_come_twice_change_nothing(make: Callable[[float], GBLM | RegionalGradient], alpha: float) -> None:
    calibration = Calibration(5, 8, 16, 64, 32, torch.float32)
    method = make(alpha)
    once, twice, often = (calibration.statistics(method.p, times) for times in (1, 2, 7))
    score = method.score(calibration.weight, once)
    share = float(make(0).score(calibration.weight, once).sum() / score.sum())
    assert 0.2 < share < 0.8  # else the balance would not show
    mask = method.prune(calibration.weight, once, Sparsity(0.5)).mask
    for statistics in (twice, often):
        torch.testing.assert_close(method.score(calibration.weight, statistics), score, rtol=1e-4, atol=0)
        assert torch.equal(method.prune(calibration.weight, statistics, Sparsity(0.5)).mask, mask)


@pytest.mark.parametrize("method", [GBLM(0), GBLM(0, p=2), RegionalGradient(0)], ids=["p1", "p2", "regional"])
def test_without_gradients_both_are_wanda(method: GBLM | RegionalGradient) -> None:
    calibration = Calibration(7, 3, 8, 24, 8, torch.float32)
    statistics = calibration.statistics(method.p)
    masks = [each.prune(calibration.weight, statistics, Sparsity("2:4")).mask for each in (method, Wanda())]
    assert torch.equal(*masks)


def test_what_the_methods_ask_for() -> None:
    assert (GBLM.statistic, GBLM.gradient, GBLM.updates) == (InputNorm, "model", False)
    assert (RegionalGradient.statistic, RegionalGradient.gradient, RegionalGradient.updates) == (
        InputNorm,
        "block",
        False,
    )
    usual = GBLM()
    assert (usual.alpha, usual.p, usual.backward, usual.granularity) == (100, 1, "blocks", "row")
    assert (RegionalGradient().alpha, RegionalGradient().p, RegionalGradient().granularity) == (100, 2, "row")


OUTSIDE = "is outside [0, inf); give the gradient's share, such as 100"


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GBLM(p=3), "p '3' is neither 1 nor 2; give 1, as published, or 2"),
        (lambda: GBLM(p=0), "p '0' is neither 1 nor 2; give 1, as published, or 2"),
        (
            lambda: GBLM(backward="layers"),  # type: ignore[arg-type]
            "backward 'layers' is neither 'blocks' nor 'model'; give 'blocks', which needs less memory",
        ),
        *(
            (partial(cls, alpha=alpha), f"alpha '{alpha}' {OUTSIDE}")
            for cls in (GBLM, RegionalGradient)
            for alpha in (-1, math.nan, math.inf)
        ),
    ],
)  # fmt: skip
def test_parameters_that_are_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        make()


@pytest.mark.parametrize("method", [GBLM(), RegionalGradient()], ids=["gblm", "regional"])
def test_statistics_that_are_missing(method: GBLM | RegionalGradient) -> None:
    calibration = Calibration(0, 2, 3, 4, 2, torch.float32)
    complete = calibration.statistics(method.p)
    other = calibration.statistics(3 - method.p).gradient
    for gradient, shown in ((None, "None"), (other, f"{3 - method.p}-norms")):
        with pytest.raises(TypeError, match=f"needs {method.p}-norms of the gradients .* was given {shown}"):
            method.score(calibration.weight, complete._replace(gradient=gradient))
    with pytest.raises(TypeError, match="norms of a layer's inputs"):
        method.score(calibration.weight, complete._replace(inputs=None))
    gram = Gram()
    gram.add(calibration.inputs)
    torch.testing.assert_close(
        method.score(calibration.weight, complete._replace(inputs=gram)), method.score(calibration.weight, complete)
    )
