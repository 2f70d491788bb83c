"""Models larger than memory: their weights stay in the checkpoint's shards until they are asked for."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lit_prune.errors import BadInput
from lit_prune.models.checkpoint import KEY, load_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The two names that transformers gives to weights: one file, or the table of contents of several."""


class Shards:
    """The weights of a checkpoint by name, read one by one.

    Args:
        checkpoint: as `resolve` gives it; the weights of a hub id are fetched.

    Raises:
        BadInput: a file is missing or cannot be read.
    """

    def __init__(self, checkpoint: str) -> None:
        self._folder = Path(checkpoint)
        if not self._folder.is_dir():
            self._folder = Path(snapshot_download(checkpoint, allow_patterns=["*.safetensors", "*.json"]))
        self._files = self._contents()
        self.shapes: dict[str, torch.Size] = {}
        for file in dict.fromkeys(self._files.values()):
            with self._open(file) as shard:
                here = [name for name in shard.keys() if self._files.get(name) == file]  # noqa: SIM118
                self.shapes |= {name: torch.Size(shard.get_slice(name).get_shape()) for name in here}

    def _contents(self) -> dict[str, str]:
        if (self._folder / SINGLE).is_file():
            with self._open(SINGLE) as shard:
                return dict.fromkeys(shard.keys(), SINGLE)
        if not (self._folder / INDEX).is_file():
            raise BadInput(f"{KEY}: '{self._folder}' holds neither {SINGLE} nor {INDEX}; save it with save_pretrained.")
        try:
            contents: dict[str, str] = json.loads((self._folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError):
            raise BadInput(f"{KEY}: '{self._folder / INDEX}' is no table of shards; fetch it again.") from None
        return contents

    def _open(self, file: str) -> safe_open:
        try:
            return safe_open(self._folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{KEY}: the shard '{self._folder / file}' cannot be read ({error}).") from error

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Weights in float32.

        Args:
            names: by the key to return a weight under, its name in the checkpoint.

        Raises:
            BadInput: one holds values that are NaN or infinite, or its file cannot be read any more.
        """
        tensors: dict[str, Tensor] = {}
        for key, name in names.items():
            with self._open(self._files[name]) as shard:  # anew for each, so that no more of a file stays mapped
                tensors[key] = shard.get_tensor(name).to(torch.float32, copy=True)
            if bad := int(tensors[key].numel() - tensors[key].isfinite().sum()):
                raise BadInput(f"{KEY}: {bad} NaN or infinite values in '{name}'; give a sound checkpoint.")
        return tensors


def load_outside(checkpoint: str) -> tuple[PreTrainedModel, Shards, dict[str, str]]:
    """A model in evaluation mode whose weights are all on the meta device, and what they are called in its files.

    Returns:
        The model, its shards, and by the name of every parameter and stored buffer its name in the shards.

    Raises:
        BadInput: a weight is missing or of another shape.
    """
    shards, config = Shards(checkpoint), load_config(checkpoint)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.eval()  # type: ignore[no-untyped-call]
    names = _names(model, shards, checkpoint)
    return model, shards, names


def _names(model: PreTrainedModel, shards: Shards, checkpoint: str) -> dict[str, str]:
    """What every weight is called in the shards: the same, or without the prefix of the decoder."""
    model.tie_weights()
    names, seen = {}, set()
    prefix = f"{model.base_model_prefix}."
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        known = [stored for stored in (name, name.removeprefix(prefix)) if stored in shards]
        if not known or shards.shapes[known[0]] != tensor.shape:
            raise BadInput(
                f"model.offload: '{checkpoint}' holds no '{name}' of shape {tuple(tensor.shape)}; give offload false, "
                "or save the model with save_pretrained first."
            )
        names[name] = known[0]
    return names


class Blocks:
    """A model's blocks, each of which is in memory only inside of `on`.

    Args:
        blocks: the modules, whose parameters are on the meta device outside of that.
        read: the tensors of one block by their names in it.
    """

    def __init__(self, blocks: nn.ModuleList, read: Callable[[int], dict[str, Tensor]]) -> None:
        self._blocks = blocks
        self._read = read

    def load(self, index: int) -> None:
        """Bring a block's weights into memory."""
        self._blocks[index].load_state_dict(self._read(index), assign=True)

    def release(self, index: int) -> None:
        """Let a block's weights go."""
        to_meta(self._blocks[index].modules())

    @contextmanager
    def on(self, index: int, device: torch.device) -> Iterator[nn.Module]:
        """A block on a device, for as long as the body runs."""
        self.load(index)
        try:
            yield self._blocks[index].to(device)
        finally:
            self.release(index)


def to_meta(modules: Iterable[nn.Module]) -> None:
    """Let parameters go. Buffers stay: most are computed at the start, such as rotary frequencies, and not stored."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
