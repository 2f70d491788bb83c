"""Judging a model: zero-shot tasks, divergence from the dense model, and the file that holds the figures."""

from lit_prune.evaluation.divergence import Comparison, compare
from lit_prune.evaluation.results import Results
from lit_prune.evaluation.zero_shot import ZeroShot

__all__ = ["Comparison", "Results", "ZeroShot", "compare"]
