"""Blocks that do not depend on each other, trained at once: one on every rank."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.loggers import Logger
from torch import Tensor

from lit_prune import ranks
from lit_prune.data import Streams
from lit_prune.models import Part
from lit_prune.rounds import Round
from lit_prune.walk import Walk

Entry = tuple[str, dict[str, float], int | None]
"""Of a log: the name of a training, figures and their step."""


@dataclass
class Spread(Walk):
    """The way through a model whose blocks learn from the dense stream alone, as many at a time as there are ranks.

    Statistics, masks and errors are shared out among ranks by sequence, as ever. Then each rank trains one block by
    itself, with all sequences, just as a single rank would; nothing passes between them until all are done.
    """

    _owners: dict[int, int] = field(default_factory=dict, init=False)
    _learnt: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False)
    _log: list[Entry] = field(default_factory=list, init=False)

    def at_once(self, rounds: Sequence[Round]) -> list[Sequence[Round]]:
        """One for every rank."""
        return [rounds[start : start + ranks.count()] for start in range(0, len(rounds), ranks.count())]

    def train(self, rounds: Sequence[Round]) -> None:
        """Train each round's block on a rank of its own, and tell all how that went."""
        self._owners = {round_.window.start: owner for owner, round_ in enumerate(rounds)}
        with self.clock("advance"):
            walks = [self.streams.gathered([index, index + 1], owner) for index, owner in self._owners.items()]
        for round_, streams in zip(rounds, walks, strict=True):
            if streams is not None:
                self._train_apart(round_, streams)
        with self.clock("reconstruct"):
            for index, owner in self._owners.items():
                self._tell(index, owner)

    def finish(self, round_: Round) -> dict[int, dict[str, Tensor]]:
        """Measure the error of the untrained block, which waits for the one before, and make the trained one final."""
        index = round_.window.start
        super()._measure_untrained(index, self._window(index, index + 1), self.streams.sparse)
        learnt = self._learnt.pop(index, {})
        for name, tensor in self.blocks[index].state_dict().items():
            tensor.copy_(ranks.taken_from(self._owners[index], learnt.get(name, tensor).contiguous()))
        return super().finish(round_)

    def _measure_untrained(self, index: int, part: Part, arriving: Tensor) -> None:
        """Nothing has arrived yet: the block before is not trained."""

    def _train_apart(self, round_: Round, streams: Streams) -> None:
        """The block itself stays as it was pruned until its error has been measured."""
        index = round_.window.start
        block = self.blocks[index]
        pruned = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        with self._apart(streams):
            super().train([round_])
        # asked for anew: on its way to a device and back a tensor is given other storage
        self._learnt[index] = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        block.load_state_dict(pruned)

    @contextmanager
    def _apart(self, streams: Streams) -> Iterator[None]:
        shared = self.streams, self.training, self.logger
        self.streams, self.training = streams, self.training.apart(streams.device)
        self.logger = lambda name: _Log(name, self._log)
        try:
            with ranks.apart():
                yield
        finally:
            self.streams, self.training, self.logger = shared

    def _tell(self, index: int, owner: int) -> None:
        """Let all know the figures of a training, and the first rank log it."""
        trainings = [training for training in self.metrics["trainings"] if index in training["blocks"]]
        seconds, trainings, log = ranks.told_by(owner, (self.metrics["blocks"][index]["seconds"], trainings, self._log))
        self.metrics["blocks"][index]["seconds"] = seconds
        if owner != ranks.rank():
            self.metrics["trainings"] += trainings
        self.metrics["trainings"].sort(key=lambda training: int(training["round"]))
        for name, figures, step in log if ranks.rank() == 0 else []:
            self.logger(name).log_metrics(figures, step)
        if owner == ranks.rank():
            self._log.clear()


class _Log(Logger):
    """Takes down what the first rank is to log: of several, no other does."""

    def __init__(self, name: str, log: list[Entry]) -> None:
        super().__init__()
        self._name, self._entries = name, log

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> None:
        return None

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._entries.append((self._name, dict(metrics), step))
