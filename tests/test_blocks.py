"""Blocks of many architectures, called one by one: to the last bit what the whole model computes."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import BadInput
from lit_prune.masks import InputNorm, Magnitude, Wanda
from lit_prune.models import (
    BlockCall,
    capture_calls,
    embed,
    find_blocks,
    linear_layers,
    oriented,
    watch_inputs,
    weight_of,
)
from lit_prune.modules.pruning import observe

SEQUENCE, WINDOW, VOCABULARY = 16, 6, 96
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTH = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCABULARY, **IDS}
COMMON = {**WIDTH, "num_key_value_heads": 2, "intermediate_size": 48, "num_hidden_layers": 2}
FOUR = {**COMMON, "num_hidden_layers": 4, "sliding_window": WINDOW, "head_dim": 8}
ALTERNATING = {**FOUR, "layer_types": ["sliding_attention", "full_attention"] * 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY, **IDS}
NEOX = {**WIDTH, "intermediate_size": 48, "num_hidden_layers": 2}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}

CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "opt": lambda: tf.OPTConfig(**OPT, vocab_size=VOCABULARY, max_position_embeddings=32, **IDS),
    "qwen3": lambda: tf.Qwen3Config(**COMMON, head_dim=8),
    "mistral": lambda: tf.MistralConfig(**COMMON, sliding_window=WINDOW),
    "gemma2": lambda: tf.Gemma2Config(**ALTERNATING),
    "gemma3": lambda: tf.Gemma3TextConfig(**ALTERNATING),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**NEOX),
    "phi3": lambda: tf.Phi3Config(**COMMON),
    "falcon": lambda: tf.FalconConfig(**WIDTH, num_hidden_layers=2),
    "falcon_grouped": lambda: tf.FalconConfig(
        **WIDTH, num_hidden_layers=2, new_decoder_architecture=True, num_kv_heads=2
    ),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "openai_gpt": lambda: tf.OpenAIGPTConfig(**{**GPT2, "n_ctx": 32}),
    "cohere": lambda: tf.CohereConfig(**COMMON, use_qk_norm=True),
}

GATED = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
QKVO = [f"self_attn.{name}_proj" for name in "qkvo"]
# the layers of a block, those that see one and the same input in one tuple
LAYERS: dict[str, list[tuple[str, ...]]] = {
    "llama": [tuple(QKVO[:3]), (QKVO[3],), tuple(GATED[:2]), (GATED[2],)],
    "opt": [tuple(f"self_attn.{n}_proj" for n in "kvq"), ("self_attn.out_proj",), ("fc1",), ("fc2",)],
    "gpt_neox": [
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ],
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    # attention and MLP side by side, after one norm
    "falcon": [
        ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
        ("self_attention.dense",),
        ("mlp.dense_4h_to_h",),
    ],
    "falcon_grouped": [
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    # attention and MLP side by side, after one norm
    "cohere": [(*QKVO[:3], *GATED[:2]), (QKVO[3],), (GATED[2],)],
}
LAYERS |= dict.fromkeys(["qwen3", "mistral", "gemma2", "gemma3"], LAYERS["llama"])
LAYERS["openai_gpt"] = LAYERS["gpt2"]


@cache
def model(architecture: str) -> tf.PreTrainedModel:
    """A tiny model, with weights large enough that attention is far from even."""
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def tokens(samples: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, SEQUENCE), generator=torch.Generator().manual_seed(seed))


def calls_of(made: tf.PreTrainedModel) -> tuple[nn.ModuleList, list[BlockCall]]:
    """The blocks and their calls, captured on a sequence that no test goes on to use."""
    blocks = find_blocks(made)
    return blocks, capture_calls(made, blocks, tokens(1, seed=99))


@torch.no_grad()
def walk(blocks: nn.ModuleList, calls: list[BlockCall], hidden: Tensor) -> list[Tensor]:
    """The hidden states before the first block and after each."""
    states = [hidden]
    for block, call in zip(blocks, calls, strict=True):
        states.append(call(block, states[-1]))
    return states


@torch.no_grad()
def whole(made: tf.PreTrainedModel, blocks: nn.ModuleList, batch: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same hidden states as the whole model computes them, and its logits."""
    states: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(_: nn.Module, __: Any, output: Any) -> None:
        states.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(after))
    logits = made(input_ids=batch, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return states, logits


@torch.no_grad()
def logits_from(made: tf.PreTrainedModel, blocks: nn.ModuleList, hidden: Tensor) -> Tensor:
    """The logits that the model makes of hidden states after the last block; its own count for nothing."""

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        return hidden if isinstance(output, Tensor) else type(output)([hidden, *output[1:]])

    handle = blocks[-1].register_forward_hook(replace)
    try:
        return made(input_ids=tokens(len(hidden), seed=7), use_cache=False).logits
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", CONFIGS)
def test_blocks_one_by_one_compute_what_the_model_computes(architecture: str) -> None:
    made, batch = model(architecture), tokens(3)
    blocks, calls = calls_of(made)
    assert len(blocks) == len(calls) == made.config.num_hidden_layers
    states, logits = whole(made, blocks, batch)
    walked = walk(blocks, calls, embed(made, blocks, batch))
    for step, (mine, theirs) in enumerate(zip(walked, states, strict=True)):
        assert mine.shape == (3, SEQUENCE, 32)
        assert torch.equal(mine, theirs), f"state {step}"
    assert torch.equal(logits_from(made, blocks, walked[-1]), logits)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_where_attention_alternates_the_first_blocks_arguments_would_be_wrong(architecture: str) -> None:
    made, batch = model(architecture), tokens(3)
    blocks, calls = calls_of(made)
    states, _ = whole(made, blocks, batch)
    wrong = walk(blocks, [calls[0]] * len(blocks), embed(made, blocks, batch))
    assert torch.equal(wrong[1], states[1])
    assert not torch.allclose(wrong[2], states[2])


def test_the_sliding_window_matters() -> None:
    """Else the models above would not show whether a window's mask is passed on."""
    made, batch = model("mistral"), tokens(3)
    blocks, calls = calls_of(made)
    changed = batch.clone()
    changed[:, 0] = (changed[:, 0] + 1) % VOCABULARY
    mine, other = (calls[0](blocks[0], embed(made, blocks, b)) for b in (batch, changed))
    assert torch.equal(mine[:, WINDOW:], other[:, WINDOW:])
    assert not torch.equal(mine[:, WINDOW - 1], other[:, WINDOW - 1])


@pytest.mark.parametrize("architecture", CONFIGS)
def test_linear_layers(architecture: str) -> None:
    for block in find_blocks(model(architecture)):
        layers = linear_layers(block)
        assert sorted(layers) == sorted(name for group in LAYERS[architecture] for name in group)
        matrices = {id(p) for name, p in block.named_parameters() if p.ndim == 2 and "norm" not in name}
        assert {id(layer.weight) for layer in layers.values()} == matrices


@pytest.mark.parametrize("architecture", CONFIGS)
def test_weights_are_views_of_shape_out_in(architecture: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in linear_layers(find_blocks(model(architecture))[0]).values():
        weight = weight_of(layer)
        saved = weight.clone()
        rows, columns = weight.shape
        inputs = torch.randn(2, 5, columns, generator=generator)
        assert layer(inputs).shape == (2, 5, rows)
        assert not weight.requires_grad
        dense = torch.randn(rows, columns, generator=generator)
        weight.copy_(dense)
        bias = 0 if layer.bias is None else layer.bias
        expected = torch.einsum("btj,ij->bti", inputs, dense) + bias
        torch.testing.assert_close(layer(inputs), expected)
        assert torch.equal(oriented(layer, oriented(layer, dense)), dense)
        assert oriented(layer, dense).shape == ((columns, rows) if isinstance(layer, Conv1D) else (rows, columns))
        weight.copy_(saved)


def test_gpt2_is_what_tests_the_transposition() -> None:
    layers = linear_layers(find_blocks(model("gpt2"))[0]).values()
    assert all(isinstance(layer, Conv1D) for layer in layers)
    assert any(len(set(weight_of(layer).shape)) == 2 for layer in layers)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_statistics_are_shared_and_right(architecture: str) -> None:
    made, batch = model(architecture), tokens(3)
    blocks, calls = calls_of(made)
    hidden = embed(made, blocks, batch)
    block, call = blocks[0], calls[0]
    layers = linear_layers(block)
    seen: defaultdict[str, list[Tensor]] = defaultdict(list)
    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hook = layer.register_forward_hook(lambda _, args, __, name=name: seen[name].append(args[0]))
            hooks.callback(hook.remove)
        statistics = hooks.enter_context(observe(layers, Wanda()))
        for part in hidden.split(2):
            call(block, part)
    assert statistics.keys() == layers.keys()
    groups: defaultdict[int, set[str]] = defaultdict(set)
    for name, known in statistics.items():
        statistic = known.inputs
        assert isinstance(statistic, InputNorm)
        squares = torch.cat([inputs.flatten(0, -2) for inputs in seen[name]]).double().square().sum(0)
        assert squares.shape == (weight_of(layers[name]).shape[1],)
        torch.testing.assert_close(statistic.norm.double(), squares.sqrt(), rtol=1e-5, atol=0)
        groups[id(statistic)].add(name)
    assert sorted(map(sorted, groups.values())) == sorted(sorted(group) for group in LAYERS[architecture])
    assert not any(layer._forward_pre_hooks for layer in layers.values())


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_statistics_do_not_depend_on_batches_even_where_samples_are_joined(sizes: list[int]) -> None:
    """OPT hands its MLP the tokens of all samples in one row."""
    inputs = torch.randn(5, 7, 8)
    layers = {"attention": nn.Linear(8, 8), "mlp": nn.Linear(8, 8), "late": nn.Linear(8, 8)}
    norms = []
    for batches in ([5], sizes):
        with observe(layers, Wanda()) as statistics:
            for index, part in enumerate(inputs.split(batches)):
                layers["attention"](part)
                layers["mlp"](part.flatten(0, 1))
                if index == len(batches) - 1:  # if this is not the first pass, it shares with none
                    layers["late"](part)
        norms.append([statistics[name].norms.norm for name in ("attention", "mlp")])
        assert len({id(known.inputs) for known in statistics.values()}) == (2 if batches == [5] else 3)
    for whole_batch, split in zip(*norms, strict=True):
        assert torch.equal(whole_batch, split)


def test_no_input_is_held_longer_than_the_next_forward_pass() -> None:
    """All of a stream's inputs to all layers would be many times a block."""
    layers = {"q": nn.Linear(8, 8), "k": nn.Linear(8, 8)}
    with observe(layers, Wanda()):
        inputs = [torch.randn(1, 7, 8) for _ in range(3)]
        held = [weakref.ref(part) for part in inputs]
        while inputs:
            part = inputs.pop(0)
            for layer in layers.values():
                layer(part)
        del part
        assert [reference() for reference in held] == [None] * 3


def test_a_method_without_statistic_watches_nothing() -> None:
    layers = {"only": nn.Linear(4, 4)}
    with observe(layers, Magnitude()) as statistics:
        layers["only"](torch.randn(1, 2, 4))
        assert not layers["only"]._forward_pre_hooks
    assert statistics == {}


EXPERTS = {**COMMON, "num_experts_per_tok": 2}
PER_LAYER = {**FOUR, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
LAUREL = {**PER_LAYER, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": None}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tf.MixtralConfig(**EXPERTS, num_local_experts=4), "Block 0 of this Mixtral.*'mlp.experts.gate_up_proj'"),
        (
            tf.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[0]),
            "Block 1 of this Qwen3Moe.*'mlp.experts.gate_up_proj' of shape \\(4, 32, 32\\)",
        ),
        (
            tf.DbrxConfig(
                d_model=32, n_heads=4, n_layers=2, vocab_size=96, max_seq_len=64,
                attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
                ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 4, "hidden_size": 32},
            ),
            "'ffn.experts.mlp.w1' of shape \\(128, 32\\)",
        ),
        (tf.Lfm2Config(**COMMON, layer_types=["full_attention", "conv"]), "Block 1 of this Lfm2.*'conv.conv.weight'"),
        (tf.Gemma3nTextConfig(**LAUREL, num_kv_shared_layers=2), "Block 2 of this Gemma3n.*keys and values"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_models_that_cannot_be_pruned_whole_are_refused(config: tf.PreTrainedConfig, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        find_blocks(tf.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tf.Gemma3nTextConfig(**LAUREL, num_kv_shared_layers=0), "Block 0 of this Gemma3n.*not the same for all"),
        (tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY), r"Block 0 .*\(4, 1, 16\)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_arguments_that_differ_from_sequence_to_sequence_are_refused(config: tf.PreTrainedConfig, words: str) -> None:
    made = tf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(BadInput, match=words):
        calls_of(made)


def test_a_model_with_several_lists_of_blocks_is_refused() -> None:
    config = tf.XLMConfig(emb_dim=32, n_layers=2, n_heads=4, n_words=VOCABULARY)
    with pytest.raises(BadInput, match="In a XLMWithLMHeadModel 4 lists of 2 modules"):
        find_blocks(tf.XLMWithLMHeadModel(config))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_nothing_stays_patched(architecture: str) -> None:
    made, batch = model(architecture), tokens(2)
    blocks = find_blocks(made)
    _, logits = whole(made, blocks, batch)
    capture_calls(made, blocks, batch)
    embed(made, blocks, batch)
    assert torch.equal(whole(made, blocks, batch)[1], logits)
    assert not list(traces(blocks))


@pytest.mark.parametrize("architecture", CONFIGS)
def test_arguments_are_captured_without_logits(architecture: str) -> None:
    made = model(architecture)
    head = made.get_output_embeddings()
    trap = head.register_forward_pre_hook(lambda *_: pytest.fail("the head was computed"))
    try:
        assert len(capture_calls(made, find_blocks(made), tokens(1))) == len(find_blocks(made))
    finally:  # the model is shared with other tests
        trap.remove()


@pytest.mark.parametrize("action", [capture_calls, embed])
def test_nothing_stays_patched_after_an_exception(action: Callable[..., Any]) -> None:
    made, batch = model("llama"), tokens(2)
    blocks = find_blocks(made)
    _, logits = whole(made, blocks, batch)
    with pytest.raises(IndexError):
        action(made, blocks, batch + VOCABULARY)  # no such tokens
    assert not list(traces(blocks))
    assert torch.equal(whole(made, blocks, batch)[1], logits)


def test_nothing_stays_patched_after_an_exception_inside_a_block() -> None:
    made = model("llama")
    blocks = find_blocks(made)
    layers = linear_layers(blocks[0])

    def fail(name: str, _: Tensor) -> None:
        raise ZeroDivisionError(name)

    with pytest.raises(ZeroDivisionError, match=r"self_attn\.q_proj"), watch_inputs(layers, fail):
        capture_calls(made, blocks, tokens(1))
    assert not list(traces(blocks))


def traces(blocks: nn.ModuleList) -> Iterator[str]:
    """Whatever was left behind on a block."""
    for block in blocks:
        yield from (name for name in vars(block) if name == "forward")
        for module in block.modules():
            yield from map(str, [*module._forward_pre_hooks.values(), *module._forward_hooks.values()])


def test_calls_move_to_a_device() -> None:
    _, calls = calls_of(model("llama"))
    assert calls[0].to(torch.device("cpu")) is calls[0]
    moved = calls[0].to(torch.device("meta"))
    rotary = moved.kwargs["position_embeddings"]
    assert {tensor.device.type for tensor in rotary} == {"meta"}
    assert moved.kwargs.keys() == calls[0].kwargs.keys()
    assert calls[0].kwargs["position_embeddings"][0].device.type == "cpu"
