"""The calibration set: sequences of tokens, some of them held out."""

import hashlib
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerBase

from lit_prune.data.generated_text import GeneratedTexts
from lit_prune.data.text import Text
from lit_prune.errors import BadInput


class CalibrationText(L.LightningDataModule):
    """Calibration sequences and a held-out share, drawn from a text; never padded, the same for the same seed.

    The documents are shuffled and joined to one text, the text's tokens cut into windows. The calibration sequences
    are drawn at random from the front part of the windows, the held-out ones from the back part, so that the two
    have at most one document in common, and no token.

    Args:
        source: `c4`, `wikitext2`, `ptb`, or a local .txt, .jsonl, .json.gz or .parquet file or a folder of them.
        samples: number of calibration sequences.
        sequence_length: tokens in a sequence.
        validation_samples: number of held-out sequences, whose error shows overfitting and picks the best epoch.
        batch_size: sequences in a training step.
        seed: of the draw; None takes the one that `seed_everything` has set.
        self_generated: a file that `lit-prune generate` wrote, whose text is added to the calibration sequences.
        self_generated_samples: how many sequences of it are added.
        self_generated_statistics: whether masks and solvers see them too, and not the reconstruction alone.
        memory_share: hidden states that need more than this share of the free memory lie on disk.
        device_share: they lie on a GPU if they and all else need no more than this share of its free memory.

    Attributes:
        calibration: the sequences to learn from, the self-generated ones last.
        held_out: the held-out sequences, none of them self-generated.
        self_generated_by: model, seed and number of texts of the self-generated file; None without one.
    """

    def __init__(
        self,
        source: str = "c4",
        samples: int = 256,
        sequence_length: int = 1024,
        validation_samples: int = 32,
        batch_size: int = 8,
        seed: int | None = None,
        self_generated: str | None = None,
        self_generated_samples: int = 0,
        self_generated_statistics: bool = True,
        memory_share: float = 0.3,
        device_share: float = 0.8,
    ) -> None:
        super().__init__()
        self.source = source
        self.samples = samples
        self.sequence_length = sequence_length
        self.validation_samples = validation_samples
        self.batch_size = batch_size
        self.seed = seed
        self.self_generated = self_generated
        self.self_generated_samples = self_generated_samples
        self.self_generated_statistics = self_generated_statistics
        self.memory_share = memory_share
        self.device_share = device_share
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.calibration = torch.empty(0, sequence_length, dtype=torch.long)
        self.held_out = torch.empty(0, sequence_length, dtype=torch.long)
        self.self_generated_by: dict[str, Any] | None = None

    def check(self) -> None:
        """Find what cannot work before a tokenizer is there and the calibration text is read.

        Raises:
            BadInput: a count below its least value, or a self-generated file that is missing, empty, damaged or has
                too few texts that are long enough.
        """
        self._check_settings()
        self._own_texts()

    def _check_settings(self) -> None:
        least_values = {"samples": 1, "sequence_length": 2, "validation_samples": 0, "batch_size": 1}
        for name, least in (least_values | {"self_generated_samples": 0}).items():
            if (value := getattr(self, name)) < least:
                raise BadInput(f"data.{name}: {value} is too few; give at least {least}.")
        for name in ("memory_share", "device_share"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise BadInput(f"data.{name}: {value} is no share; give 0 to 1.")
        if self.self_generated is None and self.self_generated_samples:
            raise BadInput(
                f"data.self_generated_samples: {self.self_generated_samples} sequences are asked for, but from no "
                "file; give data.self_generated, which lit-prune generate writes."
            )
        if self.self_generated is not None and not self.self_generated_samples:
            raise BadInput(
                f"data.self_generated: '{self.self_generated}' is given, but none of it would be used; give "
                "data.self_generated_samples."
            )

    def _own_texts(self) -> GeneratedTexts | None:
        if self.self_generated is None:
            return None
        texts = GeneratedTexts.read(self.self_generated)
        texts.long(self.self_generated_samples, self.sequence_length)
        return texts

    def setup(self, stage: str | None = None) -> None:
        """Draw the sequences into `calibration` and `held_out`, of sequence_length tokens each.

        Raises:
            BadInput: what `check` finds, a self-generated file of another tokenizer, or a text that cannot be read or
                has too few tokens.
        """
        if self.tokenizer is None:
            raise RuntimeError("CalibrationText needs its `tokenizer` before setup()")
        self._check_settings()
        if own := self._own_texts():
            own.require_tokenizer(self.tokenizer)
        generator = torch.Generator().manual_seed(torch.initial_seed() if self.seed is None else self.seed)
        self.calibration, self.held_out = self._drawn(self.tokenizer, generator)
        if own:
            drawn = own.windows(self.self_generated_samples, self.sequence_length, generator)
            self.calibration = torch.cat([self.calibration, drawn])
            self.self_generated_by = own.origin

    def _drawn(self, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Calibration and held-out sequences of the text."""
        text = Text.read(self.source, "calibration", "data.source")
        wanted = self.samples + self.validation_samples
        order = torch.randperm(len(text.documents), generator=generator).tolist()
        tokens = text.tokens(tokenizer, wanted * self.sequence_length, order)
        if len(tokens) < wanted * self.sequence_length:
            raise BadInput(
                f"data.source: '{self.source}' holds {len(tokens)} tokens, but {wanted * self.sequence_length} are "
                f"needed for {self.samples} + {self.validation_samples} sequences of {self.sequence_length}; "
                "give more text, or lower data.samples, data.validation_samples or data.sequence_length."
            )
        windows = tokens[: len(tokens) // self.sequence_length * self.sequence_length].view(-1, self.sequence_length)
        front = len(windows) * self.samples // wanted
        calibration = _draw(windows[:front], self.samples, generator)
        return calibration, _draw(windows[front:], self.validation_samples, generator)

    @property
    def observed(self) -> int:
        """How many calibration sequences, from the first on, masks and solvers see."""
        return len(self.calibration) if self.self_generated_statistics else self.samples

    @property
    def tokens(self) -> Tensor:
        """All sequences, the calibration ones first, shape (sequences, sequence_length)."""
        return torch.cat([self.calibration, self.held_out])

    @property
    def tokens_sha256(self) -> str:
        """What tells these sequences from others, which another text, another file or another tokenizer gives."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).hexdigest()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The calibration sequences in batches."""
        return DataLoader(TensorDataset(self.calibration), batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The held-out sequences in batches."""
        return DataLoader(TensorDataset(self.held_out), batch_size=self.batch_size)


def _draw(windows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return windows[torch.randperm(len(windows), generator=generator)[:count]]
