"""What is reconstructed at a time: a window of blocks, half a block, or one linear layer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lit_prune.errors import BadInput
from lit_prune.models.blocks import BlockCall, entering, linear_layers, patched_forward


class Part(nn.Module, ABC):
    """A piece of the model that is trained by itself.

    Args:
        blocks: the blocks that it is, or lies in.
        calls: their call arguments besides the hidden states.
        name: what it is called in curves, such as "attention"; empty for whole blocks.

    Attributes:
        compiled: whether whole blocks are passed through by `torch.compile`.
    """

    compiled = False

    def __init__(self, blocks: Sequence[nn.Module], calls: Sequence[BlockCall], name: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.calls = list(calls)
        self.name = name

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """What leaves the part, (batch, sequence, out), for what enters it, (batch, sequence, in)."""

    def enter(self, hidden: Tensor) -> Tensor:
        """What enters the part when `hidden`, (batch, sequence, width), enters its first block."""
        return hidden

    def own_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that it is made of."""
        return self.blocks.parameters()

    def _call(self, index: int, hidden: Tensor) -> Tensor:
        self.calls[index] = call = self.calls[index].to(hidden.device)
        return call(self.blocks[index], hidden, self.compiled)


class Window(Part):
    """One block, or several in a row."""

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        for index in range(len(self.blocks)):
            inputs = self._call(index, inputs)
        return inputs


class Half(Part):
    """A block's attention or its MLP, each with the residual connection around it.

    It is the block with the other half's modules putting out zeros, so that any architecture can be cut that adds
    attention to its input first and the MLP to the sum of both.

    Args:
        block: the block.
        call: its call arguments.
        name: "attention" or "mlp".
        silent: the modules of the other half, with what they put out instead.
        before: the half that comes before; None for the first.
    """

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        name: str,
        silent: "Sequence[_Silent]",
        before: "Half | None" = None,
    ) -> None:
        super().__init__([block], [call], name)
        self._silent = silent
        self._before = [before] if before else []  # in a list, so that it is no submodule
        self._idle: set[int] = set()

    def leave_idle(self, sample: Tensor) -> None:
        """Take for the other half's own what has no part in this one's output.

        Norms of the other half's output get nothing but zeros here: their gradients are zero, but weight decay would
        shrink them. Nothing comes of those of its input: they have no gradients, which several ranks would wait for.

        Args:
            sample: what enters the half.
        """

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not args[0].any():
                self._idle |= {id(parameter) for parameter in module.parameters()}

        norms = [child for child in self.blocks[0].children() if not linear_layers(child)]
        handles = [norm.register_forward_pre_hook(note) for norm in norms]
        parameters = list(self.blocks.parameters())
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(self(sample).sum(), parameters, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        self._idle |= {id(p) for p, gradient in zip(parameters, gradients, strict=True) if gradient is None}

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        with patched_forward([s.module for s in self._silent], lambda i, _: self._silent[i].zeros):
            return self._call(0, inputs)

    def enter(self, hidden: Tensor) -> Tensor:  # noqa: D102
        for half in self._before:
            hidden = half(hidden)
        return hidden

    def own_parameters(self) -> Iterator[nn.Parameter]:  # noqa: D102
        return (p for p in self.blocks.parameters() if id(p) not in self._idle)


class Layer(Part):
    """One linear layer of a block.

    Args:
        block: the block.
        call: its call arguments.
        name: the layer's within the block.
    """

    def __init__(self, block: nn.Module, call: BlockCall, name: str) -> None:
        super().__init__([block], [call], name)
        self._layer = [linear_layers(block)[name]]

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        output: Tensor = self._layer[0](inputs)
        return output

    def enter(self, hidden: Tensor) -> Tensor:  # noqa: D102
        inputs = entering(self._layer[0], lambda: self._call(0, hidden))
        return inputs.reshape(*hidden.shape[:2], -1)  # some blocks hand on all tokens in one row

    def own_parameters(self) -> Iterator[nn.Parameter]:  # noqa: D102
        return self._layer[0].parameters()


@dataclass(frozen=True)
class _Silent:
    """A module that is to put out zeros; `output` is what it put out for one sample."""

    module: nn.Module
    output: Any

    def zeros(self, *args: Any, **kwargs: Any) -> Any:
        entering = next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor))

        def zero(leaf: Any) -> Any:
            return entering.new_zeros(*entering.shape[:-1], leaf.shape[-1]) if isinstance(leaf, Tensor) else leaf

        return tree_map(zero, self.output)


@torch.no_grad()
def halves(block: nn.Module, call: BlockCall, sample: Tensor, name: str = "the block") -> list[Part]:
    """Cut a block into attention and MLP.

    Args:
        block: the block.
        call: its call arguments.
        sample: hidden states to try it with, shape (1, sequence, width).
        name: the block's, for messages.

    Raises:
        BadInput: the block is not the one half after the other.
    """
    ran: list[_Silent] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        ran.append(_Silent(module, output))

    handles = [child.register_forward_hook(note) for child in block.children() if linear_layers(child)]
    try:
        whole = call(block, sample)
    finally:
        for handle in handles:
            handle.remove()
    if len(ran) > 1:
        attention = Half(block, call, "attention", ran[1:])
        mlp = Half(block, call, "mlp", ran[:1], attention)
        middle = attention(sample)
        again = mlp(middle)
        if (again - whole).norm() <= 1e-3 * (whole - sample).norm():
            attention.leave_idle(sample)
            mlp.leave_idle(middle)
            return [attention, mlp]
    raise BadInput(
        f"model.reconstruction: sublayer needs blocks that add attention first and the MLP after it, but {name}, a "
        f"{type(block).__name__}, does not; give block or layer."
    )


@torch.no_grad()
def layers_in_order(block: nn.Module, call: BlockCall, sample: Tensor) -> list[Part]:
    """A block's linear layers, in the order in which they run on `sample`, shape (1, sequence, width)."""
    ran: dict[str, None] = {}
    layers = linear_layers(block)
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: ran.setdefault(name)) for name, layer in layers.items()
    ]
    try:
        call(block, sample)
    finally:
        for handle in handles:
            handle.remove()
    return [Layer(block, call, name) for name in ran]
