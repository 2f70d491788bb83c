"""The neurons of a block's MLP: which layers compute and read them, and how to take some out for good."""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import BadInput
from lit_prune.models.blocks import linear_layers, oriented, weight_of

WIDTH_KEYS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
"""What configurations call the number of neurons in a block's MLP."""


class Neurons(NamedTuple):
    """The linear layers of an MLP by their names in the block.

    Neuron k is row k of every producer (up and gate, or fc1) and column k of the reader (down, or fc2).
    """

    producers: tuple[str, ...]
    reader: str


def find_neurons(block: nn.Module, width: int) -> Neurons:
    """The layers that compute and read the neurons of a block's MLP, found by what they do, not by their names.

    The module that holds the reader is tried out with random numbers. What the producers give out for a neuron and a
    token must reach the reader as the same neuron of the same token and in no other place, as 0 if it is 0. This tells
    an MLP from attention, whose projections may be of the same shapes.

    Args:
        block: in evaluation mode; hooks on its layers, if any, would see random numbers.
        width: the number of neurons.

    Raises:
        BadInput: the block has no such layers, or several groups of them.
    """
    layers = linear_layers(block)
    found = []
    for reader, layer in layers.items():
        if weight_of(layer).shape[1] == width:
            parent = block.get_submodule(reader.rpartition(".")[0])
            candidates = [name for name, other in layers.items() if len(weight_of(other)) == width]
            if producers := _producers(parent, layers, reader, candidates):
                found.append(Neurons(producers, reader))
    if len(found) != 1:
        raise BadInput(
            f"In a {type(block).__name__} {len(found) or 'no'} groups of linear layers compute and read {width} MLP "
            "neurons each in rows of their own (gate and up in one matrix are not supported), so that lit-prune "
            "cannot remove neurons from it; choose a mask that removes single weights, or another model."
        )
    return found[0]


def _producers(parent: nn.Module, layers: dict[str, nn.Module], reader: str, candidates: list[str]) -> tuple[str, ...]:
    """Those of the candidates that compute what the reader reads; none if neurons do not stay apart on their way."""
    try:
        entering = _entering(parent, layers, reader)
        producers = tuple(n for n in candidates if not torch.equal(_entering(parent, layers, reader, [n]), entering))
        kept = _entering(parent, layers, reader, producers)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        LookupError,
    ):  # not to be called with hidden states alone, as attention is not
        return ()
    return producers if torch.equal(kept, entering * _places(entering.shape).to(entering)) else ()


@torch.no_grad()
def _entering(parent: nn.Module, layers: dict[str, nn.Module], reader: str, cut: Collection[str] = ()) -> Tensor:
    """What enters the reader if every linear layer gives out random numbers, the `cut` ones 0 in half of the places.

    Nothing is multiplied by a weight, so that this is fast for layers of any size.
    """
    entering: list[Tensor] = []

    def stand_in(seed: int, name: str, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            if name == reader:
                entering.append(inputs)
            numbers = torch.randn(*inputs.shape[:-1], len(weight_of(layer)), generator=_generator(seed))
            return (numbers * _places(numbers.shape) if name in cut else numbers).to(inputs)

        return forward

    with ExitStack() as patched:
        for seed, (name, layer) in enumerate(layers.items(), 1):
            layer.forward = stand_in(seed, name, layer)
            patched.callback(delattr, layer, "forward")  # the instance's attribute; the class's method shows again
        weight = weight_of(layers[reader])
        parent(torch.randn(1, 5, len(weight), generator=_generator(0)).to(weight))
    (once,) = entering
    return once


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _places(shape: torch.Size) -> Tensor:
    """Half of the places of an MLP's neurons, the same ones for every layer and however the tokens are laid out."""
    return torch.rand(shape, generator=_generator(0)) < 0.5


def intermediate_key(config: PreTrainedConfig) -> str:
    """The name of the configuration's attribute that holds the number of neurons in a block's MLP.

    Raises:
        BadInput: it has none that is known.
    """
    text = config.get_text_config()
    for key in WIDTH_KEYS:
        if isinstance(getattr(text, key, ""), int | None):
            return key
    raise BadInput(
        f"A {type(text).__name__} holds no single number of MLP neurons as {', '.join(WIDTH_KEYS)}, so that lit-prune "
        "cannot remove neurons; choose a mask that removes single weights, or another model."
    )


def mlp_width(config: PreTrainedConfig) -> int:
    """The number of neurons in a block's MLP.

    Raises:
        BadInput: the configuration does not say.
    """
    text = config.get_text_config()
    width: int | None = getattr(text, intermediate_key(config))
    # so GPT-2, GPT-J and GPT-Neo read their None
    return 4 * int(text.hidden_size) if width is None else width


def set_mlp_width(config: PreTrainedConfig, width: int) -> None:
    """Let a configuration say how many neurons are left in every MLP."""
    setattr(config.get_text_config(), intermediate_key(config), width)


@torch.no_grad()
def slice_block(block: nn.Module, neurons: Neurons, kept: Tensor) -> None:
    """Take neurons out of one block's MLP.

    Args:
        block: changed in place.
        neurons: the layers that compute and read them.
        kept: the neurons that stay, bool, shape (neurons,).
    """
    layers = linear_layers(block)
    for name in neurons.producers:
        _keep_rows(layers[name], kept)
    _keep_columns(layers[neurons.reader], kept)


def _keep_rows(layer: nn.Module, mask: Tensor) -> None:
    weight = weight_of(layer)
    _set_weight(layer, weight[mask.to(weight.device)])
    if isinstance(layer.bias, nn.Parameter):
        layer.bias = nn.Parameter(layer.bias[mask.to(weight.device)], layer.bias.requires_grad)


def _keep_columns(layer: nn.Module, mask: Tensor) -> None:
    weight = weight_of(layer)
    _set_weight(layer, weight[:, mask.to(weight.device)])


def _set_weight(layer: nn.Module, weight: Tensor) -> None:
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight = nn.Parameter(oriented(layer, weight).contiguous(), layer.weight.requires_grad)
    if isinstance(layer, Conv1D):
        layer.nf, layer.nx = weight.shape
    else:
        assert isinstance(layer, nn.Linear)
        layer.out_features, layer.in_features = weight.shape
