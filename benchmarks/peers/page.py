"""The page of all figures, in Markdown."""

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peers.cells import OURS, ROWS, SPARSITIES, Cell
from benchmarks.peers.figures import (
    NOTHING,
    Figures,
    Found,
    above,
    began,
    compared,
    drawn,
    epoch,
    marks,
    memory,
    number,
    perplexity,
    seconds,
    spread,
    table,
    theory,
)
from benchmarks.peers.growth import growth
from benchmarks.peers.targets import best, targets
from benchmarks.peers.with_lit_prune import command

ROOT = Path(__file__).parent.parent.parent
GENERATION = ("texts", "max_tokens", "seed", "language", "temperature", "top_k", "top_p")
"""What is shown of how self-generated text was made."""
STAGES = ("load", "statistics", "mask", "reconstruct", "advance", "save")
INTRODUCTION = """# Beside its peers

This page is written by `python -m benchmarks.peers`, which see for how it measures: the same model, the same file of
calibration tokens and the same measurement of perplexity for all, each repetition a process of its own with a draw of
the tokens of its own, the tools in turn, and another one first in every draw. All compute with the same number of
threads. Figures are the median of the repetitions, with the least and most.
"""
TERMS = """*Published* are plain implementations of the published algorithms and of the published block-wise training,
written by us from the papers for this comparison (`benchmarks/peers/published.py`); nobody ships them. Sequences go
through the model four at a time to take statistics, with every tool (llmcompressor's `batch_size` is 1 unless told
otherwise), but one at a time in the published BR and BR+GP, as in the code that came with their paper (Shin et al.,
arXiv 2406.15524); their AdamW is not fused. Training is in batches of 8, theirs and lit-prune's.

*Process* is the whole command, with the start of Python, all imports, loading and saving, and of lit-prune the report.
*Prune* is all between the loaded model and its saving, which is not quite the same for all: lit-prune's checks count as
loading, and the file of each block, from which a stopped run goes on, as saving; llmcompressor traces the model while
it prunes. *Epoch* is a pass of the training over all sequences, in all blocks. *Over products* is how many times what
the matrix products of the blocks' linear layers alone take at the rate of a large product measured beside them: of
Wanda its prune seconds, over its two forward passes (torchao and true sequential: one); of BR and BR+GP an epoch, over
three. Memory is the highest resident memory of the process and its children. *Times ours* is the tool's figure over
that of lit-prune's default of the same draw; of perplexity it is the default's over the tool's. Sparsity is counted in
the saved weights of all linear layers in blocks.

What differs: *true sequential* is lit-prune with `--model.true_sequential=true`, which prunes each layer when the
hidden states come to it through the pruned layers before it in its block: one pass a block instead of two, for more
memory; that pass counts as statistics. llmcompressor forces eager attention while it calibrates. torchao's Wanda takes
its statistics in one pass of the dense model and compares over the whole matrix, which is less work than the others do;
and its score is not Wanda's, since its observer sums squares and takes no root, so that it is |W| times the squared
norm of the input. The published ADMM chooses over the whole matrix, lit-prune's in each row, its default.
llmcompressor's magnitude modifier makes masks for a training, which `oneshot` does not apply: what it saves is dense,
and it was run once, since it reads no tokens.

† The code of a tool changed between the draws, or was not committed. ‡ Cells of one draw began more than 6 hours apart.
"""
COMMAND = """lit-prune's command, of BR+GP as an example:

```text
{command}
```

It is given the file of tokens in place of those it would draw from the text. No defaults are
`--evaluation.errors=false`, `--evaluation.references=false`, `--evaluation.texts=[]` and
`--data.validation_samples=0`: without them it would measure the error of every block, the dense and the masked model,
and the error on held-out sequences, as no peer does. `--model.offload=true` is none either: a block stays on disk until
its turn, which takes less memory and is faster.
"""

