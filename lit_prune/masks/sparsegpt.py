"""SparseGPT: one-shot pruning with optimal-brain-surgeon updates (Frantar and Alistarh, arXiv 2301.00774)."""

import torch
from torch import Tensor

from lit_prune.masks.base import LayerMask, Pruned, working_dtype
from lit_prune.masks.factorisation import cholesky
from lit_prune.masks.solvers.base import require
from lit_prune.masks.sparsity import Sparsity
from lit_prune.masks.statistics import Gram, LayerStatistics


class SparseGPT(LayerMask):
    """Prunes column by column; what a pruned weight did is taken over by the columns to its right.

    Args:
        block_size: columns whose mask is chosen together: the share of weights with the lowest w² / U_jj² over all
            rows goes. A pattern n:m is chosen group by group, whatever the block.
        dampening: added to the diagonal of the Hessian, as a share of its mean.

    Raises:
        ValueError: a parameter is out of range.
    """

    statistic = Gram
    updates = True
    leaf = 32
    """Columns that are updated one by one; wider ranges are updated by matrix products."""

    def __init__(self, block_size: int = 128, dampening: float = 0.01) -> None:
        require(block_size >= 1, "block_size", block_size, "1 or more, such as 128")
        require(dampening >= 0, "dampening", dampening, "0 or more, such as 0.01")
        self.block_size = block_size
        self.dampening = dampening

    def prune(self, weight: Tensor, statistics: LayerStatistics, sparsity: Sparsity) -> Pruned:  # noqa: D102
        gram = statistics.gram
        factor, dead = gram.once(surgeon, self.dampening)
        columns = weight.T.to(working_dtype(weight), copy=True, memory_format=torch.contiguous_format)  # (in, out)
        columns[dead] = 0
        sweep = _Sweep(columns, factor, sparsity, self.leaf)
        width = self.block_size if sparsity.m is None else -(-self.block_size // sparsity.m) * sparsity.m
        for start in range(0, len(columns), width):
            stop = min(start + width, len(columns))
            if sparsity.m is None:
                sweep.choose(start, stop)
            sweep.eliminate(start, stop)
            sweep.compensate(start, stop, len(columns))
        return Pruned(columns.T.to(weight.dtype), sweep.mask.T)


def surgeon(gram: Gram, dampening: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor U of the inverse of the dampened Hessian 2XᵀX / tokens, and which inputs are dead.

    H = R Rᵀ with R upper triangular is a Cholesky factorisation that begins at the last row; then H⁻¹ = UᵀU with
    U = R⁻¹. So one factorisation and one triangular inverse do, and H⁻¹ itself is never formed.
    """
    hessian = gram.matrix * (2 / gram.tokens)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    reverse = cholesky(hessian.flip(0, 1), dampening, gram.name).flip(0, 1)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(reverse, identity, upper=True), dead


class _Sweep:
    """The sweep over the columns of a layer, which lie as rows of a matrix here: (in, out)."""

    def __init__(self, columns: Tensor, factor: Tensor, sparsity: Sparsity, leaf: int) -> None:
        self.columns = columns
        self.factor = factor
        self.sparsity = sparsity
        self.leaf = leaf if sparsity.m is None else -(-leaf // sparsity.m) * sparsity.m
        self.mask = torch.ones_like(columns, dtype=torch.bool)
        self.errors = torch.empty_like(columns)
        self.diagonal = factor.diagonal().tolist()

    def choose(self, start: int, stop: int) -> None:
        """The mask of some columns, by what it costs to remove a weight: w² / U_jj²."""
        cost = (self.columns[start:stop] / self.factor.diagonal()[start:stop, None]).square_()
        if self.sparsity.m is None:
            self.mask[start:stop] = self.sparsity.select(cost, "matrix")
        else:
            self.mask[start:stop] = self.sparsity.select(cost.T).T

    def eliminate(self, start: int, stop: int) -> None:
        """Remove what goes of some columns, and let these columns alone make up for it.

        Halves of a wide range are led up to each other by a matrix product, so that the column by column work is on a
        few columns that stay in a CPU's cache.
        """
        if stop - start <= self.leaf:
            self._eliminate_one_by_one(start, stop)
            return
        middle = start + -(-(stop - start) // (2 * self.leaf)) * self.leaf
        self.eliminate(start, middle)
        self.compensate(start, middle, stop)
        self.eliminate(middle, stop)

    def _eliminate_one_by_one(self, start: int, stop: int) -> None:
        for j in range(start, stop):
            if self.sparsity.m and j % self.sparsity.m == 0:
                self.choose(j, j + self.sparsity.m)
            column, error = self.columns[j], self.errors[j]
            torch.mul(column, ~self.mask[j], out=error)
            column.sub_(error)
            error.div_(self.diagonal[j])
            if j + 1 < stop:
                self.columns[j + 1 : stop].addr_(self.factor[j, j + 1 : stop], error, alpha=-1)

    def compensate(self, start: int, stop: int, end: int) -> None:
        """Let the columns from `stop` to `end` make up for what was removed from `start` to `stop`."""
        self.columns[stop:end].addmm_(self.factor[start:stop, stop:end].T, self.errors[start:stop], alpha=-1)
