"""The memory that backward passes need, through a whole model or a window of blocks, and what there is."""

from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lit_prune.heap import GIVEN_BACK
from lit_prune.models import BlockCall, Part, Window, linear_layers, on_device, tensors_of, watch_inputs, weight_of
from lit_prune.modules.gradients import frozen
from lit_prune.modules.reconstruction import Trained

FLOAT = 4
"""Bytes of a number in float32, in which everything is computed."""


def whole_model_memory(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    call: BlockCall,
    entering: Tensor,
    batch_size: int = 1,
    device: torch.device | None = None,
) -> int:
    """Bytes that `whole_model_gradients` needs at once.

    They are those of the weights, one float64 sum for every prunable weight, and for each sample of a batch the
    logits with their gradient and what a backward pass goes back to. The last is measured on block 0 and one sample,
    and taken to be the same in every block.

    Args:
        model: the model.
        blocks: its blocks.
        call: the first block's own call arguments.
        entering: one sequence of hidden states that enters block 0, shape (1, sequence, width).
        batch_size: samples in one pass.
        device: where to measure, since attention's implementation may differ; None for where `entering` lies.
    """
    device = device or entering.device
    weights = sum(tensor.nbytes for tensor in tensors_of(model))
    sums = sum(8 * weight_of(layer).numel() for block in blocks for layer in linear_layers(block).values())
    vocabulary: int = model.config.get_text_config().vocab_size
    logits = 3 * 4 * entering.shape[1] * vocabulary  # float32: they, their log softmax, a gradient
    with on_device(tensors_of(blocks[0]), device):
        activations = len(blocks) * kept_bytes(Window([blocks[0]], [call]), entering.to(device))
    return weights + sums + batch_size * (activations + logits)


class TrainingMemory(NamedTuple):
    """Bytes that the reconstruction of a window of blocks needs beside the model itself and the streams.

    Attributes:
        held: from when a block enters until it is final: masks, and dense copies where there are any.
        best: the best epoch's copy of what is trained, which lies on the host.
        step: for the part that takes most: gradients, two numbers of an optimiser such as Adam for each parameter that
            is trained, what a backward pass goes back to, and the weights that adapters make.
    """

    held: int
    best: int
    step: int


def window_memory(
    blocks: nn.ModuleList,
    parts: Sequence[Part],
    entering: Tensor,
    batch_size: int,
    width: int,
    dense_blocks: bool,
    trained: Trained,
    rank: int,
) -> TrainingMemory:
    """What the reconstruction of a window of blocks needs.

    What a backward pass goes back to is measured on block 0 and one sample.

    Args:
        blocks: of the model.
        parts: of block 0, which are trained one after the other: itself, its halves, or its layers.
        entering: one sequence of hidden states that enters block 0, shape (1, sequence, width).
        batch_size: samples in a training step.
        width: blocks in the window.
        dense_blocks: whether a dense copy of the window is kept.
        trained: what of a part is.
        rank: of adapters.
    """
    masks = max(sum(weight.numel() for weight in _weights(block)) for block in blocks)
    dense = max(sum(FLOAT * p.numel() for p in block.parameters()) for block in blocks)
    best = step = 0
    for part in parts:
        own = {id(p) for p in part.own_parameters()}
        left = {name for name, p in part.blocks[0].named_parameters() if id(p) not in own}
        numbers = max(_trained_numbers(block, left, trained, rank) for block in blocks)
        layers = max(([FLOAT * w.numel() for w in _weights(block, left)] for block in blocks), key=sum)
        with torch.no_grad():
            inputs = part.enter(entering)
            pairs = 3 * part(inputs).nbytes  # what is put out, its target, and a gradient
        kept = batch_size * (width * kept_bytes(part, inputs) + pairs)
        if trained == "adapters":  # every weight with its change until the pass back, which leaves holes for gradients
            in_holes = sum(size for size in layers if size < GIVEN_BACK)
            kept += width * (sum(layers) + in_holes) + max(layers, default=0)
        else:  # a mask becomes as large as its layer while gradients are zeroed
            kept = max(kept, max(layers, default=0))
        best = max(best, width * FLOAT * numbers)
        step = max(step, 3 * width * FLOAT * numbers + kept)
    return TrainingMemory(width * (masks + dense_blocks * dense), best, step)


def _weights(block: nn.Module, left: Container[str] = ()) -> list[Tensor]:
    """Of a block's linear layers, without those left out."""
    return [weight_of(layer) for name, layer in linear_layers(block).items() if f"{name}.weight" not in left]


def _trained_numbers(block: nn.Module, left: Container[str], trained: Trained, rank: int) -> int:
    """How many numbers of a block are trained, as far as they are in a part of it; all its layers count as pruned."""
    own = [p for name, p in block.named_parameters() if name not in left]
    weights = _weights(block, left)
    if trained == "adapters":
        return sum(min(rank, *weight.shape) * sum(weight.shape) for weight in weights)
    if trained == "all":
        return sum(p.numel() for p in own)
    small = [p for p in own if p.ndim == 1] if trained == "pruned_norms_biases" else []
    return sum(tensor.numel() for tensor in (*weights, *small))


def kept_bytes(part: Part, entering: Tensor) -> int:
    """What is kept from a pass through a part until the pass back: by autograd, and as inputs of linear layers."""
    weights = {_storage(tensor) for tensor in tensors_of(part)}
    kept: dict[StorageWeakRef, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # an output that holds itself would never go
        kept[_storage(tensor)] = tensor
        return tensor

    def keep_input(_: str, inputs: Tensor) -> None:
        keep(inputs)

    with (
        frozen(part.parameters()),
        watch_inputs(linear_layers(part), keep_input),
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.enable_grad(),
    ):
        part(entering.detach().requires_grad_())
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in weights)


@torch.no_grad()
def waiting_bytes(part: Part, entering: Tensor) -> int:
    """What a pass through a part goes on with, at most, where it has come to one of its linear layers.

    Args:
        part: on the CPU.
        entering: one sequence, shape (1, sequence, width), which does not count.
    """
    most = 0

    def count(_: str, inputs: Tensor) -> None:
        nonlocal most
        most = max(most, made.bytes)

    with watch_inputs(linear_layers(part), count), _Made() as made:
        part(entering)
    return most


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The tensors that are made, views of others left out, and how many bytes of them are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._there: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and (storage := _storage(leaf)) not in given:
                self._there[storage] = leaf.untyped_storage().nbytes()
        return made

    @property
    def bytes(self) -> int:
        """Of all that have been made and not let go."""
        there = [size for storage, size in self._there.items() if not storage.expired()]  # type: ignore[no-untyped-call]
        return sum(there)


def _storage(tensor: Tensor) -> StorageWeakRef:
    """Where a tensor's numbers lie: no address, which the fake tensors of a model without weights do not have."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def available_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now: its own free memory where it tells, or the host's."""
    if free := getattr(getattr(torch, device.type, None), "mem_get_info", None):
        kept = 0  # by PyTorch, for what comes next
        if device.type == "cuda":
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free(device)[0]) + kept
    return min([int(psutil.virtual_memory().available), *left_by_limits()])


def left_by_limits(root: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Bytes that a container or a batch system still allows: by each control group (version 2) of this process."""
    try:
        own = Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
    except OSError:  # not Linux
        return
    for group in (root / own, *(root / own).parents):
        limit = group / "memory.max"
        if group.is_relative_to(root) and limit.is_file() and (most := limit.read_text().strip()) != "max":
            counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            taken = int((group / "memory.current").read_text()) - int(counted.get("inactive_file", 0))
            yield max(0, int(most) - taken)
