"""Masks at one bit a weight, for files."""

import torch
from torch import Tensor


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as bytes, eight entries each, the first in the lowest bit; shape (ceil(numel / 8),), uint8."""
    flat = mask.flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The bool tensor of a shape that `pack` made bytes of."""
    flat = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flat.flatten()[: shape.numel()].view(shape).bool()
