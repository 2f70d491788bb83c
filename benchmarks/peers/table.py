"""The page of all figures, in Markdown."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from statistics import linear_regression, median
from typing import Any

from benchmarks.peers.cells import BLOCKS, LENGTH, ROWS, SAMPLES, SCALED, SPARSITIES, Cell

Found = dict[str, dict[str, Any]]
Figure = Callable[[dict[str, Any]], float]
NOTHING = "not measured"
STAGES = ("statistics", "mask", "reconstruct", "advance")
INTRODUCTION = """# Beside its peers

This page is written by `python -m benchmarks.peers`, which see for how it measures: the same model, the same file of
calibration tokens and the same measurement of perplexity for all, each repetition a process of its own with a draw of
the tokens of its own, the tools in turn. *Published* are plain implementations of the published algorithms and of the
published block-wise training, written by us from the papers for this comparison (`benchmarks/peers/published.py`);
nobody ships them. As in the code that came with the papers, their streams go one sequence at a time, and AdamW is not
fused. Figures are the median of the repetitions, with the least and most.
"""
TERMS = """*Prune* is all between the loaded model and its saving; *process* has the start of Python, all imports,
loading and saving too, and of lit-prune the block files that it resumes from, and its report. Memory is the highest
resident memory of the process and its children. *Times ours* is the median over the draws of the tool's prune seconds,
and of its memory, over lit-prune's. Sparsity is counted in the saved weights of all linear layers in blocks. torchao's
Wanda takes its statistics in one pass of the dense model and compares over the whole matrix: less work than the others
do. llmcompressor's magnitude modifier makes masks for a training, which `oneshot` does not apply: what it saves is
dense.
"""


def page(found: Found, sizes: list[tuple[int, int]], draws: int) -> str:
    """The page.

    Args:
        found: figures by the name of their file.
        sizes: calibration sequences, and tokens in each.
        draws: how many repetitions count.
    """
    parts = [INTRODUCTION, conditions(found), TERMS]
    for size in sizes:
        parts += [f"## {size[0]} sequences of {size[1]} tokens\n", rows(found, size, draws), theory(found, size, draws)]
        parts += ["Perplexity above dense:\n", quality(found, size, draws)]
    parts += ["## Start and installation\n", starts(found, draws), "## How the cost grows\n", growth(found, draws)]
    return "\n".join(parts)


def conditions(found: Found) -> str:
    """Model, machine, versions and dates."""
    dense = found.get("dense")
    if dense is None:
        return f"Model, machine, versions, date: {NOTHING}.\n"
    versions: dict[str, set[str]] = {}
    for figures in found.values():
        for name, version in figures.get("versions", {}).items():
            versions.setdefault(name, set()).add(str(version))
    listed = ", ".join(f"{name} {' and '.join(sorted(several))}" for name, several in sorted(versions.items()))
    dates = sorted({figures["date"] for figures in found.values() if "date" in figures})
    rates = [figures["flops_per_second"] / 1e9 for figures in found.values() if "flops_per_second" in figures]
    here = dense["machine"]
    return (
        f"Model: {dense['model']}, dense perplexity {dense['perplexity']:.2f}. Machine: {here['cpu']}, "
        f"{here['threads']} threads; a large matrix product in float32 ran at {spread(rates, 0)} GFLOP/s. "
        f"Versions: {listed or NOTHING}. Date: {' to '.join(dict.fromkeys([*dates[:1], *dates[-1:]])) or NOTHING}.\n"
    )


def drawn(found: Found, cell: Cell, draws: int) -> dict[int, dict[str, Any]]:
    """A cell's figures by draw."""
    names = {draw: f"{cell.name}-{draw}" for draw in range(draws)}
    return {draw: found[name] for draw, name in names.items() if name in found}


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Median, least and most."""
    values = list(values)
    if not values:
        return NOTHING
    middle = f"{median(values):.{digits}f}"
    return f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else middle


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    written = [f"| {' | '.join(line)} |" for line in (head, *lines)]
    return "\n".join([written[0], "|---" * len(head) + "|", *written[1:]]) + "\n"


def rows(found: Found, size: tuple[int, int], draws: int) -> str:
    """Every method by every tool."""
    head = ["method", "tool", "process, s", "prune, s", "of it, medians, s", "memory, GB", "perplexity", "sparsity"]
    lines = []
    for (method, sparsity), tools in ROWS.items():
        ours = drawn(found, Cell("row", "lit-prune", method, sparsity, *size), draws)
        for tool in tools:
            theirs = drawn(found, Cell("row", tool, method, sparsity, *size), draws)
            several = theirs.values()
            lines.append(
                [
                    f"{method}, {sparsity}",
                    tool,
                    spread(figures["seconds"]["process"] for figures in several),
                    spread(figures["seconds"]["prune"] for figures in several),
                    stages(several),
                    spread((figures["peak_memory_bytes"] / 1e9 for figures in several), 2),
                    spread((figures["perplexity"] for figures in several), 2),
                    spread((figures["sparsity"] for figures in several), 4),
                    ratio(theirs, ours, lambda figures: figures["seconds"]["prune"]),
                    ratio(theirs, ours, lambda figures: figures["peak_memory_bytes"]),
                ]
            )
    return table([*head, "seconds, times ours", "memory, times ours"], lines)


def stages(several: Iterable[dict[str, Any]]) -> str:
    """The median seconds of each stage inside the pruning, as far as the tool tells them."""
    several = list(several)
    known = [stage for stage in STAGES if several and all(stage in figures["seconds"] for figures in several)]
    return ", ".join(f"{stage} {median(f['seconds'][stage] for f in several):.1f}" for stage in known) or "-"


def ratio(theirs: dict[int, dict[str, Any]], ours: dict[int, dict[str, Any]], figure: Figure) -> str:
    """Of the draws that both have; a tool that has not pruned as much is not compared."""
    both = [(theirs[draw], ours[draw]) for draw in theirs if draw in ours]
    if any(abs(one["sparsity"] - other["sparsity"]) > 0.01 for one, other in both):
        return "another sparsity"
    return spread((figure(one) / figure(other) for one, other in both), 2)


def theory(found: Found, size: tuple[int, int], draws: int) -> str:
    """What the matrix products of the blocks' linear layers alone would take, at the rate measured beside them."""
    if "dense" not in found:
        return ""
    forward = 2.0 * found["dense"]["block_weights"] * size[0] * size[1]
    lines = []
    for tools, method, passes, what in (
        (ROWS["Wanda", "0.5"], "Wanda", 2, "prune, over its two forward passes (torchao: one)"),
        (ROWS["BR", "0.5"], "BR", 3, "an epoch of training, over three"),
        (ROWS["BR+GP", "0.5"], "BR+GP", 3, "an epoch of training, over three"),
    ):
        for tool in tools:
            taken, least = [], []
            for figures in drawn(found, Cell("row", tool, method, "0.5", *size), draws).values():
                seconds = figures["seconds"]
                taken.append(seconds["prune"] if passes == 2 else seconds["reconstruct"] / figures["asked"]["epochs"])
                least.append((passes - (tool == "torchao")) * forward / figures["flops_per_second"])
            over = [one / other for one, other in zip(taken, least, strict=True)]
            lines.append([f"{method}: {what}", tool, spread(taken), spread(least), spread(over, 2)])
    head = ["", "tool", "seconds", "of matrix products alone, s", "times"]
    return table(head, lines)


