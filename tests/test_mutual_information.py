"""Mutual information between neurons, its estimators and the removal, against their definitions pair by pair."""

import math
import re
import warnings
from collections.abc import Callable
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.masks import Gram, LayerStatistics
from lit_prune.masks.mutual_information import (
    Activations,
    MutualInformation,
    gaussian_information,
    remove_redundant,
    renyi_information,
)

seeds = st.integers(0, 2**32 - 1)


def neurons(seed: int, tokens: int, width: int) -> Tensor:
    """Activations with common parts, and if there is room: a constant, a dead, a copied, a flipped, a scaled neuron."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, 3, generator=generator) @ torch.randn(3, width, generator=generator)
    x = common + torch.randn(tokens, width, generator=generator) + torch.randn(width, generator=generator)
    if width >= 7:
        x[:, 1], x[:, 2], x[:, 4], x[:, 5], x[:, 6] = 0.7, 0.0, x[:, 3], -x[:, 3], 5 * x[:, 3] + 2
    return x


def observed(x: Tensor, kind: type[Activations] = Activations) -> Activations:
    statistic = kind()
    statistic.add(x[None])
    return statistic


def is_constant(x: np.ndarray) -> bool:
    return bool((x == x[0]).all())


def gaussian_of(a: np.ndarray, b: np.ndarray) -> float:
    """The mutual information of two Gaussian variables, in bits, by their entropies: determinants of covariances."""
    if is_constant(a) or is_constant(b):
        return 0.0
    cov = np.cov(np.stack([a, b]))
    determinant = np.linalg.det(cov)
    return min(12.0, 0.5 * math.log2(cov[0, 0] * cov[1, 1] / determinant)) if determinant > 0 else 12.0


def entropy(matrix: np.ndarray) -> float:
    normed = matrix / np.trace(matrix)
    return -math.log2(np.trace(normed @ normed))


def kernel(x: np.ndarray, bandwidth: float) -> np.ndarray:
    tokens = len(x)
    if is_constant(x):
        return np.ones((tokens, tokens))
    sigma = bandwidth * (4 / (3 * tokens)) ** 0.2 * np.std(x, ddof=1)
    return np.array([[math.exp(-((s - t) ** 2) / (2 * sigma**2)) for t in x] for s in x])


def renyi_of(a: np.ndarray, b: np.ndarray, bandwidth: float) -> float:
    """By the definition, with whole kernel matrices."""
    one, other = kernel(a, bandwidth), kernel(b, bandwidth)
    return entropy(one) + entropy(other) - entropy(one * other)


def check_information(information: Tensor, x: Tensor, pair: Callable[[np.ndarray, np.ndarray], float]) -> None:
    columns = x.double().numpy().T
    assert information.shape == (len(columns), len(columns))
    assert information.dtype == torch.float32
    assert torch.equal(information, information.T)
    for a, b in combinations(range(len(columns)), 2):
        # what float32 tells apart: 9 bits are a correlation of 0.999998, where 1e-6 more is a tenth of a bit
        expected = min(9.0, pair(columns[a], columns[b]))
        assert abs(min(9.0, float(information[a, b])) - expected) < 1e-5 + 1e-6 * 4**expected, (a, b)


@given(seeds, st.integers(2, 60), st.integers(1, 12))
@settings(max_examples=50)
@example(0, 1500, 9)
def test_gaussian_information_of_every_pair(seed: int, tokens: int, width: int) -> None:
    x = neurons(seed, tokens + 5, width)
    check_information(gaussian_information(observed(x).correlation), x, gaussian_of)


@given(seeds, st.integers(1, 25), st.integers(1, 9), st.sampled_from([0.3, 1.0, 4.0]))
@settings(max_examples=50)
@example(0, 1, 7, 1.0)
@example(0, 66, 3, 1.0)  # more pairs than are multiplied at a time
def test_renyi_information_of_every_pair(seed: int, tokens: int, width: int, bandwidth: float) -> None:
    x = neurons(seed, tokens, width)
    check_information(renyi_information(x, bandwidth), x, lambda a, b: renyi_of(a, b, bandwidth))


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 1e-12, 12345.678])
def test_a_constant_neuron_shares_no_information_by_its_rounding(value: float) -> None:
    for tokens in range(3, 130, 9):
        x = torch.stack([torch.randn(tokens), torch.full((tokens,), value)], 1)
        assert abs(float(renyi_information(x, 1.0)[0, 1])) < 1e-5


def test_neurons_that_are_the_same_up_to_sign_and_scale_share_the_most() -> None:
    x = neurons(0, 100, 12)
    for information in (gaussian_information(observed(x).correlation), renyi_information(x, 1.0)):
        information.fill_diagonal_(0)
        same = information[[3, 3, 3, 4, 4, 5], [4, 5, 6, 5, 6, 6]]
        torch.testing.assert_close(same, information.max().expand(6), rtol=0.05, atol=0)
        information[3:7, 3:7] = 0
        assert float(information.max()) < 0.6 * float(same.min())
        torch.testing.assert_close(information[1:3], torch.zeros(2, 12), rtol=0, atol=1e-5)


def test_gaussian_information_is_finite_and_grows_with_correlation() -> None:
    steps = torch.tensor([0.0, 0.5, 1 - 1e-6, 1 - 2**-24, 1.0])
    information = gaussian_information(torch.stack([steps, -steps]))
    expected = [0.0, -0.5 * math.log2(0.75), -0.5 * math.log2(1 - float(steps[2]) ** 2), 11.5, 12.0]
    torch.testing.assert_close(information, torch.tensor([expected, expected]), rtol=1e-6, atol=0)


def test_only_the_kernel_estimate_sees_dependence_that_is_not_linear() -> None:
    a = torch.linspace(-1, 1, 128)
    b = a[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    x = torch.stack([a, a.square(), b], 1)
    gaussian = gaussian_information(observed(x).correlation)
    assert float(gaussian[0, 1]) < 1e-4
    kernelled = renyi_information(x, 1.0)
    assert float(kernelled[0, 1]) > 5 * abs(float(kernelled[0, 2]))


def slowly_removed(information: list[list[float]], passed_on: list[float], count: int) -> set[int]:
    """The rule as it is said: look through all pairs that remain, again and again."""
    remaining = set(range(len(passed_on)))
    for k in sorted(remaining, reverse=True):
        if passed_on[k] == 0 and len(passed_on) - len(remaining) < count:
            remaining.remove(k)
    while len(passed_on) - len(remaining) < count:
        pairs = combinations(sorted(remaining), 2)
        a, b = max(pairs, key=lambda pair: (information[pair[0]][pair[1]], -pair[0], -pair[1]))
        remaining.remove(a if passed_on[a] < passed_on[b] else b)
    return set(range(len(passed_on))) - remaining


@st.composite
def removals(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Information and contributions of so few values that most are equal to others, 0 among them."""
    width = draw(st.integers(1, 14))
    values = draw(st.sampled_from([1, 3, 1000]))
    generator = torch.Generator().manual_seed(draw(seeds))
    information = torch.randint(-1, values, (width, width), generator=generator).float().triu(1)
    passed_on = torch.randint(0, draw(st.sampled_from([2, 4, 1000])), (width,), generator=generator).double()
    return information + information.T + torch.eye(width) * 2000, passed_on, draw(st.integers(0, width - 1))


