"""The main job: prune a language model block by block, reconstruct each block, save, measure, report.

The *dense stream* is what the untouched model computes; the *sparse stream* is what it computes with all earlier
blocks pruned and reconstructed.
"""

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lit_prune import __version__
from lit_prune.data import CalibrationText, EvaluationText, ReconstructionPairs, Streams, propagate
from lit_prune.masks import bits
from lit_prune.method import Pruning, Training
from lit_prune.models import (
    BlockCall,
    capture_calls,
    embed,
    find_blocks,
    linear_layers,
    load_model,
    save_model,
    weight_of,
)
from lit_prune.modules import (
    BlockReconstruction,
    GlobalPropagation,
    KeepBest,
    LanguageModel,
    LossHistory,
    Reconstruction,
    observe,
    prune_layers,
)
from lit_prune.preflight import Loaded, prepare
from lit_prune.reporting import write_report
from lit_prune.reporting.board import Board
from lit_prune.resources import Stopwatch, peak_memory_bytes
from lit_prune.run_folder import RunFolder

STAGES = ("load", "statistics", "mask", "reconstruct", "advance", "save", "evaluate", "total")
MASK = "mask:"
"""Prefix of a layer's packed mask among the tensors of a finished block."""


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
            self._measure("dense", loaded.model)
            self._prune(loaded)
            with self.clock("save"):
                save_model(loaded.model, loaded.tokenizer, loaded.dtype, self.folder.path / "model")
            self._measure("pruned", loaded.model.float())  # type: ignore[no-untyped-call]
            if self.pruning.reconstruction == "none":
                self.metrics["perplexity"]["masked"] = self.metrics["perplexity"]["pruned"]
            else:
                self._measure("masked", self._masked_only(loaded))
        self._save_metrics()
        self.board.summarise(self.metrics)
        write_report(self.metrics, self.folder.config, self.folder.path / "report.html")
        self.folder.finish()
        return self.metrics

    def _prune(self, loaded: Loaded) -> None:
        """Lead both streams through the model and leave every block pruned and reconstructed behind."""
        with self.clock("advance"):
            calls = capture_calls(loaded.model, loaded.blocks, self.data.tokens)
            hidden = embed(loaded.model, loaded.blocks, self.data.tokens)
            streams = Streams(sparse=hidden, dense=hidden.clone(), samples=self.data.samples)
        with tqdm(total=len(calls), desc="pruning", unit="block", dynamic_ncols=True) as bar:
            for index, (block, call) in enumerate(zip(loaded.blocks, calls, strict=True)):
                unit = self._unit(block, call)
                if index < self.folder.done:
                    self._restore_block(index, unit, block, streams)
                else:
                    L.seed_everything(self.training.seed + index, verbose=False)
                    self._prune_block(index, unit, block, streams, loaded.dtype, bar.set_postfix)
                bar.update()

    def _unit(self, block: nn.Module, call: BlockCall) -> Reconstruction:
        unit = BlockReconstruction(block, call, None, self.training.optimizer, self.training.lr_scheduler)
        return GlobalPropagation(unit) if self.pruning.global_propagation else unit

    def _prune_block(
        self,
        index: int,
        unit: Reconstruction,
        block: nn.Module,
        streams: Streams,
        dtype: torch.dtype,
        show: Callable[[dict[str, float]], None],
    ) -> None:
        """Statistics, mask, reconstruction, advance, commit."""
        start = time.perf_counter()
        best, history = KeepBest(), LossHistory(show)
        trainer = self.training.trainer_for(
            callbacks=[best, history], logger=self.board.run(f"block_{index:02d}"), num_sanity_val_steps=-1
        )
        device = trainer.strategy.root_device
        layers = linear_layers(block)
        unit.to(device)

        with self.clock("statistics"), observe(layers, self.pruning.mask) as statistics:
            on_sparse = propagate(unit, streams.calibration, device)
        with self.clock("advance"):
            if not self.pruning.global_propagation:  # the held-out targets, which no statistic may see
                on_sparse = torch.cat([on_sparse, propagate(unit, streams.held_out, device)])
            propagate(unit, streams.dense, device, out=streams.dense)
        with self.clock("mask"):
            masks = prune_layers(layers, statistics, self.pruning.mask, self.pruning.sparsity)
            unit.fix(masks)
        before = None
        if self.pruning.reconstruction != "none":
            with self.clock("advance"):
                before = streams.error_after(unit, device)
            with self.clock("reconstruct"):
                targets = unit.target(on_sparse, streams.dense)
                pairs = ReconstructionPairs(streams.sparse, targets, streams.samples, self.data.batch_size)
                trainer.fit(unit, datamodule=pairs)
                unit.to(device)  # Lightning has taken it back to the CPU
        with self.clock("advance"):
            _round(block, dtype)
            propagate(unit, streams.sparse, device, out=streams.sparse)
            after = streams.error()
        unit.cpu()

        with self.clock("save"):
            self._commit(
                block,
                masks,
                dtype,
                {
                    "index": index,
                    **_zeros(layers),
                    "error": {"before": (before or after).calibration, "after": after.calibration},
                    "validation_error": {"before": (before or after).held_out, "after": after.held_out},
                    "loss": {"train": history.train, "held_out": history.held_out},
                    "best_epoch": best.best_epoch,
                    "seconds": time.perf_counter() - start,
                },
            )

    def _commit(self, block: nn.Module, masks: dict[str, Tensor], dtype: torch.dtype, figures: dict[str, Any]) -> None:
        """Write a finished block, its masks and its figures; from here on the run need not do it again."""
        blocks = self.metrics["blocks"]
        blocks.append(figures)
        self.metrics["sparsity"] = sum(b["zeros"] for b in blocks) / sum(b["weights"] for b in blocks)
        self.metrics["error"] = figures["error"]["after"]
        self._save_metrics()
        self.board.block(figures)
        tensors = {name: tensor.to(dtype) for name, tensor in block.state_dict().items()}
        tensors |= {MASK + name: bits.pack(mask) for name, mask in masks.items()}
        self.folder.save_block(figures["index"], tensors)

    def _restore_block(self, index: int, unit: Reconstruction, block: nn.Module, streams: Streams) -> None:
        """Put a block that an interrupted run has finished in its place, and lead both streams past it."""
        with self.clock("advance"):
            propagate(unit, streams.dense, out=streams.dense)
            tensors = self.folder.load_block(index)
            block.load_state_dict({name: t for name, t in tensors.items() if not name.startswith(MASK)})
            propagate(unit, streams.sparse, out=streams.sparse)

    def _masked_only(self, loaded: Loaded) -> PreTrainedModel:
        """The dense model under this run's masks: all that reconstruction has changed is taken back."""
        model = load_model(loaded.path)
        for index, block in enumerate(find_blocks(model)):
            tensors = self.folder.load_block(index)
            for name, layer in linear_layers(block).items():
                weight = weight_of(layer)
                weight.mul_(bits.unpack(tensors[MASK + name], weight.shape))
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


