"""Figures by cell: how they are taken, compared by draw, and written down."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from benchmarks.peers.cells import SEQUENTIAL, Cell

Figures = dict[str, Any]
Found = dict[Cell, Figures]
Drawn = dict[int, Figures]
"""Of one cell, by draw."""
Value = Callable[[Figures], float]

NOTHING = "not measured"
INCOMPARABLE = "another sparsity"
CLOSE = timedelta(hours=6)
"""Within which two cells must have begun to be compared without a mark."""


def drawn(found: Found, cell: Cell) -> Drawn:
    """A cell's figures by draw, in order; whichever draw the given one is of."""
    draws = sorted({other.draw for other in found})
    return {draw: found[one] for draw in draws if (one := replace(cell, draw=draw)) in found}


def number(value: float | None) -> float:
    """What a file of JSON holds in place of a figure that is not finite is None."""
    return math.nan if value is None else value


def seconds(stage: str) -> Value:
    """Of a stage."""
    return lambda figures: number(figures["seconds"][stage])


def memory(figures: Figures) -> float:
    """Peak, in bytes."""
    return number(figures["peak_memory_bytes"])


def perplexity(figures: Figures) -> float:
    """Of what was saved."""
    return number(figures["perplexity"])


def epoch(figures: Figures) -> float:
    """Seconds of one pass of the training over all sequences, in all blocks."""
    return number(figures["seconds"]["reconstruct"]) / int(figures["asked"]["epochs"])


def above(dense: Figures | None) -> Value:
    """Log perplexity above the dense model's."""

    def value(figures: Figures) -> float:
        ratio = perplexity(figures) / number(dense["perplexity"]) if dense else math.nan
        return math.log(ratio) if ratio > 0 else math.nan

    return value


def theory(dense: Figures | None, tool: str, method: str) -> Value | None:
    """How many times what the matrix products of the blocks' linear layers alone take at the rate measured beside them.

    Of Wanda its pruning, over its two forward passes (one of torchao's and of true sequential);
    of training an epoch, over three passes. None for the others.
    """
    passes = {"Wanda": 1 if tool in ("torchao", SEQUENTIAL) else 2, "BR": 3, "BR+GP": 3}.get(method)
    if passes is None or dense is None:
        return None
    taken = seconds("prune") if method == "Wanda" else epoch

    def value(figures: Figures) -> float:
        tokens = figures["cell"]["samples"] * figures["cell"]["length"]
        return taken(figures) * number(figures["flops_per_second"]) / (passes * 2.0 * dense["block_weights"] * tokens)

    return value


def compared(over: Drawn, under: Drawn, value: Value) -> list[float] | None:
    """Ratios of the draws that both have; None if one has not pruned as much as the other."""
    both = [(over[draw], under[draw]) for draw in over if draw in under]
    if any(abs(number(one["sparsity"]) - number(other["sparsity"])) > 0.01 for one, other in both):
        return None
    # what is not above 0, such as a loss below dense, is nothing to be a multiple of
    return [value(one) / value(other) if value(other) > 0 else math.nan for one, other in both]


def marks(ours: Drawn, *others: Drawn) -> str:
    """† for code that changed between the draws or was not committed, ‡ for what began too far from ours."""
    commits = [{figures["commit"] for figures in drawn.values()} for drawn in (ours, *others)]
    mixed = any(len(several) > 1 or any(str(one).endswith("-dirty") for one in several) for several in commits)
    far = any(abs(began(other[draw]) - began(ours[draw])) > CLOSE for other in others for draw in other if draw in ours)
    return "†" * mixed + "‡" * far


def began(figures: Figures) -> datetime:
    """When a cell did."""
    return datetime.fromisoformat(figures["started"])


def spread(values: Iterable[float] | None, digits: int = 1) -> str:
    """Median, least and most; None is what cannot be compared."""
    if values is None:
        return INCOMPARABLE
    values = list(values)
    if not values:
        return NOTHING
    if not all(map(math.isfinite, values)):
        return "not finite"
    middle = f"{median(values):.{digits}f}"
    return f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else middle


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    written = [f"| {' | '.join(line)} |" for line in (head, *lines)]
    return "\n".join([written[0], "|---" * len(head) + "|", *written[1:]]) + "\n"
