"""A run's figures, row by row, for its page and for the terminal: the dense model's beside the pruned one's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_prune.reporting import wording
from lit_prune.reporting.cells import Cell
from lit_prune.reporting.reading import blocks, figure, is_reconstructed, section

FOOTNOTE = (
    "* Of the last block when it was just masked, behind blocks already reconstructed; "
    "the masked-only model's own error was not measured."
)


@dataclass(frozen=True)
class Row:
    """One quantity and a cell for every column."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Headline:
    """The headline table.

    Attributes:
        columns: the columns' names.
        rows: the rows, each as long as `columns`.
        footnote: what a star in a cell means; empty without a star.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    footnote: str


NOT_APPLICABLE = Cell(None, "-")


def headline(metrics: Mapping[str, Any]) -> Headline:
    """Perplexity of every text, the last block's error and the sparsity, for every model of the run."""
    reconstructed = is_reconstructed(metrics)
    stages = _sparse_stages(metrics)
    names = {"masked": "masked only", "pruned": "reconstructed" if reconstructed else "weights updated"}
    columns = ("dense", *(names[stage] if len(stages) > 1 else "masked only" for stage in stages))
    rows = _perplexity_rows(metrics, ("dense", *stages))
    rows += [_error_row(metrics, label, key, stages) for label, key in _ERRORS.items()]
    sparsity = figure(metrics, "sparsity")
    achieved = Cell(sparsity, wording.percent(sparsity))
    rows.append(Row("sparsity", (NOT_APPLICABLE, *(achieved for _ in stages))))
    starred = any(cell.shown.endswith("*") for row in rows for cell in row.cells)
    return Headline(columns, tuple(rows), FOOTNOTE if starred else "")


_ERRORS = {"last block's error, calibration": "error", "last block's error, held-out": "validation_error"}


def _sparse_stages(metrics: Mapping[str, Any]) -> tuple[str, ...]:
    """The sparse columns: one where nothing followed the mask, since both would hold the same figures.

    A mask method that also updates weights makes two differing columns without any reconstruction.
    """
    perplexity = section(metrics, "perplexity")
    masked, pruned = perplexity.get("masked"), perplexity.get("pruned")
    same = masked == pruned if masked else not section(metrics, "method").get("updates_weights")
    return ("pruned",) if same and not is_reconstructed(metrics) else ("masked", "pruned")


def _perplexity_rows(metrics: Mapping[str, Any], stages: tuple[str, ...]) -> list[Row]:
    """A row for every text that any model was measured on, in the order of their first mention."""
    measured = section(metrics, "perplexity").values()
    texts = dict.fromkeys(text for figures in measured for text in figures or {})
    if not texts:
        return [Row("perplexity", tuple(Cell(None, wording.NOT_MEASURED) for _ in stages))]
    figures = {text: [figure(metrics, "perplexity", stage, text) for stage in stages] for text in texts}
    return [
        Row(f"perplexity, {text}", _lowest([Cell(value, wording.perplexity(value)) for value in values]))
        for text, values in figures.items()
    ]


def _error_row(metrics: Mapping[str, Any], label: str, key: str, stages: tuple[str, ...]) -> Row:
    """The last block's error; the dense model has none, since it is what the others are measured against."""
    last = blocks(metrics)[-1] if blocks(metrics) else {}
    updated = bool(section(metrics, "method").get("updates_weights"))
    cells = [NOT_APPLICABLE]
    for stage in stages:
        # before its reconstruction, a block is just masked only if the mask method left its weights as they were
        unknown = stage == "masked" and updated
        error = None if unknown else figure(last, key, "before" if stage == "masked" else "after")
        star = "*" if stage == "masked" and error is not None and is_reconstructed(metrics) else ""
        cells.append(Cell(error, wording.number(error) + star))
    return Row(label, _lowest(cells))


def _lowest(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Mark the lowest behind the dense model's cell, where there are several to choose from."""
    values = [cell.value for cell in cells[1:] if cell.value is not None]
    marked = (replace(cell, best=len(values) > 1 and cell.value == min(values)) for cell in cells[1:])
    return (cells[0], *marked)


def evaluated(evaluation: Mapping[str, Any]) -> Headline | None:
    """What `lit-prune evaluate` found, beside the dense model's if that was measured; None where it was not asked."""
    rows = []
    compared = evaluation.get("dense") is not None
    sides = ("dense", "pruned") if compared else ("pruned",)
    for text, found in section(evaluation, "perplexity").items():
        values = [figure(found, side) for side in sides]
        rows.append(Row(f"perplexity, {text}", tuple(Cell(value, wording.perplexity(value)) for value in values)))
    zero_shot = section(evaluation, "zero_shot")
    for task, found in section(zero_shot, "tasks").items():
        results = [section(found, side) for side in sides]
        scores = [(figure(result, "value"), figure(result, "stderr")) for result in results]
        cells = tuple(Cell(value, wording.score(found["metric"], value, stderr)) for value, stderr in scores)
        rows.append(Row(f"{task} ({found['metric']})", cells))
    means = [figure(zero_shot, "mean", side) for side in sides]
    if len(section(zero_shot, "tasks")) > 1 and any(mean is not None for mean in means):
        rows.append(Row("mean accuracy", tuple(Cell(mean, wording.accuracy(mean)) for mean in means)))
    for text, found in section(evaluation, "divergence").items():
        kl, agreement = figure(found, "kl"), figure(found, "top1_agreement")
        rows.append(Row(f"KL from the dense model, {text}", (NOT_APPLICABLE, Cell(kl, wording.number(kl)))))
        rows.append(Row(f"top-1 agreement, {text}", (NOT_APPLICABLE, Cell(agreement, wording.percent(agreement)))))
    return Headline(sides if compared else ("measured",), tuple(rows), "") if rows else None


def conventions(evaluation: Mapping[str, Any]) -> list[str]:
    """How the figures of an evaluation were measured, in sentences."""
    said = []
    for name, key in (("Perplexity", "perplexity"), ("Divergence", "divergence")):
        said += [f"{name}, {text}: {found['convention']}." for text, found in section(evaluation, key).items()]
    if section(evaluation, "divergence"):
        said.append(
            "KL: mean divergence of the next-token distribution from the dense model's, in nats a token; "
            "top-1 agreement: how often both models hold the same token for the likeliest."
        )
    zero_shot = section(evaluation, "zero_shot")
    if zero_shot:
        tasks = zero_shot["tasks"]
        counts = wording.listing([f"{task} {found['samples']}" for task, found in tasks.items()])
        said += [f"Tasks: {convention}." for convention in dict.fromkeys(t["convention"] for t in tasks.values())]
        said.append(f"Behind ± stands a task's standard error. Questions: {counts}.")
    return said
