"""A checkpoint's safetensors files, read and written weight by weight, so that no more than one block is in memory."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_prune.atomic import built_whole
from lit_prune.errors import BadInput
from lit_prune.finite import all_finite
from lit_prune.models.blocks import find_blocks
from lit_prune.models.checkpoint import KEY, load_config, no_checkpoint, reading
from lit_prune.models.home import Offloaded
from lit_prune.models.safetensors_file import InParts, SafetensorsFile

STEM = "model"
"""What transformers calls the weights: `model.safetensors`, or several files and `model.safetensors.index.json`."""

SHARD = 1_000_000_000
"""Bytes of one of a result's files, at most, unless a single weight has more."""

ROWS = 1024
"""Of a weight that are read at a time."""

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""What lies beside the weights: configurations, tokenizer, chat template."""


class Shards:
    """The weights of a checkpoint, each read when it is asked for.

    Args:
        checkpoint: as `resolve` gives it; the files of a hub id are fetched.
        stem: what the files' names begin with.

    Raises:
        BadInput: a file is missing or cannot be read.

    Attributes:
        shapes: of all weights, by name.
    """

    def __init__(self, checkpoint: str, stem: str = STEM) -> None:
        self._folder = local_folder(checkpoint)
        self._single, self._index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        self._files = self._contents()
        self.shapes: dict[str, torch.Size] = {}
        for file in dict.fromkeys(self._files.values()):
            with self._open(file) as shard:
                held = set(shard.keys())
                for name in [name for name, where in self._files.items() if where == file]:
                    if name not in held:
                        raise BadInput(f"{KEY}: '{self._folder / file}' lacks the weight '{name}'; fetch it again.")
                    self.shapes[name] = torch.Size(shard.get_slice(name).get_shape())

    def _contents(self) -> dict[str, str]:
        if (self._folder / self._single).is_file():
            with self._open(self._single) as shard:
                return dict.fromkeys(shard.keys(), self._single)
        try:
            contents = json.loads((self._folder / self._index).read_text(encoding="utf-8"))["weight_map"]
            return {str(name): str(file) for name, file in contents.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise BadInput(f"{KEY}: '{self._folder}' holds neither {self._single} nor a sound {self._index}.") from None

    def _open(self, file: str) -> Any:
        if Path(file).name != file:
            raise BadInput(f"{KEY}: '{self._folder / self._index}' names the file '{file}', which is not beside it.")
        try:
            return safe_open(self._folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{KEY}: the shard '{self._folder / file}' cannot be read ({error}).") from error

    def stored(self, name: str) -> Tensor:
        """A weight as it is in the files."""
        with self._open(self._files[name]) as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor.clone()

    def read(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Weights in float32.

        Args:
            names: what each weight is to be called, and its name in the files.

        Raises:
            BadInput: one holds values that are NaN or infinite.
        """
        tensors: dict[str, Tensor] = {}
        for key, name in names.items():
            tensors[key] = torch.empty(self.shapes[name])
            for rows in _rows_of(self.shapes[name]):
                _require_finite(name, tensors[key][rows].copy_(self._rows(name, rows)))
        return tensors

    def mapped(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """As `read`, for what stays as it is: of weights stored in float32 no more is in memory than is looked at.

        Raises:
            BadInput: one holds values that are NaN or infinite.
        """
        tensors: dict[str, Tensor] = {}
        for key, name in names.items():
            with self._open(self._files[name]) as shard:
                tensor: Tensor = shard.get_tensor(name)
            if tensor.dtype != torch.float32:
                tensors |= self.read({key: name})
                continue
            for rows in _rows_of(tensor.shape):
                _require_finite(name, self._rows(name, rows))
            tensors[key] = tensor
        return tensors

    def in_parts(self, name: str, dtype: torch.dtype) -> InParts:
        """As one weight that has been read, in `dtype`, a few rows at a time."""
        shape = self.shapes[name]
        return InParts(dtype, shape, (self._rows(name, rows).float().to(dtype) for rows in _rows_of(shape)))

    def _rows(self, name: str, rows: slice | EllipsisType) -> Tensor:
        """Some rows of a weight, from a file that is opened anew, so that what was read does not stay mapped."""
        with self._open(self._files[name]) as shard:
            part: Tensor = shard.get_tensor(name) if rows is ... else shard.get_slice(name)[rows]
        return part

    def same(self, one: str, other: str) -> bool:
        """Whether two weights hold the same numbers; a few rows of them are in memory at a time."""
        if self.shapes[one] != self.shapes[other]:
            return False
        with self._open(self._files[one]) as shard, self._open(self._files[other]) as its:
            starts = range(0, self.shapes[one][0], ROWS)
            pairs = ((s.get_slice(n)[row : row + ROWS] for s, n in ((shard, one), (its, other))) for row in starts)
            return all(torch.equal(*pair) for pair in pairs)


def _rows_of(shape: torch.Size) -> list[slice | EllipsisType]:
    """The parts of a few rows that a tensor is read in; one without dimensions is a part itself."""
    return [slice(start, start + ROWS) for start in range(0, shape[0], ROWS)] if shape else [...]


def _require_finite(name: str, part: Tensor) -> None:
    if not all_finite(part):
        raise BadInput(
            f"{KEY}: '{name}' holds NaN or infinite values, or some beyond float32's; give a sound checkpoint."
        )


def load_offloaded(checkpoint: str) -> Offloaded:
    """A resolved checkpoint's model in evaluation mode, whose weights stay in its files until they are needed.

    Raises:
        BadInput: a weight is missing or of another shape, or the model has no blocks that can be pruned.
    """
    shards, config = Shards(checkpoint), load_config(checkpoint)
    made: Any = AutoModelForCausalLM
    with reading(partial(no_checkpoint, checkpoint)), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = made.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.eval()  # type: ignore[no-untyped-call]
    if (local_folder(checkpoint) / "generation_config.json").is_file():
        with reading(partial(no_checkpoint, checkpoint)):
            model.generation_config = GenerationConfig.from_pretrained(local_folder(checkpoint))
    blocks = find_blocks(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks) + "."
    names = _names(model, shards, checkpoint)
    outside = {name: stored for name, stored in names.items() if not name.startswith(prefix)}

    def read_block(index: int) -> dict[str, Tensor]:
        own = f"{prefix}{index}."
        return shards.read({n.removeprefix(own): stored for n, stored in names.items() if n.startswith(own)})

    def outside_in_parts(dtype: torch.dtype) -> dict[str, InParts]:
        return {name: shards.in_parts(stored, dtype) for name, stored in outside.items()}

    return Offloaded(model, blocks, read_block, lambda: shards.mapped(outside), outside_in_parts)


def _names(model: PreTrainedModel, shards: Shards, checkpoint: str) -> dict[str, str]:
    """What every weight is called in the files: the same as in the model, or without the prefix of its decoder.

    Of weights that are tied, the first in the model stands for all, under whichever of their names it is stored.
    """
    model.tie_weights()
    tied: dict[int, list[str]] = {}
    tensors = model.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        tied.setdefault(id(tensor), []).append(name)
    names: dict[str, str] = {}
    for name, *others in tied.values():
        called = [n for own in (name, *others) for n in (own, own.removeprefix(f"{model.base_model_prefix}."))]
        first, *twins = [n for n in dict.fromkeys(called) if n in shards.shapes] or [""]
        if not first or shards.shapes[first] != tensors[name].shape:
            raise BadInput(
                f"model.offload: '{checkpoint}' holds no '{name}' of shape {tuple(tensors[name].shape)}, so that it "
                "cannot be read block by block; give offload false, or save it with transformers' save_pretrained "
                "first."
            )
        if unequal := [twin for twin in twins if not shards.same(first, twin)]:
            raise BadInput(
                f"model.offload: '{checkpoint}' ties '{first}' and '{unequal[0]}' by its config.json, but holds "
                "different numbers for them; give offload false, or a checkpoint that says which it means."
            )
        names[name] = first
    return names


def local_folder(checkpoint: str) -> Path:
    """The folder that holds a resolved checkpoint's files; those of a hub id are fetched."""
    return Path(checkpoint) if Path(checkpoint).is_dir() else _fetched(checkpoint)


@cache
def _fetched(hub_id: str) -> Path:
    """Asked for once, so that all that is read belongs to one revision."""
    with reading(partial(no_checkpoint, hub_id)):
        # some publishers have the same weights once more, under other names
        return Path(snapshot_download(hub_id, allow_patterns=["model*.safetensors", *SIDE_FILES]))


def parameters(checkpoint: str) -> int:
    """How many a resolved checkpoint's files hold, by their headers."""
    return sum(shape.numel() for shape in Shards(checkpoint).shapes.values())


def save_blockwise(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    folder: Path,
    outside: Mapping[str, InParts],
    final: Callable[[int], Mapping[str, Tensor]],
) -> None:
    """Write an ordinary Hugging Face folder, whole or not at all, with one block's weights in memory at a time.

    Args:
        model: whose weights it is, though not those that it holds.
        blocks: its blocks.
        tokenizer: its tokenizer.
        dtype: of the weights in the folder.
        folder: the folder.
        outside: all tensors that belong to no block, by their names in the model, as they are to be stored.
        final: gives a block's tensors by their names in it, as they are to be stored.
    """
    prefix = next(name for name, module in model.named_modules() if module is blocks)

    def tensors() -> Iterator[tuple[str, Tensor | InParts]]:
        yield from outside.items()
        for index in range(len(blocks)):
            yield from ((f"{prefix}.{index}.{name}", tensor) for name, tensor in final(index).items())

    with built_whole(folder) as draft:
        draft.mkdir()
        model.config.architectures, model.config.dtype = [type(model).__name__], dtype
        model.config.save_pretrained(draft)
        if model.can_generate():
            model.generation_config.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        write_shards(draft, tensors(), SHARD)


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor | InParts]], size: int, stem: str = STEM) -> None:
    """Write weights as transformers reads them, with one of them in memory at a time.

    Args:
        folder: an existing one.
        tensors: by their names in the model.
        size: bytes of a file, at most, unless a single weight has more.
        stem: what the files' names begin with.
    """
    files = [SafetensorsFile(folder / f"{stem}.0")]
    try:
        for name, tensor in tensors:
            if files[-1].entries and files[-1].size + tensor.nbytes > size:
                files[-1].close()
                files.append(SafetensorsFile(folder / f"{stem}.{len(files)}"))
            files[-1].add(name, tensor)
        files[-1].close()
    finally:
        files[-1].let_go()
    if len(files) == 1:
        (folder / f"{stem}.0").rename(folder / f"{stem}.safetensors")
        return
    contents: dict[str, str] = {}
    for number, part in enumerate(files):
        file = f"{stem}-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{stem}.{number}").rename(folder / file)
        contents |= dict.fromkeys(part.entries, file)
    index = {"metadata": {"total_size": sum(part.size for part in files)}, "weight_map": contents}
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")
