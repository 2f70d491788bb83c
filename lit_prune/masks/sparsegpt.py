"""SparseGPT: one-shot pruning with optimal-brain-surgeon updates (Frantar and Alistarh, arXiv 2301.00774)."""

import torch
from torch import Tensor

from lit_prune.masks.base import LayerMask, Pruned
from lit_prune.masks.factorisation import cholesky
from lit_prune.masks.solvers.base import require
from lit_prune.masks.sparsity import Sparsity
from lit_prune.masks.statistics import STRIP, Gram, LayerStatistics

LEAF = 16
"""So many columns are updated one by one; wider ranges are led up to each other by matrix products."""


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
    derived = 1

    def __init__(self, block_size: int = 128, dampening: float = 0.01) -> None:
        require(block_size >= 1, "block_size", block_size, "1 or more, such as 128")
        require(dampening >= 0, "dampening", dampening, "0 or more, such as 0.01")
        self.block_size = block_size
        self.dampening = dampening

    def prune(self, weight: Tensor, statistics: LayerStatistics, sparsity: Sparsity) -> Pruned:  # noqa: D102
        sparsity.require_fit(weight.shape[1])
        gram = statistics.gram
        factor, dead = gram.once(reverse_cholesky, self.dampening)
        # columns lie in rows here, (in, out), since they are handled one by one
        columns = _transposed(weight, factor.dtype)
        columns[dead] = 0
        sweep = _Sweep(columns, factor, sparsity, self.block_size)
        sweep.prune(0, len(columns))
        return Pruned(_transposed(columns, weight.dtype), _transposed(sweep.kept, torch.bool))


def reverse_cholesky(gram: Gram, dampening: float) -> tuple[Tensor, Tensor]:
    """R, upper triangular, with H = R Rᵀ for the dampened Hessian H = 2XᵀX / tokens; and which inputs are dead.

    It is a Cholesky factorisation that begins at the last row. The factor U of the paper, H⁻¹ = UᵀU, is R⁻¹.
    """
    hessian = gram.matrix.flip(0, 1).mul_(2 / gram.tokens)
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    factor = cholesky(hessian, dampening, gram.name)
    del hessian  # as large as the factor, which is copied
    return factor.flip(0, 1), dead.flip(0)


class _Sweep:
    """Prunes the columns of a layer from left to right, a block at a time.

    When the columns P have changed by d_P, the columns F that remain are best off with d_F = -R_FF⁻ᵀ R_PFᵀ d_P. Since
    R_FF⁻ᵀ is lower triangular, the next block B of F needs R_BB⁻¹ alone; and that is U_BB, the part of U which the
    paper's steps within the block take. So neither H⁻¹ nor U is ever formed, and all but the blocks is large products.

    Attributes:
        columns: the weights, (in, out).
        kept: the mask, (in, out).
        change: d_P of a column that is done, R_PFᵀ d_P of one to come, (in, out).
    """

    def __init__(self, columns: Tensor, factor: Tensor, sparsity: Sparsity, block_size: int) -> None:
        unit = sparsity.m or 1
        self.width = _multiple(block_size, unit)
        self.leaf = _multiple(LEAF, unit)
        self.columns, self.factor, self.sparsity = columns, factor, sparsity
        self.kept = torch.empty_like(columns, dtype=torch.bool)
        self.change = torch.zeros_like(columns)

    def prune(self, start: int, stop: int) -> None:
        """Prune a range of columns; its left half is led up to its right half by one matrix product."""
        if stop - start <= self.width:
            self._prune_block(slice(start, stop))
            return
        middle = start + _multiple((stop - start) // 2, self.width)
        self.prune(start, middle)
        self.change[middle:stop].addmm_(self.factor[start:middle, middle:stop].T, self.change[start:middle])
        self.prune(middle, stop)

    def _prune_block(self, block: slice) -> None:
        columns, change, corner = self.columns[block], self.change[block], self.factor[block, block]
        dense = columns.clone()
        identity = torch.eye(len(corner), dtype=corner.dtype, device=corner.device)
        surgeon = torch.linalg.solve_triangular(corner, identity, upper=True)
        columns.addmm_(surgeon.T, change, alpha=-1)
        gone = surgeon.diagonal().reciprocal()[:, None].repeat(1, columns.shape[1])
        if self.sparsity.m is None:
            gone *= 1 - self.sparsity.indicator((columns * gone).square_(), "matrix")
        self._eliminate(columns, surgeon, gone, torch.empty_like(columns))
        kept = torch.eq(gone, 0, out=self.kept[block])
        torch.sub(columns.mul_(kept), dense, out=change)

    def _eliminate(self, columns: Tensor, surgeon: Tensor, gone: Tensor, errors: Tensor) -> None:
        """Remove what goes, and let the columns to the right make up for it.

        What goes is 1 / U_jj in `gone`, and what stays 0. So its product with a column is that column's error, and the
        square of that what it costs, w² / U_jj².

        Halves of a wide range are led up to each other by a matrix product, so that the column by column work is on a
        few columns, which stay in a CPU's cache.
        """
        if len(columns) <= self.leaf:
            self._eliminate_one_by_one(columns, surgeon, gone, errors)
            return
        middle = _multiple(len(columns) // 2, self.leaf)
        left, right = slice(middle), slice(middle, None)
        self._eliminate(columns[left], surgeon[left, left], gone[left], errors[left])
        columns[right].addmm_(surgeon[left, right].T, errors[left], alpha=-1)
        self._eliminate(columns[right], surgeon[right, right], gone[right], errors[right])

    def _eliminate_one_by_one(self, columns: Tensor, surgeon: Tensor, gone: Tensor, errors: Tensor) -> None:
        n, m = self.sparsity.n, self.sparsity.m
        # views of all rows at once, and no slices: of narrow layers, indexing would take longer than the arithmetic
        rows = zip(columns.unbind(), gone.unbind(), errors.unbind(), surgeon.unsqueeze(2).unbind(), strict=True)
        for j, (column, goes, error, row) in enumerate(rows):
            if n and m and j % m == 0:
                dearest = (columns[j : j + m] * gone[j : j + m]).square_().topk(n, dim=0, sorted=False).indices
                gone[j : j + m].scatter_(0, dearest, 0)
            torch.mul(column, goes, out=error)
            columns.addcmul_(row, error, value=-1)  # nothing for the columns before, where the row is 0


def _transposed(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A transposed copy, made strip by strip."""
    copy = torch.empty(matrix.shape[::-1], dtype=dtype, device=matrix.device)
    for rows in range(0, len(matrix), STRIP):
        copy[:, rows : rows + STRIP] = matrix[rows : rows + STRIP].T
    return copy


def _multiple(number: int, of: int) -> int:
    """The least multiple of `of` that is not below a number."""
    return -(-number // of) * of
