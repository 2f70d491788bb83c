"""How a total sparsity is shared out among the blocks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_prune.masks.solvers.base import require

MOST = 0.99
"""No block is given a higher share than this."""


class Allocation(ABC):
    """Prunes blocks less that need their weights more, at a fixed total.

    Args:
        spread: how far a block's share may lie from the total one, on either side.

    Raises:
        ValueError: the spread is out of range.
    """

    def __init__(self, spread: float = 0.08) -> None:
        require(0 < spread < 1, "spread", spread, "a number between 0 and 1, such as 0.08")
        self.spread = spread

    @abstractmethod
    def need(self, scores: Sequence[Tensor], error: Callable[[], float]) -> float:
        """A figure that says how much a block needs its weights; the higher, the fewer go.

        Args:
            scores: Wanda's scores of the block's layers, (out, in) each, of the dense model on its own stream.
            error: computes the output error of the block under Wanda's mask at the total share, as a share of the
                output's energy: the mean over tokens of ‖f̂(x) − f(x)‖² / ‖f(x)‖².
        """

    def shares(self, needs: Sequence[float], sizes: Sequence[int], total: float) -> list[float]:
        """Linear in the needs: the neediest block is pruned 2 · spread less than the least needy one.

        Args:
            needs: of all blocks.
            sizes: how many weights of each are shared out.
            total: the share of all of them that goes.

        Returns:
            A share for every block, in [0, 0.99]; their mean, weighted by size, is the total.
        """
        low, high = min(needs), max(needs)
        offsets = [self.spread * (1 - 2 * (need - low) / (high - low)) if high > low else 0.0 for need in needs]
        return _levelled(torch.tensor(offsets, dtype=torch.float64), torch.tensor(sizes), total)


class OWL(Allocation):
    """Outlier weighed layer-wise sparsity: the need is the share of outlying scores (Yin et al., arXiv 2310.05175).

    Args:
        spread: λ of the paper.
        outlier: M of the paper: a score outlies that is this many times the mean of its layer's.

    Raises:
        ValueError: a parameter is out of range.
    """

    def __init__(self, spread: float = 0.08, outlier: float = 5.0) -> None:
        super().__init__(spread)
        require(outlier > 1, "outlier", outlier, "more than 1, such as 5")
        self.outlier = outlier

    def need(self, scores: Sequence[Tensor], error: Callable[[], float]) -> float:  # noqa: D102
        outlying = sum(int((score > self.outlier * score.mean()).sum()) for score in scores)
        return outlying / sum(score.numel() for score in scores)


class ByError(Allocation):
    """The need is the block's own output error when it is pruned at the total share."""

    def need(self, scores: Sequence[Tensor], error: Callable[[], float]) -> float:  # noqa: D102
        return error()


def _levelled(offsets: Tensor, sizes: Tensor, total: float) -> list[float]:
    """Shares that differ like the offsets, within [0, MOST], by bisection on what is added to all of them."""
    low, high = -1.0 - float(offsets.max()), 1.0 - float(offsets.min())
    for _ in range(60):
        shift = (low + high) / 2
        shares = (offsets + shift).clamp(0, MOST)
        if float((shares * sizes).sum() / sizes.sum()) < total:
            low = shift
        else:
            high = shift
    return [float(share) for share in shares]
