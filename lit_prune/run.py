"""The main job: prune a language model block by block, reconstruct each block, save, measure, report.

The *dense stream* is what the untouched model computes; the *sparse stream* is what it computes with all earlier
blocks pruned and reconstructed.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from lit_prune.data import CalibrationText, EvaluationText, ReconstructionPairs, Streams, propagate
from lit_prune.masks import GBLM, GradientNorm, LayerMask, LayerStatistics, NeuronMask, bits
from lit_prune.method import Pruning, Training
from lit_prune.metrics import describe, zeros
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
from lit_prune.modules import (
    BlockReconstruction,
    GlobalPropagation,
    KeepBest,
    LanguageModel,
    LossHistory,
    Reconstruction,
    block_needs,
    blockwise_gradients,
    load_gradients,
    observe,
    prune_layers,
    prune_neurons,
    regional_gradients,
    save_gradients,
    whole_model_gradients,
)
from lit_prune.plan import BlockPlan
from lit_prune.preflight import Loaded, prepare
from lit_prune.reporting import write_report
from lit_prune.reporting.board import Board
from lit_prune.resources import Stopwatch, peak_memory_bytes
from lit_prune.run_folder import RunFolder

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
                self._save(loaded)
            self._measure("pruned", loaded.model.float())  # type: ignore[no-untyped-call]
            if self.pruning.changes_weights:
                self._measure("masked", self._masked_only(loaded))
            else:
                self.metrics["perplexity"]["masked"] = self.metrics["perplexity"]["pruned"]
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
        with self.clock("statistics"):
            plans = self._allocate(loaded, calls, streams.calibration)
            self._gradients_of_language_model(loaded, calls)
        with tqdm(total=len(calls), desc="pruning", unit="block", dynamic_ncols=True) as bar:
            for index, (block, call) in enumerate(zip(loaded.blocks, calls, strict=True)):
                unit = self._unit(block, call)
                if index < self.folder.done:
                    self._restore_block(index, unit, block, streams)
                else:
                    L.seed_everything(self.training.seed + index, verbose=False)
                    self._prune_block(index, plans[index], unit, block, streams, loaded.dtype, bar.set_postfix)
                bar.update()

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

    def _gradients_of_language_model(self, loaded: Loaded, calls: list[BlockCall]) -> None:
        """For GBLM: a file for each block, which also a resumed run reads, since the dense model is gone by then."""
        method = self.pruning.mask
        wanted = range(self.folder.done, len(calls))
        if not isinstance(method, GBLM) or all(self.folder.gradients(index).exists() for index in wanted):
            return
        model, blocks, tokens, size = loaded.model, loaded.blocks, self.data.calibration, self.data.batch_size
        found: Iterator[tuple[int, dict[str, GradientNorm]]]
        if method.backward == "model":
            gradients_of = whole_model_gradients(model, blocks, tokens, method.p, size, self._device)
            found = iter(enumerate(gradients_of))
        else:
            scratch = self.folder.path / "hidden"
            found = blockwise_gradients(model, blocks, calls, tokens, method.p, size, self._device, scratch)
        for index, gradients in found:
            save_gradients(self.folder.gradients(index), gradients)

    @property
    def _device(self) -> torch.device:
        return self.training.trainer_for(logger=False).strategy.root_device

    def _unit(self, block: nn.Module, call: BlockCall) -> Reconstruction:
        unit = BlockReconstruction(block, call, None, self.training.optimizer, self.training.lr_scheduler)
        return GlobalPropagation(unit) if self.pruning.global_propagation else unit

    def _prune_block(
        self,
        index: int,
        plan: BlockPlan,
        unit: Reconstruction,
        block: nn.Module,
        streams: Streams,
        dtype: torch.dtype,
        show: Callable[[dict[str, float]], None],
    ) -> None:
        """Statistics, mask and solved weights, reconstruction, advance, commit."""
        start = time.perf_counter()
        best, history = KeepBest(), LossHistory(show)
        trainer = self.training.trainer_for(
            callbacks=[best, history], logger=self.board.run(f"block_{index:02d}"), num_sanity_val_steps=-1
        )
        device = trainer.strategy.root_device
        layers = {name: layer for name, layer in linear_layers(block).items() if name in plan.sparsity}
        trained = self.pruning.reconstruction != "none" and bool(layers)
        unit.to(device)

        with self.clock("statistics"):
            statistics, on_sparse = self._observe(index, plan, unit, layers, streams, device)
        with self.clock("advance"):
            if not self.pruning.global_propagation:  # the held-out targets, which no statistic may see
                on_sparse = torch.cat([on_sparse, propagate(unit, streams.held_out, device)])
            propagate(unit, streams.dense, device, out=streams.dense)
        with self.clock("mask"):
            masks = self._mask(plan, layers, statistics)
            unit.fix(masks)
            del statistics
        before = None
        if trained:
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
                    **zeros(layers, masks),
                    "error": {"before": (before or after).calibration, "after": after.calibration},
                    "validation_error": {"before": (before or after).held_out, "after": after.held_out},
                    "loss": {"train": history.train, "held_out": history.held_out},
                    "best_epoch": best.best_epoch,
                    "seconds": time.perf_counter() - start,
                },
            )

    def _observe(
        self,
        index: int,
        plan: BlockPlan,
        unit: Reconstruction,
        layers: dict[str, nn.Module],
        streams: Streams,
        device: torch.device,
    ) -> tuple[dict[str, LayerStatistics], Tensor]:
        """What mask method and solver have to know of a block's layers; and the block's output on the sparse stream."""
        method, calibration = self.pruning.mask, streams.calibration
        watched = {plan.neurons.reader: layers[plan.neurons.reader]} if plan.neurons and layers else layers
        with observe(watched, method, self.pruning.solver, plan.name) as statistics:
            on_sparse = propagate(unit, calibration, device)
        if method.gradient is not None:
            if method.gradient == "block":
                gradients = regional_gradients(unit, layers, calibration, device=device)
            else:
                gradients = load_gradients(self.folder.gradients(index), method.p)
            statistics = {name: known._replace(gradient=gradients[name]) for name, known in statistics.items()}
        return statistics, on_sparse

    def _mask(
        self, plan: BlockPlan, layers: dict[str, nn.Module], statistics: dict[str, LayerStatistics]
    ) -> dict[str, Tensor]:
        """Prune a block's layers, or the neurons of its MLP, and solve for the weights that stay."""
        method, solver = self.pruning.mask, self.pruning.solver
        if not layers:
            return {}
        if isinstance(method, NeuronMask):
            assert plan.neurons is not None
            share = plan.sparsity[plan.neurons.reader]
            return prune_neurons(layers, plan.neurons, statistics, method, share, solver)
        assert isinstance(method, LayerMask)
        return prune_layers(layers, statistics, method, plan.sparsity, solver)

    def _commit(self, block: nn.Module, masks: dict[str, Tensor], dtype: torch.dtype, figures: dict[str, Any]) -> None:
        """Write a finished block, its masks and its figures; from here on the run need not do it again."""
        blocks = self.metrics["blocks"]
        blocks.append(figures)
        weights = sum(b["weights"] for b in blocks)
        self.metrics["sparsity"] = sum(b["zeros"] for b in blocks) / weights if weights else None
        self.metrics["error"] = figures["error"]["after"]
        self._save_metrics()
        self.board.block(figures)
        tensors = {name: tensor.to(dtype) for name, tensor in block.state_dict().items()}
        tensors |= {MASK + name: bits.pack(mask) for name, mask in masks.items()}
        self.folder.save_block(figures["index"], tensors)

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


def _round(block: nn.Module, dtype: torch.dtype) -> None:
    """Round a block's weights to what will be stored, so that every later figure is that of the stored model."""
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.copy_(tensor.to(dtype))
