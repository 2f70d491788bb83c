"""In which precision a training computes; its weights, gradients and optimiser are in float32 always."""

import copy
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.plugins import MixedPrecision, Precision

from lit_prune.accelerators.hpu import HPUAccelerator
from lit_prune.errors import BadInput

FULL, MIXED = "32-true", "bf16-mixed"


def in_precision(settings: dict[str, Any]) -> dict[str, Any]:
    """A Trainer's settings with the precision that is meant where none is given, the same wherever the run goes on.

    That is `bf16-mixed` on an NVIDIA GPU that multiplies matrices in bfloat16 (Ampere or later), and `32-true`
    elsewhere. A Gaudi's settings are left alone. An Apple GPU lacks float64, so that `auto` is the CPU beside one.

    Args:
        settings: the Trainer's, as far as they are given.

    Raises:
        BadInput: Lightning refuses them, there is no such accelerator, or weights would not be in float32.
    """
    plugins = settings.get("plugins") or []
    if any(isinstance(plugin, Precision) for plugin in (plugins if isinstance(plugins, list) else [plugins])):
        raise BadInput(f"trainer.plugins: a precision is given as trainer.precision; give it there, such as {MIXED}.")
    accelerator = settings.get("accelerator", "auto")
    if accelerator == "auto" and MPSAccelerator.is_available():
        return in_precision(settings | {"accelerator": "cpu"})
    if accelerator == "mps" or (accelerator in ("gpu", "cuda") and not CUDAAccelerator.is_available()):
        raise BadInput(
            f"trainer.accelerator: '{accelerator}' is asked for, but PyTorch finds no GPU with float64, in which "
            "statistics are summed; give cpu or auto."
        )
    where = {key: settings[key] for key in ("accelerator", "devices", "num_nodes", "strategy") if key in settings}
    asked = settings.get("precision")
    try:
        # of copies: a Trainer leaves its marks on the strategy that it is given
        trainer = L.Trainer(**copy.deepcopy(where), precision=asked, logger=False, enable_checkpointing=False)
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise BadInput(f"trainer: {' '.join(str(error).split())}") from error
    kind = trainer.precision_plugin
    if type(kind) is not Precision and not isinstance(kind, MixedPrecision):
        raise BadInput(
            f"trainer.precision: in '{asked}' weights themselves would not be float32, as lit-prune keeps them in a "
            f"training; give {MIXED} or {FULL}."
        )
    if asked is not None or isinstance(trainer.accelerator, HPUAccelerator):
        return settings
    # older GPUs can only imitate bfloat16, which takes longer than float32
    fast = isinstance(trainer.accelerator, CUDAAccelerator) and torch.cuda.is_bf16_supported(including_emulation=False)
    return settings | {"precision": MIXED if fast else FULL}
