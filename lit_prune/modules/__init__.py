"""LightningModules: what is trained and tested, and the callbacks that watch it."""

from lit_prune.modules.callbacks import KeepBest, LossHistory
from lit_prune.modules.global_propagation import GlobalPropagation
from lit_prune.modules.language_model import LanguageModel
from lit_prune.modules.pruning import observe, prune_layers
from lit_prune.modules.reconstruction import BlockReconstruction, Reconstruction, paper_optimizer

__all__ = [
    "BlockReconstruction",
    "GlobalPropagation",
    "KeepBest",
    "LanguageModel",
    "LossHistory",
    "Reconstruction",
    "observe",
    "paper_optimizer",
    "prune_layers",
]
