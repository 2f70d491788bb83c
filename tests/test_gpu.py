"""What a GPU changes, as far as a CPU can show it; what it cannot is skipped where there is no GPU."""

import argparse
import importlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from conftest import compile_anew
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import GradClipAlgorithmType
from safetensors.torch import load_file
from test_reconstruction import NOTHING, LinearBlock, tiny_llama, trainer, unit
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from lit_prune.accelerators import in_precision
from lit_prune.cli import main
from lit_prune.data import CalibrationText, ReconstructionPairs, propagate
from lit_prune.data.transfer import _side, ahead, beside
from lit_prune.errors import BadInput
from lit_prune.masks import ADMM, ALPS, Gram, MaskMethod, MutualInformation, SparseGPT, Sparsity, Wanda, solvers
from lit_prune.masks.exact import BACKENDS, exact
from lit_prune.models import BlockCall, Neurons, capture_calls, embed, find_blocks, linear_layers, weight_of
from lit_prune.modules import KeepBest, Reconstruction, observe, prune_layers
from lit_prune.modules.pruning import prune_neurons
from lit_prune.needs import place_of_streams
from lit_prune.resources import named_device

ROOT = Path(__file__).parent.parent
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none")


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """Which takes longer than a short run, and is tested elsewhere."""
    monkeypatch.setattr("lit_prune.run.Run._report", lambda _: None)


@pytest.fixture(autouse=True)
def _default_precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def fit(folder: Path, *settings: str) -> dict:
    """Figures of a short run on the tiny model, cut to two sequences of text."""
    given = {"data.samples": 4, "data.validation_samples": 2, "trainer.max_epochs": 1, "evaluation.windows": 2}
    given |= {"model.checkpoint": ROOT / "tiny/model", "data.source": ROOT / "tiny/text/calibration.txt"}
    given |= {"evaluation.texts": f"[{ROOT / 'tiny/text/held_out.txt'}]", "output_dir": folder, "data.batch_size": 4}
    given |= {"data.sequence_length": 64}
    arguments = [f"--config={ROOT / 'configs/tiny.yaml'}", *(f"--{key}={value}" for key, value in given.items())]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, *settings])
    assert not stop.value.code
    return json.loads((folder / "metrics.json").read_text())


def weights(folder: Path) -> dict[str, Tensor]:
    files = (folder / "model").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# Precision of a training


@pytest.fixture
def a_gpu(monkeypatch):
    """Lightning is told of one; nothing is computed there."""
    monkeypatch.setattr("lightning.fabric.accelerators.cuda.num_cuda_devices", lambda: 1)
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(CUDAAccelerator, "get_parallel_devices", staticmethod(lambda _: [torch.device("cuda", 0)]))
    monkeypatch.setattr(CUDAAccelerator, "parse_devices", staticmethod(lambda _: [0]))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)


@pytest.mark.parametrize("accelerator", ["gpu", "auto", "cuda"])
def test_a_gpu_trains_in_bfloat16_unless_told_otherwise(a_gpu, accelerator):
    given = {"accelerator": accelerator, "max_epochs": 3}
    assert in_precision(given | {"precision": None}) == given | {"precision": "bf16-mixed"}
    assert in_precision(given | {"precision": "32-true"}) == given | {"precision": "32-true"}


def test_an_older_gpu_and_a_cpu_train_in_float32(a_gpu, monkeypatch):
    assert in_precision({"accelerator": "cpu", "precision": None})["precision"] == "32-true"
    assert in_precision({"accelerator": "cpu", "precision": "bf16-mixed"})["precision"] == "bf16-mixed"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert in_precision({"accelerator": "gpu", "precision": None})["precision"] == "32-true"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"precision": "bf16-true"}, "trainer.precision: in 'bf16-true' weights themselves would not be float32"),
        ({"precision": "64-true"}, "give bf16-mixed or 32-true"),
        ({"plugins": [MixedPrecision("bf16-mixed", "cpu")]}, "trainer.plugins: a precision is given as trainer.prec"),
        ({"devices": 0}, "trainer: "),
    ],
)
def test_what_cannot_be_trained_in_is_refused(given, sentence):
    with pytest.raises(BadInput, match=sentence):
        in_precision({"accelerator": "cpu"} | given)


