"""Plots of a run as matplotlib figures, and as inline SVG in the colours of the page's theme."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from math import isnan
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lit_prune.reporting.reading import blocks, drawable, error_curves, losses, spikes, trainings

DEPTH_STEPS = 16
"""How many colours stand for a block's depth; neighbours may share one, which keeps the theme short."""


def _depth_colours(start: float, stop: float) -> dict[str, str]:
    """Colours from the first block to the last: the part of a colour map that the background sets off."""
    plasma = matplotlib.colormaps["plasma"]
    steps = (start + (stop - start) * step / (DEPTH_STEPS - 1) for step in range(DEPTH_STEPS))
    return {f"depth-{step}": to_hex(plasma(place)) for step, place in enumerate(steps)}


LIGHT = {
    "ink": "#24292f",
    "grid": "#d8dee4",
    "before": "#bc4c00",
    "after": "#0a58ca",
    **_depth_colours(0.0, 0.74),
}
DARK = {
    "ink": "#dfe3e8",
    "grid": "#383e46",
    "before": "#f0924f",
    "after": "#79b0ff",
    **_depth_colours(0.32, 0.96),
}
"""The plots' colours by name, for a light and for a dark background. Figures are drawn in the light ones."""

_STYLE: Any = {  # matplotlib types its keys as literals, in some versions only
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.edgecolor": LIGHT["ink"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": LIGHT["ink"],
    "ytick.color": LIGHT["ink"],
    "font.size": 11.0,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "lit-prune",  # the same metrics give the same page, byte for byte
}


def error_figure(metrics: Mapping[str, Any]) -> Figure | None:
    """Error of every block before and after reconstruction, calibration and held-out; log axis.

    None where no error can be drawn: nothing measured, or exactly 0 throughout.
    """
    curves = [(curve, drawable(curve.errors)) for curve in error_curves(metrics)]
    if all(isnan(error) for _, errors in curves for error in errors):
        return None
    indices = [block["index"] for block in blocks(metrics)]
    several = len({curve.moment for curve, _ in curves}) > 1
    with matplotlib.rc_context(_STYLE):
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
        _logarithmic(axes)
        axes.set_xlabel("block")
        axes.set_ylabel("error (mean squared)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def loss_figure(metrics: Mapping[str, Any]) -> Figure | None:
    """Reconstruction loss of every training over the epochs: training, held-out; log axes, coloured by depth.

    A dot marks the epoch whose weights were kept. None where no loss can be drawn.
    """
    panels = []
    for title, kind, first_epoch in (("training", "train", 1), ("held-out", "held_out", 0)):
        curves = [drawable(losses(training, kind)) for training in trainings(metrics)]
        if any(not isnan(loss) for curve in curves for loss in curve):
            panels.append((title, first_epoch, curves))
    if not panels:
        return None
    last = max(index for training in trainings(metrics) for index in training["blocks"])
    with matplotlib.rc_context(_STYLE):
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
            _logarithmic(axes)
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
    """The colour of a block out of `DEPTH_STEPS`."""
    return round(index * (DEPTH_STEPS - 1) / max(last, 1))


def _depth_bar(figure: Figure, axes: list[Axes], last: int) -> None:
    """The key to the colours of depth."""
    colours = ListedColormap([LIGHT[f"depth-{step}"] for step in range(DEPTH_STEPS)])
    bar = figure.colorbar(ScalarMappable(Normalize(0, last), colours), ax=axes, aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")  # else the paper shines through between the steps
    bar.ax.grid(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar.set_label("block")


def _name_spikes(axes: Axes, metrics: Mapping[str, Any]) -> None:
    """Write a spike's block beside its point, so that the eye knows it for one block and not for a trend."""
    for spike in spikes(metrics):
        place = (spike.block, spike.error)
        axes.annotate(f"block {spike.block}", place, (6, 1), textcoords="offset points", fontsize="small")


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis whose ticks are plain numbers, however much or little it spans."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if high / low < 10:  # powers of ten would label one tick or none
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_minor_locator(NullLocator())
    elif high / low < 200:
        axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axes.yaxis.set_minor_formatter(plain)
    else:
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(plain)


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an `<svg>` element for an HTML page that defines the colours as CSS variables.

    Args:
        figure: a figure of this module.
        name: put before every id, so that several figures can share a page.
        description: what it shows, for readers who cannot see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):  # once more: ticks are made as late as this
        undated = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=undated)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # an HTML page knows both namespaces
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{colour}, {value})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
