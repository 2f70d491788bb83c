"""Mask methods: pure tensor mathematics, one small file each."""

import lit_prune.vector_math  # noqa: F401 - before anything is computed
from lit_prune.masks import bits
from lit_prune.masks.admm import ADMM
from lit_prune.masks.allocation import OWL, Allocation, ByError
from lit_prune.masks.alps import ALPS
from lit_prune.masks.base import LayerMask, MaskMethod, NeuronMask, Pruned, ScoreMask
from lit_prune.masks.gblm import GBLM, RegionalGradient
from lit_prune.masks.magnitude import Magnitude
from lit_prune.masks.mutual_information import MutualInformation
from lit_prune.masks.random import Random
from lit_prune.masks.sparsegpt import SparseGPT
from lit_prune.masks.sparsity import Granularity, Sparsity
from lit_prune.masks.statistics import GradientNorm, Gram, InputNorm, InputStatistic, LayerStatistics
from lit_prune.masks.wanda import Wanda

__all__ = [
    "ADMM",
    "ALPS",
    "GBLM",
    "OWL",
    "Allocation",
    "ByError",
    "GradientNorm",
    "Gram",
    "Granularity",
    "InputNorm",
    "InputStatistic",
    "LayerMask",
    "LayerStatistics",
    "Magnitude",
    "MaskMethod",
    "MutualInformation",
    "NeuronMask",
    "Pruned",
    "Random",
    "RegionalGradient",
    "ScoreMask",
    "SparseGPT",
    "Sparsity",
    "Wanda",
    "bits",
]
