"""Plots of a run: errors, losses, time and memory. Several runs share the last."""

from collections.abc import Mapping, Sequence
from math import isnan, nan
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lit_prune.reporting import reading
from lit_prune.reporting.heat_map import sparsity_figure
from lit_prune.reporting.reading import blocks, drawable, error_curves, losses, section, spikes, trainings
from lit_prune.reporting.style import (
    LIGHT,
    STEPS,
    Limits,
    colour_bar,
    legend_height,
    logarithmic,
    look,
    place_legend,
    plain,
    steps,
    styled,
)


def error_figure(metrics: Mapping[str, Any]) -> Figure | None:
    """Error of every block before and after reconstruction, calibration and held-out; log axis.

    None where no error can be drawn: nothing measured, or exactly 0 throughout.
    """
    curves = [(curve, drawable(curve.errors)) for curve in error_curves(metrics)]
    if all(isnan(error) for _, errors in curves for error in errors):
        return None
    indices = [block["index"] for block in blocks(metrics)]
    several = len({curve.moment for curve, _ in curves}) > 1
    with styled():
        figure = Figure(figsize=(5.2, 4.0), layout="constrained")
        axes = figure.subplots()
        for curve, errors in curves:
            held_out = curve.text == "held-out"
            axes.plot(
                indices,
                errors,
                color=LIGHT[curve.moment],
                linestyle="--" if held_out else "-",
                marker="x" if held_out else "o",
                markersize=4.5 if held_out else 3.5,
                label=f"{curve.text}, {curve.moment}" if several else curve.text,
            )
        _name_spikes(axes, metrics)
        logarithmic(axes)
        axes.set_xlabel("block")
        axes.set_ylabel("error (mean squared)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def loss_figure(metrics: Mapping[str, Any], limits: Limits | None = None) -> Figure | None:
    """Reconstruction loss of every training over the epochs: training, held-out; log axes, coloured by depth.

    A dot marks the epoch whose weights were kept. None where no loss can be drawn.

    Args:
        metrics: of the run.
        limits: the least and the highest loss that the axes have to hold, so that several runs share a scale.
    """
    panels = []
    for title, kind, first_epoch in (("training", "train", 1), ("held-out", "held_out", 0)):
        curves = [drawable(losses(training, kind)) for training in trainings(metrics)]
        if any(not isnan(loss) for curve in curves for loss in curve):
            panels.append((title, first_epoch, curves))
    if not panels:
        return None
    last = max(index for training in trainings(metrics) for index in training["blocks"])
    with styled():
        figure = Figure(figsize=(5.2, 1.2 + 2.6 * len(panels)), layout="constrained")
        # One scale for both: how much lower the training curves get is what overfitting looks like.
        rows = figure.subplots(len(panels), sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (title, first_epoch, curves) in zip(rows, panels, strict=True):
            axes.set_title(title)
            axes.set_ylabel("loss")
            for training, curve in zip(trainings(metrics), curves, strict=True):
                colour = LIGHT[f"depth-{_depth_step(max(training['blocks']), last)}"]
                _loss_curve(axes, curve, first_epoch, training.get("best_epoch"), colour)
        for axes in rows:
            for loss in limits or ():
                axes.update_datalim([(1.0, loss)], updatex=False)
            axes.autoscale_view()
            logarithmic(axes)
        rows[-1].set_xlabel("epoch")
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        if last > 0:
            _depth_bar(figure, list(rows), last)
    return figure


def _loss_curve(axes: Axes, curve: Sequence[float], first_epoch: int, best_epoch: int | None, colour: str) -> None:
    """The losses of one training, with a dot where its best epoch is; a curve of one point is that dot."""
    kept = [] if best_epoch is None else [best_epoch - first_epoch]
    axes.plot(
        range(first_epoch, first_epoch + len(curve)),
        curve,
        color=colour,
        linewidth=1.1,
        marker="o",
        markersize=3.5,
        markevery=[0] if len(curve) == 1 else [place for place in kept if 0 <= place < len(curve)],
    )


def _depth_step(index: int, last: int) -> int:
    """The colour of a block out of `STEPS`."""
    return round(index * (STEPS - 1) / max(last, 1))


def _depth_bar(figure: Figure, axes: list[Axes], last: int) -> None:
    """The key to the colours of depth."""
    bar = colour_bar(figure, axes, ScalarMappable(Normalize(0, last), steps("depth")), "block")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def _name_spikes(axes: Axes, metrics: Mapping[str, Any]) -> None:
    """Write a spike's block beside its point, so that the eye knows it for one block and not for a trend."""
    for spike in spikes(metrics):
        place = (spike.block, spike.error)
        axes.annotate(f"block {spike.block}", place, (6, 1), textcoords="offset points", fontsize="small")


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
        size = (5.2, 1.2 + (legend_height(runs) if len(runs) > 1 else 0) + 2.0 * len(panels))
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
            place_legend(picture, rows[0].containers)
    return picture


def run_figures(metrics: Mapping[str, Any]) -> dict[str, Figure]:
    """All plots of a run by name, as far as something was measured."""
    figures = {
        "errors": error_figure(metrics),
        "losses": loss_figure(metrics),
        "sparsity": sparsity_figure(metrics),
        "stages": stages_figure({"": metrics}),
    }
    return {name: figure for name, figure in figures.items() if figure}


def loss_limits(runs: Sequence[Mapping[str, Any]]) -> Limits | None:
    """The range of all losses of several runs; None without any."""
    found = [
        loss
        for metrics in runs
        for training in trainings(metrics)
        for kind in ("train", "held_out")
        for loss in drawable(losses(training, kind))
        if not isnan(loss)
    ]
    return (min(found), max(found)) if found else None


def _peaks(metrics: Mapping[str, Any], place: str) -> dict[str, float | None]:
    by_stage = section(section(metrics, "peak_memory_bytes"), "by_stage")
    return {stage: reading.figure(peaks, place) for stage, peaks in by_stage.items()}
