"""In which order the blocks of a model are pruned and reconstructed."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """One training of a window of neighbouring blocks.

    Attributes:
        index: counted from 0.
        entering: the blocks that are pruned at its beginning, from their dense weights.
        window: the blocks that are trained, those entering among them.
        final: the blocks that no later round trains.
    """

    index: int
    entering: range
    window: range
    final: range

    @property
    def name(self) -> str:
        """Of its training, as TensorBoard shows it: block_03, blocks_03-04."""
        first, last = self.window.start, self.window.stop - 1
        return f"block_{first:02d}" if first == last else f"blocks_{first:02d}-{last:02d}"


def make_rounds(blocks: int, width: int = 1, stride: int = 1) -> list[Round]:
    """All rounds: a window of `width` blocks that moves on by `stride`, from before the first block to behind the last.

    With a width of 1 these are the blocks one by one. With a width of 2 and a stride of 1 they are those of cross-block
    reconstruction, L + 1 rounds for L blocks: {0}, {0, 1}, {1, 2}, ..., {L-2, L-1}, {L-1} (Shin et al., arXiv
    2406.15524, as in the authors' code).

    Args:
        blocks: how many the model has.
        width: of the window, at most as many.
        stride: at most the width, or blocks would be left out.
    """
    starts = [max(0, stop - width) for stop in range(stride, blocks + width, stride)]
    made = []
    for index, (start, following) in enumerate(zip(starts, [*starts[1:], blocks], strict=True)):
        stop = min((index + 1) * stride, blocks)
        entering = range(min(index * stride, blocks), stop)
        made.append(Round(index, entering, range(start, stop), range(start, following)))
    return made
