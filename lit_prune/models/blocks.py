"""The transformer blocks of any Hugging Face causal language model, and the linear layers inside them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_prune.errors import BadInput


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The model's transformer blocks, first to last.

    They are `get_decoder().layers` in nearly every architecture, and otherwise the one `ModuleList` that is as long
    as the configuration says.

    Raises:
        BadInput: there is no such list or more than one, the blocks hold weights outside of linear layers (mixture
            of experts, convolutions), or a block uses keys and values of another.
    """
    blocks = getattr(model.get_decoder(), "layers", None)  # type: ignore[no-untyped-call]
    if not isinstance(blocks, nn.ModuleList):
        depth = model.config.get_text_config().num_hidden_layers
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if len(lists) != 1:
            raise BadInput(
                f"In a {type(model).__name__} {len(lists)} lists of {depth} modules could be its blocks; "
                "lit-prune needs a decoder-only model with one list of blocks."
            )
        blocks = lists[0]
    for index, block in enumerate(blocks):
        _refuse_other_weights(block, f"Block {index} of this {type(model).__name__}")
    return blocks


def _refuse_other_weights(block: nn.Module, name_of_block: str) -> None:
    """To prune some of a block's weights, pass over others and call the model pruned would be a lie.

    Fused experts are parameters of three dimensions in most architectures, matrices in some (DBRX). Small matrices
    are let pass: the scales of a norm that has its own for every attention head (Cohere).
    """
    prunable = {id(p): p.numel() for layer in linear_layers(block).values() for p in layer.parameters() if p.ndim == 2}
    for name, parameter in block.named_parameters():
        large = parameter.ndim == 2 and parameter.numel() >= min(prunable.values(), default=0)
        if parameter.ndim > 2 or (large and id(parameter) not in prunable):
            raise BadInput(
                f"{name_of_block} holds '{name}' of shape {tuple(parameter.shape)}, which belongs to no linear layer, "
                "as in mixture-of-experts and convolutional models, so that lit-prune cannot prune it; "
                "choose a dense model."
            )
    if any(getattr(module, "is_kv_shared_layer", False) for module in block.modules()):
        raise BadInput(
            f"{name_of_block} uses the keys and values of an earlier block, so that lit-prune cannot prune block by "
            "block; choose another model."
        )


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """The prunable layers of a block by name: every `nn.Linear`, and GPT-2's transposed `Conv1D`."""
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def oriented(layer: nn.Module, tensor: Tensor) -> Tensor:
    """Turn between the stored shape of a layer's weight and (out, in): a view, transposed for `Conv1D` alone."""
    return tensor.T if isinstance(layer, Conv1D) else tensor


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a prunable layer as a view of shape (out, in), outside of autograd."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return oriented(layer, weight.detach())


