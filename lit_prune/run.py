"""The main job: prune a language model block by block, reconstruct each block, save, measure, report.

The *dense stream* is what the untouched model computes; the *sparse stream* is what it computes with all earlier
blocks pruned and reconstructed.
"""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lit_prune.data import CalibrationText, EvaluationText, Streams
from lit_prune.masking import Masking
from lit_prune.masks import NeuronMask, bits
from lit_prune.method import Pruning, Training
from lit_prune.metrics import describe
from lit_prune.models import (
    BlockCall,
    capture_calls,
    embed,
    find_blocks,
    linear_layers,
    load_model,
    save_model,
    slice_neurons,
    weight_of,
)
from lit_prune.modules import LanguageModel, block_needs
from lit_prune.plan import BlockPlan
from lit_prune.preflight import Loaded, prepare
from lit_prune.reporting import write_report
from lit_prune.reporting.board import Board
from lit_prune.resources import Stopwatch, peak_memory_bytes
from lit_prune.rounds import Round, make_rounds
from lit_prune.run_folder import RunFolder
from lit_prune.walk import MASK, Walk


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
        self.clock = Stopwatch(self.metrics.get("seconds"))
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
                loaded = prepare(self.pruning, self.data, self.evaluation, self.folder)
            self.folder.begin()
            self.metrics |= describe(self.pruning, self.data, self.evaluation) | self.metrics
            if self.evaluation.references:
                self._measure("dense", loaded.model)
            self._prune(loaded)
            with self.clock("save"):
                self._save(loaded)
            self._measure("pruned", loaded.model.float())  # type: ignore[no-untyped-call]
            if not self.pruning.changes_weights:
                self.metrics["perplexity"]["masked"] = self.metrics["perplexity"]["pruned"]
            elif self.evaluation.references:
                self._measure("masked", self._masked_only(loaded))
        self._save_metrics()
        self.board.summarise(self.metrics)
        write_report(self.metrics, self.folder.config, self.folder.path / "report.html")
        self.folder.finish()
        return self.metrics

    def _prune(self, loaded: Loaded) -> None:
        """Lead both streams through the model and leave every block pruned and reconstructed behind."""
        pruning, folder = self.pruning, self.folder
        with self.clock("advance"):
            calls = capture_calls(loaded.model, loaded.blocks, self.data.tokens)
            hidden = embed(loaded.model, loaded.blocks, self.data.tokens)
            streams = Streams(hidden, {0: hidden.clone()}, len(self.data.calibration), self.data.observed)
        with self.clock("statistics"):
            plans = self._allocate(loaded, calls, hidden[: streams.observed])
            masking = Masking(pruning, plans, folder, self._device)
            masking.gradients_of_language_model(
                loaded, calls, self.data.tokens[: streams.observed], self.data.batch_size
            )
        with tqdm(total=len(calls), desc="pruning", unit="block", dynamic_ncols=True) as bar:
            walk = Walk(
                pruning,
                self.training,
                masking,
                streams,
                loaded.blocks,
                calls,
                loaded.dtype,
                self.data.batch_size,
                self.clock,
                self.board,
                bar.set_postfix,
                self.metrics,
            )
            walk.restore(folder.load_block, folder.done, folder.entered)
            bar.update(folder.done)
            for round_ in make_rounds(len(calls), pruning.window_width, pruning.window_stride)[folder.rounds :]:
                L.seed_everything(self.training.seed + round_.index, verbose=False)
                for index in round_.entering:
                    walk.enter(round_, index)
                walk.train(round_)
                final = walk.finish(round_)
                with self.clock("save"):
                    self._commit(round_, final, walk.pending(round_))
                bar.update(len(final))

    def _allocate(self, loaded: Loaded, calls: list[BlockCall], hidden: Tensor) -> list[BlockPlan]:
        """Share the sparsity out among the blocks, by what each of them needs of it on the dense stream."""
        allocation, total = self.pruning.allocation, self.pruning.sparsity
        allotted = [plan for plan in loaded.plans if plan.free]
        if allocation is None or not allotted:
            return loaded.plans
        if self.metrics["allocation"] is None:
            free = [plan.free for plan in loaded.plans]
            needs = block_needs(allocation, loaded.blocks, calls, free, hidden, total, self._device)
            sizes = [plan.free_weights for plan in allotted]
            shares = dict(
                zip((p.name for p in allotted), allocation.shares(needs, sizes, float(total.share)), strict=True)
            )
            self.metrics["allocation"] = shares
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
        blocks = [figures for figures in self.metrics["blocks"] if figures["error"]["after"] is not None]
        if final:
            weights = sum(b["weights"] for b in blocks)
            self.metrics["sparsity"] = sum(b["zeros"] for b in blocks) / weights if weights else None
            self.metrics["error"] = blocks[-1]["error"]["after"]
        self._save_metrics()
        for index in final:
            self.board.block(self.metrics["blocks"][index])
        self.folder.save_round(round_.index, final, pending)

    def _save(self, loaded: Loaded) -> None:
        """Write the result, without the neurons that a mask has taken out if they are to go for good."""
        parameters = {"dense": loaded.model.num_parameters()}
        if isinstance(self.pruning.mask, NeuronMask) and self.pruning.mask.slice:
            readers = [plan.neurons.reader for plan in loaded.plans if plan.neurons]
            masks = [self.folder.load_block(index)[MASK + name] for index, name in enumerate(readers)]
            layers = [linear_layers(block)[name] for block, name in zip(loaded.blocks, readers, strict=True)]
            shapes = [weight_of(layer).shape for layer in layers]
            kept = [bits.unpack(mask, shape)[0] for mask, shape in zip(masks, shapes, strict=True)]
            slice_neurons(loaded.model, loaded.blocks, kept)
        self.metrics["parameters"] = parameters | {"saved": loaded.model.num_parameters()}
        save_model(loaded.model, loaded.tokenizer, loaded.dtype, self.folder.path / "model")

    def _masked_only(self, loaded: Loaded) -> PreTrainedModel:
        """The dense model under this run's masks: all that reconstruction has changed is taken back."""
        model = load_model(loaded.path)
        for index, block in enumerate(find_blocks(model)):
            tensors = self.folder.load_block(index)
            for name, layer in linear_layers(block).items():
                if (mask := tensors.get(MASK + name)) is not None:
                    weight = weight_of(layer)
                    weight.mul_(bits.unpack(mask, weight.shape))
        return model

    def _measure(self, stage: str, model: PreTrainedModel) -> None:
        """Perplexity on every text, unless an interrupted run has measured it."""
        if not self.evaluation.names or self.metrics["perplexity"][stage]:
            return
        with self.clock("evaluate"):
            module = LanguageModel(model, self.evaluation.names)
            trainer = self.training.trainer_for(logger=False)
            trainer.test(module, self.evaluation.test_dataloader(), verbose=False)
            self.metrics["perplexity"][stage] = module.perplexity
        self._save_metrics()

    def _save_metrics(self) -> None:
        self.metrics["seconds"] |= self.clock.seconds
        self.metrics["peak_memory_bytes"] = peak_memory_bytes()
        self.folder.save_metrics()
