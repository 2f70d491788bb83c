"""The way through a model, round by round: prune, train, make final, and lead both streams on."""

import copy
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn

from lit_prune import ranks
from lit_prune.data import BlockError, ReconstructionPairs, Streams, propagate, sound
from lit_prune.heap import give_back, without_holes
from lit_prune.masking import Masking
from lit_prune.masks import bits
from lit_prune.method import CUTS, Pruning, Training
from lit_prune.metrics import zeros
from lit_prune.models import BlockCall, Home, Part, Window, as_stored, cast, linear_layers, weight_of
from lit_prune.modules import (
    Crossing,
    GlobalPropagation,
    IndependentPropagation,
    KeepBest,
    LossHistory,
    Reconstruction,
    frozen,
)
from lit_prune.resources import Stopwatch
from lit_prune.rounds import Round

MASK = "mask:"
"""Prefix of a layer's packed mask among the tensors of a block."""

ROUNDS = 10_000
"""More than there are, so that every part of every block has a seed of its own."""


@dataclass
class Walk:
    """Both streams and the blocks between them.

    Of the dense stream no more is kept than the boundaries inside the window, and of dense weights nothing, unless
    targets are made from them later than a block is pruned: those of parts of a block, and of windows without global
    propagation.

    Attributes:
        pruning: what is done to the model.
        training: how a part is trained.
        masking: makes the masks.
        streams: both streams as they enter block 0.
        home: the model, whose blocks are changed in place, and where their weights are while it is not their turn.
        calls: their call arguments.
        dtype: in which the result is stored.
        batch_size: samples in a training step.
        clock: takes the time of each stage.
        logger: makes what logs a training, by its name.
        show: is told the newest losses.
        metrics: take the figures of every block and training.
        measures_errors: whether every block's error is among them.
    """

    pruning: Pruning
    training: Training
    masking: Masking
    streams: Streams
    home: Home
    calls: list[BlockCall]
    dtype: torch.dtype
    batch_size: int
    clock: Stopwatch
    logger: Callable[[str], Logger]
    show: Callable[[dict[str, float]], None]
    metrics: dict[str, Any]
    measures_errors: bool = True
    _masks: dict[int, dict[str, Tensor]] = field(default_factory=dict, init=False)
    _dense_blocks: dict[int, nn.Module] = field(default_factory=dict, init=False)
    _on_sparse: Tensor | None = field(default=None, init=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """The model's blocks."""
        return self.home.blocks

    def enter(self, round_: Round) -> None:
        """Prune the blocks that enter a round's window."""
        self._seed(round_)
        arriving = None
        with self._sound(round_):
            for index in round_.entering:
                arriving = self._enter(round_, index, arriving)

    def _enter(self, round_: Round, index: int, last: Tensor | None) -> Tensor:
        """Statistics, masks and solved weights of a block, by what enters it inside its window.

        Args:
            round_: the round.
            index: the block's.
            last: what has entered the block before it in this round, if one has; it goes on in place.

        Returns:
            What enters it.
        """
        began = time.perf_counter()
        self._on_sparse = None
        streams, pruning = self.streams, self.pruning
        with self.clock("load"):
            self.home.load(index)
        block, part = self.blocks[index], self._window(index, index + 1).to(streams.device)
        with self.clock("advance"):
            arriving = self._arriving(round_, index, last)
        if pruning.true_sequential:
            self._prune_on_the_way(index, block, part)
        else:
            self._prune(round_, index, block, part, arriving)
        self.metrics["blocks"].append(
            {
                "index": index,
                "error": {"before": None, "after": None},
                "validation_error": {"before": None, "after": None},
                "seconds": 0.0,
            }
        )
        self._measure_untrained(index, part, arriving)
        self.metrics["blocks"][index]["seconds"] = time.perf_counter() - began
        return arriving

    def _prune_on_the_way(self, index: int, block: nn.Module, part: Part) -> None:
        """Prune a block's layers, as they will be stored, when the sparse stream comes to them; lead that past it."""
        streams, layers = self.streams, self.masking.layers(index, block)
        sparse, let_go = streams.sparse, streams.space.let_go
        with self.clock("advance"):
            self._advance_dense(index, index)
            _round(block, self.dtype)
        here, before = sparse[: streams.observed], streams.share.rows[0]
        arrivals = self.masking.arrivals(index, block, part, here, let_go, before)
        masks = self._masks[index] = {}
        while True:
            with self.clock("statistics"):
                arrived = next(arrivals, None)
            if arrived is None:
                break
            with self.clock("mask"):
                masks |= self.masking.prune(index, block, arrived)
                for name in arrived:
                    _round(layers[name], self.dtype)
        with self.clock("advance"):
            rest = sparse[streams.observed :]
            propagate(part, rest, streams.device, rest, streams.observed, let_go)

    def _prune(self, round_: Round, index: int, block: nn.Module, part: Part, arriving: Tensor) -> None:
        """Prune a block by what its dense self makes of what enters it."""
        streams, pruning = self.streams, self.pruning
        seen = streams.dense[index] if pruning.independent else arriving
        here = slice(streams.observed)
        output = None
        if pruning.independent or pruning.learns_from_one_pass:
            output = streams.space.empty(seen.shape, seen.dtype)
        with self.clock("statistics"):
            room, let_go = None if output is None else output[here], streams.space.let_go
            before = streams.share.rows[0]
            statistics = self.masking.observe(index, block, part, seen[here], room, let_go, before)
        with self.clock("advance"):
            if output is not None:
                rest = slice(streams.observed, None)
                propagate(part, seen[rest], streams.device, output[rest], streams.observed, let_go)
            if pruning.learns_from_one_pass:
                self._on_sparse = output
            self._advance_dense(round_.window.start, index, output if pruning.independent else None)
        if pruning.keeps_dense_blocks:
            self._dense_blocks[index] = copy.deepcopy(block)
        with self.clock("mask"), without_holes():
            self._masks[index] = self.masking.prune(index, block, statistics)

    def _arriving(self, round_: Round, index: int, last: Tensor | None) -> Tensor:
        """What enters a block on the sparse stream: through the older blocks of its window, as they are now.

        Where nobody needs that, it is the stream as it is.
        """
        streams, start = self.streams, round_.window.start
        if not (self.measures_errors or self.pruning.prunes_by_sparse_stream):
            return streams.sparse
        if last is not None:
            out = None if last is streams.sparse else last
            return streams.propagate(self._window(index - 1, index), last, out)
        return streams.propagate(self._window(start, index), streams.sparse) if index > start else streams.sparse

    def _measure_untrained(self, index: int, part: Part, arriving: Tensor) -> None:
        """The error of a block that is pruned and not trained."""
        if self.pruning.reconstruction == "none" or not self._masks[index] or not self.measures_errors:
            return
        with self.clock("advance"):
            error, figures = self.streams.error_after(part, arriving, index), self.metrics["blocks"][index]
        figures["error"]["before"], figures["validation_error"]["before"] = error.calibration, error.held_out

    def at_once(self, rounds: Sequence[Round]) -> list[Sequence[Round]]:
        """The rounds that are trained at once: each by itself, since it begins with what came of the one before."""
        return [[round_] for round_ in rounds]

    def train(self, rounds: Sequence[Round]) -> None:
        """Train a round's window, or one part of its block after the other."""
        (round_,) = rounds
        window = round_.window
        if self.pruning.reconstruction == "none" or not any(self._masks[index] for index in window):
            return
        began = time.perf_counter()
        untouched = [self.blocks[index] for index in window if not self._masks[index]]
        with self._sound(round_), frozen(p for block in untouched for p in block.parameters()):
            for number, (part, crossing) in enumerate(self._crossings(round_)):
                with _collected():
                    self._fit(round_, number, part, crossing)
        for index in window:
            self.metrics["blocks"][index]["seconds"] += (time.perf_counter() - began) / len(window)

    def finish(self, round_: Round) -> dict[int, dict[str, Tensor]]:
        """Make blocks final, rounded as they will be stored, and lead the sparse stream past them.

        Returns:
            What is to be stored of every final block.
        """
        stored = {}
        for index in round_.final:
            began = time.perf_counter()
            block, figures = self.blocks[index], self.metrics["blocks"][index]
            with self._sound(round_), self.clock("advance"):
                _round(block, self.dtype)
                if not self.pruning.true_sequential:  # or the stream is there already
                    self._advance_sparse(index)
                after = self.streams.error(index + 1) if self.measures_errors else BlockError(None, None)
            for key, error in (("error", after.calibration), ("validation_error", after.held_out)):
                before = figures[key]["before"]
                figures[key] = {"before": error if before is None else before, "after": error}
            figures |= zeros(linear_layers(block), self._masks[index])
            figures["seconds"] += time.perf_counter() - began
            stored[index] = self._tensors(index, self.dtype)
            self._leave(index)
        return stored

    def pending(self, round_: Round) -> dict[int, dict[str, Tensor]]:
        """What has to be stored of the blocks that later rounds go on with."""
        return {index: self._tensors(index, torch.float32) for index in round_.window if index not in round_.final}

    def _tensors(self, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights, and packed masks."""
        held = self.blocks[index].state_dict().items()
        tensors = {name: cast(tensor, dtype) for name, tensor in held}
        return tensors | {MASK + name: bits.pack(mask) for name, mask in self._masks[index].items()}

    def _seed(self, round_: Round, part: int = 0) -> None:
        L.seed_everything((self.training.seed + round_.index + ROUNDS * part) % 2**32, verbose=False)

    def _sound(self, round_: Round) -> AbstractContextManager[None]:
        return sound(round_.name, self.streams.share, self.blocks)

    def restore(self, stored: Callable[[int], dict[str, Tensor]], done: int, entered: int) -> None:
        """Put the blocks of an interrupted run in their places, and lead the streams to where they were.

        Args:
            stored: the tensors of a block.
            done: how many blocks are final.
            entered: how many have been pruned.
        """
        with self.clock("advance"):
            for index in range(entered):
                self.home.load(index)
                block, tensors = self.blocks[index].to(self.streams.device), stored(index)
                self._advance_dense(min(index, done), index)
                if self.pruning.keeps_dense_blocks and index >= done:
                    self._dense_blocks[index] = copy.deepcopy(block)
                masks = {name.removeprefix(MASK): tensors.pop(name) for name in list(tensors) if name.startswith(MASK)}
                block.load_state_dict(tensors)
                layers = linear_layers(block)
                self._masks[index] = {
                    name: bits.unpack(mask, weight_of(layers[name]).shape).to(self.streams.device)
                    for name, mask in masks.items()
                }
                if index < done:
                    self._advance_sparse(index)
                    self._leave(index)

    @property
    def _keeps_what_enters(self) -> bool:
        """Whether what enters a window on the dense stream is needed after the pass through it."""
        return self.pruning.independent or self.pruning.reconstruction in CUTS

    def _window(self, start: int, stop: int, dense: bool = False) -> Window:
        blocks = [self._dense_blocks[index] if dense else self.blocks[index] for index in range(start, stop)]
        return Window(blocks, self.calls[start:stop])

    def _advance_dense(self, start: int, index: int, output: Tensor | None = None) -> None:
        """Lead the dense stream past a block, which is dense still, in place unless what enters it is needed later."""
        dense = self.streams.dense
        if not dense:
            return
        kept = index > start or self._keeps_what_enters
        if output is None:
            part = self._window(index, index + 1)
            output = self.streams.propagate(part, dense[index], out=None if kept else dense[index])
        dense[index + 1] = output
        if not kept:
            del dense[index]

    def _advance_sparse(self, index: int) -> None:
        """Lead the sparse stream past a block, in place."""
        self.streams.propagate(self._window(index, index + 1), self.streams.sparse, out=self.streams.sparse)

    def _leave(self, index: int) -> None:
        """Let go of all that is kept for a block until it is final."""
        self.home.release(index)
        del self._masks[index]
        self._dense_blocks.pop(index, None)
        for boundary in sorted(self.streams.dense)[:-1]:  # the last one is where the next block enters
            if boundary <= index or (boundary == index + 1 and not self._keeps_what_enters):
                del self.streams.dense[boundary]

    def _crossings(self, round_: Round) -> Iterator[tuple[Part, Crossing]]:
        """The parts of a round's window, one after the other, with what each can learn from."""
        window, streams = round_.window, self.streams
        cut = CUTS.get(self.pruning.reconstruction)
        if cut is None:
            whole = self._window(window.start, window.stop)
            yield (
                whole,
                Crossing(
                    sparse=lambda: streams.sparse,
                    dense=lambda: streams.dense[window.start],
                    on_sparse=lambda _: self._dense_on_sparse(window),
                    on_dense=lambda _: streams.dense[window.stop],
                ),
            )
            return
        (index,) = window
        sample = streams.sparse[:1].to(streams.device)
        dense_block = self._dense_blocks[index].to(streams.device)
        call = self.calls[index].to(streams.device)
        parts = zip(cut(self.blocks[index], call, sample), cut(dense_block, call, sample), strict=True)
        for part, dense_part in parts:
            sparse = partial(streams.propagate, part.enter, streams.sparse)
            dense = partial(self._enters_dense, dense_part, index)
            on_sparse, on_dense = (partial(self._after, dense_part, entering) for entering in (sparse, dense))
            yield part, Crossing(sparse, dense, on_sparse, on_dense)

    def _enters_dense(self, part: Part, index: int) -> Tensor:
        return self.streams.propagate(part.enter, self.streams.dense[index])

    def _after(self, part: Part, entering: Callable[[], Tensor], known: Tensor | None) -> Tensor:
        return self.streams.propagate(part, entering() if known is None else known)

    def _dense_on_sparse(self, window: range) -> Tensor:
        if self._on_sparse is not None:
            return self._on_sparse
        dense = self._window(window.start, window.stop, dense=True).to(self.streams.device)
        return self.streams.propagate(dense, self.streams.sparse)

    def _fit(self, round_: Round, number: int, part: Part, crossing: Crossing) -> None:
        """Train one part of a block, unless nothing is to be trained in it, or it puts out its targets already."""
        module = self._reconstruction(part, round_.window).to(self.streams.device)
        if module.idle:
            return
        with self.clock("advance"):
            inputs, targets = module.pair(crossing)
            walk = self.streams.outputs(module, inputs)
            exact = all(torch.equal(output, targets[rows].to(output.device)) for rows, output in walk)
        if ranks.all_agree(exact, self.streams.device):
            return
        best, history = KeepBest(), LossHistory(self.show)
        name = f"{round_.name}_{part.name}" if part.name else round_.name
        trainer = self.training.trainer_for(
            callbacks=[best, history], logger=self.logger(name), num_sanity_val_steps=-1
        )
        here = self.streams
        pairs = ReconstructionPairs(inputs, targets, here.samples, self.batch_size, here.space, here.share, here.device)
        began = self.clock.seconds.get("reconstruct", 0.0)
        self._seed(round_, number)  # here, since Lightning goes back to the seed when there are several ranks
        with self.clock("reconstruct"):
            trainer.fit(module, datamodule=pairs)
            module.to(self.streams.device)  # Lightning has taken it back to the CPU
        self.metrics["trainings"].append(
            {
                "name": name,
                "round": round_.index,
                "blocks": list(round_.window),
                "part": part.name or None,
                "loss": {"train": history.train, "held_out": history.held_out},
                "best_epoch": best.best_epoch,
                "seconds": self.clock.seconds["reconstruct"] - began,
            }
        )

    def _reconstruction(self, part: Part, window: range) -> Reconstruction:
        here = self.pruning
        kind: type[Reconstruction] = Reconstruction
        if here.independent:
            kind = IndependentPropagation
        elif here.global_propagation:
            kind = GlobalPropagation
        masks = {
            linear_layers(self.blocks[index])[name]: mask
            for index in window
            for name, mask in self._masks[index].items()
        }
        training = self.training
        how = here.loss, here.trained, here.rank, here.compile
        return kind(part, masks, training.optimizer, training.lr_scheduler, *how)


@contextmanager
def _collected() -> Iterator[None]:
    """Free what the body leaves behind: a Trainer's parts hold each other, and with them all tensors of the training.

    What is older is not looked at, which takes longer than all else that a short training does.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        give_back()


def _round(block: nn.Module, dtype: torch.dtype) -> None:
    """Round a block's weights to what will be stored, so that every later figure is that of the stored model."""
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.copy_(as_stored(tensor, dtype))
