"""What a mask method or a solver may know of a layer from calibration, accumulated batch by batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lit_prune import ranks
from lit_prune.finite import all_finite
from lit_prune.masks.exact import exact

T = TypeVar("T")

STRIP = 128
"""Rows of a matrix that are transposed at a time: for large matrices twice as fast as all at once."""


class InputStatistic(ABC):
    """Something summed over all calibration tokens that reach a layer.

    Tokens are gathered and summed in chunks of a fixed size, so that the result does not depend on how they come in
    batches, to the last bit; in float32 or better, see `exact`.

    Args:
        name: the layers that it belongs to, for messages.
        before: how many tokens reach ranks of lower numbers.

    Attributes:
        name: as given.
        before: as given.
        tokens: how many have been taken in.
    """

    chunk = 1024
    """How many tokens are summed at once: enough for a matrix product at the machine's full rate."""

    def __init__(self, name: str = "a layer", before: int = 0) -> None:
        self.name = name
        self.before = before
        self.tokens = 0
        self._gathered: Tensor | None = None
        self._fill = 0
        self._joined = False

    @exact()
    def add(self, inputs: Tensor) -> None:
        """Take in one batch of the layer's inputs, shape (..., in).

        Raises:
            RuntimeError: those of other ranks have been counted already.
        """
        if self._joined:
            raise RuntimeError(f"the calibration inputs of {self.name} have been counted on all ranks: none may follow")
        inputs = inputs.detach().reshape(-1, inputs.shape[-1])
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        self.tokens += len(inputs)
        while not self._fill and len(inputs) >= self.chunk:  # no need to gather
            self._accumulate(inputs[: self.chunk])
            inputs = inputs[self.chunk :]
        while len(inputs):
            if self._gathered is None:
                self._gathered = inputs.new_empty(self.chunk, inputs.shape[1])
            taken = inputs[: self.chunk - self._fill]
            self._gathered[self._fill : self._fill + len(taken)] = taken
            self._fill += len(taken)
            inputs = inputs[len(taken) :]
            if self._fill == self.chunk:
                self._flush()

    @exact()
    def _flush(self) -> None:
        if self._gathered is not None and self._fill:
            self._accumulate(self._gathered[: self._fill])
            self._fill = 0

    def _require_tokens(self) -> None:
        """Bring in what has been gathered.

        Raises:
            RuntimeError: no token was seen.
        """
        if not self.tokens:
            raise RuntimeError(f"no calibration input has reached {self.name}")
        self._flush()

    @property
    def finite(self) -> bool:
        """Whether all that has been summed is numbers; before `join`, on this rank.

        Raises:
            RuntimeError: no token was seen.
        """
        self._require_tokens()
        return all(map(all_finite, self._summed))

    @abstractmethod
    def _accumulate(self, inputs: Tensor) -> None:
        """Add up to `chunk` tokens, shape (tokens, in), float32 or float64."""

    def join(self) -> None:
        """Count the tokens that reached other ranks, too; no more may be added then.

        Chunks are summed in float64, so that it does not show in what order: the sum is the same on any number of
        ranks, as long as the same tokens make a chunk.

        Raises:
            RuntimeError: no token was seen.
        """
        self._require_tokens()
        for part in self._summed:
            ranks.total(part)
        self.tokens = ranks.counted(self.tokens, self._summed[0].device)
        self._joined, self._gathered = True, None

    @property
    @abstractmethod
    def _summed(self) -> Sequence[Tensor]:
        """What has been summed over all tokens, float64."""


