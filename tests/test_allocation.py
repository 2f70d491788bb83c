"""How a total sparsity is shared out among blocks, and the figures it goes by."""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lit_prune.data import BATCH, Streams, alone
from lit_prune.masks import OWL, Allocation, ByError, Sparsity
from lit_prune.models import BlockCall, Home, capture_calls, embed, find_blocks
from lit_prune.modules import block_needs

CPU = torch.device("cpu")
NEEDS = st.floats(0, 1e6, allow_nan=False, width=32)
SIZES = st.integers(1, 10**12)


def mean_of(shares: list[float], sizes: list[int]) -> float:
    """Weighted by size, exactly."""
    return float(sum(Fraction(share) * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes))


@given(
    st.lists(st.tuples(NEEDS, SIZES), min_size=1, max_size=8),
    st.floats(0, 0.99),
    st.floats(0.001, 0.999),
)
@settings(max_examples=200)
@example([(1.0, 5), (2.0, 7)], 0.0, 0.08)
@example([(1.0, 5), (2.0, 7)], 0.99, 0.08)
@example([(1.0, 5), (1.0, 7)], 0.5, 0.08)
@example([(0.0, 1), (1.0, 10**12)], 0.5, 0.9)
def test_shares(blocks: list[tuple[float, int]], total: float, spread: float) -> None:
    needs, sizes = ([block[i] for block in blocks] for i in range(2))
    shares = OWL(spread).shares(needs, sizes, total)
    assert len(shares) == len(needs)
    assert all(isinstance(share, float) and 0 <= share <= 0.99 for share in shares)
    assert mean_of(shares, sizes) == pytest.approx(total, abs=1e-9)
    for share, need in zip(shares, needs, strict=True):
        for other, other_need in zip(shares, needs, strict=True):
            assert share == other if need == other_need else (share <= other) == (need >= other_need) or share == other
    difference = max(shares) - min(shares)
    if min(needs) == max(needs):
        assert difference == 0
    elif min(shares) > 0 and max(shares) < 0.99:
        assert difference == pytest.approx(2 * spread, abs=1e-9)
        # linear in between
        for share, need in zip(shares, needs, strict=True):
            place = (need - min(needs)) / (max(needs) - min(needs))
            assert share == pytest.approx(max(shares) - 2 * spread * place, abs=1e-9)
    else:
        assert difference <= 2 * spread + 1e-9


@given(st.lists(st.tuples(NEEDS, SIZES), min_size=2, max_size=6), st.floats(0.05, 0.95))
@settings(max_examples=100)
def test_what_clipping_takes_is_given_to_the_others(blocks: list[tuple[float, int]], total: float) -> None:
    """All shares are the offsets shifted by one number and clipped: those that are not clipped are on one line."""
    needs, sizes = ([block[i] for block in blocks] for i in range(2))
    low, high = min(needs), max(needs)
    assume(high > low)
    spread = 0.9
    shares = ByError(spread).shares(needs, sizes, total)
    offsets = [spread * (1 - 2 * (need - low) / (high - low)) for need in needs]
    shifts = [s - offset for s, offset in zip(shares, offsets, strict=True) if 0 < s < 0.99]
    if not shifts:
        return
    for share, offset in zip(shares, offsets, strict=True):
        assert share == pytest.approx(min(max(offset + shifts[0], 0.0), 0.99), abs=1e-9)


def test_worked_examples_of_shares() -> None:
    method = OWL(spread=0.1)
    assert method.shares([0, 1, 2], [1, 1, 1], 0.5) == pytest.approx([0.6, 0.5, 0.4])
    assert method.shares([2, 0], [3, 1], 0.5) == pytest.approx([0.45, 0.65])
    assert method.shares([7], [10], 0.3) == pytest.approx([0.3])
    assert method.shares([4, 4, 4], [1, 2, 3], 0.7) == pytest.approx([0.7, 0.7, 0.7])
    assert method.shares([0, 1], [1, 1], 0.02) == pytest.approx([0.04, 0.0])
    assert method.shares([0, 1], [1, 1], 0.97) == pytest.approx([0.99, 0.95])
    assert method.shares([0, 1], [1, 3], 0.95) == pytest.approx([0.99, (0.95 * 4 - 0.99) / 3])


@pytest.mark.parametrize("outlier", [1.5, 5.0, 10.0])
def test_owl_counts_outliers(outlier: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [
        torch.randn(shape, generator=generator).abs().pow(5) * scale
        for shape, scale in (((6, 10), 1.0), ((3, 20), 100.0), ((1, 1), 1.0), ((8, 5), 0.0))
    ]
    count, weights = 0, 0
    for score in scores:
        entries = score.double().flatten().tolist()
        mean = math.fsum(entries) / len(entries)
        count += sum(entry > outlier * mean for entry in entries)
        weights += len(entries)
    assert count > 0

    def unused() -> float:
        raise AssertionError("OWL goes by the scores alone")

    assert OWL(outlier=outlier).need(scores, unused) == count / weights


def test_owl_counts_each_layer_by_its_own_mean() -> None:
    small, large = torch.ones(10, 10), 1000 * torch.ones(10, 10)
    assert OWL().need([small, large], lambda: 0.0) == 0
    small[0, 0] = 50
    assert OWL().need([small, large], lambda: 0.0) == 1 / 200


def test_the_error_is_the_need() -> None:
    assert ByError().need([torch.ones(2, 2)], lambda: 0.125) == 0.125


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        *(
            (lambda kind=kind, value=value: kind(spread=value), f"spread {value} does not fit; give a number between")
            for kind in (OWL, ByError)
            for value in (0, 1, -0.1, 1.5, math.nan)
        ),
        (lambda: OWL(outlier=1), "outlier 1 does not fit; give more than 1, such as 5"),
        (lambda: OWL(outlier=math.nan), "outlier nan does not fit; give more than 1, such as 5"),
    ],
)
def test_parameters_out_of_range(make: Callable[[], Allocation], sentence: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(sentence)):
        make()


