"""How much each block needs its weights, measured on the dense stream."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lit_prune.data import Streams, sound
from lit_prune.masks import Allocation, LayerStatistics, Sparsity, Wanda
from lit_prune.models import BlockCall, Home, linear_layers, weight_of
from lit_prune.modules.pruning import join, observe


def block_needs(
    allocation: Allocation,
    home: Home,
    calls: Sequence[BlockCall],
    free: Sequence[Sequence[str]],
    streams: Streams,
    total: Sparsity,
) -> list[float]:
    """Lead the dense stream through all blocks and ask the allocation for each one's need.

    Args:
        allocation: which figure counts.
        home: the dense model; left as it is.
        calls: their own call arguments.
        free: for each block, the names of the layers whose sparsity is allocated; none for a block to pass by.
        streams: as they enter the first block; left as they are. Those of the samples that statistics see count.
        total: the share to allocate.

    Returns:
        A figure for each block with free layers.
    """
    needs = []
    wanda, hidden, device = Wanda(), streams.sparse[: streams.observed], streams.device
    for index, (call, names) in enumerate(zip(calls, free, strict=True)):
        with sound(f"block_{index:02d}", streams.share), home.on(index, device) as block:
            forward = partial(call.to(device), block)
            layers = {name: layer for name, layer in linear_layers(block).items() if name in names}
            with observe(layers, wanda) as statistics:
                dense = streams.propagate(forward, hidden)
            join(statistics)
            if layers:
                scores = {name: wanda.score(weight_of(layer), statistics[name]) for name, layer in layers.items()}
                error = partial(_relative_error, forward, layers, statistics, hidden, dense, total, streams)
                needs.append(allocation.need(list(scores.values()), error))
        hidden = dense
    return needs


def _relative_error(
    forward: partial[Tensor],
    layers: dict[str, nn.Module],
    statistics: dict[str, LayerStatistics],
    hidden: Tensor,
    dense: Tensor,
    total: Sparsity,
    streams: Streams,
) -> float:
    """The mean over tokens of ‖f̂(x) − f(x)‖² / ‖f(x)‖² under Wanda's mask; the layers are then as they were."""
    weights = {name: weight_of(layer).clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        weight_of(layer).copy_(Wanda().prune(weights[name], statistics[name], total).weight)
    errors = []
    for rows, sparse in streams.outputs(forward, hidden):
        there = dense[rows].to(sparse.device)
        errors.append(((sparse - there).square().sum(-1) / there.square().sum(-1)).flatten())
    for name, layer in layers.items():
        weight_of(layer).copy_(weights[name])
    mean = streams.mean(torch.cat(errors))
    assert mean is not None
    return mean
