"""Reconstruction (Shin et al., arXiv 2406.15524): a pruned block learns to put out what its dense self put out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from transformers import get_scheduler

from lit_prune.models import BlockCall, linear_layers, oriented, weight_of

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Decay = Literal["linear", "cosine", "constant"]

TRAIN_LOSS = "reconstruction_loss/train"
HELD_OUT_LOSS = "reconstruction_loss/held_out"


def paper_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """AdamW as in the paper's appendix: lr 2e-4, betas .9 and .95, no weight decay."""
    return torch.optim.AdamW(parameters, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


class Reconstruction(L.LightningModule, ABC):
    """A unit of the model that trains on pairs (input, target) of hidden states, both (batch, sequence, width)."""

    @abstractmethod
    def target(self, on_sparse: Tensor, on_dense: Tensor) -> Tensor:
        """What the unit is to put out, chosen from what its dense self puts out on the sparse and the dense stream."""

    @abstractmethod
    def fix(self, masks: Mapping[str, Tensor]) -> None:
        """Set the masks, by layer name, and zero what they prune."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        return self._loss(batch, TRAIN_LOSS)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: D102
        return self._loss(batch, HELD_OUT_LOSS)

    def _loss(self, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
        """The mean squared error over every element, in float32 whatever the forward pass computes in."""
        inputs, targets = batch
        loss = F.mse_loss(self(inputs).float(), targets.float())
        self.log(name, loss, on_step=False, on_epoch=True, batch_size=len(inputs))
        return loss


class BlockReconstruction(Reconstruction):
    """BR: one block, trained towards the dense block's output on the same sparse-stream input.

    The mask is fixed. Pruned weights are set to zero once, and their gradients before every optimiser step, so that
    no second copy of the weights and no product with the mask in the forward pass is needed: an exact zero with a
    zero gradient stays an exact zero under AdamW (with weight decay too), SGD with momentum and Adafactor.

    Args:
        block: the block; trained in place.
        call: its call arguments besides the hidden states.
        masks: by name of the block's linear layers, bool, (out, in), True = kept; see `fix`.
        optimizer: makes the optimiser from the parameters.
        lr_scheduler: `linear` or `cosine` decay to zero over this unit's own training, `constant`, or a function
            from the optimiser to a scheduler that steps once an epoch.
    """

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        masks: Mapping[str, Tensor] | None = None,
        optimizer: OptimizerFactory = paper_optimizer,
        lr_scheduler: Decay | SchedulerFactory = "linear",
    ) -> None:
        super().__init__()
        self.block = block
        self.call = call
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.masks: dict[str, Tensor] = {}
        self.fix(masks or {})

    def fix(self, masks: Mapping[str, Tensor]) -> None:
        """Set the masks and zero what they prune. Layers without a mask stay dense and are trained whole.

        Raises:
            KeyError: a mask names no linear layer of the block.
        """
        layers = linear_layers(self.block)
        for name, mask in masks.items():
            weight_of(layers[name]).mul_(mask)
        self.masks = dict(masks)

    def forward(self, hidden: Tensor) -> Tensor:
        """The block's output for hidden states of shape (batch, sequence, width)."""
        self.call = self.call.to(hidden.device)
        return self.call(self.block, hidden)

    def target(self, on_sparse: Tensor, on_dense: Tensor) -> Tensor:
        """The dense block on the sparse stream."""
        return on_sparse

    def configure_optimizers(self) -> OptimizerLRScheduler:  # noqa: D102
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if isinstance(self.lr_scheduler, str):
            steps = int(self.trainer.estimated_stepping_batches)
            decay = get_scheduler(self.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer)}}

    def on_fit_start(self) -> None:
        """Bring the masks to the block's device."""
        self.masks = {name: mask.to(self.device) for name, mask in self.masks.items()}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Zero the gradients of pruned weights: after unscaling and reduction over ranks, before clipping."""
        layers = linear_layers(self.block)
        for name, mask in self.masks.items():
            gradient = layers[name].weight.grad
            if isinstance(gradient, Tensor):
                gradient.mul_(oriented(layers[name], mask))
