"""How all figures look: their colours in light and dark, their axes, and how they become SVG and PNG."""

import io
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Limits = tuple[float, float]

STEPS = 16
"""How many colours stand for a block's depth, or a share; neighbours may share one, which keeps the theme short."""


def _depth_colours(start: float, stop: float) -> dict[str, str]:
    """Colours from the first block to the last: the part of a colour map that the background sets off."""
    return _steps("depth", "plasma", start, stop)


def _steps(name: str, colour_map: str, start: float, stop: float) -> dict[str, str]:
    places = (start + (stop - start) * step / (STEPS - 1) for step in range(STEPS))
    return {f"{name}-{step}": to_hex(matplotlib.colormaps[colour_map](place)) for step, place in enumerate(places)}


def _hues(*colours: str) -> dict[str, str]:
    """Colours that tell runs apart, for colour-blind eyes too (after Okabe and Ito); markers do so as well."""
    return {f"hue-{number}": colour for number, colour in enumerate(colours)}


_HEAT = _steps("heat", "viridis", 0.0, 1.0) | {"on-dark": "#fefefe", "on-light": "#111111"}
"""Colours of a share, and of what is written on them: the same on any background, and for all eyes."""

LIGHT = {
    "ink": "#24292f",
    "grid": "#d8dee4",
    "before": "#bc4c00",
    "after": "#0a58ca",
    **_hues("#0072b2", "#d55e00", "#00845f", "#b04a86", "#b57f00", "#4a9fd4", "#6b6f76"),
    **_depth_colours(0.0, 0.74),
    **_HEAT,
}
DARK = {
    "ink": "#dfe3e8",
    "grid": "#383e46",
    "before": "#f0924f",
    "after": "#79b0ff",
    **_hues("#4c9bf0", "#ff7f32", "#1fc796", "#e58fc4", "#f2c14e", "#a5e0ff", "#b9bec6"),
    **_depth_colours(0.32, 0.96),
    **_HEAT,
}
"""The plots' colours by name, for a light and for a dark background. Figures are drawn in the light ones."""

_STYLE: Any = {  # matplotlib types its keys as literals, in some versions only
    "figure.facecolor": "none",  # the page shows through
    "axes.facecolor": "none",
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


LONGEST_IN_TWO = 20
"""Signs in the longest name of a run that leaves room for two of them side by side."""


class Look(NamedTuple):
    """How a run is drawn in every figure."""

    color: str
    marker: str
    linestyle: str


HUES = sum(name.startswith("hue-") for name in LIGHT)


def look(position: int) -> Look:
    """The look of the run at a position; no two of the first 28 look the same."""
    again, hue = divmod(position, HUES)
    return Look(LIGHT[f"hue-{hue}"], "os^DvPX"[(hue + again) % HUES], ("-", "--", ":", "-.")[again % 4])


def plain(name: str) -> str:
    """A name from outside as matplotlib shows it unchanged: no formula in it, and none that a legend leaves out."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


def steps(name: str) -> ListedColormap:
    """The colours of depth or of heat as a colour map."""
    return ListedColormap([LIGHT[f"{name}-{step}"] for step in range(STEPS)])


@contextmanager
def styled() -> Iterator[None]:
    """What is drawn in the body follows the style."""
    with matplotlib.rc_context(_STYLE):
        yield


def logarithmic(axes: Axes) -> None:
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


def _columns(labels: Collection[str]) -> int:
    """Short names stand two in a line."""
    return 2 if len(labels) > 1 and max(map(len, labels)) <= LONGEST_IN_TWO else 1


def legend_height(labels: Collection[str]) -> float:
    """Of a legend of runs, in inches."""
    return 0.24 * -(-len(labels) // _columns(labels))


def place_legend(picture: Figure, keys: Sequence[Any]) -> None:
    """A legend of runs above the plot."""
    picture.legend(handles=keys, loc="outside upper left", ncols=_columns([str(key.get_label()) for key in keys]))


def colour_bar(figure: Figure, axes: list[Axes], colours: ScalarMappable, label: str) -> Colorbar:
    """The key to colours, beside the axes."""
    bar = figure.colorbar(colours, ax=axes, aspect=40, pad=0.02)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")  # else the paper shines through between the steps
    bar.ax.grid(False)
    bar.set_label(label)
    return bar


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an `<svg>` element for an HTML page that defines the colours as CSS variables.

    Its layout, which takes as long as drawing it, is settled by this.

    Args:
        figure: a figure of this module.
        name: put before every id, so that several figures can share a page.
        description: what it shows, for readers who cannot see it.
    """
    buffer = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    undated = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with styled():  # once more: ticks are made as late as this
        canvas.print_svg(buffer, metadata=undated)  # `savefig` would draw it twice
    figure.set_layout_engine("none")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # an HTML page knows both namespaces
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for colour, value in LIGHT.items():
        svg = svg.replace(value, f"var(--{colour}, {value})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as NAME.png (200 dots an inch) and NAME.svg, on white paper; the SVG's text is outlines."""
    with matplotlib.rc_context(_STYLE | {"svg.fonttype": "path", "savefig.facecolor": "white"}):
        figure.savefig(folder / f"{name}.png", dpi=200)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def raster(figure: Figure) -> "np.ndarray[Any, Any]":
    """A figure as pixels on white paper, uint8, shape (height, width, 3)."""
    canvas: Any = FigureCanvasAgg(figure)
    figure.set_dpi(100)  # an SVG's are 72
    figure.set_facecolor("white")
    with styled():
        canvas.draw()
    figure.set_facecolor("none")
    return np.asarray(canvas.buffer_rgba())[..., :3]
