"""That the first use of a function by several threads is as exact as every later one."""

import subprocess
import sys

import pytest
import torch

FIRST_USES = """
import os
import sys
import torch
{imported}

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


def wrong(imported: str, processes: int) -> int:
    """In how many processes the first cosines differ from the second."""
    code = FIRST_USES.format(imported=imported)
    done = subprocess.run([sys.executable, "-c", code, str(processes)], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a PyTorch with MKL")
@pytest.mark.parametrize("package", ["masks", "models"])
def test_first_use_by_several_threads_is_exact(package: str) -> None:
    # without the import the race is lost in 5 to 12 of 1000 processes (see `lit_prune.vector_math`)
    assert not wrong(f"import lit_prune.{package}", 500)
