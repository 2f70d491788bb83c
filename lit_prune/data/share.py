"""Which sequences a rank works on."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from lit_prune import ranks
from lit_prune.errors import BadInput

BATCH = 4
"""Sequences in one pass; a sequence's last bits can depend on which others are in its batch.

Twice as many are slower on a CPU, 244 ms for 215 through a block of SmolLM2-135M with 32 sequences of 256 tokens: what
lies between the products no longer fits its caches, or is given back by the allocator and has to be got anew.
"""


class Share(NamedTuple):
    """The sequences of one rank, the calibration ones first.

    Attributes:
        rows: their numbers among those of all ranks.
        observed: how many of its own come first that statistics see.
        samples: how many of its own come first that may be learnt from.
        all_samples: how many of all ranks' may be learnt from.
    """

    rows: list[int]
    observed: int
    samples: int
    all_samples: int


def whole(parts: Sequence[Share]) -> Share:
    """What all ranks' parts make together, as a single rank would have it."""
    rows = sorted(row for part in parts for row in part.rows)
    observed, samples = sum(part.observed for part in parts), sum(part.samples for part in parts)
    return Share(rows, observed, samples, samples)


def alone(samples: int, held_out: int = 0) -> Share:
    """All there are."""
    return Share(list(range(samples + held_out)), samples, samples, samples)


def share(observed: int, samples: int, sequences: int, together: int = 1) -> Share:
    """This rank's part of each kind of sequence.

    Args:
        observed: how many sequences come first that statistics see.
        samples: how many come first that may be learnt from.
        sequences: how many there are, the held-out ones last.
        together: how many of those that statistics see should stay together, if there are enough.

    Raises:
        BadInput: there are more ranks than sequences of a kind.
    """
    held_out = sequences - samples
    if observed < ranks.count() or 0 < held_out < ranks.count():
        raise BadInput(
            f"trainer.devices: {ranks.count()} devices cannot share {observed} calibration and {held_out} held-out "
            "sequences; give more data.samples and data.validation_samples, or fewer devices."
        )
    kinds = range(observed), range(observed, samples), range(samples, sequences)
    mine = [_part(rows, unit) for rows, unit in zip(kinds, (math.lcm(BATCH, together), BATCH, BATCH), strict=True)]
    rows = [row for part in mine for row in part]
    return Share(rows, len(mine[0]), len(mine[0]) + len(mine[1]), samples)


def _part(rows: range, unit: int) -> range:
    """This rank's of them, in units that stay together if there is one for every rank."""
    unit = next((size for size in (unit, BATCH) if len(rows) >= size * ranks.count()), 1)
    units = -(-len(rows) // unit)
    start, stop = (unit * (units * rank // ranks.count()) for rank in (ranks.rank(), ranks.rank() + 1))
    return rows[start:stop]
