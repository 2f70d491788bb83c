"""What is exported: a folder of weights, read tensor by tensor, with all that lies beside them."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_prune.errors import BadInput
from lit_prune.export.packed import CONTENTS, STEM, is_packed, packed_tensors
from lit_prune.finished import FinishedRun, run_or_model
from lit_prune.models import load_config, resolve
from lit_prune.models.checkpoint import stored_dtype
from lit_prune.models.shards import SIDE_FILES, Shards, local_folder

CARD = "README.md"


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Attributes:
        given: what the user called it.
        folder: an ordinary Hugging Face folder, or a packed one.
        run: the run that it came of, if it was given as a run.
    """

    given: str
    folder: Path
    run: FinishedRun | None

    @classmethod
    def open(cls, given: str, key: str = "model") -> "Source":
        """Find a run's model, a Hugging Face or packed folder, or whatever else `model.checkpoint` takes.

        Args:
            given: what to find.
            key: the setting that names it, for complaints.

        Raises:
            BadInput: there is no such model, it is quantised, or its run is not finished.
        """
        model, run = run_or_model(given, key)
        folder = Path(model).expanduser()
        try:
            if not is_packed(folder):
                folder = local_folder(resolve(model))
            load_config(str(folder))
        except BadInput as error:  # what is `model.checkpoint` to fit
            raise BadInput(str(error).replace("model.checkpoint:", f"{key}:", 1)) from error
        return cls(given, folder, run)

    @property
    def packed(self) -> bool:
        """Whether it is packed."""
        return is_packed(self.folder)

    @property
    def dtype(self) -> torch.dtype:
        """What its configuration says that its weights are."""
        return stored_dtype(load_config(str(self.folder)))

    def tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every stored tensor by name, read when it is its turn.

        Args:
            dtype: to cast floating-point tensors to; None leaves all as they are.

        Raises:
            BadInput: a file is damaged, or `dtype` does not reach as far as a tensor's values.
        """
        if self.packed:
            stored = packed_tensors(self.folder)
        else:
            shards = Shards(str(self.folder))
            stored = ((name, shards.stored(name)) for name in shards.shapes)
        for name, tensor in stored:
            yield name, tensor if dtype is None or not tensor.is_floating_point() else _cast(name, tensor, dtype)

    def copy_side_files(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Copy all but the weights: configurations, tokenizer, model card.

        Args:
            folder: an existing one.
            dtype: for the configuration to name as that of the weights; None leaves it.
        """
        for pattern in (*SIDE_FILES, CARD, "LICENSE*", "NOTICE*"):
            for file in self.folder.glob(pattern):
                if file.is_file() and file.name not in (CONTENTS, f"{STEM}.safetensors.index.json"):
                    shutil.copyfile(file, folder / file.name)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        if dtype is not None:
            file = folder / "config.json"
            config = json.loads(file.read_text(encoding="utf-8"))
            _name_dtype(config, str(dtype).removeprefix("torch."))
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if lost := int((tensor.isfinite() & ~cast.isfinite()).sum()):
        raise BadInput(
            f"dtype: {lost} values of '{name}' are too large for {str(dtype).removeprefix('torch.')}; give bfloat16."
        )
    return cast


def _name_dtype(config: dict[str, Any], name: str) -> None:
    """A model of several parts has a configuration for each of them inside its own."""
    config.pop("torch_dtype", None)  # what it was called before transformers 5
    config["dtype"] = name
    for part in config.values():
        if isinstance(part, dict) and part.keys() & {"dtype", "torch_dtype"}:
            _name_dtype(part, name)


def files_bytes(folder: Path) -> int:
    """The size of all files of weights in a folder, with what lists them; not of what some publishers add to them."""
    kinds = ("model*.safetensors", "model*.safetensors.index.json", "packed*.safetensors*", CONTENTS, "*.gguf")
    return sum(file.stat().st_size for kind in kinds for file in folder.glob(kind))
