"""Gradients of every weight for every calibration sample: of the whole model's loss, or of one on a block's output.

What autograd would sum over a batch is needed for each sample. So weights take no part in autograd: hooks on the
linear layers hand what enters, and the gradient of what leaves, to a `GradientNorm`, which multiplies them sample by
sample. All losses are sums over samples, which leaves the gradients of each untouched by the others in its batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune import ranks
from lit_prune.atomic import built_whole
from lit_prune.data.share import BATCH, alone
from lit_prune.data.streams import Forward, outputs, sound
from lit_prune.errors import BadInput
from lit_prune.masks import GradientNorm
from lit_prune.models import BlockCall, Home, embed, head, linear_layers, on_device, returns_tuple, tensors_of

HIDDEN = "hidden"
"""The name of the hidden states in a stored file."""


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters need no gradients inside the context; after it they do what they did before."""
    flags = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in flags:
            parameter.requires_grad_(needed)


@contextmanager
def watch_gradients(layers: Mapping[str, nn.Module], norms: Mapping[str, GradientNorm], samples: int) -> Iterator[None]:
    """Let `norms` take in every layer's gradients whenever a backward pass reaches it.

    The layers' own weights need no gradients inside the context; the hidden states that enter them have to. A layer
    that runs without gradients is passed over.

    Args:
        layers: the linear layers by name.
        norms: by the same names.
        samples: of the batch that is passed through inside the context. The layers may see its tokens as
            (samples, tokens, features) or all in one row, as those of OPT's MLP do.
    """

    def hook(norm: GradientNorm) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def by_sample(tensor: Tensor) -> Tensor:
            return tensor.reshape(samples, -1, tensor.shape[-1])

        def watch(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                # autograd itself keeps no input of a layer whose weight needs no gradient
                inputs = args[0].detach()
                output.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: norm.add(by_sample(inputs), by_sample(gradient))
                )

        return watch

    with ExitStack() as stack:
        stack.enter_context(frozen(parameter for layer in layers.values() for parameter in layer.parameters()))
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(hook(norms[name])).remove)
        yield


def regional_gradients(
    forward: Forward,
    layers: Mapping[str, nn.Module],
    hidden: Tensor,
    p: int = 2,
    device: torch.device | None = None,
    batch_size: int = BATCH,
) -> dict[str, GradientNorm]:
    """The gradients of a block's output norm: of ‖f(x)‖₂ over all tokens and features, for each sample x.

    Args:
        forward: the block, from hidden states to hidden states, both (batch, sequence, width).
        layers: its linear layers by name.
        hidden: the stream that enters it, shape (samples, sequence, width); left as it is.
        p: of the norm over samples, 1 or 2.
        device: where the block lies; None for where the stream lies.
        batch_size: samples in one pass.

    Returns:
        By layer name.
    """

    def loss(entering: Tensor, _: slice) -> Tensor:
        output_norms: Tensor = torch.linalg.vector_norm(forward(entering).float().flatten(1), dim=1)
        return output_norms.sum()

    norms = {name: GradientNorm(p) for name in layers}
    for _ in _backward(loss, hidden, layers, norms, device or hidden.device, batch_size):
        pass
    return norms


def whole_model_gradients(
    model: PreTrainedModel, blocks: nn.ModuleList, tokens: Tensor, p: int, batch_size: int, device: torch.device
) -> list[dict[str, GradientNorm]]:
    """The gradients of the language model's loss, by one pass forward and one backward through the whole model.

    The loss of a sample is the mean cross entropy of its predicted tokens, all but the first.

    Args:
        model: the dense model; left in its mode.
        blocks: its blocks.
        tokens: shape (samples, sequence).
        p: of the norm over samples, 1 or 2.
        batch_size: samples in one pass.
        device: where to compute; the model is brought there and back.

    Returns:
        For every block, by layer name.
    """
    layers = [linear_layers(block) for block in blocks]
    norms = [{name: GradientNorm(p) for name in named} for named in layers]
    with on_device(tensors_of(model), device), frozen(model.parameters()), torch.enable_grad():
        for batch in torch.split(tokens, batch_size):
            with ExitStack() as stack:
                for named, their_norms in zip(layers, norms, strict=True):
                    stack.enter_context(watch_gradients(named, their_norms, len(batch)))
                entering = stack.enter_context(_graph_begins_at(blocks[0]))
                there = batch.to(device)
                # nothing is named that would keep one batch's graph until the next has built its own
                torch.autograd.grad(
                    _language_model_loss(model(input_ids=there, use_cache=False).logits, there), entering
                )
    return norms


