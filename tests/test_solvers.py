"""Weight solvers against their formulas in float64 and a dense least squares solve of every row."""

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_prune.masks import ALPS, Gram, LayerStatistics, SparseGPT, Sparsity, Wanda
from lit_prune.masks.solvers import ADMM, ConjugateGradient, Objective, Solver

F64 = torch.float64
KINDS = ("plain", "correlated", "scaled", "dead", "copied", "few", "all dead")
SHARES = ("0", "0.3", "0.5", "0.8", "0.999")
PATTERNS = ("2:4", "1:4", "4:8", "5:7")

seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(KINDS)
ridges = st.sampled_from([0.0, 0.01, 0.3])


def draw_inputs(seed: int, width: int, kind: str, dtype: torch.dtype = F64) -> Tensor:
    """Inputs, shape (tokens, width), with what makes least squares hard."""
    generator = torch.Generator().manual_seed(seed)
    tokens = max(1, width // 3) if kind == "few" else 3 * width + 5
    x = torch.randn(tokens, width, generator=generator)
    if kind != "plain":
        x = x @ torch.randn(width, width, generator=generator) + torch.randn(width, generator=generator)
    if kind == "scaled":
        x = x * torch.logspace(-2, 2, width)
    if kind == "dead":
        x[:, ::3] = 0
    if kind == "copied":
        x[:, 1::3] = x[:, 0::3][:, : x[:, 1::3].shape[1]]
    if kind == "all dead":
        x.zero_()
    return x.to(dtype)


def draw_weight(seed: int, rows: int, width: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed ^ 1)).to(dtype)


def draw_mask(seed: int, rows: int, width: int, sparsity: str) -> Tensor:
    return Sparsity(sparsity).select(torch.rand(rows, width, generator=torch.Generator().manual_seed(seed ^ 2)))


def gram_of(inputs: Tensor) -> Gram:
    gram = Gram("the layer")
    gram.add(inputs)
    return gram


def scales_and_ridge(inputs: Tensor, ridge: float) -> tuple[Tensor, float]:
    """n, and λ̄, by a loop over the inputs."""
    scales = torch.stack([column.norm() + 1e-8 for column in inputs.double().T])
    diagonal = [float(column.square().sum() / n**2) for column, n in zip(inputs.double().T, scales, strict=True)]
    return scales, ridge * sum(diagonal) / len(diagonal)


def objective_of(weight: Tensor, dense: Tensor, inputs: Tensor, ridge: float) -> Tensor:
    """f of every row, in float64: ‖X (v − w)‖² + λ̄ Σ_j n_j² (v_j − w_j)²."""
    scales, absolute = scales_and_ridge(inputs, ridge)
    error = weight.double() - dense.double()
    return (inputs.double() @ error.T).square().sum(0) + absolute * (scales * error).square().sum(1)


def rounding(weight: Tensor, dense: Tensor, inputs: Tensor, eps: float) -> Tensor:
    """What f can be off by for every row in arithmetic of precision eps: 2 eps · in · |e| |H| |e|ᵀ."""
    scales, _ = scales_and_ridge(inputs, 0)
    error = ((weight.double() - dense.double()) * scales).abs()
    return 4 * eps * inputs.shape[1] * error.sum(1).square() + 1e-30


def least_squares(dense: Tensor, mask: Tensor, inputs: Tensor, ridge: float) -> Tensor:
    """Row by row on its support alone: lstsq of the inputs with √λ̄ · n_j below them."""
    scales, absolute = scales_and_ridge(inputs, ridge)
    system = torch.cat([inputs.double(), absolute**0.5 * scales.diag()])
    best = torch.zeros_like(dense, dtype=F64)
    for row, (weight, kept) in enumerate(zip(dense.double(), mask, strict=True)):
        if system[:, kept].any():
            solved = torch.linalg.lstsq(system[:, kept], (system @ weight)[:, None], driver="gelsd")
            best[row, kept] = solved.solution[:, 0]
    return best


def literal_admm(dense: Tensor, mask: Tensor, inputs: Tensor, iterations: int, penalty: float, ridge: float) -> Tensor:
    """ADMM1 as it is written down, with the inverse itself."""
    x, m = inputs.double(), mask.double()
    gram = x.T @ x
    n = gram.diagonal().sqrt() + 1e-8
    gram = gram / torch.outer(n, n)
    weight = dense.double() * n
    identity = torch.eye(len(n), dtype=F64)
    gram = gram + ridge * gram.diagonal().mean() * identity
    pull = weight @ gram
    inverse = torch.linalg.inv(gram + penalty * identity)
    dual = torch.zeros_like(weight)
    for _ in range(iterations):
        z = m * (weight + dual)
        dual = dual + weight - z
        weight = (pull + penalty * (z - dual)) @ inverse
    return m * (weight + dual) / n