@given(removals())
@settings(max_examples=400)
@example((torch.zeros(5, 5), torch.zeros(5).double(), 3))
@example((torch.zeros(5, 5), torch.ones(5).double(), 4))
def test_the_removal_against_a_loop_over_all_pairs(problem: tuple[Tensor, Tensor, int]) -> None:
    information, passed_on, count = problem
    before = information.clone()
    kept = remove_redundant(information, passed_on, count)
    assert kept.dtype == torch.bool
    assert int((~kept).sum()) == count
    gone = slowly_removed(information.tolist(), passed_on.tolist(), count)
    assert set((~kept).nonzero().flatten().tolist()) == gone
    assert torch.equal(information, before)


def test_removals_worked_by_hand() -> None:
    information = torch.zeros(5, 5)
    information[0, 1] = information[1, 0] = 3.0
    information[1, 2] = information[2, 1] = 2.0
    information[3, 4] = information[4, 3] = 1.0
    passed_on = torch.tensor([5.0, 4.0, 3.0, 2.0, 2.0])
    gone = [(~remove_redundant(information, passed_on, count)).nonzero().flatten().tolist() for count in range(5)]
    # 1 goes for 0; its bond with 2 is gone too; of 3 and 4, which pass on as much, 4; then no bond is left
    assert gone == [[], [1], [1, 4], [1, 2, 4], [1, 2, 3, 4]]


