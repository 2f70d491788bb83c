"""A stream's way through a block on which all batches wait for each other at every linear layer."""

from collections.abc import Callable, Iterator, Mapping

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from lit_prune.data.share import BATCH
from lit_prune.data.streams import Forward, require_finite
from lit_prune.errors import BadInput
from lit_prune.heap import without_holes
from lit_prune.models import watch_inputs


@torch.no_grad()
def lockstep(
    forward: Forward,
    hidden: Tensor,
    layers: Mapping[str, nn.Module],
    out: Tensor,
    device: torch.device | None = None,
    batch_size: int = BATCH,
    let_go: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """Lead a stream through a block, with a halt before each of some layers once all batches have come to it.

    Whoever is told of a halt may change the layer: all batches go on through it as it is then. Until they do, what the
    block goes on with is kept of every batch. A batch is a greenlet, so that a block's code needs no change, and all
    are of one thread, whose cores and modes of PyTorch they share: a block must not enter a mode before a halt and
    leave it after, as none is known to do.

    Args:
        forward: the block, from hidden states to hidden states.
        hidden: the stream that enters it, shape (samples, sequence, width).
        layers: where to halt, by name.
        out: takes the stream that leaves the block; may be `hidden` itself.
        device: where the block lies; None for where the stream lies.
        batch_size: samples in one forward pass.
        let_go: called when a batch has left the block; see `Space`.

    Yields:
        The name of the layer that is next, in the order in which they run.

    Raises:
        BadInput: layers run twice in a pass, or in another order for some batches.
        NotFinite: an output is NaN or infinite.
    """
    here = getcurrent()

    def arrive(name: str, _: Tensor) -> None:
        here.switch(name)  # which does nothing where someone looks for the layer that is not finite

    def walk(rows: slice) -> Tensor:
        return forward(hidden[rows].to(device or hidden.device))

    starts = range(0, len(hidden), batch_size)
    walks = [(slice(start, start + batch_size), greenlet(walk)) for start in starts]
    passed: set[str | None] = set()
    with watch_inputs(layers, arrive), without_holes():
        while walks:
            halts: set[str | None] = set()  # None is the end of the block
            for rows, one in walks:
                arrived = one.switch(rows)
                halts.add(None if one.dead else arrived)
                if one.dead:
                    require_finite(forward, hidden[rows].to(arrived.device), arrived, rows.start)
                    out[rows] = arrived
                    let_go()
            if len(halts) > 1 or halts & passed:
                raise BadInput(
                    f"model.true_sequential: layers of a block ({', '.join(sorted(filter(None, halts)))}) do not run "
                    "once each, in the same order for all sequences; leave model.true_sequential out."
                )
            (halt,) = halts
            if halt is None:
                return
            passed.add(halt)
            yield halt
