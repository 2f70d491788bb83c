"""What every weight solver minimises, on a mask that is given."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from lit_prune.masks.base import working_dtype
from lit_prune.masks.statistics import Gram


class Objective:
    """The squared output error of a layer with a ridge toward its dense weights.

    f(V) = ‖X (V − W)ᵀ‖² + λ̄ · Σ_ij n_j² (V_ij − W_ij)²,  n_j = ‖X_j‖₂ + 1e-8

    for dense weights W and inputs X; in coordinates scaled by n that is Σ_i e_i H e_iᵀ with e = (V − W) · n,
    H = N⁻¹ G N⁻¹ + λ̄ I, N = diag(n), and λ̄ = λ · mean(diag(N⁻¹ G N⁻¹)), which is λ unless inputs are dead (Boza,
    arXiv 2401.02938). Rows of the layer do not depend on each other.

    Args:
        gram: of the layer's inputs.
        ridge: λ, at least 0.

    Raises:
        FloatingPointError: the Gram matrix holds NaN or infinite values.

    Attributes:
        matrix: H, shape (in, in).
        scale: n, shape (in,).
        name: of the layers, for messages.
    """

    def __init__(self, gram: Gram, ridge: float) -> None:
        self.name = gram.name
        self.scale = gram.matrix.diagonal().sqrt() + 1e-8
        self.matrix = gram.matrix / self.scale / self.scale[:, None]
        if not self.matrix.isfinite().all():
            raise FloatingPointError(f"the Gram matrix of {gram.name} holds NaN or infinite values")
        self.matrix.diagonal().add_(ridge * self.matrix.diagonal().mean())

    def __call__(self, error: Tensor) -> Tensor:
        """The value of every row, shape (out,), for scaled errors e, shape (out, in)."""
        return (error @ self.matrix).mul_(error).sum(1)


class Solver(ABC):
    """Sets the weights that a mask keeps so that a layer's output comes closer to the dense layer's.

    Args:
        ridge: λ of the `Objective`.

    Raises:
        ValueError: the ridge is negative.
    """

    chunk = 2**19
    """Weights handled at once: few enough to stay in a CPU's cache while a layer's matrix is multiplied."""

    working: ClassVar[int] = 11
    """Tensors of a layer's size there are at a time, at most, while its weights are solved for."""

    derived: ClassVar[int] = 1
    """Matrices it makes of a Gram matrix, as large as that, which stay until all layers that share it are pruned."""

    def __init__(self, ridge: float) -> None:
        require(ridge >= 0, "ridge", ridge, "0 or more, such as 0.1")
        self.ridge = ridge

    def solve(self, dense: Tensor, start: Tensor, mask: Tensor, gram: Gram) -> Tensor:
        """Update a layer's weights under its mask.

        Args:
            dense: the dense weights, shape (out, in).
            start: the weights so far, zero where the mask is False.
            mask: bool, True = kept.
            gram: of the layer's inputs.

        Returns:
            The new weights, zero where the mask is False; no row has a higher objective than in `start`.
        """
        dtype, device = working_dtype(dense), dense.device
        objective = gram.once(Objective, self.ridge)
        scale = objective.scale.to(device, dtype)
        solution = torch.empty_like(start)
        for rows in chunks(dense, self.chunk):
            target, given = dense[rows].to(dtype) * scale, start[rows].to(dtype) * scale
            found = self._solve(objective, gram, target, given, mask[rows].to(dtype)) / scale
            solution[rows] = found.mul_(mask[rows]).to(start.dtype)
            better = objective(solution[rows] * scale - target) < objective(given - target)
            solution[rows] = torch.where(better[:, None], solution[rows], start[rows])
        return solution

    @abstractmethod
    def _solve(self, objective: Objective, gram: Gram, target: Tensor, start: Tensor, mask: Tensor) -> Tensor:
        """The weights of some rows, all in scaled coordinates; the mask in their dtype."""


def chunks(weight: Tensor, size: int) -> Iterator[slice]:
    """Slices of whole rows of about `size` weights each, or of more, so that a product is worth reading its matrix."""
    rows = max(1, size // weight.shape[1], weight.shape[1] // 2)
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Refuse a parameter out of range.

    Raises:
        ValueError: in one sentence.
    """
    if not holds:
        raise ValueError(f"{name} {value} does not fit; give {wanted}")