@dataclass(frozen=True)
class BlockCall:
    """A block's own call arguments besides the hidden states: rotary embeddings, causal mask, position ids, flags.

    They depend on the sequence length and, where sliding and full attention alternate, on the block, but neither
    on the tokens nor on the batch size: tensors have a leading dimension of 1 and broadcast.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor, compiled: bool = False) -> Tensor:
        """The block's output hidden states for `hidden`, both (batch, sequence, width), all on one device.

        Args:
            block: the block.
            hidden: what enters it.
            compiled: whether by `torch.compile`.
        """
        through = _compiled() if compiled else _through
        return through(block, hidden, self.args, dict(self.kwargs))

    def to(self, device: torch.device) -> "BlockCall":
        """The same arguments on a device; itself if they are there already."""
        if all(leaf.device == device for leaf in self._tensors):
            return self
        args, kwargs = tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, self._arguments)
        return BlockCall(args, kwargs)

    @property
    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self.args, dict(self.kwargs)

    @property
    def _tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_flatten(self._arguments)[0] if isinstance(leaf, Tensor)]


def _through(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    output = block(hidden, *args, **kwargs)
    if isinstance(output, Tensor):
        return output
    first: Tensor = output[0]
    return first


@cache
def _compiled() -> Callable[..., Tensor]:
    """The pass through any block, which is compiled for the first and serves all that are like it.

    The block is an argument, so that PyTorch takes its weights for inputs, and itself makes sure of what else in it the
    compiled code relies on.
    """
    return torch.compile(_through)


class _Arrived(Exception):
    """Thrown out of a forward pass once what was looked for is known."""


@torch.no_grad()
def capture_calls(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor) -> list[BlockCall]:
    """Capture every block's own call arguments.

    Only block 0 is computed; the others hand its input on, so that this costs next to nothing. A second pass, over
    two different sequences, shows whether the arguments are the same for all.

    Args:
        model: the model that holds the blocks.
        blocks: its blocks.
        tokens: at least one sequence of the length to be used, shape (samples, sequence).

    Raises:
        BadInput: the arguments depend on the tokens, or on the batch size in a way that does not broadcast.
    """
    first = tokens[:1]
    one, two = (_calls(model, blocks, sequences) for sequences in (first, torch.cat([first, first.flip(1)])))
    for index, (call, pair) in enumerate(zip(one, two, strict=True)):
        for a, b in zip(call._tensors, pair._tensors, strict=True):
            broadcasts = a.shape[1:] == b.shape[1:] and a.shape[:1] in ((1,), b.shape[:1])
            if not (broadcasts and torch.equal(a.expand_as(b), b)):
                raise BadInput(
                    f"Block {index} of this {type(model).__name__} takes an argument of shape {tuple(a.shape)} for "
                    f"one sequence and {tuple(b.shape)} for two that is not the same for all sequences, so that "
                    "lit-prune cannot call the block by itself; choose another model."
                )
    return one


def _calls(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor) -> list[BlockCall]:
    calls: dict[int, BlockCall] = {}
    returns_more = False

    def passing_through(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def note(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal returns_more
            calls[index] = BlockCall(args, kwargs)
            if index == 0:  # the only way to know what a block of this architecture returns
                returns_more = not isinstance(forward(hidden_states, *args, **kwargs), Tensor)
            if len(calls) == len(blocks):
                raise _Arrived  # the logits of all these tokens would be the dearest thing here
            return (hidden_states,) if returns_more else hidden_states

        return note

    with patched_forward(blocks, passing_through), suppress(_Arrived):
        model(input_ids=tokens, use_cache=False)
    return [calls[index] for index in range(len(blocks))]


@contextmanager
def patched_forward(
    modules: Iterable[nn.Module], patch: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Let every module compute `patch(index, its forward)` inside the context."""
    patched = list(modules)
    for index, module in enumerate(patched):
        module.forward = patch(index, module.forward)
    try:
        yield
    finally:
        for module in patched:
            del module.forward  # the instance's attribute; the class's method shows again


@torch.no_grad()
def entering(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What enters a module first when `run` is called, which goes no further than that."""
    inputs: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.append(next(leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)))
        raise _Arrived

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(_Arrived):
            run()
    finally:
        handle.remove()
    return inputs[0]


def embed(model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
    """The hidden states that enter the first block, (samples, sequence, width), for tokens (samples, sequence)."""
    return entering(blocks[0], lambda: model(input_ids=tokens, use_cache=False))


@contextmanager
def left_out(layer: nn.Module) -> Iterator[None]:
    """Let a linear layer put out zeros inside the context, which takes no time: where nobody needs what it makes."""
    features = len(weight_of(layer))
    with patched_forward([layer], lambda _, __: lambda inputs: inputs.new_zeros(*inputs.shape[:-1], features)):
        yield


@contextmanager
def watch_inputs(layers: Mapping[str, nn.Module], watch: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `watch(name, input)` whenever one of the layers runs inside the context."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, args: watch(name, args[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def returns_tuple(block: nn.Module, call: BlockCall, hidden: Tensor) -> bool:
    """Whether a block of this architecture gives its hidden states out in a tuple; all on one device."""
    return not isinstance(block(hidden, *call.args, **call.kwargs), Tensor)


def head(model: PreTrainedModel, blocks: nn.ModuleList, hidden: Tensor, tokens: Tensor, in_tuple: bool) -> Tensor:
    """The logits, (samples, sequence, vocabulary), of hidden states that leave the last block.

    Whatever an architecture does after its blocks (norms, projections, soft caps), it does itself: the model runs with
    its blocks bypassed.

    Args:
        model: the model.
        blocks: its blocks.
        hidden: shape (samples, sequence, width).
        tokens: shape (samples, sequence); they do not matter, but no model runs without.
        in_tuple: whether a block of this model returns a tuple.
    """

    def instead(_: int, __: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (hidden,) if in_tuple else hidden

    with patched_forward(blocks, instead):
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits
