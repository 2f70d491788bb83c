"""What `lit-prune evaluate` found, as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lit_prune.reporting import wording
from lit_prune.reporting.reading import figure, section


def evaluation_table(evaluation: Mapping[str, Any]) -> Table:
    """All figures of an `evaluation.json`, the dense model's beside them where it was measured."""
    perplexity, zero_shot = section(evaluation, "perplexity"), section(evaluation, "zero_shot")
    compared = evaluation["dense"] is not None
    sides = ("dense", "pruned") if compared else ("pruned",)
    table = Table(
        title=Text(wording.short_name(evaluation["model"])),
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for column in ("", *(sides if compared else ("",))):
        table.add_column(column, justify="right" if column or not compared else "left", overflow="fold")
    for text, found in perplexity.items():
        table.add_row(Text(f"perplexity, {text}"), *(wording.perplexity(figure(found, side)) for side in sides))
    for text, found in section(evaluation, "divergence").items():
        table.add_row(Text(f"KL(dense‖pruned), nats, {text}"), "-", wording.number(figure(found, "kl")))
        table.add_row(Text(f"top-1 agreement, {text}"), "-", wording.percent(figure(found, "top1_agreement")))
    for task, found in section(zero_shot, "tasks").items():
        table.add_row(Text(f"{task}, {found['metric']}"), *(_score(section(found, side)) for side in sides))
    if len(section(zero_shot, "tasks")) > 1:
        table.add_row("mean of the tasks", *(_percent(figure(zero_shot, "mean", side)) for side in sides))
    return table


def _score(score: Mapping[str, Any]) -> str:
    value, stderr = figure(score, "value"), figure(score, "stderr")
    return _percent(value) if stderr is None else f"{_percent(value)} ± {100 * stderr:.1f}"


def _percent(value: float | None) -> str:
    return wording.NOT_MEASURED if value is None else f"{100 * value:.1f}%"


def conventions(evaluation: Mapping[str, Any]) -> list[str]:
    """How the figures were measured, in sentences."""
    tasks = section(section(evaluation, "zero_shot"), "tasks")
    said = [f"{text}: {found['convention']}." for text, found in section(evaluation, "perplexity").items()]
    return said + [f"Tasks: {convention}." for convention in dict.fromkeys(t["convention"] for t in tasks.values())]
