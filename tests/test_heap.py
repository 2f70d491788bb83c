"""What glibc does with memory that is let go."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from lit_prune.data import lockstep
from lit_prune.heap import _GLIBC

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


def test_batches_wait_for_each_other_without_holes(monkeypatch):
    inside = False

    @contextmanager
    def without_holes():
        nonlocal inside
        inside = True
        yield
        inside = False

    monkeypatch.setattr(sys.modules["lit_prune.data.lockstep"], "without_holes", without_holes)
    block, hidden = torch.nn.Linear(4, 4), torch.rand(2, 3, 4)
    assert [inside for _ in lockstep(block, hidden, {"block": block}, hidden)] == [True]
    assert not inside
