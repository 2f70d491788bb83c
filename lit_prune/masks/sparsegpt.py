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
    cached = 2**18
    """Weights that are updated column by column stay in a CPU's cache; wider ranges are updated by matrix products."""

    def __init__(self, block_size: int = 128, dampening: float = 0.01) -> None:
        require(block_size >= 1, "block_size", block_size, "1 or more, such as 128")
        require(dampening >= 0, "dampening", dampening, "0 or more, such as 0.01")
        self.block_size = block_size
        self.dampening = dampening

    def prune(self, weight: Tensor, statistics: LayerStatistics, sparsity: Sparsity) -> Pruned:  # noqa: D102
        sparsity.require_fit(weight.shape[1])
        gram = statistics.gram
        factor, dead = gram.once(surgeon, self.dampening)
        # columns lie in rows here, (in, out), since they are handled one by one
        columns = weight.T.to(working_dtype(weight), copy=True, memory_format=torch.contiguous_format)
        columns[dead] = 0
        leaf = min(max(self.cached // columns.shape[1], 16), 128)
        sweep = _Sweep(columns, factor, sparsity, leaf)
        width = self.block_size if sparsity.m is None else _multiple(self.block_size, sparsity.m)
        for start in range(0, len(columns), width):
            stop = min(start + width, len(columns))
            if sparsity.m is None:
                sweep.choose(start, stop)
            sweep.eliminate(start, stop)
            sweep.compensate(start, stop, len(columns))
        mask = (sweep.gone == 0).T
        return Pruned((columns.T * mask).to(weight.dtype), mask)


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
    """The sweep over the columns of a layer, which lie as rows of a matrix here: (in, out).

    Attributes:
        gone: 1 / U_jj for a weight that goes and 0 for one that stays, so that its product with a column is that
            column's error.
    """

    def __init__(self, columns: Tensor, factor: Tensor, sparsity: Sparsity, leaf: int) -> None:
        self.columns = columns
        self.factor = factor
        self.sparsity = sparsity
        self.leaf = leaf if sparsity.m is None else _multiple(leaf, sparsity.m)
        self.gone = torch.zeros_like(columns)
        self.errors = torch.empty_like(columns)

    def choose(self, start: int, stop: int) -> None:
        """The mask of some columns, by what it costs to remove a weight: w² / U_jj²."""
        inverse = self.factor.diagonal()[start:stop, None].reciprocal()
        cost = (self.columns[start:stop] * inverse).square_()
        share = self.sparsity.m is None
        kept = self.sparsity.indicator(cost, "matrix") if share else self.sparsity.indicator(cost.T).T
        torch.mul(1 - kept, inverse, out=self.gone[start:stop])

    def eliminate(self, start: int, stop: int) -> None:
        """Remove what goes of some columns, and let these columns alone make up for it.

        Halves of a wide range are led up to each other by a matrix product, so that the column by column work is on a
        few columns that stay in a CPU's cache.
        """
        if stop - start <= self.leaf:
            self._eliminate_one_by_one(start, stop)
            return
        middle = start + _multiple((stop - start) // 2, self.leaf)
        self.eliminate(start, middle)
        self.compensate(start, middle, stop)
        self.eliminate(middle, stop)

    def _eliminate_one_by_one(self, start: int, stop: int) -> None:
        columns, gone, errors = (t[start:stop] for t in (self.columns, self.gone, self.errors))
        factor = self.factor[start:stop, start:stop]
        # views of all rows at once: for narrow layers, indexing would take longer than the arithmetic
        rows = zip(columns.unbind(), gone.unbind(), errors.unbind(), factor.unsqueeze(2).unbind(), strict=True)
        for j, (column, goes, error, row) in enumerate(rows):
            if self.sparsity.m and (start + j) % self.sparsity.m == 0:
                self.choose(start + j, start + j + self.sparsity.m)
            torch.mul(column, goes, out=error)
            if j + 1 < len(columns):
                columns[j + 1 :].addcmul_(row[j + 1 :], error, value=-1)

    def compensate(self, start: int, stop: int, end: int) -> None:
        """Let the columns from `stop` to `end` make up for what was removed from `start` to `stop`."""
        self.columns[stop:end].addmm_(self.factor[start:stop, stop:end].T, self.errors[start:stop], alpha=-1)


def _multiple(number: int, of: int) -> int:
    """The least multiple of `of` that is not below a number."""
    return -(-number // of) * of
