"""Global propagation (Shin et al., arXiv 2406.15524, section 3.2)."""

from collections.abc import Mapping

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lit_prune.modules.reconstruction import Reconstruction


class GlobalPropagation(Reconstruction):
    """GP: trains any reconstruction towards the dense unit's output on the dense stream.

    The input stays the sparse stream's, so that a unit also corrects the error that it inherits.

    Args:
        reconstruction: the unit to train.
    """

    def __init__(self, reconstruction: Reconstruction) -> None:
        super().__init__()
        self.reconstruction = reconstruction

    def target(self, on_sparse: Tensor, on_dense: Tensor) -> Tensor:
        """The dense unit on the dense stream."""
        return on_dense

    def fix(self, masks: Mapping[str, Tensor]) -> None:  # noqa: D102
        self.reconstruction.fix(masks)

    def forward(self, hidden: Tensor) -> Tensor:
        """The unit's output for hidden states of shape (batch, sequence, width)."""
        output: Tensor = self.reconstruction(hidden)
        return output

    def configure_optimizers(self) -> OptimizerLRScheduler:  # noqa: D102
        return self.reconstruction.configure_optimizers()

    def on_fit_start(self) -> None:  # noqa: D102
        self.reconstruction.on_fit_start()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:  # noqa: D102
        self.reconstruction.on_before_optimizer_step(optimizer)
