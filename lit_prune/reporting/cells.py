"""A figure as a table shows it, and what it was measured on."""

import math
from dataclasses import dataclass, field

from lit_prune.reporting import wording

SAME_DENSE = 1e-3
"""Two dense models' perplexities that differ by a smaller share are the same model's on the same text."""


@dataclass(frozen=True)
class Basis:
    """How a figure was measured and on what; only figures of the same basis are compared.

    Attributes:
        words: the convention, in a sentence without an end.
        origin: the model, or text, or whatever else has to be the same.
        dense: what the dense model had, if that was measured; it tells more surely than names what is the same.
        tokens: a digest of the text's windows, if that was kept; what differs in it is another text, whatever it
            is called.
        model: the dense model that was measured, for its row.
    """

    words: str
    origin: str = ""
    dense: float | None = None
    tokens: str = ""
    model: str = field(default="", compare=False)

    def same(self, other: "Basis") -> bool:
        """Whether figures of both can be compared."""
        if self.words != other.words or (self.tokens and other.tokens and self.tokens != other.tokens):
            return False
        if self.dense is not None and other.dense is not None:
            return math.isclose(self.dense, other.dense, rel_tol=SAME_DENSE)
        return self.origin == other.origin

    def __str__(self) -> str:
        facts = [] if self.dense is None else [f"dense: {wording.perplexity(self.dense)}"]
        facts += [f"tokens: sha256 {self.tokens}"] if self.tokens else []
        told = f" ({', '.join(facts)})" if facts else ""
        return f"{self.origin}{told}: {self.words}" if self.origin else self.words


@dataclass(frozen=True)
class Cell:
    """A figure in a table.

    Attributes:
        value: the exact figure; None where it was not measured.
        shown: as it is shown.
        basis: how it was measured.
        mark: a letter that tells bases apart; empty where there is one only.
        best: whether no comparable figure in its column is better.
    """

    value: float | None
    shown: str
    basis: Basis | None = None
    mark: str = ""
    best: bool = False

    @property
    def measured(self) -> bool:
        """Whether there is a figure at all."""
        return self.value is not None
