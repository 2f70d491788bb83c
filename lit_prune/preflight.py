"""Everything that can be known to fail is looked for here, before any long work starts."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_prune.data import CalibrationText, EvaluationText
from lit_prune.errors import BadInput
from lit_prune.masks import GBLM
from lit_prune.method import Pruning
from lit_prune.models import (
    capture_calls,
    embed,
    find_blocks,
    halves,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    stored_dtype,
)
from lit_prune.modules import available_memory, whole_model_memory, window_memory
from lit_prune.plan import BlockPlan, make_plan
from lit_prune.run_folder import RunFolder, require_space


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be pruned: float32, on the CPU, in evaluation mode."""

    path: str
    model: PreTrainedModel
    blocks: nn.ModuleList
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    plans: list[BlockPlan]


def prepare(pruning: Pruning, data: CalibrationText, evaluation: EvaluationText, folder: RunFolder) -> Loaded:
    """Load the model and the texts, and check that the whole run can work.

    Raises:
        BadInput: it cannot; the cheapest checks come first.
    """
    data.check()
    evaluation.check()
    _check_reconstruction(pruning)
    path = resolve(pruning.checkpoint)
    config = load_config(path)
    _check_positions(config, data, evaluation)
    data.tokenizer = evaluation.tokenizer = load_tokenizer(path)
    evaluation.window_length = evaluation.window_length or data.sequence_length
    data.setup()
    evaluation.setup()
    model = load_model(path)
    blocks = find_blocks(model)
    plans = make_plan(pruning, model, blocks)
    dtype = stored_dtype(config)
    _check_parts(pruning, data, model, blocks)
    _check_memory(pruning, data, model, blocks)
    if not folder.finished:
        require_space(folder.path, _needed_space(pruning, data, model, blocks, dtype))
    return Loaded(path, model, blocks, data.tokenizer, dtype, plans)


def _needed_space(
    pruning: Pruning, data: CalibrationText, model: PreTrainedModel, blocks: nn.ModuleList, dtype: torch.dtype
) -> int:
    """Bytes of the result, of the finished blocks, and of what GBLM stores until it is used."""
    of_blocks = sum(p.numel() for p in blocks.parameters())
    needed = (sum(p.numel() for p in model.parameters()) + of_blocks) * dtype.itemsize
    if isinstance(pruning.mask, GBLM):
        needed += 4 * of_blocks
        if pruning.mask.backward == "blocks":
            width: int = model.config.get_text_config().hidden_size
            needed += 4 * len(blocks) * data.observed * data.sequence_length * width
    return needed


def _check_reconstruction(pruning: Pruning) -> None:
    """Settings that contradict each other."""
    for key, least in (("window", 1), ("stride", 1), ("rank", 1)):
        if (value := getattr(pruning, key)) < least:
            raise BadInput(f"model.{key}: {value} is too few; give at least {least}.")
    if pruning.window_stride > pruning.window_width:
        raise BadInput(
            f"model.stride: a window of {pruning.window} blocks that moves on by {pruning.stride} leaves blocks out; "
            f"give at most {pruning.window}."
        )


def _check_parts(pruning: Pruning, data: CalibrationText, model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Whether the blocks can be put together to windows, or cut into halves."""
    if pruning.window_width > len(blocks):
        raise BadInput(f"model.window: {pruning.window} is more than the model's {len(blocks)} blocks; give fewer.")
    if pruning.reconstruction == "sublayer":
        hidden, calls = embed(model, blocks, data.tokens[:1]), capture_calls(model, blocks, data.tokens)
        tried: set[type[nn.Module]] = set()
        for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
            if type(block) not in tried:  # a pass through every block of a large model would be long work
                halves(block, call, hidden, f"block {index}")
                tried.add(type(block))


def _check_memory(pruning: Pruning, data: CalibrationText, model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    call = capture_calls(model, blocks, data.tokens)[0]
    free = available_memory(torch.device("cpu"))
    if isinstance(pruning.mask, GBLM) and pruning.mask.backward == "model":
        loaded = sum(p.nbytes for p in model.parameters())  # which is counted as needed, but lies there already
        batch = min(data.batch_size, data.observed)
        needed = whole_model_memory(model, blocks, call, data.calibration, batch) - loaded
        if needed > free:
            raise BadInput(
                f"model.mask: GBLM with backward 'model' needs {needed / 1e9:.2f} GB of memory beside the model, but "
                f"{free / 1e9:.2f} GB are free; give backward 'blocks', which finds the same gradients block by block, "
                "or a lower data.batch_size."
            )
    if pruning.reconstruction != "none":
        width, dense = pruning.window_width, not (pruning.global_propagation or pruning.independent)
        needed = window_memory(model, blocks, call, data.tokens, data.batch_size, width, dense and width > 1)
        if needed > free:
            lower = "a smaller model.window, " if width > 1 else ""
            raise BadInput(
                f"model.reconstruction: {pruning.reconstruction} needs {needed / 1e9:.2f} GB of memory for "
                f"{width} block{'s' if width > 1 else ''} at a time, but {free / 1e9:.2f} GB are free; give {lower}"
                "fewer data.samples, or a lower data.batch_size."
            )


def _check_positions(config: PreTrainedConfig, data: CalibrationText, evaluation: EvaluationText) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = {
        "data.sequence_length": data.sequence_length,
        "evaluation.window_length": evaluation.window_length if evaluation.texts else None,
    }
    for key, length in lengths.items():
        if positions is not None and length is not None and length > positions:
            raise BadInput(f"{key}: {length} is more than the model's {positions} positions; give at most that.")