def test_beside_an_apple_gpu_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr("lightning.pytorch.accelerators.MPSAccelerator.is_available", staticmethod(lambda: True))
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: False))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    several = {"accelerator": "auto", "devices": 2, "strategy": "ddp"}
    assert in_precision(several) == several | {"accelerator": "cpu", "precision": "32-true"}
    assert named_device("auto") == torch.device("cpu")
    for name in ("mps", "gpu"):
        with pytest.raises(
            BadInput, match=rf"trainer\.accelerator: '{name}' .* no GPU with float64.*; give cpu or auto"
        ):
            in_precision({"accelerator": name})
    with pytest.raises(BadInput, match=r"device: 'mps' lacks float64"):
        named_device("mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_is_refused():
    with pytest.raises(
        BadInput, match=r"trainer\.accelerator: 'gpu' is asked for, but PyTorch finds no GPU with float64"
    ):
        in_precision({"accelerator": "gpu"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tuple[dict, Path]]:
    """The same short run in several precisions."""
    kinds = {
        "full": [],
        "mixed": ["--trainer.precision=bf16-mixed"],
    }
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_prune.run.Run._report", lambda _: None)
        for number, (kind, settings) in enumerate(kinds.items()):
            folder = tmp_path_factory.mktemp("runs") / str(number)
            made[kind] = fit(folder, *settings), folder
    return made


def test_the_precision_stands_in_the_configuration_and_does_not_bar_the_way_back(runs):
    said = {kind: (folder / "config.yaml").read_text() for kind, (_, folder) in runs.items()}
    assert "  precision: 32-true\n" in said["full"]
    assert "  precision: bf16-mixed\n" in said["mixed"]
    fit(runs["full"][1])  # finished already: the same settings, with the precision that was meant
    fit(runs["full"][1], f"--config={runs['full'][1] / 'config.yaml'}")


def test_only_the_training_is_in_mixed_precision(runs):
    (full, _), (mixed, folder) = runs["full"], runs["mixed"]
    # all that the first block goes through before it is trained, and what is measured of a model that is the same
    assert full["blocks"][0]["error"]["before"] == mixed["blocks"][0]["error"]["before"]
    assert full["perplexity"]["dense"] == mixed["perplexity"]["dense"]
    assert full["trainings"][0]["loss"]["held_out"][0] != mixed["trainings"][0]["loss"]["held_out"][0]
    assert full["perplexity"]["pruned"] == pytest.approx(mixed["perplexity"]["pruned"], rel=0.02)
    masks = [load_file(run[1] / "blocks" / "000.safetensors") for run in (runs["full"], (mixed, folder))]
    names = [name for name in masks[0] if name.startswith("mask:")]
    assert names
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in names)


def test_weights_that_are_trained_stay_float32(tmp_path, monkeypatch):
    seen: set[tuple[torch.dtype, bool]] = set()

    def look(optimizer: torch.optim.AdamW, *args: object, **kwargs: object) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            state = optimizer.state[parameter].values()
            seen.update((t.dtype, optimizer.defaults["fused"]) for t in (parameter, parameter.grad, *state))

    plain = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (plain(self, *a, **k), look(self))[0])
    fit(tmp_path / "run", "--trainer.precision=bf16-mixed", "--evaluation.texts=[]")
    assert seen == {(torch.float32, True)}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_a_fused_optimiser_clips_in_bfloat16(algorithm):
    def trained(fused: bool, most: float | None) -> Tensor:
        torch.manual_seed(0)
        block = LinearBlock(8)
        hidden = torch.randn(2, 8, 4, 8)
        module = unit(block, NOTHING, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, fused=fused))
        clip = {"gradient_clip_val": most, "gradient_clip_algorithm": algorithm}
        trainer(2, precision="bf16-mixed", **clip).fit(module, datamodule=ReconstructionPairs(*hidden, samples=8))
        return block.linear.weight.detach()

    most = 1e-8  # as small as AdamW's epsilon, so that it shows
    assert torch.allclose(trained(True, most), trained(False, most), rtol=1e-5)
    assert not torch.allclose(trained(True, most), trained(True, None), rtol=1e-2)


