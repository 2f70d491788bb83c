"""Every mask method against a slow and obvious statement of its definition."""

import math
import re
from decimal import Decimal
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.masks import (
    Granularity,
    InputNorm,
    LayerMask,
    LayerStatistics,
    Magnitude,
    Pruned,
    Random,
    Sparsity,
    Wanda,
    bits,
)
from lit_prune.masks.statistics import NOTHING

SHARES = ("0", "0.29", "0.5", "0.6", "0.999")
PATTERNS = ("1:4", "2:4", "3:4", "4:8", "16:32", "1:2", "5:7")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

seeds = st.integers(0, 2**32 - 1)
granularities = st.sampled_from(get_args(Granularity))


def groups_of(matrix: Tensor, sparsity: str, granularity: str) -> list[tuple[list[float], int]]:
    """The entries that are compared with each other, and how many of them are to go."""
    rows = matrix.double().tolist()
    if ":" in sparsity:
        n, m = map(int, sparsity.split(":"))
        return [(row[start : start + m], m - n) for row in rows for start in range(0, len(row), m)]
    if granularity == "matrix":
        rows = [[entry for row in rows for entry in row]]
    return [(row, math.floor(Decimal(sparsity) * len(row))) for row in rows]


def check_mask(mask: Tensor, score: Tensor, sparsity: str, granularity: str, slack: float = 0.0) -> None:
    """In every group exactly so many go, and none that goes scores higher than one that stays."""
    assert mask.dtype == torch.bool
    assert mask.shape == score.shape
    kept_groups = groups_of(mask, sparsity, granularity)
    for (kept, _), (scores, zeros) in zip(kept_groups, groups_of(score, sparsity, granularity), strict=True):
        assert kept.count(0) == zeros
        gone = [s for s, k in zip(scores, kept, strict=True) if not k]
        stay = [s for s, k in zip(scores, kept, strict=True) if k]
        assert not gone or max(gone) <= min(stay) * (1 + slack)


def check_weights(pruned: Pruned, weight: Tensor) -> None:
    """What stays is bit for bit what it was."""
    assert pruned.weight.dtype == weight.dtype
    assert torch.equal(pruned.weight[pruned.mask], weight[pruned.mask])
    assert not pruned.weight[~pruned.mask].any()


def draw(seed: int, rows: int, columns: int, dtype: torch.dtype, distinct: bool) -> Tensor:
    """Random weights; if not distinct, of so few values that nearly all of them are equal to others."""
    generator = torch.Generator().manual_seed(seed)
    if distinct:
        return torch.randn(rows, columns, generator=generator).to(dtype)
    return torch.randint(-1, 2, (rows, columns), generator=generator).to(dtype)


@st.composite
def problems(draw_from: st.DrawFn) -> tuple[Tensor, str, str]:
    """Weights, a sparsity that fits them, and a granularity."""
    sparsity = draw_from(st.sampled_from(SHARES + PATTERNS))
    columns = draw_from(st.integers(1, 70))
    if ":" in sparsity:
        m = int(sparsity.split(":")[1])
        columns = m * math.ceil(columns / m)
    weight = draw(
        draw_from(seeds),
        draw_from(st.integers(1, 9)),
        columns,
        draw_from(st.sampled_from(DTYPES)),
        draw_from(st.booleans()),
    )
    return weight, sparsity, draw_from(granularities)


@given(problems())
@example((torch.full((3, 100), 0.5), "0.29", "row"))
@example((torch.zeros(4, 7), "5:7", "row"))
@example((torch.ones(1, 1), "0.999", "matrix"))
def test_magnitude_removes_the_smallest_weights(problem: tuple[Tensor, str, Granularity]) -> None:
    weight, sparsity, granularity = problem
    before = weight.clone()
    pruned = Magnitude(granularity).prune(weight, NOTHING, Sparsity(sparsity))
    check_mask(pruned.mask, weight.abs(), sparsity, granularity)
    check_weights(pruned, weight)
    assert torch.equal(weight, before)


