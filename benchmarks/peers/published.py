"""Worker: plain implementations of published algorithms, written by us from the papers for this comparison.

They are no peer's code: what a reader of the papers would write. The layers' algorithms are the loops of
`benchmarks/layers.py`. As in the papers' descriptions the whole model is in memory, every linear layer has statistics
of its own, and two streams of hidden states are read and written in turn. Wanda keeps the sums of squares of its
inputs, SparseGPT and ADMM the whole product of dense features; the masks' passes take four sequences at a time.

The block-wise training (Shin et al., arXiv 2406.15524) leads the streams on one sequence at a time and multiplies by
the mask in every forward (PyTorch's own `custom_from_mask`). BR learns what left the dense block in the pass that
takes the statistics; BR+GP has two more buffers, for the dense stream. The step is that of the paper: batches of 8,
AdamW with lr 2e-4 and betas .9, .95, linear decay to 0, no weight decay, no clipping.
"""

from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune as masking
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.layers import LOOPS
from benchmarks.peers.worker import AT_A_TIME, Clock, work
from lit_prune.masks import Sparsity

BATCH = 8
"""Sequences in a training step."""


class Block:
    """A block and its call arguments, which are the same for every block of a Llama."""

    def __init__(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        self.module = module
        self.arguments = arguments

    def __call__(self, hidden: Tensor) -> Tensor:
        """What leaves it, (batch, sequence, width)."""
        output = self.module(hidden, **self.arguments)
        return output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def lead(self, entering: Tensor, leaving: Tensor, at_a_time: int) -> None:
        """Lead a stream through it."""
        for start in range(0, len(entering), at_a_time):
            leaving[start : start + at_a_time] = self(entering[start : start + at_a_time])

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """Its linear layers by name."""
        return {name: module for name, module in self.module.named_modules() if isinstance(module, nn.Linear)}


def prune(job: dict[str, Any], clock: Clock) -> dict[str, str]:
    """Prune by Wanda, SparseGPT or ADMM, or reconstruct Wanda's mask by BR or BR+GP."""
    with clock("load"):
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        tokens = load_file(job["tokens"])["tokens"]
    trained = job["method"].startswith("BR")
    with clock("prune"):
        walk(
            model,
            tokens,
            "Wanda" if trained else job["method"],
            Sparsity(job["sparsity"]),
            clock,
            epochs=job["epochs"] if trained else 0,
            propagates=job["method"] == "BR+GP",
        )
    with clock("save"):
        model.save_pretrained(job["result"])
    return {name: version(name) for name in ("torch", "transformers")}


def walk(
    model: PreTrainedModel,
    tokens: Tensor,
    method: str,
    sparsity: Sparsity,
    clock: Clock,
    epochs: int = 0,
    propagates: bool = False,
) -> None:
    """Prune a Llama in place, block after block.

    Args:
        model: the model.
        tokens: shape (sequences, tokens).
        method: of the mask: Wanda, SparseGPT or ADMM.
        sparsity: how much goes.
        clock: takes the time of the stages.
        epochs: of every block's training; 0 for none.
        propagates: train towards the dense stream, not the dense block on the sparse one.
    """
    torch.manual_seed(0)
    at_a_time = 1 if epochs else AT_A_TIME
    with clock("advance"):
        sparse, arguments = entering(model, tokens)
        following = torch.zeros_like(sparse)
        # BR's target is what leaves the block in the pass that takes the statistics, before its mask
        dense, target = (sparse.clone(), torch.zeros_like(sparse)) if propagates else (sparse, following)
    for module in model.model.layers:
        block = Block(module, arguments)
        if propagates:
            with clock("advance"):
                block.lead(dense, target, at_a_time)
        with clock("statistics"):
            squares = observe(block, sparse, following, method, at_a_time)
        with clock("mask"), torch.no_grad():
            for name, layer in block.layers.items():
                layer.weight.copy_(LOOPS[method](layer.weight, squares.pop(name), sparsity))
        if epochs:
            with clock("reconstruct"):
                train(block, sparse, target, epochs)
        with clock("advance"):
            block.lead(sparse, following, at_a_time)
        sparse, following = following, sparse
        dense, target = target, dense


@torch.no_grad()
def entering(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What enters the first block, (sequences, tokens, width), and its other arguments, for any number of sequences."""
    caught: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        caught.append(args[0])
        arguments.update(kwargs)
        raise StopIteration

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for sequence in tokens:
        try:
            model(input_ids=sequence[None], use_cache=False)
        except StopIteration:
            continue
    handle.remove()
    return torch.cat(caught), arguments


def observe(block: Block, stream: Tensor, leaving: Tensor, method: str, at_a_time: int) -> dict[str, Tensor]:
    """XᵀX of every layer's input, (in, in), as the stream is led through; for Wanda its diagonal alone holds."""
    sums: dict[str, Tensor] = {}

    def watch(name: str, inputs: Tensor) -> None:
        features = inputs.reshape(-1, inputs.shape[-1])
        new = features.square().sum(0) if method == "Wanda" else features.T @ features
        sums[name] = sums[name] + new if name in sums else new

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0]))
        for name, layer in block.layers.items()
    ]
    block.lead(stream, leaving, at_a_time)
    for handle in handles:
        handle.remove()
    # a view whose rows are all the sums of squares has them on its diagonal, too
    return {name: total.expand(total.shape[-1], -1) for name, total in sums.items()}


def train(block: Block, inputs: Tensor, targets: Tensor, epochs: int) -> None:
    """Train all parameters of a block by the mean squared error, its zeros held by the product with the mask."""
    for layer in block.layers.values():
        masking.custom_from_mask(layer, "weight", layer.weight.detach() != 0)
    parameters: Iterable[nn.Parameter] = block.module.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0)
    steps = epochs * -(-len(inputs) // BATCH)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(BATCH):
            loss = F.mse_loss(block(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
    for layer in block.layers.values():
        masking.remove(layer, "weight")


if __name__ == "__main__":
    work(prune)