TARGETS = """Of the ratios by draw the median, with the least and most, counts. Perplexity may be above a peer's by what
the draws change the peer's, from least to most; of several peers that one is shown beside which lit-prune is worst. A
stage is taken for linear if its exponent is at most 1.1.
"""
RECIPE = """Log perplexity above dense beside that of llmcompressor's SparseGPT, whose figures at 0.5 and 2:4 are those
of its rows above.
"""
GROWTH = """Seconds of lit-prune on the model cut to its first blocks, with 32 sequences, and on 6 blocks with more and
more sequences: their number grows, their length stays 256 tokens. The exponent is fitted to all four sizes, and to the
two largest alone, draw by draw.
"""


def page(dense: Figures | None, found: Found, asked: Iterable[tuple[int, int]]) -> str:
    """The page.

    Args:
        dense: figures of the dense model; None if it was not measured.
        found: figures by cell.
        asked: calibration sequences, and tokens in each, that are shown whether measured or not.
    """
    asked = list(asked)
    kinds = "row", "quality"
    sizes = {kind: {(cell.samples, cell.length) for cell in found if cell.kind == kind} for kind in kinds}
    shown = sorted({*asked, *sizes["row"]})
    recipes = sorted(sizes["quality"]) or asked[:1]
    parts = [INTRODUCTION, conditions(dense, found), "## All methods\n", rows(dense, found, shown), TERMS, ours()]
    parts += ["## Targets\n", TARGETS, targets(dense, found, shown, recipes)]
    parts += ["## The recipe\n", RECIPE, quality(dense, found, recipes)]
    parts += ["## Start and installation\n", starts(found)]
    return "\n".join([*parts, "## How the cost grows\n", GROWTH, growth(found)])


def ours() -> str:
    """How lit-prune was run."""
    job = {"method": "BR+GP", "sparsity": "0.5", "epochs": 1, "samples": 32, "length": 256}
    verb, *settings = command(job | {"model": "MODEL", "run": "RUN"})
    words = [f"lit-prune {verb}", *(shlex.quote(setting.replace(str(ROOT), ".")) for setting in settings)]
    return COMMAND.format(command=" \\\n  ".join(words))


def conditions(dense: Figures | None, found: Found) -> str:
    """Model, machines, versions, commits and dates."""
    if dense is None or not found:
        return f"Model, machine, versions, date: {NOTHING}.\n"
    versions: dict[str, set[str]] = {}
    machines: dict[str, Found] = {}
    for cell, figures in found.items():
        for name, version in figures.get("versions", {}).items():
            versions.setdefault(name, set()).add(str(version))
        if cell.tool in OURS:
            versions.setdefault("lit-prune's commit", set()).add(str(figures["commit"] or "not known"))
        here = figures["machine"]
        machines.setdefault(f"{here['cpu']}, {here['threads']} threads", {})[cell] = figures
    listed = ", ".join(f"{name} {' and '.join(sorted(several))}" for name, several in sorted(versions.items()))
    lines = [f"Model: {dense['model']}, dense perplexity {spread([perplexity(dense)], 2)}. Versions: {listed}.\n"]
    *others, most = sorted(machines, key=lambda machine: (len(machines[machine]), machine))
    for machine in (*others, most):
        cells = machines[machine]
        times = sorted(map(began, cells.values()))
        rates = [number(f["flops_per_second"]) / 1e9 for f in cells.values() if "flops_per_second" in f]
        series = "all else" if machine == most else "; ".join(sorted({cell.series for cell in cells}))
        lines.append(
            f"Machine{f' of {series}' if others else ''}: {machine}; a large matrix product in float32 ran "
            f"at {spread(rates, 0)} GFLOP/s. "
            f"Measured from {times[0]:%Y-%m-%d %H:%M} to {times[-1]:%Y-%m-%d %H:%M} UTC.\n"
        )
    return "\n".join(lines)


def rows(dense: Figures | None, found: Found, sizes: list[tuple[int, int]]) -> str:
    """Every method by every tool at every size."""
    head = ["tokens", "method", "tool", "draws", "process, s", "prune, s", "stages, medians, s", "epoch, s"]
    head += ["over products", "memory, GB", "perplexity", "sparsity"]
    head += [f"{what}, times ours" for what in ("process", "prune", "epoch", "memory")] + ["our perplexity, times its"]
    return table(head, (line for size in sizes for line in lines(dense, found, size)))


