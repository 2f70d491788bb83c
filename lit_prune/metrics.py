"""What `metrics.json` holds."""

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_prune import __version__
from lit_prune.data import CalibrationText, EvaluationText
from lit_prune.method import Pruning
from lit_prune.models import weight_of

STAGES = ("load", "statistics", "mask", "reconstruct", "advance", "save", "evaluate", "total")


def describe(pruning: Pruning, data: CalibrationText, evaluation: EvaluationText) -> dict[str, Any]:
    """The metrics of a run that has measured nothing yet."""
    return {
        "checkpoint": pruning.checkpoint,
        "checkpoint_is_local": Path(pruning.checkpoint).expanduser().exists(),
        "method": {
            "mask": type(pruning.mask).__name__,
            "solver": type(pruning.solver).__name__ if pruning.solver else None,
            "updates_weights": pruning.mask.updates or pruning.solver is not None,
            "allocation": type(pruning.allocation).__name__ if pruning.allocation else None,
            "skip": pruning.skipped,
            "sparsities": {pattern: str(sparsity) for pattern, sparsity in pruning.sparsities.items()},
            "true_sequential": pruning.true_sequential,
            "reconstruction": pruning.reconstruction,
            "global_propagation": pruning.global_propagation and not pruning.independent,
            "independent": pruning.independent,
            "window": pruning.window_width,
            "stride": pruning.window_stride,
            "loss": pruning.loss,
            "trained": pruning.trained,
            "rank": pruning.rank if pruning.trained == "adapters" else None,
            "sparsity": str(pruning.sparsity),
        },
        "calibration": {
            "source": data.source,
            "samples": data.samples,
            "validation_samples": data.validation_samples,
            "sequence_length": data.sequence_length,
            "self_generated": data.self_generated,
            "self_generated_by": data.self_generated_by,
            "self_generated_samples": data.self_generated_samples if data.self_generated else None,
            "self_generated_statistics": data.self_generated_statistics if data.self_generated else None,
        },
        "sparsity": None,
        "allocation": None,
        "parameters": {"dense": None, "saved": None},
        "blocks": [],
        "trainings": [],
        "error": None,
        "seconds": dict.fromkeys(STAGES),
        "peak_memory_bytes": {"host": None, "device": None, "by_stage": {}},
        "machine": None,
        "hidden_states": None,
        "perplexity": {"dense": None, "masked": None, "pruned": None},
        "perplexity_convention": evaluation.conventions,
        "versions": {"lit_prune": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "lightning", "transformers", "safetensors")},
    }


def zeros(layers: Mapping[str, nn.Module], masks: Iterable[str]) -> dict[str, Any]:
    """How many weights of a block's pruned layers are zero; null as sparsity where none is pruned.

    Args:
        layers: the block's linear layers by name.
        masks: the names of those that are pruned.

    Returns:
        The figures of all pruned layers together, and those of every linear layer, the dense ones included.
    """
    counted = {name: _zeros(weight_of(layer)) for name, layer in layers.items()}
    pruned = [counted[name] for name in masks]
    weights, gone = (sum(layer[key] for layer in pruned) for key in ("weights", "zeros"))
    return {"weights": weights, "zeros": gone, "sparsity": gone / weights if weights else None, "layers": counted}


def _zeros(weight: Tensor) -> dict[str, int]:
    return {"weights": weight.numel(), "zeros": int((weight == 0).sum())}
