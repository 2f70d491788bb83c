"""SparseGPT against optimal brain surgery column by column, with the whole inverse Hessian, in float64."""

import logging
import math
import re
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.masks import Gram, LayerStatistics, Pruned, SparseGPT, Sparsity, factorisation, sparsegpt
from lit_prune.masks.factorisation import cholesky

F64 = torch.float64
SHARES = ("0", "0.29", "0.5", "0.8", "0.999")
PATTERNS = ("2:4", "1:4", "4:8", "5:7", "1:2")
KINDS = ("plain", "correlated", "scaled", "dead", "copied", "few")

seeds = st.integers(0, 2**32 - 1)


def draw_inputs(seed: int, width: int, kind: str) -> Tensor:
    """Inputs in float32, shape (tokens, width)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = max(1, width // 3) if kind == "few" else 2 * width + 5
    x = torch.randn(tokens, width, generator=generator)
    if kind != "plain":
        x = x + torch.randn(tokens, 3, generator=generator) @ torch.randn(3, width, generator=generator)
    if kind == "scaled":
        x = x * torch.logspace(-1, 1, width)
    if kind == "dead":
        x[:, 1::3] = 0
    if kind == "copied":
        x[:, 1::3] = x[:, 0::3][:, : x[:, 1::3].shape[1]]
    return x


def draw_weight(seed: int, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed ^ 1))


def known_of(inputs: Tensor, name: str = "the layer") -> LayerStatistics:
    gram = Gram(name)
    gram.add(inputs)
    return LayerStatistics(gram)


def surgery(weight: Tensor, inputs: Tensor, sparsity: str, block_size: int, dampening: float) -> Pruned:
    """Go through the columns; the inverse Hessian of those that remain is kept up to date as a whole."""
    x, w = inputs.double(), weight.double().clone()
    rows, width = w.shape
    hessian = 2 * x.T @ x / len(x)
    for j in range(width):
        if not x[:, j].any():
            hessian[j, j] = 1
            w[:, j] = 0
    hessian = hessian + dampening * hessian.diagonal().mean() * torch.eye(width, dtype=F64)
    inverse = torch.linalg.inv(hessian)
    # H⁻¹ of the columns from j on, for every j: it does not depend on the weights
    remaining = []
    for j in range(width):
        remaining.append(inverse)
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    mask = torch.ones(rows, width, dtype=torch.bool)
    n, m = map(int, sparsity.split(":")) if ":" in sparsity else (0, block_size)
    for j in range(width):
        if j % m == 0:
            columns = range(j, min(j + m, width))
            cost = torch.stack([w[:, c] ** 2 / remaining[c][c, c] for c in columns], 1)
            for group, chosen in [(row, cost[row]) for row in range(rows)] if n else [(slice(None), cost.flatten())]:
                zeros = m - n if n else math.floor(Fraction(sparsity) * chosen.numel())
                kept = torch.ones(chosen.numel(), dtype=torch.bool)
                kept[chosen.argsort()[:zeros]] = False
                mask[group, columns[0] : columns[-1] + 1] = kept.reshape(-1 if n else rows, len(columns)).squeeze(
                    0 if n else ()
                )
        error = torch.where(mask[:, j], 0.0, w[:, j]) / remaining[j][j, j]
        w[:, j:] -= torch.outer(error, remaining[j][j, j:])
    return Pruned(w * mask, mask)


def output_error(weight: Tensor, dense: Tensor, inputs: Tensor) -> float:
    return float((inputs.double() @ (weight.double() - dense.double()).T).square().sum())


def check_counts(mask: Tensor, sparsity: str, block_size: int) -> None:
    """Exactly so many zeros in every block of columns, or in every group."""
    assert mask.dtype == torch.bool
    gone = ~mask
    if ":" in sparsity:
        n, m = map(int, sparsity.split(":"))
        assert bool((gone.unflatten(1, (-1, m)).sum(2) == m - n).all())
        return
    for block in gone.split(block_size, dim=1):
        assert int(block.sum()) == math.floor(Fraction(sparsity) * block.numel())


@st.composite
def problems(draw_from: st.DrawFn) -> tuple[int, int, int, str, str]:
    """A seed, rows, columns, a kind of inputs and a sparsity that fits."""
    sparsity = draw_from(st.sampled_from(SHARES + PATTERNS))
    width = draw_from(st.integers(1, 45))
    if ":" in sparsity:
        m = int(sparsity.split(":")[1])
        width = m * math.ceil(width / m)
    return draw_from(seeds), draw_from(st.integers(1, 6)), width, draw_from(st.sampled_from(KINDS)), sparsity


@given(problems(), st.sampled_from([1, 2, 7, 16, 128]), st.sampled_from([0.01, 0.1, 1.0]))
@settings(max_examples=80)
@example((0, 5, 45, "correlated", "0.5"), 7, 0.01)
@example((0, 5, 44, "correlated", "2:4"), 7, 0.01)
@example((0, 5, 150, "correlated", "0.5"), 128, 0.01)
@example((0, 3, 136, "correlated", "4:8"), 128, 0.01)
@example((0, 4, 45, "few", "0.5"), 16, 0.01)
@example((0, 4, 45, "dead", "0.5"), 16, 0.01)
@example((0, 1, 1, "plain", "0.5"), 1, 0.01)
def test_sparsegpt_is_optimal_brain_surgery(
    problem: tuple[int, int, int, str, str], block_size: int, dampening: float
) -> None:
    seed, rows, width, kind, sparsity = problem
    inputs, weight = draw_inputs(seed, width, kind).double(), draw_weight(seed, rows, width).double()
    before = weight.clone()
    pruned = SparseGPT(block_size, dampening).prune(weight, known_of(inputs), Sparsity(sparsity))
    expected = surgery(weight, inputs, sparsity, block_size, dampening)
    assert torch.equal(weight, before)
    check_counts(pruned.mask, sparsity, block_size)
    dead = ~inputs.any(0)  # all weights of dead inputs are equal, namely zero, so that any of them may go
    assert torch.equal(pruned.mask[:, ~dead], expected.mask[:, ~dead])
    torch.testing.assert_close(pruned.weight, expected.weight, rtol=1e-7, atol=1e-8)
    assert not pruned.weight[:, dead].any()
    assert not pruned.weight[~pruned.mask].any()
    assert pruned.weight.dtype == F64


@pytest.mark.parametrize("sparsity", ["0.6", "2:4", "5:7", "16:32"])
@pytest.mark.parametrize("block_size", [7, 50, 128, 1000])
def test_sparsegpt_in_small_leaves(sparsity: str, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3 columns instead of 16, so that a block is cut in halves of halves often."""
    width = 224 if ":" in sparsity else 211
    inputs, weight = draw_inputs(3, width, "correlated").double(), draw_weight(3, 9, width).double()
    known, share = known_of(inputs), Sparsity(sparsity)
    method = SparseGPT(block_size)
    large = method.prune(weight, known, share)
    monkeypatch.setattr(sparsegpt, "LEAF", 3)
    small = method.prune(weight, known, share)
    expected = surgery(weight, inputs, sparsity, block_size, 0.01)
    for pruned in (large, small):
        assert torch.equal(pruned.mask, expected.mask)
        torch.testing.assert_close(pruned.weight, expected.weight, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("leaf", [2, 16, 128])
def test_a_pattern_does_not_depend_on_the_block(leaf: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparsegpt, "LEAF", leaf)
    inputs, weight = draw_inputs(5, 96, "correlated").double(), draw_weight(5, 6, 96).double()
    known = known_of(inputs)
    first, *others = (SparseGPT(size).prune(weight, known, Sparsity("3:8")) for size in (128, 1, 5, 17, 24))
    for other in others:
        assert torch.equal(other.mask, first.mask)
        torch.testing.assert_close(other.weight, first.weight, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_weights_of_less_precision(dtype: torch.dtype, kind: str, sparsity: str) -> None:
    inputs, weight = draw_inputs(7, 60, kind).to(dtype), draw_weight(7, 24, 60).to(dtype)
    before = weight.clone()
    pruned = SparseGPT(block_size=20).prune(weight, known_of(inputs), Sparsity(sparsity))
    assert torch.equal(weight, before)
    assert pruned.weight.dtype == dtype
    assert not pruned.weight[~pruned.mask].any()
    check_counts(pruned.mask, sparsity, 20)
    expected = surgery(weight, inputs, sparsity, 20, 0.01)
    error, best = (output_error(w, weight, inputs) for w in (pruned.weight, expected.weight))
    masked = output_error(weight * expected.mask, weight, inputs)
    assert best < 0.9 * masked  # or it would say little that the two errors are close
    assert error == pytest.approx(best, rel=0.1 if dtype == torch.bfloat16 else 0.01, abs=1e-3 * masked)


CONSTANTS = {
    "ones": lambda rows, width: torch.ones(rows, width),
    "zeros": lambda rows, width: torch.zeros(rows, width),
    "of three values": lambda rows, width: torch.randint(-1, 2, (rows, width)).float(),
}


@pytest.mark.parametrize("make", CONSTANTS.values(), ids=CONSTANTS.keys())
@pytest.mark.parametrize("inputs", ["one-hot", "all dead", "all the same"])
@pytest.mark.parametrize("sparsity", ["0.29", "0.5", "0.999", "2:4", "5:7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_are_exact_where_all_costs_are_equal(
    make: Callable[[int, int], Tensor], inputs: str, sparsity: str, dtype: torch.dtype
) -> None:
    width = 28
    x = {"one-hot": torch.eye(width), "all dead": torch.zeros(9, width), "all the same": torch.ones(9, width)}[inputs]
    weight = make(5, width).to(dtype)
    for block_size in (1, 10, 128):
        pruned = SparseGPT(block_size).prune(weight, known_of(x), Sparsity(sparsity))
        check_counts(pruned.mask, sparsity, block_size)
        assert not pruned.weight[~pruned.mask].any()
        assert bool(pruned.weight.isfinite().all())
        if inputs == "one-hot":  # no column can make up for another
            assert torch.equal(pruned.weight, weight * pruned.mask)
        if inputs == "all dead":
            assert not pruned.weight.any()


@pytest.mark.parametrize("sparsity", ["0.2", "0.5", "2:4"])
def test_weights_of_dead_inputs_are_zero_and_go_first(sparsity: str) -> None:
    inputs, weight = draw_inputs(9, 24, "plain"), draw_weight(9, 5, 24)
    dead = torch.arange(24) % 4 == 2
    inputs[:, dead] = 0
    weight[:, dead] *= 100
    pruned = SparseGPT().prune(weight, known_of(inputs), Sparsity(sparsity))
    assert not pruned.weight[:, dead].any()
    if sparsity == "0.2":  # fewer go than are dead
        assert bool(pruned.mask[:, ~dead].all())
        torch.testing.assert_close(pruned.weight[:, ~dead], weight[:, ~dead])
    else:
        assert not pruned.mask[:, dead].any()


def test_sparsity_zero_changes_nothing() -> None:
    inputs, weight = draw_inputs(1, 20, "correlated"), draw_weight(1, 4, 20)
    pruned = SparseGPT(7).prune(weight, known_of(inputs), Sparsity("0"))
    assert torch.equal(pruned.weight, weight)
    assert bool(pruned.mask.all())


def test_the_number_of_tokens_does_not_matter() -> None:
    """Neither the mean nor the sum over tokens is what counts: dampening is relative."""
    inputs, weight = draw_inputs(2, 30, "correlated").double(), draw_weight(2, 6, 30).double()
    once, thrice = (SparseGPT(8).prune(weight, known_of(x), Sparsity("0.5")) for x in (inputs, inputs.repeat(3, 1)))
    assert torch.equal(once.mask, thrice.mask)
    torch.testing.assert_close(once.weight, thrice.weight)


SINGULAR = {
    "one token": lambda: torch.randint(-3, 4, (1, 24)).float() + 0.5,
    "fewer tokens than inputs": lambda: draw_inputs(0, 24, "few"),
    "pairs": lambda: draw_inputs(0, 12, "plain").repeat_interleave(2, dim=1),
}


@pytest.mark.parametrize("make", SINGULAR.values(), ids=SINGULAR.keys())
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_a_singular_hessian_is_dampened_more(
    make: Callable[[], Tensor], dtype: torch.dtype, scale: float, sparsity: str, caplog: pytest.LogCaptureFixture
) -> None:
    inputs, weight = make().to(dtype) * scale, draw_weight(4, 6, 24).to(dtype)
    known = known_of(inputs, "model.layers.3.mlp.up_proj")
    with caplog.at_level(logging.WARNING):
        pruned = SparseGPT(dampening=0).prune(weight, known, Sparsity(sparsity))
    check_counts(pruned.mask, sparsity, 128)
    assert bool(pruned.weight.isfinite().all())
    (message,) = caplog.messages
    said = re.fullmatch(
        r"model\.layers\.3\.mlp\.up_proj: nearly singular Gram matrix, dampening raised to (\S+)", message
    )
    assert said is not None
    raised = float(said[1])
    assert raised in [pytest.approx(10.0**power) for power in range(-6, -1)]
    # and that is what was done
    again = SparseGPT(dampening=raised).prune(weight, known, Sparsity(sparsity))
    assert torch.equal(again.mask, pruned.mask)
    assert torch.equal(again.weight, pruned.weight)


def test_a_sound_hessian_is_not_dampened_more(caplog: pytest.LogCaptureFixture) -> None:
    for dampening in (0, 1e-9, 0.01):
        SparseGPT(dampening=dampening).prune(torch.ones(2, 8), known_of(torch.eye(8)), Sparsity("0.5"))
    assert not caplog.messages


def test_dampening_is_raised_tenfold_from_what_was_given(caplog: pytest.LogCaptureFixture) -> None:
    indefinite = torch.diag(torch.tensor([4.0, 2.0, -0.1], dtype=F64))  # of mean 1.97
    factor = cholesky(indefinite, 0.003, "one")
    unit = float(indefinite.diagonal().mean())
    torch.testing.assert_close(factor @ factor.T, indefinite + 0.3 * unit * torch.eye(3, dtype=F64))
    assert caplog.messages == ["one: nearly singular Gram matrix, dampening raised to 0.3"]
    torch.testing.assert_close(indefinite.diagonal(), torch.tensor([4.0, 2.0, -0.1], dtype=F64))


@pytest.mark.parametrize("width", [1, 2, 255, 256, 257, 600])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_factor_made_in_panels(width: int, dtype: torch.dtype) -> None:
    inputs = draw_inputs(width, width, "correlated").to(dtype)
    gram = inputs.T @ inputs
    before = gram.clone()
    factor = cholesky(gram, 0.01, "one")
    dampened = before.double() + 0.01 * before.double().diagonal().mean() * torch.eye(width, dtype=F64)
    expected = torch.linalg.cholesky(dampened)
    assert (factor - expected).norm() < (1e-13 if dtype == F64 else 1e-4) * expected.norm()
    assert torch.equal(factor, factor.tril())
    assert torch.equal(gram, before)


@pytest.mark.parametrize("panel", [1, 3, 4])
@pytest.mark.parametrize("at", [0, 5, 11])
def test_the_dampening_is_raised_whichever_panel_fails(
    panel: int, at: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(factorisation, "PANEL", panel)
    indefinite = torch.eye(12, dtype=F64)
    indefinite[at, at] = -0.05
    factor = cholesky(indefinite, 0, "one")
    unit = float(indefinite.diagonal().mean())
    torch.testing.assert_close(factor @ factor.T, indefinite + 0.1 * unit * torch.eye(12, dtype=F64))
    assert caplog.messages == ["one: nearly singular Gram matrix, dampening raised to 0.1"]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_factoring_a_matrix_of_zeros_ends(dtype: torch.dtype) -> None:
    assert bool(cholesky(torch.zeros(3, 3, dtype=dtype), 0.01, "one").isfinite().all())


def test_factoring_a_matrix_of_very_large_entries_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry is finite, but their sum is not."""
    calls, factor = [], torch.linalg.cholesky_ex

    def counted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(matrix)
        assert len(calls) < 100, "the dampening is raised again and again"
        return factor(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    large = 2e38 * torch.eye(4)
    factored = cholesky(large, 0.01, "one")
    torch.testing.assert_close(factored, (1.01 * large).sqrt())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dead", [False, True])
def test_inputs_that_are_no_numbers(bad: float, dead: bool) -> None:
    inputs = draw_inputs(0, 12, "dead" if dead else "plain")
    inputs[2, 5] = bad
    sentence = "the Gram matrix of model.layers.0.fc1 holds NaN or infinite values"
    with pytest.raises(FloatingPointError, match="^" + re.escape(sentence) + "$"):
        SparseGPT().prune(torch.ones(2, 12), known_of(inputs, "model.layers.0.fc1"), Sparsity("0.5"))


def test_a_pattern_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="sparsity 2:4: 4 does not divide 10 inputs"):
        SparseGPT().prune(torch.ones(2, 10), known_of(torch.eye(10)), Sparsity("2:4"))


@given(seeds, st.sampled_from(KINDS), st.sampled_from(["0.5", "2:4"]))
@settings(max_examples=20)
def test_the_update_is_worth_it(seed: int, kind: str, sparsity: str) -> None:
    inputs, weight = draw_inputs(seed, 24, kind), draw_weight(seed, 16, 24)
    assume(kind != "plain")
    pruned = SparseGPT(8).prune(weight, known_of(inputs), Sparsity(sparsity))
    assert output_error(pruned.weight, weight, inputs) < 0.9 * output_error(weight * pruned.mask, weight, inputs)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SparseGPT(block_size=0), "block_size 0 does not fit; give 1 or more, such as 128"),
        (lambda: SparseGPT(dampening=-0.01), "dampening -0.01 does not fit; give 0 or more, such as 0.01"),
        (lambda: SparseGPT(dampening=math.nan), "dampening nan does not fit; give 0 or more, such as 0.01"),
    ],
)
def test_parameters_out_of_range(make: Callable[[], SparseGPT], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence) + "$"):
        make()


def test_the_usual_settings() -> None:
    assert vars(SparseGPT()) == {"block_size": 128, "dampening": 0.01}
