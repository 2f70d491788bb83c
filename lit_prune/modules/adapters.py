"""Low-rank adapters under a mask: W + M ∘ (B A), of which only B and A are trained."""

import torch
from torch import Tensor, nn


class MaskedLowRank(nn.Module):
    """A pruned weight with a change that can be trained, under which its zeros stay zeros.

    B starts at zero, as in LoRA (Hu et al., arXiv 2106.09685), so that training starts from W itself. The optimiser
    keeps its state for rank · (in + out) numbers instead of in · out.

    Args:
        mask: bool, of the weight's own shape, True = kept.
        rank: of the change before it is masked; of no more use above the smaller dimension.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = mask.shape
        rank = min(rank, rows, columns)
        self.register_buffer("mask", mask, persistent=False)
        self.down = nn.Parameter(torch.randn(rank, columns, device=mask.device) / columns**0.5)
        self.up = nn.Parameter(torch.zeros(rows, rank, device=mask.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its change."""
        return weight + torch.where(self.mask, self.up @ self.down, 0.0)
