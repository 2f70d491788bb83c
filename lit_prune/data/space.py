"""Where streams of hidden states lie: on the device, in memory, or in files when they are too large for both."""

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_prune.errors import BadInput


class Space:
    """Makes room for streams.

    A file has no name and goes with the last tensor on it, however the process ends.

    Args:
        folder: where to put files; None for memory.
        device: whose memory that is.
        pinned: whether memory of the host is pinned, from which a GPU copies beside its computation.
    """

    def __init__(self, folder: Path | None = None, device: torch.device | None = None, pinned: bool = False) -> None:
        self.folder = folder
        self.device = device
        self.pinned = pinned
        self._mapped: weakref.WeakSet[_Mapped] = weakref.WeakSet()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for a stream, its contents undefined.

        Raises:
            BadInput: the disk is too full.
        """
        if self.folder is None:
            return torch.empty(shape, dtype=dtype, device=self.device, pin_memory=self.pinned)
        self.folder.mkdir(parents=True, exist_ok=True)
        size = max(1, math.prod(shape) * dtype.itemsize)
        with tempfile.TemporaryFile(dir=self.folder) as file:
            try:
                _reserve(file.fileno(), size)
            except OSError as error:
                raise BadInput(
                    f"output_dir: '{self.folder}' has no room for {size / 1e9:.2f} GB of hidden states "
                    f"({error.strerror}); free some, or give fewer data.samples."
                ) from error
            mapped = _Mapped(file.fileno(), size)
        self._mapped.add(mapped)
        return torch.frombuffer(mapped, dtype=dtype, count=math.prod(shape)).view(*shape)

    def let_go(self) -> None:
        """Take what has been read and written out of this process's memory; the files hand it out again."""
        for mapped in self._mapped:
            mapped.madvise(mmap.MADV_DONTNEED)


class _Mapped(mmap.mmap):
    """A mapped file that can be referred to weakly, and compared by identity."""

    __hash__ = object.__hash__


def _reserve(file: int, size: int) -> None:
    """Take room on the disk now: a write to a mapped file that finds none kills the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:  # macOS
        os.truncate(file, size)
