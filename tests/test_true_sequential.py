"""Layers pruned by what those of their block that are pruned already hand on: against a plain loop, and in one pass."""

import copy
import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_forms import FEW, PARALLEL, SEQUENCE, SEQUENTIAL, assert_same_run, command, kills, noted, random_tokens, tiny
from torch import Tensor, nn

from lit_prune import preflight
from lit_prune import run as run_module
from lit_prune.data import BATCH, CalibrationText, lockstep, propagate
from lit_prune.data.streams import NotFinite
from lit_prune.errors import BadInput
from lit_prune.masking import Masking
from lit_prune.masks import ADMM, Gram, LayerMask, LayerStatistics, SparseGPT, Sparsity, Wanda, bits
from lit_prune.method import Pruning
from lit_prune.models import (
    Home,
    Window,
    capture_calls,
    embed,
    find_blocks,
    layers_in_order,
    linear_layers,
    oriented,
    weight_of,
)
from lit_prune.plan import make_plan
from lit_prune.run import Run
from lit_prune.run_folder import RunFolder
from lit_prune.walk import MASK, Walk

ON, ALONE = "--model.true_sequential=true", "--model.reconstruction=none"
MASKS: dict[str, Callable[[], LayerMask]] = {"Wanda": Wanda, "SparseGPT": SparseGPT, "ADMM": ADMM}
SPARSITIES = "0.5", "2:4", "1:4"
ARCHITECTURES = [*SEQUENTIAL, *PARALLEL]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"In the beginning there were {number} words." for number in range(60)))
    return file


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_tokenizer) -> Callable[..., Path]:
    """A function that saves a tiny model, in float16 unless one of its layers is spoilt."""

    @cache
    def save(name: str = "llama", depth: int = 2, spoilt: str = "") -> Path:
        folder = tmp_path_factory.mktemp("model")
        model = tiny(name, depth)
        if spoilt:  # one of its outputs is too large for a number
            model.get_submodule(spoilt).weight.data[3] = 3e38
        else:
            model.half()
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(autouse=True)
def prepared(monkeypatch) -> list[tuple[object, CalibrationText]]:
    """What runs have loaded, and their text; they train nothing, and write no report."""
    made, prepare, load = [], run_module.prepare, cache(preflight.load_model)

    def note(pruning: Pruning, data: CalibrationText, *others: object) -> object:
        made.append((prepare(pruning, data, *others), data))
        return made[-1][0]

    monkeypatch.setattr(run_module, "prepare", note)
    monkeypatch.setattr(preflight, "load_model", lambda path: copy.deepcopy(load(path)))
    monkeypatch.setattr(preflight, "_check_training", lambda *_: None)
    monkeypatch.setattr(Run, "_report", lambda _: None)
    return made


@pytest.fixture
def fit(capsys, text, prepared) -> Callable[..., CalibrationText]:
    """A function that runs the command to its end, and gives the text that it has used."""

    def run(folder: Path, checkpoint: Path, *settings: str) -> CalibrationText:
        status, said = command(capsys, folder, checkpoint, text, ON, ALONE, *settings)
        assert status == 0, said
        return prepared[-1][1]

    return run


# Against a plain loop


