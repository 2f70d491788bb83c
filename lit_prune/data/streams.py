"""Streams of hidden states: through a block, and as pairs to train one on."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset

from lit_prune import ranks
from lit_prune.data.share import BATCH, Share, alone, whole
from lit_prune.data.space import Space
from lit_prune.data.transfer import AheadLoader, ahead, beside, gathered, storing
from lit_prune.errors import BadInput
from lit_prune.finite import all_finite
from lit_prune.models import Part, linear_layers


class NotFinite(Exception):
    """A block puts out values that are NaN or infinite.

    Attributes:
        sample: the first for which it does.
        block: of a window, the first with such a layer; None if no layer is to blame.
        layer: the first linear layer that does, by its name in the block.
    """

    def __init__(self, sample: int, block: nn.Module | None, layer: str | None) -> None:
        super().__init__(f"sample {sample}, {layer}")
        self.sample = sample
        self.block = block
        self.layer = layer


@contextmanager
def sound(name: str, share: Share, blocks: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Say in one sentence in which block hidden states are NaN or infinite, and for which sample first.

    Args:
        name: of the block or window that the body passes hidden states through.
        share: which samples these are.
        blocks: of the model, to tell which of a window it is.

    Raises:
        BadInput: they are.
    """
    try:
        yield
    except NotFinite as error:
        text, number = "calibration", share.rows[error.sample]
        if number >= share.all_samples:
            text, number = "held-out", number - share.all_samples
        for index, block in enumerate(blocks):
            name = f"block_{index:02d}" if block is error.block else name
        where = f"layer '{error.layer}'" if error.layer else "no linear layer, but what lies between them,"
        raise BadInput(
            f"{name}: {where} puts out NaN or infinite values, first for {text} sample {number}; the blocks before it "
            "are finished and stay. Give a sound checkpoint, or a lower optimizer.lr."
        ) from error


Forward = Callable[[Tensor], Tensor]


def outputs(
    forward: Forward,
    hidden: Tensor,
    device: torch.device | None = None,
    batch_size: int = BATCH,
    border: int = 0,
    first: int = 0,
    let_go: Callable[[], None] = lambda: None,
) -> Iterator[tuple[slice, Tensor]]:
    """Walk a stream through a block, batch by batch, without gradients.

    Args:
        forward: the block, from hidden states to hidden states.
        hidden: the stream that enters it, shape (samples, sequence, width).
        device: where the block lies; None for where the stream lies.
        batch_size: samples in one forward pass.
        border: a batch ends before this sample, so that a pass over the first samples alone has the same batches. A
            sample's last bits can depend on which others are in its batch.
        first: the number of the first sample, for complaints.
        let_go: called when a batch has been dealt with; see `Space`.

    Yields:
        Which samples, and the block's output for them on `device`.

    Raises:
        NotFinite: an output is NaN or infinite.
    """
    border = min(border, len(hidden))
    starts = [*range(0, border, batch_size), *range(border, len(hidden), batch_size)]
    samples = (slice(start, stop) for start, stop in pairwise([*starts, len(hidden)]))
    there = device or hidden.device
    early = beside(hidden, there)
    batches = ((rows, hidden[rows].to(there, non_blocking=early)) for rows in samples)
    for rows, entering in ahead(batches, there) if early else batches:
        with torch.no_grad():
            output = forward(entering)
            require_finite(forward, entering, output, first + rows.start)
        yield rows, output
        let_go()


def require_finite(forward: Forward, entering: Tensor, output: Tensor, first: int) -> None:
    """See that a block has put out numbers.

    Args:
        forward: the block.
        entering: what has entered it, shape (samples, sequence, width).
        output: what has left it.
        first: the number of the first sample, for complaints.

    Raises:
        NotFinite: an output is NaN or infinite.
    """
    if not all_finite(output):
        row = int((~output.isfinite()).flatten(1).any(1).nonzero()[0])
        raise NotFinite(first + row, *_first_layer(forward, entering[row : row + 1]))


@torch.no_grad()
def require_finite_layers(forward: Forward, hidden: Tensor, device: torch.device | None = None) -> None:
    """See that all linear layers of a block put out numbers, whatever becomes of them behind it.

    Args:
        forward: the block.
        hidden: what enters it, shape (samples, sequence, width).
        device: where the block lies; None for where the stream lies.

    Raises:
        NotFinite: one puts out NaN or infinite values.
    """
    for row in range(len(hidden)):
        block, layer = _first_layer(forward, hidden[row : row + 1].to(device or hidden.device))
        if layer is not None:
            raise NotFinite(row, block, layer)


