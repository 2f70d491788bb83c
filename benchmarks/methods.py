"""Perplexity of every mask method at every sparsity on the quickstart's model, block after block, not reconstructed.

Each cell is written to `benchmarks/methods.json` as soon as it is measured, so that the command goes on where it was
stopped. Cells are measured one by one; `--only` limits them by method or sparsity. Nothing is held out, and the dense
stream is not computed, since no method here needs it.

    python benchmarks/methods.py [--only ADMM ALPS] [--table]
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from quickstart_model import Quickstart, load

from lit_prune.atomic import write_text
from lit_prune.data import propagate
from lit_prune.masks import (
    ADMM,
    ALPS,
    GBLM,
    GradientNorm,
    LayerMask,
    Magnitude,
    MaskMethod,
    MutualInformation,
    NeuronMask,
    Random,
    RegionalGradient,
    SparseGPT,
    Sparsity,
    Wanda,
    solvers,
)
from lit_prune.models import find_neurons, linear_layers, mlp_width
from lit_prune.modules import observe, prune_layers, prune_neurons, regional_gradients, whole_model_gradients

RESULTS = Path(__file__).with_suffix(".json")
METHODS: dict[str, tuple[Callable[[], MaskMethod], Callable[[], solvers.Solver] | None]] = {
    "Random": (Random, None),
    "Magnitude": (Magnitude, None),
    "Magnitude in rows": (partial(Magnitude, "row"), None),
    "Wanda": (Wanda, None),
    "RegionalGradient": (RegionalGradient, None),
    "GBLM": (GBLM, None),
    "SparseGPT": (SparseGPT, None),
    "Wanda + solver ADMM": (Wanda, solvers.ADMM),
    "Wanda + solver ConjugateGradient": (Wanda, solvers.ConjugateGradient),
    "ADMM": (ADMM, None),
    "ALPS": (ALPS, None),
    "MutualInformation": (MutualInformation, None),
}
SPARSITIES = ("0.5", "2:4", "0.7", "0.6", "4:8")
COLUMNS = ("0.5", "0.6", "0.7", "2:4", "4:8")
SHARES_ONLY = ("Magnitude in rows", "MutualInformation")
"""Methods that a pattern n:m does not fit, or which it leaves no different."""
DRAWN_THRICE = (("Wanda", "SparseGPT", "ADMM"), ("0.5", "2:4", "0.7"))
PUBLISHED = {
    "0.5": {"Magnitude": 303.7, "Wanda": 46.3, "SparseGPT": 44.0, "ADMM": 37.7},
    "2:4": {"Wanda": 137.6, "SparseGPT": 88.3, "ADMM": 71.0},
    "0.7": {"SparseGPT": 246.0, "ADMM": 166.0},
}
"""What the authors' own code gives on this model and as many tokens (another draw of them)."""


def main() -> None:
    """Measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="methods or sparsities")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--part", default="1/1", help="1/2 and 2/2: two processes share the work")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    for method, sparsity, draw in [] if arguments.table else cells()[part - 1 :: parts]:
        key = f"{method} {sparsity} {draw}"
        chosen = not arguments.only or method in arguments.only or sparsity in arguments.only
        if chosen and key not in measured():
            figures = measure(method, sparsity, draw)
            write_text(RESULTS, json.dumps(measured() | {key: figures}, indent=1) + "\n")
            print(key, figures, flush=True)
    print(table(measured()))


def measured() -> dict[str, Any]:
    """The cells that are done, by any process."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def cells() -> list[tuple[str, str, int]]:
    """Method, sparsity and draw of all that is to be measured, what matters most first."""
    first = [("dense", "0", 0)] + [(method, sparsity, 0) for sparsity in SPARSITIES for method in METHODS]
    methods, sparsities = DRAWN_THRICE
    again = [(method, sparsity, draw) for draw in (1, 2) for sparsity in sparsities for method in methods]
    wanted = first[: 1 + 2 * len(METHODS)] + again + first[1 + 2 * len(METHODS) :]
    return [cell for cell in wanted if not (cell[0] in SHARES_ONLY and ":" in cell[1])]


def measure(name: str, sparsity: str, draw: int, evaluate: bool = True) -> dict[str, float]:
    """Perplexity of the pruned model if asked for, its sparsity, and the seconds it took to prune."""
    start = load(seed=draw)
    torch.manual_seed(draw)
    began = time.perf_counter()
    zeros = prune(start, name, Sparsity(sparsity)) if name != "dense" else 0.0
    seconds = time.perf_counter() - began
    perplexity = {"perplexity": start.perplexity} if evaluate else {}
    return perplexity | {"sparsity": zeros, "seconds": seconds}


@torch.no_grad()
def prune(start: Quickstart, name: str, sparsity: Sparsity) -> float:
    """Prune all blocks in place; the share of zeros in the layers that were pruned."""
    make_mask, make_solver = METHODS[name]
    mask, solver = make_mask(), make_solver() if make_solver else None
    model, stream = start.model, start.hidden
    of_model: list[dict[str, GradientNorm]] = []
    if isinstance(mask, GBLM):
        of_model = whole_model_gradients(model, start.blocks, start.tokens, mask.p, 4, stream.device)
    zeros = weights = 0
    for index, (block, call) in enumerate(zip(start.blocks, start.calls, strict=True)):
        layers, forward = linear_layers(block), partial(call, block)
        with observe(layers, mask, solver, f"block {index}") as statistics:
            if mask.statistic or solver:
                propagate(forward, stream)
        if mask.gradient:
            of_block = of_model[index] if of_model else regional_gradients(forward, layers, stream)
            statistics = {layer: known._replace(gradient=of_block[layer]) for layer, known in statistics.items()}
        if isinstance(mask, NeuronMask):
            neurons = find_neurons(block, mlp_width(model.config))
            masks = prune_neurons(layers, neurons, statistics, mask, sparsity, solver)
        else:
            assert isinstance(mask, LayerMask)
            masks = prune_layers(layers, statistics, mask, sparsity, solver)
        if mask.statistic or solver:
            propagate(forward, stream, out=stream)
        zeros += sum(int((~kept).sum()) for kept in masks.values())
        weights += sum(kept.numel() for kept in masks.values())
    return zeros / weights


def table(results: dict[str, Any]) -> str:
    """All perplexities in Markdown; of several draws the mean, least and most."""
    lines = [f"| | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for method in METHODS:
        row = []
        for sparsity in COLUMNS:
            found = [results[k]["perplexity"] for d in range(3) if (k := f"{method} {sparsity} {d}") in results]
            shown = "-" if not found else f"{found[0]:.1f}" if found[0] < 1e4 else f"{found[0]:.0e}"
            if len(found) > 1:
                shown = f"{sum(found) / len(found):.1f} ({min(found):.1f}-{max(found):.1f})"
            theirs = PUBLISHED.get(sparsity, {}).get(method)
            row.append(shown + (f" [{theirs}]" if theirs else ""))
        lines.append(f"| {method} | {' | '.join(row)} |")
    dense = results.get("dense 0 0")
    return "\n".join(lines) + (f"\n\nDense: {dense['perplexity']:.2f}" if dense else "")


if __name__ == "__main__":
    main()
