"""ALPS: ADMM with a growing penalty, then conjugate gradients (Meng et al., arXiv 2406.07831, algorithm 1)."""

import torch
from torch import Tensor

from lit_prune.masks.base import LayerMask, Pruned, working_dtype
from lit_prune.masks.solvers.base import Objective, require
from lit_prune.masks.solvers.conjugate_gradient import descend
from lit_prune.masks.sparsity import Granularity, Sparsity
from lit_prune.masks.statistics import Gram, LayerStatistics

GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""How much of the support has to change within `ROUND` steps, as a share of it, for ρ to grow by this factor."""
ROUND = 3
PATIENCE, SETTLED = 30, 0.0003
"""From this step on, a support that changes by less than this share is taken for final, as in the authors' code."""


class ALPS(LayerMask):
    """The support settles while ρ grows; its weights are then polished from there towards the least squares optimum.

    Args:
        iterations: the most steps.
        penalty: ρ to begin with, in the objective's scaled coordinates.
        polish: conjugate gradient steps on the final support.
        ridge: λ of the `Objective`; 0.01 in the paper, but 0.3 has less held-out error where tokens are few.
        granularity: "matrix" (as published) or "row": where a share of weights is counted.

    Raises:
        ValueError: a parameter is out of range.
    """

    statistic = Gram
    updates = True
    working = 22
    derived = 2

    def __init__(
        self,
        iterations: int = 300,
        penalty: float = 0.1,
        polish: int = 10,
        ridge: float = 0.3,
        granularity: Granularity = "matrix",
    ) -> None:
        require(iterations >= 1, "iterations", iterations, "1 or more, such as 300")
        require(penalty > 0, "penalty", penalty, "more than 0, such as 0.1")
        require(polish >= 0, "polish", polish, "0 or more, such as 10")
        require(ridge >= 0, "ridge", ridge, "0 or more, such as 0.3")
        self.iterations = iterations
        self.penalty = penalty
        self.polish = polish
        self.ridge = ridge
        self.granularity: Granularity = granularity

    def prune(self, weight: Tensor, statistics: LayerStatistics, sparsity: Sparsity) -> Pruned:  # noqa: D102
        gram = statistics.gram
        objective = gram.once(Objective, self.ridge)
        target = weight.to(working_dtype(weight)) * objective.scale
        kept, support = self._settle(gram, objective, target, sparsity)
        polished = descend(objective.matrix, target, kept, support, self.polish, tolerance=0.0)
        return Pruned((polished / objective.scale).to(weight.dtype), support.bool())

    def _settle(self, gram: Gram, objective: Objective, target: Tensor, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
        """The weights and the support, as 1 and 0, that the alternating steps settle on; all in scaled coordinates."""
        values, vectors = gram.once(eigen, self.ridge)
        penalty = self.penalty
        inverse = (vectors / (values + penalty)) @ vectors.T
        pull = target @ objective.matrix
        support = earlier = sparsity.indicator(target.abs(), self.granularity)
        kept, multiplier = target * support, torch.zeros_like(target)
        for step in range(1, self.iterations + 1):
            weight = torch.add(pull - multiplier, kept, alpha=penalty) @ inverse
            moved = torch.add(weight, multiplier, alpha=1 / penalty)
            support = sparsity.indicator(moved.abs(), self.granularity)
            kept = moved * support
            multiplier.add_(weight.sub_(kept), alpha=penalty)
            if step % ROUND == 0:
                change = float((support != earlier).sum() / support.sum())
                if change == 0 or (step >= PATIENCE and change < SETTLED):
                    break
                penalty *= next(factor for share, factor in GROWTH if change > share)
                inverse = (vectors / (values + penalty)) @ vectors.T
                earlier = support
        return kept, support


def eigen(gram: Gram, ridge: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the matrix H of an `Objective`, from which every (H + ρI)⁻¹ is made."""
    values, vectors = torch.linalg.eigh(gram.once(Objective, ridge).matrix)
    return values.clamp(min=0), vectors