def _first_layer(forward: Forward, entering: Tensor) -> tuple[nn.Module | None, str | None]:
    """The first linear layer whose output is not finite, and its block, of a part that is computed once more."""
    part = getattr(forward, "__self__", forward)
    found: list[tuple[nn.Module, str]] = []

    def look(block: nn.Module, name: str, output: Tensor) -> None:
        if not all_finite(output):
            found.append((block, name))

    with ExitStack() as hooks:
        for block in part.blocks if isinstance(part, Part) else []:
            for name, layer in linear_layers(block).items():
                of = partial(look, block, name)
                hook = layer.register_forward_hook(lambda _, __, output, of=of: of(output))
                hooks.callback(hook.remove)
        forward(entering)
    return found[0] if found else (None, None)


def propagate(
    forward: Forward,
    hidden: Tensor,
    device: torch.device | None = None,
    out: Tensor | None = None,
    first: int = 0,
    let_go: Callable[[], None] = lambda: None,
    border: int = 0,
    empty: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The stream that leaves a block, or any part of one: see `outputs`.

    Written into `out` if given, which may be `hidden` itself; otherwise where `empty` makes room, or on the device of
    `hidden`.
    """
    with storing() as store:
        for samples, output in outputs(forward, hidden, device, border=border, first=first, let_go=let_go):
            if out is None:
                out = (empty or hidden.new_empty)((len(hidden), *output.shape[1:]), dtype=hidden.dtype)
            store(out[samples], output)
    return torch.empty_like(hidden) if out is None else out


def squared_errors(
    stream: Tensor, other: Tensor, let_go: Callable[[], None] = lambda: None, device: torch.device | None = None
) -> Tensor:
    """The mean squared difference of two streams for each sample, float64, shape (samples,), on `device` if given."""
    errors = []
    for one, another in zip(stream, other, strict=True):
        a = one.to(device or one.device)
        b = another.to(device or another.device)
        errors.append((a - b).square().mean(dtype=torch.float64))
        let_go()
    return torch.stack(errors)


@dataclass(frozen=True)
class BlockError:
    """The error of a block as the paper reports it, on calibration and on held-out text; None if not measured."""

    calibration: float | None
    held_out: float | None


@dataclass
class Streams:
    """Both streams of hidden states, (samples, sequence, width) each.

    Attributes:
        sparse: what the model computes up to the first block that is not final, with all earlier ones pruned and
            reconstructed. Of the first sequence alone if nobody needs it, which shows that the model can compute.
        dense: what the untouched model computes up to a block, by the block's index; empty if nobody needs it.
        share: which samples these are; those that may be learnt from come first, the others are held out.
        device: where blocks compute.
        space: where streams lie.
    """

    sparse: Tensor
    dense: dict[int, Tensor]
    share: Share
    device: torch.device
    space: Space = field(default_factory=Space)

    @property
    def samples(self) -> int:
        """How many come first that may be learnt from."""
        return self.share.samples

    @property
    def observed(self) -> int:
        """How many of these come first that statistics see."""
        return self.share.observed

    def gathered(self, boundaries: Iterable[int], owner: int) -> "Streams | None":
        """The dense stream where it enters some blocks, with the samples of all ranks; None on other ranks than one."""
        parts = ranks.told_by_all(self.share)
        together, mine = whole(parts), ranks.rank() == owner
        dense = {}
        for boundary in boundaries:
            here = self.dense[boundary]
            room = self.space.empty((len(together.rows), *here.shape[1:]), here.dtype) if mine else None
            for rank, part in enumerate(parts):
                for place, number in enumerate(part.rows if ranks.rank() in (rank, owner) else []):
                    row = here[place] if rank == ranks.rank() else torch.empty_like(here[0])
                    row = ranks.handed(row.to(self.device), rank, owner)
                    if room is not None:
                        room[number] = row
                self.space.let_go()
            if room is not None:
                dense[boundary] = room
        first = next(iter(dense.values()), None)
        return None if first is None else Streams(first, dense, together, self.device, self.space)

    def outputs(self, forward: Forward, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """A stream's way through a block, in the same batches as statistics see and every other pass has."""
        return outputs(forward, hidden, self.device, border=self.observed, let_go=self.space.let_go)

    def propagate(self, forward: Forward, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """The stream that leaves a block, or a part of one, in the same batches."""
        make, let_go = self.space.empty, self.space.let_go
        return propagate(forward, hidden, self.device, out, let_go=let_go, border=self.observed, empty=make)

    def error(self, index: int) -> BlockError:
        """Between the two streams as they enter a block."""
        return self._split(squared_errors(self.sparse, self.dense[index], self.space.let_go, self.device))

    def error_after(self, forward: Forward, hidden: Tensor, index: int) -> BlockError:
        """Between what a block makes of `hidden` and the dense stream that leaves it.

        Args:
            forward: the block.
            hidden: a stream that enters it.
            index: the block's.
        """
        dense, walk = self.dense[index + 1], self.outputs(forward, hidden)
        return self._split(torch.cat([squared_errors(out, dense[rows].to(out.device)) for rows, out in walk]))

    def _split(self, errors: Tensor) -> BlockError:
        calibration, held_out = (self.mean(part) for part in (errors[: self.samples], errors[self.samples :]))
        assert calibration is not None
        return BlockError(calibration, held_out)

    def mean(self, errors: Tensor) -> float | None:
        """Over the samples of all ranks; None without any."""
        here = [float(errors.sum(dtype=torch.float64)), len(errors)]
        summed, samples = ranks.total(torch.tensor(here, dtype=torch.float64, device=self.device)).tolist()
        return summed / samples if samples else None


class Rows(NamedTuple):
    """A rank's part of a training step's batch.

    Attributes:
        rows: which samples; one that does not count where the batch has none of this rank's.
        weight: of the mean over them, so that the mean over ranks is that over the batch.
    """

    rows: list[int]
    weight: float


class SharedBatches(Sampler[Any]):
    """Batches drawn from the samples of all ranks, the same on each, of which each takes its own.

    Args:
        share: which of them are this rank's.
        batch_size: samples in a training step, over all ranks.
    """

    def __init__(self, share: Share, batch_size: int) -> None:
        self._place = {number: row for row, number in enumerate(share.rows[: share.samples])}
        self._drawn = BatchSampler(RandomSampler(range(share.all_samples)), batch_size, drop_last=False)

    def __len__(self) -> int:
        return len(self._drawn)

    def __iter__(self) -> Iterator[Rows]:
        for batch in self._drawn:
            rows = [self._place[number] for number in batch if number in self._place]
            yield Rows(rows or [0], ranks.count() * len(rows) / len(batch))


class _Batches(TensorDataset):
    """A TensorDataset that gathers a whole batch at once instead of sample by sample."""

    def __init__(
        self, inputs: Tensor, targets: Tensor, let_go: Callable[[], None], device: torch.device | None
    ) -> None:
        super().__init__(inputs, targets)
        self._let_go = let_go
        self._device = device

    def __getitems__(self, indices: Rows | list[int]) -> tuple[Any, ...]:
        rows = indices.rows if isinstance(indices, Rows) else indices
        batch = tuple(gathered(tensor, rows, self._device) for tensor in self.tensors)
        self._let_go()
        if isinstance(indices, Rows) and ranks.count() > 1:
            return *batch, indices.weight
        return batch


def _as_is(batch: Any) -> Any:
    return batch


class ReconstructionPairs(L.LightningDataModule):
    """What a reconstruction trains on: a unit's inputs and the outputs it is to reach.

    Args:
        inputs: the stream that enters the unit, shape (samples, sequence, width).
        targets: what is to leave it, of the same shape.
        samples: how many come first to be trained on; the others are held out.
        batch_size: samples in a training step, over all ranks.
        space: where both lie.
        share: which samples of all ranks those are that come first; by default there are no others.
        device: where the unit is trained, so that batches can be on their way there before they are needed.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        samples: int,
        batch_size: int = 8,
        space: Space | None = None,
        share: Share | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        let_go = (space or Space()).let_go
        self._train = _Batches(inputs[:samples], targets[:samples], let_go, device)
        self._held_out = _Batches(inputs[samples:], targets[samples:], let_go, device)
        self._device = device if beside(inputs, device) else None
        self._batch_size = batch_size
        self._share = share or alone(samples)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Pairs in an order that is drawn anew in every epoch; several ranks get their parts' weights beside them."""
        drawn = SharedBatches(self._share, self._batch_size)
        return self._loader(self._train, batch_sampler=drawn)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]] | list[Any]:
        """The held-out pairs; empty if there are none."""
        if not len(self._held_out):
            return []
        return self._loader(self._held_out, batch_size=self._batch_size)

    def _loader(self, pairs: _Batches, **settings: Any) -> DataLoader[tuple[Tensor, ...]]:
        if self._device is None:
            return DataLoader(pairs, collate_fn=_as_is, **settings)
        loader = AheadLoader(pairs, collate_fn=_as_is, **settings)
        loader.device = self._device
        return loader
