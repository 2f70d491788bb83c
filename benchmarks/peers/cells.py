"""What is measured: one cell for each tool, method, sparsity and set of tokens, once for every draw of the tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

Item = TypeVar("Item")

SEQUENTIAL = "lit-prune, true sequential"
"""With `model.true_sequential`: one pass a block, where llmcompressor and the default make two."""

OURS = ("lit-prune", SEQUENTIAL)
TOOLS = ("llmcompressor", "torchao", "published", *OURS)
"""`published` are plain implementations written by us from the papers, see `published.py`."""

ROWS = {
    ("Magnitude", "0.5"): ("llmcompressor", "lit-prune"),
    ("Wanda", "0.5"): TOOLS,
    ("SparseGPT", "0.5"): ("llmcompressor", "published", *OURS),
    ("SparseGPT", "2:4"): ("llmcompressor", "published", *OURS),
    ("ADMM", "0.5"): ("published", "lit-prune"),
    ("BR", "0.5"): ("published", "lit-prune"),
    ("BR+GP", "0.5"): ("published", "lit-prune"),
}
"""Method and sparsity, and who can do it."""

ONCE = ("llmcompressor", "Magnitude")
"""Tool and method that no draw changes: it reads no tokens, and what it saves is dense."""

SPARSITIES = ("0.5", "0.6", "0.7", "2:4")
"""At which our recipe is compared with llmcompressor's SparseGPT, at the first size."""

SCALED = ("Wanda", "SparseGPT", "ADMM", "BR+GP")
BLOCKS, SAMPLES, LENGTH = (3, 6, 12, 24), (16, 32, 64, 128), 256
"""A factor of 8 in blocks, with 32 sequences, and in sequences, with 6 blocks."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        kind: `row`, `quality`, `scale` or `start`.
        tool: who does it.
        method: a mask, a form of reconstruction on Wanda's mask, or `recipe`.
        sparsity: as lit-prune writes it.
        samples: calibration sequences.
        length: tokens in each.
        draw: the seed that the sequences are drawn by; the repetition, too.
        blocks: how many blocks the model is cut to; 0 for none.
    """

    kind: str
    tool: str
    method: str = ""
    sparsity: str = ""
    samples: int = 0
    length: int = 0
    draw: int = 0
    blocks: int = 0

    @property
    def name(self) -> str:
        """Of its file, without the draw; `--only` looks for its texts here."""
        size = f"{self.samples}x{self.length}" if self.samples else ""
        cut = f"{self.blocks}blocks" if self.blocks else ""
        tool = self.tool.replace(", ", "-").replace(" ", "-")
        words = [self.kind, size, cut, self.method, self.sparsity.replace(":", "of"), tool]
        return "-".join(filter(None, words))

    @property
    def series(self) -> str:
        """All that has to be of one machine, in words: what its seconds and memory are compared with."""
        if self.kind == "row":
            return f"{self.method} {self.sparsity} at {self.samples} x {self.length} tokens"
        return {"quality": "the recipe", "scale": "growth", "start": "start"}[self.kind]

    @property
    def comparison(self) -> "Cell":
        """The same for all cells that are compared with one another in one draw."""
        return replace(self, tool="", method="" if self.kind == "quality" else self.method)

    @property
    def file(self) -> str:
        """The file of its figures."""
        return f"{self.name}-{self.draw}.json"


def cells(sizes: list[tuple[int, int]], draws: int) -> Iterator[Cell]:
    """All of them: the first size and what needs no other, then the sizes that take longest.

    Every draw goes from start to end, so that the repetitions lie far apart. Tools take turns, and another begins in
    every draw.
    """
    first, *larger = sizes
    yield from rows(*first, draws)
    for draw in range(draws):
        for tool in turned(("llmcompressor", "torchao", "lit-prune"), draw):
            yield Cell("start", tool, draw=draw)
    for draw in range(draws):
        for sparsity in SPARSITIES:
            peer = [("llmcompressor", "SparseGPT")] if ("SparseGPT", sparsity) not in ROWS else []
            for tool, method in turned((*peer, ("lit-prune", "recipe")), draw):
                yield Cell("quality", tool, method, sparsity, *first, draw)
    for draw in range(draws):
        yield from scaling(draw)
    for size in larger:
        yield from rows(*size, draws)


def rows(samples: int, length: int, draws: int) -> Iterator[Cell]:
    """Every method by every tool at one size."""
    for draw in range(draws):
        for (method, sparsity), tools in ROWS.items():
            for tool in turned(tools, draw):
                if draw == 0 or (tool, method) != ONCE:
                    yield Cell("row", tool, method, sparsity, samples, length, draw)


def turned(order: tuple[Item, ...], draw: int) -> tuple[Item, ...]:
    """The same order, begun one later in every draw."""
    start = draw % len(order)
    return order[start:] + order[:start]


def scaling(draw: int) -> Iterator[Cell]:
    """Those that show how the cost grows."""
    for method in SCALED:
        sizes = dict.fromkeys([(blocks, 32) for blocks in BLOCKS] + [(6, samples) for samples in SAMPLES])
        for blocks, samples in sizes:
            yield Cell("scale", "lit-prune", method, "0.5", samples, LENGTH, draw, blocks)