class InputNorm(InputStatistic):
    """The Euclidean norm of every input feature over all tokens: ‖X_j‖₂."""

    def __init__(self, name: str = "a layer", before: int = 0) -> None:
        super().__init__(name, before)
        self._squares: Tensor | None = None

    def _accumulate(self, inputs: Tensor) -> None:
        squares = inputs.square().sum(0).double()
        self._squares = squares if self._squares is None else self._squares + squares

    @property
    def _summed(self) -> Sequence[Tensor]:
        assert self._squares is not None
        return [self._squares]

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ for every input j, float32, shape (in,).

        Raises:
            RuntimeError: no token was seen.
        """
        self._require_tokens()
        assert self._squares is not None
        return self._squares.sqrt().float()


class Gram(InputNorm):
    """The Gram matrix G = XᵀX of a layer's input X, shape (tokens, in), and with it the norms.

    Layers that see the same input share it, and whatever costly is derived from it; see `once`.
    """

    def __init__(self, name: str = "a layer", before: int = 0) -> None:
        super().__init__(name, before)
        self._panels: list[Tensor] = []
        self._full: Tensor | None = None
        self._dtype = torch.float32
        self._derived: dict[Hashable, Any] = {}

    def _accumulate(self, inputs: Tensor) -> None:
        """Only panels on and above the diagonal are multiplied and kept, of wide layers 5/8 of the whole product."""
        width = inputs.shape[1]
        starts = range(0, width, -(-width // 4))
        products = (inputs[:, start : start + starts.step].T @ inputs[:, start:] for start in starts)
        if not self._panels:
            self._panels = [product.double() for product in products]
        else:
            for panel, product in zip(self._panels, products, strict=True):
                panel += product
        self._forget(inputs.dtype)

    def join(self) -> None:
        """As of every statistic; the sum in float64 is let go.

        Raises:
            RuntimeError: no token was seen.
        """
        super().join()
        self._forget(self._dtype)
        self._full = self.matrix
        self._panels.clear()

    @property
    def _summed(self) -> Sequence[Tensor]:
        return self._panels

    def _forget(self, dtype: torch.dtype) -> None:
        """What was made of the sum is no longer true."""
        self._dtype = dtype
        self._full = None
        self.forget_derived()

    @property
    def norm(self) -> Tensor:  # noqa: D102
        return self.matrix.diagonal().sqrt().float()

    @property
    def matrix(self) -> Tensor:
        """G, symmetric, float32 (float64 of inputs in float64), shape (in, in).

        Raises:
            RuntimeError: no token was seen.
        """
        self._require_tokens()
        if self._full is None:
            width = self._panels[0].shape[1]
            full = self._panels[0].new_empty(width, width, dtype=self._dtype)
            for panel in self._panels:
                start = width - panel.shape[1]
                full[start : start + len(panel), start:] = panel
            self._full = _mirrored(full)
        return self._full

    @exact()
    def once(self, derive: Callable[..., T], *settings: Hashable) -> T:
        """`derive(self, *settings)`, computed once for all layers that share this Gram matrix."""
        self._require_tokens()
        key = (derive, *settings)
        if key not in self._derived:
            self._derived[key] = derive(self, *settings)
        result: T = self._derived[key]
        return result

    def forget_derived(self) -> None:
        """Let go of what has been derived, which is computed again if it is asked for."""
        self._derived.clear()


def _mirrored(matrix: Tensor) -> Tensor:
    """A symmetric matrix by what it has on and above the diagonal, in its place."""
    for start in range(0, len(matrix), STRIP):
        strip, after = slice(start, start + STRIP), slice(start + STRIP, None)
        matrix[after, strip] = matrix[strip, after].T
        corner = matrix[strip, strip].triu()
        matrix[strip, strip] = corner + corner.triu(1).T
    return matrix


class GradientNorm:
    """The p-norm over samples of the gradient of a loss with respect to every weight of a layer: ‖g_ij‖_p.

    Args:
        p: 1 or 2.
        total: Σ |g_ij|^p over the samples taken in so far, shape (out, in); None for no sample. Summed in float64, so
            that it does not show in what order.
        samples: how many they are.

    Attributes:
        p: as given.
        total: of all samples so far.
        samples: of all so far.
    """

    def __init__(self, p: int, total: Tensor | None = None, samples: int = 0) -> None:
        self.p = p
        self.total = total
        self.samples = samples

    @exact()
    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Take in samples by what enters the layer and the loss's gradient with respect to what leaves it.

        Args:
            inputs: shape (samples, tokens, in).
            gradients: shape (samples, tokens, out).
        """
        for x, dy in zip(inputs.detach().float(), gradients.detach().float(), strict=True):
            gradient = dy.T @ x
            powers = gradient.abs_() if self.p == 1 else gradient.square_()
            self.total = powers.double() if self.total is None else self.total.add_(powers)
            self.samples += 1

    def join(self) -> None:
        """Count the samples of other ranks, too.

        Raises:
            RuntimeError: no sample was seen.
        """
        if self.total is None:
            raise RuntimeError("no gradient has reached this layer")
        ranks.total(self.total)
        self.samples = ranks.counted(self.samples, self.total.device)

    @property
    def norm(self) -> Tensor:
        """‖g_ij‖_p, float32, shape (out, in).

        Raises:
            RuntimeError: no sample was seen.
        """
        if self.total is None:
            raise RuntimeError("no gradient has reached this layer")
        return self.total.float() if self.p == 1 else self.total.float().sqrt()


class LayerStatistics(NamedTuple):
    """All that is known of one layer: of its inputs, and the gradient of a loss, where a method asks for them."""

    inputs: InputStatistic | None = None
    gradient: GradientNorm | None = None

    @property
    def norms(self) -> InputNorm:
        """The norms of its inputs.

        Raises:
            TypeError: they were not observed.
        """
        if not isinstance(self.inputs, InputNorm):
            raise TypeError(f"the method needs the norms of a layer's inputs, but was given {self.inputs!r}")
        return self.inputs

    @property
    def gram(self) -> Gram:
        """The Gram matrix of its inputs.

        Raises:
            TypeError: it was not observed.
        """
        if not isinstance(self.inputs, Gram):
            raise TypeError(f"the method needs the Gram matrix of a layer's inputs, but was given {self.inputs!r}")
        return self.inputs

    def gradients(self, p: int) -> GradientNorm:
        """The p-norms of the gradients of its weights.

        Raises:
            TypeError: they were not observed, or of another p.
        """
        if self.gradient is None or self.gradient.p != p:
            given = self.gradient and f"{self.gradient.p}-norms"
            raise TypeError(f"the method needs {p}-norms of the gradients of a layer's weights, but was given {given}")
        return self.gradient


NOTHING = LayerStatistics()
