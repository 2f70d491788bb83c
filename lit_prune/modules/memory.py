"""The memory that backward passes need, through a whole model or a window of blocks, and what there is."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from lit_prune.models import BlockCall, linear_layers, on_device, tensors_of, watch_inputs, weight_of
from lit_prune.modules.gradients import frozen


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
        activations = len(blocks) * kept_bytes(blocks[0], call.to(device), entering.to(device))
    return weights + sums + batch_size * (activations + logits)


def window_memory(
    blocks: nn.ModuleList,
    call: BlockCall,
    entering: Tensor,
    batch_size: int,
    width: int,
    dense_blocks: bool,
) -> int:
    """Bytes that the reconstruction of a window of blocks needs beside the model itself and the streams.

    They are, for each weight of the window, a gradient, two numbers of an optimiser such as Adam, the best epoch's
    copy, and the dense copy where there is one; and for each sample of a batch what a backward pass goes back to. The
    last is measured on block 0 and one sample.

    Args:
        blocks: of the model.
        call: the first block's own call arguments.
        entering: one sequence of hidden states that enters block 0, shape (1, sequence, width).
        batch_size: samples in a training step.
        width: blocks in the window.
        dense_blocks: whether a dense copy of the window is kept.
    """
    weights = max(sum(4 * p.numel() for p in block.parameters()) for block in blocks)
    return width * (weights * (4 + dense_blocks) + batch_size * kept_bytes(blocks[0], call, entering))


def kept_bytes(block: nn.Module, call: BlockCall, entering: Tensor) -> int:
    """What is kept from a pass through a block until the pass back: by autograd, and as inputs of linear layers."""
    weights = {_storage(tensor) for tensor in tensors_of(block)}
    kept: dict[StorageWeakRef, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()  # an output that holds itself would never go
        kept[_storage(tensor)] = tensor
        return tensor

    def keep_input(_: str, inputs: Tensor) -> None:
        keep(inputs)

    with (
        frozen(block.parameters()),
        watch_inputs(linear_layers(block), keep_input),
        saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.enable_grad(),
    ):
        call(block, entering.detach().requires_grad_())
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in weights)


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
