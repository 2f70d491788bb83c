"""Plots of several runs; each run looks the same in all of them."""

from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from lit_prune.reporting.cells import Basis
from lit_prune.reporting.compared import Compared
from lit_prune.reporting.reading import blocks, drawable, figure, section
from lit_prune.reporting.style import LIGHT, Look, logarithmic, look, plain, styled

Looks = Mapping[str, Look]


def looks(runs: Sequence[Compared]) -> Looks:
    """How each run is drawn, by its label."""
    return {run.label: look(place) for place, run in enumerate(runs)}


def errors_figure(runs: Sequence[Compared], drawn: Looks) -> Figure | None:
    """The final error of every block on calibration and on held-out text, one line a run, one logarithmic scale.

    None where no error can be drawn.
    """
    panels = []
    for title, key in (("calibration", "error"), ("held-out", "validation_error")):
        curves = [drawable([figure(block, key, "after") for block in blocks(run.metrics)]) for run in runs]
        if any(not isnan(error) for curve in curves for error in curve):
            panels.append((title, curves))
    if not panels:
        return None
    with styled():
        picture = Figure(figsize=(5.2, 0.9 + 0.24 * len(runs) + 2.5 * len(panels)), layout="constrained")
        rows = picture.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (title, curves) in zip(rows, panels, strict=True):
            axes.set_title(title)
            axes.set_ylabel("error (mean squared)")
            for run, curve in zip(runs, curves, strict=True):
                indices = [block["index"] for block in blocks(run.metrics)]
                axes.plot(indices, curve, markersize=3.5, **drawn[run.label]._asdict())
        for axes in rows:
            logarithmic(axes)
        rows[-1].set_xlabel("block")
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(picture, rows[0], runs, drawn)
    return picture


def perplexity_figure(runs: Sequence[Compared], text: str, basis: Basis, drawn: Looks) -> Figure | None:
    """Perplexity against sparsity, a point a run; a line joins runs that differ in the sparsity asked for alone.

    None where nothing was measured.

    Args:
        runs: those measured on this basis.
        text: the text's name.
        basis: how it was measured; the dense model's perplexity is a dashed line.
        drawn: how runs are drawn.
    """
    points: dict[str, tuple[float, float]] = {}
    for run in runs:
        sparsity = figure(run.metrics, "sparsity")
        found = [value for name, value, other in run.perplexities if name == text and other.same(basis)]
        values = drawable(found)
        if sparsity is not None and values and not isnan(values[0]):
            points[run.label] = (sparsity, values[0])
    if not points:
        return None
    with styled():
        picture = Figure(figsize=(5.2, 3.5 + 0.24 * len(points)), layout="constrained")
        axes = picture.subplots()
        measured = [run for run in runs if run.label in points]
        for series in _series(measured):
            line = sorted(points[run.label] for run in series)
            axes.plot(*zip(*line, strict=True), color=LIGHT["hue-6"], linewidth=0.9, zorder=1)
        for run in measured:
            style = drawn[run.label]
            axes.plot(*points[run.label], color=style.color, marker=style.marker, linestyle="", markersize=7)
        if basis.dense is not None:
            axes.axhline(basis.dense, color=LIGHT["ink"], linestyle="--", linewidth=1)
            axes.annotate("dense", (1, basis.dense), (-2, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", ha="right", fontsize="small")  # fmt: skip
        logarithmic(axes)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        axes.set_xlabel("sparsity of the pruned layers")
        axes.set_ylabel(plain(f"perplexity, {text}"))
        _legend(picture, axes, measured, drawn, line=False)
    return picture


def stages_figure(runs: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Seconds and peak memory of every stage, a bar a run. None where no time was taken.

    Args:
        runs: the metrics by label.
    """
    panels: list[tuple[str, dict[str, Mapping[str, Any]], float]] = [
        ("time (s)", {label: section(metrics, "seconds") for label, metrics in runs.items()}, 1.0)
    ]
    for place in ("host", "device"):
        peaks: dict[str, Mapping[str, Any]] = {label: _peaks(metrics, place) for label, metrics in runs.items()}
        panels.append((f"peak memory, {place} (GB)", peaks, 1e-9))
    panels = [panel for panel in panels if any(v is not None for row in panel[1].values() for v in row.values())]
    if not panels:
        return None
    stages = list(dict.fromkeys(stage for row in panels[0][1].values() for stage in row if stage != "total"))
    width = 0.8 / len(runs)
    with styled():
        size = (5.2, 1.2 + 0.24 * len(runs) * (len(runs) > 1) + 2.0 * len(panels))
        picture = Figure(figsize=size, layout="constrained")
        rows = picture.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axes, (title, values, unit) in zip(rows, panels, strict=True):
            axes.set_title(title)
            axes.grid(axis="x", visible=False)
            for position, label in enumerate(runs):
                heights = [nan if (v := values[label].get(stage)) is None else unit * v for stage in stages]
                middle = np.arange(len(stages)) - 0.4 + width * (position + 0.5)
                axes.bar(middle, heights, width, color=look(position).color, label=plain(label))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        rows[-1].set_xticks(range(len(stages)), stages, rotation=30, ha="right", rotation_mode="anchor")
        if len(runs) > 1:
            picture.legend(*rows[0].get_legend_handles_labels(), loc="outside upper left")
    return picture


def _peaks(metrics: Mapping[str, Any], place: str) -> dict[str, float | None]:
    by_stage = section(section(metrics, "peak_memory_bytes"), "by_stage")
    return {stage: figure(peaks, place) for stage, peaks in by_stage.items()}


def _series(runs: Sequence[Compared]) -> list[list[Compared]]:
    """Runs whose settings differ in the sparsity asked for alone, where there are several."""
    series: dict[str, list[Compared]] = {}
    for run in runs:
        others = {key: value for key, value in run.settings.items() if key != "model.sparsity"}
        series.setdefault(repr(sorted(others.items())), []).append(run)
    return [members for members in series.values() if len(members) > 1]


def _legend(picture: Figure, axes: Axes, runs: Sequence[Compared], drawn: Looks, line: bool = True) -> None:
    """One line a run, above the plot, since names of runs are long."""
    keys = []
    for run in runs:
        style = drawn[run.label] if line else drawn[run.label]._replace(linestyle="")
        keys += axes.plot([], [], label=plain(run.label), **style._asdict())
    picture.legend(handles=keys, loc="outside upper left", ncols=1)