@contextmanager
def hooked(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def entering(model: tf.PreTrainedModel, layer: nn.Module, tokens: Tensor) -> Tensor:
    """What enters a layer when the whole model runs, shape (tokens, in)."""
    noted: list[Tensor] = []
    with hooked(layer.register_forward_pre_hook(lambda _, args: noted.append(args[0].clone()))):
        for batch in tokens.split(BATCH):
            model(batch, use_cache=False)
    return torch.cat([inputs.flatten(0, -2) for inputs in noted])


def wanda(weight: Tensor, inputs: Tensor, sparsity: str) -> Tensor:
    """The mask by its definition, row by row."""
    scores = weight.abs() * inputs.double().square().sum(0).sqrt()
    mask = torch.ones_like(weight, dtype=torch.bool)
    n, m = map(int, sparsity.split(":")) if ":" in sparsity else (None, weight.shape[1])
    gone = m - n if n else int(float(sparsity) * m)
    for row, start in product(range(len(weight)), range(0, weight.shape[1], m)):
        mask[row, start + scores[row, start : start + m].argsort()[:gone]] = False
    return mask


@torch.no_grad()
def one_by_one(
    checkpoint: Path, tokens: Tensor, method: LayerMask, sparsity: str, skipped: tuple[str, ...] = ()
) -> tuple[tf.PreTrainedModel, dict[str, Tensor]]:
    """Prune one layer after the other, each after a run of the whole model for it alone; model and masks."""
    model, masks = tf.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval(), {}
    blocks = find_blocks(model)
    calls, sample = capture_calls(model, blocks, tokens), embed(model, blocks, tokens[:1])
    for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        layers = linear_layers(block)
        for name in (part.name for part in layers_in_order(block, call, sample)):
            if name in skipped:
                continue
            inputs, weight = entering(model, layers[name], tokens), weight_of(layers[name])
            if isinstance(method, Wanda):
                mask = wanda(weight, inputs, sparsity)
                pruned = weight * mask
            else:
                gram = Gram()
                gram.add(inputs)
                x = inputs.double()
                torch.testing.assert_close(gram.matrix.double(), x.T @ x, rtol=1e-5, atol=1e-4)
                pruned, mask = method.prune(weight, LayerStatistics(gram), Sparsity(sparsity))
            weight.copy_(pruned.half())
            masks[f"{index}.{name}"] = mask
    return model, masks


def saved_masks(folder: Path, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """By block and layer."""
    found = {}
    for index, file in enumerate(sorted((folder / "blocks").iterdir())):
        packed = {name.removeprefix(MASK): t for name, t in load_file(file).items() if name.startswith(MASK)}
        found |= {f"{index}.{name}": bits.unpack(t, shapes[f"{index}.{name}"]) for name, t in packed.items()}
    return found


def assert_as_one_by_one(folder: Path, checkpoint: Path, tokens: Tensor, mask: str, sparsity: str, *skipped: str):
    model, expected = one_by_one(checkpoint, tokens, MASKS[mask](), sparsity, skipped)
    found = saved_masks(folder, {name: tensor.shape for name, tensor in expected.items()})
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    result = tf.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    weights = result.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    for index, block in enumerate(find_blocks(result)):
        for name, layer in linear_layers(block).items():
            if name not in skipped:
                assert not weight_of(layer)[~expected[f"{index}.{name}"]].any()


@pytest.mark.parametrize(
    ("name", "mask", "sparsity"),
    [(name, *pair[::-1]) for name, pair in zip(2 * ARCHITECTURES, cycle(product(SPARSITIES, MASKS)))],
)
def test_one_pass_ends_as_a_pass_for_every_layer(tmp_path, fit, saved, name, mask, sparsity):
    """With more sequences than a batch holds, and held-out ones, which no mask may see."""
    settings = f"--model.mask={mask}", f"--model.sparsity={sparsity}", "--evaluation.errors=false"
    data = fit(tmp_path, saved(name), *settings, "--data.samples=9")
    assert (len(data.calibration), len(data.held_out)) == (9, 2)
    assert_as_one_by_one(tmp_path, saved(name), data.calibration, mask, sparsity)


@pytest.mark.parametrize(
    ("mask", "skipped"),
    [
        ("Wanda", ("self_attn.o_proj", "mlp.up_proj")),
        ("SparseGPT", ("self_attn.q_proj",)),
        ("ADMM", ("self_attn.q_proj", "mlp.down_proj")),
    ],
)
def test_skipped_layers_hand_on_what_they_get(tmp_path, fit, saved, mask, skipped):
    patterns = json.dumps([f"*.{name}" for name in skipped])
    data = fit(tmp_path, saved(), f"--model.mask={mask}", "--model.sparsity=0.5", f"--model.skip={patterns}")
    assert_as_one_by_one(tmp_path, saved(), data.calibration, mask, "0.5", *skipped)


def test_masks_are_others_than_those_of_the_dense_block(tmp_path, capsys, text, saved):
    """Or all comparisons here would show nothing; the layers that run first see the same."""
    for value in ("true", "false"):
        settings = ALONE, f"--model.true_sequential={value}", "--model.skip=*.1.*"
        assert command(capsys, tmp_path / value, saved(), text, *settings)[0] == 0
    one, other = (load_file(tmp_path / value / "blocks" / "000.safetensors") for value in ("true", "false"))
    same = {name.rpartition(".")[2]: torch.equal(t, other[name]) for name, t in one.items() if name.startswith(MASK)}
    assert same == {"q_proj": True, "k_proj": True, "v_proj": True} | dict.fromkeys(
        ("o_proj", "gate_proj", "up_proj", "down_proj"), False
    )


@pytest.mark.parametrize("name", ["llama", "falcon"])
def test_errors_are_those_of_the_saved_model(tmp_path, fit, saved, name):
    """On calibration and on held-out text, from whole-model forward passes; blocks are the same without them."""
    data = fit(tmp_path / "run", saved(name), "--data.samples=9", "--data.validation_samples=3")
    blocks = json.loads((tmp_path / "run" / "metrics.json").read_text())["blocks"]
    for tokens, key in ((data.calibration, "error"), (data.held_out, "validation_error")):
        left: list[list[Tensor]] = []
        for path in (saved(name), tmp_path / "run" / "model"):
            model = tf.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            outputs: list[Tensor] = []

            def note(_: nn.Module, __: object, output: object, outputs: list[Tensor] = outputs) -> None:
                outputs.append(output if isinstance(output, Tensor) else output[0])

            with torch.no_grad(), hooked(*(block.register_forward_hook(note) for block in find_blocks(model))):
                model(tokens, use_cache=False)
            left.append(outputs)
        for figures, dense, sparse in zip(blocks, *left, strict=True):
            assert figures[key]["after"] == pytest.approx(float((dense - sparse).square().mean()), rel=1e-4)
            assert figures[key]["before"] == figures[key]["after"] > 0
    same = "--data.samples=9", "--data.validation_samples=3"
    fit(tmp_path / "unmeasured", saved(name), *same, "--evaluation.errors=false")
    one, other = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "unmeasured"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("mask", ["GBLM", "RegionalGradient"])
def test_gradients_that_do_not_count_leave_the_masks_of_wanda(tmp_path, fit, saved, mask):
    fit(tmp_path / "wanda", saved(), "--model.sparsity=0.5")
    fit(tmp_path / "without", saved(), "--model.sparsity=0.5", f"--model.mask={mask}", "--model.mask.alpha=0")
    fit(tmp_path / "with", saved(), "--model.sparsity=0.5", f"--model.mask={mask}")
    runs = "wanda", "without", "with"
    wanda, without, counted = (load_file(tmp_path / run / "model" / "model.safetensors") for run in runs)
    assert all(torch.equal(weight, without[name]) for name, weight in wanda.items())
    assert not all(torch.equal(weight, counted[name]) for name, weight in wanda.items())


# What layers share


def masking_of(model: tf.PreTrainedModel, folder: Path, mask: LayerMask) -> Masking:
    pruning = Pruning("none", Sparsity("0.5"), mask, reconstruction="none", true_sequential=True)
    plans = make_plan(pruning, Home(model, find_blocks(model)))
    return Masking(pruning, plans, RunFolder(folder, ""), torch.device("cpu"))


TOGETHER = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    "falcon": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],  # one norm for both halves
}


