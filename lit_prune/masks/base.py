"""What a mask method is: a layer's weights and statistics in, pruned weights and mask out."""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lit_prune.masks.sparsity import Granularity, Sparsity
from lit_prune.masks.statistics import InputStatistic, LayerStatistics


class Pruned(NamedTuple):
    """A layer's pruned weights, zero where the mask is False, and the mask; both of shape (out, in)."""

    weight: Tensor
    mask: Tensor


class MaskMethod(ABC):  # noqa: B024 - its two kinds have the abstract methods
    """Chooses which weights of a block's linear layers go: each one by itself, or whole neurons."""

    statistic: ClassVar[type[InputStatistic] | None] = None
    """What the method has to know of a layer's input; None for nothing."""

    gradient: ClassVar[Literal["model", "block"] | None] = None
    """Of which loss it has to know the weights' gradients: the language model's, or one on the block's output."""

    p: int = 2
    """Of which p-norm over samples, where it does."""

    updates: ClassVar[bool] = False
    """Whether it also changes weights that stay."""

    working: ClassVar[int] = 7
    """Tensors of a layer's size there are at a time, at most, while its weights are chosen."""

    derived: ClassVar[int] = 0
    """Matrices it makes of a Gram matrix, as large as that, which stay until all layers that share it are pruned."""


class LayerMask(MaskMethod):
    """Chooses the weights of one linear layer that go, and may update those that stay."""

    @abstractmethod
    def prune(self, weight: Tensor, statistics: LayerStatistics, sparsity: Sparsity) -> Pruned:
        """Prune one layer.

        Args:
            weight: the dense weights, shape (out, in); left as they are.
            statistics: what the class's attributes ask for, filled with the calibration input.
            sparsity: how much goes, and in which pattern.
        """


class ScoreMask(LayerMask):
    """A mask method that scores every weight, keeps the highest and changes none."""

    working = 5

    def __init__(self, granularity: Granularity) -> None:
        self.granularity: Granularity = granularity

    @abstractmethod
    def score(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """The weights' importance, shape (out, in); the lowest go first."""

    def prune(self, weight: Tensor, statistics: LayerStatistics, sparsity: Sparsity) -> Pruned:  # noqa: D102
        mask = sparsity.select(self.score(weight, statistics), self.granularity)
        return Pruned(weight * mask, mask)


class NeuronMask(MaskMethod):
    """Chooses whole neurons of an MLP that go.

    A neuron is a row of the layers that compute it (up and gate, or fc1) and a column of the layer that reads it
    (down, or fc2).

    Args:
        slice: take the neurons out of the saved model for good, so that it is smaller, and not only set to zero.
    """

    def __init__(self, slice: bool) -> None:
        self.slice = slice

    @abstractmethod
    def keep(self, weight: Tensor, statistics: LayerStatistics, count: int) -> Tensor:
        """Choose the neurons that stay.

        Args:
            weight: the reading layer's dense weights, shape (out, neurons).
            statistics: of the reading layer, whose inputs are the neurons' activations.
            count: how many neurons go, fewer than there are.

        Returns:
            Bool, shape (neurons,), True = kept, with exactly `count` False.
        """


def working_dtype(weight: Tensor) -> torch.dtype:
    """What a method computes in: float32, or float64 of weights in float64."""
    return torch.promote_types(weight.dtype, torch.float32)
