"""Plots of one run as matplotlib figures."""

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lit_prune.reporting import wording
from lit_prune.reporting.reading import (
    blocks,
    drawable,
    error_curves,
    layer_sparsities,
    losses,
    spikes,
    trainings,
)
from lit_prune.reporting.style import LIGHT, STEPS, logarithmic, plain, steps, styled

Limits = tuple[float, float]

ROOM_FOR_NUMBERS = 12
"""In a heat map of so many blocks, every share can be written into its cell."""


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
    bar = _colour_bar(figure, axes, ScalarMappable(Normalize(0, last), steps("depth")), "block")
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))


def _name_spikes(axes: Axes, metrics: Mapping[str, Any]) -> None:
    """Write a spike's block beside its point, so that the eye knows it for one block and not for a trend."""
    for spike in spikes(metrics):
        place = (spike.block, spike.error)
        axes.annotate(f"block {spike.block}", place, (6, 1), textcoords="offset points", fontsize="small")


def sparsity_figure(metrics: Mapping[str, Any], limits: Limits | None = None) -> Figure | None:
    """Heat map of the share of zeros in every linear layer of every block; layers without any are grey.

    None where the zeros were not counted layer by layer.

    Args:
        metrics: of the run.
        limits: the shares that the colours reach from and to, so that several runs share a scale; None takes the
            run's own, in steps of 5 %.
    """
    shares = layer_sparsities(metrics)
    if not shares:
        return None
    indices = [block["index"] for block in blocks(metrics)]
    table = np.array([[np.nan if share is None else share for share in row] for row in shares.values()])
    low, high = limits or heat_limits([metrics])
    with styled():
        figure = Figure(figsize=(5.2, 1.2 + 0.34 * len(shares)), layout="constrained")
        axes = figure.subplots()
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        dense = np.where(table == 0, 0.5, np.nan)
        axes.pcolormesh(dense, cmap=ListedColormap([LIGHT["grid"]]), edgecolors="face", linewidth=0.3)
        pruned = np.where(table == 0, np.nan, table)
        mesh = axes.pcolormesh(pruned, cmap=steps("heat"), vmin=low, vmax=high, edgecolors="face", linewidth=0.3)
        if len(indices) <= ROOM_FOR_NUMBERS:
            _write_shares(axes, table, low, high)
        axes.set_yticks(np.arange(len(shares)) + 0.5, [plain(name) for name in shares])
        ticks = MaxNLocator(integer=True).tick_values(0, max(len(indices) - 1, 1))
        marked = [int(place) for place in ticks if 0 <= place < len(indices)]
        axes.set_xticks([place + 0.5 for place in marked], [str(indices[place]) for place in marked])
        axes.invert_yaxis()
        axes.set_xlabel("block")
        bar = _colour_bar(figure, [axes], mesh, "weights that are zero")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def heat_limits(runs: Sequence[Mapping[str, Any]]) -> Limits:
    """The range of all shares of zeros above 0, in steps of 5 %, so that one scale fits several runs."""
    shares = [share for metrics in runs for row in layer_sparsities(metrics).values() for share in row if share]
    low, high = np.floor(20 * min(shares, default=0.0)) / 20, np.ceil(20 * max(shares, default=1.0)) / 20
    return float(low), float(max(high, low + 0.05))


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


def _write_shares(axes: Axes, table: "np.ndarray[Any, Any]", low: float, high: float) -> None:
    """Write every share into its cell, in percent."""
    for (row, column), share in np.ndenumerate(table):
        if np.isnan(share):
            continue
        place = (share - low) / (high - low)
        ink = LIGHT["ink"] if share == 0 else LIGHT["on-dark" if place < 0.5 else "on-light"]
        text = wording.number(100 * share, 3) if 0 < share < 1 else f"{share:.0%}".rstrip("%")
        axes.text(column + 0.5, row + 0.5, text, color=ink, ha="center", va="center", fontsize="small")


def _colour_bar(figure: Figure, axes: list[Axes], colours: ScalarMappable, label: str) -> Colorbar:
    """The key to colours, beside the axes."""
    bar = figure.colorbar(colours, ax=axes, aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")  # else the paper shines through between the steps
    bar.ax.grid(False)
    bar.set_label(label)
    return bar
