"""Statistics and masks of the linear layers of one block."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lit_prune.masks import InputStatistic, LayerMask, LayerStatistics, MaskMethod, Sparsity
from lit_prune.masks.statistics import NOTHING
from lit_prune.models import watch_inputs, weight_of


@contextmanager
def observe(layers: Mapping[str, nn.Module], method: MaskMethod) -> Iterator[dict[str, LayerStatistics]]:
    """Accumulate the statistic that a mask method needs of every layer's input, while the context lasts.

    Layers that see one and the same tensor, as the query, key and value projections do, share one statistic, which
    takes in each input once.

    Yields:
        The statistics by layer name; empty if the method needs none. Filled by the forward passes in the context.
    """
    statistics: dict[str, LayerStatistics] = {}
    if method.statistic is None:
        yield statistics
        return
    make = method.statistic
    owners: dict[str, InputStatistic] = {}
    # the inputs of the first forward pass, held so that "the same tensor" cannot be a new one at an old address
    first_pass: dict[str, Tensor] = {}

    def watch(name: str, inputs: Tensor) -> None:
        if name not in statistics:
            twin = next((other for other, seen in first_pass.items() if seen is inputs), None)
            if twin is None:
                first_pass[name] = inputs
                owners[name] = make(name)
            statistics[name] = LayerStatistics(owners[name]) if twin is None else statistics[twin]
        elif first_pass:
            first_pass.clear()
        if name in owners:
            owners[name].add(inputs)

    with watch_inputs(layers, watch):
        yield statistics


def prune_layers(
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, LayerStatistics],
    method: MaskMethod,
    sparsity: Sparsity,
) -> dict[str, Tensor]:
    """Prune every layer in place.

    Returns:
        The masks by layer name, bool, shape (out, in), True = kept.
    """
    masks = {}
    assert isinstance(method, LayerMask)
    for name, layer in layers.items():
        weight = weight_of(layer)
        pruned = method.prune(weight, statistics.get(name, NOTHING), sparsity)
        weight.copy_(pruned.weight)
        masks[name] = pruned.mask
    return masks
