"""From which stream, and towards which, a part of the model learns (Shin et al., arXiv 2406.15524, section 3.2)."""

from torch import Tensor

from lit_prune.modules.reconstruction import Crossing, Reconstruction


class GlobalPropagation(Reconstruction):
    """GP: any part learns towards its dense self on the dense stream.

    The input stays the sparse stream's, so that a part also corrects the error that it inherits.
    """

    def pair(self, crossing: Crossing) -> tuple[Tensor, Tensor]:
        """Input and target: the sparse stream, and the dense part on the dense stream."""
        return crossing.sparse(), crossing.on_dense(None)


class IndependentPropagation(Reconstruction):
    """Any part learns on the dense stream alone, so that no part depends on what became of those before it."""

    def pair(self, crossing: Crossing) -> tuple[Tensor, Tensor]:
        """Input and target: the dense stream, and the dense part on it."""
        inputs = crossing.dense()
        return inputs, crossing.on_dense(inputs)
