"""The packed format: for every tensor with zeros a mask and the kept values, in safetensors files, for storage.

Beside the side files of an ordinary folder lie `packed.safetensors` (or several of them, with an index) and
`packed.json`: every tensor's name, shape and code. A tensor's parts are called `mask/NAME` and so on; see `codes`.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from lit_prune.errors import BadInput
from lit_prune.export.codes import Encoded, decode, encode
from lit_prune.models.shards import Shards, write_shards

CONTENTS, STEM = "packed.json", "packed"
FORMAT = {"format": "lit-prune packed", "version": 1}
PARTS = {"dense": ["dense"], "bitmask": ["mask", "kept", "signs"], "2:4": ["mask", "kept", "signs"]}


class NothingSaved(BadInput):
    """A model without enough zeros."""


def is_packed(folder: Path) -> bool:
    """Whether a folder is in this format."""
    return (folder / CONTENTS).is_file()


def write_packed(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_size: int) -> None:
    """Pack tensors, one at a time, into an existing folder.

    Args:
        tensors: by name.
        folder: the folder.
        shard_size: of a file, in bytes, at most, unless one tensor is larger.

    Raises:
        NothingSaved: none of the tensors gets smaller.
    """
    contents: dict[str, dict[str, object]] = {}

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            encoded = encode(tensor)
            contents[name] = {"code": encoded.code, "shape": list(tensor.shape)}
            yield from ((f"{part}/{name}", values) for part, values in encoded.parts.items())

    write_shards(folder, parts(), shard_size, STEM)
    if all(entry["code"] == "dense" for entry in contents.values()):
        raise NothingSaved(
            "format: packed would save nothing, since no tensor of this model has enough zeros; give huggingface."
        )
    text = json.dumps(FORMAT | {"tensors": contents}, separators=(",", ":"))
    (folder / CONTENTS).write_text(text + "\n", encoding="utf-8")


def packed_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a packed folder by name, each unpacked when it is its turn.

    Raises:
        BadInput: the folder is damaged, or of a later version.
    """
    try:
        contents = json.loads((folder / CONTENTS).read_text(encoding="utf-8"))
        found = {key: contents.get(key) for key in FORMAT}
        entries = [
            (str(name), str(entry["code"]), torch.Size(entry["shape"])) for name, entry in contents["tensors"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise BadInput(f"model: '{folder / CONTENTS}' cannot be read ({error}); export the model again.") from error
    if found != FORMAT:
        raise BadInput(f"model: '{folder / CONTENTS}' is of version {found['version']}, but only 1 is known here.")
    shards = Shards(str(folder), STEM)
    for name, code, shape in entries:
        stored = [part for part in PARTS.get(code, []) if f"{part}/{name}" in shards.shapes]
        try:
            yield name, decode(Encoded(code, {part: shards.stored(f"{part}/{name}") for part in stored}), shape)
        except (ValueError, KeyError) as error:
            raise BadInput(f"model: '{name}' in '{folder}' is damaged ({error}); export the model again.") from error
