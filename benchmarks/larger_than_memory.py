"""Peak memory of a run whose model stays on disk, on checkpoints of random weights in float16.

A checkpoint is made one weight at a time, in the shape of LLaMA-2-7B or -70B, or of any width and depth. Every run is a
process of its own: `lit-prune fit`, Wanda 2:4, 4 sequences of 256 tokens, offloaded, no perplexity. With `--depths` the
same width is run with several numbers of blocks, whose peaks should be the same.

    python benchmarks/larger_than_memory.py --shape llama-2-7b [--blocks 32] [--folder FOLDER] [--keep]
    python benchmarks/larger_than_memory.py --shape small --depths 4 8 16 32
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from lit_prune.atomic import built_whole

ROOT = Path(__file__).parent.parent
SHAPES = {
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32},
    "llama-2-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_hidden_layers": 80,
    },
    "small": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_hidden_layers": 4},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_hidden_layers": 2},
}
SETTINGS = {
    "data.source": ROOT / "tiny" / "text" / "calibration.txt",
    "data.samples": 4,
    "data.validation_samples": 0,
    "data.sequence_length": 256,
    "evaluation.texts": "[]",
    "model.sparsity": "2:4",
    "model.reconstruction": "none",
    "model.offload": "true",
}


def main() -> None:
    """Make each checkpoint, prune it, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--blocks", type=int, help="only so many")
    parser.add_argument("--depths", type=int, nargs="+", help="one run for each number of blocks")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "larger_than_memory")
    parser.add_argument("--keep", action="store_true", help="do not remove checkpoints and results")
    arguments = parser.parse_args()
    print("| shape | blocks | checkpoint | peak memory | seconds | of these: load, statistics, mask, advance, save |")
    print("|---|---|---|---|---|---|")
    for blocks in arguments.depths or [arguments.blocks or SHAPES[arguments.shape]["num_hidden_layers"]]:
        checkpoint, run = arguments.folder / f"{arguments.shape}-{blocks}", arguments.folder / "run"
        made = make(checkpoint, LlamaConfig(**SHAPES[arguments.shape] | {"num_hidden_layers": blocks}))
        print(f"| {arguments.shape} | {blocks} | {made / 1e9:.1f} GB | {measured(checkpoint, run)} |", flush=True)
        if not arguments.keep:
            shutil.rmtree(checkpoint)
            shutil.rmtree(run)


def make(folder: Path, config: LlamaConfig) -> int:
    """Write a checkpoint, one shard for each block, unless it is there; its size in bytes."""
    shards = [{"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}]
    shards += [dict(shapes(config, index)) for index in range(config.num_hidden_layers)]
    shards += [{"model.norm.weight": (config.hidden_size,), "lm_head.weight": (config.vocab_size, config.hidden_size)}]
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for number, named in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        contents |= dict.fromkeys(named, file)
        if not (folder / file).exists():
            with built_whole(folder / file) as draft:
                save_file({name: weight(shape) for name, shape in named.items()}, draft, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": contents}))
    config.dtype, config.architectures = torch.float16, ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "tiny" / "model" / name, folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def shapes(config: LlamaConfig, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one block's weights."""
    width, inner = config.hidden_size, config.intermediate_size
    values = config.num_key_value_heads * config.head_dim
    prefix = f"model.layers.{index}."
    for name, shape in {"q": (width, width), "k": (values, width), "v": (values, width), "o": (width, width)}.items():
        yield f"{prefix}self_attn.{name}_proj.weight", shape
    for name, shape in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
        yield f"{prefix}mlp.{name}_proj.weight", shape
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", (width,)


def weight(shape: tuple[int, ...]) -> Tensor:
    """Random as at the start of a training; ones for a norm."""
    return torch.ones(shape, dtype=torch.float16) if len(shape) == 1 else (0.02 * torch.randn(shape)).half()


def measured(checkpoint: Path, run: Path) -> str:
    """Prune in a new process; the last cells of a line."""
    settings = {"model.checkpoint": checkpoint, "output_dir": run} | SETTINGS
    began = time.perf_counter()
    command = [sys.executable, "-m", "lit_prune", "fit", *(f"--{key}={value}" for key, value in settings.items())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
    seconds = time.perf_counter() - began
    metrics = json.loads((run / "metrics.json").read_text())
    stages = ", ".join(f"{metrics['seconds'][key]:.0f}" for key in ("load", "statistics", "mask", "advance", "save"))
    return f"{metrics['peak_memory_bytes']['host'] / 1e9:.2f} GB | {seconds:.0f} | {stages}"


if __name__ == "__main__":
    main()
