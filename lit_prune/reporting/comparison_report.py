"""What `lit-prune report` writes: the comparison as one page, its tables for papers, its plots as files."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure

from lit_prune.atomic import write_text
from lit_prune.reporting import tables as formats
from lit_prune.reporting import wording
from lit_prune.reporting.cells import Basis
from lit_prune.reporting.compared import Compared, differences, groups
from lit_prune.reporting.comparison import reading_aid, tables
from lit_prune.reporting.comparison_plots import errors_figure, looks, perplexity_figure
from lit_prune.reporting.heat_map import heat_limits, sparsity_figure
from lit_prune.reporting.page import plot, write_page
from lit_prune.reporting.plots import loss_figure, loss_limits, stages_figure
from lit_prune.reporting.reading import section
from lit_prune.reporting.style import save


class Picture(NamedTuple):
    """A figure and what is said below it."""

    section: str
    name: str
    figure: Figure
    caption: str
    title: str = ""


class Shown(NamedTuple):
    """A picture on the page."""

    markup: Markup | None
    caption: str
    title: str


def write_comparison(runs: Sequence[Compared], folder: Path) -> None:
    """Write a comparison into a folder that exists.

    `report.html` is one page that needs nothing else; `tables.md`, `tables.tex` (booktabs) and `NAME.csv` hold its
    tables, and `plots/` its plots as PNG and SVG.

    Args:
        runs: finished runs under names that differ.
        folder: where to write.
    """
    found, remarks = tables(runs), reading_aid(runs)
    write_text(folder / "tables.md", formats.markdown(found, remarks))
    write_text(folder / "tables.tex", formats.latex(found, remarks))
    for table in found:
        write_text(folder / f"{table.name}.csv", formats.comma_separated(table))
    (folder / "plots").mkdir()
    sections: dict[str, list[Shown]] = {}
    for picture in _named_apart(_pictures(runs)):
        save(picture.figure, folder / "plots", picture.name)
        shown = Shown(plot(picture.figure, picture.name, picture.caption), picture.caption, picture.title)
        sections.setdefault(picture.section, []).append(shown)
    context = {
        "title": wording.listing([run.label for run in runs]),
        "checkpoints": list(dict.fromkeys(run.checkpoint for run in runs)),
        "runs": runs,
        "tables": found,
        "remarks": remarks,
        "unevaluated": [run.label for run in runs if not run.evaluation],
        "sections": sections,
        "differences": differences(runs),
    }
    write_page("comparison.html.jinja", context, folder / "report.html")


def _pictures(runs: Sequence[Compared]) -> Iterator[Picture]:
    """All plots; of what was not measured alike, one for each way."""
    drawn = looks(runs)
    for name, basis, members in _numbered("errors", groups(runs, [run.text for run in runs])):
        if figure := errors_figure(members, drawn):
            yield Picture(
                "Error of every block",
                name,
                figure,
                "Error of every block after pruning and reconstruction: the mean over all elements of (dense block on "
                "the dense stream − pruned block on the pruned stream)². One logarithmic scale; how much higher the "
                f"held-out error is than that on the calibration text is overfitting. {basis}.",
            )
    for text in dict.fromkeys(text for run in runs for text, _, _ in run.perplexities):
        measured = [(run, basis) for run in runs for other, _, basis in run.perplexities if other == text]
        alike = groups([run for run, _ in measured], [basis for _, basis in measured])
        for name, basis, members in _numbered(f"perplexity_{_file_name(text)}", alike):
            if len(members) == 1 < len(runs):
                continue  # a point by itself, which the table shows as well
            if figure := perplexity_figure(members, text, basis, drawn):
                yield Picture(
                    "Perplexity against sparsity",
                    name,
                    figure,
                    f"Perplexity, {text}, against the sparsity of all pruned layers; grey lines join runs that differ "
                    f"in the sparsity asked for alone. {basis}.",
                )
    yield from _of_every_run(runs)
    if figure := stages_figure({run.label: run.metrics for run in runs}):
        machines = wording.listing(list(dict.fromkeys(run.machine.words for run in runs)))
        caption = (
            "Seconds by the clock on the wall and highest memory by stage, resident on the host and allocated on the "
            f"device. Measured on {machines}, with whatever else went on there."
        )
        yield Picture("Time and memory by stage", "stages", figure, caption)


def _of_every_run(runs: Sequence[Compared]) -> Iterator[Picture]:
    """Loss curves and sparsities, a plot a run, on one scale for all runs whose figures mean the same."""
    for run in runs:
        loss = section(run.metrics, "method").get("loss")
        alike = [other.metrics for other in runs if section(other.metrics, "method").get("loss") == loss]
        if figure := loss_figure(run.metrics, loss_limits(alike)):
            caption = (
                f"Reconstruction loss ({loss or 'mse'}) of every training over the epochs, on calibration "
                "and on held-out samples; the same logarithmic axis for all runs with this loss. A dot marks the epoch "
                f"whose weights were kept, 0 being the start. {run.text.words}."
            )
            yield Picture("Loss curves", f"losses_{_file_name(run.label)}", figure, caption, run.label)
    limits = heat_limits([run.metrics for run in runs])
    for run in runs:
        if figure := sparsity_figure(run.metrics, limits):
            caption = (
                "Share of weights that are zero, in percent, in every linear layer of every block; grey "
                "layers were left dense. The same colours for all runs."
            )
            yield Picture("Sparsity of every layer", f"sparsity_{_file_name(run.label)}", figure, caption, run.label)


def _numbered(name: str, groups: Sequence[tuple[Basis, list[Compared]]]) -> Iterator[tuple[str, Basis, list[Compared]]]:
    """A name of its own for every group."""
    for number, (basis, members) in enumerate(groups, start=1):
        yield (f"{name}_{number}" if len(groups) > 1 else name), basis, members


def _named_apart(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Numbers behind names that came before, since labels may differ in folded signs or in upper case alone."""
    taken: set[str] = set()
    for picture in pictures:
        names = (f"{picture.name}_{number}" if number > 1 else picture.name for number in count(1))
        name = next(name for name in names if name.casefold() not in taken)
        taken.add(name.casefold())
        yield picture._replace(name=name)


def _file_name(label: str) -> str:
    """A label without what file names and anchors cannot hold."""
    return "".join(sign if sign.isalnum() or sign in "-." else "_" for sign in label)
