"""A table of runs on its way: which figures may be compared, and which of those is the best."""

import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from lit_prune.reporting import wording
from lit_prune.reporting.cells import Basis, Cell
from lit_prune.reporting.compared import Compared
from lit_prune.reporting.reading import section

ABSENT = Cell(None, "–")
"""What a run was not asked for, or could not be."""

Key = tuple[str, ...]
"""A column: its label, and what else tells it from others under the same label."""


@dataclass(frozen=True)
class Column:
    """One quantity: its name, and a cell for every row."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Runs in rows, quantities in columns.

    Attributes:
        name: short, for files and anchors.
        title: of the table.
        rows: label and method of every row; the dense models come first.
        references: how many rows are dense models, which no mark of the best concerns.
        columns: the quantities.
        notes: what every figure was measured by.
    """

    name: str
    title: str
    rows: tuple[tuple[str, str], ...]
    references: int
    columns: tuple[Column, ...]
    notes: tuple[str, ...]


class Sheet:
    """Takes figures run by run, and becomes a table.

    Args:
        name: of the table, short.
        title: of the table.
        runs: its rows.
        remarks: sentences below it, after the conventions.
    """

    def __init__(self, name: str, title: str, runs: Sequence[Compared], *remarks: str) -> None:
        self.name, self.title, self.runs, self.remarks = name, title, runs, remarks
        self._columns: dict[Key, dict[str, Cell]] = {}
        self._better: dict[Key, int] = {}
        self._dense: list[tuple[str, dict[Key, Cell]]] = []

    def put(self, run: Compared, key: Key, better: int, cell: Cell, dense: Cell = ABSENT) -> None:
        """Take a figure.

        Args:
            run: whose it is.
            key: its column.
            better: -1 where less is better, 1 where more is, 0 where neither.
            cell: the figure.
            dense: the dense model's; its basis names the model.
        """
        column = self._columns.setdefault(key, {})
        self._better[key] = better
        if cell.measured:
            column[run.label] = cell
        if dense.measured:
            self._put_dense(dense.basis.model if dense.basis else run.checkpoint, key, dense)

    def _put_dense(self, model: str, key: Key, cell: Cell) -> None:
        """Into the model's first row that has room, unless one has the same already."""
        for other, row in self._dense:
            if other == model and _comparable(row.setdefault(key, cell), cell):
                return
        self._dense.append((model, {key: cell}))

    def table(self) -> Table | None:
        """The table, with letters that tell conventions apart and the best marked; None without any figure."""
        columns = {key: found for key, found in self._columns.items() if found}
        bases = self._bases(columns)
        letters = _letters(bases)
        runs = [run for run in self.runs if any(run.label in found for found in columns.values())]
        shares = [share for run, share in zip(self.runs, rivalries(self.runs), strict=True) if run in runs]
        shown = []
        for key, found in columns.items():
            own = [found.get(run.label, ABSENT) for run in runs]
            dense = [row.get(key, Cell(None, "")) for _, row in self._dense]
            cells = [*dense, *_with_best(own, shares, self._better[key])]
            shown.append(Column(key[0], tuple(_lettered(cell, letters.get(key[0], {})) for cell in cells)))
        several = len({run.checkpoint for run in runs} | {model for model, _ in self._dense}) > 1
        rows = [("dense", model if several else "") for model, _ in self._dense]
        rows += [(run.label, wording.method_label(run.metrics)) for run in runs]
        notes = [*_conventions(bases, letters), *self.remarks]
        if not shown:
            return None
        return Table(self.name, self.title, tuple(rows), len(self._dense), tuple(shown), tuple(notes))

    def _bases(self, columns: dict[Key, dict[str, Cell]]) -> dict[str, list[Basis]]:
        """The different bases of every quantity, of which it may have several in one column or in several."""
        bases: dict[str, list[Basis]] = {}
        for (label, *_), cells in columns.items():
            known = bases.setdefault(label, [])
            for cell in cells.values():
                if cell.basis and not any(cell.basis.same(other) for other in known):
                    known.append(cell.basis)
        return bases


def rivalries(runs: Sequence[Compared]) -> list[str]:
    """The share of zeros that each run was asked for, since less is easily better; all alike if no two are."""
    shares = [_share(str(section(run.metrics, "method").get("sparsity"))) for run in runs]
    return shares if max(Counter(shares).values()) > 1 else [""] * len(runs)


def _share(asked: str) -> str:
    kept, colon, group = asked.partition(":")
    return f"{1 - int(kept) / int(group):.6g}" if colon else asked if asked == "None" else f"{float(asked):.6g}"


def _comparable(one: Cell, other: Cell) -> bool:
    return one.basis is not None and other.basis is not None and one.basis.same(other.basis)


def _with_best(cells: Sequence[Cell], shares: Sequence[str], better: int) -> list[Cell]:
    """Mark what no rival betters, where there is a rival; figures that look alike share the mark."""

    def is_best(place: int) -> bool:
        cell = cells[place]
        rivals = [
            other
            for other, share in zip(cells, shares, strict=True)
            if other is not cell and share == shares[place] and other.measured and _comparable(cell, other)
        ]
        values = [other.value for other in rivals if other.value is not None and other.shown != cell.shown]
        return cell.value is not None and bool(rivals) and all(better * (cell.value - v) > 0 for v in values)

    return [replace(cell, best=bool(better) and is_best(place)) for place, cell in enumerate(cells)]


def _letters(bases: dict[str, list[Basis]]) -> dict[str, dict[str, Basis]]:
    """Letters for the bases of the quantities that have several, the same for the same basis throughout."""
    fresh = ("".join(signs) for length in (1, 2) for signs in product(string.ascii_lowercase, repeat=length))
    several = {label: found for label, found in bases.items() if len(found) > 1}
    distinct = dict.fromkeys(basis for found in several.values() for basis in found)
    given = dict(zip(distinct, fresh, strict=False))
    return {label: {given[basis]: basis for basis in found} for label, found in several.items()}


def _lettered(cell: Cell, letters: dict[str, Basis]) -> Cell:
    found = [letter for letter, basis in letters.items() if cell.measured and cell.basis and basis.same(cell.basis)]
    return replace(cell, mark=found[0]) if found else cell


def _conventions(bases: dict[str, list[Basis]], letters: dict[str, dict[str, Basis]]) -> Iterator[str]:
    """The convention of every quantity, said once where several share it."""
    shared: dict[tuple[Basis, ...], list[str]] = {}
    for label, found in bases.items():
        shared.setdefault(tuple(found), []).append(label)
    told: dict[str, Basis] = {}
    for same, labels in shared.items():
        if len(same) == 1:
            yield f"{wording.listing(labels)}: {same[0]}."
        elif same:
            yield f"{wording.listing(labels)}: not all measured alike; compare equal letters only."
            yield from (f"{letter}: {basis}." for letter, basis in letters[labels[0]].items() if letter not in told)
            told |= letters[labels[0]]
