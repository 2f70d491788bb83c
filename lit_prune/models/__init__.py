"""Hugging Face models: finding their blocks, calling them one by one, loading and saving."""

import lit_prune.vector_math  # noqa: F401 - before anything is computed
from lit_prune.models.blocks import (
    BlockCall,
    capture_calls,
    embed,
    find_blocks,
    head,
    left_out,
    linear_layers,
    oriented,
    returns_tuple,
    watch_inputs,
    weight_of,
)
from lit_prune.models.checkpoint import (
    as_stored,
    cast,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    save_model,
    stored_dtype,
)
from lit_prune.models.home import Home, Offloaded, on_device, tensors_of
from lit_prune.models.neurons import Neurons, find_neurons, mlp_width, set_mlp_width, slice_block
from lit_prune.models.parts import Half, Layer, Part, Window, halves, layers_in_order
from lit_prune.models.safetensors_file import InParts
from lit_prune.models.shards import load_offloaded, parameters, save_blockwise

__all__ = [
    "BlockCall",
    "Half",
    "Home",
    "InParts",
    "Layer",
    "Neurons",
    "Offloaded",
    "Part",
    "Window",
    "as_stored",
    "capture_calls",
    "cast",
    "embed",
    "find_blocks",
    "find_neurons",
    "halves",
    "head",
    "layers_in_order",
    "left_out",
    "linear_layers",
    "load_config",
    "load_model",
    "load_offloaded",
    "load_tokenizer",
    "mlp_width",
    "on_device",
    "oriented",
    "parameters",
    "resolve",
    "returns_tuple",
    "save_blockwise",
    "save_model",
    "set_mlp_width",
    "slice_block",
    "stored_dtype",
    "tensors_of",
    "watch_inputs",
    "weight_of",
]
