"""A random mask: the baseline that every study needs."""

import torch
from torch import Tensor

from lit_prune.masks.base import ScoreMask
from lit_prune.masks.sparsity import Granularity
from lit_prune.masks.statistics import NOTHING, LayerStatistics


class Random(ScoreMask):
    """Uniformly random scores from torch's global generator, which `seed_everything` seeds.

    Args:
        granularity: "row" or "matrix": where a share of weights is counted.
    """

    def __init__(self, granularity: Granularity = "row") -> None:
        super().__init__(granularity)

    def score(self, weight: Tensor, statistics: LayerStatistics = NOTHING) -> Tensor:  # noqa: D102
        # drawn on the CPU, so that a seed gives the same mask on every device
        return torch.rand(weight.shape).to(weight.device)
