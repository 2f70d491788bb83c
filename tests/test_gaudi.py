"""Gaudi without a Gaudi: the same runs on the CPU and on a device that only looks like one (tests/gaudi)."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from test_forms import SEQUENCE, tiny
from torch import Tensor, nn

from lit_prune.accelerators import HPUAccelerator, HPUDDPStrategy, on_gaudi
from lit_prune.cli import main
from lit_prune.models import BlockCall, Home
from lit_prune.modules import Reconstruction
from lit_prune.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "gaudi"

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_acc"), reason="this PyTorch cannot be given a device that is written in Python"
)

# What the other process does: it alone has the software device


def begin() -> None:
    """Intel's package lies there, but nobody has imported it; nor must anything be computed on the CPU before."""
    sys.path.insert(0, str(Path(__file__).parent / "gaudi"))


def package(name: str) -> Any:
    return importlib.import_module(f"habana_frameworks.torch.{name}")


def command(*arguments: str, lazy: bool = False) -> tuple[int, str]:
    """Exit status of lit-prune and what it says on standard error."""
    said = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"PT_HPU_LAZY_MODE": str(int(lazy))}))
        stack.enter_context(mock.patch("lit_prune.run.Run._report"))
        stack.enter_context(contextlib.redirect_stderr(said))
        stop = stack.enter_context(pytest.raises(SystemExit))
        main(list(arguments))
    return stop.value.code or 0, said.getvalue()