@given(problems(), seeds)
def test_wanda_removes_the_smallest_products_with_the_input_norms(
    problem: tuple[Tensor, str, Granularity], seed: int
) -> None:
    weight, sparsity, granularity = problem
    inputs = torch.randn(2, 5, weight.shape[1], generator=torch.Generator().manual_seed(seed)).to(weight.dtype)
    norm = InputNorm()
    norm.add(inputs)
    tokens = inputs.flatten(0, 1).double().tolist()
    norms = [math.sqrt(sum(token[j] ** 2 for token in tokens)) for j in range(weight.shape[1])]
    score = torch.tensor(
        [[abs(w) * n for w, n in zip(row, norms, strict=True)] for row in weight.double().tolist()], dtype=torch.float64
    )
    pruned = Wanda(granularity).prune(weight, LayerStatistics(norm), Sparsity(sparsity))
    check_mask(pruned.mask, score, sparsity, granularity, slack=1e-6)
    check_weights(pruned, weight)


@given(problems(), seeds)
def test_random_removes_exactly_the_share(problem: tuple[Tensor, str, Granularity], seed: int) -> None:
    weight, sparsity, granularity = problem
    masks = []
    for value in (seed, seed, seed ^ 1):
        torch.manual_seed(value)
        pruned = Random(granularity).prune(weight, NOTHING, Sparsity(sparsity))
        check_mask(pruned.mask, torch.zeros_like(weight), sparsity, granularity)
        check_weights(pruned, weight)
        masks.append(pruned.mask)
    assert torch.equal(masks[0], masks[1])


def test_random_depends_on_the_seed() -> None:
    masks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        masks.append(Random().prune(torch.ones(8, 32), NOTHING, Sparsity(0.5)).mask)
    assert not torch.equal(*masks)


def norms(*values: float) -> InputNorm:
    """A statistic of exactly these norms."""
    norm = InputNorm()
    norm.add(torch.tensor([[values]]))
    return norm


@pytest.mark.parametrize(
    ("method", "sparsity", "expected"),
    [
        (Magnitude(), "0.5", [[1, 1, 1, 1], [0, 0, 0, 0]]),
        (Magnitude("row"), "0.5", [[1, 0, 0, 1], [0, 1, 1, 0]]),
        (Magnitude(), "1:2", [[1, 0, 0, 1], [0, 1, 1, 0]]),
        (Magnitude(), "3:4", [[1, 0, 1, 1], [0, 1, 1, 1]]),
        (Wanda(), "0.5", [[1, 1, 0, 0], [0, 1, 1, 0]]),
        (Wanda("matrix"), "0.25", [[1, 1, 1, 1], [0, 1, 1, 0]]),
        (Wanda(), "1:4", [[1, 0, 0, 0], [0, 1, 0, 0]]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LayerMask) else str(value),
)
def test_worked_examples(method: LayerMask, sparsity: str, expected: list[list[int]]) -> None:
    weight = torch.tensor([[-8.0, 5.0, 6.0, -7.0], [1.0, -4.0, 3.0, 2.0]])
    # Wanda's scores: 16, 20, 12, 7 and 2, 16, 6, 2
    statistic = norms(2, 4, 2, 1) if sparsity != "1:4" else norms(4, 4, 2, 1)
    mask = method.prune(weight, LayerStatistics(statistic), Sparsity(sparsity)).mask
    assert mask.int().tolist() == expected


def test_the_usual_granularity_of_each_method() -> None:
    assert Magnitude().granularity == "matrix"
    assert Wanda().granularity == "row"
    assert Random().granularity == "row"


@pytest.mark.parametrize("sparsity", ["0.1", "0.25", "0.5", "3:4", "2:4"])
def test_dead_inputs_go_first_under_wanda(sparsity: str) -> None:
    dead = torch.arange(16) % 4 == 1
    norm = InputNorm()
    norm.add(torch.randn(2, 8, 16) * ~dead)
    weight = torch.randn(6, 16) + 100 * dead  # the largest weights, which no input ever reaches
    gone = ~Wanda().prune(weight, LayerStatistics(norm), Sparsity(sparsity)).mask
    for row in gone:
        assert bool((dead | ~row).all() if int(row.sum()) <= 4 else row[dead].all())


@given(
    seeds,
    st.integers(1, 6),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 5), max_size=6),
)
@settings(max_examples=60)
def test_input_norm_for_any_split_into_batches(
    seed: int, samples: int, tokens: int, width: int, dtype: torch.dtype, sizes: list[int]
) -> None:
    inputs = torch.randn(samples, tokens, width, generator=torch.Generator().manual_seed(seed)).mul(30).to(dtype)
    whole, split = InputNorm(), InputNorm()
    whole.add(inputs)
    cuts = sorted({min(sum(sizes[:i]), samples) for i in range(len(sizes) + 1)} | {samples})
    for start, stop in pairwise(cuts):
        split.add(inputs[start:stop])
    assert torch.equal(whole.norm, split.norm)
    assert whole.norm.shape == (width,)
    assert whole.norm.dtype == torch.float32
    exact = torch.tensor([math.sqrt(math.fsum(x * x for x in c)) for c in inputs.double().flatten(0, 1).T.tolist()])
    torch.testing.assert_close(whole.norm, exact, rtol=1e-5, atol=0)


