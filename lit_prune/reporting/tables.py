"""Tables of a comparison as Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Iterable, Sequence

from lit_prune.reporting.cells import Cell
from lit_prune.reporting.sheet import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: "\\" + sign for sign in "&%$#_{}"},
    "±": r"$\pm$",
    "×": r"$\times$",
    "²": r"\textsuperscript{2}",
    "−": "$-$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def markdown(tables: Iterable[Table], remarks: Iterable[str]) -> str:
    """One table after the other, the best in bold, letters of conventions in brackets, what holds for all last."""

    def cell(entry: Cell) -> str:
        shown = _markdown(entry.shown) + (f" ({entry.mark})" if entry.mark else "")
        return f"**{shown}**" if entry.best else shown

    parts = []
    for table in tables:
        head = ["run", "method", *(_markdown(column.label) for column in table.columns)]
        lines = [head, ["---", "---", *("---:" for _ in table.columns)]]
        for place, (label, method) in enumerate(table.rows):
            lines.append([_markdown(label), _markdown(method), *(cell(c.cells[place]) for c in table.columns)])
        rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "\n".join(f"- {_markdown(note)}" for note in table.notes)
        parts.append(f"## {table.title}\n\n{rows}\n\n{notes}\n")
    return "\n".join([*parts, *(f"{_markdown(remark)}\n" for remark in remarks)])


def comma_separated(table: Table) -> str:
    """Exact figures, empty where not measured, and beside every column that has conventions one that names them."""
    head: list[str] = ["run", "method"]
    columns: list[Sequence[str]] = [*zip(*table.rows, strict=True)]
    for column in table.columns:
        head.append(column.label)
        columns.append(["" if entry.value is None else repr(entry.value) for entry in column.cells])
        if any(entry.basis for entry in column.cells):
            head.append(f"{column.label}: convention")
            columns.append([str(entry.basis) if entry.basis and entry.measured else "" for entry in column.cells])
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(zip(*columns, strict=True))
    return buffer.getvalue()


def latex(tables: Iterable[Table], remarks: Iterable[str]) -> str:
    r"""`table` environments for the package booktabs, the best in bold; `\input` the file."""

    def cell(entry: Cell) -> str:
        shown = _latex(entry.shown) if entry.measured else "--"
        shown = rf"\textbf{{{shown}}}" if entry.best else shown
        return shown + (rf"\textsuperscript{{{entry.mark}}}" if entry.mark else "")

    parts = ["% \\usepackage{booktabs}\n"]
    for table in tables:
        lines = [" & ".join(["run", "method", *(_latex(c.label) for c in table.columns)]) + r" \\", r"\midrule"]
        for place, (label, method) in enumerate(table.rows):
            cells = [_latex(label), _latex(method), *(cell(c.cells[place]) for c in table.columns)]
            lines.append(" & ".join(cells) + r" \\")
            if place + 1 == table.references:
                lines.append(r"\midrule")
        caption = " ".join(_latex(note) for note in (f"{table.title}.", *table.notes, *remarks))
        parts.append(
            "\\begin{table}\n\\centering\n"
            f"\\begin{{tabular}}{{ll{'r' * len(table.columns)}}}\n\\toprule\n"
            + "\n".join(lines)
            + f"\n\\bottomrule\n\\end{{tabular}}\n\\caption{{{caption}}}\n\\label{{tab:{table.name}}}\n\\end{{table}}\n"
        )
    return "\n".join(parts)


def _markdown(text: str) -> str:
    for sign in "\\|*_`<[":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _latex(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in text)
