"""ADMM on a layer's weights (Boza, Fast and Effective Weight Update for Pruned LLMs, arXiv 2401.02938)."""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_prune.masks.factorisation import cholesky
from lit_prune.masks.solvers.base import Objective, Solver, require
from lit_prune.masks.statistics import Gram

Reselect = Callable[[int, Tensor], Tensor | None]
"""From the step, counted from 1, and the weights that would stay to a new mask, or None for the one before."""


class ADMM(Solver):
    """The pure weight update on a given mask (ADMM1 of the paper, section 3.1).

    Args:
        iterations: how many steps, each one product with a matrix that is factored once.
        penalty: ρ of the augmented Lagrangian, in scaled coordinates.
        ridge: λ of the `Objective`.

    Raises:
        ValueError: a parameter is out of range.
    """

    derived = 2

    def __init__(self, iterations: int = 20, penalty: float = 1.0, ridge: float = 0.1) -> None:
        super().__init__(ridge)
        require(iterations >= 1, "iterations", iterations, "1 or more, such as 20")
        require(penalty > 0, "penalty", penalty, "more than 0, such as 1.0")
        self.iterations = iterations
        self.penalty = penalty

    def _solve(self, objective: Objective, gram: Gram, target: Tensor, start: Tensor, mask: Tensor) -> Tensor:
        inverse = gram.once(penalised_inverse, self.ridge, self.penalty)
        weight, _ = alternate(objective, inverse, target, mask, self.iterations, self.penalty)
        return weight


def penalised_inverse(gram: Gram, ridge: float, penalty: float) -> Tensor:
    """(H + ρI)⁻¹ for the matrix H of an `Objective`."""
    matrix = gram.once(Objective, ridge).matrix.clone()
    matrix.diagonal().add_(penalty)
    factor = cholesky(matrix, 0.0, gram.name)
    del matrix  # as large as the inverse
    return torch.cholesky_inverse(factor)


def alternate(
    objective: Objective,
    inverse: Tensor,
    target: Tensor,
    mask: Tensor,
    iterations: int,
    penalty: float,
    reselect: Reselect | None = None,
) -> tuple[Tensor, Tensor]:
    """The alternating steps, all in scaled coordinates.

    Args:
        objective: of the layer.
        inverse: (H + ρI)⁻¹.
        target: the dense weights Ŵ, shape (rows, in).
        mask: 1 for kept and 0 for pruned, in the weights' dtype; the first one if it is reselected.
        iterations: how many steps.
        penalty: ρ.
        reselect: chooses the mask before a step; None for a fixed mask.

    Returns:
        M ∘ (Ŵ + U) after the last step, and M.
    """
    pull = target @ objective.matrix  # B = ŴG
    weight, dual = target.clone(), torch.zeros_like(target)
    kept = torch.empty_like(target)
    for step in range(1, iterations + 1):
        moved = weight.add_(dual)
        chosen = reselect(step, moved) if reselect else None
        mask = mask if chosen is None else chosen
        torch.mul(moved, mask, out=kept)  # Z
        torch.sub(moved, kept, out=dual)  # U
        torch.add(pull, kept.sub_(dual), alpha=penalty, out=kept)  # B + ρ(Z − U)
        torch.mm(kept, inverse, out=weight)
    return weight.add_(dual).mul_(mask), mask
