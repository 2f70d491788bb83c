"""The processes that share one run's work, and what they have to agree on; a process by itself is rank 0 of 1."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

from lit_prune.errors import BadInput

T = TypeVar("T")


_by_itself = False


@contextmanager
def apart() -> Iterator[None]:
    """Let this process be rank 0 of 1 inside the context, whatever the others do meanwhile."""
    global _by_itself  # as the process group is
    _by_itself = True
    try:
        yield
    finally:
        _by_itself = False


def joined() -> bool:
    """Whether this process is one of several."""
    return distributed.is_available() and distributed.is_initialized() and not _by_itself


def rank() -> int:
    """The number of this process."""
    return distributed.get_rank() if joined() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if joined() else 1


def total(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if joined():
        distributed.all_reduce(tensor)
    return tensor


def counted(number: int, device: torch.device) -> int:
    """The sum over all ranks; `device` is where they talk."""
    return int(total(torch.tensor(number, device=device)))


def all_agree(true: bool, device: torch.device) -> bool:
    """Whether something is true on every rank."""
    return counted(int(true), device) == count()


def taken_from(owner: int, tensor: Tensor) -> Tensor:
    """One rank's tensor on all of them, in place."""
    if joined():
        distributed.broadcast(tensor, owner)
    return tensor


def handed(tensor: Tensor, sender: int, receiver: int) -> Tensor:
    """One rank's tensor on another, in place; the others need not ask."""
    if rank() == sender != receiver:
        distributed.send(tensor, receiver)
    elif rank() == receiver != sender:
        distributed.recv(tensor, sender)
    return tensor


def told_by_all(message: T) -> list[T]:
    """What every rank has to say, on all of them."""
    if not joined():
        return [message]
    said = [message] * count()
    distributed.all_gather_object(said, message)
    return said


def told_by(owner: int, message: T) -> T:
    """What one rank has to say, on all of them."""
    if not joined():
        return message
    said = [message]
    distributed.broadcast_object_list(said, owner)
    return said[0]


def agreed(do: Callable[[], T]) -> T:
    """What a function returns, once it has worked on every rank.

    Raises:
        BadInput: on rank 0, if any rank has raised it. The others exit: the sentence is said once.
    """
    if not joined():
        return do()
    found, complaint = None, None
    try:
        found = do()
    except BadInput as error:
        complaint = str(error)
    if said := next(filter(None, told_by_all(complaint)), None):
        raise BadInput(said) if rank() == 0 else SystemExit(2)
    return found  # type: ignore[return-value]  # None is what it found then


def told_by_first(tell: Callable[[], T]) -> T:
    """What rank 0 finds, on all ranks; the others wait for it.

    Raises:
        BadInput: on rank 0, which has raised it. The others exit.
    """
    return told_by(0, agreed(lambda: tell() if rank() == 0 else None))  # type: ignore[return-value]  # of rank 0


def wait() -> None:
    """Until all ranks are here."""
    if joined():
        distributed.barrier()
