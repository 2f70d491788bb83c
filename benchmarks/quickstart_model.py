"""The quickstart's model and texts, for the measurements of this folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.data import CalibrationText, EvaluationText
from lit_prune.models import BlockCall, Home, capture_calls, embed, find_blocks, load_model, load_tokenizer, resolve
from lit_prune.modules import perplexity

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"


@dataclass
class Quickstart:
    """The dense model, and what a measurement needs of it."""

    model: PreTrainedModel
    blocks: nn.ModuleList
    calls: list[BlockCall]
    tokens: Tensor
    hidden: Tensor
    samples: int
    evaluation: EvaluationText

    @property
    def perplexity(self) -> float:
        """As in the quickstart."""
        (figure,) = perplexity(Home(self.model, self.blocks), self.evaluation, torch.device("cpu")).values()
        return figure


def load(samples: int = 32, held_out: int = 0, seed: int = 0) -> Quickstart:
    """Load the dense model and draw calibration sequences of 256 tokens, the held-out ones last."""
    transformers.utils.logging.disable_progress_bar()
    settings: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    path = resolve(settings["model"]["checkpoint"])
    data = CalibrationText(
        **settings["data"] | {"samples": samples, "validation_samples": held_out, "batch_size": 8, "seed": seed}
    )
    evaluation = EvaluationText(**settings["evaluation"])
    data.tokenizer = evaluation.tokenizer = load_tokenizer(path)
    data.setup()
    evaluation.setup()
    model = load_model(path)
    blocks = find_blocks(model)
    with torch.no_grad():
        calls, hidden = capture_calls(model, blocks, data.tokens), embed(model, blocks, data.tokens)
    return Quickstart(model, blocks, calls, data.tokens, hidden, samples, evaluation)
