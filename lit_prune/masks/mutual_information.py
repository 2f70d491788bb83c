"""Neurons that say the same: pruning by mutual information between an MLP's neurons.

Inspired by Huang, Song, Pao (arXiv 2406.00030): of two neurons that share much information one can go. The estimators
are that of Gaussian variables, and the matrix-based Rényi entropy (Sánchez Giraldo et al., arXiv 1211.2459).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from lit_prune import ranks
from lit_prune.masks.base import NeuronMask
from lit_prune.masks.statistics import Gram, LayerStatistics

PAIRS = 2048
"""Pairs of tokens whose kernels are multiplied at a time: all of them would take far more memory than the layer."""


class Activations(Gram):
    """What is needed of neurons' activations X, shape (tokens, in): the Gram matrix, the sums, and some tokens."""

    size = 512
    """How many tokens are kept, or all if fewer are seen."""

    def __init__(self, name: str = "a layer", before: int = 0) -> None:
        super().__init__(name, before)
        self._sums: Tensor | None = None
        self._kept: Tensor | None = None
        self._order = torch.empty(0, dtype=torch.float64)
        self._seen = before

    def _accumulate(self, inputs: Tensor) -> None:
        super()._accumulate(inputs)
        if self._sums is None or self._kept is None:
            self._sums = inputs.new_zeros(inputs.shape[1], dtype=torch.float64)
            self._kept = inputs[:0]
        self._sums += inputs.sum(0, dtype=torch.float64)
        # The tokens n with the least n·√2 mod 1. These are spread evenly over the text as well as over the places of a
        # sequence of any usual length, which every n-th token need not be: it might be first tokens alone.
        numbers = torch.arange(self._seen + 1, self._seen + len(inputs) + 1, dtype=torch.float64)
        self._seen += len(inputs)
        self._keep([self._order, numbers * math.sqrt(2) % 1], [self._kept, inputs])

    def _keep(self, orders: list[Tensor], tokens: list[Tensor]) -> None:
        """Those of some tokens, shape (tokens, in) each, that come first in an order, shape (tokens,) each."""
        order, chosen = torch.cat(orders).sort()
        together = torch.cat(tokens)
        self._order, self._kept = order[: self.size], together[chosen[: self.size].to(together.device)]

    def join(self) -> None:  # noqa: D102
        super().join()
        assert self._sums is not None
        assert self._kept is not None
        ranks.total(self._sums)
        orders, tokens = zip(*ranks.told_by_all((self._order, self._kept.cpu())), strict=True)
        self._keep([*orders], [part.to(self._sums.device) for part in tokens])

    @property
    def correlation(self) -> Tensor:
        """The correlation of every two neurons, float32, shape (in, in), exactly symmetric.

        A neuron that is constant, or dead, has correlation 0 with all others; so has one whose standard deviation is
        below 1 % of its root mean square, where sums in float32 are too coarse. All have 1 with themselves.

        Raises:
            RuntimeError: no token was seen.
        """
        matrix = self.matrix
        assert self._sums is not None
        mean = self._sums / self.tokens
        squares = matrix.diagonal().double() / self.tokens
        variance = squares - mean.square()
        scale = torch.where(variance > 1e-4 * squares, variance.rsqrt(), 0)
        correlation = torch.empty_like(matrix, dtype=torch.float32)
        for start in range(0, len(matrix), self.chunk):  # in float64 panel by panel, since matrices are large
            rows = slice(start, start + self.chunk)
            covariance = matrix[rows].double().div_(self.tokens).sub_(torch.outer(mean[rows], mean))
            correlation[rows] = covariance.mul_(torch.outer(scale[rows], scale)).clamp_(-1, 1)
        return correlation.fill_diagonal_(1)

    def sample(self, count: int) -> Tensor:
        """Up to `count` ≤ `size` tokens, evenly spread over all that were seen; shape (≤ count, in).

        Raises:
            RuntimeError: no token was seen.
        """
        self._require_tokens()
        assert self._kept is not None
        return self._kept[:count]


class MutualInformation(NeuronMask):
    """Of the two remaining neurons with the most mutual information, the one that passes less on goes; and again.

    This is what every threshold does, from the highest down to the one that meets the rate. What neuron k passes on to
    the layer that reads it is ‖X_k‖₂ · ‖W[:, k]‖₂. Neurons that pass on nothing go before all others.

    Args:
        estimator: "gaussian" (fast, sees linear dependence alone) or "renyi" (a kernel estimate, sees any).
        samples: the tokens that the kernel estimator uses.
        bandwidth: of the kernel, in units of Silverman's rule.
        slice: take the neurons out of the saved model for good, so that it is smaller, and not only set to zero.

    Raises:
        ValueError: an argument is out of range.
    """

    statistic = Activations
    derived = 1

    def __init__(
        self,
        estimator: Literal["gaussian", "renyi"] = "gaussian",
        samples: int = 128,
        bandwidth: float = 1.0,
        slice: bool = False,
    ) -> None:
        super().__init__(slice)
        if estimator not in ("gaussian", "renyi"):
            raise ValueError(f"estimator: '{estimator}' is unknown; give 'gaussian' or 'renyi'")
        if not 2 <= samples <= Activations.size:
            raise ValueError(
                f"samples: {samples} is outside [2, {Activations.size}]; give a number of tokens such as 128"
            )
        if not 0 < bandwidth < math.inf:  # nan included
            raise ValueError(f"bandwidth: {bandwidth} is not positive and finite; give a factor such as 1.0")
        self.estimator = estimator
        self.samples = samples
        self.bandwidth = bandwidth

    def keep(self, weight: Tensor, statistics: LayerStatistics, count: int) -> Tensor:
        """Choose the neurons that stay; see `NeuronMask.keep`.

        Raises:
            TypeError: the activations were not observed.
        """
        activations = statistics.inputs
        if not isinstance(activations, Activations):
            raise TypeError(f"the method needs a layer's activations, but was given {activations!r}")
        if self.estimator == "gaussian":
            information = gaussian_information(activations.correlation)
        else:
            information = renyi_information(activations.sample(self.samples), self.bandwidth)
        # in float64, where no product of two float32 numbers becomes 0
        passed_on = activations.norm.double() * torch.linalg.vector_norm(weight.double(), dim=0).to(information.device)
        return remove_redundant(information, passed_on, count).to(weight.device)