@pytest.mark.parametrize("name", TOGETHER)
@torch.no_grad()
def test_layers_that_see_one_tensor_share_its_statistic_and_what_is_derived_of_it(tmp_path, monkeypatch, name):
    derive, derived = ADMM.prune.__globals__["penalised_inverse"], []

    def noting(*arguments: object) -> Tensor:
        assert all(made() is None for made in derived), "of earlier inputs nothing stays"
        made = derive(*arguments)
        derived.append(weakref.ref(made))
        return made

    monkeypatch.setattr("lit_prune.masks.admm.penalised_inverse", noting)
    model, tokens = tiny(name), random_tokens(9)
    blocks = find_blocks(model)
    calls, hidden = capture_calls(model, blocks, tokens), embed(model, blocks, tokens)
    masking, came = masking_of(model, tmp_path, ADMM()), []
    for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        derived.clear()
        for known in masking.arrivals(index, block, Window([block], [call]), hidden):
            assert len({id(one.inputs) for one in known.values()}) == 1
            assert next(iter(known.values())).inputs.tokens == 9 * SEQUENCE
            assert masking.prune(index, block, known).keys() == known.keys()
            came.append([layer.rpartition(".")[2] for layer in known])
            assert len(derived) == len(came) - index * len(TOGETHER[name])
            assert all(made() is None for made in derived)
    assert came == TOGETHER[name] * len(blocks)


