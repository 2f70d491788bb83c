"""Where the weights of a model are while it is not their turn."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.heap import give_back
from lit_prune.models.checkpoint import cast
from lit_prune.models.safetensors_file import InParts


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All parameters and buffers of a module."""
    return chain(module.parameters(), module.buffers())


@contextmanager
def on_device(tensors: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Have weights on a device inside the context; they are not changed there, so nothing is copied back."""
    homes = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, home in homes:
            tensor.data = home.to(device)
        yield
    finally:
        for tensor, home in homes:
            tensor.data = home


class Home:
    """The whole model stays in memory, on the CPU.

    Args:
        model: the model.
        blocks: its blocks.
    """

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList) -> None:
        self.model = model
        self.blocks = blocks

    def load(self, index: int) -> None:
        """Have a block's weights in memory."""

    def release(self, index: int) -> None:
        """Let a block go that is not needed for now."""
        self.blocks[index].cpu()

    @contextmanager
    def on(self, index: int, device: torch.device) -> Iterator[nn.Module]:
        """A block on a device for as long as the body runs, which must not change it."""
        with on_device(tensors_of(self.blocks[index]), device):
            yield self.blocks[index]

    def read_outside(self) -> dict[str, Tensor]:
        """All that belongs to no block, by its names in the model; of weights that are tied, under the first."""
        inside = {id(tensor) for tensor in tensors_of(self.blocks)}
        named: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in inside:
                named.setdefault(id(tensor), (name, tensor.detach()))
        return dict(named.values())

    def outside_in_parts(self, dtype: torch.dtype) -> dict[str, InParts]:
        """Copies of `read_outside`, to be stored in `dtype`."""
        return {name: InParts.whole(cast(tensor, dtype).clone()) for name, tensor in self.read_outside().items()}

    @contextmanager
    def outside(self, device: torch.device) -> Iterator[None]:
        """All that belongs to no block (embeddings, final norm, head) on a device for as long as the body runs."""
        inside = {id(tensor) for tensor in tensors_of(self.blocks)}
        with on_device([tensor for tensor in tensors_of(self.model) if id(tensor) not in inside], device):
            yield


class Offloaded(Home):
    """Weights are read when they are needed and dropped when they are not; outside of that, they are on `meta`.

    Args:
        model: the model, with all parameters on the meta device.
        blocks: its blocks.
        read_block: gives a block's tensors in float32 by their names in it.
        read_outside: gives all other tensors by their names in the model.
        outside_in_parts: gives them, too, in the type they are to be stored in, to be read part by part.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        read_block: Callable[[int], dict[str, Tensor]],
        read_outside: Callable[[], dict[str, Tensor]],
        outside_in_parts: Callable[[torch.dtype], dict[str, InParts]],
    ) -> None:
        super().__init__(model, blocks)
        self.read_block = read_block
        self._read_outside = read_outside
        self._outside_in_parts = outside_in_parts

    def read_outside(self) -> dict[str, Tensor]:  # noqa: D102
        return self._read_outside()

    def outside_in_parts(self, dtype: torch.dtype) -> dict[str, InParts]:  # noqa: D102
        return self._outside_in_parts(dtype)

    def load(self, index: int) -> None:  # noqa: D102
        self.blocks[index].load_state_dict(self.read_block(index), assign=True)

    def release(self, index: int) -> None:  # noqa: D102
        _to_meta(self.blocks[index].modules())
        give_back()

    @contextmanager
    def on(self, index: int, device: torch.device) -> Iterator[nn.Module]:  # noqa: D102
        self.load(index)
        try:
            with on_device(tensors_of(self.blocks[index]), device):
                yield self.blocks[index]
        finally:
            self.release(index)

    @contextmanager
    def outside(self, device: torch.device) -> Iterator[None]:  # noqa: D102
        self.model.load_state_dict(self.read_outside(), assign=True, strict=False)
        self.model.tie_weights()
        try:
            with super().outside(device):
                yield
        finally:
            inside = set(self.blocks.modules())
            _to_meta(module for module in self.model.modules() if module not in inside)
            self.model.tie_weights()
            give_back()


def _to_meta(modules: Iterable[nn.Module]) -> None:
    """Let parameters go. Buffers stay: they are small, and computed rather than stored, as rotary frequencies are."""
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
