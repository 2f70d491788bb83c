"""Text to tokens, and streams of hidden states."""

from lit_prune.data.calibration import CalibrationText
from lit_prune.data.evaluation import EvaluationText
from lit_prune.data.generated_text import GeneratedTexts
from lit_prune.data.lockstep import lockstep
from lit_prune.data.self_generated import Recipe, SelfGeneration
from lit_prune.data.share import BATCH, Share, alone, share, whole
from lit_prune.data.space import Space
from lit_prune.data.streams import (
    BlockError,
    NotFinite,
    ReconstructionPairs,
    Streams,
    outputs,
    propagate,
    require_finite_layers,
    sound,
    squared_errors,
)
from lit_prune.data.text import Text

__all__ = [
    "BATCH",
    "BlockError",
    "CalibrationText",
    "EvaluationText",
    "GeneratedTexts",
    "NotFinite",
    "Recipe",
    "ReconstructionPairs",
    "SelfGeneration",
    "Share",
    "Space",
    "Streams",
    "Text",
    "alone",
    "lockstep",
    "outputs",
    "propagate",
    "require_finite_layers",
    "share",
    "sound",
    "squared_errors",
    "whole",
]
