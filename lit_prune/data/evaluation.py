"""Texts to measure perplexity on."""

from typing import Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerBase

from lit_prune import ranks
from lit_prune.data.text import Text
from lit_prune.errors import BadInput

Bos = Literal["tokenizer", "none", "first", "every"]


class EvaluationText(L.LightningDataModule):
    """Held-out texts cut into windows; by default consecutive ones, the convention of the published perplexities.

    Args:
        texts: each `wikitext2`, `ptb`, `c4`, or a local file or folder; none measures nothing.
        window_length: tokens in a window; None takes the calibration's sequence length.
        windows: how many windows, from the start of the text; None takes all that are whole (of c4 256, as papers do).
        batch_size: windows in one forward pass.
        references: measure the dense model and the masked one beside the result; without them a run in a series of
            many is sooner done.
        errors: measure every block's error; without it a run that needs no dense stream has none, so that a block
            that is not reconstructed takes two passes instead of three.
        stride: tokens from one window's start to the next; None for consecutive windows. With fewer than a window's,
            every token is still counted once, in the first window that holds it.
        bos: `tokenizer`, one before the text if that is the tokenizer's habit; `none`; `first`, one before the
            text; or `every`, one as the first token of every window.
    """

    def __init__(
        self,
        texts: list[str] | None = None,
        window_length: int | None = None,
        windows: int | None = None,
        batch_size: int = 1,
        references: bool = True,
        errors: bool = True,
        stride: int | None = None,
        bos: Bos = "tokenizer",
    ) -> None:
        super().__init__()
        self.texts = texts or []
        self.window_length = window_length
        self.windows = windows
        self.batch_size = batch_size
        self.references = references
        self.errors = errors
        self.stride = stride
        self.bos = bos
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._windows: dict[str, Tensor] = {}

    def check(self) -> None:
        """Find settings that cannot work before anything is read.

        Raises:
            BadInput: a count below its least value.
        """
        for name, least in (("window_length", 2), ("windows", 1), ("batch_size", 1), ("stride", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise BadInput(f"evaluation.{name}: {value} is too few; give at least {least}.")

    def setup(self, stage: str | None = None) -> None:
        """Read the texts and cut them.

        Raises:
            BadInput: a text cannot be read, has too few tokens or fewer windows than there are ranks, or the settings
                contradict each other.
        """
        if self.tokenizer is None or self.window_length is None:
            raise RuntimeError("EvaluationText needs its `tokenizer` and `window_length` before setup()")
        self.check()
        if self.stride is not None and self.stride > self._taken:
            raise BadInput(
                f"evaluation.stride: {self.stride} leaves out tokens between windows that take {self._taken} of the "
                "text; give at most that."
            )
        if self.bos in ("first", "every") and self.tokenizer.bos_token_id is None:
            raise BadInput(
                f"evaluation.bos: '{self.bos}' does not fit, since this tokenizer has no start token; give none."
            )
        self._windows = {}
        for source in self.texts:
            text = Text.read(source, "evaluation", "evaluation.texts")
            if text.name in self._windows:
                raise BadInput(f"evaluation.texts: two texts are called '{text.name}'; rename one, or give only one.")
            self._windows[text.name] = self._cut(text)
            if (windows := len(self._windows[text.name])) < ranks.count():
                raise BadInput(
                    f"trainer.devices: {ranks.count()} devices cannot share {windows} windows of '{text.name}'; give "
                    "more evaluation.windows, or fewer devices."
                )

    @property
    def _taken(self) -> int:
        """Tokens of the text in a window."""
        assert self.window_length is not None
        return self.window_length - (self.bos == "every")

    @property
    def _stride(self) -> int:
        return self.stride or self._taken

    def _cut(self, text: Text) -> Tensor:
        """A text's windows, shape (windows, window_length)."""
        assert self.tokenizer is not None
        wanted = self.windows or text.windows
        needed = ((wanted or 1) - 1) * self._stride + self._taken
        tokens = text.tokens(self.tokenizer, None if wanted is None else needed, special=self.bos == "tokenizer")
        start = torch.tensor([self.tokenizer.bos_token_id] if self.bos in ("first", "every") else [])
        if self.bos == "first":
            tokens = torch.cat([start.to(tokens), tokens])
        if len(tokens) < needed:
            raise BadInput(
                f"evaluation.texts: '{text.source}' holds {len(tokens)} tokens, but {wanted or 1} windows of "
                f"{self.window_length} need {needed}; give more text, or lower "
                "evaluation.windows or evaluation.window_length."
            )
        windows = tokens.unfold(0, self._taken, self._stride)[:wanted]
        if self.bos == "every":
            windows = torch.cat([start.to(tokens).expand(len(windows), 1), windows], dim=1)
        return windows

    def _counted(self, windows: Tensor) -> Tensor:
        """The first token of each window whose likelihood counts, shape (windows,)."""
        assert self.window_length is not None
        first = torch.full((len(windows),), max(1, self.window_length - self._stride))
        first[0] = 1
        return first

    @property
    def names(self) -> list[str]:
        """The texts' short names, in the order of the data loaders."""
        return list(self._windows)

    @property
    def tokens(self) -> list[Tensor]:
        """The windows of every text, shape (windows, window_length) each."""
        return list(self._windows.values())

    @property
    def conventions(self) -> dict[str, str]:
        """How each text's perplexity is measured, in a sentence."""
        return {
            name: f"{cut}; exp of the mean negative log likelihood {counted}"
            for name, (cut, counted) in self._cuts.items()
        }

    @property
    def divergence_conventions(self) -> dict[str, str]:
        """How the divergence of two models on each text is measured, in a sentence."""
        return {name: f"{cut}; mean over the predictions {counted}" for name, (cut, counted) in self._cuts.items()}

    @property
    def _cuts(self) -> dict[str, tuple[str, str]]:
        """How each text is cut, and which of its tokens count."""
        assert self.tokenizer is not None
        cuts = {}
        for name, windows in self._windows.items():
            count, length = windows.shape
            starts = self.tokenizer.bos_token_id is not None and windows[0, 0] == self.tokenizer.bos_token_id
            start = "a start token before the first window only" if starts else "no start token"
            start = "a start token before every window" if self.bos == "every" else start
            if self._stride == self._taken:
                cut, counted = "consecutive windows", f"of tokens 2 to {length} of every window"
            else:
                cut = f"windows, one every {self._stride} tokens,"
                counted = f"of tokens 2 to {length} of the first window and of the last {self._stride} of every other"
            cuts[name] = f"first {count} {cut} of {length} tokens, each by itself, {start}", counted
        return cuts

    def test_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        """One loader for each text: this rank's windows, and the first token of each that counts."""
        mine = slice(ranks.rank(), None, ranks.count())
        return [
            DataLoader(TensorDataset(windows[mine], self._counted(windows)[mine]), batch_size=self.batch_size)
            for windows in self._windows.values()
        ]