def reference_keep(x: Tensor, weight: Tensor, count: int, information: Tensor) -> list[bool]:
    columns, rows = x.double().numpy(), weight.double().numpy()
    passed_on = [float(np.linalg.norm(columns[:, k]) * np.linalg.norm(rows[:, k])) for k in range(x.shape[1])]
    gone = slowly_removed(information.tolist(), passed_on, count)
    return [k not in gone for k in range(x.shape[1])]


@given(seeds, st.integers(2, 40), st.integers(1, 12), st.data())
@settings(max_examples=60)
def test_the_neurons_kept(seed: int, tokens: int, width: int, data: st.DataObject) -> None:
    x = neurons(seed, tokens, width)
    weight = torch.randn(6, width, generator=torch.Generator().manual_seed(seed))
    weight[:, data.draw(st.lists(st.integers(0, width - 1), max_size=3))] = 0  # neurons that are never read
    before = weight.clone()
    count = data.draw(st.integers(0, width - 1))
    statistics = observed(x)
    kept = MutualInformation().keep(weight, LayerStatistics(statistics), count)
    assert kept.tolist() == reference_keep(x, weight, count, gaussian_information(statistics.correlation))
    kept = MutualInformation("renyi", 20, 0.7).keep(weight, LayerStatistics(statistics), count)
    assert kept.tolist() == reference_keep(x, weight, count, renyi_information(statistics.sample(20), 0.7))
    assert torch.equal(weight, before)


def test_a_copy_goes_before_a_dead_neurons_neighbour() -> None:
    x = neurons(0, 50, 9)
    weight = torch.ones(4, 9)
    for method in (MutualInformation(), MutualInformation("renyi", 32)):
        for count, gone in ((1, {2}), (4, {2, 3, 4, 5})):  # the dead one; then those that 6 says five times as loud
            kept = method.keep(weight, LayerStatistics(observed(x)), count)
            assert set((~kept).nonzero().flatten().tolist()) == gone


class Small(Activations):
    """With a small sample and small chunks, so that few tokens fill them many times."""

    chunk = 7
    size = 4


@given(seeds, st.integers(1, 200), st.lists(st.integers(1, 60), max_size=6), st.integers(1, 4))
@settings(max_examples=150)
def test_activations_for_any_split_into_batches(seed: int, tokens: int, sizes: list[int], count: int) -> None:
    x = neurons(seed, tokens, 7)
    whole, split = observed(x, Small), Small()
    cuts = sorted({min(sum(sizes[:i]), tokens) for i in range(len(sizes) + 1)} | {tokens})
    for start, stop in pairwise(cuts):
        split.add(x[start:stop])
    assert torch.equal(whole.correlation, split.correlation)
    assert torch.equal(whole.sample(count), split.sample(count))
    assert torch.equal(whole.matrix, split.matrix)
    assert torch.equal(whole.norm, split.norm)


@given(st.integers(1, 300), st.integers(1, 4), st.booleans())
def test_the_sample_of_a_text(tokens: int, count: int, read_early: bool) -> None:
    statistic = Small()
    for part in torch.arange(tokens).split(50):
        statistic.add(part[:, None].float())
        if read_early:
            statistic.sample(1)
    numbers = sorted(range(tokens), key=lambda n: math.modf((n + 1) * math.sqrt(2))[0])
    assert statistic.sample(count).flatten().tolist() == numbers[: min(count, tokens)]


