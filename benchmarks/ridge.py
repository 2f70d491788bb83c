"""Which ridge should exact least squares have? Output error of single layers on held-out text, for several ridges.

The layers of some blocks of the quickstart's model are masked, and the weights that stay are solved for by conjugate
gradients, with the dense model's own hidden states as inputs. The error is ‖X (V − W)ᵀ‖² / ‖X Wᵀ‖², its mean over
layers geometric.

    python benchmarks/ridge.py [--samples 32] [--blocks 2 10 20 28]
"""

import argparse
from functools import partial

import torch
from quickstart_model import load

from lit_prune.data import propagate
from lit_prune.masks import Gram, LayerMask, SparseGPT, Sparsity, Wanda
from lit_prune.masks.solvers import ADMM, ConjugateGradient, Solver
from lit_prune.models import linear_layers, weight_of
from lit_prune.modules import observe

RIDGES = (0.0, 0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 10, 20, 28])
    arguments = parser.parse_args()
    start = load(arguments.samples, held_out=32)
    solvers: dict[str, Solver | None] = {"mask alone": None, "ADMM(ridge=0.1)": ADMM()}
    solvers |= {f"ConjugateGradient(ridge={ridge:g})": ConjugateGradient(ridge=ridge) for ridge in RIDGES}
    cases: list[tuple[LayerMask, str]] = [(Wanda(), "0.5"), (Wanda(), "0.7"), (SparseGPT(), "0.5"), (Wanda(), "2:4")]
    errors = {(name, case): [] for name in solvers for case in range(len(cases))}
    hidden = start.hidden
    for index, (block, call) in enumerate(zip(start.blocks, start.calls, strict=True)):
        layers, forward = linear_layers(block), partial(call, block)
        chosen = index in arguments.blocks
        with observe(layers if chosen else {}, SparseGPT()) as seen:
            front = propagate(forward, hidden[: start.samples])
        with observe(layers if chosen else {}, SparseGPT()) as unseen:
            back = propagate(forward, hidden[start.samples :])
        hidden = torch.cat([front, back])
        for layer in layers if chosen else {}:
            weight = weight_of(layers[layer])
            known, held_out = seen[layer].gram, unseen[layer].gram
            for case, (mask, sparsity) in enumerate(cases):
                pruned = mask.prune(weight, seen[layer], Sparsity(sparsity))
                for name, solver in solvers.items():
                    solved = solver.solve(weight, pruned.weight, pruned.mask, known) if solver else pruned.weight
                    pair = tuple(relative_error(solved, weight, gram) for gram in (known, held_out))
                    errors[name, case].append(pair)
    print(f"calibration / held-out error, {arguments.samples} x 256 tokens, blocks {arguments.blocks}\n")
    print(f"| solver | {' | '.join(f'{type(m).__name__} {s}' for m, s in cases)} |\n|---|{'---|' * len(cases)}")
    for name in solvers:
        means = [torch.tensor(errors[name, case]).log().mean(0).exp().tolist() for case in range(len(cases))]
        print(f"| {name} | {' | '.join(f'{a:.4f} / {b:.4f}' for a, b in means)} |")


def relative_error(solved: torch.Tensor, dense: torch.Tensor, gram: Gram) -> float:
    """‖X (V − W)ᵀ‖² / ‖X Wᵀ‖² from the Gram matrix of X, in float64."""
    matrix = gram.matrix.double()
    change, dense = (solved - dense).double(), dense.double()
    return float(((change @ matrix) * change).sum() / ((dense @ matrix) * dense).sum())


if __name__ == "__main__":
    main()
