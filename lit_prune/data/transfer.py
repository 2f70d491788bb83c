"""Copies between pinned host memory and a GPU that take place while the GPU computes.

Where streams of hidden states lie in other memory, or blocks compute on something else than a GPU, copies are the plain
ones, in the order of the program. Nothing here changes a number.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader


def beside(tensor: Tensor, device: torch.device | None) -> bool:
    """Whether a tensor can be copied to or from a device beside its computation."""
    return device is not None and device.type == "cuda" and tensor.device.type == "cpu" and tensor.is_pinned()


def gathered(tensor: Tensor, rows: list[int], device: torch.device | None) -> Tensor:
    """Some rows of a tensor: on the device if they can be copied beside its computation, or else where they lie."""
    if device is None or not beside(tensor, device):
        return tensor[rows]
    there = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype, device=device)
    for place, row in zip(there, rows, strict=True):  # one by one, so that the host touches none of it
        place.copy_(tensor[row], non_blocking=True)
    return there


@cache
def _side(device: torch.device, way: Literal["in", "out"]) -> torch.cuda.Stream:
    """The stream of a GPU for copies to it, or from it: only one, since PyTorch keeps memory for each by itself."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def ahead(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Batches one after the other, with the copies that the next takes to a GPU begun before each is handed out.

    Args:
        batches: makes each when it is asked for, by copies that do not block.
        device: the GPU.
    """
    side = _side(device, "in")
    waiting: list[tuple[Any, torch.cuda.Event]] = []
    iterator = iter(batches)
    while True:
        with torch.cuda.stream(side):
            batch = next(iterator, waiting)
            begun = side.record_event()
        if waiting:
            yield _arrived(*waiting.pop())
        if batch is waiting:
            return
        waiting.append((batch, begun))


def _arrived(batch: Any, begun: torch.cuda.Event) -> Any:
    """Let what is computed from now on wait for a batch, and its memory be taken back only after that."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.device.type != "cpu":
            now = torch.cuda.current_stream(leaf.device)
            now.wait_event(begun)
            leaf.record_stream(now)
    return batch


class AheadLoader(DataLoader[Any]):
    """A DataLoader whose next batch is on its way to a GPU while one is dealt with; see `ahead`."""

    device: torch.device

    def __iter__(self) -> Any:
        return ahead(super().__iter__(), self.device)


@contextmanager
def storing() -> Iterator[Callable[[Tensor, Tensor], None]]:
    """Store what a device puts out, beside its computation if possible; all is there when the context ends.

    Yields:
        What copies values into a place of the same shape.
    """
    sides: set[torch.cuda.Stream] = set()

    def put(place: Tensor, values: Tensor) -> None:
        if not beside(place, values.device):
            place.copy_(values)
            return
        side = _side(values.device, "out")
        sides.add(side)
        side.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(side):
            place.copy_(values, non_blocking=True)
        values.record_stream(side)

    try:
        yield put
    finally:
        for side in sides:
            side.synchronize()
