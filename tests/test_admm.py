"""ADMM and ALPS, which choose the mask as well, against their algorithms in float64 as they are written down."""

import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.masks import ADMM, ALPS, Gram, LayerMask, LayerStatistics, Pruned, Sparsity, Wanda, solvers

F64 = torch.float64
SHARES = ("0", "0.29", "0.5", "0.8", "0.999")
PATTERNS = ("2:4", "1:4", "4:8", "5:7")
KINDS = ("plain", "correlated", "scaled", "dead", "few")
METHODS = {
    "ADMM": ADMM(),
    "ADMM of the matrix": ADMM(granularity="matrix"),
    "ALPS": ALPS(),
    "ALPS of rows": ALPS(granularity="row"),
}

seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(KINDS)
granularities = st.sampled_from(["row", "matrix"])
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def draw_inputs(seed: int, width: int, kind: str) -> Tensor:
    """Inputs in float32, shape (tokens, width)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = max(1, width // 3) if kind == "few" else 2 * width + 5
    x = torch.randn(tokens, width, generator=generator)
    if kind != "plain":
        x = x + torch.randn(tokens, 3, generator=generator) @ torch.randn(3, width, generator=generator)
    if kind == "scaled":
        x = x * torch.logspace(-2, 2, width)
    if kind == "dead":
        x[:, 1::3] = 0
    return x


def draw_weight(seed: int, rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed ^ 1))


def known_of(inputs: Tensor) -> LayerStatistics:
    gram = Gram("the layer")
    gram.add(inputs)
    return LayerStatistics(gram)


def scaled_system(inputs: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """H and n."""
    x = inputs.double()
    gram = x.T @ x
    n = gram.diagonal().sqrt() + 1e-8
    gram = gram / torch.outer(n, n)
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(n), dtype=F64), n


def objective_of(weight: Tensor, dense: Tensor, inputs: Tensor, ridge: float) -> Tensor:
    matrix, n = scaled_system(inputs, ridge)
    error = (weight.double() - dense.double()) * n
    return torch.einsum("ri,ij,rj->r", error, matrix, error)


def largest(score: Tensor, sparsity: str, granularity: str, progress: Fraction = Fraction(1)) -> Tensor:
    """1 for what stays: all but the lowest floor(size · share · progress) of every group."""
    rows, width = score.shape
    if ":" in sparsity:
        n, m = map(int, sparsity.split(":"))
        share, groups = Fraction(m - n, m), score.reshape(-1, m)
    else:
        share = Fraction(Decimal(sparsity))
        groups = score if granularity == "row" else score.reshape(1, -1)
    zeros = math.floor(groups.shape[1] * share * progress)
    mask = torch.ones_like(groups)
    for group, kept in zip(groups, mask, strict=True):
        kept[group.argsort()[:zeros]] = 0
    return mask.reshape(rows, width)


def literal_admm(
    dense: Tensor,
    inputs: Tensor,
    sparsity: str,
    granularity: str,
    iterations: int = 20,
    mask_iterations: int = 15,
    penalty: float = 1.0,
    ridge: float = 0.1,
) -> Pruned:
    """ADMM-Grad: s_t = s − s(1 − t/k_s)³; a pattern is there in full from the first step."""
    matrix, n = scaled_system(inputs, ridge)
    weight = dense.double() * n
    pull = weight @ matrix
    inverse = torch.linalg.inv(matrix + penalty * torch.eye(len(n), dtype=F64))
    dual, mask = torch.zeros_like(weight), torch.ones_like(weight)
    for step in range(1, iterations + 1):
        if step <= mask_iterations:
            progress = Fraction(1) if ":" in sparsity else 1 - (1 - Fraction(step, mask_iterations)) ** 3
            mask = largest((weight + dual).abs(), sparsity, granularity, progress)
        z = mask * (weight + dual)
        dual = dual + weight - z
        weight = (pull + penalty * (z - dual)) @ inverse
    return Pruned(mask * (weight + dual) / n, mask.bool())


def literal_alps(
    dense: Tensor,
    inputs: Tensor,
    sparsity: str,
    granularity: str,
    iterations: int = 300,
    penalty: float = 0.1,
    polish: int = 10,
    ridge: float = 0.3,
) -> Pruned:
    """Algorithm 1 of ALPS: an inverse at every step, and conjugate gradients row by row."""
    matrix, n = scaled_system(inputs, ridge)
    identity = torch.eye(len(n), dtype=F64)
    target = dense.double() * n
    support = earlier = largest(target.abs(), sparsity, granularity)
    kept, multiplier = target * support, torch.zeros_like(target)
    for step in range(1, iterations + 1):
        inverse = torch.linalg.inv(matrix + penalty * identity)
        weight = (target @ matrix - multiplier + penalty * kept) @ inverse
        support = largest((weight + multiplier / penalty).abs(), sparsity, granularity)
        kept = (weight + multiplier / penalty) * support
        multiplier = multiplier + penalty * (weight - kept)
        if step % 3 == 0:
            change = int((support != earlier).sum()) / int(support.sum())
            if change == 0 or (step >= 30 and change < 0.0003):
                break
            penalty *= 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1
            earlier = support
    rows = [conjugate_gradients(matrix, w, m.bool(), v, polish) for w, m, v in zip(target, support, kept, strict=True)]
    return Pruned(torch.stack(rows) / n, support.bool())


def conjugate_gradients(matrix: Tensor, target: Tensor, kept: Tensor, start: Tensor, steps: int) -> Tensor:
    """The textbook's, on the kept weights of one row, from what ADMM has made of them."""
    a, b = matrix[kept][:, kept], (matrix @ target)[kept]
    v = start[kept]
    r = b - a @ v
    p = r
    for _ in range(steps):
        if float(r.norm()) <= 1e-14 * float(b.norm()):
            break
        alpha = (r @ r) / (p @ a @ p)
        v = v + alpha * p
        new = r - alpha * (a @ p)
        p = new + (new @ new) / (r @ r) * p
        r = new
    solution = torch.zeros_like(target)
    solution[kept] = v
    return solution


