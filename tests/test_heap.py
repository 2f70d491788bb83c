"""What glibc does with memory that is let go."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

import lit_prune.walk  # noqa: F401
from lit_prune import masking
from lit_prune.cli import main
from lit_prune.data import lockstep
from lit_prune.heap import _GLIBC
from lit_prune.masking import Masking

LEFT = """
from contextlib import nullcontext
from psutil import Process
from lit_prune.heap import without_holes

def left(context):
    with context:
        pieces = [bytearray(b"x") * 6_000_000 for _ in range(40)]
        full = Process().memory_info().rss
        del pieces[::2]
        return 1 - (full - Process().memory_info().rss) / 120e6

bytearray(30_000_000)  # from now on glibc keeps what is smaller
print(left(without_holes()), left(nullcontext()))
"""
"""The share of memory that a process still has after it has let every second piece of it go."""


@pytest.mark.skipif(not _GLIBC, reason=f"no glibc on {sys.platform}")
def test_what_is_let_go_leaves_no_holes():
    """In a process of its own, in which there are none yet; pieces are smaller than what is always given back."""
    said = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=True).stdout
    without, after = map(float, said.split())
    assert without < 0.1
    assert after > 0.9


@pytest.fixture
def inside(monkeypatch) -> set[str]:
    """The modules in whose contexts something is done just now."""
    found: set[str] = set()
    for name in ("lit_prune.data.lockstep", "lit_prune.masking", "lit_prune.walk"):

        @contextmanager
        def without_holes(name=name):
            assert not found, "contexts are not nested"
            found.add(name)
            yield
            found.remove(name)

        monkeypatch.setattr(sys.modules[name], "without_holes", without_holes)
    return found


def test_batches_wait_for_each_other_without_holes(inside):
    block, hidden = torch.nn.Linear(4, 4), torch.rand(2, 3, 4)
    halts = [set(inside) for _ in lockstep(block, hidden, {"block": block}, hidden)]
    assert halts == [{"lit_prune.data.lockstep"}]
    assert not inside


@pytest.mark.parametrize("pruned_in", ["walk", "data.lockstep"])
def test_layers_are_pruned_and_gradients_taken_without_holes(monkeypatch, tmp_path, inside, pruned_in):
    prune, gradients, seen = Masking.prune, masking.regional_gradients, set()

    def noted(name, function):
        def call(*args, **settings):
            seen.add((name, *inside))
            return function(*args, **settings)

        return call

    monkeypatch.setattr(Masking, "prune", noted("prune", prune))
    monkeypatch.setattr(masking, "regional_gradients", noted("gradients", gradients))
    given = ["--model.mask=RegionalGradient", "--model.reconstruction=none", "--trainer.accelerator=cpu"]
    given += ["--model.true_sequential=true"] if pruned_in == "data.lockstep" else []
    given += [
        "--data.samples=4",
        "--data.sequence_length=16",
        "--evaluation.texts=[]",
        f"--output_dir={tmp_path / 'run'}",
    ]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "configs/tiny.yaml", *given])
    assert stop.value.code == 0
    assert seen == {("gradients", "lit_prune.masking"), ("prune", f"lit_prune.{pruned_in}")}
