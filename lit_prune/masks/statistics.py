"""What a mask method may know of a layer's calibration input, accumulated batch by batch."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class InputStatistic(ABC):
    """Something summed over all calibration tokens that reach a layer."""

    @abstractmethod
    def add(self, inputs: Tensor) -> None:
        """Take in one batch of the layer's inputs, shape (..., tokens, in)."""


class InputNorm(InputStatistic):
    """The Euclidean norm of every input feature over all tokens: ‖X_j‖₂.

    Each sample's share is computed by itself and added in order, in float64, so that the result does not depend on
    how the samples are split into batches.
    """

    def __init__(self) -> None:
        self._squares: Tensor | None = None

    def add(self, inputs: Tensor) -> None:  # noqa: D102
        for sample in inputs.detach().reshape(-1, *inputs.shape[-2:]):
            squares = torch.linalg.vector_norm(sample.float(), dim=0).double().square()
            self._squares = squares if self._squares is None else self._squares + squares

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ for every input j, float32, shape (in,).

        Raises:
            RuntimeError: no batch was seen.
        """
        if self._squares is None:
            raise RuntimeError("no calibration input has reached this layer")
        return self._squares.sqrt().float()
