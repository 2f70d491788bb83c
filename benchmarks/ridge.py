"""Which ridge should solvers and masks have? Output error of single layers on held-out text, for several ridges.

The layers of some blocks of the quickstart's model are pruned with the dense model's own hidden states as inputs: by
masks whose weights are solved for by conjugate gradients, and by masks that solve for their weights themselves. The
error is ‖X (V − W)ᵀ‖² / ‖X Wᵀ‖², its mean over layers geometric.

    python benchmarks/ridge.py [--samples 32] [--blocks 2 10 20 28]
"""

import argparse
from collections import defaultdict
from functools import partial
from itertools import product

import torch
from quickstart_model import load

from lit_prune.data import propagate
from lit_prune.masks import ADMM, ALPS, Gram, LayerMask, SparseGPT, Sparsity, Wanda, solvers
from lit_prune.models import linear_layers, weight_of
from lit_prune.modules import observe

RIDGES = (0.0, 0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
RIDGES_OF_MASKS = (0.01, 0.1, 0.3, 0.5)
Errors = dict[tuple[str, str], list[list[float]]]
"""By method and case: one pair of errors for every layer, on calibration and on held-out text."""
SPARSITIES = ("0.5", "0.7", "2:4")


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 10, 20, 28])
    arguments = parser.parse_args()
    start = load(arguments.samples, held_out=32)
    updates: dict[str, solvers.Solver | None] = {"mask alone": None, "ADMM(ridge=0.1)": solvers.ADMM()}
    updates |= {f"ConjugateGradient(ridge={ridge:g})": solvers.ConjugateGradient(ridge=ridge) for ridge in RIDGES}
    given: list[tuple[LayerMask, str]] = [(Wanda(), "0.5"), (Wanda(), "0.7"), (SparseGPT(), "0.5"), (Wanda(), "2:4")]
    masks: dict[str, LayerMask] = {"SparseGPT": SparseGPT()}
    masks |= {f"ADMM(ridge={ridge:g})": ADMM(ridge=ridge) for ridge in RIDGES_OF_MASKS}
    masks |= {f"ALPS(ridge={ridge:g})": ALPS(ridge=ridge) for ridge in RIDGES_OF_MASKS}
    of_solvers: Errors = defaultdict(list)
    of_masks: Errors = defaultdict(list)
    hidden = start.hidden
    for index, (block, call) in enumerate(zip(start.blocks, start.calls, strict=True)):
        layers, forward = linear_layers(block), partial(call, block)
        chosen = layers if index in arguments.blocks else {}
        with observe(chosen, SparseGPT()) as seen:
            front = propagate(forward, hidden[: start.samples])
        with observe(chosen, SparseGPT()) as unseen:
            back = propagate(forward, hidden[start.samples :])
        hidden = torch.cat([front, back])
        for layer in chosen:
            weight, known, grams = weight_of(layers[layer]), seen[layer], (seen[layer].gram, unseen[layer].gram)
            for mask, sparsity in given:
                pruned = mask.prune(weight, known, Sparsity(sparsity))
                for name, solver in updates.items():
                    solved = solver.solve(weight, pruned.weight, pruned.mask, grams[0]) if solver else pruned.weight
                    key = name, f"{type(mask).__name__} {sparsity}"
                    of_solvers[key].append([relative_error(solved, weight, gram) for gram in grams])
            for (name, mask), sparsity in product(masks.items(), SPARSITIES):
                pruned = mask.prune(weight, known, Sparsity(sparsity))
                of_masks[name, sparsity].append([relative_error(pruned.weight, weight, gram) for gram in grams])
    print(f"calibration / held-out error, {arguments.samples} x 256 tokens, blocks {arguments.blocks}\n")
    print(f"{table('solver', of_solvers)}\n\n{table('mask', of_masks)}")


def table(kind: str, errors: Errors) -> str:
    """Geometric means over layers, in Markdown."""
    rows, columns = (list(dict.fromkeys(key[place] for key in errors)) for place in (0, 1))
    lines = [f"| {kind} | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in rows:
        means = [torch.tensor(errors[row, column]).log().mean(0).exp().tolist() for column in columns]
        lines.append(f"| {row} | {' | '.join(f'{ours:.4f} / {unseen:.4f}' for ours, unseen in means)} |")
    return "\n".join(lines)


def relative_error(solved: torch.Tensor, dense: torch.Tensor, gram: Gram) -> float:
    """‖X (V − W)ᵀ‖² / ‖X Wᵀ‖² from the Gram matrix of X, in float64."""
    matrix = gram.matrix.double()
    change, dense = (solved - dense).double(), dense.double()
    return float(((change @ matrix) * change).sum() / ((dense @ matrix) * dense).sum())


if __name__ == "__main__":
    main()
