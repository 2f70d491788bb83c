"""What the configurations of `configs/zoo` need, by `lit_prune.needs` and the published shapes, without any weights.

    python benchmarks/zoo.py [NAME ...]

prints what stands in each file's comment, with all in memory, and with weights and hidden states on disk. Weights are
on the meta device; block 0 is computed with fake tensors, which have shapes and no values. Libraries are counted with
what they held on the machine that the figures come from, and WikiText-2 as 340,000 tokens, as many as Llama 2 makes of
it. Nothing is fetched.
"""

import argparse
import contextlib
import math
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import yaml
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map

from lit_prune.data import CalibrationText, EvaluationText
from lit_prune.masks import Sparsity, Wanda
from lit_prune.method import Pruning
from lit_prune.models import BlockCall, Home, Offloaded, find_blocks
from lit_prune.needs import estimate

ZOO = Path(__file__).parent.parent / "configs" / "zoo"

LIBRARIES = 420_000_000
"""Bytes of a process that has imported everything and loaded a model of next to nothing."""
TOKENS = 340_000
"""Of WikiText-2's test split."""

LLAMA_3 = {"vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32}
QWEN_3 = {"vocab_size": 151936, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}

SHAPES: dict[str, tf.PreTrainedConfig] = {
    "llama-2-7b": tf.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32),
    "llama-3.1-8b": tf.LlamaConfig(**LLAMA_3, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
    "llama-3.2-1b": tf.LlamaConfig(
        **LLAMA_3, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True
    ),
    "qwen3-0.6b": tf.Qwen3Config(
        **QWEN_3, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, tie_word_embeddings=True
    ),
    "qwen3-8b": tf.Qwen3Config(
        **QWEN_3 | {"num_attention_heads": 32}, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36
    ),
    "mistral-7b-v0.3": tf.MistralConfig(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, sliding_window=None
    ),
    "gemma-3-1b": tf.Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        sliding_window=512,
    ),
    "phi-4": tf.Phi3Config(
        vocab_size=100352,
        hidden_size=5120,
        intermediate_size=17920,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=10,
        max_position_embeddings=16384,
        original_max_position_embeddings=16384,
        pad_token_id=None,
    ),
    "opt-1.3b": tf.OPTConfig(
        hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, word_embed_proj_dim=2048
    ),
    "pythia-1.4b": tf.GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=16
    ),
    "smollm2-1.7b": tf.LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "smollm3-3b": tf.SmolLM3Config(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
    ),
}


def main() -> None:
    """Print a line for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *SHAPES], metavar="NAME")
    print("| | memory | disk | memory, left on disk | disk, left on disk | checkpoint |\n|---|---|---|---|---|---|")
    for name in parser.parse_args().names or SHAPES:
        print(f"| {name} | " + " | ".join(f"{figure:.3g} GB" for figure in needs(name)) + " |", flush=True)


def needs(name: str) -> list[float]:
    """GB of memory and of disk with all in memory; the same with weights and hidden states on disk; of the checkpoint.

    Args:
        name: of a file in `configs/zoo`, without its ending.
    """
    settings = yaml.safe_load((ZOO / f"{name}.yaml").read_text())
    with init_empty_weights(include_buffers=False):
        model = tf.AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.float32)
    blocks = find_blocks(model)
    data, evaluation = CalibrationText(**settings["data"]), SomeWindows(**settings["evaluation"])
    data.calibration = torch.empty(data.samples, data.sequence_length, device="meta")
    data.held_out = torch.empty(data.validation_samples, data.sequence_length, device="meta")
    chosen = settings["model"]
    pruning = Pruning(**chosen | {"sparsity": Sparsity(chosen["sparsity"]), "mask": Wanda()})
    entering, call = first_call(model, blocks, data.sequence_length)
    model.tie_weights()
    parameters = sum(p.numel() for p in model.parameters())
    figures = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        get_fake_weights(blocks[0])
        entering, call = fake(entering), BlockCall(fake(call.args), fake(dict(call.kwargs)))
        for home, held, share in (
            (Home(model, blocks), LIBRARIES + 4 * parameters, math.inf),
            (Offloaded(model, blocks, dict, dict, dict), LIBRARIES, 0),
        ):
            data.memory_share = share
            cpu, sequences = torch.device("cpu"), len(data.tokens)
            needed = estimate(pruning, data, evaluation, home, call, entering, torch.bfloat16, held, cpu, sequences)
            figures += [needed.memory, needed.disk]
    return [figure / 1e9 for figure in (*figures, 2 * parameters)]


class SomeWindows(EvaluationText):
    """As many windows as WikiText-2 has, of no text."""

    @property
    def tokens(self) -> list[Tensor]:  # noqa: D102
        return [torch.empty(TOKENS // self.window_length, self.window_length, device="meta")]


def first_call(model: tf.PreTrainedModel, blocks: nn.ModuleList, length: int) -> tuple[Tensor, BlockCall]:
    """What enters block 0, and its call arguments, for one sequence; embeddings get memory, whatever it holds."""
    inside = set(blocks.modules())
    for module in model.modules():
        if module not in inside:
            module.to_empty(device="cpu", recurse=False)
    seen: list[tuple[Tensor, BlockCall]] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0], BlockCall(args[1:], kwargs)))
        raise StopIteration

    handle = blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    with torch.no_grad(), contextlib.suppress(StopIteration):
        model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    handle.remove()
    return seen[0]


def get_fake_weights(block: nn.Module) -> None:
    """Put fake weights on the CPU in the place of those on the meta device."""
    for module in block.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = parameter if parameter is None else nn.Parameter(fake(parameter))


def fake(tree: Any) -> Any:
    """The same with fake tensors on the CPU in place of tensors."""
    return tree_map(lambda leaf: torch.empty_like(leaf, device="cpu") if isinstance(leaf, Tensor) else leaf, tree)


if __name__ == "__main__":
    main()
