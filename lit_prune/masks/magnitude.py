"""Magnitude pruning: the smallest weights go."""

from torch import Tensor

from lit_prune.masks.base import ScoreMask
from lit_prune.masks.sparsity import Granularity
from lit_prune.masks.statistics import NOTHING, LayerStatistics


class Magnitude(ScoreMask):
    """Score |W_ij|, compared over the whole matrix.

    Args:
        granularity: "matrix" (usual) or "row": where a share of weights is counted.
    """

    def __init__(self, granularity: Granularity = "matrix") -> None:
        super().__init__(granularity)

    def score(self, weight: Tensor, statistics: LayerStatistics = NOTHING) -> Tensor:  # noqa: D102
        return weight.abs()
