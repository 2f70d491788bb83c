"""Gram matrices against sums in float64; who shares one, and what is computed once for all that do."""

import math
import re
from collections.abc import Callable
from types import ModuleType
from weakref import ReferenceType, ref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lit_prune.masks.solvers.admm
import lit_prune.masks.sparsegpt
from lit_prune.masks import (
    ADMM,
    ALPS,
    GradientNorm,
    Gram,
    InputNorm,
    LayerMask,
    LayerStatistics,
    SparseGPT,
    Sparsity,
    Wanda,
    solvers,
)
from lit_prune.masks.statistics import NOTHING
from lit_prune.models import capture_calls, embed, find_blocks, linear_layers, weight_of
from lit_prune.modules import observe, prune_layers

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def stream(seed: int, samples: int, tokens: int, width: int, mean: float = 0.0, spread: float = 0.0) -> Tensor:
    """Inputs of shape (samples, tokens, width); the features' scales reach from 10^-spread to 10^spread."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, tokens, width, generator=generator) + mean
    return x * torch.logspace(-spread, spread, width)


def gram_of(*batches: Tensor) -> Gram:
    gram = Gram()
    for batch in batches:
        gram.add(batch)
    return gram


def check_gram(gram: Gram, inputs: Tensor, tolerance: float = 1e-5) -> None:
    """Every entry is right relative to the norms of its two features; the matrix is symmetric to the last bit."""
    x = inputs.double().flatten(0, -2)
    exact = x.T @ x
    norms = exact.diagonal().sqrt()
    matrix = gram.matrix
    assert matrix.dtype == torch.promote_types(inputs.dtype, torch.float32)
    assert matrix.shape == exact.shape
    assert torch.equal(matrix, matrix.T)
    assert bool(((matrix.double() - exact).abs() <= tolerance * torch.outer(norms, norms)).all())
    assert torch.equal(gram.norm, matrix.diagonal().sqrt().float())
    torch.testing.assert_close(gram.norm, norms.float(), rtol=max(tolerance, 1e-6), atol=0)
    assert gram.tokens == len(x)


@given(
    seeds,
    st.integers(1, 4),
    st.integers(1, 90),
    st.integers(1, 140),
    dtypes,
    st.sampled_from([0.0, 1.0, 30.0]),
    st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=60)
@example(0, 1, 1, 1, torch.float32, 0.0, 0.0)
@example(0, 2, 1300, 1, torch.float32, 100.0, 0.0)
@example(0, 2, 1024, 6, torch.float32, 0.0, 3.0)
@example(0, 1, 2049, 129, torch.bfloat16, 3.0, 3.0)
@example(0, 3, 700, 257, torch.float16, 0.0, 1.0)
def test_gram_matrix_of_any_inputs(
    seed: int, samples: int, tokens: int, width: int, dtype: torch.dtype, mean: float, spread: float
) -> None:
    inputs = stream(seed, samples, tokens, width, mean, spread).to(dtype)
    check_gram(gram_of(inputs), inputs)


@pytest.mark.parametrize("width", [1, 2, 3, 5, 9])
def test_gram_matrix_of_inputs_in_float64(width: int) -> None:
    inputs = stream(0, 2, 600, width, 5.0).double() + 1e-9
    check_gram(gram_of(inputs), inputs, tolerance=1e-13)


def test_gram_matrix_of_a_long_text_with_a_large_mean() -> None:
    inputs = stream(0, 4, 4096, 9, mean=100.0, spread=3.0)
    check_gram(gram_of(*inputs.split(1)), inputs)


@given(
    seeds,
    st.integers(1, 6),
    st.sampled_from([1, 7, 200, 341, 512, 1024, 1500]),
    st.sampled_from([1, 3, 8, 30]),
    dtypes,
    st.lists(st.integers(1, 4), max_size=5),
    st.booleans(),
)
@settings(max_examples=50)
@example(0, 5, 1024, 4, torch.float32, [1, 2], True)
@example(0, 2, 1500, 4, torch.float32, [1], False)
def test_gram_matrix_for_any_split_into_batches(
    seed: int, samples: int, tokens: int, width: int, dtype: torch.dtype, sizes: list[int], joined: bool
) -> None:
    """Whether the samples of a batch come as (samples, tokens, in) or all in one row, as OPT's MLP sees them."""
    inputs = stream(seed, samples, tokens, width, 1.0).to(dtype)
    starts = sorted({0, *(min(sum(sizes[:i]), samples) for i in range(1, len(sizes) + 1))} - {samples})
    batches = inputs.tensor_split(starts[1:])
    split = gram_of(*(batch.flatten(0, 1) if joined else batch for batch in batches))
    assert torch.equal(gram_of(inputs).matrix, split.matrix)
    assert split.tokens == samples * tokens


