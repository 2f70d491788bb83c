"""How far a pruned model's predictions are from the dense model's."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_prune.data import EvaluationText
from lit_prune.models import Home
from lit_prune.modules import Mean, predictions


class Comparison(NamedTuple):
    """A dense model and a pruned one on the same windows of a text.

    Attributes:
        dense: the dense model's perplexity.
        pruned: the pruned model's.
        kl: the mean of KL(p || q) in nats, of the next-token distributions p of the dense and q of the pruned model.
        top1_agreement: the share of predictions for which both find the same token likeliest.
    """

    dense: float
    pruned: float
    kl: float
    top1_agreement: float


def compare(
    dense: Home, pruned: Home, evaluation: EvaluationText, device: torch.device, silent: bool = True
) -> dict[str, Comparison]:
    """Compare two models of one vocabulary, by the text's name, over the very predictions that perplexity counts.

    Args:
        dense: the dense model.
        pruned: the pruned model.
        evaluation: the texts.
        device: where they compute, on this rank.
        silent: whether there is no progress bar.
    """
    means = {name: {figure: Mean() for figure in Comparison._fields} for name in evaluation.names}
    for name, tokens, both in predictions([dense, pruned], evaluation, device, silent):
        log_p, log_q = (F.log_softmax(logits, dim=-1) for logits in both)
        found = {
            "dense": F.nll_loss(log_p, tokens, reduction="none"),
            "pruned": F.nll_loss(log_q, tokens, reduction="none"),
            "kl": F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
            "top1_agreement": (log_p.argmax(-1) == log_q.argmax(-1)).float(),
        }
        for figure, values in found.items():
            means[name][figure].add(values)
    return {name: _compared(**{k: mean.of_all(device) for k, mean in of.items()}) for name, of in means.items()}


def _compared(dense: Tensor, pruned: Tensor, kl: Tensor, top1_agreement: Tensor) -> Comparison:
    return Comparison(float(dense.exp()), float(pruned.exp()), float(kl), float(top1_agreement))