# One pass


@pytest.mark.parametrize(("errors", "passes"), [(False, 1), (True, 2)])
def test_a_batch_runs_through_a_block_once(tmp_path, monkeypatch, fit, saved, prepared, errors, passes):
    """And once more through the dense one, if errors are measured."""
    runs: Counter[int] = Counter()

    def count(walk: Walk, *_: object) -> None:
        for index, block in enumerate(walk.blocks):
            block.register_forward_pre_hook(lambda _, args, index=index: runs.update({index: len(args[0])}))

    settings = f"--evaluation.errors={str(errors).lower()}", "--data.samples=9", "--model.mask=SparseGPT"
    with noted(monkeypatch, Walk, "restore", count):
        fit(tmp_path, saved(depth=3), *settings)
    looked_at = {0: 1}  # which of its layers see one input is shown by a single sequence, for all blocks
    assert runs == {index: passes * (9 + 2) + looked_at.get(index, 0) for index in range(3)}
    assert prepared[-1][0].needs.passes == passes


# Interrupted, and left on disk


@pytest.mark.parametrize(("mask", "offload"), [("SparseGPT", "false"), ("Wanda", "true")])
def test_a_run_that_dies_after_every_block_ends_as_an_undisturbed_one(tmp_path, monkeypatch, fit, saved, mask, offload):
    settings = [f"--model.mask={mask}", "--data.samples=13", "--data.validation_samples=3"]
    settings += [f"--data.sequence_length={FEW}"]
    fit(tmp_path / "whole", saved(depth=3), *settings)
    if offload == "true":  # and so are streams
        settings.append("--data.memory_share=0")
    settings.append(f"--model.offload={offload}")
    for index in range(3):
        with kills(monkeypatch, index, listed=index != 1):
            fit(tmp_path / "killed", saved(depth=3), *settings)
    fit(tmp_path / "killed", saved(depth=3), *settings)
    for folder in (tmp_path / "whole", tmp_path / "killed"):
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if k != "hidden_states"}))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# What cannot work