def gaussian_information(correlation: Tensor) -> Tensor:
    """The mutual information −½ log₂(1 − r²) of every two neurons, were they jointly Gaussian.

    Args:
        correlation: r, shape (neurons, neurons).

    Returns:
        Bits, shape (neurons, neurons); at most 12, since float32 knows no correlation nearer to 1 but 1 itself.
    """
    # not 1 − r², which has lost most digits where r is near 1
    return (1 - correlation).mul_(1 + correlation).clamp_(min=2**-24).log2_().mul_(-0.5)


def renyi_information(sample: Tensor, bandwidth: float) -> Tensor:
    """The mutual information S(A) + S(B) − S(A∘B / tr(A∘B)) of every two neurons by Rényi's entropy of order 2.

    A = K / tr K of a neuron's kernel matrix K(s, t) = exp(−(x_s − x_t)² / 2σ²), and S(A) = −log₂ tr(A²). Sigma is
    the bandwidth times Silverman's rule (4/3)^⅕ · (standard deviation) · tokens^(−⅕). Since K has a unit diagonal,
    tr(A²) = (tokens + 2 Σ_{s<t} K²) / tokens², for two neurons with K_a² K_b² in place of K².

    Args:
        sample: activations, shape (tokens, neurons); a constant neuron shares no information with any.
        bandwidth: factor on sigma.

    Returns:
        Bits, float32, exactly symmetric, shape (neurons, neurons).
    """
    tokens = len(sample)
    # in float64, where the deviation of equal numbers is exactly 0
    centred = sample.double() - sample.double().mean(0)
    deviation = centred.square().sum(0).div(max(tokens - 1, 1)).sqrt()
    sigma = bandwidth * (4 / 3 / tokens) ** 0.2 * deviation
    points = torch.where(sigma > 0, centred / sigma, 0).float()
    own, joint = points.new_zeros(points.shape[1]), points.new_zeros(points.shape[1], points.shape[1])
    for one, other in torch.split(torch.triu_indices(tokens, tokens, 1, device=sample.device), PAIRS, dim=1):
        # K∘K above the diagonal, (pairs, neurons); smaller numbers would make products subnormal, and ten times as slow
        squares = points[one].sub_(points[other]).square_().clamp_(max=40).neg_().exp_()
        own += squares.sum(0)
        joint.addmm_(squares.T, squares)
    joint = joint.triu_() + joint.triu(1).T  # a product need not be symmetric to the last bit
    log_joint = joint.mul_(2).add_(tokens).div_(tokens**2).log2_()
    log_own = own.mul_(2).add_(tokens).div_(tokens**2).log2_()
    return log_joint.sub_(log_own[:, None] + log_own)


def remove_redundant(information: Tensor, passed_on: Tensor, count: int) -> Tensor:
    """Remove neurons one by one: always the one that passes less on, of the remaining two that share the most.

    Args:
        information: of every two neurons, symmetric, shape (neurons, neurons); its diagonal does not matter.
        passed_on: what each neuron contributes, shape (neurons,); those with 0 go before all others.
        count: how many go, fewer than there are.

    Returns:
        Bool, shape (neurons,), True = kept, with exactly `count` False. Of pairs that tie the first goes on, in the
        order of their lower and then their higher index; of neurons that tie the one of the higher index goes.
    """
    dead = (passed_on == 0).nonzero().flatten()
    dead = dead[max(len(dead) - count, 0) :]
    gone = torch.zeros_like(passed_on, dtype=torch.bool)
    gone[dead] = True
    # the best partner of every neuron, the first of those that tie; only on the diagonal may one be its own
    information = information.clone().fill_diagonal_(-math.inf)
    information[:, dead] = -math.inf
    best, partner = information.max(1)
    best[dead] = -math.inf
    for _ in range(count - len(dead)):
        first = best.argmax()
        second = partner[first]
        loser = torch.where(passed_on[first] < passed_on[second], first, second)
        gone[loser] = True
        best[loser] = -math.inf
        information[:, loser] = -math.inf
        bereft = ((partner == loser) & ~gone).nonzero().flatten()
        best[bereft], partner[bereft] = information[bereft].max(1)
    return ~gone
