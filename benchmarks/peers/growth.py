"""How the seconds of lit-prune's stages grow with the blocks and with the sequences."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import linear_regression, median

from benchmarks.peers.cells import BLOCKS, LENGTH, SAMPLES, SCALED, Cell
from benchmarks.peers.figures import NOTHING, Drawn, Found, drawn, marks, number, spread, table

STAGES = ("load", "statistics", "mask", "reconstruct", "advance", "prune", "save")


@dataclass(frozen=True)
class Curve:
    """The seconds of one stage at several sizes.

    Attributes:
        method: what was done.
        over: what grows, `blocks` or `sequences`.
        stage: of the run.
        points: seconds by draw, by size from least to most.
        marks: see `marks`.
    """

    method: str
    over: str
    stage: str
    points: dict[int, dict[int, float]]
    marks: str

    def exponents(self, largest: int = 0) -> list[float]:
        """Of seconds as a power of the size, one for each draw that has all sizes.

        Args:
            largest: how many sizes count, the largest ones; 0 for all.
        """
        sizes = sorted(self.points)[-largest:]
        whole = set.intersection(*(set(by_draw) for by_draw in self.points.values()))
        return [exponent([(size, self.points[size][draw]) for size in sizes]) for draw in sorted(whole)]


def curves(found: Found) -> Iterator[Curve]:
    """Of every method, over blocks and over sequences, by stage."""
    for method in SCALED:
        scaled = partial(Cell, "scale", "lit-prune", method, "0.5", length=LENGTH)
        over = {
            "blocks": {n: drawn(found, scaled(samples=32, blocks=n)) for n in BLOCKS},
            "sequences": {n: drawn(found, scaled(samples=n, blocks=6)) for n in SAMPLES},
        }
        for what, several in over.items():
            every: Drawn = dict(enumerate(figures for cell in several.values() for figures in cell.values()))
            for stage in STAGES:
                points = {
                    size: {draw: number(f["seconds"][stage]) for draw, f in cell.items() if stage in f["seconds"]}
                    for size, cell in several.items()
                }
                if any(points.values()) or stage == "prune":
                    yield Curve(method, what, stage, points, marks(every))


def growth(found: Found) -> str:
    """The table."""
    lines = []
    for curve in curves(found):
        taken = [spread([median(several.values())], 2) if several else "-" for several in curve.points.values()]
        sizes = f"{min(curve.points)} to {max(curve.points)} {curve.over}"
        slopes = [spread(curve.exponents(largest), 2) for largest in (0, 2)]
        shown = ", ".join(taken) if any(curve.points.values()) else NOTHING
        lines.append([f"{curve.method} {curve.marks}".strip(), sizes, curve.stage, shown, *slopes])
    return table(["method", "over", "stage", "median seconds", "exponent", "between the two largest"], lines)


def exponent(points: list[tuple[int, float]]) -> float:
    """Of seconds as a power of the size, by least squares on logarithms."""
    if not all(seconds > 0 for _, seconds in points):
        return math.nan
    logarithms = ((math.log(size), math.log(seconds)) for size, seconds in points)
    return linear_regression(*zip(*logarithms, strict=True)).slope
