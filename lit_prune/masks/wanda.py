"""Wanda: weights times activations (Sun et al., arXiv 2306.11695, eq. 1)."""

from torch import Tensor

from lit_prune.masks.base import ScoreMask
from lit_prune.masks.sparsity import Granularity
from lit_prune.masks.statistics import InputNorm, LayerStatistics


class Wanda(ScoreMask):
    """Score |W_ij| · ‖X_j‖₂, compared within each row; no weight is changed.

    Args:
        granularity: "row" (as published) or "matrix": where a share of weights is counted.
    """

    statistic = InputNorm

    def __init__(self, granularity: Granularity = "row") -> None:
        super().__init__(granularity)

    def score(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:  # noqa: D102
        return weight.abs() * statistics.norms.norm.to(weight.device)
