"""Several processes on the CPU (gloo) do what one does: the same masks, the same weights, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import Ask
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import SingleDeviceStrategy
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_forms import COMMON

from lit_prune import ranks
from lit_prune.cli import main
from lit_prune.data import Share, share, whole
from lit_prune.data.streams import SharedBatches
from lit_prune.errors import BadInput
from lit_prune.launch import watched
from lit_prune.spread import Spread
from lit_prune.walk import MASK, Walk

Fit = Callable[..., list[str]]

SAMPLES = 136
"""Of 16 tokens: two chunks of 1024 and a bit, which two ranks cannot share out evenly."""


@pytest.fixture(scope="module")
def fit(tmp_path_factory, tiny_tokenizer) -> Callable[..., list[str]]:
    """A function that gives the arguments of a short run in a folder."""
    folder = tmp_path_factory.mktemp("given")
    text = folder / "text.txt"
    text.write_text(" ".join(f"In the beginning there were {number} words." for number in range(200)))
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**COMMON, num_hidden_layers=3)).save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    given = {
        "model.checkpoint": folder / "model",
        "data.source": text,
        "data.samples": SAMPLES,
        "data.validation_samples": 5,
        "data.sequence_length": 16,
        "evaluation.texts": f"[{text}]",
        "evaluation.windows": 7,
        "evaluation.references": "false",
        "model.sparsity": "2:4",
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
    }

    def arguments(run: Path, *settings: str) -> list[str]:
        return ["fit", *(f"--{key}={value}" for key, value in given.items()), *settings, f"--output_dir={run}"]

    return arguments


@pytest.fixture(scope="module")
def both(ask: Ask, fit: Fit, tmp_path_factory) -> Callable[..., list[Path]]:
    """A function that runs settings on one process, and on two."""

    def runs(*settings: str) -> list[Path]:
        folder = tmp_path_factory.mktemp("runs")
        assert ask(fit(folder / "1", *settings))["status"] == 0
        answer = ask(fit(folder / "2", *settings, "--trainer.devices=2"), ranks=2)
        assert answer["status"] == 0
        ((status, written),) = answer["others"]
        assert status == 0
        ours = [file for file in written if str(folder) in file]
        assert [file for file in ours if "/hidden" not in file] == []  # nothing but scratch of its own
        return [folder / "1", folder / "2"]

    return runs


def blocks(run: Path) -> dict[str, torch.Tensor]:
    """Weights and packed masks of all blocks."""
    found = {}
    for file in sorted((run / "blocks").glob("*.safetensors")):
        found |= {f"{file.stem}.{name}": tensor for name, tensor in load_file(file).items()}
    assert found
    return found


def assert_close(run: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The same masks to the last bit; weights and figures as close as floating point lets them be.

    Weights are compared by their norm: AdamW makes of a gradient that is next to nothing a step of any size.
    """
    ours, theirs = blocks(run), blocks(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if MASK in name:
            assert torch.equal(tensor, theirs[name]), name
        else:
            assert (tensor - theirs[name]).norm() <= tolerance * tensor.norm(), name
    for key in ("perplexity", "error", "sparsity", "parameters"):
        assert flat(figures(run)[key]) == pytest.approx(flat(figures(other)[key]), rel=1e-4), key
    for a, b in zip(figures(run)["blocks"], figures(other)["blocks"], strict=True):
        assert flat(a["error"]) == pytest.approx(flat(b["error"]), rel=1e-4)
        assert flat(a["validation_error"]) == pytest.approx(flat(b["validation_error"]), rel=1e-4)
    for a, b in zip(figures(run)["trainings"], figures(other)["trainings"], strict=True):
        assert flat(a | {"seconds": 0}) == pytest.approx(flat(b | {"seconds": 0}), rel=1e-4)


def figures(run: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return metrics


def flat(found: Any) -> list[Any]:
    """The numbers in it, whatever its structure."""
    if isinstance(found, dict | list):
        return [leaf for part in (found.values() if isinstance(found, dict) else found) for leaf in flat(part)]
    return [found] if isinstance(found, int | float) else []


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Of the losses in TensorBoard, by block and tag."""
    found = {}
    for folder in sorted((run / "tensorboard").glob("block_*")):
        events = EventAccumulator(str(folder)).Reload()
        for tag in events.Tags()["scalars"]:
            found[f"{folder.name} {tag}"] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


@pytest.mark.parametrize(
    "settings",
    [
        ["--model.mask=SparseGPT"],
        ["--model.mask=GBLM", "--model.sparsity=0.5", "--data.memory_share=0"],
        ["--model.mask=ADMM", "--model.sparsity=0.7", "--model.allocation=ByError", "--model.solver=ConjugateGradient"],
        ["--model.mask=Random", "--model.solver=ADMM"],
        ["--model.mask=SparseGPT", "--model.true_sequential=true"],
        ["--model.mask=MutualInformation", "--model.sparsity=0.5"],
        ["--model.mask=MutualInformation", "--model.mask.estimator=renyi", "--model.sparsity=0.5"],
    ],
    ids=" ".join,
)
def test_masks(both, settings: list[str]) -> None:
    """What is chosen and solved for, before anything is trained, does not depend on how many there are."""
    assert_close(*both(*settings, "--model.reconstruction=none"), tolerance=0)


@pytest.mark.parametrize(
    "settings",
    [
        ["--data.batch_size=3", "--model.reconstruction=cross_block", "--model.offload=true"],
        ["--data.batch_size=16", "--data.validation_samples=0", "--model.trained=adapters"],
        ["--data.batch_size=32", "--model.reconstruction=sublayer"],
    ],
    ids=" ".join,
)
def test_reconstruction(both, settings: list[str]) -> None:
    assert_close(*both(*settings))


def test_independent_blocks(both) -> None:
    """Each block is trained by one process alone, just as a single one would: three blocks on two."""
    runs = both("--model.independent=true")
    assert_close(*runs, tolerance=0)
    one, two = ([training | {"seconds": 0} for training in figures(run)["trainings"]] for run in runs)
    assert one == two
    one, two = map(curves, runs)
    assert one == two
    assert one


@pytest.mark.parametrize("trained", ["all", "adapters"])
def test_what_an_independent_block_learns_on_an_accelerator_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: Fit, trained: str
) -> None:
    """Lightning takes the block to the device and back, and each time its tensors get new storage."""
    teardown = SingleDeviceStrategy.teardown

    def elsewhere(strategy: SingleDeviceStrategy) -> None:
        for parameter in strategy.lightning_module.parameters():
            parameter.data = parameter.data.clone()
        teardown(strategy)

    settings = ["--model.independent=true", f"--model.trained={trained}", "--optimizer.lr=0.1"]  # so that it diverges
    for kind in (Walk, Spread):
        monkeypatch.setattr("lit_prune.run.Walk", kind)
        monkeypatch.setattr(SingleDeviceStrategy, "teardown", elsewhere)
        with pytest.raises(SystemExit, match=r"^0$"):
            main(fit(tmp_path / kind.__name__, *settings, "--trainer.max_epochs=3"))
    assert_close(tmp_path / "Walk", tmp_path / "Spread", tolerance=0)
    best = [training["best_epoch"] for training in figures(tmp_path / "Spread")["trainings"]]
    assert any(epoch not in (None, 2) for epoch in best)


@pytest.mark.parametrize("ranks_after", [1, 2])
def test_killed_and_gone_on_with(tmp_path: Path, ask: Ask, fit: Fit, ranks_after: int) -> None:
    """By another number of processes, too: the others end when one is killed."""
    before, now = 3 - ranks_after, [f"--trainer.devices={ranks_after}"]
    settings = ["--data.batch_size=8"]
    whole_run, run = tmp_path / "whole", tmp_path / "run"
    assert ask(fit(whole_run, *settings))["status"] == 0
    several = {"ranks": before} if before > 1 else {}
    killed = ask(fit(run, *settings, f"--trainer.devices={before}"), write=7, before=False, **several)
    assert killed["status"] == -9
    assert [status for status, _ in killed["others"]] == [1] * (before - 1)
    assert killed["seconds"] < 60
    assert len(json.loads((run / "manifest.json").read_text())["blocks"]) in (1, 2)
    several = {"ranks": ranks_after} if ranks_after > 1 else {}
    assert ask(fit(run, *settings, *now), **several)["status"] == 0
    assert_close(whole_run, run)


@pytest.mark.parametrize("dies", ["launched", "first"])
def test_a_process_that_dies_ends_the_others(tmp_path: Path, fit: Fit, dies: str) -> None:
    """Lightning starts them; while blocks are trained apart nothing passes between them."""
    arguments = fit(tmp_path / "run", "--trainer.devices=2", "--trainer.max_epochs=100000", "--model.independent=true")
    said = tmp_path / "said"
    with (
        said.open("wb") as output,
        subprocess.Popen([sys.executable, "-m", "lit_prune", *arguments], stderr=output, stdout=output) as first,
    ):
        deadline = time.monotonic() + 60
        while b"held_out" not in said.read_bytes():
            assert first.poll() is None, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (launched,) = map(int, Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split())
        os.kill(launched if dies == "launched" else first.pid, signal.SIGKILL)
        killed = time.monotonic()
        assert first.wait(60) == (1 if dies == "launched" else -signal.SIGKILL)
        while _lives(launched):
            assert time.monotonic() < killed + 60
            time.sleep(0.1)
    assert said.read_text().count("lit-prune: ") == 1
    assert "lit-prune: Another process of this run has ended; what is finished stays: the sam" in said.read_text()


@pytest.mark.parametrize(
    ("other", "body", "status", "said"),
    [
        (2, None, 2, ""),  # it has refused its input, and has said why
        (2, RuntimeError("gloo: Connection closed by peer"), 2, ""),
        (-signal.SIGKILL, None, 1, "gone"),
        (-signal.SIGKILL, RuntimeError("gloo: Connection closed by peer"), 7, ""),
        (None, BadInput("NaN"), 2, ""),  # the other must not say that this one has ended
    ],
)
def test_how_another_process_ends_is_how_this_one_does(
    tmp_path: Path, other: int | None, body: Exception | None, status: int, said: str
) -> None:
    end = {2: "exit 2", None: "exec sleep 30"}.get(other, "kill -9 $$")
    heard = tmp_path / "heard"
    heard.touch()
    began = time.monotonic()
    if not (child := os.fork()):
        process = subprocess.Popen(["/bin/sh", "-c", end])
        try:
            with watched([process], lambda: heard.write_text("gone") and None):
                if body:
                    raise body
                time.sleep(30)
        except BadInput:
            os._exit(2 if process.wait(10) == -signal.SIGKILL else 9)
        except RuntimeError:
            os._exit(7)
        except SystemExit as stop:
            os._exit(int(str(stop.code)))
        finally:
            os._exit(8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    assert time.monotonic() - began < 10
    assert heard.read_text() == said


def _lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_too_few_sequences_is_said_once(tmp_path: Path, ask: Ask, fit: Fit) -> None:
    arguments = fit(tmp_path / "run", "--trainer.devices=2", "--data.samples=1")
    answer = ask(arguments, ranks=2, said=str(tmp_path / "said"))
    assert [answer["status"], *(status for status, _ in answer["others"])] == [2, 2]
    said = (tmp_path / "said").read_text()
    assert said.count("lit-prune: ") == 1
    assert "2 devices cannot share 1 calibration" in said
    assert not (tmp_path / "run").exists()


def shares(count: int, *settings: int) -> list[Share]:
    """Of every rank."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "count", lambda: count)
        for rank in range(count):
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            found.append(share(*settings))
    return found


@given(st.integers(1, 5), st.integers(1, 90), st.integers(0, 20), st.integers(0, 20), st.sampled_from([1, 2, 64]))
def test_shares_are_a_partition(count: int, observed: int, added: int, held_out: int, together: int) -> None:
    samples = observed + added
    settings = (observed, samples, samples + held_out, together)
    if observed < count or 0 < held_out < count:
        with pytest.raises(BadInput, match=r"^trainer.devices: .* cannot share"):
            shares(count, *settings)
        return
    parts = shares(count, *settings)
    assert whole(parts) == Share(list(range(samples + held_out)), observed, samples, samples)
    for part in parts:
        assert all(row < observed for row in part.rows[: part.observed])
        assert all(observed <= row < samples for row in part.rows[part.observed : part.samples])
        assert all(row >= samples for row in part.rows[part.samples :])
        assert part.observed > 0
        assert part.all_samples == samples
        assert bool(held_out) == (len(part.rows) > part.samples)
    if observed >= 64 * count and together == 64:  # what makes a chunk stays together
        assert all(part.rows[0] % 64 == 0 for part in parts)


@given(st.integers(1, 4), st.integers(4, 40), st.integers(1, 16))
def test_batches_of_all_ranks_are_those_of_one(count: int, samples: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "count", lambda: count)
        drawn = []
        for part in shares(count, samples, samples, samples):
            torch.manual_seed(0)
            drawn.append([(part, batch) for batch in SharedBatches(part, size)])
    torch.manual_seed(0)
    (alone,) = shares(1, samples, samples, samples)
    for expected, *found in zip(SharedBatches(alone, size), *drawn, strict=True):
        counted = [[part.rows[row] for row in batch.rows] if batch.weight else [] for part, batch in found]
        assert sorted(row for rows in counted for row in rows) == sorted(expected.rows)
        for rows, (_, batch) in zip(counted, found, strict=True):  # the mean over ranks of weighted means is the mean
            assert batch.weight / count == pytest.approx(len(rows) / len(expected.rows))
