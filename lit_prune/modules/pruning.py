"""Statistics and masks of the linear layers of one block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from lit_prune import ranks
from lit_prune.masks import (
    Gram,
    InputStatistic,
    LayerMask,
    LayerStatistics,
    MaskMethod,
    NeuronMask,
    Pruned,
    Sparsity,
)
from lit_prune.masks.exact import exact
from lit_prune.masks.solvers import Solver
from lit_prune.masks.statistics import NOTHING
from lit_prune.models import Neurons, watch_inputs, weight_of


@contextmanager
def observe(
    layers: Mapping[str, nn.Module], method: MaskMethod, solver: Solver | None = None, block: str = "", before: int = 0
) -> Iterator[dict[str, LayerStatistics]]:
    """Accumulate what a mask method and a solver need of every layer's input, while the context lasts.

    Layers that see one and the same tensor, as the query, key and value projections do, share one statistic, which
    takes in each input once.

    Args:
        layers: by name.
        method: the mask method.
        solver: follows the mask; it needs the Gram matrix.
        block: the block's name, which stands before the layers' in messages.
        before: how many tokens reach ranks of lower numbers.

    Yields:
        The statistics by layer name; empty if the method needs none. Filled by the forward passes in the context.
    """
    statistics: dict[str, LayerStatistics] = {}
    make = _richest(method.statistic, Gram if solver else None)
    if make is None:
        yield statistics
        return
    owners: dict[str, InputStatistic] = {}
    # the first of each layer; one that is gone is no other layer's, even if that has a new one at its address
    first_inputs: dict[str, ReferenceType[Tensor]] = {}

    def watch(name: str, inputs: Tensor) -> None:
        if name not in statistics:
            twin = next((other for other, seen in first_inputs.items() if seen() is inputs), None)
            if twin is None:
                first_inputs[name] = ref(inputs)
                owners[name] = make(f"{block}.{name}" if block else name, before)
            statistics[name] = LayerStatistics(owners[name]) if twin is None else statistics[twin]
        if name in owners:
            owners[name].add(inputs)

    with watch_inputs(layers, watch):
        yield statistics


def join(statistics: Mapping[str, LayerStatistics]) -> None:
    """Count what has reached other ranks, too: once for all layers that share a statistic."""
    for inputs in {id(known.inputs): known.inputs for known in statistics.values()}.values():
        if inputs is not None:
            inputs.join()


def _richest(*wanted: type[InputStatistic] | None) -> type[InputStatistic] | None:
    """The one statistic that is all of the wanted ones: each kind is a special kind of the one before."""
    kinds = [kind for kind in wanted if kind is not None]
    return max(kinds, key=lambda kind: len(kind.__mro__), default=None)


@exact()
def prune_layers(
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, LayerStatistics],
    method: LayerMask,
    sparsity: Sparsity | Mapping[str, Sparsity],
    solver: Solver | None = None,
) -> dict[str, Tensor]:
    """Prune layers in place.

    Args:
        layers: by name.
        statistics: by the same names; see `observe`.
        method: the mask method.
        sparsity: of all layers, or by name: a layer without one stays dense.
        solver: updates the weights that the mask leaves.

    Returns:
        The masks by layer name, bool, shape (out, in), True = kept.
    """
    shares = {n: sparsity if isinstance(sparsity, Sparsity) else sparsity.get(n) for n in layers}
    chosen = [name for name, share in shares.items() if share is not None]
    owners, masks = {}, {}
    for number, (inputs, names) in enumerate(sharing(chosen, statistics)):
        owner = number % ranks.count()
        mine = owner == ranks.rank()
        for name in names:
            owners[name] = owner
            weight, known, share = weight_of(layers[name]), statistics.get(name, NOTHING), shares[name]
            if share is not None and (mine or method.statistic is None):  # what is drawn by chance is drawn by all
                pruned = method.prune(weight, known, share)
                if mine:
                    masks[name] = _put(layers[name], pruned, known, solver)
        if isinstance(inputs, Gram):
            inputs.forget_derived()
    return {name: _from_owner(owners[name], weight_of(layers[name]), masks.get(name)) for name in chosen}


def sharing(
    names: Sequence[str], statistics: Mapping[str, LayerStatistics]
) -> list[tuple[InputStatistic | None, list[str]]]:
    """Layers by the statistic that they share, and with it what is derived from it; one that has none is alone."""
    groups: dict[object, tuple[InputStatistic | None, list[str]]] = {}
    for name in names:
        inputs = statistics.get(name, NOTHING).inputs
        groups.setdefault(name if inputs is None else id(inputs), (inputs, []))[1].append(name)
    return [*groups.values()]


def _from_owner(owner: int, weight: Tensor, mask: Tensor | None) -> Tensor:
    """A layer's mask on all ranks, and its weight set there."""
    if ranks.count() > 1:
        there = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device) if mask is None else mask.byte()
        kept = weight.contiguous()
        weight.copy_(ranks.taken_from(owner, kept))
        return ranks.taken_from(owner, there).bool()
    assert mask is not None
    return mask


@exact()
def prune_neurons(
    layers: Mapping[str, nn.Module],
    neurons: Neurons,
    statistics: Mapping[str, LayerStatistics],
    method: NeuronMask,
    sparsity: Sparsity,
    solver: Solver | None = None,
) -> dict[str, Tensor]:
    """Prune whole neurons of an MLP in place.

    Args:
        layers: by name, those of the MLP among them.
        neurons: which layers compute the neurons and which one reads them.
        statistics: of the reading layer, by its name; see `observe`.
        method: the mask method.
        sparsity: the share of neurons that go.
        solver: updates the weights of the reading layer, the only ones that can make up for anything.

    Returns:
        The masks by layer name, bool, shape (out, in), True = kept.
    """
    reader, known = layers[neurons.reader], statistics.get(neurons.reader, NOTHING)
    weight = weight_of(reader)
    kept = method.keep(weight, known, int(weight.shape[1] * sparsity.share))
    kept = ranks.taken_from(0, kept.byte()).bool()
    masks = {neurons.reader: kept.expand_as(weight)}
    for name in neurons.producers:
        masks[name] = kept[:, None].expand_as(weight_of(layers[name]))
        weight_of(layers[name]).mul_(masks[name])
    _put(reader, Pruned(weight * kept, masks[neurons.reader]), known, solver)
    return masks


def _put(layer: nn.Module, pruned: Pruned, known: LayerStatistics, solver: Solver | None) -> Tensor:
    """Set a layer's weights, updated by the solver if there is one, and return their mask."""
    weight = weight_of(layer)
    solved = solver.solve(weight, pruned.weight, pruned.mask, known.gram) if solver else pruned.weight
    weight.copy_(solved)
    return pruned.mask
