"""What a run will need, told before it starts: memory, disk, and passes through the model."""

from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from lit_prune import ranks
from lit_prune.data import BATCH, CalibrationText, EvaluationText
from lit_prune.masks import GBLM, Gram, MaskMethod, NeuronMask
from lit_prune.masks.solvers import Solver
from lit_prune.method import Pruning
from lit_prune.models import BlockCall, Home, Offloaded, Window, find_neurons, linear_layers, mlp_width, weight_of
from lit_prune.modules import (
    TrainingMemory,
    available_memory,
    kept_bytes,
    observe,
    waiting_bytes,
    whole_model_memory,
    window_memory,
)
from lit_prune.modules.memory import FLOAT
from lit_prune.reporting.wording import size

Place = Literal["device", "memory", "disk"]
"""Where hidden states lie."""

LOGITS = 2
"""Tensors of a batch's logits' size at a time: they, and the batch's before, or one window's log softmax."""

SUMMED, DERIVING = 1.25, 2
"""Matrices of a Gram matrix's size: 5/8 of its sum in float64, and what there is beside while one is made of it."""

LATER = 90_000_000
"""Bytes that libraries take when they are first used: room for matrix products, what draws curves and plots."""


@dataclass(frozen=True)
class Needs:
    """At the highest.

    Attributes:
        memory: bytes of the host, the process itself included.
        more: how many of them it does not have yet.
        device: bytes of the device on which blocks compute; None if that is the host.
        disk: bytes.
        passes: through each block over all sequences, beside training, those included that end at a part of it.
        streams: where hidden states lie.
    """

    memory: int
    more: int
    device: int | None
    disk: int
    passes: float
    streams: Place

    def __str__(self) -> str:
        """One line."""
        device = f" {size(self.device)} of the device's," if self.device is not None else ""
        return (
            f"This run needs about {size(self.memory)} of memory,{device} {size(self.disk)} on disk, and "
            f"{round(self.passes, 1):g} passes through each block besides training."
        )


