"""What is reconstructed at a time, towards what, and with which parameters: each against brute force."""

import copy
import json
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import cache, partial
from itertools import cycle, product
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_reconstruction import OPTIMIZERS, random_masks, trainer
from torch import Tensor, nn

from lit_prune import preflight
from lit_prune import run as run_module
from lit_prune.cli import main
from lit_prune.data import BATCH, CalibrationText, EvaluationText, ReconstructionPairs, propagate
from lit_prune.errors import BadInput
from lit_prune.fit import make_trainer
from lit_prune.masking import Masking
from lit_prune.masks import OWL, Magnitude, SparseGPT, Sparsity, Wanda
from lit_prune.method import Pruning, Training
from lit_prune.models import (
    Offloaded,
    Part,
    Window,
    capture_calls,
    embed,
    find_blocks,
    halves,
    layers_in_order,
    linear_layers,
    oriented,
)
from lit_prune.modules import Crossing, Reconstruction, TrainingMemory
from lit_prune.modules.reconstruction import LOSSES
from lit_prune.reporting.board import Board
from lit_prune.result import Result
from lit_prune.rounds import Round, make_rounds
from lit_prune.run import Run
from lit_prune.run_folder import RunFolder
from lit_prune.walk import Walk

ROOT = Path(__file__).parent.parent
VOCABULARY, SEQUENCE = 258, 16
FEW = 4
"""Tokens in a sequence, so few that the last bits of a matrix product depend on how many sequences a batch has."""
WIDE = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCABULARY, "initializer_range": 0.2}
IDS = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None}
COMMON = {**WIDE, **IDS, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32, **IDS}
GPT2 = {"n_embd": 32, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY, "initializer_range": 0.2, **IDS}
NEOX = {**WIDE, **IDS, "intermediate_size": 48, "max_position_embeddings": 32}

SEQUENTIAL: dict[str, Callable[[int], tf.PreTrainedConfig]] = {
    "llama": lambda depth: tf.LlamaConfig(**COMMON, num_hidden_layers=depth, attention_bias=True, mlp_bias=True),
    "opt": lambda depth: tf.OPTConfig(**WIDE, **OPT, num_hidden_layers=depth, do_layer_norm_before=True),
    "gpt2": lambda depth: tf.GPT2Config(**GPT2, n_layer=depth),
    "gemma2": lambda depth: tf.Gemma2Config(**COMMON, num_hidden_layers=depth, head_dim=8, sliding_window=6),
    "qwen2": lambda depth: tf.Qwen2Config(**COMMON, num_hidden_layers=depth),
    "sequential gpt_neox": lambda depth: tf.GPTNeoXConfig(**NEOX, num_hidden_layers=depth, use_parallel_residual=False),
}
PARALLEL: dict[str, Callable[[int], tf.PreTrainedConfig]] = {
    "gpt_neox": lambda depth: tf.GPTNeoXConfig(**NEOX, num_hidden_layers=depth, use_parallel_residual=True),
    "falcon": lambda depth: tf.FalconConfig(**WIDE, **IDS, num_hidden_layers=depth, parallel_attn=True),
}


def tiny(name: str = "llama", depth: int = 2) -> tf.PreTrainedModel:
    """A random model whose norms and biases are random too."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config((SEQUENTIAL | PARALLEL)[name](depth)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_tokens(samples: int = 4) -> Tensor:
    return torch.randint(256, (samples, SEQUENCE), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def seen(model: tf.PreTrainedModel, tokens: Tensor, *modules: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What enters and what leaves modules in a forward pass of the whole model, in the order of the modules."""
    noted: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        entering = next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor))
        leaving = output if isinstance(output, Tensor) else output[0]
        # copies: some models add to what a layer has put out in place
        noted[module] = tuple(h.view(len(tokens), SEQUENCE, -1).clone() for h in (entering, leaving))

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return [noted[module] for module in modules]


def running_order(model: tf.PreTrainedModel, tokens: Tensor, modules: dict[str, nn.Module]) -> list[str]:
    """The names of modules in the order in which they run."""
    order: list[str] = []
    handles = [m.register_forward_hook(lambda *_, name=name: order.append(name)) for name, m in modules.items()]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return order


# Rounds


def test_order_of_cross_block_reconstruction_is_the_published_one():
    for blocks in range(2, 9):
        published = [[0], *([index, index + 1] for index in range(blocks - 1)), [blocks - 1]]
        assert [list(r.window) for r in make_rounds(blocks, 2)] == published
        assert [list(r.entering) for r in make_rounds(blocks, 2)] == [[index] for index in range(blocks)] + [[]]


def test_rounds_of_width_one_are_the_blocks_one_by_one():
    assert [(r.index, *r.entering, *r.window, *r.final) for r in make_rounds(5)] == [(i, i, i, i) for i in range(5)]


@given(st.data())
def test_every_block_enters_and_becomes_final_once_and_is_trained_in_between(data):
    blocks = data.draw(st.integers(1, 24))
    width = data.draw(st.integers(1, blocks))
    stride = data.draw(st.integers(1, width))
    entered: list[int] = []
    final: list[int] = []
    for index, round_ in enumerate(make_rounds(blocks, width, stride)):
        assert round_.index == index
        entered += round_.entering
        assert 1 <= len(round_.window) <= width
        assert list(round_.window) == [block for block in entered if block not in final]
        final += round_.final
    assert entered == final == list(range(blocks))


@given(st.data())
def test_windows_are_those_of_the_rule_in_the_documentation(data):
    blocks = data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, blocks))
    s = data.draw(st.integers(1, k))
    trained = [[i for i in range(blocks) if s * (t + 1) - k <= i < s * (t + 1)] for t in range(2 * blocks)]
    rounds = make_rounds(blocks, k, s)
    assert [list(r.window) for r in rounds] == [window for window in trained if window]
    assert [list(r.entering) for r in rounds] == [[i for i in r.window if i >= s * r.index] for r in rounds]


def test_rounds_of_three_blocks_by_two():
    assert [list(r.window) for r in make_rounds(6, 3, 2)] == [[0, 1], [1, 2, 3], [3, 4, 5], [5]]


