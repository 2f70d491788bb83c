"""A tensor with many zeros in few bytes, and back to the last bit.

What counts is a value's bits, not its number: a -0 comes back as -0, and a NaN with the payload that it had.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_prune.masks import bits

_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers as wide as a value: what its bits are read as."""

_PATTERNS = (0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100)
"""The ways to keep two of four, the first of the four in the lowest bit; a group's code is its index here."""


@dataclass(frozen=True)
class Encoded:
    """A tensor in parts.

    Attributes:
        code: "dense": the tensor as it is; "bitmask": one bit a value tells whether it is kept; "2:4": three bits
            for each four values tell which two are kept.
        parts: `dense`; or else `mask` (uint8), `kept` (the kept values in the tensor's own dtype, in their order)
            and, if any of the others is -0, `signs`: one bit for each of those.
    """

    code: str
    parts: Mapping[str, Tensor]


def encode(tensor: Tensor) -> Encoded:
    """Take whichever code needs the fewest bytes.

    For p values of b bytes, of which k are not zero, these are p·b for dense, ceil(p / 8) + k·b for the bitmask, and
    ceil(3p / 32) + p·b / 2 for 2:4, which needs a last dimension that divides by four with at most two values other
    than zero in each four. Signs cost ceil((p - kept) / 8) on top.
    """
    count, size = tensor.numel(), tensor.itemsize
    if not tensor.is_floating_point() or size not in _WHOLE or not count:
        return Encoded("dense", {"dense": tensor})
    whole = tensor.contiguous().view(_WHOLE[size]).flatten()
    kept = (whole & torch.iinfo(whole.dtype).max) != 0
    negative = (whole < 0) & ~kept
    costs = {"dense": count * size, "bitmask": -(-count // 8) + int(kept.sum()) * size}
    if tensor.ndim and tensor.shape[-1] % 4 == 0 and (kept.view(-1, 4).sum(1) <= 2).all():
        costs["2:4"] = -(-3 * count // 32) + count // 2 * size
    code = min(costs, key=lambda name: costs[name])
    if code == "2:4":
        kept = _two_of_four(kept.view(-1, 4))
    mask = _pack_patterns(kept) if code == "2:4" else bits.pack(kept)
    kept = kept.flatten()
    parts = {"mask": mask, "kept": whole[kept].view(tensor.dtype)}
    if (negative & ~kept).any():
        parts["signs"] = bits.pack(negative[~kept])
    if code == "dense" or sum(part.nbytes for part in parts.values()) >= tensor.nbytes:
        return Encoded("dense", {"dense": tensor})
    return Encoded(code, parts)


def decode(encoded: Encoded, shape: torch.Size) -> Tensor:
    """The tensor of a shape that `encode` made parts of.

    Raises:
        ValueError: the parts do not belong together.
    """
    parts, count = encoded.parts, shape.numel()
    if encoded.code == "dense":
        if parts["dense"].shape != shape:
            raise ValueError(f"a shape of {tuple(parts['dense'].shape)} is not {tuple(shape)}")
        return parts["dense"]
    if encoded.code not in ("bitmask", "2:4"):
        raise ValueError(f"there is no code '{encoded.code}'")
    two_four = encoded.code == "2:4"
    _require_length(parts["mask"], 3 * (count // 4) if two_four else count)
    kept = (_unpack_patterns(parts["mask"], count // 4) if two_four else bits.unpack(parts["mask"], shape)).flatten()
    values = parts["kept"]
    if len(values) != int(kept.sum()):
        raise ValueError(f"{len(values)} values are kept where the mask keeps {int(kept.sum())}")
    whole = torch.zeros(count, dtype=_WHOLE[values.itemsize])
    whole[kept] = values.view(whole.dtype)
    if "signs" in parts:
        others = torch.Size([count - len(values)])
        _require_length(parts["signs"], others.numel())
        negative = bits.unpack(parts["signs"], others)
        whole[~kept] = negative.to(whole.dtype) * torch.iinfo(whole.dtype).min
    return whole.view(values.dtype).view(shape)


def _two_of_four(kept: Tensor) -> Tensor:
    """Have exactly two of every group of four, shape (groups, 4), by adding the first that are missing."""
    free = ~kept
    missing = 2 - kept.sum(1, keepdim=True, dtype=torch.int8)
    return kept | (free & (free.cumsum(1, dtype=torch.int8) <= missing))


def _pack_patterns(kept: Tensor) -> Tensor:
    codes = torch.zeros(16, dtype=torch.uint8)
    codes[list(_PATTERNS)] = torch.arange(len(_PATTERNS), dtype=torch.uint8)
    patterns = (kept.to(torch.uint8) << torch.arange(4, dtype=torch.uint8)).sum(1)
    return bits.pack((codes[patterns][:, None] >> torch.arange(3, dtype=torch.uint8)) & 1 != 0)


def _unpack_patterns(packed: Tensor, groups: int) -> Tensor:
    threes = bits.unpack(packed, torch.Size([groups, 3])).to(torch.uint8)
    codes = (threes << torch.arange(3, dtype=torch.uint8)).sum(1)
    if groups and int(codes.max()) >= len(_PATTERNS):
        raise ValueError("its mask keeps other than two of four")
    patterns = torch.tensor(_PATTERNS, dtype=torch.uint8)[codes]
    return (patterns[:, None] >> torch.arange(4, dtype=torch.uint8)) & 1 != 0


def _require_length(packed: Tensor, entries: int) -> None:
    if packed.dtype != torch.uint8 or packed.shape != (-(-entries // 8),):
        raise ValueError(f"{entries} bits are not {tuple(packed.shape)} bytes")
