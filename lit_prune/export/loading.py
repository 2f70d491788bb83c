"""A finished model for use: an ordinary transformers model, its sparse layers in a layout that makes use of zeros."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lit_prune.errors import BadInput
from lit_prune.export.layouts import LAYOUTS, Layout, to_csr, to_semi_structured
from lit_prune.export.source import Source
from lit_prune.models import load_config
from lit_prune.models.checkpoint import no_checkpoint, reading, require_all_weights
from lit_prune.resources import named_device

log = logging.getLogger(__name__)


def load(
    path: str | Path,
    *,
    layout: Layout = "dense",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A model in evaluation mode, with the weights that are stored.

    Args:
        path: a finished run's folder, an ordinary Hugging Face folder or hub id, or a packed folder.
        layout: how layers with zeros lie in memory. "dense": as any other. "semi_structured": layers with at most two
            of every four weights as PyTorch's semi-structured tensors, on an NVIDIA GPU. "csr": layers whose
            compressed rows are smaller than they are themselves as such, on a CPU. Other layers stay dense. A model in
            a sparse layout is for inference, and cannot be saved.
        device: where to; None takes a GPU for "semi_structured" and the CPU for all else.
        dtype: of the weights; None takes float32 on a CPU, and what they are stored in elsewhere.

    Raises:
        BadInput: there is no such model, or it or the machine does not fit the layout.
    """
    if layout not in LAYOUTS:
        raise BadInput(f"layout: there is no '{layout}'; give {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}.")
    if layout == "semi_structured" and device is None and not torch.cuda.is_available():
        raise BadInput("layout: semi_structured needs an NVIDIA GPU with CUDA, which this machine lacks; give dense.")
    place = named_device(str(device or ("cuda" if layout == "semi_structured" else "cpu")))
    if layout == "semi_structured" and place.type != "cuda":
        raise BadInput(f"layout: semi_structured needs an NVIDIA GPU with CUDA, which '{place}' is not; give dense.")
    if layout == "csr" and place.type != "cpu":
        raise BadInput(f"layout: csr is for the CPU, and '{place}' is none; give dense, or device cpu.")
    source = Source.open(str(path), "path")
    chosen = dtype or (torch.float32 if place.type == "cpu" else source.dtype)
    model = _model(source, chosen)
    model.to(place)  # type: ignore[arg-type]
    if layout != "dense":
        convert = to_csr if layout == "csr" else to_semi_structured
        converted, layers = convert(model)
        log.info("%d of %d linear layers are in the layout %s", converted, layers, layout)
    return model


def _model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    maker: Any = AutoModelForCausalLM
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(source.folder)}
    where |= {"use_safetensors": True, "trust_remote_code": False}
    if source.packed:
        config = load_config(str(source.folder))
        maker = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        where = {"pretrained_model_name_or_path": None, "config": config, "state_dict": dict(source.tensors())}
    with reading(partial(no_checkpoint, source.given)):
        model = require_all_weights(
            maker.from_pretrained(dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **where)
        )
    if source.packed and (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def weights_bytes(model: nn.Module) -> int:
    """Bytes that a model's parameters and buffers take in memory, in whatever layout, each storage counted once."""
    sizes: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in _storages(tensor):
            storage = part.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _storages(tensor: torch.Tensor) -> list[torch.Tensor]:
    if tensor.layout == torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    inner = [getattr(tensor, name, None) for name in ("packed", "meta")]
    found = [part for part in inner if isinstance(part, torch.Tensor)]
    return found or [tensor]
