"""Texts to measure perplexity on."""

import lightning as L
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerBase

from lit_prune.data.text import Text
from lit_prune.errors import BadInput


class EvaluationText(L.LightningDataModule):
    """Held-out texts cut into consecutive windows, the convention of the published perplexities.

    Args:
        texts: each `wikitext2`, `ptb`, `c4`, or a local file or folder; none measures nothing.
        window_length: tokens in a window; None takes the calibration's sequence length.
        windows: how many windows, from the start of the text; None takes all that are whole.
        batch_size: windows in one forward pass.
        references: measure the dense model and the masked one beside the result; without them a run in a series of
            many is sooner done.
        errors: measure every block's error; without it a run that needs no dense stream has none, so that a block
            that is not reconstructed takes two passes instead of three.
    """

    def __init__(
        self,
        texts: list[str] | None = None,
        window_length: int | None = None,
        windows: int | None = None,
        batch_size: int = 4,
        references: bool = True,
        errors: bool = True,
    ) -> None:
        super().__init__()
        self.texts = texts or []
        self.window_length = window_length
        self.windows = windows
        self.batch_size = batch_size
        self.references = references
        self.errors = errors
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self._windows: dict[str, Tensor] = {}

    def check(self) -> None:
        """Find settings that cannot work before anything is read.

        Raises:
            BadInput: a count below its least value.
        """
        for name, least in (("window_length", 2), ("windows", 1), ("batch_size", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise BadInput(f"evaluation.{name}: {value} is too few; give at least {least}.")

    def setup(self, stage: str | None = None) -> None:
        """Read the texts and cut them.

        Raises:
            BadInput: a text cannot be read or has too few tokens.
        """
        if self.tokenizer is None or self.window_length is None:
            raise RuntimeError("EvaluationText needs its `tokenizer` and `window_length` before setup()")
        self.check()
        self._windows = {}
        for source in self.texts:
            text = Text.read(source, "evaluation", "evaluation.texts")
            tokens = text.tokens(self.tokenizer, None if self.windows is None else self.windows * self.window_length)
            count = len(tokens) // self.window_length
            if count < (self.windows or 1):
                raise BadInput(
                    f"evaluation.texts: '{source}' holds {len(tokens)} tokens, but {self.windows or 1} windows of "
                    f"{self.window_length} need {(self.windows or 1) * self.window_length}; give more text, or lower "
                    "evaluation.windows or evaluation.window_length."
                )
            if text.name in self._windows:
                raise BadInput(f"evaluation.texts: two texts are called '{text.name}'; rename one, or give only one.")
            count = self.windows or count
            self._windows[text.name] = tokens[: count * self.window_length].view(count, self.window_length)

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
        assert self.tokenizer is not None
        conventions = {}
        for name, windows in self._windows.items():
            starts = self.tokenizer.bos_token_id is not None and windows[0, 0] == self.tokenizer.bos_token_id
            start = "a start token before the first window only" if starts else "no start token"
            conventions[name] = (
                f"first {len(windows)} consecutive windows of {windows.shape[1]} tokens, each by itself, {start}; "
                f"exp of the mean negative log likelihood of tokens 2 to {windows.shape[1]} of every window"
            )
        return conventions

    def test_dataloader(self) -> list[DataLoader[tuple[Tensor, ...]]]:
        """One loader for each text."""
        return [DataLoader(TensorDataset(w), batch_size=self.batch_size) for w in self._windows.values()]
