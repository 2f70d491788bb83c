"""LightningModules: what is trained and tested, and the callbacks that watch it."""

from lit_prune.modules.allocation import block_needs
from lit_prune.modules.callbacks import KeepBest, LossHistory
from lit_prune.modules.gradients import (
    blockwise_gradients,
    frozen,
    load_gradients,
    regional_gradients,
    save_gradients,
    whole_model_gradients,
)
from lit_prune.modules.language_model import Mean, perplexity, predictions
from lit_prune.modules.memory import (
    TrainingMemory,
    available_memory,
    kept_bytes,
    waiting_bytes,
    whole_model_memory,
    window_memory,
)
from lit_prune.modules.propagation import GlobalPropagation, IndependentPropagation
from lit_prune.modules.pruning import join, observe, prune_layers, prune_neurons, sharing
from lit_prune.modules.reconstruction import Crossing, Reconstruction, paper_optimizer

__all__ = [
    "Crossing",
    "GlobalPropagation",
    "IndependentPropagation",
    "KeepBest",
    "LossHistory",
    "Mean",
    "Reconstruction",
    "TrainingMemory",
    "available_memory",
    "block_needs",
    "blockwise_gradients",
    "frozen",
    "join",
    "kept_bytes",
    "load_gradients",
    "observe",
    "paper_optimizer",
    "perplexity",
    "predictions",
    "prune_layers",
    "prune_neurons",
    "regional_gradients",
    "save_gradients",
    "sharing",
    "waiting_bytes",
    "whole_model_gradients",
    "whole_model_memory",
    "window_memory",
]
