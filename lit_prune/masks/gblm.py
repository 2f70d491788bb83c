"""Scores that add the gradient of a loss to Wanda's: GBLM and Wanda++'s regional gradients."""

import math
from typing import Literal

from torch import Tensor

from lit_prune.masks.base import ScoreMask
from lit_prune.masks.sparsity import Granularity
from lit_prune.masks.statistics import InputNorm, LayerStatistics

PUBLISHED_SAMPLES = 128
PUBLISHED_TOKENS = 128 * 2048


class GBLM(ScoreMask):
    """Score |W_ij| · (‖X_j‖₂ + α‖g_ij‖_p); no weight is changed (Das et al., arXiv 2311.04902).

    g_ij holds one entry for each calibration sample: the gradient, with respect to W_ij, of the dense model's
    cross entropy, averaged over the sample's predicted tokens, as published.

    ‖X_j‖₂ is a sum over tokens and ‖g_ij‖_p one over samples, so that they grow at different rates, and the published
    α fits the published size alone: 128 samples of 2048 tokens. Both are therefore brought to that size,

        |W_ij| · (‖X_j‖₂ · √(128 · 2048 / tokens) + α‖g_ij‖_p · (128 / samples)^(1/p)),

    which is the published score at that size, and whose balance does not depend on the number of samples.

    Args:
        alpha: the gradient's share; at 0 this is Wanda.
        p: 1 (as published) or 2.
        backward: how the gradients come about: in "blocks", one after the other, with the hidden states on disk, or
            through the whole "model" at once, which needs the memory for it. The result is the same.
        granularity: "row" (as published) or "matrix": where a share of weights is counted.

    Raises:
        ValueError: with a sentence that names what would do.
    """

    statistic = InputNorm
    gradient = "model"

    def __init__(
        self,
        alpha: float = 100,
        p: int = 1,
        backward: Literal["blocks", "model"] = "blocks",
        granularity: Granularity = "row",
    ) -> None:
        super().__init__(granularity)
        if p not in (1, 2):
            raise ValueError(f"p '{p}' is neither 1 nor 2; give 1, as published, or 2")
        if backward not in ("blocks", "model"):
            raise ValueError(
                f"backward '{backward}' is neither 'blocks' nor 'model'; give 'blocks', which needs less memory"
            )
        self.alpha = _checked(alpha)
        self.p = p
        self.backward: Literal["blocks", "model"] = backward

    def score(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:  # noqa: D102
        gradient = statistics.gradients(self.p)
        inputs = statistics.norms.norm.to(weight.device) * math.sqrt(PUBLISHED_TOKENS / statistics.norms.tokens)
        scale: float = self.alpha * (PUBLISHED_SAMPLES / gradient.samples) ** (1 / self.p)
        return weight.abs() * (inputs + gradient.norm.to(weight.device) * scale)


class RegionalGradient(ScoreMask):
    """Score |W_ij| · (α · √(mean g_ij²) + ‖X_j‖₂ / √samples); no weight is changed (Wanda++, arXiv 2503.04992).

    g_ij holds one entry for each calibration sample: the gradient, with respect to W_ij, of the Euclidean norm of the
    dense block's output over all tokens and features of the sample. No pass through the whole model is needed. Both
    parts are means over samples, so that the balance does not depend on their number.

    Args:
        alpha: the gradient's share; at 0 this is Wanda.
        granularity: "row" (as published) or "matrix": where a share of weights is counted.

    Raises:
        ValueError: with a sentence that names what would do.
    """

    statistic = InputNorm
    gradient = "block"
    p = 2

    def __init__(self, alpha: float = 100, granularity: Granularity = "row") -> None:
        super().__init__(granularity)
        self.alpha = _checked(alpha)

    def score(self, weight: Tensor, statistics: LayerStatistics) -> Tensor:  # noqa: D102
        gradient = statistics.gradients(self.p)
        parts = self.alpha * gradient.norm.to(weight.device) + statistics.norms.norm.to(weight.device)
        return weight.abs() * (parts / math.sqrt(gradient.samples))


def _checked(alpha: float) -> float:
    if not 0 <= alpha < math.inf:  # nan included
        raise ValueError(f"alpha '{alpha}' is outside [0, inf); give the gradient's share, such as 100")
    return alpha
