"""A whole causal language model: its perplexity."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from tqdm import tqdm
from transformers import PreTrainedModel

from lit_prune.data import EvaluationText
from lit_prune.models import Home, Offloaded, capture_calls, embed, head, returns_tuple


class LanguageModel(L.LightningModule):
    """A causal language model whose test step measures perplexity.

    Perplexity is the exponential of the mean negative log likelihood of all tokens of a window but its first, or from
    a later one on where windows overlap, each window by itself. The mean runs over log likelihoods (torchmetrics'
    `MeanMetric`): its `Perplexity` takes the logarithm of a softmax, which is minus infinity for a token that a badly
    pruned model finds impossible.

    Args:
        model: the model; left in its mode.
        names: a name for each test data loader, for the logged `perplexity/NAME`.
    """

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        # a NaN has to show, not to be left out of the mean
        self.losses = nn.ModuleList(MeanMetric(nan_strategy=math.nan) for _ in names)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add windows of tokens, shape (batch, window), and the first of each that counts, shape (batch,)."""
        self.add(self.model(input_ids=batch[0], use_cache=False).logits, *batch, dataloader_idx)

    def add(self, logits: Tensor, tokens: Tensor, first: Tensor, index: int) -> None:
        """Count windows.

        Args:
            logits: shape (batch, window, vocabulary).
            tokens: shape (batch, window).
            first: the first token of each window whose likelihood counts, shape (batch,).
            index: of the text.
        """
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        metric = self.losses[index]
        assert isinstance(metric, MeanMetric)
        metric.update(loss[counts(tokens, first).flatten()])

    @property
    def perplexity(self) -> dict[str, float]:
        """By name, after `trainer.test`."""
        means = (metric.compute() for metric in self.losses if isinstance(metric, MeanMetric))
        return {name: float(mean.cpu().double().exp()) for name, mean in zip(self.names, means, strict=True)}


def counts(tokens: Tensor, first: Tensor) -> Tensor:
    """Which predictions count: of tokens 1 to the last, those from each window's `first` on; (batch, window - 1)."""
    return torch.arange(1, tokens.shape[1], device=tokens.device) >= first[:, None]


@torch.no_grad()
def perplexity(home: Home, evaluation: EvaluationText, trainer: L.Trainer) -> dict[str, float]:
    """A model's perplexity; one that stays on disk goes block by block.

    Args:
        home: the model.
        evaluation: the texts.
        trainer: says on which device and in which precision.

    Returns:
        By the text's name.
    """
    module = LanguageModel(home.model, evaluation.names)
    if not isinstance(home, Offloaded):
        trainer.test(module, evaluation.test_dataloader(), verbose=False)
        return module.perplexity
    device, in_precision = trainer.strategy.root_device, trainer.strategy.precision_plugin.test_step_context
    batches = [(text, batch) for text, loader in enumerate(evaluation.test_dataloader()) for batch in loader]
    logits = blockwise_logits(home, [tokens for _, (tokens, _) in batches], trainer)
    module.losses.to(device)
    with home.outside(device), in_precision():
        for (text, batch), make in zip(batches, logits, strict=True):
            tokens, first = (tensor.to(device) for tensor in batch)
            module.add(make(), tokens, first, text)
    return module.perplexity


@torch.no_grad()
def blockwise_logits(home: Home, batches: Sequence[Tensor], trainer: L.Trainer) -> list[Callable[[], Tensor]]:
    """Lead all batches through the blocks, of which one at a time is in memory.

    Args:
        home: the model.
        batches: tokens of one length, shape (batch, window) each.
        trainer: says on which device and in which precision.

    Returns:
        For every batch, what makes its logits there, shape (batch, window, vocabulary): inside of
        `home.outside(device)`, and in the precision.
    """
    device, in_precision = trainer.strategy.root_device, trainer.strategy.precision_plugin.test_step_context
    with home.outside(device), home.on(0, device) as first, in_precision():
        calls = capture_calls(home.model, home.blocks, batches[0].to(device))
        hidden = [embed(home.model, home.blocks, tokens.to(device)).cpu() for tokens in batches]
        in_tuple = returns_tuple(first, calls[0], hidden[0].to(device))
    silent = trainer.progress_bar_callback is None
    for index, call in enumerate(tqdm(calls, desc="block by block", unit="block", disable=silent, dynamic_ncols=True)):
        with home.on(index, device) as block, in_precision():
            for number, states in enumerate(hidden):
                hidden[number] = call(block, states.to(device)).cpu()

    def logits(states: Tensor, tokens: Tensor) -> Tensor:
        return head(home.model, home.blocks, states.to(device), tokens.to(device), in_tuple)

    return [partial(logits, states, tokens) for states, tokens in zip(hidden, batches, strict=True)]
