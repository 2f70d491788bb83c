"""lit-prune beside what its users would take otherwise: seconds, memory, perplexity, start-up and size.

    python -m benchmarks.peers [--sizes 32x256 128x512] [--repeat 3] [--only TEXT ...] [--table | --again]

llmcompressor and torchao run in environments of their own, which are made once in the cache, and plain implementations
of the published algorithms, written by us, beside them. All get the same model and the same file of tokens, a new draw
for every repetition; each repetition is a process of its own, the tools take turns, and what a process saved is
measured by one and the same code. The figures of each are written as soon as it ends, so that the command goes on where
it was stopped, and `docs/peers.md` is written anew from all that are there. `--only` takes cells whose name, such as
row-32x256-Wanda-0.5-lit-prune, holds one of the texts. `--again` measures the chosen cells anew, and with them all
tools of their row; when that was stopped, the same command without it goes on. A method at one sparsity and
size, the recipe, growth and start must each be of one machine; the page says which.

The quality rows' recipe learns from self-generated text beside the tokens, which `--own` gives; make it with
`lit-prune generate --checkpoint MODEL --texts 640 --max_tokens 320`, or name other cells with `--only`.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.layers import rate
from benchmarks.peers import environments
from benchmarks.peers.cells import OURS, TOOLS, Cell, cells
from benchmarks.peers.ground import Ground
from benchmarks.peers.page import page
from benchmarks.peers.process import ended_by_term, worked
from lit_prune.atomic import write_json, write_text
from lit_prune.data.generated_text import GeneratedTexts
from lit_prune.errors import BadInput
from lit_prune.published import cache_folder
from lit_prune.resources import machine

ROOT = Path(__file__).parent.parent.parent
MODULES = "with_llmcompressor", "with_torchao", "published", "with_lit_prune", "with_lit_prune"
WORKERS = dict(zip(TOOLS, MODULES, strict=True))
SOURCES = {"published": ("benchmarks/layers.py",)} | dict.fromkeys(OURS, ("lit_prune", "configs"))
"""What else than its worker says how a tool computes."""

RECIPE = (
    "--model.mask=ADMM --model.reconstruction=block --model.global_propagation=true "
    "--data.batch_size=2 --optimizer.lr=2e-3 --trainer.max_epochs=2 --data.self_generated_samples=480 "
    "--float32_matmul_precision=medium"
)
"""What came nearest in docs/paper/README.md, for twice its epochs."""


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, and write the page after each cell."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml", help="model and texts")
    parser.add_argument("--sizes", nargs="+", default=["32x256", "128x512"], help="sequences x tokens")
    parser.add_argument("--repeat", type=int, choices=range(1, 100), metavar="N", default=3, help="draws, 1 or more")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of cells' names")
    parser.add_argument("--epochs", type=int, default=1, help="of BR and BR+GP")
    parser.add_argument(
        "--recipe", type=shlex.split, default=RECIPE, help="settings of `lit-prune fit`, as --recipe='...'"
    )
    parser.add_argument(
        "--own", type=Path, help="what `lit-prune generate` wrote with this model, if the recipe uses it"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="that every tool computes with")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "peers.md")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--table", action="store_true", help="measure nothing")
    how.add_argument(
        "--again", action="store_true", help="remove the chosen cells, and those they are compared with, first"
    )
    chosen = parser.parse_args(arguments)
    parts = (size.partition("x") for size in chosen.sizes)
    chosen.sizes = [(int(samples), int(length)) for samples, _, length in parts]
    if chosen.table:
        if not write_page(chosen):
            sys.exit(f"--table: '{chosen.results}' has no figures; measure first, or give another --results.")
        return
    asked_for = wanted(chosen)
    recipe: dict[str, Any] = {}
    if any(cell.method == "recipe" for cell in asked_for):
        recipe = {"recipe": chosen.recipe} | generated(chosen)
    torch.set_num_threads(chosen.threads)
    with ended_by_term():
        failed = measure(asked_for, recipe, chosen)
    if failed:
        sys.exit(f"not measured, since they failed: {', '.join(failed)}")


def wanted(chosen: argparse.Namespace) -> list[Cell]:
    """The cells that were asked for; to measure them again, with all that they are compared with."""
    every = list(cells(chosen.sizes, chosen.repeat))
    for text in chosen.only:
        if not any(text in cell.name for cell in every):
            sys.exit(f"--only: no cell's name holds '{text}'; one is '{every[0].name}'.")
    named = [cell for cell in every if any(text in cell.name for text in chosen.only)]
    if not chosen.again:
        return named
    compared = {cell.comparison for cell in named}
    return [cell for cell in every if cell.comparison in compared]


def write_page(chosen: argparse.Namespace) -> bool:
    """Write the page from all figures there are; whether there are any."""
    read = {file.stem: json.loads(file.read_text()) for file in chosen.results.glob("*.json")}
    dense = read.pop("dense", None)
    if not read:
        return False
    found = {Cell(**figures["cell"]): figures for figures in read.values()}
    write_text(chosen.output, page(dense, found, chosen.sizes))
    print(f"written: {chosen.output}", flush=True)
    return True


def measure(asked_for: list[Cell], recipe: dict[str, Any], chosen: argparse.Namespace) -> list[str]:
    """Measure what has no figures yet, with what the recipe is; the files of the cells that failed."""
    digest = hashlib.sha256(chosen.config.read_bytes()).hexdigest()[:12]
    ground = Ground(chosen.config, cache_folder() / "peers" / "ground" / digest)
    here = {"machine": machine(torch.device("cpu")), "config": f"{chosen.config.name} {digest}"}
    figures_of = {file.name: json.loads(file.read_text()) for file in chosen.results.glob("*.json")}
    asked = {
        cell: {"epochs": chosen.epochs if cell.method.startswith("BR") else 0}
        | (recipe if cell.method == "recipe" else {"recipe": []})
        for cell in asked_for
    }
    removed = asked_for if chosen.again else []
    for cell in removed:
        figures_of.pop(cell.file, None)
    left = [cell for cell in asked_for if figures_of.get(cell.file, {}).get("asked") != asked[cell]]
    require_alike(here, figures_of.values(), {cell.series for cell in left}, chosen.results)
    if not (chosen.results / "dense.json").exists():
        model = ground.model()
        dense = {"perplexity": ground.perplexity(model), "block_weights": ground.block_weights()}
        write_json(chosen.results / "dense.json", dense | {"model": model.name} | here)
    for cell in removed:
        (chosen.results / cell.file).unlink(missing_ok=True)
    write_page(chosen)
    failed: list[str] = []
    unusable: dict[str, environments.NotMade] = {}
    for cell in left:
        print(cell.name, f"draw {cell.draw}", flush=True)
        began = datetime.now(UTC).isoformat(timespec="seconds")
        known = {"cell": asdict(cell), "asked": asked[cell], "started": began, "commit": commit(cell.tool)}
        try:
            if cell.tool in unusable:
                raise unusable[cell.tool]
            figures = start(cell) if cell.kind == "start" else run(cell, asked[cell], ground, chosen)
        except Exception as error:  # one tool's failure, which is told, leaves the others' figures to be measured
            if isinstance(error, environments.NotMade):
                unusable[cell.tool] = error
            said = getattr(error, "output", None) or ""
            print(f"FAILED: {type(error).__name__}: {error}\n{said}", flush=True)
            failed.append(cell.file)
            continue
        write_json(chosen.results / cell.file, known | here | figures)
        write_page(chosen)
    return failed


def require_alike(here: dict[str, Any], known: Iterable[dict[str, Any]], series: set[str], results: Path) -> None:
    """See that the figures there are can stand beside what is measured now: on one machine in each of these series.

    Raises:
        SystemExit: some are of another machine, or any of another config.
    """
    for there in known:
        of = Cell(**there["cell"]).series if "cell" in there else None
        for what, ours in here.items():
            if there[what] != ours and (what == "config" or of in series):
                sys.exit(
                    f"--results: the figures{f' of {of}' if of else ''} in '{results}' are of another {what} "
                    f"({there[what]}); choose other cells by --only, or give another folder."
                )


def commit(tool: str) -> str | None:
    """The last one that changed what a tool computes; `-dirty` if that has changed since. None outside a repository."""
    paths = [f"benchmarks/peers/{WORKERS[tool]}.py", *SOURCES.get(tool, ())]
    changed, last = (
        subprocess.run(["git", *verb, "--", *paths], capture_output=True, text=True, cwd=ROOT).stdout.strip()  # noqa: S603, S607
        for verb in (("status", "--porcelain"), ("log", "-1", "--format=%h", "--abbrev=9"))
    )
    return f"{last}{'-dirty' if changed else ''}" or None


def start(cell: Cell) -> dict[str, Any]:
    """How long a tool takes to start, and how large it is installed."""
    seconds, size = environments.started(cell.tool)
    asked = [part.replace(str(ROOT), ".") for part in environments.REQUIRED[cell.tool]]
    return {"seconds": {"process": seconds}, "installed_bytes": size, "requirements": asked}


def generated(chosen: argparse.Namespace) -> dict[str, Any]:
    """How the recipe's self-generated text was made, and how many texts there are; nothing if it takes none."""
    takes = any(word.startswith("--data.self_generated") for word in chosen.recipe)
    if not takes and chosen.own:
        sys.exit("--own: the recipe takes no self-generated text; leave it away, or set data.self_generated_samples.")
    if not takes:
        return {}
    if not chosen.own:
        sys.exit("--own: the recipe needs self-generated text; give what `lit-prune generate` wrote with this model.")
    try:
        texts = GeneratedTexts.read(chosen.own).texts
    except BadInput as error:
        sys.exit(f"--own: {error}")
    return {"generated": {"texts": len(texts)} | texts[0].generated}


def run(cell: Cell, asked: dict[str, Any], ground: Ground, chosen: argparse.Namespace) -> dict[str, Any]:
    """Prune in a process of its own, and measure what it saved.

    Raises:
        Exception: whatever the process, or measuring what it saved, failed with.
    """
    python = environments.python(cell.tool)
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        tokens = ground.tokens(cell.samples, cell.length, cell.draw)
        job = asdict(cell) | {"model": str(ground.model(cell.blocks)), "tokens": str(tokens)} | asked
        job |= {"threads": chosen.threads, "run": str(folder / "run"), "result": str(folder / "result")}
        job |= {"own": str(chosen.own.resolve())} if "generated" in asked else {}
        figures: dict[str, Any] = {"flops_per_second": rate()}
        figures |= worked([python, "-m", f"benchmarks.peers.{WORKERS[cell.tool]}"], job, folder)
        result = Path(job["result"])
        figures["sparsity"] = ground.sparsity(result, cell.blocks)
        figures["perplexity"] = None if cell.kind == "scale" else ground.perplexity(result)
    return figures


if __name__ == "__main__":
    main()
