"""How much of a GPU's matrix product rate a reconstruction reaches, its peak memory, and seconds per block by stage.

`lit-prune fit` on a few blocks of random weights in LLaMA-2-7B's shape, which are made here: Wanda 50 %, block-wise
reconstruction with global propagation, 256 sequences of 1024 tokens of random text, batches of 8, 5 epochs, nothing
held out, weights on disk. Where hidden states lie is varied: in host memory, from which they are copied beside the
computation, and on the device.

A block's training counts as (6 P + 6 T d) operations a token: 6 for each of the P weights of its linear layers, 2
forward and 4 backward; and for causal attention over T tokens of width d, half of 4 T d forward and 8 T d backward.
What else is done counts as nothing. The rate beside it is that of a large product of square matrices, in bfloat16 where
the training is in bfloat16. The first block, in which PyTorch and compilers warm up, is left out of the training's rate
and of the seconds of the whole block; those by stage are means over all blocks.

    python benchmarks/gpu.py [--blocks 3] [--streams memory device] [--compile] [--float32_matmul_precision high]
    python benchmarks/gpu.py --device cpu --shape tiny
"""

import argparse
import json
import random
import shutil
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import yaml
from larger_than_memory import ROOT, SHAPES, make, shapes
from transformers import LlamaConfig

from lit_prune.fit import main as fit

STREAMS = {"memory": 0.0, "device": 0.9}
"""Shares of the device's memory that hidden states may lie in."""
STAGES = ("statistics", "mask", "reconstruct", "advance")


def main(given: list[str] | None = None) -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--blocks", type=int, help="3, or 2 of the tiny shape")
    parser.add_argument("--samples", type=int, help="sequences: 256, or 16 of the tiny shape")
    parser.add_argument("--length", type=int, help="tokens in one: 1024, or 32 of the tiny shape")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--streams", nargs="+", choices=STREAMS, default=["memory", "device"])
    parser.add_argument("--compile", action="store_true", help="blocks by torch.compile")
    parser.add_argument("--float32_matmul_precision", default="highest", help="of passes that are no training")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu")
    chosen = parser.parse_args(given)
    defaults = (2, 16, 32) if chosen.shape == "tiny" else (3, 256, 1024)
    for key, value in zip(("blocks", "samples", "length"), defaults, strict=True):
        setattr(chosen, key, getattr(chosen, key) or value)
    if chosen.blocks < 2:
        parser.error("--blocks: the first block is left out; give at least 2")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no CUDA device; give cpu, with --shape tiny")
    began = time.perf_counter()
    config = LlamaConfig(**SHAPES[chosen.shape] | {"num_hidden_layers": chosen.blocks})
    checkpoint, text = chosen.folder / f"{chosen.shape}-{chosen.blocks}", chosen.folder / "text.txt"
    make(checkpoint, config)
    text.write_text(words(2 * chosen.samples * chosen.length))
    rows, rates = [], {}
    for streams in chosen.streams if chosen.device == "cuda" else ["memory"]:
        run = chosen.folder / f"run-{streams}"
        shutil.rmtree(run, ignore_errors=True)
        with redirect_stdout(sys.stderr):
            fit(command(chosen, checkpoint, text, run, streams))
        metrics = json.loads((run / "metrics.json").read_text())
        precision = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["precision"]
        if precision not in rates:
            rates[precision] = product_rate(chosen, torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
        rows.append(row(precision, metrics, work(chosen, config), rates[precision], chosen.blocks))
    settings = f"{chosen.samples} x {chosen.length} tokens, batch {chosen.batch_size}, {chosen.epochs} epochs"
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, PyTorch {torch.__version__}: {chosen.blocks} blocks of {chosen.shape}, {settings}; compiled:")
    print(f"{chosen.compile}; float32_matmul_precision: {chosen.float32_matmul_precision}.\n")
    print("| hidden states | precision | product rate | while training | share | peak device memory ", end="")
    print(f"| seconds per block: {' | '.join(STAGES)} | the whole block |\n|{'---|' * (7 + len(STAGES))}")
    print("\n".join(rows))
    print(
        f"\n{work(chosen, config) / 1e12:.3g} TFLOP per training; all of this took {time.perf_counter() - began:.0f} s."
    )


def command(chosen: argparse.Namespace, checkpoint: Path, text: Path, run: Path, streams: str) -> list[str]:
    """The settings of a run."""
    settings: dict[str, Any] = {
        "model.checkpoint": checkpoint,
        "model.sparsity": 0.5,
        "model.offload": "true",
        "model.compile": str(chosen.compile).lower(),
        "data.source": text,
        "data.samples": chosen.samples,
        "data.validation_samples": 0,
        "data.sequence_length": chosen.length,
        "data.batch_size": chosen.batch_size,
        "data.device_share": STREAMS[streams],
        "data.memory_share": 1,
        "evaluation.texts": "[]",
        "trainer.accelerator": chosen.device,
        "trainer.devices": 1,
        "trainer.max_epochs": chosen.epochs,
        "float32_matmul_precision": chosen.float32_matmul_precision,
        "output_dir": run,
    }
    return ["fit", *(f"--{key}={value}" for key, value in settings.items())]


def words(count: int) -> str:
    """Random text of so many words of a few letters, none of them below one token."""
    draw = random.Random(0)  # noqa: S311 - no secret
    letters = "abcdefghijklmnopqrstuvwxyz"
    return " ".join("".join(draw.choices(letters, k=3)) for _ in range(count))


def work(chosen: argparse.Namespace, config: LlamaConfig) -> int:
    """Operations of one block's training, as described above."""
    matrices = [shape for _, shape in shapes(config, 0) if len(shape) == 2]
    weights = sum(rows * columns for rows, columns in matrices)
    per_token = 6 * weights + 6 * chosen.length * config.hidden_size
    return chosen.epochs * chosen.samples * chosen.length * per_token


def product_rate(chosen: argparse.Namespace, dtype: torch.dtype, repeat: int = 20) -> float:
    """Operations a second in a product of square matrices: the median of some, after as many that warm up."""
    width = 8192 if chosen.device == "cuda" else 512
    one, other = (torch.randn(width, width, device=chosen.device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(2 * repeat):
        wait(chosen.device)
        began = time.perf_counter()
        one @ other
        wait(chosen.device)
        taken.append(time.perf_counter() - began)
    return 2 * width**3 / median(taken[repeat:])


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def row(precision: str, metrics: dict[str, Any], operations: int, rate: float, blocks: int) -> str:
    """A line of the table."""
    reached = operations / mean(training["seconds"] for training in metrics["trainings"][1:])
    memory = metrics["peak_memory_bytes"]["device"]
    stages = [f"{metrics['seconds'][stage] / blocks:.3g}" for stage in STAGES]
    cells = [
        metrics["hidden_states"],
        precision,
        f"{rate / 1e12:.3g} TFLOP/s",
        f"{reached / 1e12:.3g} TFLOP/s",
        f"{reached / rate:.0%}",
    ]
    cells += ["not measured" if memory is None else f"{memory / 1e9:.2f} GB", *stages]
    return f"| {' | '.join(cells)} | {mean(block['seconds'] for block in metrics['blocks'][1:]):.3g} |"


if __name__ == "__main__":
    main()