@pytest.mark.parametrize("tokens", [40, 1024, 3000])
def test_gram_matrix_of_inputs_that_lie_across(tokens: int) -> None:
    inputs = stream(0, 1, tokens, 24)[0]
    across = inputs.T.contiguous().T
    assert not across.is_contiguous()
    check_gram(gram_of(across), inputs)


@given(seeds, st.lists(st.integers(1, 1500), min_size=2, max_size=4), st.integers(1, 20))
@settings(max_examples=25)
@example(0, [1024, 1024], 4)
@example(0, [1, 1], 2)
def test_a_gram_matrix_read_in_the_middle_goes_on(seed: int, parts: list[int], width: int) -> None:
    inputs = stream(seed, 1, sum(parts), width, 1.0)[0]
    gram, done = Gram(), 0
    for part in inputs.split(parts):
        gram.add(part)
        done += len(part)
        check_gram(gram, inputs[:done])
        check_gram(gram, inputs[:done])  # to read changes nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_that_was_read_is_not_changed_by_later_input(dtype: torch.dtype) -> None:
    inputs = stream(0, 2, 1500, 8).to(dtype)
    gram = gram_of(inputs[0])
    first = gram.matrix
    copy = first.clone()
    gram.add(inputs[1])
    assert not torch.equal(gram.matrix, copy)
    assert torch.equal(first, copy)


@pytest.mark.parametrize("kind", [InputNorm, Gram])
@pytest.mark.parametrize("width", [1, 8, 128, 300])
def test_nothing_changes_or_is_added_once_all_ranks_are_counted(kind: type[InputNorm], width: int) -> None:
    inputs = stream(0, 2, 1500, width)
    before, after = kind("model.layers.0.mlp.up_proj"), kind("model.layers.0.mlp.up_proj")
    before.add(inputs)
    after.add(inputs)
    after.join()
    assert after.tokens == before.tokens
    assert torch.equal(after.norm, before.norm)
    if isinstance(before, Gram) and isinstance(after, Gram):
        assert not after._panels, "its memory"
        assert torch.equal(after.matrix, before.matrix)
        check_gram(after, inputs)
    with pytest.raises(
        RuntimeError, match=r"^the calibration inputs of model\.layers\.0\.mlp\.up_proj have been count"
    ):
        after.add(inputs)


def test_inputs_may_change_once_they_are_taken_in() -> None:
    inputs = stream(0, 1, 50, 4)
    gram, copy = gram_of(inputs), inputs.clone()
    inputs.zero_()
    check_gram(gram, copy)


def test_inputs_that_need_gradients_leave_none_behind() -> None:
    matrix = gram_of(stream(0, 1, 5, 4).requires_grad_()).matrix
    assert not matrix.requires_grad


@pytest.mark.parametrize("empty", [False, True], ids=["never added", "no tokens"])
def test_nothing_seen(empty: bool) -> None:
    gram = Gram("model.layers.3.mlp.down_proj")
    if empty:
        gram.add(torch.empty(0, 5, 8))
    readings: list[Callable[[], object]] = [
        lambda: gram.matrix,
        lambda: gram.norm,
        lambda: gram.once(lambda _: 1),
        lambda: InputNorm(gram.name).norm,
    ]
    for read in readings:
        with pytest.raises(RuntimeError, match=r"^no calibration input has reached model\.layers\.3\.mlp\.down_proj$"):
            read()