def test_float16_is_still_clipped_as_lightning_does():
    """Where there is a scaler, it unscales first, or refuses."""
    module = unit(LinearBlock(8), NOTHING)
    plugin = MixedPrecision("16-mixed", "cuda", scaler=object())
    module.trainer = SimpleNamespace(
        precision_plugin=plugin, gradient_clip_val=1.0, gradient_clip_algorithm=GradClipAlgorithmType.NORM
    )
    fused = torch.optim.AdamW(module.parameters(), fused=True)
    with pytest.raises(RuntimeError, match="unscaling of gradients internally"):
        module.configure_gradient_clipping(fused, 1.0, "norm")


@pytest.mark.parametrize("most", [1e-3, None])
def test_in_float16_gradients_are_unscaled_then_masked_then_clipped(most):
    """So the norm over the weights that are kept is the greatest one allowed, whatever the others would add."""
    steps: list[Tensor] = []

    class Noting(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            steps.extend(p.grad.clone() for group in self.param_groups for p in group["params"])
            return loss

    torch.manual_seed(0)
    block, kept = LinearBlock(8), torch.rand(8, 8) < 0.5
    module = unit(block, NOTHING, {"linear": kept}, partial(Noting, lr=1e-2))
    in_float16 = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    pairs = ReconstructionPairs(*torch.randn(2, 8, 4, 8), samples=8, batch_size=2)
    trainer(1, plugins=[in_float16], gradient_clip_val=most).fit(module, datamodule=pairs)
    norms = [float(gradient[kept].norm()) for gradient in steps]
    assert len(norms) == 4
    assert not any(gradient[~kept].any() for gradient in steps)
    if most:
        assert norms == pytest.approx([most] * 4, rel=1e-3)
    else:
        assert all(0.05 < norm < 5 for norm in norms), norms  # far from what is allowed above, and from the scale


# Float32 as it is


class Products(TorchDispatchMode):
    """Notes in which precision float32 matrices are multiplied, factorised and solved for."""

    COUNTED = ("mm", "addmm", "bmm", "baddbmm", "linalg_cholesky_ex", "linalg_solve_triangular", "_linalg_eigh")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, torch.dtype]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in self.COUNTED:
            dtype = next(leaf.dtype for leaf in args if isinstance(leaf, Tensor))
            self.seen.append((name, BACKENDS[0].fp32_precision if BACKENDS else matmul_precision(), dtype))
        return function(*args, **kwargs or {})


def matmul_precision() -> str:
    return {"highest": "ieee"}.get(torch.get_float32_matmul_precision(), "tf32")


METHODS = {
    "Wanda": (Wanda(), None, set()),
    "SparseGPT": (SparseGPT(), None, {"mm", "addmm", "linalg_cholesky_ex", "linalg_solve_triangular"}),
    "ADMM": (ADMM(), None, {"mm", "linalg_cholesky_ex"}),
    "ALPS": (ALPS(iterations=6), None, {"mm", "_linalg_eigh"}),
    "Wanda, conjugate gradients": (Wanda(), solvers.ConjugateGradient(), {"mm"}),
    "Wanda, ADMM": (Wanda(), solvers.ADMM(), {"mm", "linalg_cholesky_ex"}),
}