@pytest.fixture(scope="module")
def there() -> Iterator[Callable[..., Any]]:
    """Calls a function in the other process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin) as process:
        process.submit(os.getpid).result()  # so that no test waits for it
        yield lambda *call: process.submit(*call).result()


@pytest.fixture(scope="module")
def fit(tmp_path_factory, tiny_tokenizer) -> Callable[..., list[str]]:
    """The command that prunes a model of two blocks, with grouped queries and tied embeddings."""
    model, text = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("text") / "text.txt"
    tiny().half().save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    text.write_text((ROOT / "tiny" / "text" / "calibration.txt").read_text(encoding="utf-8")[:4_000], encoding="utf-8")
    given = {"model.checkpoint": model, "data.source": text, "data.samples": 6, "data.validation_samples": 2}
    given |= {"data.sequence_length": SEQUENCE, "evaluation.texts": f"[{text}]", "evaluation.window_length": SEQUENCE}
    given |= {"evaluation.windows": 2, "trainer.max_epochs": 1, "data.batch_size": 4}
    command = [
        "fit",
        f"--config={ROOT / 'configs' / 'tiny.yaml'}",
        *(f"--{key}={value}" for key, value in given.items()),
    ]
    return lambda folder, device, *more: [*command, f"--output_dir={folder}", f"--trainer.accelerator={device}", *more]


def weights(folder: Path) -> dict[str, Tensor]:
    files = (folder / "model").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


FORMS = {
    "wanda, block": [],
    "sparsegpt, none": ["--model.mask=SparseGPT", "--model.reconstruction=none"],
    "cross_block": ["--model.reconstruction=cross_block"],
    "layer": ["--model.reconstruction=layer"],
    "sublayer with adapters": ["--model.reconstruction=sublayer", "--model.trained=adapters", "--model.rank=2"],
    "independent": ["--model.independent=true"],
    "ADMM, no global propagation": ["--model.mask=ADMM", "--model.global_propagation=false"],
    "ALPS, 2:4": ["--model.mask=ALPS", "--model.mask.iterations=20", "--model.sparsity=2:4"],
    "gradients": ["--model.mask=GBLM", "--model.solver=ConjugateGradient", "--model.reconstruction=none"],
    "gradients of the model": ["--model.mask=GBLM", "--model.mask.backward=model", "--model.reconstruction=none"],
    "gradients of blocks": ["--model.mask=RegionalGradient", "--model.reconstruction=none"],
    "neurons": ["--model.mask=MutualInformation", "--model.reconstruction=none"],
    "allocation, offloaded": ["--model.allocation=OWL", "--model.offload=true", "--model.sparsity=0.5"],
    "at random, by error": [
        "--model.mask=Random",
        "--model.allocation=ByError",
        "--optimizer=torch.optim.SGD",
        "--optimizer.lr=0.01",
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_ends_with_the_weights_of_one_on_the_cpu(tmp_path, there, fit, form):
    for device, run in (("cpu", command), ("hpu", partial(there, partial(command, lazy=True)))):
        status, said = run(*fit(tmp_path / device, device, *FORMS[form]))
        assert status == 0, said
    assert same_weights(tmp_path / "cpu", tmp_path / "hpu")
    cpu, hpu = (json.loads((tmp_path / device / "metrics.json").read_text()) for device in ("cpu", "hpu"))
    assert cpu["perplexity"] == hpu["perplexity"]
    assert cpu["blocks"][-1]["error"] == pytest.approx(hpu["blocks"][-1]["error"])
    assert (cpu["peak_memory_bytes"]["device"], cpu["machine"]["accelerator"]) == (None, None)
    assert (hpu["peak_memory_bytes"]["device"], hpu["machine"]["accelerator"]) == (4321, "software hpu")


# What is moved


def moves(arguments: list[str], forgotten: str | None = None) -> tuple[set[str], str]:
    """Where in lit-prune a run moves tensors to the device, and what it says if at one place it forgets to."""
    places: set[str] = set()

    def watched(to: Callable[..., Any], tensors: Callable[[Any], list[Tensor]]) -> Callable[..., Any]:
        def moved(thing: Any, *where: Any, **how: Any) -> Any:
            frames = [sys._getframe(1), sys._getframe(2)]
            own = next((frame for frame in frames if f"{os.sep}lit_prune{os.sep}" in frame.f_code.co_filename), None)
            before = {tensor.device.type for tensor in tensors(thing)}
            there = to(thing, *where, **how)
            if own is None or "cpu" not in before or {tensor.device.type for tensor in tensors(there)} != {"hpu"}:
                return there
            place = f"{Path(own.f_code.co_filename).name}:{own.f_lineno}"
            places.add(place)
            if place != forgotten:
                return there
            return there.cpu() if isinstance(there, nn.Module) else thing

        return moved

    kinds = {Tensor: lambda it: [it], nn.Module: lambda it: list(it.parameters()), BlockCall: lambda it: it._tensors}
    with contextlib.ExitStack() as stack:
        for kind, tensors in kinds.items():
            stack.enter_context(mock.patch.object(kind, "to", watched(kind.to, tensors)))
        try:
            _, said = command(*arguments, lazy=True)
        except RuntimeError as error:
            said = str(error)
    return places, said


MOVES = {
    "layer": "blocks parts reconstruction streams walk",
    "gradients": "gblm gradients home",
    "allocation, offloaded": "allocation language_model",
}


@pytest.mark.parametrize("form", MOVES)
def test_no_move_to_the_device_can_be_forgotten(tmp_path, there, fit, form):
    places, _ = there(moves, fit(tmp_path / "whole", "hpu", *FORMS[form]))
    places = [place for place in sorted(places) if place.partition(".")[0] in MOVES[form].split()]
    assert {place.partition(".")[0] for place in places} == set(MOVES[form].split())
    for index, place in enumerate(places):
        _, said = there(moves, fit(tmp_path / str(index), "hpu", *FORMS[form]), place)
        assert "expected all tensors on one device, but found hpu and cpu" in said, place


def interrupted(arguments: list[str]) -> None:
    """Die when the second block is to be stored."""
    save = RunFolder.save_round

    def stop(folder: RunFolder, index: int, *blocks: object) -> None:
        if index == 1:
            raise ZeroDivisionError
        save(folder, index, *blocks)

    with mock.patch.object(RunFolder, "save_round", stop), pytest.raises(ZeroDivisionError):
        command(*arguments, lazy=True)


@pytest.mark.parametrize("form", ["wanda, block", "cross_block"])
def test_an_interrupted_run_goes_on_there(tmp_path, there, fit, form):
    assert command(*fit(tmp_path / "cpu", "cpu", *FORMS[form]))[0] == 0
    arguments = fit(tmp_path / "hpu", "hpu", *FORMS[form])
    there(interrupted, arguments)
    assert there(partial(command, lazy=True), *arguments)[0] == 0
    assert same_weights(tmp_path / "cpu", tmp_path / "hpu")


def evaluated(run: Path, device: str, *more: str) -> dict[str, Any]:
    """Perplexity and divergence by the other verb."""
    if device == "hpu":
        package("core")  # which on a Gaudi PyTorch imports of itself
    text, output = str(ROOT / "tiny" / "text" / "held_out.txt"), run / f"{device}{len(more)}.json"
    arguments = [f"--texts=[{text}]", "--tasks=[]", "--window_length=16", "--windows=4", f"--output={output}", *more]
    assert command("evaluate", str(run), f"--device={device}", *arguments)[0] == 0
    figures = json.loads(output.read_text())
    return {kind: figures[kind] for kind in ("perplexity", "divergence")}


def test_evaluate_measures_the_same_there(tmp_path, there, fit):
    assert command(*fit(tmp_path, "cpu", *FORMS["sparsegpt, none"]))[0] == 0
    for more in ([], ["--offload=true"]):
        assert evaluated(tmp_path, "cpu", *more) == there(evaluated, tmp_path, "hpu", *more)


def whereabouts(*arguments: str) -> tuple[list[int], set[str]]:
    """How many blocks are on the device when one is called, and where ranks sum what they have measured."""
    counts, summed, call = [], set(), BlockCall.__call__

    def watched(own: BlockCall, block: nn.Module, *inputs: Any) -> Tensor:
        counts.append(sum(next(b.parameters()).device.type == "hpu" for b in homes[-1].blocks))
        return call(own, block, *inputs)

    def total(tensor: Tensor) -> Tensor:
        summed.add(tensor.device.type)
        return tensor

    homes: list[Home] = []
    plain = Home.outside
    outside = lambda home, device: homes.append(home) or plain(home, device)  # noqa: E731
    with (
        mock.patch.object(BlockCall, "__call__", watched),
        mock.patch.object(Home, "outside", outside),
        mock.patch("lit_prune.ranks.total", total),
    ):
        evaluated(*arguments)
    return counts, summed


def test_one_block_of_a_model_in_memory_is_on_the_device_to_be_measured_and_ranks_sum_there(tmp_path, there, fit):
    assert command(*fit(tmp_path, "cpu", *FORMS["sparsegpt, none"]))[0] == 0
    counts, summed = there(whereabouts, tmp_path, "hpu")
    assert set(counts) == {1}
    assert summed == {"hpu"}


# What Lightning is told


def steps(*arguments: str, lazy: bool) -> tuple[list[tuple[bool, str, str]], list[str], int]:
    """Of every training step: is autocast on, to what, and what a layer puts out; step marks; how many graphs."""
    core, seen, training_step = package("core"), [], Reconstruction.training_step
    core.marks.clear()
    core.compiled.clear()
    torch.compiler.reset()

    def watched(module: Reconstruction, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if len(batch[0][0]) > 1:  # not the trial before the run
            layer = next(m for m in module.modules() if isinstance(m, nn.Linear))
            state = torch.is_autocast_enabled("hpu"), str(torch.get_autocast_dtype("hpu"))
            seen.append((*state, str(layer(torch.zeros(1, layer.in_features, device=module.device)).dtype)))
        return training_step(module, batch, index)

    with mock.patch.object(Reconstruction, "training_step", watched):
        status, said = command(*arguments, lazy=lazy)
    assert status == 0, said
    assert not torch.is_autocast_enabled("hpu")
    return seen, core.marks, len(core.compiled)


def test_mixed_precision_is_on_in_every_training_step(tmp_path, there, fit):
    mixed = fit(tmp_path / "mixed", "hpu", f"--config={CONFIGS / 'one_device.yaml'}")
    seen, *_ = there(partial(steps, lazy=True), *mixed)
    assert len(seen) == 2 * 2, "two blocks, two batches"
    assert set(seen) == {(True, "torch.bfloat16", "torch.bfloat16")}
    seen, *_ = there(partial(steps, lazy=True), *fit(tmp_path / "full", "hpu"))
    assert {(on, dtype) for on, _, dtype in seen} == {(False, "torch.float32")}
    assert not same_weights(tmp_path / "mixed", tmp_path / "full")


def test_lazy_mode_marks_steps_after_every_pass_back_every_update_and_every_batch_that_is_only_measured(
    tmp_path, there, fit
):
    seen, marks, graphs = there(partial(steps, lazy=True), *fit(tmp_path, "hpu"))
    updates = [index for index, mark in enumerate(marks) if "adamw" in mark]
    trial, blocks = 1, 2  # a training before the run shows that it can work
    assert len(updates) == len(seen) + 2 * trial
    assert all(index and "adamw" not in marks[index - 1] for index in updates)
    assert len(marks) == 2 * len(updates) + 2 * (trial + blocks), "held out: at the start, and after an epoch"
    assert graphs == 0


def test_outside_of_lazy_mode_blocks_are_compiled_unless_it_is_not_wanted(tmp_path, there, fit):
    batches = ["--data.batch_size=2"]  # all of one size
    uncompiled = [*batches, f"--config={CONFIGS / 'uncompiled.yaml'}"]
    assert command(*fit(tmp_path / "cpu", "cpu", *batches))[0] == 0
    _, marks, graphs = there(partial(steps, lazy=False), *fit(tmp_path / "compiled", "hpu", *batches))
    assert marks == []
    assert graphs == 2 * 2, "for training and without gradients; of the trial before the run, and of all blocks"
    assert same_weights(tmp_path / "cpu", tmp_path / "compiled")
    _, marks, graphs = there(partial(steps, lazy=False), *fit(tmp_path / "eager", "hpu", *uncompiled))
    assert (marks, graphs) == ([], 0)
    assert same_weights(tmp_path / "cpu", tmp_path / "eager")


def strategies() -> dict[str, Any]:
    """What Trainers are made of, and what several processes tell each other first."""
    found: dict[str, Any] = {}
    for name, more in {
        "auto": {"precision": "bf16-mixed"},
        "one": {"devices": 1},
        "instance": {"accelerator": HPUAccelerator()},
        "several": {"devices": 2},
        "nodes": {"devices": 1, "num_nodes": 2},
    }.items():
        trainer = L.Trainer(**on_gaudi({"accelerator": "hpu", "devices": "auto", "logger": False} | more))
        found[name] = type(trainer.strategy).__name__, str(trainer.strategy.root_device), trainer.world_size
        if name == "several":
            several: HPUDDPStrategy = trainer.strategy
    told = package("distributed.hccl").told
    with mock.patch("lightning.pytorch.strategies.ddp._init_dist_connection") as connect:
        connect.side_effect = lambda *_, **__: found.update(told_before=list(told))
        several.setup_distributed()
    return found | {"backend": connect.call_args.args[1], "device_ids": several.determine_ddp_device_ids()}


def test_auto_is_one_device_or_ddp_by_hccl(there):
    """All that can be seen of several devices without any: how they would begin."""
    one, several = ("SingleHPUStrategy", "hpu", 1), ("HPUDDPStrategy", "hpu", 2)
    ranks = [{"world_size": 2, "rank": 0, "local_rank": 0}]
    assert there(strategies) == {
        "auto": one,
        "one": one,
        "instance": one,
        "several": several,
        "nodes": several,
        "told_before": ranks,
        "backend": "hccl",
        "device_ids": None,
    }


# What is refused


def test_without_intels_package_it_is_said_in_one_sentence(tmp_path, fit):
    status, said = command(*fit(tmp_path / "run", "hpu"))
    assert status == 2
    assert said.strip() == (
        "lit-prune: trainer.accelerator: hpu needs Intel's package habana_frameworks, which is not installed; "
        "run in Intel's container for Gaudi, or give cpu."
    )
    assert not (tmp_path / "run").exists()


def refused(attribute: str, value: Any, *arguments: str) -> tuple[int, str]:
    with mock.patch.object(package("hpu"), attribute, value):
        return command(*arguments, lazy=True)


def nothing() -> bool:
    return False


REFUSED = {
    "no Gaudi": ("is_available", nothing, [], "trainer.accelerator: hpu is asked for, but no Gaudi is found"),
    "memory": ("FREE", 10, [], "trainer.accelerator: the run needs about 0.00 GB of memory on hpu, but 0.00 GB are"),
    "memory, true sequential": (
        "FREE",
        10,
        ["--model.reconstruction=none", "--model.true_sequential=true"],
        "are free; give no model.true_sequential, fewer data.samples, a shorter data.sequence_length or",
    ),
    "which": ("PEAK", 0, ["--trainer.devices=[3]"], "trainer.devices: '[3]' does not fit; give how many"),
    "none": ("PEAK", 0, ["--trainer.devices=0"], "trainer.devices: '0' does not fit; give how many"),
    "half": ("PEAK", 0, ["--trainer.precision=16-mixed"], "trainer: precision 16-mixed is not supported on hpu; give"),
}


@pytest.mark.parametrize(("attribute", "value", "more", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_work_there_is_said_before_anything_is_written(
    tmp_path, there, fit, attribute, value, more, expected
):
    status, said = there(refused, attribute, value, *fit(tmp_path / "run", "hpu", *more))
    assert (status, expected in said) == (2, True), said
    assert not (tmp_path / "run").exists()
