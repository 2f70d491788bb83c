"""Files written tensor by tensor are what the library reads."""

import json
import math
import os
import weakref
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lit_prune.errors import BadInput
from lit_prune.models import cast, safetensors_file, shards
from lit_prune.models.checkpoint import as_stored
from lit_prune.models.safetensors_file import InParts, SafetensorsFile
from lit_prune.models.shards import ROWS, Shards, write_shards
from lit_prune.needs import process_memory

WIDE = [torch.float64, torch.int64]
DTYPES = [*WIDE, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int16, torch.uint8, torch.int8]


def some(seed: int) -> dict[str, Tensor]:
    """Tensors of many types and shapes in a random order, bytes in odd numbers, transposed, empty and single ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number in range(30):
        dtype = DTYPES[int(torch.randint(len(DTYPES), (), generator=generator))]
        shape = torch.randint(0, 6, (int(torch.randint(4, (), generator=generator)),), generator=generator).tolist()
        tensor = (100 * torch.rand(shape, generator=generator)).to(dtype)
        tensors[f"of.{number} «{number}»"] = tensor.T if tensor.ndim == 2 else tensor
    return tensors | {"truth": torch.tensor([True, False, True])}


@pytest.mark.parametrize("seed", range(8))
def test_the_library_reads_what_was_written(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE", 50)
    tensors = some(seed)
    file = SafetensorsFile(tmp_path / "it")
    for number, (name, tensor) in enumerate(tensors.items()):
        in_parts = InParts(tensor.dtype, tensor.shape, tensor.split(2) if tensor.ndim else [tensor])
        file.add(name, tensor if number % 2 else in_parts)
    file.close()
    read = load_file(tmp_path / "it")
    assert read.keys() == file.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert [found.name for found in tmp_path.iterdir()] == ["it"]
    with safe_open(tmp_path / "it", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    # each lies where a pointer to its type may point
    content = (tmp_path / "it").read_bytes()
    length = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % tensors[name].itemsize == 0
    assert file.size == sum(tensor.nbytes for tensor in tensors.values()) == len(content) - 8 - length


def test_parts_that_are_missing_are_noticed(tmp_path: Path) -> None:
    file = SafetensorsFile(tmp_path / "it")
    parts = InParts(torch.float32, (3, 2), iter([torch.ones(2, 2), torch.ones(1, 2)]))
    file.add("first", parts)
    with pytest.raises(ValueError, match="again: 0 of 24 bytes are there"):
        file.add("again", parts)
    file.let_go()


def test_no_more_than_a_piece_is_on_disk_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE", 4)
    waiting = []

    class Watched(FileIO):
        def write(self, part: Any) -> int:
            waiting.append(os.fstat(values.fileno()).st_size)
            return super().write(part)

    with (tmp_path / "values").open("w+b") as values, Watched(tmp_path / "it", "w") as file:
        values.write(b"0123456789")
        safetensors_file._move(values, file, 3)
    assert waiting == [10, 6, 2]
    assert (tmp_path / "values").read_bytes() == b""
    assert (tmp_path / "it").read_bytes() == b"\0\0\x000123456789"


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write_shards(tmp_path, [], 10)
    assert load_file(tmp_path / "model.safetensors") == {}


@pytest.mark.parametrize("size", [100, 10**6])
def test_one_tensor_is_in_memory_at_a_time(size: int, tmp_path: Path) -> None:
    there: list[weakref.ref[Tensor]] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number in range(20):
            assert sum(tensor() is not None for tensor in there) <= 1
            tensor = torch.rand(10)
            there.append(weakref.ref(tensor))
            yield str(number), tensor

    write_shards(tmp_path, tensors(), size)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == (10 if size == 100 else 1)
    assert sum(len(load_file(file)) for file in files) == 20


def test_what_is_no_weight_is_never_rounded() -> None:
    whole, truth = torch.tensor([2**60 + 1]), torch.tensor([True, False])
    for dtype in (torch.float16, torch.float32):
        for change in (cast, as_stored):
            assert torch.equal(change(whole, dtype), whole)
            assert change(truth, dtype).dtype == torch.bool
            assert change(torch.tensor(0.1), dtype).dtype == dtype
    assert not as_stored(torch.tensor([-0.0]), torch.float32).signbit()


def test_nothing_stays_open_when_a_weight_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    add = SafetensorsFile.add

    def note(file: SafetensorsFile, name: str, tensor: Tensor) -> None:
        add(file, name, tensor)
        opened.extend(file._waiting.values())

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from [("wide", torch.ones(30)), ("narrow", torch.ones(30).half()), ("more", torch.ones(30))]
        raise BadInput("too large")

    monkeypatch.setattr(SafetensorsFile, "add", note)
    with pytest.raises(BadInput, match="too large"):
        write_shards(tmp_path, tensors(), 200)
    assert len(set(opened)) == 3
    assert all(values.closed for values in opened)


@pytest.mark.parametrize("how", ["read", "mapped"])
@pytest.mark.parametrize("seed", range(4))
def test_weights_are_read_in_float32(seed: int, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS", 2)
    tensors = {name: tensor for name, tensor in some(seed).items() if tensor.is_floating_point()}
    assert any(not tensor.ndim for tensor in tensors.values())
    write_shards(tmp_path, tensors.items(), 200)
    read = getattr(Shards(str(tmp_path)), how)({f"my {name}": name for name in tensors})
    assert read.keys() == {f"my {name}" for name in tensors}
    for name, tensor in tensors.items():
        assert read[f"my {name}"].dtype == torch.float32
        assert torch.equal(read[f"my {name}"], tensor.float())


@pytest.mark.parametrize("how", ["read", "mapped"])
@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        (torch.float32, math.nan),
        (torch.float32, math.inf),
        (torch.bfloat16, math.nan),
        (torch.bfloat16, -math.inf),
        (torch.float64, 1e39),
    ],
)
def test_a_weight_that_is_not_finite_is_refused(dtype: torch.dtype, bad: float, how: str, tmp_path: Path) -> None:
    """Nor is one that float32 cannot hold."""
    weight = torch.zeros(ROWS + 3, 2, dtype=dtype)
    weight[-1, 1] = bad
    write_shards(tmp_path, [("fine", torch.zeros(2, dtype=dtype)), ("bad", weight)], 1000)
    with pytest.raises(BadInput, match="'bad' holds NaN or infinite values"):
        getattr(Shards(str(tmp_path)), how)({"it": "bad"})


def test_of_mapped_weights_no_more_is_in_memory_than_is_looked_at(tmp_path: Path) -> None:
    write_shards(tmp_path, [("it", torch.ones(20_000, 1000))], 100_000_000)
    opened = Shards(str(tmp_path))
    opened.mapped({"it": "it"})  # what a first call needs beside
    before = process_memory()
    weight = opened.mapped({"it": "it"})["it"]
    weight[::5000].sum()
    assert process_memory() < before + 10e6
    assert weight.sum() == weight.numel()
    assert process_memory() > before + 70e6
