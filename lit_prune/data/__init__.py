"""Text to tokens, and streams of hidden states."""

from lit_prune.data.calibration import CalibrationText
from lit_prune.data.evaluation import EvaluationText
from lit_prune.data.streams import BlockError, ReconstructionPairs, Streams, outputs, propagate, squared_errors
from lit_prune.data.text import Text

__all__ = [
    "BlockError",
    "CalibrationText",
    "EvaluationText",
    "ReconstructionPairs",
    "Streams",
    "Text",
    "outputs",
    "propagate",
    "squared_errors",
]
