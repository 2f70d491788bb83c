"""What lit-prune is to reach beside its peers, and whether it does."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.peers.cells import OURS, ROWS, SCALED, SPARSITIES, Cell
from benchmarks.peers.figures import (
    INCOMPARABLE,
    NOTHING,
    Drawn,
    Figures,
    Found,
    Value,
    above,
    compared,
    drawn,
    epoch,
    marks,
    memory,
    perplexity,
    seconds,
    spread,
    table,
    theory,
)
from benchmarks.peers.growth import Curve, curves

DRAWS = 3
"""A median of fewer says nothing of a target."""
LINEAR = 1.1
"""The highest fitted exponent that is taken for linear."""
FASTER = {("Wanda", "0.5"): 1.75, ("SparseGPT", "0.5"): 2.0, ("SparseGPT", "2:4"): 2.0}
"""How many times as fast as llmcompressor."""


@dataclass(frozen=True)
class Target:
    """One of them.

    Attributes:
        what: in words.
        measured: by draw; None if what was measured cannot be compared.
        limit: for the median.
        least: whether that is the least it may be, or the most.
        marks: see `marks`.
    """

    what: str
    measured: list[float] | None
    limit: float
    least: bool
    marks: str = ""

    @property
    def verdict(self) -> str:
        """Whether it is met."""
        if self.measured is None:
            return INCOMPARABLE
        if len(self.measured) < DRAWS:
            return f"fewer than {DRAWS} draws" if self.measured else NOTHING
        if not all(map(math.isfinite, self.measured)):
            return "not met"
        middle = median(self.measured)
        return "met" if (middle >= self.limit if self.least else middle <= self.limit) else "not met"


def targets(
    dense: Figures | None,
    found: Found,
    sizes: list[tuple[int, int]],
    best: list[tuple[int, int]],
) -> str:
    """The table.

    Args:
        dense: figures of the dense model.
        found: figures by cell.
        sizes: calibration sequences, and tokens in each, of the rows.
        best: those of the recipe.
    """
    every = [(f"{size[0]} x {size[1]}", target) for size in sizes for target in beside(dense, found, size)]
    every += [(f"{size[0]} x {size[1]}", target) for size in best for target in quality(dense, found, size)]
    every += [("", linear(found, over)) for over in ("blocks", "sequences")]
    lines = [
        [
            f"{target.what} {target.marks}".strip(),
            size,
            f"at {'least' if target.least else 'most'} {target.limit:.3g}",
            spread(target.measured, 3),
            str(len(target.measured or [])),
            target.verdict,
        ]
        for size, target in every
    ]
    return table(["target", "tokens", "ratio", "measured", "draws", ""], lines)


def beside(dense: Figures | None, found: Found, size: tuple[int, int]) -> Iterator[Target]:
    """Seconds, memory and perplexity beside a peer's."""

    def row(tool: str, method: str, sparsity: str = "0.5") -> Drawn:
        return drawn(found, Cell("row", tool, method, sparsity, *size))

    def named(tool: str, method: str, sparsity: str) -> str:
        return f"{method}, {sparsity}{tool.removeprefix('lit-prune')}"

    def faster(peer: str, method: str, sparsity: str, times: float, tool: str = "lit-prune") -> Iterator[Target]:
        ours, theirs = row(tool, method, sparsity), row(peer, method, sparsity)
        for span in ("prune", "process"):
            what = f"{named(tool, method, sparsity)}: {peer}'s {span} seconds over ours"
            yield Target(what, compared(theirs, ours, seconds(span)), times, True, marks(ours, theirs))

    def smaller(peer: str, method: str, sparsity: str, share: float, tool: str = "lit-prune") -> Target:
        ours, theirs = row(tool, method, sparsity), row(peer, method, sparsity)
        what = f"{named(tool, method, sparsity)}: our memory over {peer}'s"
        return Target(what, compared(ours, theirs, memory), share, False, marks(ours, theirs))

    for (method, sparsity), times in FASTER.items():
        for tool in OURS:
            yield from faster("llmcompressor", method, sparsity, times, tool)
            yield smaller("llmcompressor", method, sparsity, 0.5, tool)
    yield from faster("published", "ADMM", "0.5", 2.5)
    ours, theirs = row("lit-prune", "BR"), row("published", "BR")
    what = "BR, 0.5: the published loop's seconds of an epoch over ours"
    yield Target(what, compared(theirs, ours, epoch), 1.25, True, marks(ours, theirs))
    what = "BR, 0.5: rate of an epoch's matrix products over that of a large one"
    yield Target(what, [1 / over for over in alone(dense, ours, "BR")], 0.75, True, marks(ours))
    yield smaller("published", "BR", "0.5", 1.0)
    ours = row("lit-prune", "Wanda")
    what = "Wanda, 0.5: prune seconds over its two forward passes at the rate of a large matrix product"
    yield Target(what, alone(dense, ours, "Wanda"), 1.3, False, marks(ours))
    for (method, sparsity), tools in ROWS.items():
        if method != "Magnitude":  # whose only peer saves a dense model
            peers = {peer: row(peer, method, sparsity) for peer in tools if peer not in OURS}
            for tool in OURS:
                if tool in tools:
                    yield never_worse(named(tool, method, sparsity), peers, row(tool, method, sparsity))