def lines(dense: Figures | None, found: Found, size: tuple[int, int]) -> Iterator[list[str]]:
    """Those of one size."""
    for (method, sparsity), tools in ROWS.items():
        ours = drawn(found, Cell("row", "lit-prune", method, sparsity, *size))
        for tool in tools:
            theirs = drawn(found, Cell("row", tool, method, sparsity, *size))
            several, trained, over = theirs.values(), method.startswith("BR"), theory(dense, tool, method)
            yield [
                f"{size[0]} x {size[1]}",
                f"{method}, {sparsity}",
                f"{tool} {marks(ours, theirs)}".strip(),
                str(len(several)),
                spread(map(seconds("process"), several)),
                spread(map(seconds("prune"), several)),
                stages(several),
                spread(map(epoch, several)) if trained else "-",
                spread(map(over, several), 2) if over else "-",
                spread((memory(figures) / 1e9 for figures in several), 2),
                spread(map(perplexity, several), 2),
                spread((number(figures["sparsity"]) for figures in several), 4),
                spread(compared(theirs, ours, seconds("process")), 2),
                spread(compared(theirs, ours, seconds("prune")), 2),
                spread(compared(theirs, ours, epoch), 2) if trained else "-",
                spread(compared(theirs, ours, memory), 2),
                spread(compared(ours, theirs, perplexity), 4),
            ]


def stages(several: Iterable[Figures]) -> str:
    """The median seconds of each stage, as far as the tool tells them."""
    several = list(several)
    known = [stage for stage in STAGES if several and all(stage in figures["seconds"] for figures in several)]
    return ", ".join(f"{stage} {spread([median(map(seconds(stage), several))])}" for stage in known) or "-"


def quality(dense: Figures | None, found: Found, sizes: list[tuple[int, int]]) -> str:
    """Log perplexity above dense of our recipe and of llmcompressor's SparseGPT, and what they take."""
    shown, recipes, loss = [], set(), above(dense)
    for size in sizes:
        for sparsity in SPARSITIES:
            theirs, ours = best(found, sparsity, size)
            recipes |= {recipe(figures["asked"]) for figures in ours.values()}
            for what, several in (("llmcompressor, SparseGPT", theirs), ("lit-prune, recipe", ours)):
                shown.append(
                    [
                        f"{size[0]} x {size[1]}",
                        sparsity,
                        f"{what} {marks(several)}".strip(),
                        str(len(several)),
                        spread(map(seconds("process"), several.values())),
                        spread(map(seconds("prune"), several.values())),
                        spread((memory(figures) / 1e9 for figures in several.values()), 2),
                        spread(map(perplexity, several.values()), 2),
                        spread(map(loss, several.values()), 3),
                        spread(compared(several, theirs, loss), 2) if several is ours else "-",
                    ]
                )
    head = ["tokens", "sparsity", "tool", "draws", "process, s", "prune, s", "memory, GB", "perplexity"]
    said = "".join(f"\nThe recipe: {words}.\n" for words in sorted(recipes))
    return table([*head, "log above dense", "log above dense, times llmcompressor's"], shown) + said


def recipe(asked: dict[str, Any]) -> str:
    """Its settings, and those by which self-generated text was made that it learns from beside the tokens."""
    words = f"`{shlex.join(asked['recipe'])}`"
    if "generated" in asked:
        made = asked["generated"]
        made = " ".join(f"--{name} {made[name]}" for name in GENERATION if made.get(name) is not None)
        words += f", with text that had been written by `lit-prune generate {made}` with the dense model"
    return words


def starts(found: Found) -> str:
    """Seconds to start, bytes installed."""
    shown = []
    for tool, what in (
        ("llmcompressor", "`from llmcompressor import oneshot`"),
        ("torchao", "`from torchao.sparsity import WandaSparsifier`"),
        ("lit-prune", "`lit-prune fit --help`"),
    ):
        several = drawn(found, Cell("start", tool)).values()
        sizes = spread((number(figures["installed_bytes"]) / 1e6 for figures in several), 0)
        shown.append([tool, what, str(len(several)), spread(map(seconds("process"), several), 2), sizes])
    return table(["tool", "what starts", "draws", "seconds", "installed, MB"], shown)
