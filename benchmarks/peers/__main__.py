"""lit-prune beside what its users would take otherwise: seconds, memory, perplexity, start-up and size.

    python -m benchmarks.peers [--sizes 32x256 128x512] [--repeat 3] [--only TEXT ...] [--table]

llmcompressor and torchao run in environments of their own, which are made once in the cache, and plain implementations
of the published algorithms, written by us, beside them. All get the same model and the same file of tokens, a new draw
for every repetition; each repetition is a process of its own, the tools take turns, and what a process saved is
measured by one and the same code. The figures of each are written as soon as it ends, so that the command goes on where
it was stopped, and `docs/peers.md` is written anew from all that are there. To measure a cell again, remove its files.
`--only` takes cells whose name, such as row-32x256-Wanda-0.5-lit-prune, holds one of the texts.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.layers import rate
from benchmarks.peers import environments
from benchmarks.peers.cells import TOOLS, Cell, cells
from benchmarks.peers.ground import Ground
from benchmarks.peers.table import page
from lit_prune.atomic import write_json, write_text
from lit_prune.published import cache_folder
from lit_prune.resources import machine

ROOT = Path(__file__).parent.parent.parent
WORKERS = dict(zip(TOOLS, ("with_llmcompressor", "with_torchao", "published", "with_lit_prune"), strict=True))
RECIPE = (
    "--model.mask=ADMM --model.reconstruction=block --model.global_propagation=true "
    "--data.batch_size=2 --optimizer.lr=1e-3 --trainer.max_epochs=3"
)


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, then write the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml", help="model and texts")
    parser.add_argument("--sizes", nargs="+", default=["32x256", "128x512"], help="sequences x tokens")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[""], help="parts of cells' names")
    parser.add_argument("--epochs", type=int, default=1, help="of BR and BR+GP")
    parser.add_argument(
        "--recipe", type=shlex.split, default=RECIPE, help="settings of `lit-prune fit`, as --recipe='...'"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "peers.md")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    chosen = parser.parse_args(arguments)
    sizes = [(int(samples), int(length)) for samples, _, length in (size.partition("x") for size in chosen.sizes)]
    wanted = [c for c in cells(sizes, chosen.repeat) if any(text in c.name for text in chosen.only)]
    failed = [] if chosen.table else measure(wanted, chosen)
    found = {file.stem: json.loads(file.read_text()) for file in sorted(chosen.results.glob("*.json"))}
    write_text(chosen.output, page(found, sizes, chosen.repeat))
    print(f"written: {chosen.output}")
    if failed:
        sys.exit(f"not measured, since they failed: {', '.join(failed)}")


def measure(wanted: list[Cell], chosen: argparse.Namespace) -> list[str]:
    """Measure what has no figures yet; the names of the cells that failed."""
    digest = hashlib.sha256(chosen.config.read_bytes()).hexdigest()[:12]
    ground = Ground(chosen.config, cache_folder() / "peers" / "ground" / digest)
    here = {"machine": machine(torch.device("cpu")), "config": f"{chosen.config.name} {digest}"}
    for earlier in chosen.results.glob("*.json"):
        there = json.loads(earlier.read_text())
        for what, ours in here.items():
            if there[what] != ours:
                sys.exit(f"--results: the figures in '{chosen.results}' are of another {what} ({there[what]}).")
    if not (chosen.results / "dense.json").exists():
        model = ground.model()
        dense = {"perplexity": ground.perplexity(model), "block_weights": ground.block_weights()}
        write_json(chosen.results / "dense.json", dense | {"model": model.name} | here)
    failed = []
    for cell in wanted:
        asked = {"epochs": chosen.epochs if cell.method.startswith("BR") else 0}
        asked |= {"recipe": chosen.recipe if cell.method == "recipe" else []}
        file = chosen.results / cell.file
        if not file.exists() or json.loads(file.read_text())["asked"] != asked:
            print(cell.name, f"draw {cell.draw}", flush=True)
            try:
                figures = start(cell) if cell.kind == "start" else run(cell, asked, ground)
            except (subprocess.CalledProcessError, ValueError) as error:
                print(f"FAILED: {error}\n{getattr(error, 'output', None) or ''}", flush=True)
                failed.append(cell.file)
                continue
            known: dict[str, Any] = {"cell": asdict(cell), "asked": asked, "date": datetime.now(UTC).date().isoformat()}
            write_json(file, known | here | figures)
    return failed


def start(cell: Cell) -> dict[str, Any]:
    """How long a tool takes to start, and how large it is installed."""
    seconds, size = environments.started(cell.tool)
    asked = [part.replace(str(ROOT), ".") for part in environments.REQUIRED[cell.tool]]
    return {"seconds": {"process": seconds}, "installed_bytes": size, "requirements": asked}


def run(cell: Cell, asked: dict[str, Any], ground: Ground) -> dict[str, Any]:
    """Prune in a process of its own, and measure what it saved.

    Raises:
        subprocess.CalledProcessError: the process failed; its output is the end of what it said.
    """
    python = environments.python(cell.tool)
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        folder = Path(name)
        tokens = ground.tokens(cell.samples, cell.length, cell.draw)
        job = asdict(cell) | {"model": str(ground.model(cell.blocks)), "tokens": str(tokens)} | asked
        job |= {"run": str(folder / "run"), "result": str(folder / "result")}
        figures: dict[str, Any] = {"flops_per_second": rate()}
        figures |= worked([python, "-m", f"benchmarks.peers.{WORKERS[cell.tool]}"], job, folder)
        result = Path(job["result"])
        figures["sparsity"] = ground.sparsity(result, cell.blocks)
        figures["perplexity"] = None if cell.kind == "scale" else ground.perplexity(result)
    if cell.tool == "lit-prune":
        git = ["git", "describe", "--always", "--dirty"]
        said = subprocess.run(git, capture_output=True, text=True, cwd=ROOT)  # noqa: S603
        figures["versions"]["commit"] = said.stdout.strip() or None
    return figures


def worked(command: list[str], job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a worker; its figures, with the seconds of the whole process and the memory of its children."""
    job["figures"] = str(folder / "figures.json")
    write_json(folder / "job.json", job)
    log = folder / "log"
    alone = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began, children = time.perf_counter(), 0
    with log.open("w") as said:
        whole = [*command, str(folder / "job.json")]
        process = psutil.Popen(whole, cwd=ROOT, env=alone, stdout=said, stderr=said)
        while process.poll() is None:
            children = max(children, memory_of_children(process))
            time.sleep(0.1)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, whole, log.read_text()[-3000:])
    figures: dict[str, Any] = json.loads(Path(job["figures"]).read_text())
    figures["seconds"]["process"] = seconds
    figures["peak_memory_bytes"] += children
    return figures


def memory_of_children(process: psutil.Process) -> int:
    """Resident bytes of a process's children, but of those just made, which may share all of their parent's."""
    total = 0
    try:
        for child in process.children(recursive=True):
            if time.time() - child.create_time() > 1:
                total += child.memory_info().rss
    except psutil.NoSuchProcess:  # it ended while we looked
        pass
    return total


if __name__ == "__main__":
    main()
