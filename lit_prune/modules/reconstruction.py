"""Reconstruction (Shin et al., arXiv 2406.15524): a pruned part of a model learns what its dense self puts out.

The *sparse stream* is what the model computes with all earlier blocks pruned and reconstructed; the *dense stream* is
what the untouched model computes. Which of them a part learns from is its propagation:

| | learns from | towards |
|---|---|---|
| `Reconstruction` alone | the sparse stream | the dense part on the sparse stream |
| `GlobalPropagation` | the sparse stream | the dense part on the dense stream |
| `IndependentPropagation` | the dense stream | the dense part on the dense stream |
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from transformers import get_scheduler

from lit_prune.models import Part, linear_layers, oriented, weight_of
from lit_prune.modules.adapters import MaskedLowRank

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]
Decay = Literal["linear", "cosine", "constant"]
Loss = Literal["mse", "relative", "cosine"]
Trained = Literal["all", "pruned", "pruned_norms_biases", "adapters"]

TRAIN_LOSS = "reconstruction_loss/train"
HELD_OUT_LOSS = "reconstruction_loss/held_out"


def paper_optimizer(parameters: Iterable[Any]) -> Optimizer:
    """AdamW as in the paper's appendix: lr 2e-4, betas .9 and .95, no weight decay."""
    return torch.optim.AdamW(parameters, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


@dataclass(frozen=True)
class Crossing:
    """Both streams before and after a part, each computed only if a propagation asks for it, and kept by nobody else.

    Attributes:
        sparse: gives what enters the part on the sparse stream.
        dense: gives what enters its dense self on the dense stream.
        on_sparse: gives what its dense self makes of the one, which may be handed over if it has been computed.
        on_dense: gives what its dense self makes of the other.
    """

    sparse: Callable[[], Tensor]
    dense: Callable[[], Tensor]
    on_sparse: Callable[[Tensor | None], Tensor]
    on_dense: Callable[[Tensor | None], Tensor]


class Reconstruction(L.LightningModule):
    """A part of the model that trains on pairs (input, target) of hidden states, both (batch, sequence, width).

    The mask is fixed. Pruned weights are set to zero once, and their gradients before every optimiser step, so that
    no second copy of the weights and no product with the mask in the forward pass is needed: an exact zero with a
    zero gradient stays an exact zero under AdamW (with weight decay too), SGD with momentum and Adafactor.

    Args:
        part: trained in place.
        masks: by linear layer, bool, (out, in), True = kept; see `fix`. Other layers stay dense.
        optimizer: makes the optimiser from the parameters.
        lr_scheduler: `linear` or `cosine` decay to zero over this part's own training, `constant`, or a function
            from the optimiser to a scheduler that steps once an epoch, by its monitored loss if it has one.
        loss: `mse` over every element; `relative`: each token's squared error as a share of its target's energy;
            `cosine`: one minus each token's cosine similarity.
        trained: `all` that the part is made of; the kept weights of `pruned` layers alone; these with all norms and
            biases; or `adapters`: a low-rank change of the pruned layers, added under their masks (`MaskedLowRank`).
        rank: of the adapters.
        compile: whether blocks are compiled for the training, by `torch.compile`; see `BlockCall`.

    Attributes:
        adapters: by pruned layer, during a training.
    """

    def __init__(
        self,
        part: Part,
        masks: Mapping[nn.Module, Tensor] | None = None,
        optimizer: OptimizerFactory = paper_optimizer,
        lr_scheduler: Decay | SchedulerFactory = "linear",
        loss: Loss = "mse",
        trained: Trained = "all",
        rank: int = 16,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.part = part
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.loss: Loss = loss
        self.trained: Trained = trained
        self.rank = rank
        self.compile_blocks = compile
        self.masks: dict[nn.Module, Tensor] = {}
        self.adapters: dict[nn.Module, MaskedLowRank] = {}
        self._left: list[nn.Parameter] = []
        self.fix(masks or {})

    def fix(self, masks: Mapping[nn.Module, Tensor]) -> None:
        """Set the masks and zero what they prune.

        Raises:
            KeyError: a mask is that of no linear layer here.
        """
        layers = set(linear_layers(self.part).values())
        for layer, mask in masks.items():
            if layer not in layers:
                raise KeyError(f"{layer} is no linear layer of this part")
            weight_of(layer).mul_(mask)
        self.masks = dict(masks)

    def forward(self, inputs: Tensor) -> Tensor:
        """What leaves the part, (batch, sequence, out), for what enters it, (batch, sequence, in)."""
        names = {module: f"{name}.weight" for name, module in self.part.named_modules()} if self.adapters else {}
        # weights go in as what they are with their change, so that a block's own code stays that of all others
        changed = {names[layer]: adapter(layer.weight) for layer, adapter in self.adapters.items()}
        output: Tensor = functional_call(self.part, changed, (inputs,)) if changed else self.part(inputs)
        return output

    def pair(self, crossing: Crossing) -> tuple[Tensor, Tensor]:
        """Input and target: the sparse stream, and the dense part on it."""
        inputs = crossing.sparse()
        return inputs, crossing.on_sparse(inputs)

    def training_step(self, batch: tuple[Any, ...], batch_idx: int) -> Tensor:  # noqa: D102
        return self._step(batch, TRAIN_LOSS)

    def validation_step(self, batch: tuple[Any, ...], batch_idx: int) -> Tensor:  # noqa: D102
        return self._step(batch, HELD_OUT_LOSS)

    def _step(self, batch: tuple[Any, ...], name: str) -> Tensor:
        """The loss, in float32 whatever the forward pass computes in; of several ranks by their parts' weights."""
        inputs, targets, *weight = batch
        loss = LOSSES[self.loss](self(inputs).float(), targets.float())
        # as a float, since Lightning rounds down the mean of whole numbers over ranks
        samples = 0.0 if weight == [0] else float(len(inputs))
        self.log(name, loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=samples)  # type: ignore[arg-type]
        return loss * weight[0] if weight else loss

    def setup(self, stage: str) -> None:
        """Leave out of training what is not to be trained, and put adapters in their place."""
        self.part.compiled = self.compile_blocks
        chosen = {id(p) for p in self._chosen()}
        self._left = [p for p in self.part.parameters() if p.requires_grad and id(p) not in chosen]
        for parameter in self._left:
            parameter.requires_grad_(False)
        if self.trained == "adapters":
            for layer in self._pruned():
                self.adapters[layer] = MaskedLowRank(oriented(layer, self.masks[layer]), self.rank)
            self.trained_adapters = nn.ModuleList(self.adapters.values())

    @property
    def idle(self) -> bool:
        """Whether nothing is to be trained here: a part without a pruned layer, of which only such are trained."""
        return not self._pruned() if self.trained == "adapters" else next(self._chosen(), None) is None

    def _pruned(self) -> list[nn.Module]:
        own = {id(p) for p in self.part.own_parameters()}
        return [layer for layer in self.masks if id(layer.weight) in own]

    def _chosen(self) -> Iterator[nn.Parameter]:
        weights = [layer.weight for layer in self._pruned() if isinstance(layer.weight, nn.Parameter)]
        if self.trained == "all":
            yield from self.part.own_parameters()
        elif self.trained != "adapters":
            yield from weights
        if self.trained == "pruned_norms_biases":
            yield from (p for p in self.part.own_parameters() if p.ndim == 1)

    def configure_optimizers(self) -> OptimizerLRScheduler:  # noqa: D102
        optimizer = self.optimizer(p for p in self.parameters() if p.requires_grad)
        if isinstance(self.lr_scheduler, str):
            steps = int(self.trainer.estimated_stepping_batches)
            decay = get_scheduler(self.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    def on_fit_start(self) -> None:
        """Bring the masks to the part's device."""
        self.masks = {layer: mask.to(self.device) for layer, mask in self.masks.items()}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Zero the gradients of pruned weights: after unscaling and reduction over ranks, before clipping."""
        for layer, mask in self.masks.items():
            gradient = layer.weight.grad
            if isinstance(gradient, Tensor):
                gradient.mul_(oriented(layer, mask))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients, those that a fused optimiser takes included.

        In mixed precision Lightning refuses that, since such an optimiser undoes the scaling of gradients only when it
        steps. It is right in float16 alone, for which there is a scaler.
        """
        plugin = self.trainer.precision_plugin
        if getattr(plugin, "scaler", None) is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_end(self) -> None:
        """Let the optimisers' state go, or Lightning would copy it to the CPU."""
        for optimizer in self.trainer.optimizers:
            optimizer.state.clear()

    def teardown(self, stage: str) -> None:
        """Add adapters to the weights for good, and let all parameters be trained again."""
        self.part.compiled = False
        with torch.no_grad():
            for layer, adapter in self.adapters.items():
                oriented(layer, weight_of(layer)).copy_(adapter(layer.weight))
        self.adapters, self.trained_adapters = {}, nn.ModuleList()
        for parameter in self._left:
            parameter.requires_grad_(True)
        self._left = []


def mean_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Over every element."""
    return F.mse_loss(output, target)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """‖y - t‖² / ‖t‖² of each token, and of these the mean."""
    energy = target.square().sum(-1).clamp(min=torch.finfo(target.dtype).tiny)
    return ((output - target).square().sum(-1) / energy).mean()


def cosine_distance(output: Tensor, target: Tensor) -> Tensor:
    """1 - cos(y, t) of each token, and of these the mean; as ‖y/‖y‖ - t/‖t‖‖² / 2, exactly 0 where they are equal."""
    return (F.normalize(output, dim=-1) - F.normalize(target, dim=-1)).square().sum(-1).mean() / 2


LOSSES: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": mean_squared_error,
    "relative": relative_error,
    "cosine": cosine_distance,
}