def test_what_is_derived_is_computed_once_per_settings() -> None:
    calls = []

    def derive(gram: Gram, *settings: float) -> Tensor:
        calls.append(settings)
        return gram.matrix * math.prod(settings)

    def derive_other(gram: Gram) -> float:
        calls.append(("other",))
        return float(gram.matrix.sum())

    inputs = stream(0, 3, 10, 4)
    gram = gram_of(inputs[0])
    assert gram.once(derive, 2.0) is gram.once(derive, 2.0)
    torch.testing.assert_close(gram.once(derive, 2.0, 3.0), gram.matrix * 6)
    gram.once(derive)
    assert gram.once(derive_other) == gram.once(derive_other)
    assert calls == [(2.0,), (2.0, 3.0), (), ("other",)]

    gram.add(inputs[1])  # stays below the chunk that is summed at once: the old results are wrong all the same
    torch.testing.assert_close(gram.once(derive, 2.0), gram_of(inputs[:2]).matrix * 2)
    gram.add(inputs[2])
    _ = gram.matrix
    torch.testing.assert_close(gram.once(derive, 2.0), gram_of(inputs).matrix * 2)
    assert calls[4:] == [(2.0,), (2.0,)]


def test_two_gram_matrices_share_nothing() -> None:
    one, other = gram_of(torch.ones(1, 2, 3)), gram_of(torch.ones(1, 5, 3))
    assert one.once(lambda gram: gram.tokens) == 2
    assert other.once(lambda gram: gram.tokens) == 5