@st.composite
def problems(draw_from: st.DrawFn) -> tuple[int, int, int, str, str, str]:
    """A seed, rows, columns, a kind of inputs, a sparsity that fits and a granularity."""
    sparsity = draw_from(st.sampled_from(SHARES + PATTERNS))
    width = draw_from(st.integers(1, 24))
    if ":" in sparsity:
        m = int(sparsity.split(":")[1])
        width = m * math.ceil(width / m)
    return draw_from(seeds), draw_from(st.integers(1, 5)), width, draw_from(kinds), sparsity, draw_from(granularities)


def check_same(pruned: Pruned, expected: Pruned, inputs: Tensor, sparsity: str, granularity: str) -> None:
    """The same mask and weights; which of the weights of dead inputs go is up to rounding alone."""
    check_counts(pruned.mask, sparsity, granularity)
    assert not pruned.weight[~pruned.mask].any()
    alive = inputs.any(0)
    assert torch.equal(pruned.mask[:, alive], expected.mask[:, alive])
    n = scaled_system(inputs, 0)[1]
    torch.testing.assert_close((pruned.weight * n)[:, alive], (expected.weight * n)[:, alive], rtol=1e-7, atol=1e-7)


def check_counts(mask: Tensor, sparsity: str, granularity: str) -> None:
    expected = largest(torch.zeros(mask.shape), sparsity, granularity)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == int(expected.sum())
    if ":" in sparsity:
        n, m = map(int, sparsity.split(":"))
        assert bool((mask.unflatten(1, (-1, m)).sum(2) == n).all())
    elif granularity == "row":
        assert torch.equal(mask.sum(1), expected.sum(1).long())


@given(problems(), st.sampled_from([(20, 15), (20, 20), (5, 3), (1, 1)]), st.sampled_from([(1.0, 0.1), (0.3, 1.0)]))
@settings(max_examples=80)
@example((0, 4, 24, "correlated", "0.5", "row"), (20, 15), (1.0, 0.1))
@example((0, 4, 24, "correlated", "0.5", "matrix"), (20, 15), (1.0, 0.1))
@example((0, 4, 24, "correlated", "4:8", "row"), (20, 15), (1.0, 0.1))
def test_admm_is_the_published_algorithm(
    problem: tuple[int, int, int, str, str, str], steps: tuple[int, int], strengths: tuple[float, float]
) -> None:
    seed, rows, width, kind, sparsity, granularity = problem
    dense, inputs = draw_weight(seed, rows, width).double(), draw_inputs(seed, width, kind).double()
    before = dense.clone()
    pruned = ADMM(*steps, *strengths, granularity).prune(dense, known_of(inputs), Sparsity(sparsity))
    assert torch.equal(dense, before)
    check_same(
        pruned, literal_admm(dense, inputs, sparsity, granularity, *steps, *strengths), inputs, sparsity, granularity
    )