def pruned(method: MaskMethod, solver: solvers.Solver | None) -> tuple[Tensor, Tensor]:
    """Weight and mask of a layer, and inputs with digits that bfloat16 and TF32 have not."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(48, 24), torch.randn(4, 64, 48)
    with observe({"layer": layer}, method, solver) as statistics, torch.autocast("cpu", enabled=False), torch.no_grad():
        layer(inputs)
    return layer.weight.detach(), prune_layers({"layer": layer}, statistics, method, Sparsity(0.5), solver)["layer"]


@pytest.mark.parametrize("name", METHODS)
def test_masks_and_solvers_multiply_in_float32_whatever_is_allowed(name):
    method, solver, expected = METHODS[name]
    weight, mask = pruned(method, solver)
    torch.set_float32_matmul_precision("high")
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        same_weight, same_mask = pruned(method, solver)
    assert {name for name, _, _ in products.seen} >= expected
    assert {dtype for _, _, dtype in products.seen} <= {torch.float32, torch.float64}
    assert [name for name, precision, _ in products.seen if precision != "ieee"] == ["addmm"], "the layer's own"
    assert torch.equal(weight, same_weight)
    assert torch.equal(mask, same_mask)
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize("estimator", ["gaussian", "renyi"])
def test_neurons_are_chosen_and_their_reader_solved_for_in_float32_whatever_is_allowed(estimator):
    def chosen(inside: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        up, down, inputs = nn.Linear(16, 32), nn.Linear(32, 16), torch.randn(4, 64, 32)
        method = MutualInformation(estimator)
        with observe({"down": down}, method, solvers.ADMM()) as statistics, torch.no_grad():
            down(inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            layers, neurons = {"up": up, "down": down}, Neurons(("up",), "down")
            masks = prune_neurons(layers, neurons, statistics, method, Sparsity(0.5), solvers.ADMM())
        return masks | {"reader": down.weight.detach()}

    plain = chosen(False)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in chosen(True).items())


def test_a_gram_matrix_is_summed_in_float32_inside_of_autocast():
    inputs, plain, inside = torch.randn(64, 32), Gram(), Gram()
    plain.add(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside.add(inputs)
        assert torch.equal(inside.matrix, plain.matrix)
        assert not torch.equal((inputs.T @ inputs).float(), inputs.T.double() @ inputs.double())


@pytest.mark.skipif(not BACKENDS, reason="this PyTorch has one setting for all matrix products")
def test_what_was_allowed_counts_again_even_if_said_in_both_of_pytorchs_ways():
    torch.set_float32_matmul_precision("medium")
    before = [backend.fp32_precision for backend in BACKENDS]
    BACKENDS[0].fp32_precision = "ieee"  # now PyTorch refuses to read what was set first
    try:
        with exact():
            assert {backend.fp32_precision for backend in BACKENDS} == {"ieee"}
        assert [backend.fp32_precision for backend in BACKENDS] == ["ieee", *before[1:]]
    finally:
        BACKENDS[0].fp32_precision = before[0]


def test_forward_passes_use_tf32_only_if_asked(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("lit_prune.run.Run.fit", lambda _: seen.append(torch.get_float32_matmul_precision()) or {})
    monkeypatch.setattr("lit_prune.fit.summary_table", lambda _: "")
    for number, setting in enumerate([[], ["--float32_matmul_precision=high"], []]):
        main_ = ["fit", f"--config={ROOT / 'configs/tiny.yaml'}", f"--output_dir={tmp_path / str(number)}", *setting]
        with pytest.raises(SystemExit):
            main(main_)
    assert seen == ["highest", "high", "highest"]


# Compiled blocks


@pytest.mark.parametrize("trained", ["all", "adapters"])
def test_one_compilation_serves_all_blocks_and_changes_nothing(monkeypatch, trained):
    """By a compiler that leaves operations as they are, so that results are the same to the bit."""
    compile_anew(monkeypatch, backend="aot_eager")
    graphs = []

    def reconstructed(compiled: bool) -> list[Tensor]:
        model = tiny_llama()
        blocks, tokens = find_blocks(model), torch.randint(64, (5, 16), generator=torch.Generator().manual_seed(0))
        hidden = embed(model, blocks, tokens)
        for index, (block, call) in enumerate(zip(blocks, capture_calls(model, blocks, tokens), strict=True)):
            torch.manual_seed(index)
            with torch.no_grad():
                targets = call(block, hidden)
            masks = {name: torch.rand(weight_of(layer).shape) < 0.5 for name, layer in linear_layers(block).items()}
            module = unit(block, call, masks, trained=trained, rank=2, compile=compiled)
            pairs = ReconstructionPairs(hidden, targets, 3, batch_size=2)  # with a last batch that is smaller
            trainer(1).fit(module, datamodule=pairs)
            graphs.append(counters["stats"]["unique_graphs"])
            assert not module.part.compiled
        return [parameter.detach() for parameter in blocks.parameters()]

    compiled = reconstructed(True)
    assert graphs[0] > 0
    assert graphs == graphs[:1] * len(graphs)
    assert not counters["graph_break"]
    assert all(torch.equal(a, b) for a, b in zip(compiled, reconstructed(False), strict=True))
    assert graphs == graphs[:1] * len(graphs), "nothing was compiled that was not to be"


def test_a_look_at_an_epochs_outcome_is_in_the_trainings_precision_and_compiles_nothing(monkeypatch):
    seen, forward, model = [], Reconstruction.forward, tiny_llama()

    def watched(module: Reconstruction, inputs: Tensor) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return forward(module, inputs)

    monkeypatch.setattr(Reconstruction, "forward", watched)
    blocks, tokens = find_blocks(model), torch.randint(64, (4, 16))
    hidden, (call, *_) = embed(model, blocks, tokens), capture_calls(model, blocks, tokens)
    graphs = []
    for callbacks in ([], [KeepBest()]):
        compile_anew(monkeypatch, backend="aot_eager")
        pairs = ReconstructionPairs(hidden, 2 * hidden, 4, batch_size=2)
        trainer(2, *callbacks, precision="bf16-mixed").fit(unit(blocks[0], call, compile=True), datamodule=pairs)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert Counter(seen) == {(True, True): 8, (False, True): 2}


def test_a_compiled_run_is_trained_by_compiled_blocks_alone(tmp_path, monkeypatch):
    """By the same compiler."""
    compile_anew(monkeypatch, backend="aot_eager")
    calls: list[tuple[bool, bool]] = []
    plain = BlockCall.__call__

    def watched(self: BlockCall, block: nn.Module, hidden: Tensor, compiled: bool = False) -> Tensor:
        calls.append((compiled, torch.is_grad_enabled()))
        return plain(self, block, hidden, compiled)

    monkeypatch.setattr(BlockCall, "__call__", watched)
    settings = ["--evaluation.texts=[]", "--model.reconstruction=cross_block"]
    counts = []
    for compiled in (True, False):
        fit(tmp_path / str(compiled), f"--model.compile={compiled}", *settings)
        counts.append(Counter(calls))
        calls.clear()
    steps, measured = (True, True), (True, False)  # with gradients, and without: the held-out batches
    for kind in (steps, measured):
        assert counts[0][kind] > 0
        assert counts[1][kind] == 0
        assert counts[0][False, kind[1]] == counts[1][False, kind[1]] - counts[0][kind]
    assert counts[0][False, False] > counts[0][measured], "streams go another way"
    ours, others = weights(tmp_path / "True"), weights(tmp_path / "False")
    assert all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch needs a C++ compiler for this, and there is no g++")
def test_pytorchs_own_compiler_differs_by_rounding_alone(monkeypatch):
    model = tiny_llama()
    (block, *_), tokens = find_blocks(model), torch.arange(32).view(2, 16)
    hidden, (call, *_) = embed(model, find_blocks(model), tokens), capture_calls(model, find_blocks(model), tokens)
    results = []
    compile_anew(monkeypatch)
    with inductor.patch({"cpp.vec_isa_ok": True, "cpp.simdlen": 1}):  # vectors take twice as long to compile
        for compiled in (False, True):
            output = call(block, hidden, compiled)
            results.append([output, *torch.autograd.grad(output.square().sum(), list(block.parameters()))])
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(*results, strict=True))
    assert counters["inductor"]


@pytest.mark.parametrize(
    ("said", "settings", "sentence"),
    [
        ("", ["--model.reconstruction=layer"], "model.compile: whole blocks are compiled, but model.reconstruction"),
        ("no compiler.\nA story", [], "model.compile: torch.compile does not work here (no compiler); give false."),
        ("", [], "model.compile: torch.compile does not work here (RuntimeError); give false."),
    ],
)
def test_what_cannot_be_compiled_is_refused(tmp_path, capsys, monkeypatch, said, settings, sentence):
    def missing(function: object) -> object:
        raise RuntimeError(said)

    monkeypatch.setattr(torch, "compile", missing)
    arguments = [f"--config={ROOT / 'configs/tiny.yaml'}", f"--output_dir={tmp_path / 'run'}", *settings]
    arguments += [f"--model.checkpoint={ROOT / 'tiny/model'}", f"--data.source={ROOT / 'tiny/text/calibration.txt'}"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--model.compile=true", "--data.samples=4", "--evaluation.texts=[]"])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


# Where hidden states lie


@pytest.mark.parametrize(
    ("device", "size", "needed", "place"),
    [
        ("cuda", 500, 300, "device"),
        ("cuda", 501, 300, "memory"),
        ("cuda", 1_000, 300, "memory"),
        ("cuda", 1_001, 300, "disk"),
        ("cpu", 2_000, None, "memory"),
        ("cpu", 2_001, None, "disk"),
        ("hpu", 10, 0, "memory"),
    ],
)
def test_hidden_states_lie_on_a_gpu_if_they_fit_beside_all_else(monkeypatch, device, size, needed, place):
    free = {"cuda": 1_000, "hpu": 10_000, "cpu": 4_000}
    monkeypatch.setattr("lit_prune.needs.available_memory", lambda device: free[device.type])
    data = CalibrationText(device_share=0.8, memory_share=0.5)
    assert place_of_streams(size, data, torch.device(device), needed) == place


def test_a_share_of_the_device_is_a_share():
    with pytest.raises(BadInput, match=r"data.device_share: 1\.5 is no share; give 0 to 1"):
        CalibrationText(device_share=1.5).check()


def test_on_a_cpu_nothing_is_prefetched():
    hidden, cpu = torch.randn(4, 3, 8), torch.device("cpu")
    assert not beside(hidden, cpu)
    assert not beside(hidden, None)
    pairs = ReconstructionPairs(hidden, hidden, 3, device=cpu)
    assert type(pairs.train_dataloader()) is type(pairs.val_dataloader()) is DataLoader


class FakeStream:
    """Takes down what a CUDA stream is told; copies take place at once."""

    log: ClassVar[list[str]] = []
    made = 0

    def __init__(self, name: object = "side") -> None:
        self.name = name
        FakeStream.made += 1

    def record_event(self) -> str:
        self.log.append("copies begun")
        return f"copies {self.log.count('copies begun')}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"computation waits for {event}")

    def wait_stream(self, stream: "FakeStream") -> None:
        self.log.append("copies wait for computation")

    def synchronize(self) -> None:
        self.log.append("all is stored")


@pytest.fixture
def fake_streams(monkeypatch) -> Iterator[list[str]]:
    """Calls to CUDA's streams, which are none."""
    FakeStream.log.clear()
    now, FakeStream.made = FakeStream("now"), 0
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: FakeStream.log.append("memory is held"))
    _side.cache_clear()
    yield FakeStream.log
    _side.cache_clear()


