"""Exact least squares on a given mask by preconditioned conjugate gradients (from ALPS, arXiv 2406.07831)."""

import torch
from torch import Tensor

from lit_prune.masks.solvers.base import Objective, Solver, require
from lit_prune.masks.statistics import Gram


class ConjugateGradient(Solver):
    """The minimum of the objective over the kept weights of every row, all rows at once.

    Each step costs one product of the layer's size with its inputs' matrix. The diagonal of the Gram matrix is the
    preconditioner: in the objective's scaled coordinates it is constant.

    Args:
        iterations: the most steps to take.
        tolerance: a row is done when its masked gradient is this much smaller than that of zero weights.
        ridge: λ of the `Objective`. Without it the optimum overfits: on 32 x 256 tokens the output error on held-out
            text is least at 0.3, and within 1 % of that from 0.1 to 0.5 (benchmarks/ridge.py). More tokens need less.

    Raises:
        ValueError: a parameter is out of range.
    """

    def __init__(self, iterations: int = 100, tolerance: float = 1e-3, ridge: float = 0.3) -> None:
        super().__init__(ridge)
        require(iterations >= 1, "iterations", iterations, "1 or more, such as 100")
        require(tolerance >= 0, "tolerance", tolerance, "0 or more, such as 0.001")
        self.iterations = iterations
        self.tolerance = tolerance

    def _solve(self, objective: Objective, gram: Gram, target: Tensor, start: Tensor, mask: Tensor) -> Tensor:
        return descend(objective.matrix, target, start, mask, self.iterations, self.tolerance)


def descend(matrix: Tensor, target: Tensor, start: Tensor, mask: Tensor, iterations: int, tolerance: float) -> Tensor:
    """Conjugate gradients on Σ_i (v_i − w_i) H (v_i − w_i)ᵀ over the kept entries of v.

    Args:
        matrix: H, shape (in, in), positive semidefinite.
        target: w, shape (rows, in).
        start: the first v, zero where the mask is.
        mask: 1 for kept and 0 for pruned, in the weights' dtype.
        iterations: the most steps to take.
        tolerance: relative to the masked gradient of zero weights, row by row.
    """
    weight = start.clone()
    residual = ((target - start) @ matrix).mul_(mask)
    energy = residual.square().sum(1)
    # below its dtype's resolution there is nothing but rounding to follow, which leads away again
    rounding = torch.finfo(target.dtype).eps
    enough = (target @ matrix).mul_(mask).square_().sum(1) * max(tolerance, rounding) ** 2
    direction = residual.clone()
    going = torch.ones_like(energy, dtype=torch.bool)
    for _ in range(iterations):
        curved = (direction @ matrix).mul_(mask)
        curvature = (direction * curved).sum(1)
        # a row that has stopped stays where it is
        going &= (energy > enough) & (curvature > rounding * direction.square().sum(1))
        if not going.any():
            break
        step = torch.where(going, energy / curvature, 0)[:, None]
        weight.addcmul_(step, direction)
        residual.addcmul_(step, curved, value=-1)
        before, energy = energy, residual.square().sum(1)
        direction.mul_(torch.where(going, energy / before, 0)[:, None]).add_(residual)
    return weight