def quality(found: Found, size: tuple[int, int], draws: int) -> str:
    """Log perplexity above dense of our recipe and of llmcompressor's SparseGPT."""
    lines = []
    recipes = set()
    for sparsity in SPARSITIES:
        kind = "row" if ("SparseGPT", sparsity) in ROWS else "quality"
        theirs = drawn(found, Cell(kind, "llmcompressor", "SparseGPT", sparsity, *size), draws)
        ours = drawn(found, Cell("quality", "lit-prune", "recipe", sparsity, *size), draws)
        recipes |= {" ".join(figures["asked"]["recipe"]) for figures in ours.values()}
        above: list[str] = []
        dense = found["dense"]["perplexity"] if "dense" in found else math.nan

        def loss(figures: dict[str, Any], dense: float = dense) -> float:
            return math.log(figures["perplexity"] / dense)

        for several in (theirs, ours):
            above += [spread((f["perplexity"] for f in several.values()), 2), spread(map(loss, several.values()), 3)]
        lines.append([sparsity, *above, ratio(ours, theirs, loss)])
    head = ["sparsity", "llmcompressor, SparseGPT", "log above dense", "lit-prune, recipe", "log above dense", "ratio"]
    said = "".join(f"The recipe: `{recipe}`.\n" for recipe in sorted(recipes))
    return table(head, lines) + "\n" + said


def starts(found: Found, draws: int) -> str:
    """Seconds to start, bytes installed."""
    lines = []
    for tool, what in (
        ("llmcompressor", "`from llmcompressor import oneshot`"),
        ("torchao", "`from torchao.sparsity import WandaSparsifier`"),
        ("lit-prune", "`lit-prune fit --help`"),
    ):
        several = drawn(found, Cell("start", tool), draws).values()
        sizes = spread((figures["installed_bytes"] / 1e6 for figures in several), 0)
        lines.append([tool, what, spread((figures["seconds"]["process"] for figures in several), 2), sizes])
    return table(["tool", "what starts", "seconds", "installed, MB"], lines)


def growth(found: Found, draws: int) -> str:
    """Seconds of every stage of lit-prune at four sizes each, and the exponent fitted to them."""
    lines = []
    for method in SCALED:
        scaled = partial(Cell, "scale", "lit-prune", method, "0.5", length=LENGTH)
        series = {
            f"{BLOCKS[0]} to {BLOCKS[-1]} blocks": [(n, scaled(samples=32, blocks=n)) for n in BLOCKS],
            f"{SAMPLES[0]} to {SAMPLES[-1]} sequences": [(n, scaled(samples=n, blocks=6)) for n in SAMPLES],
        }
        for what, points in series.items():
            several = [(size, list(drawn(found, cell, draws).values())) for size, cell in points]
            for stage in (*STAGES, "prune", "save"):
                taken = [
                    (size, median(f["seconds"][stage] for f in figures))
                    for size, figures in several
                    if figures and all(stage in f["seconds"] for f in figures)
                ]
                if taken or stage == "prune":
                    shown = ", ".join(f"{seconds:.2f}" for _, seconds in taken) or NOTHING
                    lines.append([method, what, stage, shown, exponent(taken) if len(taken) == len(points) else "-"])
    return table(["method", "over", "stage", "median seconds", "exponent"], lines)


def exponent(points: list[tuple[int, float]]) -> str:
    """Of seconds as a power of the size, by least squares on logarithms."""
    return f"{linear_regression(*zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)).slope:.2f}"
