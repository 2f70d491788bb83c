"""Seconds to prune single layers: each method, its theoretical time, and the plain published algorithm as a loop.

The theoretical time is the method's floating point operations over the measured rate of a large matrix product. A
method and its loop are timed in turn, and the least of the repetitions counts. The Gram matrix is there already;
what is derived from it (factors, inverses) is part of the solve.

    python benchmarks/layers.py [--shapes 576x576 1536x576 576x1536 4096x4096 11008x4096] [--repeat 3] [--no-loops]
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lit_prune.masks import ADMM, Gram, LayerMask, LayerStatistics, SparseGPT, Sparsity, Wanda, solvers

SHAPES = ("576x576", "1536x576", "576x1536", "4096x4096", "11008x4096")


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="OUTxIN")
    parser.add_argument("--sparsity", type=Sparsity, default=Sparsity("0.5"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-loops", action="store_true")
    arguments = parser.parse_args()
    print("| layer | method | seconds | theory | ratio | loop | loop / ours |\n|---|---|---|---|---|---|---|")
    for shape in arguments.shapes:
        out, width = map(int, shape.split("x"))
        torch.manual_seed(0)
        weight, inputs = torch.randn(out, width), torch.randn(2 * width, width) @ torch.randn(width, width) / width**0.5
        for name, loop in LOOPS.items():
            print(
                f"| {shape} | {measured(name, None if arguments.no_loops else loop, weight, inputs, arguments)}",
                flush=True,
            )


def measured(name: str, loop: "Loop | None", weight: Tensor, inputs: Tensor, arguments: argparse.Namespace) -> str:
    """A line of the table, without its first cell."""
    ours, theirs, theory = [], [], []
    for _ in range(arguments.repeat):
        gram = Gram()
        gram.add(inputs)
        matrix = gram.matrix
        theory.append(operations(name, *weight.shape) / rate())
        ours.append(seconds(partial(solve, name, weight, gram, arguments.sparsity)))
        if loop is not None:
            theirs.append(seconds(partial(loop, weight, matrix, arguments.sparsity)))
    best = min(ours)
    cells = [f"{best:.3f}", f"{min(theory):.3f}" if min(theory) else "-"]
    cells.append(f"{best / min(theory):.2f}" if min(theory) else "-")
    cells += [f"{min(theirs):.3f}", f"{min(theirs) / best:.1f}"] if theirs else ["-", "-"]
    return f"{name} | {' | '.join(cells)} |"


METHODS: dict[str, LayerMask] = {"Wanda": Wanda(), "SparseGPT": SparseGPT(), "ADMM": ADMM()}


def solve(name: str, weight: Tensor, gram: Gram, sparsity: Sparsity) -> None:
    """Prune with ours; the solvers on Wanda's mask."""
    if name in METHODS:
        METHODS[name].prune(weight, LayerStatistics(gram), sparsity)
    else:
        pruned = Wanda().prune(weight, LayerStatistics(gram), sparsity)
        solver = solvers.ADMM() if name == "solver ADMM" else solvers.ConjugateGradient(iterations=10, tolerance=0)
        solver.solve(weight, pruned.weight, pruned.mask, gram)


def operations(name: str, out: int, width: int) -> float:
    """Floating point operations of a solve: factorisations, and products of the layer with an (in, in) matrix."""
    product = 2.0 * out * width**2
    return {
        "Wanda": 0.0,
        "SparseGPT": width**3 / 3 + product / 2,  # a Cholesky factor, and half a product
        "ADMM": width**3 + 21 * product,  # an inverse; the pull, and one product a step
        "solver ADMM": width**3 + 23 * product,  # and two to see that no row is worse
        "solver ConjugateGradient, 10 steps": 14 * product,  # the gradients of start and zero
    }[name]


