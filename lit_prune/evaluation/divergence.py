"""How far a pruned model's predictions are from the dense model's."""

import math

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from lit_prune.data import EvaluationText
from lit_prune.models import Home, Offloaded
from lit_prune.modules import LanguageModel, blockwise_logits, counts


class Comparison(L.LightningModule):
    """A dense model and a pruned one on the same windows: the perplexity of both, and their divergence.

    The divergence is that of the next-token distributions, p of the dense and q of the pruned model, over the very
    predictions that perplexity counts: the mean of KL(p || q) in nats, and the share for which both find the same
    token likeliest.

    Args:
        dense: the dense model; left in its mode.
        pruned: the pruned model, of the same vocabulary; left in its mode.
        names: a name for each test data loader.
    """

    def __init__(self, dense: PreTrainedModel, pruned: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.dense, self.pruned = LanguageModel(dense, names), LanguageModel(pruned, names)
        # a NaN has to show, not to be left out of the mean
        self.kl, self.agreement = (nn.ModuleList(MeanMetric(nan_strategy=math.nan) for _ in names) for _ in range(2))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add windows of tokens, shape (batch, window), and the first of each that counts, shape (batch,)."""
        dense, pruned = (m.model(input_ids=batch[0], use_cache=False).logits for m in (self.dense, self.pruned))
        self.add(dense, pruned, *batch, dataloader_idx)

    def add(self, dense: Tensor, pruned: Tensor, tokens: Tensor, first: Tensor, index: int) -> None:
        """Count windows.

        Args:
            dense: the dense model's logits, shape (batch, window, vocabulary).
            pruned: the pruned model's.
            tokens: shape (batch, window).
            first: the first token of each window whose prediction counts, shape (batch,).
            index: of the text.
        """
        self.dense.add(dense, tokens, first, index)
        self.pruned.add(pruned, tokens, first, index)
        kl, agreement = self.kl[index], self.agreement[index]
        assert isinstance(kl, MeanMetric)
        assert isinstance(agreement, MeanMetric)
        # a window at a time: distributions over a large vocabulary take more memory than anything else here
        for p, q, counted in zip(dense[:, :-1], pruned[:, :-1], counts(tokens, first), strict=True):
            log_p, log_q = (F.log_softmax(logits[counted].float(), dim=-1) for logits in (p, q))
            kl.update(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
            agreement.update((log_p.argmax(-1) == log_q.argmax(-1)).float())

    @property
    def divergence(self) -> dict[str, dict[str, float]]:
        """`kl` in nats and `top1_agreement` as a share, by the text's name, after `trainer.test`."""
        return {
            name: {"kl": _mean(kl), "top1_agreement": _mean(agreement)}
            for name, kl, agreement in zip(self.names, self.kl, self.agreement, strict=True)
        }


def _mean(metric: nn.Module) -> float:
    assert isinstance(metric, MeanMetric)
    return float(metric.compute())


@torch.no_grad()
def compare(dense: Home, pruned: Home, evaluation: EvaluationText, trainer: L.Trainer) -> Comparison:
    """Compare two models; where one of them stays on disk, both go block by block.

    Args:
        dense: the dense model.
        pruned: the pruned model.
        evaluation: the texts.
        trainer: says on which device and in which precision.
    """
    module = Comparison(dense.model, pruned.model, evaluation.names)
    if not isinstance(dense, Offloaded) and not isinstance(pruned, Offloaded):
        trainer.test(module, evaluation.test_dataloader(), verbose=False)
        return module
    device, in_precision = trainer.strategy.root_device, trainer.strategy.precision_plugin.test_step_context
    batches = [(text, batch) for text, loader in enumerate(evaluation.test_dataloader()) for batch in loader]
    ps, qs = (blockwise_logits(home, [tokens for _, (tokens, _) in batches], trainer) for home in (dense, pruned))
    for metrics in (module.kl, module.agreement, module.dense.losses, module.pruned.losses):
        metrics.to(device)
    with dense.outside(device), pruned.outside(device), in_precision():
        for (text, batch), p, q in zip(batches, ps, qs, strict=True):
            tokens, first = (tensor.to(device) for tensor in batch)
            module.add(p(), q(), tokens, first, text)
    return module
