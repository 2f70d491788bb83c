"""Cholesky factors of matrices that may be nearly singular."""

import logging

import torch
from torch import Tensor

log = logging.getLogger(__name__)

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
        if not dampened.isfinite().all():
            raise FloatingPointError(f"the Gram matrix of {name} holds NaN or infinite values")
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(dampened)
        if not failed and factor.isfinite().all():
            if raised != dampening:
                log.warning("%s: nearly singular Gram matrix, dampening raised to %g", name, raised)
            return factor
        raised = max(STEP * raised, FIRST_STEP)
