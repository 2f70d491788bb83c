"""The main job: prune a language model block by block, reconstruct each block, save, measure, report.

The *dense stream* is what the untouched model computes; the *sparse stream* is what it computes with all earlier
blocks pruned and reconstructed.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lit_prune import ranks
from lit_prune.data import CalibrationText, EvaluationText, Space, Streams
from lit_prune.masking import Masking
from lit_prune.method import Pruning, Training
from lit_prune.metrics import describe
from lit_prune.models import BlockCall, Home, capture_calls, embed
from lit_prune.modules import block_needs, perplexity
from lit_prune.needs import Place
from lit_prune.plan import BlockPlan
from lit_prune.preflight import CPU, Loaded, prepare
from lit_prune.reporting import write_report
from lit_prune.reporting.board import Board
from lit_prune.resources import Stopwatch, machine, peak_memory_bytes
from lit_prune.result import Result
from lit_prune.rounds import Round, make_rounds
from lit_prune.run_folder import RunFolder
from lit_prune.spread import Spread
from lit_prune.walk import Walk

log = logging.getLogger(__name__)


class Run:
    """One run of `lit-prune fit`, new or continued.

    Args:
        pruning: what is done to the model.
        data: the calibration text.
        evaluation: the texts to measure perplexity on.
        training: how a block is trained.
        folder: where everything is written.
    """

    def __init__(
        self,
        pruning: Pruning,
        data: CalibrationText,
        evaluation: EvaluationText,
        training: Training,
        folder: RunFolder,
    ) -> None:
        self.pruning = pruning
        self.data = data
        self.evaluation = evaluation
        self.training = training
        self.folder = folder
        self.metrics = folder.metrics
        earlier_peaks = self.metrics.get("peak_memory_bytes", {}).get("by_stage")
        self.clock = Stopwatch(self.metrics.get("seconds"), earlier_peaks)
        self.board = Board(folder.path / "tensorboard")

    def fit(self) -> dict[str, Any]:
        """Do the whole job.

        Returns:
            The figures, as `metrics.json` holds them.

        Raises:
            BadInput: the run cannot work; found before any long work.
        """
        with self.clock("total"):
            with self.clock("load"):
                loaded = self.prepare()
            if ranks.rank() == 0:
                log.info(str(loaded.needs))
            self.folder.begin()
            self.metrics |= describe(self.pruning, self.data, self.evaluation) | self.metrics
            self.metrics["machine"] = machine(self._device)
            if self.evaluation.references:
                self._measure("dense", lambda: loaded.home)
            self._prune(loaded)
            with self.clock("save"):
                result = Result(self.pruning, loaded, self.folder)
                self.metrics["parameters"] = result.save()
            self._measure("pruned", lambda: result.home)
            if not self.pruning.changes_weights:
                self.metrics["perplexity"]["masked"] = self.metrics["perplexity"]["pruned"]
            elif self.evaluation.references:
                self._measure("masked", result.masked_only)
        self._save_metrics()
        if ranks.rank() == 0:
            self._report()
        self.folder.finish()
        return self.metrics

    def _report(self) -> None:
        """Page and TensorBoard, with the same plots."""
        from lit_prune.reporting.plots import run_figures

        plots = run_figures(self.metrics)
        write_report(self.metrics, self.folder.config, self.folder.path / "report.html", figures=plots)
        self.board.summarise(self.metrics, plots)

    def prepare(self) -> Loaded:
        """Load the model and the texts, and check that all can work; nothing is written.

        Raises:
            BadInput: it cannot.
        """
        return prepare(self.pruning, self.data, self.evaluation, self.training, self.folder)

    def _prune(self, loaded: Loaded) -> None:
        """Lead both streams through the model and leave every block pruned and reconstructed behind."""
        pruning, folder = self.pruning, self.folder
        with self.clock("advance"), loaded.home.outside(CPU):
            with loaded.home.on(0, CPU):
                calls = capture_calls(loaded.model, loaded.blocks, self.data.tokens)
            streams = self._embedded(loaded)
        with self.clock("statistics"):
            plans = self._allocate(loaded, calls, streams)
            masking = Masking(pruning, plans, folder, self._device)
            masking.gradients_of_language_model(
                loaded, calls, self.data.tokens[streams.share.rows[: streams.observed]], self.data.batch_size
            )
        if not pruning.leads_sparse_stream(self.evaluation.errors):
            streams.sparse = streams.sparse[:1].clone()  # to show that the pruned model can compute; the others go
        silent = ranks.rank() > 0
        with tqdm(total=len(calls), desc="pruning", unit="block", dynamic_ncols=True, disable=silent) as bar:
            kind = Spread if pruning.has_independent_blocks and ranks.count() > 1 else Walk
            walk = kind(
                pruning,
                self.training,
                masking,
                streams,
                loaded.home,
                calls,
                loaded.dtype,
                self.data.batch_size,
                self.clock,
                self.board.run,
                bar.set_postfix,
                self.metrics,
                self.evaluation.errors,
            )
            walk.restore(folder.load_block, folder.done, folder.entered)
            bar.update(folder.done)
            left = make_rounds(len(calls), pruning.window_width, pruning.window_stride)[folder.rounds :]
            for rounds in walk.at_once(left):
                for round_ in rounds:
                    walk.enter(round_)
                walk.train(rounds)
                for round_ in rounds:
                    final = walk.finish(round_)
                    with self.clock("save"):
                        self._commit(round_, final, walk.pending(round_))
                    bar.update(len(final))
                    del final  # or it would stay until the next round's

    def _embedded(self, loaded: Loaded) -> Streams:
        """Both streams as they enter block 0, or what is needed of them."""
        tokens, pruning = self.data.tokens[loaded.share.rows], self.pruning
        leads_sparse = pruning.leads_sparse_stream(self.evaluation.errors)
        leads_dense = pruning.leads_dense_stream(self.evaluation.errors)
        if not (leads_sparse or leads_dense or pruning.allocation):
            tokens = tokens[:1]
        first = embed(loaded.model, loaded.blocks, tokens[:1])
        shape = (len(tokens), *first.shape[1:])
        space = self._space(loaded.needs.streams)
        sparse = space.empty(shape, first.dtype)
        for row, sequence in enumerate(tokens):
            sparse[row] = embed(loaded.model, loaded.blocks, sequence[None])[0]
            space.let_go()
        streams = Streams(sparse, {}, loaded.share, self._device, space)
        if leads_dense:  # under both names where nothing leads the sparse stream on
            streams.dense[0] = space.empty(shape, first.dtype).copy_(sparse) if leads_sparse else sparse
        space.let_go()
        return streams

    def _space(self, place: Place) -> Space:
        """Where all streams that are needed at a time have room."""
        self.metrics["hidden_states"] = place
        if place == "device":
            log.info("Hidden states lie on %s (data.device_share).", self._device)
            return Space(device=self._device)
        if place == "disk":
            log.info("Hidden states are large: they lie on disk (data.memory_share).")
            return Space(self.folder.path / "hidden")
        return Space(pinned=self._device.type == "cuda")

    def _allocate(self, loaded: Loaded, calls: list[BlockCall], streams: Streams) -> list[BlockPlan]:
        """Share the sparsity out among the blocks, by what each of them needs of it on the dense stream."""
        allocation, total = self.pruning.allocation, self.pruning.sparsity
        allotted = [plan for plan in loaded.plans if plan.free]
        if allocation is None or not allotted:
            return loaded.plans
        if self.metrics["allocation"] is None:
            free = [plan.free for plan in loaded.plans]
            needs = block_needs(allocation, loaded.home, calls, free, streams, total)
            sizes = [plan.free_weights for plan in allotted]
            shares = allocation.shares(needs, sizes, float(total.share))
            self.metrics["allocation"] = {plan.name: share for plan, share in zip(allotted, shares, strict=True)}
            self._save_metrics()
        chosen = self.metrics["allocation"]
        return [plan.at(chosen[plan.name]) if plan.free else plan for plan in loaded.plans]

    @property
    def _device(self) -> torch.device:
        return self.training.trainer_for(logger=False).strategy.root_device

    def _commit(
        self, round_: Round, final: dict[int, dict[str, Tensor]], pending: dict[int, dict[str, Tensor]]
    ) -> None:
        """Write a round's blocks and figures; from here on the run need not do it again."""
        blocks = [figures for figures in self.metrics["blocks"] if "zeros" in figures]
        if final:
            weights = sum(b["weights"] for b in blocks)
            self.metrics["sparsity"] = sum(b["zeros"] for b in blocks) / weights if weights else None
            self.metrics["error"] = blocks[-1]["error"]["after"]
        self._save_metrics()
        for index in final:
            if ranks.rank() == 0:
                self.board.block(self.metrics["blocks"][index])
        self.folder.save_round(round_.index, final, pending)

    def _measure(self, stage: str, home: Callable[[], Home]) -> None:
        """Perplexity on every text of a model, which is not opened if an interrupted run has measured it."""
        if not self.evaluation.names or self.metrics["perplexity"][stage]:
            return
        with self.clock("evaluate"):
            self.metrics["perplexity"][stage] = perplexity(home(), self.evaluation, self._device)
        self._save_metrics()

    def _save_metrics(self) -> None:
        self.metrics["seconds"] |= self.clock.seconds
        now, in_all = peak_memory_bytes(), self.clock.peaks["total"]
        # where the stages' own peaks are not known, that of the process is
        peak = {place: now[place] if known is None else known for place, known in in_all.items()}
        self.metrics["peak_memory_bytes"] = peak | {"by_stage": self.clock.peaks}
        self.folder.save_metrics()
