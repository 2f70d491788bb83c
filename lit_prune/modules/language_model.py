"""A whole causal language model: its perplexity."""

import math

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from lit_prune.data import EvaluationText
from lit_prune.models import Home, capture_calls, embed, head, returns_tuple


class LanguageModel(L.LightningModule):
    """A causal language model whose test step measures perplexity.

    Perplexity is the exponential of the mean negative log likelihood of all tokens of a window but its first, each
    window by itself. The mean runs over log likelihoods (torchmetrics' `MeanMetric`): its `Perplexity` takes the
    logarithm of a softmax, which is minus infinity for a token that a badly pruned model finds impossible.

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

    def test_step(self, batch: tuple[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add windows of tokens, shape (batch, window)."""
        (tokens,) = batch
        self.add(self.model(input_ids=tokens, use_cache=False).logits, tokens, dataloader_idx)

    def add(self, logits: Tensor, tokens: Tensor, index: int) -> None:
        """Count windows.

        Args:
            logits: shape (batch, window, vocabulary).
            tokens: shape (batch, window).
            index: of the text.
        """
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        metric = self.losses[index]
        assert isinstance(metric, MeanMetric)
        metric.update(loss)

    @property
    def perplexity(self) -> dict[str, float]:
        """By name, after `trainer.test`."""
        means = (metric.compute() for metric in self.losses if isinstance(metric, MeanMetric))
        return {name: float(mean.cpu().double().exp()) for name, mean in zip(self.names, means, strict=True)}


@torch.no_grad()
def blockwise_perplexity(home: Home, evaluation: EvaluationText, trainer: L.Trainer) -> dict[str, float]:
    """The same perplexity, of a model of which one block at a time is in memory.

    Args:
        home: the model.
        evaluation: the texts.
        trainer: says on which device and in which precision.

    Returns:
        By the text's name.
    """
    device, in_precision = trainer.strategy.root_device, trainer.strategy.precision_plugin.test_step_context
    module = LanguageModel(home.model, evaluation.names)
    batches = [(text, tokens) for text, loader in enumerate(evaluation.test_dataloader()) for (tokens,) in loader]
    with home.outside(device), home.on(0, device) as first, in_precision():
        calls = capture_calls(home.model, home.blocks, batches[0][1].to(device))
        hidden = [embed(home.model, home.blocks, tokens.to(device)).cpu() for _, tokens in batches]
        in_tuple = returns_tuple(first, calls[0], hidden[0].to(device))
    for index, call in enumerate(calls):
        with home.on(index, device) as block, in_precision():
            for number, states in enumerate(hidden):
                hidden[number] = call(block, states.to(device)).cpu()
    with home.outside(device), in_precision():
        for (text, tokens), states in zip(batches, hidden, strict=True):
            there = tokens.to(device)
            module.add(head(home.model, home.blocks, states.to(device), there, in_tuple), there, text)
    return module.perplexity
