"""ADMM-Grad: mask and weights together (Boza, arXiv 2401.02938, section 3.2 and algorithm 2)."""

from fractions import Fraction

import torch
from torch import Tensor

from lit_prune.masks.base import LayerMask, Pruned, working_dtype
from lit_prune.masks.solvers.admm import alternate, penalised_inverse
from lit_prune.masks.solvers.base import Objective, Solver, chunks, require
from lit_prune.masks.sparsity import Granularity, Sparsity
from lit_prune.masks.statistics import Gram, LayerStatistics


class ADMM(LayerMask):
    """The largest |Ŵ + U| are kept, at a sparsity that grows to the full one: s_t = s − s(1 − t/k_s)³ at step t.

    Ŵ is scaled by the input norms, so that |Ŵ| is Wanda's score. A pattern n:m is selected in full from step 1.

    Args:
        iterations: how many steps.
        mask_iterations: k_s, how many of them select the mask anew.
        penalty: ρ of the augmented Lagrangian, in scaled coordinates.
        ridge: λ of the `Objective`.
        granularity: "row" or "matrix": where a share of weights is counted.

    Raises:
        ValueError: a parameter is out of range.
    """

    statistic = Gram
    updates = True
    working = 12
    derived = 2

    def __init__(
        self,
        iterations: int = 20,
        mask_iterations: int = 15,
        penalty: float = 1.0,
        ridge: float = 0.1,
        granularity: Granularity = "row",
    ) -> None:
        require(iterations >= 1, "iterations", iterations, "1 or more, such as 20")
        require(1 <= mask_iterations <= iterations, "mask_iterations", mask_iterations, f"1 to {iterations}")
        require(penalty > 0, "penalty", penalty, "more than 0, such as 1.0")
        require(ridge >= 0, "ridge", ridge, "0 or more, such as 0.1")
        self.iterations = iterations
        self.mask_iterations = mask_iterations
        self.penalty = penalty
        self.ridge = ridge
        self.granularity: Granularity = granularity

    def prune(self, weight: Tensor, statistics: LayerStatistics, sparsity: Sparsity) -> Pruned:  # noqa: D102
        gram, dtype = statistics.gram, working_dtype(weight)
        objective = gram.once(Objective, self.ridge)
        inverse = gram.once(penalised_inverse, self.ridge, self.penalty)

        def reselect(step: int, moved: Tensor) -> Tensor | None:
            if step > self.mask_iterations:
                return None
            # of n:m, whose steps would be whole weights of a group, the full pattern at once leaves less error
            progress = 1 if sparsity.m else 1 - (1 - Fraction(step, self.mask_iterations)) ** 3
            return sparsity.indicator(moved.abs(), self.granularity, progress)

        pruned, kept = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
        together = weight.numel() if self.granularity == "matrix" else Solver.chunk
        for rows in chunks(weight, together):
            target = weight[rows].to(dtype) * objective.scale
            everything = torch.ones_like(target)
            solved, mask = alternate(objective, inverse, target, everything, self.iterations, self.penalty, reselect)
            pruned[rows] = (solved / objective.scale).to(weight.dtype)
            kept[rows] = mask.bool()
        return Pruned(pruned, kept)
