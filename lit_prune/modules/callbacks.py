"""What watches a unit's training."""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_prune import ranks
from lit_prune.finite import all_finite
from lit_prune.modules.reconstruction import HELD_OUT_LOSS, TRAIN_LOSS


class KeepBest(L.Callback):
    """Keep the weights of the epoch with the lowest held-out loss; of the start, if no epoch beats it.

    The start counts as epoch 0 and is measured in Lightning's sanity check, which must therefore run over all of
    the held-out batches (`num_sanity_val_steps=-1`). Without held-out data the last epoch's weights stay, unless its
    loss, or what leaves the unit after it, is no number: then those of the last epoch whose were, or the start's.

    Attributes:
        best_epoch: 0 for the start; None if nothing was held out.
    """

    def __init__(self) -> None:
        self.best_epoch: int | None = None
        self._lowest = float("inf")
        self._weights: dict[str, Tensor] = {}
        self._sound = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        loss = float(trainer.callback_metrics[HELD_OUT_LOSS])
        if self.best_epoch is None or loss < self._lowest:
            self.best_epoch = 0 if trainer.sanity_checking else trainer.current_epoch + 1
            self._lowest = loss
            _keep(pl_module, self._weights)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        if self.best_epoch is None:
            _keep(pl_module, self._weights)

    def on_train_batch_end(  # noqa: D102
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.best_epoch is None and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            # the epoch's loss says nothing of what its last step has made; to see that is not worth a compilation
            eager, in_precision = torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context()
            with torch.no_grad(), eager, in_precision:
                self._sound = all_finite(pl_module(batch[0][:1]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        if self.best_epoch is None:
            self._sound &= math.isfinite(float(trainer.callback_metrics[TRAIN_LOSS]))
            self._sound = ranks.all_agree(self._sound, pl_module.device)
            if self._sound:
                _keep(pl_module, self._weights)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        if self.best_epoch is not None or not self._sound:
            with torch.no_grad():
                for name, parameter in _trained(pl_module):
                    parameter.copy_(self._weights[name])
        self._weights.clear()


class LossHistory(L.Callback):
    """Both losses, epoch by epoch, for the report and the progress bar.

    Args:
        show: called with the newest losses after every epoch.

    Attributes:
        train: the training loss of every epoch.
        held_out: the held-out loss at the start and after every epoch.
    """

    def __init__(self, show: Callable[[dict[str, float]], None] = lambda losses: None) -> None:
        self.train: list[float] = []
        self.held_out: list[float] = []
        self._show = show

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        loss = float(trainer.callback_metrics[HELD_OUT_LOSS])
        self.held_out.append(loss)
        if trainer.sanity_checking and pl_module.logger:  # Lightning logs nothing of the sanity check
            pl_module.logger.log_metrics({HELD_OUT_LOSS: loss}, step=0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        self.train.append(float(trainer.callback_metrics[TRAIN_LOSS]))
        newest = {"loss": self.train[-1]} | ({"held_out": self.held_out[-1]} if self.held_out else {})
        self._show(newest)


@torch.no_grad()
def _keep(module: L.LightningModule, kept: dict[str, Tensor]) -> None:
    """Copy what is trained to the host, in place where there is a copy already: a device has less memory."""
    for name, parameter in _trained(module):
        if name not in kept:
            kept[name] = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda, requires_grad=False)
        kept[name].copy_(parameter)


def _trained(module: L.LightningModule) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
