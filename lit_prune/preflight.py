"""Everything that can be known to fail is looked for here, before any long work starts."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_prune.data import CalibrationText, EvaluationText
from lit_prune.errors import BadInput
from lit_prune.masks import Sparsity
from lit_prune.method import Pruning
from lit_prune.models import (
    find_blocks,
    linear_layers,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    stored_dtype,
    weight_of,
)
from lit_prune.run_folder import RunFolder, require_space


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be pruned: float32, on the CPU, in evaluation mode."""

    path: str
    model: PreTrainedModel
    blocks: nn.ModuleList
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype


def prepare(pruning: Pruning, data: CalibrationText, evaluation: EvaluationText, folder: RunFolder) -> Loaded:
    """Load the model and the texts, and check that the whole run can work.

    Raises:
        BadInput: it cannot; the cheapest checks come first.
    """
    data.check()
    evaluation.check()
    path = resolve(pruning.checkpoint)
    config = load_config(path)
    _check_positions(config, data, evaluation)
    data.tokenizer = evaluation.tokenizer = load_tokenizer(path)
    evaluation.window_length = evaluation.window_length or data.sequence_length
    data.setup()
    evaluation.setup()
    model = load_model(path)
    blocks = find_blocks(model)
    _check_pattern(pruning.sparsity, blocks)
    dtype = stored_dtype(config)
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    block_files = sum(p.numel() for p in blocks.parameters()) * dtype.itemsize
    if not folder.finished:
        require_space(folder.path, weights + block_files)
    return Loaded(path, model, blocks, data.tokenizer, dtype)


def _check_positions(config: PreTrainedConfig, data: CalibrationText, evaluation: EvaluationText) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = {
        "data.sequence_length": data.sequence_length,
        "evaluation.window_length": evaluation.window_length if evaluation.texts else None,
    }
    for key, length in lengths.items():
        if positions is not None and length is not None and length > positions:
            raise BadInput(f"{key}: {length} is more than the model's {positions} positions; give at most that.")


def _check_pattern(sparsity: Sparsity, blocks: nn.ModuleList) -> None:
    for index, block in enumerate(blocks):
        for name, layer in linear_layers(block).items():
            inputs = weight_of(layer).shape[1]
            if not sparsity.fits(inputs):
                raise BadInput(
                    f"model.sparsity: in {sparsity}, {sparsity.m} does not divide the {inputs} inputs of "
                    f"'{name}' in block {index}; give a pattern whose second number does, or a share."
                )