@cache
def tiny() -> tuple[Home, list[BlockCall], Tensor]:
    """A tiny Llama, with weights large enough to matter, their calls, and a stream."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    blocks, tokens = find_blocks(model), torch.randint(64, (10, 12))
    return Home(model, blocks), capture_calls(model, blocks, tokens), embed(model, blocks, tokens)


ALL = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
FREE = {
    "all layers": [ALL] * 4,
    "some layers": [ALL, ["mlp.down_proj", "self_attn.q_proj"], ALL[:4], ALL],
    "not all blocks": [ALL, [], ALL, []],
}


@torch.no_grad()
def dense_pass(free: list[list[str]]) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
    """Each block's input and output on the dense stream, and the inputs of its free layers, by hooks."""
    home, calls, hidden = tiny()
    blocks = home.blocks
    passed = []
    for block, call, names in zip(blocks, calls, free, strict=True):
        seen: dict[str, Tensor] = {}
        handles = [
            block.get_submodule(name).register_forward_hook(
                lambda _, args, __, name=name, seen=seen: seen.update({name: args[0].flatten(0, 1).double()})
            )
            for name in names
        ]
        output = call(block, hidden)
        for handle in handles:
            handle.remove()
        passed.append((hidden, output, seen))
        hidden = output
    return passed


@torch.no_grad()
def error_of(block: nn.Module, call: BlockCall, hidden: Tensor, output: Tensor, scores: dict, share: float) -> float:
    """Remove each row's lowest floor(in · share) scores, in a copy of the block."""
    pruned = copy.deepcopy(block)
    for name, score in scores.items():
        weight = pruned.get_submodule(name).weight
        for row, order in enumerate(score.argsort(1)):
            weight[row, order[: math.floor(Fraction(str(share)) * len(order))]] = 0
    errors = []
    for sample, expected in zip(hidden, output, strict=True):
        got = call(pruned, sample[None])[0].double()
        errors += [
            float((a - b).square().sum() / b.square().sum()) for a, b in zip(got, expected.double(), strict=True)
        ]
    return math.fsum(errors) / len(errors)


def streams(hidden: Tensor) -> Streams:
    """Of which statistics see all."""
    return Streams(hidden, {}, alone(len(hidden)), CPU)


@pytest.mark.parametrize("free", FREE.values(), ids=FREE.keys())
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_needs_of_blocks(free: list[list[str]], share: float) -> None:
    home, calls, hidden = tiny()
    blocks = home.blocks
    before = {name: tensor.clone() for name, tensor in blocks.state_dict().items()}
    stream = hidden.clone()
    by_error = block_needs(ByError(), home, calls, free, streams(hidden), Sparsity(share))
    by_outliers = block_needs(OWL(outlier=3), home, calls, free, streams(hidden), Sparsity(share))
    assert all(torch.equal(tensor, before[name]) for name, tensor in blocks.state_dict().items())
    assert torch.equal(hidden, stream)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in blocks.modules())

    errors, outliers = [], []
    for block, call, (given_, output, seen) in zip(blocks, calls, dense_pass(free), strict=True):
        if not seen:
            continue
        scores = {
            name: block.get_submodule(name).weight.detach().double().abs() * inputs.square().sum(0).sqrt()
            for name, inputs in seen.items()
        }
        errors.append(error_of(block, call, given_, output, scores, share))
        count = sum(int((score > 3 * score.mean()).sum()) for score in scores.values())
        outliers.append(count / sum(score.numel() for score in scores.values()))
    assert by_error == pytest.approx(errors, rel=1e-4)
    assert by_outliers == outliers
    assert len(set(by_error)) == len(set(by_outliers)) == len(errors)
    assert all(need > 0 for need in by_outliers)


def test_more_is_lost_at_a_higher_share() -> None:
    home, calls, hidden = tiny()
    given_ = (home, calls, FREE["all layers"], streams(hidden))
    low, high = (block_needs(ByError(), *given_, Sparsity(share)) for share in (0.2, 0.8))
    assert all(a < b for a, b in zip(low, high, strict=True))
    assert block_needs(ByError(), *given_, Sparsity(0)) == [0.0] * 4


def test_owl_computes_no_pruned_block() -> None:
    home, calls, hidden = tiny()
    blocks = home.blocks
    passes: defaultdict[int, int] = defaultdict(int)
    handles = [
        block.register_forward_pre_hook(lambda *_, index=index: passes.update({index: passes[index] + 1}))
        for index, block in enumerate(blocks)
    ]
    counts = []
    for allocation in (OWL(), ByError()):
        passes.clear()
        block_needs(allocation, home, calls, FREE["not all blocks"], streams(hidden[:BATCH]), Sparsity(0.5))
        counts.append(dict(passes))
    for handle in handles:
        handle.remove()
    assert counts == [{0: 1, 1: 1, 2: 1, 3: 1}, {0: 2, 1: 1, 2: 2, 3: 1}]