def observed(method: LayerMask, solver: solvers.Solver | None = None) -> tuple[dict, dict[str, LayerStatistics], dict]:
    """The layers of a tiny Llama's second block, their statistics of two batches, and their inputs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    blocks, tokens = find_blocks(model), torch.randint(64, (5, 30))
    call, hidden = capture_calls(model, blocks, tokens)[1], embed(model, blocks, tokens)
    layers = linear_layers(blocks[1])
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name, layer in layers.items()
    ]
    with observe(layers, method, solver, "model.layers.1") as statistics, torch.no_grad():
        for part in hidden.split(3):
            call(blocks[1], part)
    for handle in handles:
        handle.remove()
    return layers, statistics, {name: torch.cat(inputs) for name, inputs in seen.items()}


OWNERS = {
    "self_attn.q_proj": "self_attn.q_proj",
    "self_attn.k_proj": "self_attn.q_proj",
    "self_attn.v_proj": "self_attn.q_proj",
    "self_attn.o_proj": "self_attn.o_proj",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.gate_proj",
    "mlp.down_proj": "mlp.down_proj",
}


@pytest.mark.parametrize(
    ("method", "solver"), [(SparseGPT(), None), (Wanda(), solvers.ConjugateGradient())], ids=["method", "solver"]
)
def test_seven_layers_of_a_llama_block_have_four_gram_matrices(
    method: LayerMask, solver: solvers.Solver | None
) -> None:
    layers, statistics, inputs = observed(method, solver)
    assert statistics.keys() == layers.keys() == OWNERS.keys()
    for name, owner in OWNERS.items():
        gram = statistics[name].gram
        assert gram is statistics[owner].gram
        assert gram is statistics[name].norms
        assert gram.name == f"model.layers.1.{owner}"
        check_gram(gram, inputs[name])
    assert len({id(known.gram) for known in statistics.values()}) == 4


@pytest.mark.parametrize(
    ("method", "solver", "module"),
    [
        (SparseGPT(), None, lit_prune.masks.sparsegpt),
        (ADMM(), None, lit_prune.masks.solvers.admm),
        (Wanda(), solvers.ADMM(), lit_prune.masks.solvers.admm),
        (ADMM(), solvers.ADMM(), lit_prune.masks.solvers.admm),  # of the same penalty and ridge
    ],
    ids=["SparseGPT", "ADMM", "ADMM as solver", "ADMM twice"],
)
@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_each_gram_matrix_is_factored_once(
    method: LayerMask, solver: solvers.Solver | None, module: ModuleType, sparsity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    factored, factor = [], module.cholesky

    def counted(matrix: Tensor, dampening: float, name: str) -> Tensor:
        factored.append(name)
        return factor(matrix, dampening, name)

    monkeypatch.setattr(module, "cholesky", counted)
    layers, statistics, _ = observed(method, solver)
    masks = prune_layers(layers, statistics, method, Sparsity(sparsity), solver)
    assert sorted(factored) == sorted(f"model.layers.1.{owner}" for owner in set(OWNERS.values()))
    for name, layer in layers.items():
        assert int((~masks[name]).sum()) == masks[name].numel() // 2
        assert not weight_of(layer)[~masks[name]].any()


def test_what_is_derived_is_let_go_when_all_that_share_it_are_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    factors: list[ReferenceType[Tensor]] = []
    derive, held = lit_prune.masks.sparsegpt.reverse_cholesky, []

    def noted(gram: Gram, dampening: float) -> tuple[Tensor, Tensor]:
        held.append(sum(factor() is not None for factor in factors))
        factor, dead = derive(gram, dampening)
        factors.append(ref(factor))
        return factor, dead

    monkeypatch.setattr(lit_prune.masks.sparsegpt, "reverse_cholesky", noted)
    layers, statistics, _ = observed(SparseGPT())
    prune_layers(layers, statistics, SparseGPT(), Sparsity("0.5"))
    assert held == [0, 0, 0, 0]
    assert [factor() for factor in factors] == [None] * 4


def test_alps_decomposes_each_gram_matrix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, eigh = [], torch.linalg.eigh

    def counted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(matrix))
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    method = ALPS(iterations=6)
    layers, statistics, _ = observed(method)
    prune_layers(layers, statistics, method, Sparsity("0.5"))
    assert sizes == [32, 32, 32, 48]


def test_statistics_that_were_not_observed() -> None:
    norm, gram, gradient = InputNorm(), Gram(), GradientNorm(2)
    assert LayerStatistics(norm).norms is norm
    assert LayerStatistics(gram).norms is gram
    assert LayerStatistics(gram).gram is gram
    assert LayerStatistics(None, gradient).gradients(2) is gradient
    with pytest.raises(TypeError, match="needs the norms of a layer's inputs, but was given None"):
        _ = NOTHING.norms
    for known, given_ in ((NOTHING, "None"), (LayerStatistics(norm), repr(norm))):
        sentence = f"needs the Gram matrix of a layer's inputs, but was given {given_}"
        with pytest.raises(TypeError, match=re.escape(sentence)):
            _ = known.gram
    for known, given_ in ((LayerStatistics(gram), "None"), (LayerStatistics(None, GradientNorm(1)), "1-norms")):
        with pytest.raises(TypeError, match=f"needs 2-norms of the gradients of a layer's weights, .* given {given_}$"):
            known.gradients(2)


@pytest.mark.parametrize("method", [SparseGPT(), ADMM(), ALPS()], ids=lambda method: type(method).__name__)
def test_methods_refuse_statistics_they_cannot_work_with(method: LayerMask) -> None:
    weight, norm = torch.ones(2, 4), InputNorm()
    norm.add(torch.ones(1, 3, 4))
    with pytest.raises(TypeError, match="needs the Gram matrix"):
        method.prune(weight, LayerStatistics(norm), Sparsity("0.5"))
    with pytest.raises(RuntimeError, match="no calibration input has reached the layer"):
        method.prune(weight, LayerStatistics(Gram("the layer")), Sparsity("0.5"))
