"""Statistics and masks of the linear layers of one block."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lit_prune.masks import InputStatistic, MaskMethod, Sparsity
from lit_prune.models import watch_inputs, weight_of


@contextmanager
def observe(layers: Mapping[str, nn.Module], method: MaskMethod) -> Iterator[dict[str, InputStatistic]]:
    """Accumulate the statistic that a mask method needs of every layer's input, while the context lasts.

    Layers that see one and the same tensor, as the query, key and value projections do, share one statistic, which
    takes in each input once.

    Yields:
        The statistics by layer name; empty if the method needs none. Filled by the forward passes in the context.
    """
    statistics: dict[str, InputStatistic] = {}
    if method.statistic is None:
        yield statistics
        return
    make = method.statistic
    owners: dict[str, str] = {}
    # the inputs of the first forward pass, held so that "the same tensor" cannot be a new one at an old address
    first_pass: dict[str, Tensor] = {}
    samples = 1

    def watch(name: str, inputs: Tensor) -> None:
        nonlocal samples
        if inputs.ndim > 2:
            samples = len(inputs)
        if name not in owners:
            owners[name] = next((other for other, seen in first_pass.items() if seen is inputs), name)
            if owners[name] == name:
                first_pass[name] = inputs
                statistics[name] = make()
            statistics[name] = statistics[owners[name]]
        elif first_pass:
            first_pass.clear()
        if owners[name] == name:
            # OPT joins the tokens of all samples before its MLP
            statistics[name].add(inputs if inputs.ndim > 2 else inputs.view(samples, -1, inputs.shape[-1]))

    with watch_inputs(layers, watch):
        yield statistics


def prune_layers(
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, InputStatistic],
    method: MaskMethod,
    sparsity: Sparsity,
) -> dict[str, Tensor]:
    """Prune every layer in place.

    Returns:
        The masks by layer name, bool, shape (out, in), True = kept.
    """
    masks = {}
    for name, layer in layers.items():
        weight = weight_of(layer)
        pruned = method.prune(weight, statistics.get(name), sparsity)
        weight.copy_(pruned.weight)
        masks[name] = pruned.mask
    return masks
