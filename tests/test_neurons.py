"""The neurons of many architectures' MLPs: found by what they do, and taken out for good."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import BadInput
from lit_prune.models import find_blocks, linear_layers, weight_of
from lit_prune.models.neurons import (
    Neurons,
    find_neurons,
    intermediate_key,
    mlp_width,
    set_mlp_width,
    slice_block,
)

VOCABULARY = 96
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTH = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": VOCABULARY, **IDS}
COMMON = {**WIDTH, "num_key_value_heads": 2, "intermediate_size": 48}
SQUARE = {**WIDTH, "num_key_value_heads": 4, "intermediate_size": 32}  # all layers of one shape
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY, **IDS}
GPTJ = {**GPT2, "rotary_dim": 4}
OPT = {**WIDTH, "word_embed_proj_dim": 32, "max_position_embeddings": 32}
NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}

CONFIGS: dict[str, Callable[[], tf.PreTrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "llama_biased": lambda: tf.LlamaConfig(**COMMON, mlp_bias=True),
    "llama_square": lambda: tf.LlamaConfig(**SQUARE),
    "qwen2": lambda: tf.Qwen2Config(**COMMON),
    "gemma2": lambda: tf.Gemma2Config(**COMMON, head_dim=8),
    "cohere": lambda: tf.CohereConfig(**COMMON),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "gpt2_inner": lambda: tf.GPT2Config(**GPT2, n_inner=48),
    "gpt2_square": lambda: tf.GPT2Config(**GPT2, n_inner=32),
    "gpt2_as_wide_as_qkv": lambda: tf.GPT2Config(**GPT2, n_inner=96),
    "gptj": lambda: tf.GPTJConfig(**GPTJ),
    "gptj_square": lambda: tf.GPTJConfig(**GPTJ, n_inner=32),
    "gpt_neo": lambda: tf.GPTNeoConfig(**NEO, vocab_size=VOCABULARY, max_position_embeddings=32, **IDS),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**WIDTH, intermediate_size=48),
    "phi": lambda: tf.PhiConfig(**COMMON),
    "falcon": lambda: tf.FalconConfig(**WIDTH),
    "opt": lambda: tf.OPTConfig(**OPT, ffn_dim=48),
    "opt_square": lambda: tf.OPTConfig(**OPT, ffn_dim=32),
    "opt_norm_after": lambda: tf.OPTConfig(**OPT, ffn_dim=48, do_layer_norm_before=False),
    "xglm": lambda: tf.XGLMConfig(
        d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, vocab_size=VOCABULARY, **IDS
    ),
    "nemotron": lambda: tf.NemotronConfig(**COMMON),
}

GATED = Neurons(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
CONVOLVED = Neurons(("mlp.c_fc",), "mlp.c_proj")
NEURONS = {
    **dict.fromkeys(["llama", "llama_biased", "llama_square", "qwen2", "gemma2", "cohere"], GATED),
    **dict.fromkeys(["gpt2", "gpt2_inner", "gpt2_square", "gpt2_as_wide_as_qkv", "gpt_neo"], CONVOLVED),
    **dict.fromkeys(["gptj", "gptj_square"], Neurons(("mlp.fc_in",), "mlp.fc_out")),
    **dict.fromkeys(["gpt_neox", "falcon"], Neurons(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")),
    "phi": Neurons(("mlp.fc1",), "mlp.fc2"),
    **dict.fromkeys(["opt", "opt_square", "opt_norm_after", "xglm"], Neurons(("fc1",), "fc2")),
    "nemotron": Neurons(("mlp.up_proj",), "mlp.down_proj"),
}

WIDTHS = {"gpt2": ("n_inner", 128), "gptj": ("n_inner", 128), "gpt_neo": ("intermediate_size", 128)}
WIDTHS |= {"falcon": ("ffn_hidden_size", 128), "opt": ("ffn_dim", 48), "opt_square": ("ffn_dim", 32)}
WIDTHS |= {"opt_norm_after": ("ffn_dim", 48), "xglm": ("ffn_dim", 48), "llama_square": ("intermediate_size", 32)}
WIDTHS |= {"gpt2_inner": ("n_inner", 48), "gpt2_square": ("n_inner", 32), "gpt2_as_wide_as_qkv": ("n_inner", 96)}
WIDTHS |= {"gptj_square": ("n_inner", 32)}


@cache
def weights(architecture: str) -> tuple[tf.PreTrainedModel, dict[str, Tensor]]:
    torch.manual_seed(0)
    made = tf.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # biases included, which are 0 at first
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made, {name: tensor.clone() for name, tensor in made.state_dict().items()}


def model(architecture: str) -> tf.PreTrainedModel:
    """A tiny model that a test may change."""
    made = tf.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()
    made.load_state_dict(weights(architecture)[1])
    return made


def logits(made: tf.PreTrainedModel) -> Tensor:
    tokens = torch.randint(3, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return made(input_ids=tokens, use_cache=False).logits


def masks(blocks: nn.ModuleList, width: int, count: int) -> list[Tensor]:
    """For every block others, `count` of them False."""
    kept = []
    for seed in range(len(blocks)):
        mask = torch.ones(width, dtype=torch.bool)
        mask[torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:count]] = False
        kept.append(mask)
    return kept


def take_out(made: tf.PreTrainedModel, blocks: nn.ModuleList, kept: list[Tensor]) -> None:
    """Of all blocks the neurons that are not kept."""
    width = mlp_width(made.config)
    for block, mask in zip(blocks, kept, strict=True):
        slice_block(block, find_neurons(block, width), mask)
    set_mlp_width(made.config, int(kept[0].sum()))


def mask_neurons(blocks: nn.ModuleList, neurons: Neurons, kept: list[Tensor], producers: bool, reader: bool) -> None:
    for block, mask in zip(blocks, kept, strict=True):
        layers = linear_layers(block)
        for name in neurons.producers if producers else ():
            weight_of(layers[name])[~mask] = 0
            if layers[name].bias is not None:
                layers[name].bias.data[~mask] = 0
        if reader:
            weight_of(layers[neurons.reader])[:, ~mask] = 0


@pytest.mark.parametrize("architecture", CONFIGS)
def test_neurons_are_found(architecture: str) -> None:
    made = weights(architecture)[0]
    key, width = WIDTHS.get(architecture, ("intermediate_size", 48))
    assert intermediate_key(made.config) == key
    assert mlp_width(made.config) == width
    before = logits(made)
    for block in find_blocks(made):
        assert find_neurons(block, width) == NEURONS[architecture]
        assert not any("forward" in vars(module) for module in block.modules())
    assert torch.equal(logits(made), before)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_what_is_found_are_neurons(architecture: str) -> None:
    """Without their rows, or without their columns, the model computes the same, and something else than it did."""
    made = model(architecture)
    blocks, width = find_blocks(made), mlp_width(made.config)
    neurons, kept = find_neurons(blocks[0], width), masks(blocks, width, 20)
    dense = logits(made)
    mask_neurons(blocks, neurons, kept, producers=True, reader=False)
    without_rows = logits(made)
    made = model(architecture)
    mask_neurons(find_blocks(made), neurons, kept, producers=False, reader=True)
    torch.testing.assert_close(without_rows, logits(made), rtol=0, atol=1e-5)
    assert not torch.allclose(without_rows, dense, atol=1e-2)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_sliced_model_is_an_ordinary_one(architecture: str, tmp_path: Path) -> None:
    made = model(architecture)
    blocks, width = find_blocks(made), mlp_width(made.config)
    kept = masks(blocks, width, 11)
    # the rows and biases of producers are left, to be taken out with their neurons
    mask_neurons(blocks, NEURONS[architecture], kept, producers=False, reader=True)
    masked, parameters = logits(made), made.num_parameters()
    take_out(made, blocks, kept)
    torch.testing.assert_close(logits(made), masked, rtol=0, atol=1e-5)
    made.save_pretrained(tmp_path)
    loaded, report = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded.eval()), logits(made))
    assert loaded.num_parameters() == made.num_parameters() < parameters
    assert mlp_width(loaded.config) == width - 11
    for block in (*blocks, *find_blocks(loaded)):
        assert find_neurons(block, width - 11) == NEURONS[architecture]
        for layer in linear_layers(block).values():
            sizes = (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)
            assert tuple(weight_of(layer).shape) == sizes
            assert layer.weight.is_contiguous()


def test_the_neurons_that_stay_are_those_that_were_to() -> None:
    made = model("llama_biased")
    blocks = find_blocks(made)
    kept = masks(blocks, 48, 40)
    dense = [{name: p.detach().clone() for name, p in block.named_parameters()} for block in blocks]
    take_out(made, blocks, kept)
    for block, mask, before in zip(blocks, kept, dense, strict=True):
        mlp = block.mlp
        for name in ("gate_proj", "up_proj"):
            assert torch.equal(getattr(mlp, name).weight, before[f"mlp.{name}.weight"][mask])
            assert torch.equal(getattr(mlp, name).bias, before[f"mlp.{name}.bias"][mask])
        assert torch.equal(mlp.down_proj.weight, before["mlp.down_proj.weight"][:, mask])
        assert torch.equal(mlp.down_proj.bias, before["mlp.down_proj.bias"])
        assert all(p.requires_grad for p in mlp.parameters())


def test_frozen_layers_stay_frozen() -> None:
    made = model("gpt2").requires_grad_(False)
    blocks = find_blocks(made)
    take_out(made, blocks, masks(blocks, 128, 1))
    assert not any(p.requires_grad for p in made.parameters())


def test_neurons_are_found_in_half_precision() -> None:
    for architecture in ("llama_square", "opt_square", "gpt2"):
        made = model(architecture).to(torch.bfloat16)
        found = find_neurons(find_blocks(made)[0], mlp_width(made.config))
        assert found == NEURONS[architecture]


def test_neurons_are_found_whatever_the_weights() -> None:
    made = model("llama")
    for parameter in made.parameters():
        parameter.data.zero_()
    assert find_neurons(find_blocks(made)[0], 48) == GATED


@pytest.mark.parametrize(
    "config",
    [
        tf.Phi3Config(**COMMON),  # gate and up in one matrix
        tf.Phi3Config(**SQUARE),
        tf.Phi3Config(**{**COMMON, "intermediate_size": 64}),  # as wide as all of q, k and v
        tf.GlmConfig(**COMMON, head_dim=8),
        tf.BitNetConfig(**COMMON),  # a norm over all neurons on their way
        tf.BitNetConfig(**SQUARE),
    ],
    ids=lambda config: f"{type(config).__name__}-{config.intermediate_size}",
)
def test_blocks_without_neurons_of_their_own_are_refused(config: tf.PreTrainedConfig) -> None:
    made = tf.AutoModelForCausalLM.from_config(config).eval()
    block = find_blocks(made)[0]
    with pytest.raises(BadInput, match=f"In a {type(block).__name__} no groups of linear layers .* or another model"):
        find_neurons(block, mlp_width(config))
    assert not any("forward" in vars(module) for module in block.modules())


class Twice(nn.Module):
    """A block with two MLPs of the same width."""

    def __init__(self, parts: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = parts(), parts()


class Mlp(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.between = between

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.between(nn.functional.silu(self.gate(hidden)) * self.up(hidden)))


def within(mlp: nn.Module) -> nn.Module:
    return nn.ModuleDict({"mlp": mlp})


def test_a_layer_that_the_reader_does_not_depend_on_is_no_producer() -> None:
    assert find_neurons(within(Mlp()), 8) == Neurons(("mlp.up", "mlp.gate"), "mlp.down")


def test_two_groups_are_refused() -> None:
    with pytest.raises(BadInput, match="In a Twice 2 groups"):
        find_neurons(Twice(Mlp), 8)


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.flip(-1),  # another neuron
        lambda x: x.roll(1, 1),  # another token
        lambda x: x.cumsum(1),
        lambda x: x.softmax(-1),
        lambda x: x + 1,  # not 0 where the producers give out 0
    ],
)
def test_neurons_that_do_not_stay_apart_are_refused(between: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(BadInput, match="no groups"):
        find_neurons(within(Mlp(between)), 8)


def test_attention_of_the_same_shapes_is_none() -> None:
    """Even if it could be called with hidden states alone."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, hidden: Tensor) -> Tensor:
            return self.o(nn.functional.scaled_dot_product_attention(self.q(hidden), self.k(hidden), self.v(hidden)))

    with pytest.raises(BadInput, match="no groups"):
        find_neurons(within(Attention()), 8)
    block = nn.ModuleDict({"attention": Attention(), "mlp": Mlp()})
    assert find_neurons(block, 8).reader == "mlp.down"


@pytest.mark.parametrize("config", [tf.OpenAIGPTConfig(n_embd=32, n_layer=2, n_head=4), tf.Gemma3nTextConfig()])
def test_configurations_without_one_width_are_refused(config: tf.PreTrainedConfig) -> None:
    for read in (intermediate_key, mlp_width):
        with pytest.raises(BadInput, match=f"A {type(config).__name__} holds no single number of MLP neurons"):
            read(config)
