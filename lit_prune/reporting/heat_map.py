"""The sparsity of every layer of a run as a heat map."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lit_prune.reporting import wording
from lit_prune.reporting.reading import blocks, layer_sparsities
from lit_prune.reporting.style import LIGHT, Limits, colour_bar, plain, steps, styled

ROOM_FOR_NUMBERS = 12
"""In a heat map of so many blocks, every share can be written into its cell."""


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
        bar = colour_bar(figure, [axes], mesh, "weights that are zero")
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


def heat_limits(runs: Sequence[Mapping[str, Any]]) -> Limits:
    """The range of all shares of zeros above 0, in steps of 5 %, so that one scale fits several runs."""
    shares = [share for metrics in runs for row in layer_sparsities(metrics).values() for share in row if share]
    low, high = np.floor(20 * min(shares, default=0.0)) / 20, np.ceil(20 * max(shares, default=1.0)) / 20
    return float(low), float(max(high, low + 0.05))


def _write_shares(axes: Axes, table: "np.ndarray[Any, Any]", low: float, high: float) -> None:
    """Write every share into its cell, in percent."""
    for (row, column), share in np.ndenumerate(table):
        if np.isnan(share):
            continue
        place = (share - low) / (high - low)
        ink = LIGHT["ink"] if share == 0 else LIGHT["on-dark" if place < 0.5 else "on-light"]
        text = wording.number(100 * share, 3) if 0 < share < 1 else f"{share:.0%}".rstrip("%")
        axes.text(column + 0.5, row + 0.5, text, color=ink, ha="center", va="center", fontsize="small")
