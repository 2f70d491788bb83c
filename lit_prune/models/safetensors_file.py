"""A safetensors file written tensor by tensor; the library's own writer takes all of a file's tensors at once."""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

PIECE = 16_000_000
"""Bytes that are moved at a time."""

METADATA = {"format": "pt"}
"""What tells transformers that these are PyTorch's tensors."""


@dataclass(frozen=True)
class InParts:
    """A tensor that is in memory a few rows at a time.

    Attributes:
        dtype: of all parts.
        shape: of the whole.
        parts: its rows, in their order; they may be there to be taken once.
    """

    dtype: torch.dtype
    shape: Sequence[int]
    parts: Iterable[Tensor]

    @classmethod
    def whole(cls, tensor: Tensor) -> "InParts":
        """A tensor that is there, as one part."""
        return cls(tensor.dtype, tensor.shape, [tensor])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.dtype.itemsize * math.prod(self.shape)


class Entry(NamedTuple):
    """A tensor's type and shape, and from where to where it lies among those of the same width, in bytes."""

    dtype: torch.dtype
    shape: list[int]
    start: int
    stop: int


class SafetensorsFile:
    """A file in the making: values wait in files without names until all are there, since the header comes first.

    Those of wider types come before those of narrower ones, so that each lies at a multiple of its width, as readers
    need it that map the file into memory.

    Args:
        path: of the file, which `close` makes.

    Attributes:
        entries: of the tensors so far, by name.
        size: their bytes.
    """

    def __init__(self, path: Path) -> None:
        self.entries: dict[str, Entry] = {}
        self.size = 0
        self._path = path
        self._waiting: dict[int, IO[bytes]] = {}

    def add(self, name: str, tensor: Tensor | InParts) -> None:
        """Take in a tensor on the CPU, which need not stay in memory.

        Raises:
            ValueError: its parts are not all there.
        """
        tensor = InParts.whole(tensor) if isinstance(tensor, Tensor) else tensor
        width = tensor.dtype.itemsize
        if width not in self._waiting:
            self._waiting[width] = tempfile.TemporaryFile(dir=self._path.parent)  # noqa: SIM115 - `let_go` does
        values = self._waiting[width]
        start = values.tell()
        for part in tensor.parts:
            # not flatten(), which leaves a single number the stride that it has
            flat = part.contiguous().as_strided((part.numel(),), (1,))
            values.write(flat.view(torch.uint8).numpy().data)
        if values.tell() - start != tensor.nbytes:
            raise ValueError(f"{name}: {values.tell() - start} of {tensor.nbytes} bytes are there")
        self.entries[name] = Entry(tensor.dtype, list(tensor.shape), start, values.tell())
        self.size += tensor.nbytes

    def close(self) -> None:
        """Put the file together."""
        begins, begin = {}, 0
        for width, values in sorted(self._waiting.items(), reverse=True):
            begins[width] = begin
            begin += values.tell()
        described = {"__metadata__": METADATA} | {n: _described(e, begins) for n, e in self.entries.items()}
        header = json.dumps(described).encode()
        header += b" " * (-len(header) % 8)
        with self._path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for width, begin in begins.items():
                _move(self._waiting[width], file, 8 + len(header) + begin)
        self.let_go()

    def let_go(self) -> None:
        """Let go of values that wait still."""
        while self._waiting:
            self._waiting.popitem()[1].close()


def _move(values: IO[bytes], file: IO[bytes], begin: int) -> None:
    """Move a file's content into another, from the end on, so that no more than a piece is on disk twice."""
    stop = values.seek(0, os.SEEK_END)
    while stop:
        start = max(0, stop - PIECE)
        values.seek(start)
        file.seek(begin + start)
        file.write(values.read())
        values.truncate(start)
        stop = start


def _described(entry: Entry, begins: dict[int, int]) -> dict[str, object]:
    """An entry as the header has it."""
    begin = begins[entry.dtype.itemsize]
    offsets = [begin + entry.start, begin + entry.stop]
    return {"dtype": _name(entry.dtype), "shape": entry.shape, "data_offsets": offsets}


@cache
def _name(dtype: torch.dtype) -> str:
    """What safetensors calls a type, by its own word."""
    file = save({"it": torch.empty(0, dtype=dtype)})
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return str(header["it"]["dtype"])