def rate() -> float:
    """Floating point operations a second of a large matrix product, now."""
    matrix = torch.randn(2048, 2048)
    return 2 * 2048.0**3 / min(seconds(lambda: matrix @ matrix) for _ in range(5))


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def wanda_loop(weight: Tensor, gram: Tensor, sparsity: Sparsity) -> Tensor:
    """Wanda as published: sort every row's scores and set the lowest to zero by index; n:m group by group."""
    score = weight.abs() * gram.diagonal().sqrt()
    if sparsity.m:
        goes = torch.zeros_like(weight, dtype=torch.bool)
        for j in range(0, weight.shape[1], sparsity.m):
            goes.scatter_(1, j + lowest_of_group(score[:, j : j + sparsity.m], sparsity), True)
        return weight.masked_fill(goes, 0)
    lowest = score.sort(dim=1, stable=True).indices[:, : int(weight.shape[1] * sparsity.share)]
    return weight.scatter(1, lowest, 0)


def sparsegpt_loop(weight: Tensor, gram: Tensor, sparsity: Sparsity, block: int = 128) -> Tensor:
    """SparseGPT as published: columns one by one in blocks of 128, three factorisations, a sort for the mask."""
    weight, width = weight.clone(), weight.shape[1]
    hessian = gram.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, width, block):
        stop = min(start + block, width)
        part = weight[:, start:stop].clone()
        errors = torch.zeros_like(part)
        within = factor[start:stop, start:stop]
        cost = part**2 / within.diagonal() ** 2
        if sparsity.m:
            goes = torch.zeros_like(part, dtype=torch.bool)
        else:
            goes = cost <= cost.flatten().sort().values[int(cost.numel() * sparsity.share)]
        for j in range(stop - start):
            if sparsity.m and j % sparsity.m == 0:
                group = part[:, j : j + sparsity.m] ** 2 / within.diagonal()[j : j + sparsity.m] ** 2
                goes.scatter_(1, j + lowest_of_group(group, sparsity), True)
            column = part[:, j].clone()
            kept = column.clone()
            kept[goes[:, j]] = 0
            error = (column - kept) / within[j, j]
            part[:, j:] -= error[:, None] @ within[None, j, j:]
            part[:, j] = kept
            errors[:, j] = error
        weight[:, start:stop] = part
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight


def lowest_of_group(score: Tensor, sparsity: Sparsity) -> Tensor:
    """Which of m consecutive inputs have the m - n lowest scores, for every row of (out, m)."""
    return score.topk(int(score.shape[1] * sparsity.share), dim=1, largest=False).indices


def admm_loop(weight: Tensor, gram: Tensor, sparsity: Sparsity) -> Tensor:
    """ADMM as published: 20 steps on the transposed layer, a sort of all weights for each of 15 masks."""
    norm = gram.diagonal().sqrt() + 1e-8
    matrix = gram / norm / norm[:, None]
    matrix.diagonal().add_(0.1 * matrix.diagonal().mean())
    scaled = (weight * norm).T.clone()
    pull = matrix @ scaled
    inverse = torch.linalg.inv(matrix + torch.eye(len(matrix)))
    dual, mask = torch.zeros_like(scaled), torch.ones_like(scaled, dtype=torch.bool)
    for step in range(1, 21):
        if step <= 15:
            share = float(sparsity.share) * (1 - (1 - step / 15) ** 3)
            score = (scaled + dual).abs()
            mask = score > score.flatten().sort().values[int(score.numel() * share) - 1]
        kept = mask * (scaled + dual)
        dual = dual + scaled - kept
        scaled = inverse @ (pull + kept - dual)
    return (mask * (scaled + dual)).T / norm


Loop = Callable[[Tensor, Tensor, Sparsity], Tensor]
LOOPS: dict[str, Loop | None] = {
    "Wanda": wanda_loop,
    "SparseGPT": sparsegpt_loop,
    "ADMM": admm_loop,
    "solver ADMM": None,
    "solver ConjugateGradient, 10 steps": None,
}

if __name__ == "__main__":
    main()