def test_the_next_batch_is_on_its_way_before_one_is_handed_out(fake_streams):
    there = [torch.empty(1, device="meta") for _ in range(3)]
    for number, batch in enumerate(ahead(iter(there), torch.device("cuda", 0)), 1):
        assert batch is there[number - 1]
        assert fake_streams.count("copies begun") == number + 1  # the last time there is nothing to copy
        assert fake_streams[-2:] == [f"computation waits for copies {number}", "memory is held"]
    assert list(ahead(iter([]), torch.device("cuda", 0))) == []


@pytest.mark.parametrize("form", ["block", "sublayer"])
def test_prefetched_batches_are_those_of_a_plain_run(tmp_path, monkeypatch, fake_streams, form):
    settings = [f"--model.reconstruction={form}", "--evaluation.texts=[]", "--model.offload=true"]
    fit(tmp_path / "plain", *settings)
    assert not fake_streams
    for module in ("transfer", "streams"):
        monkeypatch.setattr(f"lit_prune.data.{module}.beside", lambda tensor, device: device is not None)
    fit(tmp_path / "beside", *settings)
    assert {"copies begun", "copies wait for computation", "all is stored"} <= set(fake_streams)
    assert FakeStream.made == 2, "one for copies there, and one for copies back"
    plain, beside_ = weights(tmp_path / "plain"), weights(tmp_path / "beside")
    assert all(torch.equal(plain[name], beside_[name]) for name in plain)


