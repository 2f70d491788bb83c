"""A whole causal language model: its perplexity."""

import math

import lightning as L
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel


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
        logits = self.model(input_ids=tokens, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        metric = self.losses[dataloader_idx]
        assert isinstance(metric, MeanMetric)
        metric.update(loss)

    @property
    def perplexity(self) -> dict[str, float]:
        """By name, after `trainer.test`."""
        means = (metric.compute() for metric in self.losses if isinstance(metric, MeanMetric))
        return {name: float(mean.cpu().double().exp()) for name, mean in zip(self.names, means, strict=True)}
