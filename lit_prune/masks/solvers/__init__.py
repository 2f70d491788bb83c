"""Weight solvers: what the weights that a mask leaves should be."""

from lit_prune.masks.solvers.admm import ADMM
from lit_prune.masks.solvers.base import Objective, Solver
from lit_prune.masks.solvers.conjugate_gradient import ConjugateGradient

__all__ = ["ADMM", "ConjugateGradient", "Objective", "Solver"]
