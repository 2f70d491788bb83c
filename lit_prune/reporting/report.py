"""A run's report: one self-contained HTML page, and a small table for the end of a run on the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lit_prune.reporting import reading, wording
from lit_prune.reporting.cells import Cell
from lit_prune.reporting.headline import Headline, conventions, evaluated, headline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["evaluation_table", "summary_table", "write_report"]


def write_report(
    metrics: Mapping[str, Any],
    config_yaml: str,
    path: Path,
    evaluation: Mapping[str, Any] | None = None,
    figures: "Mapping[str, Figure] | None" = None,
) -> None:
    """Write a run's report as one HTML page that needs no network, no other file and no script.

    Args:
        metrics: the run's figures, as in its `metrics.json`; null or missing means not measured.
        config_yaml: the resolved configuration, shown as it is.
        path: the page; whatever stands there is replaced at once when the new page is complete.
        evaluation: what `lit-prune evaluate` found of the run, as in its `evaluation.json`.
        figures: the run's plots by name, if they are made already.
    """
    # Drawing takes a second to import, which the terminal's table need not wait for.
    from lit_prune.reporting.page import write_page
    from lit_prune.reporting.plots import run_figures

    drawn = run_figures(metrics) if figures is None else figures
    write_page("report.html.jinja", _context(metrics, config_yaml, evaluation or {}, drawn), path)


def summary_table(metrics: Mapping[str, Any]) -> Table:
    """The headline figures, time and peak memory as a table that fits a terminal of 80 columns."""
    figures = headline(metrics)
    title = f"{wording.short_name(metrics.get('checkpoint'))}: {wording.method_in_words(metrics)}"
    return _table(title, figures, "\n".join(filter(None, (_closing_line(metrics), figures.footnote))))


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """What `lit-prune evaluate` found, as a table for a terminal."""
    return _table(wording.short_name(evaluation["model"]), evaluated(evaluation) or Headline(("",), (), ""), None)


def _table(title: str, figures: Headline, caption: str | None) -> Table:
    # Text, not str: names come from outside, and rich would read square brackets in a str as markup.
    table = Table(
        title=Text(title),
        caption=None if caption is None else Text(caption),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("", overflow="fold")
    for column in figures.columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in figures.rows:
        table.add_row(Text(row.label), *(Text(cell.shown) for cell in row.cells))
    return table


def _closing_line(metrics: Mapping[str, Any]) -> str:
    """Time and peak memory in one line."""
    total = wording.duration(reading.figure(metrics, "seconds", "total"))
    memory = ", ".join(f"{place} {cell.shown}" for place, cell in _memory(metrics))
    return f"Time in all: {total}. Peak memory: {memory}."


def _context(
    metrics: Mapping[str, Any], config_yaml: str, evaluation: Mapping[str, Any], figures: "Mapping[str, Figure]"
) -> dict[str, Any]:
    """All that the template shows, in words already."""
    from lit_prune.reporting.page import plot

    described = {
        "errors": "Error of every block, as in the table",
        "losses": "Loss of every training over the epochs",
        "sparsity": "Share of zeros in every layer",
        "stages": "Time and peak memory of every stage",
    }
    return {
        "checkpoint": wording.short_name(metrics.get("checkpoint")),
        "method": wording.method_in_words(metrics),
        "calibration": _calibration(metrics) + _exceptions(metrics),
        "headline": headline(metrics),
        "conventions": reading.section(metrics, "perplexity_convention"),
        "evaluated": evaluated(evaluation),
        "evaluation_conventions": conventions(evaluation),
        "gain": wording.gain(metrics),
        "verdict": wording.overfitting(metrics),
        "reconstructed": reading.is_reconstructed(metrics),
        "plots": {name: plot(figure, name, described[name]) for name, figure in figures.items()},
        "error_plot_notes": _error_notes(metrics),
        "divergence": wording.divergence(metrics),
        "blocks": [_block_row(metrics, block) for block in reading.blocks(metrics)],
        "spikes": {spike.block for spike in reading.spikes(metrics)},
        "stages": [_stage_row(metrics, stage) for stage in reading.section(metrics, "seconds")],
        "machine": wording.machine(reading.section(metrics, "machine")),
        "versions": reading.section(metrics, "versions"),
        "config_yaml": config_yaml,
    }


def _error_notes(metrics: Mapping[str, Any]) -> list[str]:
    """What has to be said about the plot of errors: spikes, and what the logarithmic axis cannot show."""
    notes = [note] if (note := wording.spike_note(metrics)) else []
    if zeros := reading.zero_blocks(metrics):
        which = wording.which_blocks(zeros)
        notes.append(f"An error of exactly 0 ({which}) has no place on a logarithmic axis; see the table.")
    return notes


def _calibration(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run was calibrated on."""
    names = {
        "source": "calibration text",
        "samples": "calibration samples",
        "validation_samples": "held-out samples",
        "sequence_length": "tokens a sample",
        "self_generated": "self-generated text",
        "self_generated_samples": "self-generated samples",
    }
    calibration = reading.section(metrics, "calibration")
    return [
        (name, wording.short_name(calibration[key])) for key, name in names.items() if calibration.get(key) is not None
    ]


def _exceptions(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which layers were left out or pruned otherwise, and what slicing left of the model."""
    method, parameters = reading.section(metrics, "method"), reading.section(metrics, "parameters")
    facts = [("layers left dense", wording.listing(method["skip"]))] if method.get("skip") else []
    if method.get("sparsities"):
        facts.append(("other sparsities", wording.listing([f"{k}: {v}" for k, v in method["sparsities"].items()])))
    dense, saved = parameters.get("dense"), parameters.get("saved")
    if dense and saved and dense != saved:
        facts.append(("parameters", f"{saved:,} of {dense:,}"))
    return facts


def _block_row(metrics: Mapping[str, Any], block: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table of blocks."""
    kinds = [(key, moment) for key in ("error", "validation_error") for moment in ("before", "after")]
    errors = [reading.figure(block, key, moment) for key, moment in kinds]
    sparsity, seconds = (reading.figure(block, key) for key in ("sparsity", "seconds"))
    best = [epoch for epoch in reading.best_epochs(metrics, block["index"]) if epoch is not None]
    return {
        "index": block["index"],
        "cells": [
            Cell(sparsity, wording.percent(sparsity)),
            *(Cell(error, wording.number(error)) for error in errors),
            Cell(
                best[0] if len(best) == 1 else None,
                ", ".join("start" if epoch == 0 else str(epoch) for epoch in best) or wording.NOT_MEASURED,
            ),
            Cell(seconds, wording.NOT_MEASURED if seconds is None else f"{seconds:,.1f}"),
        ],
    }


def _stage_row(metrics: Mapping[str, Any], stage: str) -> tuple[str, list[Cell]]:
    """Time and peak memory of one stage; of the whole, the run's own, which may be known without the stages'."""
    seconds = reading.figure(metrics, "seconds", stage)
    by_stage = reading.section(reading.section(metrics, "peak_memory_bytes"), "by_stage")
    counts = [reading.figure(by_stage, stage, place) for place in ("host", "device")]
    peaks = [cell for _, cell in _memory(metrics)] if stage == "total" else [Cell(c, wording.size(c)) for c in counts]
    return stage, [Cell(seconds, wording.duration(seconds)), *peaks]


def _memory(metrics: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    """Peak memory by place."""
    counts = {place: reading.figure(metrics, "peak_memory_bytes", place) for place in ("host", "device")}
    return [(place, Cell(count, wording.size(count))) for place, count in counts.items()]
