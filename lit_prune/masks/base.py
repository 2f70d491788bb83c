"""What every mask method is: a layer's weights and input statistic in, pruned weights and mask out."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from lit_prune.masks.sparsity import Granularity, Sparsity
from lit_prune.masks.statistics import InputStatistic


class Pruned(NamedTuple):
    """A layer's pruned weights, zero where the mask is False, and the mask; both of shape (out, in)."""

    weight: Tensor
    mask: Tensor


class MaskMethod(ABC):
    """Chooses the weights of one linear layer that go, and may update those that stay."""

    statistic: ClassVar[type[InputStatistic] | None] = None
    """What the method has to know of the layer's input; None for nothing."""

    @abstractmethod
    def prune(self, weight: Tensor, statistic: InputStatistic | None, sparsity: Sparsity) -> Pruned:
        """Prune one layer.

        Args:
            weight: the dense weights, shape (out, in); left as they are.
            statistic: an instance of the class's `statistic`, filled with the calibration input.
            sparsity: how much goes, and in which pattern.
        """


class ScoreMask(MaskMethod):
    """A mask method that scores every weight, keeps the highest and changes none."""

    def __init__(self, granularity: Granularity) -> None:
        self.granularity: Granularity = granularity

    @abstractmethod
    def score(self, weight: Tensor, statistic: InputStatistic | None) -> Tensor:
        """The weights' importance, shape (out, in); the lowest go first."""

    def prune(self, weight: Tensor, statistic: InputStatistic | None, sparsity: Sparsity) -> Pruned:  # noqa: D102
        mask = sparsity.select(self.score(weight, statistic), self.granularity)
        return Pruned(weight * mask, mask)
