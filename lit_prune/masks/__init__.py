"""Mask methods: pure tensor mathematics, one small file each."""

from lit_prune.masks import bits
from lit_prune.masks.base import LayerMask, MaskMethod, NeuronMask, Pruned, ScoreMask
from lit_prune.masks.magnitude import Magnitude
from lit_prune.masks.random import Random
from lit_prune.masks.sparsity import Granularity, Sparsity
from lit_prune.masks.statistics import GradientNorm, Gram, InputNorm, InputStatistic, LayerStatistics
from lit_prune.masks.wanda import Wanda

__all__ = [
    "GradientNorm",
    "Gram",
    "Granularity",
    "InputNorm",
    "InputStatistic",
    "LayerMask",
    "LayerStatistics",
    "Magnitude",
    "MaskMethod",
    "NeuronMask",
    "Pruned",
    "Random",
    "ScoreMask",
    "Sparsity",
    "Wanda",
    "bits",
]
