"""Hugging Face models: finding their blocks, calling them one by one, loading and saving."""

from lit_prune.models.blocks import (
    BlockCall,
    capture_calls,
    embed,
    find_blocks,
    linear_layers,
    oriented,
    watch_inputs,
    weight_of,
)
from lit_prune.models.checkpoint import load_config, load_model, load_tokenizer, resolve, save_model, stored_dtype

__all__ = [
    "BlockCall",
    "capture_calls",
    "embed",
    "find_blocks",
    "linear_layers",
    "load_config",
    "load_model",
    "load_tokenizer",
    "oriented",
    "resolve",
    "save_model",
    "stored_dtype",
    "watch_inputs",
    "weight_of",
]
