"""Which layers are pruned, and how much: skipped layers, sparsities by name, and an allocation over blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from lit_prune.errors import BadInput
from lit_prune.masks import NeuronMask, Sparsity
from lit_prune.method import Pruning
from lit_prune.models import Home, Neurons, find_neurons, linear_layers, mlp_width, weight_of


@dataclass(frozen=True)
class BlockPlan:
    """What is pruned of one block.

    Attributes:
        name: the block's full name in the model.
        sparsity: by name of a layer within the block; a layer that is not there stays dense.
        free: the layers whose sparsity is the run's, and may be allocated.
        free_weights: how many weights these hold.
        neurons: the layers of its MLP, where whole neurons are pruned.
    """

    name: str
    sparsity: Mapping[str, Sparsity]
    free: tuple[str, ...]
    free_weights: int
    neurons: Neurons | None = None

    def at(self, share: float) -> "BlockPlan":
        """The same with an allocated share for its free layers."""
        allocated = Sparsity(share)
        sparsity = {name: allocated if name in self.free else own for name, own in self.sparsity.items()}
        return replace(self, sparsity=sparsity)


def make_plan(pruning: Pruning, home: Home) -> list[BlockPlan]:
    """What is pruned of every block.

    Raises:
        BadInput: a pattern matches no layer, nothing is left to prune, or a sparsity does not fit a layer or method.
    """
    model, blocks = home.model, home.blocks
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    width = mlp_width(model.config) if isinstance(pruning.mask, NeuronMask) else None
    plans = []
    names: list[str] = []
    for index, block in enumerate(blocks):
        name = f"{prefix}.{index}"
        neurons = None
        if width:
            with home.on(index, torch.device("cpu")):
                neurons = find_neurons(block, width)
        layers = linear_layers(block)
        prunable = (*neurons.producers, neurons.reader) if neurons else tuple(layers)
        own = {layer: _sparsity_of(f"{name}.{layer}", pruning) for layer in prunable}
        sparsity = {layer: chosen for layer, (chosen, _) in own.items() if chosen is not None}
        free = tuple(layer for layer, (_, is_free) in own.items() if is_free)
        weights = sum(weight_of(layers[layer]).numel() for layer in free)
        plans.append(BlockPlan(name, sparsity, free, weights, neurons))
        names += [f"{name}.{layer}" for layer in prunable]
    _check_patterns("model.skip", pruning.skipped, names)
    _check_patterns("model.sparsities", list(pruning.sparsities), names)
    if not any(plan.sparsity for plan in plans):
        raise BadInput(f"model.skip: {', '.join(pruning.skipped)} leaves no layer to prune; skip fewer.")
    for plan, block in zip(plans, blocks, strict=True):
        _check_fit(plan, block)
    if isinstance(pruning.mask, NeuronMask):
        _check_neurons(pruning, pruning.mask, plans)
    if pruning.allocation and pruning.sparsity.m:
        raise BadInput(
            f"model.allocation: {type(pruning.allocation).__name__} shares out a share of weights, which the pattern "
            f"{pruning.sparsity} fixes in every group; give model.sparsity as a share, or no allocation."
        )
    return plans


def _sparsity_of(layer: str, pruning: Pruning) -> tuple[Sparsity | None, bool]:
    """A layer's sparsity, None if it is skipped, and whether it is the run's own. Of several patterns the last wins."""
    if any(fnmatchcase(layer, pattern) for pattern in pruning.skipped):
        return None, False
    own = [sparsity for pattern, sparsity in pruning.sparsities.items() if fnmatchcase(layer, pattern)]
    return (own[-1], False) if own else (pruning.sparsity, True)


def _check_patterns(key: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise BadInput(f"{key}: '{pattern}' matches no layer that is pruned; names look like '{names[0]}'.")


def _check_fit(plan: BlockPlan, block: nn.Module) -> None:
    layers = linear_layers(block)
    for name, sparsity in plan.sparsity.items():
        inputs = weight_of(layers[name]).shape[1]
        if not sparsity.fits(inputs):
            raise BadInput(
                f"model.sparsity: in {sparsity}, {sparsity.m} does not divide the {inputs} inputs of "
                f"'{plan.name}.{name}'; give a pattern whose second number does, or a share."
            )


def _check_neurons(pruning: Pruning, mask: NeuronMask, plans: Sequence[BlockPlan]) -> None:
    """Whole neurons have one sparsity in all layers of an MLP, and one in all blocks if they are sliced away."""
    method = type(mask).__name__
    chosen = set()
    for plan in plans:
        assert plan.neurons is not None
        layers = {plan.sparsity.get(name) for name in (*plan.neurons.producers, plan.neurons.reader)}
        if len(layers) > 1:
            raise BadInput(
                f"model.mask: {method} prunes whole neurons, but the MLP of '{plan.name}' has more than one sparsity; "
                "let model.skip and model.sparsities match all its layers or none."
            )
        chosen |= layers
    if any(sparsity is not None and sparsity.m for sparsity in chosen):
        raise BadInput(
            f"model.sparsity: {method} prunes whole neurons, not n of every m weights; give a share such as 0.25."
        )
    if mask.slice and (len(chosen) > 1 or pruning.allocation):
        raise BadInput(
            f"model.mask: {method} with slice needs as many neurons in every block, since a stock configuration has "
            "one width for all; give all blocks one share, without model.skip, model.sparsities and model.allocation."
        )
