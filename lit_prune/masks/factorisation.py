"""Cholesky factors of matrices that may be nearly singular."""

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)
PANEL = 256
"""Columns of a Cholesky factor made at a time."""

FIRST_STEP, STEP = 1e-6, 10.0


def cholesky(matrix: Tensor, dampening: float, name: str) -> Tensor:
    """The lower Cholesky factor of A + dampening · mean(diag A) · I.

    Where rounding makes that indefinite, the dampening is raised tenfold, from 1e-6 if there was none, as often as it
    takes, and the log says so.

    Args:
        matrix: A, symmetric and up to rounding positive semidefinite, shape (n, n).
        dampening: a share of the mean diagonal, at least 0.
        name: whose matrix it is, for the log.

    Raises:
        FloatingPointError: the matrix holds NaN or infinite values.
    """
    # divided before it is summed: the sum of large entries may be infinite where their mean is not
    unit = (matrix.diagonal() / len(matrix)).sum().clamp(min=torch.finfo(matrix.dtype).tiny)
    raised = dampening
    while True:
        dampened = matrix.clone()
        dampened.diagonal().add_(raised * unit)
        # what is finite on the diagonal of such a matrix is finite elsewhere
        if not dampened.diagonal().isfinite().all():
            raise FloatingPointError(f"the Gram matrix of {name} holds NaN or infinite values")
        factor = _factor(dampened)
        if factor is not None:
            if raised != dampening:
                log.warning("%s: nearly singular Gram matrix, dampening raised to %g", name, raised)
            return factor
        raised = max(STEP * raised, FIRST_STEP)


def _factor(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor, written over a matrix, or None if that is indefinite.

    Panel by panel, so that nearly all operations are matrix products: for large matrices twice as fast as LAPACK.
    """
    for start in range(0, len(matrix), PANEL):
        panel, below = slice(start, start + PANEL), slice(start + PANEL, None)
        if start:
            matrix[start:, panel].addmm_(matrix[start:, :start], matrix[panel, :start].T, alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(matrix[panel, panel])
        if failed or not corner.isfinite().all():
            return None
        matrix[panel, panel] = corner
        identity = torch.eye(len(corner), dtype=matrix.dtype, device=matrix.device)
        matrix[below, panel] = matrix[below, panel] @ torch.linalg.solve_triangular(corner, identity, upper=False).T
    return matrix.tril_()
