"""What all tools share: the model, the calibration tokens, and the one way in which every result is measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from lit_prune.atomic import built_whole
from lit_prune.data import CalibrationText, EvaluationText
from lit_prune.models import Home, find_blocks, linear_layers, load_model, load_tokenizer, resolve, weight_of
from lit_prune.modules import perplexity


@dataclass(frozen=True)
class Ground:
    """Model and texts of a configuration.

    Attributes:
        config: the configuration's file, such as the quickstart's.
        folder: where tokens and shortened models are kept.
    """

    config: Path
    folder: Path

    @property
    def settings(self) -> dict[str, Any]:
        """Of the configuration."""
        settings: dict[str, Any] = yaml.safe_load(self.config.read_text())
        return settings

    def model(self, blocks: int = 0) -> Path:
        """The dense model's folder; cut to its first blocks if a number is given.

        Raises:
            ValueError: it has not so many.
        """
        dense = Path(resolve(self.settings["model"]["checkpoint"]))
        if not blocks:
            return dense
        cut = self.folder / f"{blocks}blocks"
        if not cut.exists():
            model = load_model(str(dense))
            body = model.get_decoder()
            if len(body.layers) < blocks:
                raise ValueError(f"the model has only {len(body.layers)} blocks, not {blocks}")
            body.layers = body.layers[:blocks]
            model.config.num_hidden_layers = blocks
            with built_whole(cut) as draft:
                model.save_pretrained(draft)
                load_tokenizer(str(dense)).save_pretrained(draft)
        return cut

    def tokens(self, samples: int, length: int, draw: int) -> Path:
        """A file of calibration sequences as lit-prune draws them, `tokens` of shape (samples, length)."""
        file = self.folder / f"tokens-{samples}x{length}-{draw}.safetensors"
        if not file.exists():
            given = {"samples": samples, "sequence_length": length, "validation_samples": 0, "seed": draw}
            data = CalibrationText(self.settings["data"]["source"], **given)
            data.tokenizer = load_tokenizer(str(self.model()))
            data.setup()
            with built_whole(file) as draft:
                save_file({"tokens": data.calibration.contiguous()}, draft)
        return file

    def perplexity(self, checkpoint: Path) -> float:
        """Of any folder, on the configuration's first text, as `lit-prune fit` measures it."""
        disable_progress_bar()
        text = EvaluationText(**self.settings["evaluation"])
        text.tokenizer = load_tokenizer(str(self.model()))
        text.setup()
        model = load_model(str(checkpoint))
        return next(iter(perplexity(Home(model, find_blocks(model)), text, torch.device("cpu")).values()))

    def sparsity(self, checkpoint: Path, blocks: int = 0) -> float:
        """The share of zeros among the saved weights of all linear layers in the model's blocks.

        Args:
            checkpoint: what a tool saved.
            blocks: to which the model was cut.

        Raises:
            ValueError: the tool has changed weights outside the blocks, such as the head.
        """
        dense, saved = weights(self.model(blocks)), weights(checkpoint)
        with torch.device("meta"):
            shape = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
        inside = find_blocks(shape)
        layers, within = set(linear_layers(inside).values()), set(inside.modules())
        zeros = total = 0
        for name, module in shape.named_modules():
            if module in layers:
                weight = saved[f"{name}.weight"]
                zeros, total = zeros + int((weight == 0).sum()), total + weight.numel()
            elif module not in within:
                for own in (f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)):
                    if own in saved and own in dense and not torch.equal(saved[own].float(), dense[own].float()):
                        raise ValueError(f"'{own}' is no weight of a block, but was changed")
        return zeros / total

    def block_weights(self) -> int:
        """How many weights the linear layers of all blocks have: half the operations of a pass for one token."""
        blocks = find_blocks(load_model(str(self.model())))
        return sum(weight_of(layer).numel() for layer in linear_layers(blocks).values())


def weights(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