def test_input_norm_of_a_long_text() -> None:
    inputs = torch.randn(2, 8192, 8) * torch.logspace(-3, 3, 8) + 1
    norm = InputNorm()
    norm.add(inputs)
    exact = inputs.double().square().sum((0, 1)).sqrt()
    torch.testing.assert_close(norm.norm.double(), exact, rtol=1e-5, atol=0)


def test_input_norm_of_nothing() -> None:
    with pytest.raises(RuntimeError, match="no calibration input"):
        _ = InputNorm().norm


@pytest.mark.parametrize(
    ("text", "shown", "zeros"),
    [
        ("0.5", "0.5", 50),
        (0.5, "0.5", 50),
        (" 0.29 ", "0.29", 29),  # 100 * 0.29 is 28.999999999999996 in floating point
        (0.57, "0.57", 57),
        ("0", "0.0", 0),
        (0, "0.0", 0),
        ("6e-1", "0.6", 60),
        ("2:4", "2:4", 50),
        (" 3:4 ", "3:4", 25),
        ("1:100", "1:100", 99),
    ],
)
def test_sparsities_that_are_accepted(text: str | float, shown: str, zeros: int) -> None:
    sparsity = Sparsity(text)
    assert str(sparsity) == shown
    assert repr(sparsity) == f"Sparsity('{shown}')"
    assert Sparsity(str(sparsity)) == sparsity
    assert hash(Sparsity(shown)) == hash(sparsity)
    assert sparsity.share * 100 == zeros
    assert int((~sparsity.select(torch.rand(3, 100))).sum()) == 3 * zeros


def test_a_pattern_is_not_the_share_it_amounts_to() -> None:
    assert Sparsity("2:4") != Sparsity("0.5")
    assert Sparsity("2:4") != Sparsity("4:8")
    assert Sparsity("0.5") != 0.5


OUTSIDE = "is outside [0, 1); give the share of weights to remove, such as 0.5"
NEITHER = "is neither a share of weights such as 0.5 nor a pattern such as 2:4"
NOT_KEPT = "does not keep n of every m inputs; give n:m with 0 < n < m, such as 2:4"
NO_NUMBERS = "is no pattern of two whole numbers; give n:m with 0 < n < m, such as 2:4"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        *((text, OUTSIDE) for text in ("1", "1.0", "-0.1", 1.5, "50", "nan", "inf", "-inf", math.nan, "1e999")),
        *((text, NEITHER) for text in ("half", "", "50%", "0,5", "1/2", "None", True)),
        *((text, NOT_KEPT) for text in ("2:1", "0:4", "4:4", "0:0")),
        *((text, NO_NUMBERS) for text in ("2:x", ":", "2:", ":4", "2:4:8", "-2:4", "1.5:4", "2 : 4")),
    ],
)
def test_sparsities_that_are_refused(text: str | float, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"'{text}' {sentence}") + "$"):
        Sparsity(text)


def test_a_pattern_that_does_not_fit() -> None:
    assert Sparsity("2:4").fits(8)
    assert not Sparsity("2:4").fits(10)
    assert Sparsity("0.5").fits(7)
    with pytest.raises(ValueError, match="sparsity 2:4: 4 does not divide 10 inputs"):
        Sparsity("2:4").select(torch.rand(2, 10))


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=3))
@example(0, [8])
@example(0, [1])
def test_masks_as_bits(seed: int, shape: list[int]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = bits.pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == np.packbits(mask.flatten().numpy(), bitorder="little").tolist()
    assert torch.equal(bits.unpack(packed, mask.shape), mask)


def test_a_transposed_mask_as_bits() -> None:
    mask = torch.rand(5, 7) < 0.5
    assert torch.equal(bits.unpack(bits.pack(mask.T), mask.T.shape), mask.T)
