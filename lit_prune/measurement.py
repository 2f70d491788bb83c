"""What `evaluate` does: a model, and the dense one beside it, measured on texts and tasks."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lit_prune.data import EvaluationText
from lit_prune.data.evaluation import Bos
from lit_prune.data.generated_text import fingerprint
from lit_prune.errors import BadInput
from lit_prune.evaluation import Results, ZeroShot, compare
from lit_prune.models import Home, load_config, load_tokenizer, on_device, resolve, tensors_of
from lit_prune.modules import perplexity
from lit_prune.preflight import check_vocabulary, offloads, open_model


class Checkpoint(NamedTuple):
    """A model that is not loaded yet."""

    path: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def open(cls, given: str, key: str) -> "Checkpoint":
        """Find it.

        Raises:
            BadInput: it is not there, or cannot be read.
        """
        with _said_as(key):
            path = resolve(given)
            return cls(path, load_config(path), load_tokenizer(path))

    @property
    def positions(self) -> int | None:
        """How long a sequence it takes, if that is limited."""
        positions: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return positions


class Measurement:
    """A model, and the dense one beside it, at work.

    Args:
        pruned: the model.
        dense: the one to compare with, if any.
        device: where they run.
        results: what every part is added to.
        offload: whether weights stay on disk; None to find out.
    """

    def __init__(
        self,
        pruned: Checkpoint,
        dense: Checkpoint | None,
        device: torch.device,
        results: Results,
        offload: bool | None,
    ) -> None:
        self.checkpoints = {"pruned": pruned} | ({"dense": dense} if dense else {})
        self.homes: dict[str, Home] = {}
        self.device = device
        self.results = results
        self.offload = offload

    def open(self, texts: list[EvaluationText], tasks: bool) -> None:
        """Load the models for texts and, perhaps, tasks.

        Raises:
            BadInput: they cannot be loaded, do not belong together, or do not fit what is to be measured.
        """
        count = len(self.checkpoints)
        on_disk = any(offloads(self.offload, model.path, count) for model in self.checkpoints.values())
        if on_disk and tasks:
            raise BadInput("tasks: they need the whole model in memory; give --offload false, or --tasks [].")
        for side, checkpoint in self.checkpoints.items():
            with _said_as("model" if side == "pruned" else "dense"):
                self.homes[side] = open_model(checkpoint.path, on_disk)
                check_vocabulary(self.homes[side].model, [tokens for data in texts for tokens in data.tokens])
        if len(self.homes) > 1:
            self._check_pair()

    def _check_pair(self) -> None:
        vocabularies = {
            (fingerprint(checkpoint.tokenizer), checkpoint.config.get_text_config().vocab_size)
            for checkpoint in self.checkpoints.values()
        }
        if len(vocabularies) > 1:
            raise BadInput(
                f"dense: '{self.checkpoints['dense'].path}' has another vocabulary than "
                f"'{self.checkpoints['pruned'].path}', so that their predictions cannot be compared; "
                "give the model that it was made from, or --references false."
            )

    def text(self, data: EvaluationText) -> None:
        """Measure one text."""
        start = time.perf_counter()
        (name,) = data.names
        print(f"{name}: {len(data.tokens[0])} windows")
        pruned, dense = self.homes["pruned"], self.homes.get("dense")
        if dense is None:
            alone = perplexity(pruned, data, self.device, silent=False)[name]
            self.results.add_text(name, data.conventions[name], digest(data), None, alone, None)
        else:
            both = compare(dense, pruned, data, self.device, silent=False)[name]
            convention = data.divergence_conventions[name]
            divergence = {"convention": convention, "kl": both.kl, "top1_agreement": both.top1_agreement}
            self.results.add_text(name, data.conventions[name], digest(data), both.dense, both.pruned, divergence)
        self.results.save(time.perf_counter() - start)

    def task(self, shot: ZeroShot, name: str, limit: int | None, batch_size: int) -> None:
        """Ask one task."""
        start = time.perf_counter()
        scores = {}
        for side, home in self.homes.items():
            print(f"{name}: {side}")
            with on_device(tensors_of(home.model), self.device):
                scores[side] = shot.measure(name, home.model, self.checkpoints[side].tokenizer, batch_size)
        self.results.figures["versions"]["lm_eval"] = shot.version
        self.results.add_task(name, shot.conventions[name], limit, scores)
        self.results.save(time.perf_counter() - start)


def digest(data: EvaluationText) -> str:
    """What tells a text's windows from those of another text of the same name."""
    return hashlib.sha256(data.tokens[0].contiguous().numpy().tobytes()).hexdigest()[:16]


@contextmanager
def _said_as(key: str) -> Iterator[None]:
    """What is `model.checkpoint` or `evaluation.windows` to fit has a shorter name here."""
    try:
        yield
    except BadInput as error:
        said = (
            str(error).replace("model.checkpoint", key).replace("evaluation.", "").replace("model.offload", "offload")
        )
        raise BadInput(said) from error


def cut(
    sources: list[str],
    checkpoint: Checkpoint,
    length: int,
    windows: int | None,
    stride: int | None,
    bos: Bos,
    batch_size: int,
) -> list[EvaluationText]:
    """The texts, each by itself so that it can be measured by itself."""
    if checkpoint.positions is not None and length > checkpoint.positions:
        raise BadInput(
            f"window_length: {length} is more than the model's {checkpoint.positions} positions; give at most that."
        )
    texts: dict[str, EvaluationText] = {}
    for source in sources:
        data = EvaluationText([source], length, windows, batch_size, stride=stride, bos=bos)
        data.tokenizer = checkpoint.tokenizer
        with _said_as("model"):
            data.setup()
        (name,) = data.names
        if name in texts:
            raise BadInput(f"texts: two texts are called '{name}'; rename one, or give only one.")
        texts[name] = data
    return list(texts.values())