@on_a_gpu
def test_on_a_gpu_it_does_not_matter_where_hidden_states_lie(tmp_path):
    places = {"device": [], "memory": ["--data.device_share=0"], "disk": ["--data.device_share=0"]}
    places["disk"] += ["--data.memory_share=0"]
    for place, settings in places.items():
        try:
            figures = fit(tmp_path / place, "--trainer.accelerator=gpu", "--trainer.deterministic=true", *settings)
        finally:
            torch.use_deterministic_algorithms(False)
        assert figures["peak_memory_bytes"]["device"] > 0
        assert figures["hidden_states"] == place
        assert "  precision: bf16-mixed\n" in (tmp_path / place / "config.yaml").read_text()
    device, memory, disk = (weights(tmp_path / place) for place in places)
    assert all(torch.equal(device[name], memory[name]) for name in device)
    assert all(torch.equal(device[name], disk[name]) for name in device)


@on_a_gpu
def test_a_gpu_is_no_worse_than_a_cpu(tmp_path):
    cpu = fit(tmp_path / "cpu")
    gpu = fit(tmp_path / "gpu", "--trainer.accelerator=gpu", "--trainer.precision=32-true")
    assert gpu["perplexity"]["dense"] == pytest.approx(cpu["perplexity"]["dense"], rel=1e-4)
    assert gpu["error"] == pytest.approx(cpu["error"], rel=0.02)