@st.composite
def problems(draw_from: st.DrawFn) -> tuple[int, int, int, str, str]:
    """A seed, rows, columns, a kind of inputs and a sparsity that fits."""
    sparsity = draw_from(st.sampled_from(SHARES + PATTERNS))
    width = draw_from(st.integers(1, 24))
    if ":" in sparsity:
        m = int(sparsity.split(":")[1])
        width = m * -(-width // m)
    return draw_from(seeds), draw_from(st.integers(1, 5)), width, draw_from(kinds), sparsity


def drawn(problem: tuple[int, int, int, str, str], dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """Dense weights, mask and inputs."""
    seed, rows, width, kind, sparsity = problem
    return (
        draw_weight(seed, rows, width, dtype),
        draw_mask(seed, rows, width, sparsity),
        draw_inputs(seed, width, kind, torch.promote_types(dtype, torch.float32)),
    )


@given(problems(), ridges)
def test_objective(problem: tuple[int, int, int, str, str], ridge: float) -> None:
    dense, mask, inputs = drawn(problem)
    other = draw_weight(problem[0] + 1, *dense.shape) * mask
    objective = Objective(gram_of(inputs), ridge)
    values = objective((other - dense) * objective.scale)
    assert values.shape == dense.shape[:1]
    assert objective.name == "the layer"
    torch.testing.assert_close(values, objective_of(other, dense, inputs, ridge), rtol=1e-9, atol=1e-20)


def test_ridge_counts_as_a_share_of_the_mean_diagonal_where_inputs_are_dead() -> None:
    inputs = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    objective = Objective(gram_of(inputs), 0.5)
    torch.testing.assert_close(objective.scale, torch.tensor([5.0, 1e-8]))
    torch.testing.assert_close(objective.matrix, torch.tensor([[1.25, 0.0], [0.0, 0.25]]))


@given(
    problems(),
    st.sampled_from([1, 2, 20]),
    st.sampled_from([0.3, 1.0, 5.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from(["zero", "random", "masked"]),
)
@settings(max_examples=80)
@example((0, 3, 12, "copied", "2:4"), 20, 1.0, 0.0, "zero")
@example((0, 3, 12, "dead", "0.5"), 20, 1.0, 0.1, "zero")
@example((0, 3, 12, "few", "0.5"), 20, 1.0, 0.1, "masked")
def test_admm_is_the_published_update(
    problem: tuple[int, int, int, str, str], iterations: int, penalty: float, ridge: float, begin: str
) -> None:
    dense, mask, inputs = drawn(problem)
    start = {
        "zero": torch.zeros_like(dense),
        "random": 5 * draw_weight(problem[0] + 1, *dense.shape) * mask,
        "masked": dense * mask,
    }[begin]
    solved = ADMM(iterations, penalty, ridge).solve(dense, start, mask, gram_of(inputs))
    published = literal_admm(dense, mask, inputs, iterations, penalty, ridge)
    before = objective_of(start, dense, inputs, ridge)
    after = objective_of(published, dense, inputs, ridge)
    for row in range(len(dense)):
        equal = abs(float(after[row] - before[row])) <= 1e-9 * float(before[row] + 1e-20)
        if not equal:
            expected = published[row] if after[row] < before[row] else start[row]
            scales, _ = scales_and_ridge(inputs, ridge)
            torch.testing.assert_close(solved[row] * scales, expected * scales, rtol=1e-7, atol=1e-7)
    assert not solved[~mask].any()


@pytest.mark.parametrize("kind", KINDS)
def test_admm_changes_the_weights_of_most_rows(kind: str) -> None:
    """So that the test above is one of the update, and not of the weights it began with."""
    dense, mask, inputs = drawn((3, 16, 12, kind, "0.5"))
    solved = ADMM().solve(dense, dense * mask, mask, gram_of(inputs))
    changed = (solved != dense * mask).any(1)
    assert int(changed.sum()) == (0 if kind == "all dead" else 16)


@given(problems(), ridges)
@settings(max_examples=80)
@example((0, 3, 21, "few", "0.3"), 0.0)
@example((0, 3, 21, "copied", "0"), 0.0)
@example((0, 3, 20, "dead", "2:4"), 0.0)
@example((0, 1, 1, "plain", "0"), 0.3)
def test_conjugate_gradients_reach_the_optimum_of_every_row(
    problem: tuple[int, int, int, str, str], ridge: float
) -> None:
    dense, mask, inputs = drawn(problem)
    solver = ConjugateGradient(iterations=300, tolerance=1e-12, ridge=ridge)
    solved = solver.solve(dense, dense * mask, mask, gram_of(inputs))
    best = least_squares(dense, mask, inputs, ridge)
    reached, optimum = (objective_of(weight, dense, inputs, ridge) for weight in (solved, best))
    energy = objective_of(torch.zeros_like(dense), dense, inputs, ridge)
    assert bool((reached <= optimum * (1 + 1e-8) + 1e-10 * energy + 1e-25).all())
    if ridge and problem[3] in ("plain", "correlated"):  # then the optimum is one point
        torch.testing.assert_close(solved, best, rtol=1e-5, atol=1e-6)


@given(problems(), st.sampled_from([0.01, 0.1, 0.3, 1.0]), st.booleans())
@settings(max_examples=60)
def test_conjugate_gradients_reach_the_optimum_in_float32(
    problem: tuple[int, int, int, str, str], ridge: float, far: bool
) -> None:
    dense, mask, inputs = drawn(problem, torch.float32)
    start = draw_weight(problem[0] + 1, *dense.shape, torch.float32) if far else dense
    solver = ConjugateGradient(iterations=200, tolerance=1e-6, ridge=ridge)
    solved = solver.solve(dense, start * mask, mask, gram_of(inputs))
    reached, optimum, energy = (
        objective_of(weight, dense, inputs, ridge)
        for weight in (solved, least_squares(dense, mask, inputs, ridge), torch.zeros_like(dense))
    )
    assert bool((reached <= optimum * (1 + 1e-5) + 1e-9 * energy + 1e-20).all())


@pytest.mark.parametrize("kind", ["plain", "correlated", "scaled", "dead", "copied", "few"])
@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("sparsity", ["0.6", "2:4"])
def test_nothing_does_better_on_the_same_mask_than_conjugate_gradients(kind: str, ridge: float, sparsity: str) -> None:
    dense, _, inputs = drawn((5, 6, 24, kind, sparsity))
    gram, share = gram_of(inputs), Sparsity(sparsity)
    known = LayerStatistics(gram)
    best = ConjugateGradient(iterations=500, tolerance=1e-12, ridge=ridge)
    for method in (Wanda(), SparseGPT(), SparseGPT(dampening=0.1), ALPS(ridge=ridge), ALPS(polish=0, ridge=ridge)):
        start, mask = method.prune(dense, known, share)
        others = [start, dense * mask, ADMM(ridge=ridge).solve(dense, start, mask, gram)]
        others.append(ADMM(iterations=300, ridge=ridge).solve(dense, dense * mask, mask, gram))
        reached = objective_of(best.solve(dense, start, mask, gram), dense, inputs, ridge)
        energy = objective_of(torch.zeros_like(dense), dense, inputs, ridge)
        for other in others:
            bound = objective_of(other, dense, inputs, ridge)
            assert bool((reached <= bound * (1 + 1e-9) + 1e-11 * energy).all())


SOLVERS: dict[str, Callable[[float], Solver]] = {
    "ADMM": lambda ridge: ADMM(ridge=ridge),
    "one step of ADMM": lambda ridge: ADMM(iterations=1, ridge=ridge),
    "ADMM of a small penalty": lambda ridge: ADMM(iterations=5, penalty=1e-3, ridge=ridge),
    "CG": lambda ridge: ConjugateGradient(ridge=ridge),
    "one step of CG": lambda ridge: ConjugateGradient(iterations=1, ridge=ridge),
    "endless CG": lambda ridge: ConjugateGradient(iterations=200, tolerance=0.0, ridge=ridge),
}
solvers = pytest.mark.parametrize("make", SOLVERS.values(), ids=SOLVERS.keys())


@solvers
@given(
    problems(),
    ridges,
    st.sampled_from(["masked", "random", "huge", "zero", "optimum", "SparseGPT"]),
    st.sampled_from([torch.float32, F64]),
)
@settings(max_examples=60)
@example((1, 4, 20, "few", "0.3"), 0.0, "optimum", torch.float32)
@example((1, 4, 20, "copied", "2:4"), 0.0, "optimum", torch.float32)
@example((1, 4, 21, "copied", "0"), 0.0, "masked", torch.float32)
@example((1, 4, 20, "scaled", "0.5"), 0.01, "optimum", F64)
def test_no_row_gets_worse(
    make: Callable[[float], Solver],
    problem: tuple[int, int, int, str, str],
    ridge: float,
    begin: str,
    dtype: torch.dtype,
) -> None:
    dense, mask, inputs = drawn(problem, dtype)
    gram, noise = gram_of(inputs), draw_weight(problem[0] + 1, *dense.shape, dtype)
    if begin == "SparseGPT":
        start, mask = SparseGPT(block_size=5).prune(dense, LayerStatistics(gram), Sparsity(problem[4]))
    else:
        start = (
            mask
            * {
                "masked": dense,
                "random": noise,
                "huge": 1e4 * noise,
                "zero": torch.zeros_like(dense),
                "optimum": least_squares(dense, mask, inputs, ridge).to(dtype),
            }[begin]
        )
    given_start = start.clone()
    solved = make(ridge).solve(dense, start, mask, gram)
    assert torch.equal(start, given_start)
    assert solved.dtype == dtype
    assert bool(solved.isfinite().all())
    assert not solved[~mask].any()
    slack = sum(rounding(weight, dense, inputs, torch.finfo(dtype).eps) for weight in (solved, start))
    before, after = (objective_of(weight, dense, inputs, ridge) for weight in (start, solved))
    assert bool((after <= before + slack).all())


@solvers
def test_rows_that_are_as_good_as_they_can_be_stay_as_they_are(make: Callable[[float], Solver]) -> None:
    dense, _, inputs = drawn((7, 5, 12, "correlated", "0.5"), torch.float32)
    everything = torch.ones_like(dense, dtype=torch.bool)
    assert torch.equal(make(0.1).solve(dense, dense, everything, gram_of(inputs)), dense)


@solvers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64])
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_weights_of_any_dtype(make: Callable[[float], Solver], dtype: torch.dtype, sparsity: str) -> None:
    dense, mask, inputs = drawn((11, 8, 16, "correlated", sparsity), dtype)
    before = dense.clone()
    start = dense * mask
    solved = make(0.1).solve(dense, start, mask, gram_of(inputs))
    assert solved.dtype == dtype
    assert solved.shape == dense.shape
    assert torch.equal(dense, before)
    assert not solved[~mask].any()
    gain = objective_of(solved, dense, inputs, 0.1).sum() / objective_of(start, dense, inputs, 0.1).sum()
    exact = make(0.1).solve(dense.double(), start.double(), mask, gram_of(inputs.double()))
    expected = objective_of(exact, dense, inputs, 0.1).sum() / objective_of(start, dense, inputs, 0.1).sum()
    assert float(expected) < 0.995
    assert float(gain) == pytest.approx(float(expected), rel=0.1 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("given_dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_weights_so_far(given_dtype: torch.dtype) -> None:
    dense, mask, inputs = drawn((11, 8, 16, "correlated", "0.5"), torch.float32)
    for solver in (ADMM(), ConjugateGradient()):
        start = (dense * mask).to(given_dtype)
        solved = solver.solve(dense, start, mask, gram_of(inputs))
        assert solved.dtype == given_dtype
        assert not torch.equal(solved, start)


@solvers
@pytest.mark.parametrize("size", [1, 300, 360, 1000])
def test_a_layer_in_chunks_of_rows(make: Callable[[float], Solver], size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, mask, inputs = drawn((13, 32, 24, "correlated", "0.5"))
    whole = make(0.1).solve(dense, dense * mask, mask, gram_of(inputs))
    monkeypatch.setattr(Solver, "chunk", size)
    seen = []
    solver = make(0.1)
    solve = solver._solve
    monkeypatch.setattr(solver, "_solve", lambda *args: seen.append(len(args[2])) or solve(*args))
    in_chunks = solver.solve(dense, dense * mask, mask, gram_of(inputs))
    rows = max(12, size // 24)  # no fewer than half of the inputs, for the sake of the matrix product
    assert seen == [min(rows, 32 - start) for start in range(0, 32, rows)]
    assert len(seen) > 1 or size == 1000
    torch.testing.assert_close(in_chunks, whole, rtol=1e-8, atol=1e-10)


def test_rows_do_not_depend_on_each_other() -> None:
    dense, mask, inputs = drawn((17, 6, 16, "correlated", "0.5"))
    for solver in (ADMM(), ConjugateGradient(tolerance=1e-6)):
        whole = solver.solve(dense, dense * mask, mask, gram_of(inputs))
        others = dense.clone()
        others[::2] *= 1e3
        partly = solver.solve(others, others * mask, mask, gram_of(inputs))
        torch.testing.assert_close(partly[1::2], whole[1::2], rtol=1e-10, atol=1e-12)


def test_conjugate_gradients_stop_at_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is left alone once its masked gradient is that much smaller than that of zero weights."""
    dense, mask, inputs = drawn((19, 6, 60, "correlated", "0.5"))
    scales, _ = scales_and_ridge(inputs, 0.1)
    matrix = Objective(gram_of(inputs), 0.1).matrix

    def gradient(weight: Tensor) -> Tensor:
        return (((dense - weight) * scales) @ matrix * mask).norm(dim=1)

    for tolerance in (0.3, 1e-2, 1e-3):
        solved = ConjugateGradient(1000, tolerance, 0.1).solve(dense, dense * mask, mask, gram_of(inputs))
        relative = gradient(solved) / gradient(torch.zeros_like(dense))
        assert bool((relative <= tolerance * (1 + 1e-9)).all())
        assert float(relative.max()) > 1e-2 * tolerance
    done = ConjugateGradient(1000, 0.5, 0.1).solve(dense, dense * mask, mask, gram_of(inputs))
    stay = gradient(dense * mask) <= 0.5 * gradient(torch.zeros_like(dense))
    assert bool(stay.any())
    assert torch.equal(done[stay], (dense * mask)[stay])


@pytest.mark.parametrize("problem", [(1, 6, 12, "dead", "0.5"), (3, 6, 24, "few", "0.8"), (4, 6, 24, "scaled", "2:4")])
@pytest.mark.parametrize("iterations", [100, 400])
def test_without_tolerance_the_optimum_is_not_lost_again(
    problem: tuple[int, int, int, str, str], iterations: int
) -> None:
    """In float32, where there is soon nothing more to gain."""
    dense, mask, inputs = drawn(problem, torch.float32)
    solved = ConjugateGradient(iterations, 0.0, 0.01).solve(dense, dense * mask, mask, gram_of(inputs))
    reached, optimum, energy = (
        objective_of(weight, dense, inputs, 0.01)
        for weight in (solved, least_squares(dense, mask, inputs, 0.01), torch.zeros_like(dense))
    )
    assert bool((reached <= optimum * (1 + 1e-5) + 1e-9 * energy).all())


def test_more_steps_are_no_worse() -> None:
    dense, mask, inputs = drawn((23, 6, 24, "correlated", "0.6"))
    gram = gram_of(inputs)
    for make in (ADMM, lambda iterations: ConjugateGradient(iterations, tolerance=0.0)):
        values = [
            float(objective_of(s.solve(dense, dense * mask, mask, gram), dense, inputs, s.ridge).sum())
            for s in map(make, (1, 3, 10, 30))
        ]
        assert values == sorted(values, reverse=True)
        assert values[-1] < 0.97 * values[0]


def test_the_usual_settings() -> None:
    assert vars(ADMM()) == {"ridge": 0.1, "iterations": 20, "penalty": 1.0}
    assert vars(ConjugateGradient()) == {"ridge": 0.3, "iterations": 100, "tolerance": 1e-3}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ADMM(iterations=0), "iterations 0 does not fit; give 1 or more, such as 20"),
        (lambda: ADMM(penalty=0.0), "penalty 0.0 does not fit; give more than 0, such as 1.0"),
        (lambda: ADMM(penalty=float("nan")), "penalty nan does not fit; give more than 0, such as 1.0"),
        (lambda: ADMM(ridge=-0.1), "ridge -0.1 does not fit; give 0 or more, such as 0.1"),
        (lambda: ConjugateGradient(iterations=0), "iterations 0 does not fit; give 1 or more, such as 100"),
        (lambda: ConjugateGradient(iterations=-3), "iterations -3 does not fit; give 1 or more, such as 100"),
        (lambda: ConjugateGradient(tolerance=-1e-3), "tolerance -0.001 does not fit; give 0 or more, such as 0.001"),
        (lambda: ConjugateGradient(ridge=-1), "ridge -1 does not fit; give 0 or more, such as 0.1"),
        (lambda: ConjugateGradient(ridge=float("nan")), "ridge nan does not fit; give 0 or more, such as 0.1"),
    ],
)
def test_parameters_out_of_range(make: Callable[[], Solver], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence) + "$"):
        make()


@solvers
def test_inputs_that_are_no_numbers(make: Callable[[float], Solver]) -> None:
    dense, mask, inputs = drawn((0, 3, 12, "plain", "0.5"))
    inputs[2, 5] = torch.nan
    with pytest.raises(FloatingPointError, match=r"^the Gram matrix of the layer holds NaN or infinite values$"):
        make(0.1).solve(dense, dense * mask, mask, gram_of(inputs))
