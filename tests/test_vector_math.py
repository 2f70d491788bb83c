"""That the first use of a function by several threads is as exact as every later one."""

import subprocess
import sys

import pytest
import torch

FIRST_USES = """
import os
import sys
import torch
import lit_prune.masks

torch.set_num_threads(2)
wrong = 0
for _ in range(int(sys.argv[1])):
    reader, writer = os.pipe()
    if not os.fork():  # where nothing has been computed by several threads yet
        angles = (torch.arange(256.0)[:, None] @ torch.linspace(0, 1, 64)[None]).contiguous()  # threads are awake now
        first, second = angles.cos(), angles.cos()
        os.write(writer, b"1" if torch.equal(first, second) else b"0")
        os._exit(0)
    wrong += os.read(reader, 1) == b"0"
    os.close(reader), os.close(writer), os.wait()
print(wrong)
"""


def said(code: str, *arguments: str) -> str:
    """What a program prints that is run by itself."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a PyTorch with MKL")
def test_first_use_by_several_threads_is_exact() -> None:
    # without `lit_prune.vector_math` 5 to 12 of 1000 processes lose the race on an Intel Xeon, none of 3000 on an EPYC
    assert int(said(FIRST_USES, "500")) == 0


@pytest.mark.parametrize("package", ["masks", "models"])
def test_whatever_computes_has_used_them_before(package: str) -> None:
    """By the order in which imports have ended, which `sys.modules` is in; of another process, as this has them all."""
    code = f"import sys, lit_prune.{package}; print(*(name for name in sys.modules if name.startswith('lit_prune.')))"
    assert said(code).split()[0] == "lit_prune.vector_math"
