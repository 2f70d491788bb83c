"""What a run does: the settings of `lit-prune fit` beside data, trainer and evaluation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L

from lit_prune.masks import MaskMethod, Sparsity, Wanda
from lit_prune.modules.reconstruction import Decay, OptimizerFactory, SchedulerFactory, paper_optimizer


@dataclass(frozen=True)
class Pruning:
    """What is pruned, by which mask, and how it is reconstructed.

    Attributes:
        checkpoint: a hub id, a local Hugging Face folder, a .gguf file, or a published file (package://...).
        sparsity: the share of weights to remove, such as 0.5, or n:m such as 2:4, which keeps n of every m.
        mask: the mask method by class, such as Wanda or Magnitude.
        reconstruction: `none` keeps the mask method's weights; `block` trains each block (BR).
        global_propagation: train towards the dense model's own stream (GP), not the dense block on the sparse stream.
    """

    checkpoint: str
    sparsity: Sparsity
    mask: MaskMethod = field(default_factory=Wanda)
    reconstruction: Literal["none", "block"] = "block"
    global_propagation: bool = True


@dataclass(frozen=True)
class Training:
    """How a unit is trained.

    Attributes:
        trainer: makes a fresh Trainer; keyword arguments override the user's.
        optimizer: makes the optimiser from a unit's parameters.
        lr_scheduler: see `BlockReconstruction`.
        seed: of the whole run; every block derives its own from it, so that it does not matter what ran before.
    """

    trainer: Callable[..., L.Trainer]
    optimizer: OptimizerFactory = paper_optimizer
    lr_scheduler: Decay | SchedulerFactory = "linear"
    seed: int = 0

    def trainer_for(self, **arguments: Any) -> L.Trainer:
        """A Trainer for one short job inside a run: silent, and saving nothing of its own."""
        silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        return self.trainer(**silent, **arguments)