def test_the_schedule_matters() -> None:
    """So that the test above is one of the gradual schedule."""
    dense, inputs = draw_weight(0, 6, 24).double(), draw_inputs(0, 24, "correlated").double()
    masks = [ADMM(20, k).prune(dense, known_of(inputs), Sparsity("0.6")).mask for k in (1, 5, 15, 20)]
    for i in range(4):
        for j in range(i):
            assert not torch.equal(masks[i], masks[j])


@pytest.mark.parametrize("size", [1, 320])
@pytest.mark.parametrize("sparsity", ["0.6", "2:4"])
def test_admm_in_chunks_of_rows(size: int, sparsity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, inputs = draw_weight(0, 30, 24).double(), draw_inputs(0, 24, "correlated").double()
    monkeypatch.setattr(solvers.Solver, "chunk", size)
    for granularity in ("row", "matrix"):
        pruned = ADMM(granularity=granularity).prune(dense, known_of(inputs), Sparsity(sparsity))
        check_same(pruned, literal_admm(dense, inputs, sparsity, granularity), inputs, sparsity, granularity)


@pytest.mark.parametrize("sparsity", ["0.5", "0.8", "2:4", "5:8"])
@pytest.mark.parametrize("kind", ["plain", "correlated", "scaled"])
@pytest.mark.parametrize("granularity", ["row", "matrix"])
def test_with_one_mask_iteration_admm_is_the_solver_on_the_mask_of_wanda(
    sparsity: str, kind: str, granularity: str
) -> None:
    dense, inputs = draw_weight(3, 6, 24).double(), draw_inputs(3, 24, kind).double()
    known = known_of(inputs)
    pruned = ADMM(mask_iterations=1, granularity=granularity).prune(dense, known, Sparsity(sparsity))
    mask = Wanda(granularity).prune(dense, known, Sparsity(sparsity)).mask
    assert torch.equal(pruned.mask, mask)
    updated = solvers.ADMM().solve(dense, torch.zeros_like(dense), mask, known.gram)
    torch.testing.assert_close(pruned.weight, updated, rtol=1e-9, atol=1e-10)


ALPS_SETTINGS = [(300, 0.1, 10, 0.01), (300, 1.0, 3, 0.1), (4, 0.1, 0, 0.01), (1, 0.1, 10, 0.01), (31, 0.01, 1, 0.5)]


@given(problems(), st.sampled_from(ALPS_SETTINGS))
@settings(max_examples=60)
@example((0, 5, 24, "correlated", "0.5", "matrix"), ALPS_SETTINGS[0])
@example((0, 5, 24, "correlated", "0.5", "row"), ALPS_SETTINGS[0])
@example((0, 5, 24, "correlated", "2:4", "matrix"), ALPS_SETTINGS[0])
@example((0, 5, 24, "dead", "0.5", "row"), ALPS_SETTINGS[0])
@example((0, 5, 24, "few", "0.5", "matrix"), ALPS_SETTINGS[0])
def test_alps_is_the_published_algorithm(
    problem: tuple[int, int, int, str, str, str], parameters: tuple[int, float, int, float]
) -> None:
    seed, rows, width, kind, sparsity, granularity = problem
    dense, inputs = draw_weight(seed, rows, width).double(), draw_inputs(seed, width, kind).double()
    before = dense.clone()
    pruned = ALPS(*parameters, granularity).prune(dense, known_of(inputs), Sparsity(sparsity))
    assert torch.equal(dense, before)
    check_same(pruned, literal_alps(dense, inputs, sparsity, granularity, *parameters), inputs, sparsity, granularity)


def test_alps_goes_through_all_speeds_of_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer large enough that its support changes by more than 0.1, by less and by very little."""
    dense, inputs = draw_weight(9, 64, 64).double(), draw_inputs(9, 64, "correlated").double()
    pruned = ALPS(polish=3, ridge=0.01).prune(dense, known_of(inputs), Sparsity("0.5"))
    expected = literal_alps(dense, inputs, "0.5", "matrix", polish=3, ridge=0.01)
    check_same(pruned, expected, inputs, "0.5", "matrix")
    for name, value in (
        ("GROWTH", ((0.1, 1.3), (0.0, 1.2))),
        ("GROWTH", ((0.005, 1.2), (0.0, 1.1))),
        ("GROWTH", ((0.1, 1.3), (0.0, 1.1))),
        ("GROWTH", ((0.1, 1.3), (0.01, 1.2), (0.0, 1.1))),
        ("GROWTH", ((0.2, 1.3), (0.005, 1.2), (0.0, 1.1))),
        ("ROUND", 2),
        ("SETTLED", 0.01),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"lit_prune.masks.alps.{name}", value)
            other = ALPS(polish=3, ridge=0.01).prune(dense, known_of(inputs), Sparsity("0.5"))
        assert not torch.equal(other.mask, expected.mask), (name, value)


@methods
@given(problems(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.booleans())
@settings(max_examples=40)
@example((0, 3, 12, "dead", "2:4", "row"), torch.bfloat16, True)
@example((0, 3, 21, "few", "0.5", "row"), torch.float32, False)
def test_zeros_are_exact_in_any_dtype(
    method: LayerMask, problem: tuple[int, int, int, str, str, str], dtype: torch.dtype, equal: bool
) -> None:
    seed, rows, width, kind, sparsity, _ = problem
    dense = torch.full((rows, width), 0.5) if equal else draw_weight(seed, rows, width)
    pruned = method.prune(dense.to(dtype), known_of(draw_inputs(seed, width, kind).to(dtype)), Sparsity(sparsity))
    assert pruned.weight.dtype == dtype
    assert pruned.weight.shape == pruned.mask.shape == dense.shape
    assert bool(pruned.weight.isfinite().all())
    assert not pruned.weight[~pruned.mask].any()
    check_counts(pruned.mask, sparsity, method.granularity)


@methods
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_a_layer_that_nothing_reaches(method: LayerMask, sparsity: str) -> None:
    pruned = method.prune(draw_weight(0, 3, 8), known_of(torch.zeros(5, 8)), Sparsity(sparsity))
    assert bool(pruned.weight.isfinite().all())
    check_counts(pruned.mask, sparsity, method.granularity)


@methods
def test_weights_of_dead_inputs_go_first(method: LayerMask) -> None:
    inputs, weight = draw_inputs(9, 24, "correlated"), draw_weight(9, 5, 24)
    dead = torch.arange(24) % 4 == 2
    inputs[:, dead] = 0
    weight[:, dead] *= 100
    for sparsity in ("0.5", "2:4"):
        assert not method.prune(weight, known_of(inputs), Sparsity(sparsity)).mask[:, dead].any()


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_less_precision_does_about_as_well(method: LayerMask, dtype: torch.dtype, sparsity: str) -> None:
    inputs, dense = draw_inputs(7, 48, "correlated").to(dtype), draw_weight(7, 24, 48).to(dtype)
    low = method.prune(dense, known_of(inputs), Sparsity(sparsity))
    high = method.prune(dense.double(), known_of(inputs.double()), Sparsity(sparsity))
    values = [float(objective_of(p.weight, dense, inputs, method.ridge).sum()) for p in (low, high)]
    assert values[0] == pytest.approx(values[1], rel=0.03)


@methods
@pytest.mark.parametrize("kind", ["correlated", "scaled", "few"])
@pytest.mark.parametrize("sparsity", ["0.5", "0.7", "2:4"])
@pytest.mark.parametrize("seed", range(3))
def test_updated_weights_are_better_than_masked_ones_and_the_mask_than_wandas(
    method: LayerMask, kind: str, sparsity: str, seed: int
) -> None:
    inputs, dense = draw_inputs(seed, 48, kind), draw_weight(seed, 24, 48)
    pruned = method.prune(dense, known_of(inputs), Sparsity(sparsity))
    masked = objective_of(dense * pruned.mask, dense, inputs, method.ridge)
    reached = objective_of(pruned.weight, dense, inputs, method.ridge)
    assert float(reached.sum()) < float(masked.sum())
    assert float((reached <= masked).double().mean()) > 0.9
    wanda = Wanda(method.granularity).prune(dense, known_of(inputs), Sparsity(sparsity)).mask
    best = solvers.ConjugateGradient(500, 1e-6, method.ridge)
    own, other = (
        float(objective_of(best.solve(dense, dense * m, m, known_of(inputs).gram), dense, inputs, method.ridge).sum())
        for m in (pruned.mask, wanda)
    )
    assert own < other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("sparsity", ["0.3", "0.6", "2:4"])
def test_polishing_lowers_the_objective_of_every_row(
    kind: str, ridge: float, dtype: torch.dtype, sparsity: str
) -> None:
    inputs, dense = draw_inputs(2, 36, kind).to(dtype), draw_weight(2, 12, 36).to(dtype)
    known, before, support = known_of(inputs), None, None
    energy = objective_of(torch.zeros_like(dense), dense, inputs, ridge)
    for polish in (0, 1, 5, 10):
        pruned = ALPS(polish=polish, ridge=ridge).prune(dense, known, Sparsity(sparsity))
        values = objective_of(pruned.weight, dense, inputs, ridge)
        if support is None:
            support, before = pruned.mask, values
        assert torch.equal(pruned.mask, support)
        assert bool((values <= before + 100 * torch.finfo(dtype).eps * energy).all()), polish
        before = values
    masked = objective_of(dense * support, dense, inputs, ridge)
    assert bool((before <= 0.95 * masked + 1e-10 * energy).all())


@pytest.mark.parametrize(
    ("kind", "ridge", "sparsity"),
    [("plain", 0.01, "0.3"), ("plain", 0.01, "2:4"), ("scaled", 0.0, "0.6"), ("few", 0.01, "0.6"), ("few", 0.0, "0.3")],
)
@pytest.mark.parametrize("polish", [30, 100, 300])
def test_polishing_for_long_does_no_harm(kind: str, ridge: float, sparsity: str, polish: int) -> None:
    """Where there is nothing more to gain in float32, the steps end."""
    inputs, dense = draw_inputs(2, 36, kind), draw_weight(2, 12, 36)
    energy = objective_of(torch.zeros_like(dense), dense, inputs, ridge)
    short, long = (
        objective_of(
            ALPS(polish=steps, ridge=ridge).prune(dense, known_of(inputs), Sparsity(sparsity)).weight,
            dense,
            inputs,
            ridge,
        )
        for steps in (10, polish)
    )
    assert bool((long <= short + 1e-5 * energy).all())


def test_the_usual_settings() -> None:
    assert vars(ADMM()) == {
        "iterations": 20,
        "mask_iterations": 15,
        "penalty": 1.0,
        "ridge": 0.1,
        "granularity": "row",
    }
    assert vars(ALPS()) == {"iterations": 300, "penalty": 0.1, "polish": 10, "ridge": 0.3, "granularity": "matrix"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ADMM(iterations=0), "iterations 0 does not fit; give 1 or more, such as 20"),
        (lambda: ADMM(mask_iterations=0), "mask_iterations 0 does not fit; give 1 to 20"),
        (lambda: ADMM(mask_iterations=21), "mask_iterations 21 does not fit; give 1 to 20"),
        (lambda: ADMM(iterations=10), "mask_iterations 15 does not fit; give 1 to 10"),
        (lambda: ADMM(penalty=0), "penalty 0 does not fit; give more than 0, such as 1.0"),
        (lambda: ADMM(ridge=-1), "ridge -1 does not fit; give 0 or more, such as 0.1"),
        (lambda: ALPS(iterations=0), "iterations 0 does not fit; give 1 or more, such as 300"),
        (lambda: ALPS(penalty=-0.1), "penalty -0.1 does not fit; give more than 0, such as 0.1"),
        (lambda: ALPS(polish=-1), "polish -1 does not fit; give 0 or more, such as 10"),
        (lambda: ALPS(ridge=math.nan), "ridge nan does not fit; give 0 or more, such as 0.3"),
    ],
)
def test_parameters_out_of_range(make: Callable[[], LayerMask], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence) + "$"):
        make()


@methods
def test_a_pattern_that_does_not_fit(method: LayerMask) -> None:
    with pytest.raises(ValueError, match="sparsity 2:4: 4 does not divide 10 inputs"):
        method.prune(torch.ones(2, 10), known_of(torch.eye(10)), Sparsity("2:4"))


@methods
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_inputs_that_are_no_numbers(method: LayerMask, bad: float) -> None:
    inputs = draw_inputs(0, 12, "plain")
    inputs[2, 5] = bad
    with pytest.raises(FloatingPointError, match=r"^the Gram matrix of the layer holds NaN or infinite values$"):
        method.prune(torch.ones(2, 12), known_of(inputs), Sparsity("0.5"))