@on_a_gpu
def test_copies_take_place_beside_the_computation():
    device = torch.device("cuda")
    hidden = torch.randn(32, 256, 512).pin_memory()
    assert beside(hidden, device)
    scale = torch.randn(512, 512, device=device) / 512**0.5
    expected = hidden @ scale.cpu()
    assert torch.allclose(propagate(lambda batch: batch @ scale, hidden, device, out=hidden), expected, atol=1e-4)
    pairs = ReconstructionPairs(hidden, hidden, 32, device=device)
    batches = list(pairs.train_dataloader())
    assert all(batch[0].is_cuda for batch in batches)
    assert torch.equal(torch.cat([batch[0] for batch in batches]).cpu().sort(0).values, hidden.sort(0).values)


# The benchmark


def test_the_benchmark_runs_at_a_small_shape(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("gpu")
    benchmark.main(["--device", "cpu", "--shape", "tiny", "--epochs", "2", "--folder", str(tmp_path)])
    titles, _, figures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [cell.strip() for cell in figures.strip("|").split("|")]
    assert len(cells) == titles.count("|") - 1
    assert cells[:2] == ["memory", "32-true"]
    assert cells[5] == "not measured"
    rate, reached = (float(cell.removesuffix(" TFLOP/s")) for cell in cells[2:4])
    assert 0 < reached < rate
    assert all(float(cell) > 0 for cell in cells[6:])


def test_the_benchmark_counts_what_a_counter_of_operations_counts(monkeypatch):
    """All but half of attention, which the counter takes for whole."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark, length = importlib.import_module("gpu"), 16
    config = tiny_llama().config
    config.num_key_value_heads = config.num_attention_heads
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    hidden = torch.randn(3, length, config.hidden_size, requires_grad=True)
    places = torch.arange(length)[None]
    rotary = model.model.rotary_emb(hidden, places)
    with FlopCounterMode(display=False) as counter:
        model.model.layers[0](hidden, position_embeddings=rotary, position_ids=places).sum().backward()
    chosen = argparse.Namespace(epochs=1, samples=3, length=length)
    attention = 6 * length * config.hidden_size * 3 * length
    assert benchmark.work(chosen, config) == counter.get_total_flops() - attention