def blockwise_gradients(
    home: Home,
    calls: Sequence[BlockCall],
    tokens: Tensor,
    p: int,
    batch_size: int,
    device: torch.device,
    folder: Path,
) -> Iterator[tuple[int, dict[str, GradientNorm]]]:
    """The same as `whole_model_gradients`, block by block.

    Each block's input is stored on the way forward. On the way backward each block is computed anew from it, so that
    one block's activations and two streams of shape (samples, sequence, width) are all that memory holds.

    Args:
        home: the dense model, of which a block at a time is asked for.
        calls: each block's own call arguments.
        tokens: shape (samples, sequence).
        p: of the norm over samples, 1 or 2.
        batch_size: samples in one pass.
        device: where to compute.
        folder: where one stream for each block is stored, as `000.safetensors` and so on, until it has been used.

    Yields:
        Index and gradients by layer name for every block, the last block first.
    """
    files = [folder / f"{index:03d}.safetensors" for index in range(len(calls))]
    try:
        stream = _store_inputs(home, calls, tokens, batch_size, device, files)
        _replace_by_head_gradient(home, calls[-1], tokens, stream, batch_size, device)
        for index in reversed(range(len(calls))):
            inputs = load_file(files[index])[HIDDEN]
            with home.on(index, device) as block:
                norms = _replace_by_gradient(block, calls[index], inputs, stream, p, batch_size, device)
            del inputs
            files[index].unlink()
            yield index, norms
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def _store_inputs(
    home: Home,
    calls: Sequence[BlockCall],
    tokens: Tensor,
    batch_size: int,
    device: torch.device,
    files: Sequence[Path],
) -> Tensor:
    """Walk through all blocks, store what enters each, and return what leaves the last."""
    with home.outside(device):
        batches = (batch.to(device) for batch in torch.split(tokens, batch_size))
        stream = torch.cat([embed(home.model, home.blocks, batch).to(tokens.device) for batch in batches])
    for index, (call, file) in enumerate(zip(calls, files, strict=True)):
        with built_whole(file) as draft:
            save_file({HIDDEN: stream}, draft)
        with sound(f"block_{index:02d}", alone(len(stream))), home.on(index, device) as block:
            for rows, output in outputs(_forward(block, call, device), stream, device, batch_size):
                stream[rows] = output
    return stream


def _replace_by_head_gradient(
    home: Home,
    last_call: BlockCall,
    tokens: Tensor,
    stream: Tensor,
    batch_size: int,
    device: torch.device,
) -> None:
    """Put the loss's gradient with respect to what leaves the last block in the place of what leaves it."""
    with home.on(len(home.blocks) - 1, device) as last:
        in_tuple = returns_tuple(last, last_call.to(device), stream[:1].to(device))

    def loss(leaving: Tensor, rows: slice) -> Tensor:
        there = tokens[rows].to(device)
        return _language_model_loss(head(home.model, home.blocks, leaving, there, in_tuple), there)

    with home.outside(device), frozen(home.model.parameters()):
        for rows, gradient in _backward(loss, stream, {}, {}, device, batch_size):
            stream[rows] = gradient


def _replace_by_gradient(
    block: nn.Module,
    call: BlockCall,
    inputs: Tensor,
    stream: Tensor,
    p: int,
    batch_size: int,
    device: torch.device,
) -> dict[str, GradientNorm]:
    """Lead the stream of gradients back through one block, in place; what its layers see of it is returned."""
    forward = _forward(block, call, device)

    def loss(entering: Tensor, rows: slice) -> Tensor:
        # with respect to the block's output, its gradient is the stream's
        return (forward(entering) * stream[rows].to(device)).sum()

    layers = linear_layers(block)
    norms = {name: GradientNorm(p) for name in layers}
    with frozen(block.parameters()):
        for rows, gradient in _backward(loss, inputs, layers, norms, device, batch_size):
            stream[rows] = gradient
    return norms


def _backward(
    loss: Callable[[Tensor, slice], Tensor],
    hidden: Tensor,
    layers: Mapping[str, nn.Module],
    norms: Mapping[str, GradientNorm],
    device: torch.device,
    batch_size: int,
) -> Iterator[tuple[slice, Tensor]]:
    """Forward and backward, batch by batch.

    Yields:
        Which samples, and the gradient of their `loss(hidden states, samples)` by the hidden states, on `device`.
    """
    for start in range(0, len(hidden), batch_size):
        rows = slice(start, start + batch_size)
        entering = hidden[rows].to(device).detach().requires_grad_()
        with torch.enable_grad(), watch_gradients(layers, norms, len(entering)):
            # not backward(), which would leave gradients on parameters that take part in autograd
            (gradient,) = torch.autograd.grad(loss(entering, rows), entering)
        yield rows, gradient


def _forward(block: nn.Module, call: BlockCall, device: torch.device) -> Forward:
    there = call.to(device)
    return lambda hidden: there(block, hidden)


def _language_model_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The sum over samples of the mean cross entropy of a sample's predicted tokens.

    Args:
        logits: shape (samples, sequence, vocabulary).
        tokens: shape (samples, sequence).
    """
    predictions, targets = logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()
    return F.cross_entropy(predictions, targets, reduction="sum") / (tokens.shape[1] - 1)


@contextmanager
def _graph_begins_at(block: nn.Module) -> Iterator[list[Tensor]]:
    """Let autograd follow hidden states from where they enter a block, whatever came before.

    Yields:
        What has entered, one tensor for each forward pass.
    """
    entered: list[Tensor] = []

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        entered.append(hidden.detach().requires_grad_())
        return ((entered[-1], *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": entered[-1]})

    handle = block.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield entered
    finally:
        handle.remove()


def save_gradients(path: Path, norms: Mapping[str, GradientNorm]) -> None:
    """Write the gradients of one block's layers as safetensors, whole or not at all, those of other ranks included.

    Raises:
        RuntimeError: no sample has reached a layer.
    """
    tensors, metadata = {}, {}
    for name, norm in norms.items():
        if norm.total is None:
            raise RuntimeError(f"no gradient has reached {name}")
        norm.join()
        tensors[name] = norm.total.float().contiguous()
        metadata[name] = str(norm.samples)
    if ranks.rank() == 0:
        with built_whole(path) as draft:
            save_file(tensors, draft, metadata)
    ranks.wait()


def load_gradients(path: Path, p: int) -> dict[str, GradientNorm]:
    """Read what `save_gradients` has written, on the CPU.

    Raises:
        BadInput: it was damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            samples = {name: int(text) for name, text in file.metadata().items()}
            return {name: GradientNorm(p, file.get_tensor(name), count) for name, count in samples.items()}
    except (OSError, SafetensorError) as error:
        raise BadInput(
            f"output_dir: '{path}' was damaged ({error}); remove its folder, and the same command goes on."
        ) from error
