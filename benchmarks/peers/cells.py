"""What is measured: one cell for each tool, method, sparsity and set of tokens, once for every draw of the tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

TOOLS = ("llmcompressor", "torchao", "published", "lit-prune")
"""`published` are plain implementations written by us from the papers, see `published.py`."""

ROWS = {
    ("Magnitude", "0.5"): ("llmcompressor", "lit-prune"),
    ("Wanda", "0.5"): TOOLS,
    ("SparseGPT", "0.5"): ("llmcompressor", "published", "lit-prune"),
    ("SparseGPT", "2:4"): ("llmcompressor", "published", "lit-prune"),
    ("ADMM", "0.5"): ("published", "lit-prune"),
    ("BR", "0.5"): ("published", "lit-prune"),
    ("BR+GP", "0.5"): ("published", "lit-prune"),
}
"""Method and sparsity, and who can do it."""

SPARSITIES = ("0.5", "0.6", "0.7", "2:4")
"""At which our recipe is compared with llmcompressor's SparseGPT."""

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
        words = [self.kind, size, cut, self.method, self.sparsity.replace(":", "of"), self.tool]
        return "-".join(filter(None, words))

    @property
    def file(self) -> str:
        """The file of its figures."""
        return f"{self.name}-{self.draw}.json"


def cells(sizes: list[tuple[int, int]], draws: int) -> Iterator[Cell]:
    """All of them; every draw from start to end, so that the tools take turns and the repetitions lie far apart."""
    for samples, length in sizes:
        for draw in range(draws):
            for (method, sparsity), tools in ROWS.items():
                for tool in tools:
                    yield Cell("row", tool, method, sparsity, samples, length, draw)
            for sparsity in SPARSITIES:
                if ("SparseGPT", sparsity) not in ROWS:
                    yield Cell("quality", "llmcompressor", "SparseGPT", sparsity, samples, length, draw)
                yield Cell("quality", "lit-prune", "recipe", sparsity, samples, length, draw)
    for draw in range(draws):
        for tool in ("llmcompressor", "torchao", "lit-prune"):
            yield Cell("start", tool, draw=draw)
        yield from scaling(draw)


def scaling(draw: int) -> Iterator[Cell]:
    """Those that show how the cost grows."""
    for method in SCALED:
        sizes = dict.fromkeys([(blocks, 32) for blocks in BLOCKS] + [(6, samples) for samples in SAMPLES])
        for blocks, samples in sizes:
            yield Cell("scale", "lit-prune", method, "0.5", samples, LENGTH, draw, blocks)