@pytest.mark.parametrize("length", [64, 256, 768, 1000, 1024, 2048, 4096])
@pytest.mark.parametrize("sequences", [32, 128])
def test_the_sample_is_spread_over_the_text_and_over_the_places_of_a_sequence(length: int, sequences: int) -> None:
    """Every n-th token would be at few places of a sequence, where n and its length have much in common."""
    statistic = Activations()
    statistic.add(torch.arange(length * sequences)[:, None].float())
    numbers = statistic.sample(128).flatten().int()
    for values, total, slack in ((numbers, length * sequences, 3), (numbers % length, length, 16)):
        for eighth in range(8):
            below = int((values < (eighth + 1) * total / 8).sum())
            assert abs(below - 16 * (eighth + 1)) <= slack


@given(seeds, st.integers(1, 3000), st.sampled_from([0.0, 3.0, 30.0]))
@settings(max_examples=30)
def test_correlation(seed: int, tokens: int, offset: float) -> None:
    x = neurons(seed, tokens, 8)
    x[:, 7] += offset
    statistic, gram = observed(x), Gram()
    gram.add(x)
    assert torch.equal(statistic.matrix, gram.matrix)
    assert torch.equal(statistic.norm, gram.norm)
    correlation = statistic.correlation
    assert correlation.dtype == torch.float32
    assert torch.equal(correlation, correlation.T)
    with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
        expected = torch.from_numpy(np.atleast_2d(np.corrcoef(x.double().numpy().T)))
    constant = torch.tensor([is_constant(column) for column in x.T.numpy()])
    expected[constant] = expected[:, constant] = 0
    expected.fill_diagonal_(1)
    # what float32 leaves of a small variance beside a large mean
    torch.testing.assert_close(correlation.double(), expected, rtol=0, atol=1e-5 * (1 + offset**2))


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-20, 1e3])
def test_a_constant_neuron_is_independent_of_all_however_long_the_text(value: float) -> None:
    x = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0] = value
    correlation = observed(x).correlation
    assert torch.equal(correlation[0], correlation[:, 0])
    assert correlation[0].tolist() == pytest.approx([1, 0, 0], abs=1e-5)  # but for the rounding of the mean
    assert correlation[1, 2] != 0


@pytest.mark.parametrize("panel", [1, 3, 100])
def test_correlation_in_panels(panel: int) -> None:
    x = neurons(0, 50, 10)
    whole, parts = observed(x), observed(x)
    parts.panel = panel
    torch.testing.assert_close(whole.correlation, parts.correlation, rtol=0, atol=1e-6)


def test_activations_of_nothing() -> None:
    for read in (lambda s: s.correlation, lambda s: s.sample(3)):
        with pytest.raises(RuntimeError, match="no calibration input has reached fc2"):
            read(Activations("fc2"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        *(({"samples": n}, f"samples: {n} is outside [2, 512]; give a number of tokens such as 128") for n in (1, 513)),
        *(
            ({"bandwidth": value}, f"bandwidth: {value} is not positive and finite; give a factor such as 1.0")
            for value in (0, -1.5, math.nan, math.inf)
        ),
        ({"estimator": "knn"}, "estimator: 'knn' is unknown; give 'gaussian' or 'renyi'"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, float | str], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        MutualInformation(**arguments)


def test_the_limits_of_the_arguments() -> None:
    assert MutualInformation(samples=2).samples == 2
    assert MutualInformation(samples=Activations.size, bandwidth=1e-3).bandwidth == 1e-3


def test_a_statistic_that_is_not_enough() -> None:
    with pytest.raises(TypeError, match="needs a layer's activations"):
        MutualInformation().keep(torch.ones(2, 3), LayerStatistics(Gram()), 1)