def alone(dense: Figures | None, ours: Drawn, method: str) -> list[float]:
    """By draw, how many times what the matrix products alone would take."""
    over: Value | None = theory(dense, "lit-prune", method)
    return [over(figures) for figures in ours.values()] if over else []


def never_worse(row: str, peers: dict[str, Drawn], ours: Drawn) -> Target:
    """Our perplexity over that of the peer it is worst beside; the draws' spread of the peer's is no matter."""

    def beside(peer: str) -> Target:
        ratios, theirs = compared(ours, peers[peer], perplexity), [perplexity(f) for f in peers[peer].values()]
        known = theirs and all(map(math.isfinite, theirs))
        limit = 1 + (max(theirs) - min(theirs)) / median(theirs) if known else 1.0
        return Target(f"{row}: our perplexity over {peer}'s", ratios, limit, False, marks(ours))

    def excess(target: Target) -> float:
        if not target.measured:  # what cannot be compared is the worst, what was not measured no worse than the others
            return math.inf if target.measured is None else -math.inf
        return median(target.measured) - target.limit if all(map(math.isfinite, target.measured)) else math.inf

    return max(map(beside, peers), key=excess)


def quality(dense: Figures | None, found: Found, size: tuple[int, int]) -> Iterator[Target]:
    """Our recipe beside llmcompressor's SparseGPT."""
    for sparsity in SPARSITIES:
        theirs, ours = best(found, sparsity, size)
        what = f"recipe, {sparsity}: our log perplexity above dense over that of llmcompressor's SparseGPT"
        yield Target(what, compared(ours, theirs, above(dense)), 0.5, False, marks(ours))


def best(found: Found, sparsity: str, size: tuple[int, int]) -> tuple[Drawn, Drawn]:
    """Figures of llmcompressor's SparseGPT and of our recipe."""
    kind = "row" if ("SparseGPT", sparsity) in ROWS else "quality"
    theirs = drawn(found, Cell(kind, "llmcompressor", "SparseGPT", sparsity, *size))
    return theirs, drawn(found, Cell("quality", "lit-prune", "recipe", sparsity, *size))


def linear(found: Found, over: str) -> Target:
    """The steepest of all stages of all methods; nothing unless all methods have been measured at all sizes."""
    several = [curve for curve in curves(found) if curve.over == over]
    fitted = [(curve, curve.exponents()) for curve in several]
    whole = {curve.method for curve, exponents in fitted if curve.stage == "prune" and exponents} == set(SCALED)
    if not whole:
        return Target(f"exponent of every stage over {over}", [], LINEAR, False)

    def steepness(one: tuple[Curve, list[float]]) -> float:
        return median(one[1]) if one[1] and all(map(math.isfinite, one[1])) else math.inf if one[1] else -math.inf

    curve, exponents = max(fitted, key=steepness)
    what = f"exponent of every stage over {over}; the highest, {curve.method}'s {curve.stage}"
    return Target(what, exponents, LINEAR, False, curve.marks)
