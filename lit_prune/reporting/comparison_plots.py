"""Plots of several runs; each run looks the same in all of them."""

from collections.abc import Mapping, Sequence
from math import isnan

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lit_prune.reporting.cells import Basis
from lit_prune.reporting.compared import Compared
from lit_prune.reporting.reading import blocks, drawable, figure
from lit_prune.reporting.style import LIGHT, Look, legend_height, logarithmic, look, place_legend, plain, styled

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
        picture = Figure(
            figsize=(5.2, 0.9 + legend_height([run.label for run in runs]) + 2.5 * len(panels)), layout="constrained"
        )
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
        picture = Figure(figsize=(5.2, 3.5 + legend_height(points)), layout="constrained")
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
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
        axes.set_xlabel("sparsity of the pruned layers")
        axes.set_ylabel(plain(f"perplexity, {text}"))
        _legend(picture, axes, measured, drawn, line=False)
    return picture


def _series(runs: Sequence[Compared]) -> list[list[Compared]]:
    """Runs whose settings differ in the sparsity asked for alone, where there are several."""
    series: dict[str, list[Compared]] = {}
    for run in runs:
        others = {key: value for key, value in run.settings.items() if key != "model.sparsity"}
        pattern = ":" in str(run.settings.get("model.sparsity"))  # n:m is another kind of sparsity
        series.setdefault(repr([pattern, *sorted(others.items())]), []).append(run)
    return [members for members in series.values() if len(members) > 1]


def _legend(picture: Figure, axes: Axes, runs: Sequence[Compared], drawn: Looks, line: bool = True) -> None:
    """One line a run, above the plot, since names of runs are long."""
    keys = []
    for run in runs:
        style = drawn[run.label] if line else drawn[run.label]._replace(linestyle="")
        keys += axes.plot([], [], label=plain(run.label), **style._asdict())
    place_legend(picture, keys)