def describe(pruning: Pruning, data: CalibrationText, evaluation: EvaluationText) -> dict[str, Any]:
    """The metrics of a run that has measured nothing yet."""
    return {
        "checkpoint": pruning.checkpoint,
        "method": {
            "mask": type(pruning.mask).__name__,
            "reconstruction": pruning.reconstruction,
            "global_propagation": pruning.global_propagation,
            "sparsity": str(pruning.sparsity),
        },
        "calibration": {
            "source": data.source,
            "samples": data.samples,
            "validation_samples": data.validation_samples,
            "sequence_length": data.sequence_length,
        },
        "sparsity": None,
        "blocks": [],
        "error": None,
        "seconds": dict.fromkeys(STAGES),
        "peak_memory_bytes": {"host": None, "device": None},
        "perplexity": {"dense": None, "masked": None, "pruned": None},
        "perplexity_convention": evaluation.conventions,
        "versions": {"lit_prune": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "lightning", "transformers", "safetensors")},
    }


def _round(block: nn.Module, dtype: torch.dtype) -> None:
    """Round a block's weights to what will be stored, so that every later figure is that of the stored model."""
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.copy_(tensor.to(dtype))


def _zeros(layers: dict[str, nn.Module]) -> dict[str, Any]:
    weights = sum(weight_of(layer).numel() for layer in layers.values())
    zeros = sum(int((weight_of(layer) == 0).sum()) for layer in layers.values())
    return {"weights": weights, "zeros": zeros, "sparsity": zeros / weights}