def process_memory() -> int:
    """Bytes of memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


def estimate(
    pruning: Pruning,
    data: CalibrationText,
    evaluation: EvaluationText,
    home: Home,
    call: BlockCall,
    entering: Tensor,
    dtype: torch.dtype,
    held: int,
    device: torch.device,
    sequences: int,
    processes: int = 1,
) -> Needs:
    """What a run needs whose model has been opened.

    Args:
        pruning: what is done to the model.
        data: the calibration text.
        evaluation: the texts for perplexity.
        home: the model, of which block 0 is in memory.
        call: block 0's call arguments.
        entering: one sequence of hidden states that enters it, shape (1, sequence, width).
        dtype: in which the result is stored.
        held: bytes of memory that the process held when only the model was there, if it is in memory at all.
        device: on which blocks compute.
        sequences: how many of them this process leads through the model.
        processes: how many share the host's memory.
    """
    offloaded, away = isinstance(home, Offloaded), device.type != "cpu"
    sizes = [FLOAT * sum(p.numel() for p in block.parameters()) for block in home.blocks]
    block, model = max(sizes), FLOAT * sum(p.numel() for p in home.model.parameters())
    outside, stored = model - sum(sizes), dtype.itemsize / FLOAT
    window = pruning.window_width * block
    kept = kept_bytes(Window([home.blocks[0]], [call]), entering)
    batch = max(BATCH, data.batch_size) if isinstance(pruning.mask, GBLM) else BATCH  # of a pass that is no training
    working, best = _pruning_memory(pruning, home, call, entering) + min(batch, sequences) * kept, 0
    if pruning.reconstruction != "none":
        around, best, step = training_memory(pruning, home, call, entering, data.batch_size)
        working = around + max(working, step if away else best + step)
    if pruning.true_sequential:
        copied = entering.nbytes if away else 0  # else it lies in the stream
        each = copied + waiting_bytes(Window([home.blocks[0]], [call]), entering)
        working += min(data.observed, sequences) * each
    logits = hidden = measuring = 0
    if evaluation.texts and evaluation.window_length:
        tokens, config = evaluation.batch_size * evaluation.window_length, home.model.config.get_text_config()
        logits = LOGITS * FLOAT * tokens * int(config.vocab_size)
        measuring = outside + max(logits, block + kept * tokens // entering.shape[1])
        if offloaded or away:
            mine = sum(-(-len(windows) // ranks.count()) * windows.shape[1] for windows in evaluation.tokens)
            hidden = mine * entering.shape[-1] * FLOAT
    there = max(window + working, measuring) if away else None
    if there and isinstance(pruning.mask, GBLM) and pruning.mask.backward == "model":
        samples = min(data.batch_size, data.observed)
        there = max(there, whole_model_memory(home.model, home.blocks, call, entering, samples))
    all_streams = stream_memory(pruning, evaluation.errors, home, entering, sequences)
    place = place_of_streams(all_streams, data, device, there, processes)
    streams = (window if offloaded else 0) + (in_host_memory(all_streams, device) if place == "memory" else 0)
    if away:  # the best epoch's weights alone wait on the host
        working, logits = in_host_memory(best, device), 0
    stages = [
        streams + working,
        streams + int(2 * stored * block),  # a final block as it is stored, and its bytes
        0 if offloaded else int(stored * model),  # and is read once more, out of its files
        (outside if offloaded and measuring else 0) + hidden + logits,
    ]
    disk = int(stored * (model + sum(sizes))) + (all_streams if place == "disk" else 0)
    if isinstance(pruning.mask, GBLM):
        inputs = len(sizes) * len(data.tokens) * entering.nbytes
        disk += sum(sizes) + (inputs if pruning.mask.backward == "blocks" else 0)
    read = outside if offloaded and stored < 1 else 0  # else they are there, or stay in their file
    led = leading_streams(pruning, evaluation.errors) * sequences * entering.nbytes if place == "memory" else 0
    embedding, storing = read + in_host_memory(led, device), 0 if offloaded else outside
    more = max(LATER + max(stages), embedding, storing)
    return Needs(held + more, more, there, disk, passes(pruning, home.blocks, evaluation.errors), place)


def training_memory(pruning: Pruning, home: Home, call: BlockCall, entering: Tensor, batch_size: int) -> TrainingMemory:
    """What trainings need beside the model itself and the streams.

    Args:
        pruning: what is done to the model.
        home: the model, of which block 0 is in memory.
        call: block 0's call arguments.
        entering: one sequence of hidden states that enters it, shape (1, sequence, width).
        batch_size: samples in a training step.

    Raises:
        BadInput: the block cannot be cut into halves.
    """
    parts = pruning.parts(home.blocks[0], call, entering)
    window = pruning.window_width, pruning.keeps_dense_blocks
    return window_memory(home.blocks, parts, entering, batch_size, *window, pruning.trained, pruning.rank)


def passes(pruning: Pruning, blocks: nn.ModuleList, errors: bool) -> float:
    """Through each block over all sequences, beside training, on average; see docs/reconstruction.md.

    Args:
        pruning: what is done to the model.
        blocks: of the model.
        errors: whether each block's is measured.
    """
    width, stride = pruning.window_width, pruning.window_stride
    trained, apart = pruning.reconstruction != "none", pruning.independent
    from_both = pruning.global_propagation and not apart
    own_pass = pruning.observes and not pruning.true_sequential  # else it is that of the sparse stream
    statistics = own_pass or apart or pruning.learns_from_one_pass
    dense = not apart and pruning.leads_dense_stream(errors)  # else the pass for statistics is that one
    arriving = (errors or pruning.prunes_by_sparse_stream) * (width - 1) / stride
    targets: float = 0
    if pruning.reconstruction == "layer":  # what enters each, and its dense self
        targets = max(len(linear_layers(block)) for block in blocks) * (1 + from_both)
    elif pruning.reconstruction == "sublayer":  # through dense halves, and on to the second
        targets = 3 + from_both
    elif pruning.reconstruction == "cross_block" and pruning.keeps_dense_blocks:
        targets = width / stride
    return statistics + dense + arriving + targets + (errors and trained) + pruning.leads_sparse_stream(errors)


def stream_memory(pruning: Pruning, errors: bool, home: Home, entering: Tensor, sequences: int) -> int:
    """Bytes of all streams at a time, at most: those that lead on, and what is made of them inside the window.

    Args:
        pruning: what is done to the model.
        errors: whether each block's is measured.
        home: the model.
        entering: one sequence of hidden states, shape (1, sequence, width).
        sequences: how many there are.
    """
    stream, leading = sequences * entering.nbytes, leading_streams(pruning, errors)
    allocating = (max(leading, 1) + 2) * stream if pruning.allocation else 0  # before a block and behind it
    if pruning.reconstruction == "none":
        return max(allocating, (leading + pruning.independent) * stream)
    if pruning.reconstruction == "sublayer":
        return (leading + 4) * stream
    if pruning.reconstruction == "layer":  # what enters one and its dense self, and the target, as wide as the layer is
        layers = [weight_of(layer).shape for block in home.blocks for layer in linear_layers(block).values()]
        widths = max(2 * inputs + outputs for outputs, inputs in layers)
        return (leading + 1) * stream + widths * stream // entering.shape[-1]
    return max(allocating, (leading + pruning.window_width) * stream)


def leading_streams(pruning: Pruning, errors: bool) -> int:
    """How many streams lead on from block to block: the pruned model's and the dense one's, or what is needed of them.

    Args:
        pruning: what is done to the model.
        errors: whether each block's is measured.
    """
    return pruning.leads_sparse_stream(errors) + pruning.leads_dense_stream(errors)


def place_of_streams(
    size: int, data: CalibrationText, device: torch.device, needed: int | None, processes: int = 1
) -> Place:
    """Where hidden states of so many bytes lie, which changes no result.

    On a GPU if they fit beside all else, or else in memory, or on disk if they would take too much of that.

    Args:
        size: in bytes, at most.
        data: which shares of free memory they may take.
        device: where blocks compute.
        needed: bytes that it needs for that; None if that is the host.
        processes: how many share the host's memory.
    """
    if device.type == "cuda" and size + (needed or 0) <= data.device_share * available_memory(device):
        return "device"
    free = available_memory(torch.device("cpu")) // processes
    return "disk" if in_host_memory(size, device) > data.memory_share * free else "memory"


def in_host_memory(size: int, device: torch.device) -> int:
    """What so many bytes of the host take, at most: they are pinned for a GPU, and PyTorch does so by powers of two."""
    return 2 * size if device.type == "cuda" else size


def _pruning_memory(pruning: Pruning, home: Home, call: BlockCall, entering: Tensor) -> int:
    """Statistics of a block, and what choosing and solving for the weights of its largest layer takes."""
    block, method = home.blocks[0], pruning.mask
    layers = watched = linear_layers(block)
    if isinstance(method, NeuronMask):  # looks at what the MLP's last layer gets
        reader = find_neurons(block, mlp_width(home.model.config)).reader
        watched = {reader: layers[reader]}
    with observe(watched, method, pruning.solver) as statistics:
        call(block, entering)
    weights = {name: weight_of(layer) for name, layer in layers.items()}
    largest = max(weight.nbytes for weight in weights.values())
    gradients = sum(2 * weight.nbytes for weight in weights.values()) if method.gradient else 0  # in float64
    # one for each input that layers share
    seen = {id(known.inputs): name for name, known in statistics.items() if isinstance(known.inputs, Gram)}
    grams = [FLOAT * weights[name].shape[1] ** 2 for name in seen.values()]
    at_work: list[MaskMethod | Solver] = [method, pruning.solver] if pruning.solver else [method]
    widest, derived = max(grams, default=0), sum(one.derived for one in at_work)
    kept = max(round(SUMMED * sum(grams)), sum(grams) + derived * widest)
    working = max(one.working for one in at_work) * largest
    return gradients + kept + max(DERIVING * widest, working)