@pytest.mark.parametrize(
    ("way", "mask", "layer", "errors"),
    [
        *product(["true"], MASKS, ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj"), ["false"]),
        ("true", "SparseGPT", "self_attn.o_proj", "true"),  # the dense stream shows it before
        ("false", "SparseGPT", "mlp.up_proj", "false"),  # the block's last product, which would show it, is left out
    ],
)
def test_a_layer_that_puts_out_no_numbers_is_named(tmp_path, capsys, saved, text, way, mask, layer, errors):
    settings = f"--model.true_sequential={way}", ALONE, f"--model.mask={mask}", f"--evaluation.errors={errors}"
    status, said = command(capsys, tmp_path, saved(spoilt=f"model.layers.1.{layer}"), text, *settings)
    last = said.splitlines()[-1]
    assert status == 2
    assert "Traceback" not in said
    assert last.startswith(f"lit-prune: block_01: layer '{layer}' puts out NaN or infinite values, first for calibrat")
    assert "sample 0;" in last
    assert len(list((tmp_path / "blocks").iterdir())) == 1, "what is finished stays"


def test_inputs_too_large_to_be_squared_are_told(tmp_path):
    model = tiny()
    blocks, tokens = find_blocks(model), random_tokens(2)
    call, hidden = capture_calls(model, blocks, tokens)[0], embed(model, blocks, tokens)
    with torch.no_grad():
        blocks[0].self_attn.v_proj.weight.mul_(1e25)
    masking = masking_of(model, tmp_path, Wanda())
    halts = masking.arrivals(0, blocks[0], Window([blocks[0]], [call]), hidden)
    assert len(next(halts)) == 3
    with pytest.raises(BadInput, match=r"enters layer 'model\.layers\.0\.self_attn\.o_proj' is so large that its squ"):
        next(halts)


@pytest.mark.parametrize("mask", [Wanda(), SparseGPT()], ids=["norms", "Gram"])
@pytest.mark.parametrize("way", ["true sequential", "default"])
def test_a_rank_names_its_own_layer_before_others_hear_of_it(tmp_path, monkeypatch, way, mask):
    """For them the sum of all is no number, and none of their layers is to blame."""
    model = tiny()
    blocks, tokens = find_blocks(model), random_tokens(2)
    call, hidden = capture_calls(model, blocks, tokens)[0], embed(model, blocks, tokens)
    masking, joined = masking_of(model, tmp_path, mask), []
    what = 0, blocks[0], Window([blocks[0]], [call]), hidden
    masking.observe(*what)  # from now on the last product, which would show it, is left out
    blocks[0].mlp.up_proj.weight.data.fill_(float("nan"))
    monkeypatch.setattr("lit_prune.masking.join", joined.append)
    passes = {"default": masking.observe, "true sequential": lambda *what: list(masking.arrivals(*what))}
    with pytest.raises(NotFinite) as named:
        passes[way](*what)
    assert named.value.layer == "mlp.up_proj"
    assert not any("mlp.down_proj" in statistics for statistics in joined)


def test_a_layer_that_takes_no_part_is_told_and_not_left_dense(tmp_path):
    model = tiny()
    blocks, tokens = find_blocks(model), random_tokens(2)
    call, hidden = capture_calls(model, blocks, tokens)[0], embed(model, blocks, tokens)
    blocks[0].self_attn.spare = nn.Linear(32, 32)
    halts = masking_of(model, tmp_path, Wanda()).arrivals(0, blocks[0], Window([blocks[0]], [call]), hidden)
    with pytest.raises(BadInput, match=r"^model\.true_sequential: self_attn\.spare of model\.layers\.0 take no part"):
        next(halts)


REFUSED = {
    "block": (["--model.reconstruction=block"], "model.reconstruction block is given; give model.reconstruction none"),
    "independent": (
        [ALONE, "--model.independent=true"],
        "with model.independent masks see the dense stream; leave",
    ),
    "neurons": ([ALONE, "--model.mask=MutualInformation"], "MutualInformation prunes several layers at once; leave"),
    "magnitude": ([ALONE, "--model.mask=Magnitude"], "Magnitude looks at nothing of it; leave model.true_sequential"),
}


@pytest.mark.parametrize(("settings", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_contradicts_it_is_refused(tmp_path, capsys, saved, text, settings, expected):
    status, said = command(capsys, tmp_path / "run", saved(), text, ON, *settings)
    (line,) = [line for line in said.splitlines() if "Loading weights" not in line]
    assert status == 2
    assert line.startswith("lit-prune: model.true_sequential: layers are pruned while the sparse stream passes")
    assert expected in line
    assert not (tmp_path / "run").exists()


def test_a_solver_lets_a_mask_work_that_looks_at_nothing(tmp_path, fit, saved):
    fit(tmp_path, saved(), "--model.mask=Magnitude", "--model.solver=ADMM", "--model.sparsity=2:4")
    dense, result = (load_file(folder / "model.safetensors") for folder in (saved(), tmp_path / "model"))
    for name in (name for name in dense if name.endswith("_proj.weight")):
        groups, kept = dense[name].abs().view(-1, 4).float(), result[name].view(-1, 4) != 0
        assert bool((kept.sum(1) == 2).all())
        assert bool((groups.where(kept, torch.inf).amin(1) >= groups.where(~kept, 0).amax(1)).all())
        assert not torch.equal(result[name].view(-1, 4)[kept], dense[name].view(-1, 4)[kept])


# Lockstep by itself


class Several(nn.Module):
    """Some linear layers in an order that depends on the first number that enters."""

    def __init__(self, *orders: str) -> None:
        super().__init__()
        self.orders = orders
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in sorted({*"".join(orders)})})

    def forward(self, hidden: Tensor) -> Tensor:
        for name in self.orders[int(hidden[0, 0, 0])]:
            hidden = self.layers[name](hidden)
        return hidden


def halts(module: Several, samples: int = 6, of: str = "abc") -> list[str]:
    """Where the stream of several batches halts; batch by batch another order is taken, if there are several."""
    hidden = torch.zeros(samples, 2, 4)
    hidden[:, 0, 0] = (torch.arange(samples) // BATCH).clamp(max=len(module.orders) - 1)
    layers = {name: layer for name, layer in module.layers.items() if name in of}
    return [*lockstep(module, hidden, layers, torch.empty_like(hidden))]


def test_it_halts_at_the_asked_layers_in_the_order_in_which_they_run():
    assert halts(Several("cab")) == ["c", "a", "b"]
    assert halts(Several("cab"), of="ab") == ["a", "b"]
    assert halts(Several("cbcac", "bccca"), of="ab") == ["b", "a"]  # what is not asked for does not matter
    assert halts(Several("ab"), of="") == []


@pytest.mark.parametrize("orders", [["aba"], ["aa"], ["ab", "ba"], ["ab", "a"], ["a", "ab"], ["abc", "acb"]])
def test_layers_that_do_not_run_once_each_in_one_order_are_refused(orders):
    module = Several(*orders)
    with pytest.raises(BadInput, match=r"^model\.true_sequential: .* \([abc, ]+\) do not run once each, in"):
        halts(module)
    assert not any(layer._forward_pre_hooks for layer in module.layers.values())


@pytest.mark.parametrize("orders", [["aba"], ["ab", "ba"]])
def test_a_block_whose_layers_run_otherwise_is_refused_in_a_run_too(tmp_path, orders):
    module, model = Several(*orders), tiny()
    masking = masking_of(model, tmp_path, SparseGPT())
    hidden = torch.randn(6, 2, 4)
    hidden[:, 0, 0] = (torch.arange(6) // BATCH).clamp(max=len(orders) - 1)
    masking.layers = lambda *_: dict(module.layers)
    with pytest.raises(BadInput, match=r"^model\.true_sequential: .* do not run once each, in"):
        for _ in masking.arrivals(0, module, module, hidden):
            pass


BLOCKS = {}


def block_of(name: str) -> tuple[Window, Tensor]:
    """A block, and what enters it of nine sequences."""
    if name not in BLOCKS:
        model, tokens = tiny(name), random_tokens(9)
        blocks = find_blocks(model)
        calls, hidden = capture_calls(model, blocks, tokens), embed(model, blocks, tokens)
        BLOCKS[name] = Window(blocks[1:], calls[1:]), hidden
    return BLOCKS[name]


@given(st.integers(1, 9), st.sampled_from(ARCHITECTURES), st.booleans())
def test_a_stream_comes_out_as_without_halts(samples: int, name: str, in_place: bool):
    part, hidden = block_of(name)
    hidden = hidden[:samples].clone()
    expected = propagate(part, hidden)
    out = hidden if in_place else torch.full_like(hidden, torch.nan)
    entered, let_go = hidden.clone(), []
    layers = linear_layers(part.blocks[0])
    order = [*lockstep(part, hidden, layers, out, let_go=lambda: let_go.append(None))]
    assert torch.equal(out, expected)
    assert in_place or torch.equal(hidden, entered)
    assert sorted(order) == sorted(layers)
    assert len(let_go) == -(-samples // BATCH)


@given(st.integers(1, 9), st.sampled_from(ARCHITECTURES))
def test_all_sequences_go_on_through_a_layer_as_it_is_after_the_halt(samples: int, name: str):
    """As if it had been changed before they came."""
    part, hidden = copy.deepcopy(block_of(name))
    hidden, layers = hidden[:samples], linear_layers(part.blocks[0])
    out = torch.empty_like(hidden)
    for halt in lockstep(part, hidden, layers, out):
        with torch.no_grad():
            oriented(layers[halt], layers[halt].weight)[:, ::2] = 0
    assert torch.equal(out, propagate(part, hidden))
    assert not torch.equal(out, propagate(block_of(name)[0], hidden))
