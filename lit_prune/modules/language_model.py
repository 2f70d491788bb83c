"""What causal language models predict, and their perplexity."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from lit_prune import ranks
from lit_prune.data import EvaluationText
from lit_prune.models import Home, Offloaded, capture_calls, embed, head, returns_tuple


class Mean:
    """The mean of what is counted; a NaN among it shows, and nothing is too large for the sum, which is in float64."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, values: Tensor) -> None:
        """Count some."""
        self._sum += float(values.sum(dtype=torch.float64))
        self._count += values.numel()

    def of_all(self, device: torch.device) -> Tensor:
        """Over all ranks, which talk on a device; float64, without dimensions, on the CPU."""
        found = torch.tensor([self._sum, self._count], dtype=torch.float64, device=device)
        summed, count = ranks.total(found).cpu().unbind()
        return summed / count


@torch.no_grad()
def predictions(
    homes: Sequence[Home], evaluation: EvaluationText, device: torch.device, silent: bool = True
) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
    """What models predict of this rank's windows, each by itself.

    On the CPU a model in memory takes one batch after the other. Everywhere else all batches pass through one block
    after the other, so that one block at a time is on the device, or in memory; hidden states wait on the host.

    Args:
        homes: the models; left in their mode.
        evaluation: the texts.
        device: where models compute.
        silent: whether there is no progress bar.

    Yields:
        The name of a window's text; its tokens that count, shape (counted,): all but its first, or from a later one on
        where windows overlap; and each model's logits for them, shape (counted, vocabulary).
    """
    named = zip(evaluation.names, evaluation.test_dataloader(), strict=True)
    batches = [(name, *batch) for name, loader in named for batch in loader]
    tokens = [tokens for _, tokens, _ in batches]
    made = [_logits(home, tokens, device, silent) for home in homes]
    for (name, windows, firsts), *logits in zip(batches, *made, strict=True):
        for row, first in enumerate(firsts.tolist()):
            counted = windows[row, first:].to(device)
            yield name, counted, [of_one[row, first - 1 : -1].float() for of_one in logits]


def _logits(home: Home, batches: Sequence[Tensor], device: torch.device, silent: bool) -> Iterator[Tensor]:
    """Of tokens, shape (batch, window) each: (batch, window, vocabulary)."""
    if device.type == "cpu" and not isinstance(home, Offloaded):
        for tokens in tqdm(batches, unit="batch", disable=silent, dynamic_ncols=True):
            yield home.model(input_ids=tokens, use_cache=False).logits
    elif batches:
        hidden, in_tuple = _leaving(home, batches, device, silent)
        with home.outside(device):
            for states, tokens in zip(hidden, batches, strict=True):
                yield head(home.model, home.blocks, states.to(device), tokens.to(device), in_tuple)


def _leaving(home: Home, batches: Sequence[Tensor], device: torch.device, silent: bool) -> tuple[list[Tensor], bool]:
    """The hidden states of every batch as they leave the last block, on the host; whether blocks return tuples."""
    with home.outside(device), home.on(0, device) as first:
        calls = capture_calls(home.model, home.blocks, batches[0].to(device))
        hidden = [embed(home.model, home.blocks, tokens.to(device)).cpu() for tokens in batches]
        in_tuple = returns_tuple(first, calls[0], hidden[0].to(device))
    for index, call in enumerate(tqdm(calls, desc="block by block", unit="block", disable=silent, dynamic_ncols=True)):
        with home.on(index, device) as block:
            for number, states in enumerate(hidden):
                hidden[number] = call(block, states.to(device)).cpu()
    return hidden, in_tuple


def perplexity(home: Home, evaluation: EvaluationText, device: torch.device, silent: bool = True) -> dict[str, float]:
    """A model's perplexity by the text's name: exp of the mean negative log likelihood over all windows.

    Args:
        home: the model.
        evaluation: the texts.
        device: where it computes, on this rank.
        silent: whether there is no progress bar.
    """
    means = {name: Mean() for name in evaluation.names}
    for name, tokens, (logits,) in predictions([home], evaluation, device, silent):
        # the logarithm of a softmax would be minus infinity for a token that a badly pruned model finds impossible
        means[name].add(F.cross_entropy(logits, tokens, reduction="none"))
    return {name: float(mean.of_all(device).exp()) for name, mean in means.items()}