# Parts


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_halves_one_after_the_other_are_the_block(name):
    model, tokens = tiny(name), random_tokens()
    blocks = find_blocks(model)
    for block, call in zip(blocks, capture_calls(model, blocks, tokens), strict=True):
        ((hidden, expected),) = seen(model, tokens, block)
        with torch.no_grad():
            attention, mlp = halves(block, call, hidden[:1])
            middle = attention(hidden)
            assert torch.equal(attention.enter(hidden), hidden)
            assert torch.equal(mlp.enter(hidden), middle)
            torch.testing.assert_close(mlp(middle), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(call(block, hidden), expected)  # nothing is left behind
        assert (attention.name, mlp.name) == ("attention", "mlp")
        assert not any("forward" in vars(module) for module in block.modules())
        assert (middle - hidden).norm() > 0.01 * hidden.norm()
        assert (expected - middle).norm() > 0.01 * hidden.norm()


def test_attention_half_is_the_input_and_what_attention_makes_of_its_norm():
    model, tokens = tiny(), random_tokens()
    blocks = find_blocks(model)
    block, call = blocks[1], capture_calls(model, blocks, tokens)[1]
    ((hidden, leaving),) = seen(model, tokens, block)
    attention, mlp = halves(block, call, hidden[:1])
    with torch.no_grad():
        expected = hidden + block.self_attn(hidden_states=block.input_layernorm(hidden), **call.kwargs)[0]
        torch.testing.assert_close(attention(hidden), expected, rtol=1e-6, atol=1e-6)
        expected = leaving + block.mlp(block.post_attention_layernorm(leaving))
        torch.testing.assert_close(mlp(leaving), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_halves_share_out_the_linear_layers(name):
    model, tokens = tiny(name), random_tokens()
    blocks = find_blocks(model)
    call, block = capture_calls(model, blocks, tokens)[0], blocks[0]
    attention, mlp = (
        {id(p) for p in half.own_parameters()} for half in halves(block, call, embed(model, blocks, tokens))
    )
    for layer_name, layer in linear_layers(block).items():
        own = {id(p) for p in layer.parameters()}
        in_attention = "att" in layer_name
        assert own <= (attention if in_attention else mlp)
        assert not own & (mlp if in_attention else attention)
    assert attention | mlp == {id(p) for p in block.parameters()}
    assert not attention & mlp  # each norm is trained where something comes of it


@pytest.mark.parametrize("name", PARALLEL)
def test_halves_of_a_parallel_block_are_refused_in_one_sentence(name):
    model, tokens = tiny(name), random_tokens()
    blocks = find_blocks(model)
    call = capture_calls(model, blocks, tokens)[1]
    with pytest.raises(BadInput, match=r"^model\.reconstruction: sublayer .* block 1, a \w+, does not; [^.]*\.$"):
        halves(blocks[1], call, embed(model, blocks, tokens[:1]), "block 1")
    assert not any("forward" in vars(module) or module._forward_hooks for module in blocks.modules())


@pytest.mark.parametrize("name", [*SEQUENTIAL, *PARALLEL])
def test_layers_come_in_the_order_in_which_they_run_and_get_what_enters_them(name):
    model, tokens = tiny(name, 3), random_tokens()
    blocks = find_blocks(model)
    for block, call in zip(blocks, capture_calls(model, blocks, tokens), strict=True):
        layers = linear_layers(block)
        order = running_order(model, tokens, layers)
        ((hidden, _),) = seen(model, tokens, block)
        parts = layers_in_order(block, call, hidden[:1])
        assert [part.name for part in parts] == order
        assert sorted(order) == sorted(layers)
        for part, (entering, leaving) in zip(parts, seen(model, tokens, *(layers[n] for n in order)), strict=True):
            inputs = propagate(part.enter, hidden)
            assert torch.equal(inputs, entering)
            assert torch.equal(propagate(part, inputs), leaving)
            assert {id(p) for p in part.own_parameters()} == {id(p) for p in layers[part.name].parameters()}


# Losses


def test_losses_are_their_formulas():
    generator = torch.Generator().manual_seed(0)
    for scale in (1e-3, 1.0, 1e3):
        output, target = (scale * torch.randn(3, 7, 24, generator=generator) for _ in range(2))
        y, t = output.double().view(-1, 24), target.double().view(-1, 24)
        expected = {
            "mse": sum(float((a - b) @ (a - b)) for a, b in zip(y, t, strict=True)) / y.numel(),
            "relative": sum(float((a - b) @ (a - b) / (b @ b)) for a, b in zip(y, t, strict=True)) / len(y),
            "cosine": sum(1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(y, t, strict=True)) / len(y),
        }
        assert {name: float(loss(output, target)) for name, loss in LOSSES.items()} == pytest.approx(expected, rel=1e-5)


def test_losses_stay_the_same_under_the_scalings_that_they_promise():
    generator = torch.Generator().manual_seed(0)
    output, target = (torch.randn(2, 5, 16, generator=generator) for _ in range(2))
    of_token = torch.rand(2, 5, 1, generator=generator) + 0.5  # every token has a scale of its own
    relative, cosine = LOSSES["relative"], LOSSES["cosine"]
    torch.testing.assert_close(relative(of_token * output, of_token * target), relative(output, target))
    torch.testing.assert_close(cosine(of_token * output, target), cosine(output, target))
    torch.testing.assert_close(cosine(output, of_token * target), cosine(output, target))
    assert relative(2 * output, target) > 1.1 * relative(output, target)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_their_gradients_are_exactly_zero_at_the_target(loss):
    target = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    target[0, 0] = 0
    output = target.clone().requires_grad_()
    LOSSES[loss](output, target).backward()
    assert LOSSES[loss](output, target) == 0
    assert torch.equal(output.grad, torch.zeros_like(target))


# What is trained

TRAINED = ["all", "pruned", "pruned_norms_biases", "adapters"]
PARTS = ["window", "attention", "mlp", "layer"]
SKIPPED = ("v_proj", "up_proj")


def make_part(kind: str, model: tf.PreTrainedModel, tokens: Tensor):
    """A part of a model that begins with its first block, and what enters it."""
    blocks, hidden = find_blocks(model), embed(model, find_blocks(model), tokens)
    calls = capture_calls(model, blocks, tokens)
    if kind == "window":
        return Window(blocks[:2], calls[:2]), hidden
    if kind == "layer":
        (part,) = (p for p in layers_in_order(blocks[0], calls[0], hidden[:1]) if p.name == "mlp.down_proj")
    else:
        (part,) = (p for p in halves(blocks[0], calls[0], hidden[:1]) if p.name == kind)
    return part, propagate(part.enter, hidden)


class Watch(L.Callback):
    """Checks the pruned weights after every optimiser step, and keeps the adapters' changes."""

    def __init__(self) -> None:
        self.steps = 0
        self.changes: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def on_train_batch_end(self, trainer, module, *_):
        self.steps += 1
        for layer, mask in module.masks.items():
            weight = module.adapters[layer](layer.weight) if layer in module.adapters else layer.weight
            assert not oriented(layer, weight)[~mask].any()

    def on_fit_end(self, trainer, module):
        for layer, adapter in module.adapters.items():
            self.changes[layer] = adapter.up.detach().clone(), adapter.down.detach().clone()


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_only_what_is_to_be_trained_is_trained_and_masked_weights_stay_zero(part, trained, optimizer):
    model, tokens = tiny(), random_tokens(8)
    made, inputs = make_part(part, model, tokens)
    targets = propagate(made, inputs)
    masks = {
        layer: mask
        for index, block in enumerate(made.blocks)
        for (name, layer), mask in zip(linear_layers(block).items(), random_masks(block, index).values(), strict=True)
        if not name.endswith(SKIPPED)
    }
    rank, watch = 3, Watch()
    module = Reconstruction(made, masks, optimizer, trained=trained, rank=rank)
    names = {id(p): name for name, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    trainer(2, watch).fit(module, datamodule=ReconstructionPairs(inputs, targets, 8, batch_size=4))
    assert watch.steps == 4
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}

    inside = {f"model.layers.{i}." for i in range(len(made.blocks))}
    belongs = {"window": "", "attention": "self_attn.|layernorm", "mlp": "mlp.|layernorm", "layer": "mlp.down_proj"}[
        part
    ]
    own = {n for n in names.values() if n.startswith(tuple(inside)) and re.search(belongs, n)}
    # norms before the other half's modules are reached by no gradient
    reached = own - {
        f"model.layers.0.{n}.weight"
        for half, n in (("attention", "post_attention_layernorm"), ("mlp", "input_layernorm"))
        if half == part
    }
    small = {n for n in reached if before[n].ndim == 1}
    weights = {n for n in reached if n.removesuffix(".weight").endswith("_proj")} - small
    pruned = {n for n in weights if not n.removesuffix(".weight").endswith(SKIPPED)}
    assert (
        changed
        == {
            "all": weights | small,
            "pruned": pruned,
            "pruned_norms_biases": pruned | small,
            "adapters": pruned,
        }[trained]
    )

    for layer, mask in masks.items():
        assert int((layer.weight == 0).sum()) == int((~mask).sum())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not module.adapters
    assert {id(p): name for name, p in model.named_parameters()} == names  # the very same parameters
    assert {type(layer) for layer in masks} == {nn.Linear}
    assert len(watch.changes) == (len(pruned) if trained == "adapters" else 0)
    for layer, (up, down) in watch.changes.items():
        name = names[id(layer.weight)]
        assert (len(down), up.shape[1]) == (rank, rank)
        change = up @ down
        assert 0 < torch.linalg.matrix_rank(change) <= rank
        assert torch.equal(layer.weight, before[name] + change * masks[layer])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("part", ["window", "layer"])
def test_training_without_a_pruned_weight_changes_no_bit(part, trained, loss):
    model, tokens = tiny(), random_tokens()
    made, inputs = make_part(part, model, tokens)
    layers = [layer for block in made.blocks for layer in linear_layers(block).values()]
    masks = {layer: torch.ones_like(layer.weight, dtype=torch.bool) for layer in layers}
    module = Reconstruction(made, masks, partial(torch.optim.AdamW, lr=1e-2, weight_decay=0), "linear", loss, trained)
    before = copy.deepcopy(model.state_dict())
    trainer(2).fit(module, datamodule=ReconstructionPairs(inputs, propagate(made, inputs), 4, batch_size=4))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_adapters_of_a_transposed_layer_are_masked_too():
    model, tokens = tiny("gpt2"), random_tokens()
    blocks = find_blocks(model)
    hidden, (call, *_) = embed(model, blocks, tokens), capture_calls(model, blocks, tokens)
    targets = propagate(lambda h: call(blocks[0], h), hidden)
    layers, masks = linear_layers(blocks[0]), random_masks(blocks[0])
    module = Reconstruction(
        Window([blocks[0]], [call]), {layers[n]: m for n, m in masks.items()}, trained="adapters", rank=2
    )
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    trainer(2, Watch()).fit(module, datamodule=ReconstructionPairs(hidden, targets, 4, batch_size=2))
    for name, layer in layers.items():
        assert torch.equal(layer.weight == 0, ~masks[name].T)
        assert not torch.equal(layer.weight, before[name])


def test_the_rank_is_at_most_the_smaller_dimension():
    model, tokens = tiny(), random_tokens()
    made, inputs = make_part("layer", model, tokens)
    layer, targets = linear_layers(made.blocks[0])["mlp.down_proj"], propagate(made, inputs)
    watch = Watch()
    module = Reconstruction(made, {layer: torch.rand(32, 48) < 0.5}, trained="adapters", rank=1000)
    trainer(1, watch).fit(module, datamodule=ReconstructionPairs(inputs, targets, 4))
    assert [tensor.shape for tensor in watch.changes[layer]] == [(32, 32), (32, 48)]


# Runs

FORMS: dict[str, dict[str, object]] = {
    "layer": {"reconstruction": "layer"},
    "sublayer": {"reconstruction": "sublayer"},
    "block": {"reconstruction": "block"},
    "window of 2": {"reconstruction": "cross_block", "window": 2},
    "window of 3": {"reconstruction": "cross_block", "window": 3},
    "window of 3 by 2": {"reconstruction": "cross_block", "window": 3, "stride": 2},
}
DEPTHS = {form: 2 if form in ("layer", "sublayer") else 3 for form in FORMS} | {"window of 3 by 2": 5}
"""Rounds of a window of 3 by 2: {0, 1}, {1, 2, 3}, {3, 4}; in the second two blocks enter behind an older one."""
ALL_FORMS = FORMS | {
    "none": {"reconstruction": "none"},
    "window of 2 by 2": {"reconstruction": "cross_block", "window": 2, "stride": 2},
    "window of 3 by 3": {"reconstruction": "cross_block", "window": 3, "stride": 3},
}
PROPAGATIONS: dict[str, dict[str, bool]] = {
    "local": {"global_propagation": False},
    "global": {},
    "independent": {"independent": True},
}
LAYERS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text((ROOT / "tiny" / "text" / "calibration.txt").read_text(encoding="utf-8")[:4_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_tokenizer) -> Callable[..., Path]:
    """A function that saves a tiny model, so that weights are rounded to float16 whenever a block is final."""
    made: dict[tuple[str, int], Path] = {}

    def save(name: str = "llama", depth: int = 3) -> Path:
        if (name, depth) not in made:
            folder = made[name, depth] = tmp_path_factory.mktemp("model")
            tiny(name, depth).half().save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
        return made[name, depth]

    return save


@pytest.fixture
def job(monkeypatch, text, checkpoint) -> Callable[..., Run]:
    """A function that makes a run, whose report and summary are left out; `run.loaded` is there once it has begun."""
    prepare, load = run_module.prepare, cache(preflight.load_model)
    current: list[Run] = []

    def note(*arguments: object) -> object:
        current[-1].loaded = prepare(*arguments)
        return current[-1].loaded

    monkeypatch.setattr(run_module, "prepare", note)
    monkeypatch.setattr(preflight, "_check_training", lambda *_: None)  # tried elsewhere
    monkeypatch.setattr(preflight, "load_model", lambda path: copy.deepcopy(load(path)))
    monkeypatch.setattr(Result, "masked_only", lambda result: result.home)
    monkeypatch.setattr(Run, "_report", lambda _: None)
    monkeypatch.setattr(Board, "block", lambda *_: None)

    def make(folder: Path, *, depth: int = 3, samples: int = 6, batch_size: int = 4, lr: float = 1e-2, **more) -> Run:
        length, held_out, errors = more.pop("length", SEQUENCE), more.pop("held_out", 2), more.pop("errors", True)
        data = CalibrationText(str(text), samples, length, held_out, batch_size, seed=0)
        pruning = Pruning(str(checkpoint(depth=depth)), more.pop("sparsity", Sparsity("0.5")), **more)
        settings = {"max_epochs": 1, "log_every_n_steps": 1, "accelerator": "cpu", "logger": False}
        training = Training(partial(make_trainer, settings), partial(torch.optim.AdamW, lr=lr))
        evaluation = EvaluationText(errors=errors)
        run = Run(pruning, data, evaluation, training, RunFolder(folder, f"settings: {sorted(more)}\n"))
        current.append(run)
        return run

    return make


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@contextmanager
def noted(monkeypatch, owner: type, name: str, note: Callable[..., None]) -> Iterator[None]:
    """Call `note` with the arguments of every call of a method, before the call."""
    original = getattr(owner, name)

    def noting(*arguments: object) -> object:
        note(*arguments)
        return original(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, noting)
        yield


def dense_of(run: Run) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(run.pruning.checkpoint, dtype=torch.float32).eval()


def through(model: tf.PreTrainedModel, tokens: Tensor, window: range, part: str) -> tuple[Tensor, Tensor]:
    """What enters and leaves a part of a Llama in a forward pass of the whole of it."""
    blocks = model.model.layers
    if part in LAYERS:
        return seen(model, tokens, blocks[window[0]].get_submodule(part))[0]
    # between attention and MLP lies what enters the second norm
    first, last = blocks[window[0]], blocks[window[-1]]
    (entering, _), (middle, _), (_, leaving) = seen(model, tokens, first, first.post_attention_layernorm, last)
    return {"": (entering, leaving), "attention": (entering, middle), "mlp": (middle, leaving)}[part]


def put(dense: tf.PreTrainedModel, model: tf.PreTrainedModel, window: range, part: str) -> tf.PreTrainedModel:
    """A copy of a Llama, into which a part of the dense one is put."""
    mixed = copy.deepcopy(model)
    halves = {"attention": ("input_layernorm", "self_attn"), "mlp": ("post_attention_layernorm", "mlp")}
    for index in window:
        for name in halves.get(part, (part,)):
            path = f"model.layers.{index}.{name}".removesuffix(".")
            mixed.set_submodule(path, copy.deepcopy(dense.get_submodule(path)))
    return mixed


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_part_learns_from_and_towards_whole_model_computations(tmp_path, monkeypatch, job, form, propagation):
    run = job(tmp_path, depth=DEPTHS[form], **FORMS[form], **PROPAGATIONS[propagation])
    dense = dense_of(run)
    trained = []

    def check(walk, round_, _, part, crossing):
        model, tokens, where = run.loaded.model, run.data.tokens, (round_.window, part.name)
        inputs, targets = walk._reconstruction(part, round_.window).pair(crossing)
        on_dense = through(dense, tokens, *where)
        if propagation == "independent":
            expected = on_dense
        else:
            mixed = put(dense, model, *where)
            towards = on_dense if propagation == "global" else through(mixed, tokens, *where)
            expected = through(copy.deepcopy(model), tokens, *where)[0], towards[1]
        for tensor, wanted in zip((inputs, targets), expected, strict=True):
            torch.testing.assert_close(tensor, wanted, rtol=1e-4, atol=1e-5)
        if round_.window.start and propagation == "global":  # the streams differ by more than what is tolerated
            assert (inputs - on_dense[0]).norm() > 1e-2 * inputs.norm()
        assert (through(model, tokens, *where)[1] - targets).norm() > 1e-2 * targets.norm()
        trained.append((tuple(round_.window), part.name))

    with noted(monkeypatch, Walk, "_fit", check):
        run.fit()
    parts = {"layer": ["q", "k", "v", "o", "gate", "up", "down"], "sublayer": ["attention", "mlp"]}
    expected = {
        "window of 2": [(0,), (0, 1), (1, 2), (2,)],
        "window of 3": [(0,), (0, 1), (0, 1, 2), (1, 2), (2,)],
        "window of 3 by 2": [(0, 1), (1, 2, 3), (3, 4)],
    }.get(form, [(index,) for index in range(DEPTHS[form]) for _ in parts.get(form, [""])])
    assert [window for window, _ in trained] == expected
    assert {part for _, part in trained} == {"layer": {*LAYERS}, "sublayer": {"attention", "mlp"}}.get(form, {""})
    assert [tuple(t["blocks"]) for t in run.metrics["trainings"]] == expected  # every part was trained indeed


@pytest.mark.parametrize(
    ("propagation", "mask"),
    [("local", Wanda()), ("global", Wanda()), ("global", SparseGPT()), ("independent", SparseGPT())],
    ids=["local-norms", "global-norms", "global-Gram", "independent-Gram"],
)
@pytest.mark.parametrize("form", ["block", "window of 2", "window of 3 by 2", "window of 3 by 3"])
def test_statistics_of_an_entering_block_are_those_of_the_model_as_it_stands(
    tmp_path, monkeypatch, job, form, propagation, mask
):
    run = job(tmp_path, depth=DEPTHS.get(form, 3), **ALL_FORMS[form], **PROPAGATIONS[propagation], mask=mask)
    dense = dense_of(run)
    original, entered = Masking.observe, []

    def observe(masking, index, block, forward, hidden, out, *others):
        tokens = run.data.calibration
        model = dense if propagation == "independent" else copy.deepcopy(run.loaded.model)
        (expected, leaving), *layers = seen(
            model, tokens, model.model.layers[index], *linear_layers(model.model.layers[index]).values()
        )
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
        statistics = original(masking, index, block, forward, hidden, out, *others)
        assert (out is not None) == (propagation == "independent" or (form, propagation) == ("block", "local"))
        if out is not None:
            torch.testing.assert_close(out, leaving, rtol=1e-4, atol=1e-5)
        assert list(statistics) == list(linear_layers(block))
        for known, (inputs, _) in zip(statistics.values(), layers, strict=True):
            x = inputs.double().flatten(0, 1)
            assert known.inputs.tokens == len(x)
            torch.testing.assert_close(known.norms.norm.double(), (x * x).sum(0).sqrt(), rtol=1e-4, atol=1e-5)
            if isinstance(mask, SparseGPT):
                torch.testing.assert_close(known.gram.matrix.double(), x.T @ x, rtol=1e-4, atol=1e-3)
        for name, tensor in dense.model.layers[index].state_dict().items():
            assert torch.equal(tensor, block.state_dict()[name]), "a block is pruned from its dense weights"
        entered.append(index)
        return statistics

    monkeypatch.setattr(Masking, "observe", observe)
    run.fit()
    assert entered == [*range(DEPTHS.get(form, 3))]


@pytest.mark.parametrize(
    ("form", "propagation", "trained", "loss"),
    [(*pair, t, loss) for pair, t, loss in zip(product([*FORMS, "none"], PROPAGATIONS), cycle(TRAINED), cycle(LOSSES))],
)
def test_without_sparsity_the_model_stays_bit_identical(tmp_path, job, form, propagation, trained, loss):
    """Although training takes other batches than the streams do, and calibration and held-out text share one."""
    more = {"sparsity": Sparsity("0"), "trained": trained, "loss": loss, "batch_size": 2, "samples": 13}
    more |= FORMS.get(form, {"reconstruction": form}) | PROPAGATIONS[propagation] | {"depth": DEPTHS.get(form, 3)}
    run = job(tmp_path, **more, held_out=3, length=FEW)
    run.fit()
    dense, result = load_file(Path(run.pruning.checkpoint) / "model.safetensors"), weights(tmp_path)
    assert dense.keys() == result.keys()
    assert all(torch.equal(dense[name], tensor) for name, tensor in result.items())
    assert run.metrics["error"] == 0
    assert run.metrics["trainings"] == []  # without held-out text, training could do harm


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("form", ["none", "sublayer", "block", "window of 2"])
def test_without_errors_the_weights_are_the_same(tmp_path, job, form, propagation):
    more = FORMS.get(form, {"reconstruction": form}) | PROPAGATIONS[propagation] | {"length": FEW}
    job(tmp_path / "measured", **more).fit()
    run = job(tmp_path / "unmeasured", **more, errors=False)
    run.fit()
    one, other = weights(tmp_path / "measured"), weights(tmp_path / "unmeasured")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert run.metrics["error"] is None
    assert run.metrics["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert all(block["error"] == {"before": None, "after": None} for block in run.metrics["blocks"])


@pytest.mark.parametrize(("errors", "passes"), [(True, 3), (False, 2)])
def test_a_mask_alone_takes_two_passes_and_one_more_for_errors(tmp_path, monkeypatch, job, errors, passes):
    sequences: list[int] = []
    run = job(tmp_path, samples=6, held_out=2, reconstruction="none", errors=errors)
    with noted(monkeypatch, Window, "forward", lambda _, hidden: sequences.append(len(hidden))):
        run.fit()
    sequences = [count for count in sequences if count > 1]  # single ones are tried before the start
    assert sum(sequences) == 3 * (6 + 8 * (passes - 1))  # blocks; statistics do without held-out sequences
    assert run.loaded.needs.passes == passes


@pytest.mark.parametrize(
    "more", [{"independent": True}, {"reconstruction": "none", "mask": Magnitude()}], ids=["independent", "magnitude"]
)
@pytest.mark.parametrize("allocation", [None, OWL()], ids=["given", "allocated"])
def test_one_sequence_shows_that_a_model_can_compute_from_which_nobody_learns(
    tmp_path, monkeypatch, job, more, allocation
):
    led: list[int] = []

    def note(walk: Walk, *_: object) -> None:
        sparse = walk.streams.sparse
        assert len(sparse) == 1
        led.append(sparse.untyped_storage().nbytes() // sparse.nbytes)

    run = job(tmp_path, samples=6, held_out=2, errors=False, allocation=allocation, **more)
    with noted(monkeypatch, Walk, "restore", note):
        run.fit()
    assert led == [1], "and no memory is kept for others"


def test_what_lies_outside_the_blocks_is_not_read_as_a_whole_for_the_result(tmp_path, monkeypatch, job):
    run = job(tmp_path, offload=True, reconstruction="none", mask=Magnitude())
    saving: list[bool] = []
    save, read_outside = Result.save, Offloaded.read_outside

    def noting_save(result: Result) -> dict[str, int]:
        saving.append(True)
        try:
            return save(result)
        finally:
            saving.clear()

    def noting_read(home: Offloaded) -> dict[str, Tensor]:
        assert not saving
        reads.append(home)
        return read_outside(home)

    reads: list[Offloaded] = []
    monkeypatch.setattr(Result, "save", noting_save)
    monkeypatch.setattr(Offloaded, "read_outside", noting_read)
    run.fit()
    assert reads


@pytest.mark.parametrize(("errors", "passes"), [(True, 2), (False, 0)])
def test_a_mask_that_needs_no_statistics_takes_no_pass_for_them(tmp_path, monkeypatch, job, errors, passes):
    sequences: list[int] = []
    run = job(tmp_path, samples=6, held_out=2, reconstruction="none", mask=Magnitude(), errors=errors)
    with noted(monkeypatch, Window, "forward", lambda _, hidden: sequences.append(len(hidden))):
        run.fit()
    sequences = [count for count in sequences if count > 1]  # single ones are tried before the start
    assert sum(sequences) == 3 * 8 * passes
    assert run.loaded.needs.passes == passes


@pytest.mark.parametrize("mask", [Wanda(), SparseGPT()])
def test_statistics_need_no_product_of_the_layer_that_runs_last(tmp_path, monkeypatch, job, mask):
    """But for the first block, which has to show which layer that is."""
    rows: Counter[str] = Counter()
    run = job(tmp_path / "a", depth=4, samples=6, held_out=0, reconstruction="none", mask=mask, errors=False)

    def note(inputs: Tensor, weight: Tensor, *_: object) -> None:
        for index, block in enumerate(run.loaded.blocks if hasattr(run, "loaded") else []):
            for name, layer in linear_layers(block).items():
                rows[f"{index}.{name}"] += len(inputs) if layer.weight is weight else 0

    with noted(monkeypatch, F, "linear", note):
        run.fit()
    of = {name: [rows[f"{index}.{name}"] for index in range(4)] for name in LAYERS}
    first, *others = of.pop("mlp.down_proj")
    assert others == [6, 6, 6]
    assert all(products == [first, 12, 12, 12] for products in of.values())

    plain = job(tmp_path / "b", depth=4, samples=6, held_out=0, reconstruction="none", mask=mask, errors=False)
    monkeypatch.setattr(Masking, "_last_left_out", lambda *_: nullcontext())
    plain.fit()
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("order", "last"), [("ab", "b"), ("ba", "a"), ("abab", None), ("aba", None), ("bb", None)])
def test_a_layer_that_runs_more_than_once_in_a_pass_is_not_left_out(tmp_path, order, last):
    masking = Masking(Pruning("none", Sparsity("0.5")), [], RunFolder(tmp_path, ""), torch.device("cpu"))
    layers = {name: nn.Linear(4, 4) for name in sorted({*order})}
    with masking._last_left_out(nn.ModuleDict(layers), layers, 3):
        for _ in range(3):
            for name in order:
                layers[name](torch.ones(1, 4))
    assert [*masking._last.values()] == ([last] if last else [])


PASSES = {
    "none": (3, 3, 2), "layer": (11, 18, 10), "sublayer": (7, 8, 6), "block": (4, 4, 3), "window of 2": (7, 5, 4),
    "window of 3": (9, 6, 5), "window of 3 by 2": (6.5, 5, 4), "window of 2 by 2": (5.5, 4.5, 3.5),
    "window of 3 by 3": (5 + 2 / 3, 4 + 2 / 3, 3 + 2 / 3),
}  # fmt: skip
"""By propagation: local, global, independent; as docs/reconstruction.md has them, which counts layers as seven."""
UNMEASURED = {
    ("block", "local"): 2, ("window of 2", "local"): 5, ("block", "independent"): 1, ("none", "independent"): 1,
    ("window of 2", "independent"): 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "propagation", "errors", "expected"),
    [
        *((form, way, True, row[index]) for form, row in PASSES.items() for index, way in enumerate(PROPAGATIONS)),
        *((*pair, False, count) for pair, count in UNMEASURED.items()),
    ],
)
def test_passes_through_a_block_beside_training_are_as_many_as_foretold(
    tmp_path, monkeypatch, job, form, propagation, errors, expected
):
    """Counted over the first blocks, as many as the window moves on by: only the last ones take fewer."""
    width, stride = (ALL_FORMS[form].get(key, 1) for key in ("window", "stride"))
    samples, depth = BATCH, width + stride
    counts = [0] * depth

    def count(walk: Walk, *_: object) -> None:
        for index, block in enumerate(walk.blocks):  # and so its dense copy, which is made with its hooks
            block.register_forward_pre_hook(partial(passed, index))

    def passed(index: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts[index] += len(args[0]) == samples  # single sequences show where to cut a block

    def pair(walk: Walk, round_: Round, _: int, part: Part, crossing: Crossing) -> None:
        walk._reconstruction(part, round_.window).pair(crossing)

    monkeypatch.setattr(Walk, "_fit", pair)  # without the training
    what = ALL_FORMS[form] | PROPAGATIONS[propagation]
    run = job(tmp_path, depth=depth, samples=samples, held_out=0, errors=errors, **what)
    with noted(monkeypatch, Walk, "restore", count):
        run.fit()
    assert sum(counts[:stride]) / stride == pytest.approx(expected)
    assert sum(counts) / depth <= expected + 1e-9
    assert run.loaded.needs.passes == pytest.approx(expected)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_a_training_stays_in_memory(tmp_path, monkeypatch, job, form):
    """Neither its pairs nor its optimiser: a Trainer, its loops and loaders hold each other."""
    left: list[weakref.ref[object]] = []
    made, configured = ReconstructionPairs.__init__, Reconstruction.configure_optimizers

    def pairs(*arguments: object) -> None:
        assert not [ref for ref in left if ref() is not None]
        left.append(weakref.ref(arguments[0]))
        made(*arguments)

    def optimizers(module: Reconstruction) -> dict[str, object]:
        found = configured(module)
        left.append(weakref.ref(found["optimizer"]))
        return found

    monkeypatch.setattr(ReconstructionPairs, "__init__", pairs)
    monkeypatch.setattr(Reconstruction, "configure_optimizers", optimizers)
    job(tmp_path, depth=DEPTHS[form], **FORMS[form]).fit()
    assert len(left) > 2


@pytest.mark.parametrize("form", FORMS)
def test_too_little_memory_for_a_form_is_said_before_the_start(tmp_path, monkeypatch, job, form):
    """What a form needs is counted: dense copies, and inputs and targets of parts, which may be wider."""
    needed = []
    of_training, of_streams = preflight.training_memory, preflight.stream_memory

    def training_memory(*arguments: object) -> TrainingMemory:
        needed.append(sum(found := of_training(*arguments)))
        return found

    def stream_memory(*arguments: object) -> int:
        needed[-1] += of_streams(*arguments)
        return of_streams(*arguments)

    monkeypatch.setattr(preflight, "training_memory", training_memory)
    monkeypatch.setattr(preflight, "stream_memory", stream_memory)
    monkeypatch.setattr(preflight, "available_memory", lambda _: 10**15)
    for propagation in ("global", "independent", "local"):
        run = job(tmp_path / "run", depth=3, offload=False, **FORMS[form], **PROPAGATIONS[propagation])
        run_module.prepare(run.pruning, run.data, run.evaluation, run.training, run.folder)
    everywhere, apart, locally = needed
    block = sum(4 * p.numel() for p in run.loaded.blocks[0].parameters())
    assert everywhere == apart
    keeps = {"window of 2": 2, "window of 3": 3, "window of 3 by 2": 3}.get(form, 0)
    assert locally - everywhere == keeps * block
    monkeypatch.setattr(preflight, "available_memory", lambda _: locally - 1)
    with pytest.raises(BadInput, match=rf"^model.reconstruction: \w+ needs {locally / 1e9:.2f} GB"):
        run_module.prepare(run.pruning, run.data, run.evaluation, run.training, run.folder)
    run.data.memory_share = 0  # streams lie on disk then, and are not in the way
    of_weights = locally - of_streams(
        run.pruning, run.evaluation.errors, run.loaded.home, torch.zeros(1, SEQUENCE, 32), 8
    )
    with pytest.raises(BadInput, match=r"^model\.offload: the run needs"):  # what is asked next
        run_module.prepare(run.pruning, run.data, run.evaluation, run.training, run.folder)
    assert 0 < of_weights < locally


class Killed(Exception):
    pass


@contextmanager
def kills(monkeypatch: pytest.MonkeyPatch, after: int, listed: bool) -> Iterator[None]:
    """The run inside dies in the round of this index: its blocks are written, but listed in the manifest or not."""
    save_round, save_manifest = RunFolder.save_round, RunFolder._save_manifest

    def round_(folder: RunFolder, index: int, *blocks: object) -> None:
        save_round(folder, index, *blocks)
        if index == after:
            raise Killed

    def manifest(folder: RunFolder) -> None:
        if folder.rounds == after + 1:
            raise Killed
        save_manifest(folder)

    with monkeypatch.context() as patch:
        if listed:
            patch.setattr(RunFolder, "save_round", round_)
        else:
            patch.setattr(RunFolder, "_save_manifest", manifest)
        with pytest.raises(Killed):
            yield


def without_resources(metrics: object) -> object:
    if isinstance(metrics, dict):
        return {k: without_resources(v) for k, v in metrics.items() if k not in ("seconds", "peak_memory_bytes")}
    return [without_resources(value) for value in metrics] if isinstance(metrics, list) else metrics


def figures(folder: Path) -> object:
    return without_resources(json.loads((folder / "metrics.json").read_text()))


def assert_same_run(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert figures(one) == figures(other)
    for folder in (one, other):
        names = sorted(file.name for file in (folder / "blocks").iterdir())
        assert names == [f"{index:03d}.safetensors" for index in range(len(names))]


RESUMED = [
    ("layer", "global"), ("sublayer", "global"), ("block", "independent"), ("window of 2", "local"),
    ("window of 2", "independent"), ("window of 3", "global"), ("window of 3 by 2", "local"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "propagation"), RESUMED)
def test_a_run_that_dies_in_every_round_ends_as_an_undisturbed_one(tmp_path, monkeypatch, job, form, propagation):
    """In each of them twice: before and after what it has done is listed."""
    more = {**FORMS[form], **PROPAGATIONS[propagation], "samples": 13, "held_out": 3}
    more |= {"depth": DEPTHS[form], "length": FEW}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = job(whole, **more)
    run.fit()
    for index in range(len(make_rounds(more["depth"], run.pruning.window_width, run.pruning.window_stride))):
        for listed in (False, True):
            with kills(monkeypatch, index, listed):
                job(killed, **more).fit()
            assert json.loads((killed / "manifest.json").read_text())["rounds"] == index + listed
    job(killed, **more).fit()
    assert_same_run(whole, killed)


@pytest.mark.parametrize("listed", [False, True])
def test_a_cross_block_run_that_dies_once_ends_as_an_undisturbed_one(tmp_path, monkeypatch, job, listed):
    more = FORMS["window of 2"]
    job(tmp_path / "whole", **more).fit()
    for index in range(4):
        killed = tmp_path / str(index)
        with kills(monkeypatch, index, listed):
            job(killed, **more).fit()
        job(killed, **more).fit()
        assert_same_run(tmp_path / "whole", killed)


@pytest.mark.parametrize("form", ["window of 2", "window of 3", "window of 3 by 2"])
def test_what_is_stored_of_a_block_is_what_its_last_training_left_of_it(tmp_path, monkeypatch, job, form):
    left: dict[int, dict[str, Tensor]] = {}
    train = Walk.train

    def trained(walk: Walk, rounds: Sequence[Round]) -> None:
        train(walk, rounds)
        left.update((i, copy.deepcopy(walk.blocks[i].state_dict())) for round_ in rounds for i in round_.window)

    monkeypatch.setattr(Walk, "train", trained)
    run = job(tmp_path, depth=DEPTHS[form], **FORMS[form])
    run.fit()
    assert [*left] == [*range(DEPTHS[form])]
    for index, tensors in left.items():
        stored = load_file(tmp_path / "blocks" / f"{index:03d}.safetensors")
        assert {name for name in stored if not name.startswith("mask:")} == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(stored[name], tensor.half())
            assert torch.equal(weights(tmp_path)[f"model.layers.{index}.{name}"], stored[name])


def test_pending_blocks_are_gone_even_if_the_run_died_before_it_could_remove_them(tmp_path, monkeypatch, job):
    """In the very moment after the last round is listed."""
    save = RunFolder._save_manifest

    def listed_and_killed(folder: RunFolder) -> None:
        save(folder)
        if folder.rounds == 3:
            raise Killed

    run = job(tmp_path, depth=2, **FORMS["window of 2"])
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_save_manifest", listed_and_killed)
        with pytest.raises(Killed):
            run.fit()
    job(tmp_path, depth=2, **FORMS["window of 2"]).fit()
    assert sorted(file.name for file in (tmp_path / "blocks").iterdir()) == ["000.safetensors", "001.safetensors"]


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize(
    ("form", "skip"), [("sublayer", "*.self_attn.*"), ("layer", "*.k_proj"), ("window of 2", "*.1.*")]
)
def test_parts_in_which_nothing_is_pruned(tmp_path, job, form, skip, trained):
    run = job(tmp_path, depth=2, **FORMS[form], skip=skip, trained=trained)
    run.fit()
    dense, result = load_file(Path(run.pruning.checkpoint) / "model.safetensors"), weights(tmp_path)
    for name, tensor in dense.items():
        if name.endswith("_proj.weight"):
            skipped = fnmatchcase(name.removesuffix(".weight"), skip)
            assert ((result[name] == 0).float().mean() == 0.5) == (not skipped)
            if skipped and (trained != "all" or form == "window of 2"):
                assert torch.equal(result[name], tensor)
        elif trained in ("pruned", "adapters") or (form == "window of 2" and ".1." in name):
            assert torch.equal(result[name], tensor)


def test_training_a_half_leaves_the_norms_of_the_other_alone():
    """Gemma 2 has a norm after attention, and one after the MLP."""
    model, tokens = tiny("gemma2"), random_tokens()
    blocks = find_blocks(model)
    hidden, (call, *_) = embed(model, blocks, tokens), capture_calls(model, blocks, tokens)
    first = "input_layernorm", "post_attention_layernorm"
    for half in halves(blocks[0], call, hidden):
        before, inputs = copy.deepcopy(blocks[0].state_dict()), propagate(half.enter, hidden)
        module = Reconstruction(half, {}, OPTIMIZERS["AdamW with weight decay"])
        targets = torch.randn_like(inputs)
        trainer(1).fit(module, datamodule=ReconstructionPairs(inputs, targets, 4))
        changed = {n for n, t in blocks[0].state_dict().items() if "layernorm" in n and not torch.equal(t, before[n])}
        assert {n.removesuffix(".weight") in first for n in changed} == {half.name == "attention"}
        assert len(changed) == 2


# The command


def command(capsys, folder: Path, checkpoint: Path, text: Path, *settings: str) -> tuple[int, str]:
    """Exit status, and what is said on standard error."""
    given = {"model.checkpoint": checkpoint, "output_dir": folder, "data.source": text, "data.samples": 6}
    given |= {"data.validation_samples": 2, "data.sequence_length": SEQUENCE, "evaluation.texts": "[]"}
    capsys.readouterr()  # what making the checkpoint has said
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "fit",
                "--config",
                str(ROOT / "configs" / "tiny.yaml"),
                *(f"--{k}={v}" for k, v in given.items()),
                *settings,
            ]
        )
    return stop.value.code, capsys.readouterr().err


CROSS, ADAPTERS = "--model.reconstruction=cross_block", "--model.trained=adapters"
BAD = {
    "too wide": (
        "llama",
        [CROSS, "--model.window=4", "--data.source=nowhere"],  # which is read later
        "model.window: 4 is more than the model's 3 blocks; give fewer.",
    ),
    "no window": ("llama", [CROSS, "--model.window=0"], "model.window: 0 is too few; give at least 1."),
    "too far": ("llama", [CROSS, "--model.stride=3"], "model.stride: a window of 2 blocks that moves on by 3 leaves"),
    "no stride": ("llama", [CROSS, "--model.stride=0"], "model.stride: 0 is too few; give at least 1."),
    "no rank": ("llama", [ADAPTERS, "--model.rank=0"], "model.rank: 0 is too few; give at least 1."),
    "window of nothing": (
        "llama",
        ["--model.window=3"],
        "model.window: 3 is given, but model.reconstruction block trains",
    ),
    "stride of nothing": (
        "llama",
        ["--model.reconstruction=layer", "--model.stride=2"],
        "model.stride: 2 is given, but model.reconstruction layer trains no windows of blocks; give cross_block, or no",
    ),
    "rank of nothing": (
        "llama",
        ["--model.rank=4"],
        "model.rank: 4 is given, but model.trained all trains no adapters; give adapters, or no model.rank.",
    ),
    "form": ("llama", ["--model.reconstruction=blocks"], "model.reconstruction: 'blocks' does not fit; give none or"),
    "loss": ("llama", ["--model.loss=l1"], "model.loss: 'l1' does not fit; give mse or relative or cosine."),
    "trained": ("llama", ["--model.trained=none"], "model.trained: 'none' does not fit; give all or"),
    "halves": ("gpt_neox", ["--model.reconstruction=sublayer"], "model.reconstruction: sublayer needs blocks that"),
}


@pytest.mark.parametrize(("name", "settings", "expected"), BAD.values(), ids=BAD.keys())
def test_what_cannot_work_is_said_before_anything_is_written(
    tmp_path, capsys, checkpoint, text, name, settings, expected
):
    status, said = command(capsys, tmp_path / "run", checkpoint(name), text, *settings)
    said = [line for line in said.splitlines() if "Loading weights" not in line]
    assert status == 2
    assert len(said) == 1
    assert said[0].startswith(f"lit-prune: {expected}")
    assert not (tmp_path / "run").exists()


def test_early_stopping_sees_every_training_by_itself(tmp_path, capsys, checkpoint, text, monkeypatch):
    monkeypatch.setattr(run_module.Run, "_report", lambda _: None)
    early = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=reconstruction_loss/held_out"]
    early += ["--trainer.callbacks.patience=2", "--trainer.max_epochs=8", "--optimizer.lr=0.05"]
    early += ["--lr_scheduler=constant", "--model.reconstruction=sublayer"]
    status, _ = command(capsys, tmp_path / "run", checkpoint(), text, *early)
    assert status == 0
    stopped = []
    for training in json.loads((tmp_path / "run" / "metrics.json").read_text())["trainings"]:
        losses = training["loss"]["held_out"][1:]  # the start does not count for Lightning's callback
        # by its own losses alone: it stops once the lowest lies two epochs back
        ends = [e for e in range(3, 9) if losses[:e].index(min(losses[:e])) + 1 == e - 2]
        assert len(losses) == min([*ends, 8])
        assert len(losses) == len(training["loss"]["train"])
        stopped.append(len(losses))
    assert min(stopped) < 8
    assert len(set(stopped)) > 1, stopped


TRAINER = {
    "rate": (["--optimizer.lr=-1"], "Invalid learning rate"),
    "optimiser": (["--optimizer=torch.optim.Muon"], "Muon only supports 2D parameters"),
    "schedule": (["--lr_scheduler=StepLR", "--lr_scheduler.step_size=0"], "modulo by zero"),
    "endless": (["--trainer.max_epochs=-1"], "cannot convert float infinity"),
    "nothing": (["--trainer.max_epochs=0"], "with these settings nothing is trained"),
    "no batches": (["--trainer.limit_train_batches=0"], "with these settings nothing is trained"),
    "checks": (["--trainer.val_check_interval=100"], "must be less than or equal to the number of the training"),
    "many devices": (["--trainer.accelerator=cpu", "--trainer.devices=9999"], "give at most one a core"),
    "strategy": (["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp_spawn"], "give ddp"),
    "stop by nothing": (
        [
            "--trainer.callbacks+=EarlyStopping",
            "--trainer.callbacks.monitor=reconstruction_loss/held_out",
            "--data.validation_samples=0",
        ],
        "use any of the following: `reconstruction_loss/train`",
    ),
}


@pytest.mark.parametrize(("settings", "expected"), TRAINER.values(), ids=TRAINER.keys())
def test_what_the_training_would_refuse_is_said_before_anything_is_written(
    tmp_path, capsys, checkpoint, text, settings, expected
):
    status, said = command(capsys, tmp_path / "run", checkpoint(), text, *settings)
    said = [line for line in said.splitlines() if "Loading weights" not in line]
    assert status == 2
    assert said[-1].startswith("lit-prune: trainer")
    assert expected in said[-1]
    assert not (tmp_path / "run").exists()


def test_a_schedule_may_follow_a_loss(tmp_path, capsys, checkpoint, text, monkeypatch):
    monkeypatch.setattr(run_module.Run, "_report", lambda _: None)
    schedule = ["--lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau"]
    schedule += ["--lr_scheduler.monitor=reconstruction_loss/held_out"]
    status, _ = command(capsys, tmp_path / "run", checkpoint(), text, *schedule)
    assert status == 0
