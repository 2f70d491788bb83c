"""Hugging Face models: finding their blocks, calling them one by one, loading and saving."""

from lit_prune.models.blocks import (
    BlockCall,
    capture_calls,
    embed,
    find_blocks,
    head,
    linear_layers,
    oriented,
    watch_inputs,
    weight_of,
)
from lit_prune.models.checkpoint import load_config, load_model, load_tokenizer, resolve, save_model, stored_dtype
from lit_prune.models.neurons import Neurons, find_neurons, mlp_width, slice_neurons
from lit_prune.models.parts import Half, Layer, Part, Window, halves, layers_in_order

__all__ = [
    "BlockCall",
    "Half",
    "Layer",
    "Neurons",
    "Part",
    "Window",
    "capture_calls",
    "embed",
    "find_blocks",
    "find_neurons",
    "halves",
    "head",
    "layers_in_order",
    "linear_layers",
    "load_config",
    "load_model",
    "load_tokenizer",
    "mlp_width",
    "oriented",
    "resolve",
    "save_model",
    "slice_neurons",
    "stored_dtype",
    "watch_inputs",
    "weight_of",
]
