"""Everything that can be known to fail is looked for here, before any long work starts."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lit_prune import ranks
from lit_prune.data import CalibrationText, EvaluationText, ReconstructionPairs, Share, share
from lit_prune.errors import BadInput, reason
from lit_prune.heap import give_back
from lit_prune.masks import GBLM, InputStatistic, NeuronMask
from lit_prune.method import Pruning, Training, refusals
from lit_prune.models import (
    BlockCall,
    Home,
    Offloaded,
    Window,
    capture_calls,
    embed,
    find_blocks,
    halves,
    load_config,
    load_model,
    load_offloaded,
    load_tokenizer,
    parameters,
    resolve,
    stored_dtype,
)
from lit_prune.modules import Reconstruction, available_memory, whole_model_memory
from lit_prune.needs import Needs, estimate, process_memory, stream_memory, training_memory
from lit_prune.plan import BlockPlan, make_plan
from lit_prune.run_folder import RunFolder, require_space

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
MOST_OF_MEMORY = 0.7
"""A model that takes more than this share of the free memory is left on disk: streams and training need some too."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be pruned: float32, on the CPU or still on disk, in evaluation mode."""

    path: str
    home: Home
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    plans: list[BlockPlan]
    needs: Needs
    share: Share

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.home.model

    @property
    def blocks(self) -> nn.ModuleList:
        """Its blocks."""
        return self.home.blocks


def prepare(
    pruning: Pruning, data: CalibrationText, evaluation: EvaluationText, training: Training, folder: RunFolder
) -> Loaded:
    """Load the model and the texts, and check on every rank that the whole run can work; nothing is written.

    Raises:
        BadInput: it cannot; the cheapest checks come first.
    """
    # by themselves, since in the trial training ranks wait for each other, and a file may be missing on one node alone
    ranks.agreed(lambda: _check_settings(pruning, data, evaluation))
    return ranks.agreed(lambda: _loaded(pruning, data, evaluation, training, folder))


def _check_settings(pruning: Pruning, data: CalibrationText, evaluation: EvaluationText) -> None:
    data.check()
    evaluation.check()
    _check_reconstruction(pruning)


def _loaded(
    pruning: Pruning, data: CalibrationText, evaluation: EvaluationText, training: Training, folder: RunFolder
) -> Loaded:
    _check_training(pruning, data, training)
    path = resolve(pruning.checkpoint)
    config = load_config(path)
    _check_positions(config, data, evaluation)
    _check_width(pruning, getattr(config.get_text_config(), "num_hidden_layers", None))
    data.tokenizer = evaluation.tokenizer = load_tokenizer(path)
    evaluation.window_length = evaluation.window_length or data.sequence_length
    data.setup()
    folder.keep_to(data.tokens_sha256)
    together = InputStatistic.chunk // math.gcd(InputStatistic.chunk, data.sequence_length)
    mine = share(data.observed, len(data.calibration), len(data.tokens), together)
    evaluation.setup()
    give_back()  # what reading texts has left
    dtype = stored_dtype(config)
    trainer = training.trainer_for(logger=False)
    device, processes = trainer.strategy.root_device, trainer.num_devices
    home = open_model(path, offloads(pruning.offload, path, processes))
    held = process_memory()
    check_vocabulary(home.model, [data.tokens, *evaluation.tokens])
    plans = make_plan(pruning, home)
    with home.outside(CPU), home.on(0, CPU):
        calls = capture_calls(home.model, home.blocks, data.tokens)
        entering = embed(home.model, home.blocks, data.tokens[:1])
    _check_parts(pruning, home, calls, entering)
    with home.on(0, CPU):
        sequences = len(data.tokens if pruning.has_independent_blocks else mine.rows)
        what = pruning, data, evaluation, home, calls[0], entering
        needs = estimate(*what, dtype, held, device, sequences, processes)
        _check_memory(*what, device, sequences, needs, processes)
    if (free := available_memory(CPU) // processes) < needs.more:
        each = f" for each of {processes} processes" if processes > 1 else ""
        ways = ["no model.true_sequential"] if pruning.true_sequential else []
        ways += [] if isinstance(home, Offloaded) else ["model.offload true"]
        raise BadInput(
            f"model.offload: the run needs about {needs.memory / 1e9:.2f} GB of memory, {needs.more / 1e9:.2f} GB more "
            f"than it holds, but {free / 1e9:.2f} GB are free{each}; give {', '.join([*ways, 'fewer data.samples'])}, "
            "or fewer evaluation.windows."
        )
    if needs.device is not None and available_memory(device) < needs.device:
        first = "no model.true_sequential, fewer data.samples" if pruning.true_sequential else "a lower data.batch_size"
        raise BadInput(
            f"trainer.accelerator: the run needs about {needs.device / 1e9:.2f} GB of memory on {device}, but "
            f"{available_memory(device) / 1e9:.2f} GB are free; give {first}, "
            "a shorter data.sequence_length or evaluation.window_length, or a smaller model.window."
        )
    if not folder.finished:
        require_space(folder.path, needs.disk)
    return Loaded(path, home, data.tokenizer, dtype, plans, needs, mine)


def open_model(path: str, offload: bool) -> Home:
    """A resolved checkpoint's model, in memory or left on disk."""
    if offload:
        return load_offloaded(path)
    model = load_model(path)
    return Home(model, find_blocks(model))


def offloads(asked: bool | None, path: str, models: int = 1) -> bool:
    """Whether weights stay on disk; where nobody has said so, whether they would take most of the free memory.

    Args:
        asked: what the user said, if anything.
        path: of a resolved checkpoint.
        models: how many of that size are needed at once.
    """
    if asked is not None:
        return asked
    needed, free = models * 4 * parameters(path), available_memory(CPU)
    if needed > MOST_OF_MEMORY * free:
        log.warning(
            "The model needs %.1f GB in float32 and %.1f GB are free: its weights stay on disk, and one window of "
            "blocks at a time is in memory (model.offload).",
            needed / 1e9,
            free / 1e9,
        )
        return True
    return False


def _check_reconstruction(pruning: Pruning) -> None:
    """Settings that contradict each other, or that nothing would come of."""
    form, trained = pruning.reconstruction, pruning.trained
    of_windows = form == "cross_block", f"model.reconstruction {form} trains no windows of blocks; give cross_block"
    of_adapters = trained == "adapters", f"model.trained {trained} trains no adapters; give adapters"
    for key, (used, why) in {"window": of_windows, "stride": of_windows, "rank": of_adapters}.items():
        if (value := getattr(pruning, key)) < 1:
            raise BadInput(f"model.{key}: {value} is too few; give at least 1.")
        if not used and value != getattr(Pruning, key):
            raise BadInput(f"model.{key}: {value} is given, but {why}, or no model.{key}.")
    if pruning.true_sequential:
        _check_sequential(pruning)
    if pruning.window_stride > pruning.window_width:
        raise BadInput(
            f"model.stride: a window of {pruning.window} blocks that moves on by {pruning.stride} leaves blocks out; "
            f"give at most {pruning.window}."
        )
    if pruning.compile and pruning.reconstruction not in ("block", "cross_block"):
        raise BadInput(
            f"model.compile: whole blocks are compiled, but model.reconstruction {pruning.reconstruction} trains none; "
            "give block or cross_block, or no model.compile."
        )


def _check_sequential(pruning: Pruning) -> None:
    mask, why = type(pruning.mask).__name__, "model.true_sequential: layers are pruned while the sparse stream passes"
    if pruning.reconstruction != "none":
        raise BadInput(
            f"{why}, before anything is trained, but model.reconstruction {pruning.reconstruction} is given; give "
            "model.reconstruction none, or no model.true_sequential."
        )
    if pruning.independent:
        raise BadInput(f"{why}, but with model.independent masks see the dense stream; leave one of them out.")
    if isinstance(pruning.mask, NeuronMask):
        raise BadInput(f"{why}, but {mask} prunes several layers at once; leave model.true_sequential out.")
    if not pruning.observes:
        raise BadInput(f"{why}, but {mask} looks at nothing of it; leave model.true_sequential out.")


def _check_training(pruning: Pruning, data: CalibrationText, training: Training) -> None:
    """Train something tiny for a while: what Lightning, the optimiser or the schedule refuses shows here."""
    with refusals():
        trainer = training.trainer_for(logger=False, callbacks=[_Shortened()])
        if pruning.reconstruction != "none":
            with torch.random.fork_rng(devices=[]):
                _train_something(trainer, pruning, data, training)
    if pruning.compile:
        _check_compiler(trainer.strategy.root_device)
    in_steps = pruning.reconstruction != "none" and not pruning.has_independent_blocks
    if in_steps and data.batch_size < ranks.count() and ranks.rank() == 0:
        log.warning(
            "A training step takes %d sequences, for %d devices: give a larger data.batch_size, or model.independent "
            "true, or most of them wait.",
            data.batch_size,
            ranks.count(),
        )
    if pruning.reconstruction != "none" and not trainer.global_step:
        raise BadInput("trainer: with these settings nothing is trained; give model.reconstruction none instead.")


def _check_compiler(device: torch.device) -> None:
    """Compile something tiny, whose backward pass needs all that a block's will."""
    if device.type == "hpu":
        raise BadInput("model.compile: on a Gaudi blocks are compiled by its own strategy; leave it out.")
    numbers = torch.randn(8, device=device, requires_grad=True)
    try:
        torch.autograd.grad(torch.compile(_something)(numbers), numbers)
    except Exception as error:  # of kinds that depend on what is missing
        raise BadInput(f"model.compile: torch.compile does not work here ({reason(error)}); give false.") from error


def _something(numbers: Tensor) -> Tensor:
    return (numbers.sin() * numbers).sum()


def _train_something(trainer: L.Trainer, pruning: Pruning, data: CalibrationText, training: Training) -> None:
    """A layer of 4 x 4 weights and its norm, with as many samples as the blocks will have."""
    layer = nn.Linear(4, 4)
    part = Window([nn.Sequential(nn.LayerNorm(4), layer)], [BlockCall((), {})])
    masks: dict[nn.Module, Tensor] = {layer: torch.ones(4, 4, dtype=torch.bool)}
    optimizer, decay = training.optimizer, training.lr_scheduler
    module = Reconstruction(part, masks, optimizer, decay, pruning.loss, pruning.trained, pruning.rank)
    samples = data.samples + data.self_generated_samples
    hidden = torch.randn(samples + data.validation_samples, 1, 4)
    trainer.fit(module, datamodule=ReconstructionPairs(hidden, hidden, samples, data.batch_size))


class _Shortened(L.Callback):
    """Ends a training after its first epoch, or where that is long after a thousand batches, which take seconds."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.is_last_batch or batch_idx >= 1000


def _check_parts(pruning: Pruning, home: Home, calls: list[BlockCall], entering: Tensor) -> None:
    """Whether the blocks can be put together to windows, or cut into halves."""
    blocks = home.blocks
    _check_width(pruning, len(blocks))  # which not every configuration counts
    if pruning.reconstruction == "sublayer":
        tried: set[type[nn.Module]] = set()
        for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
            if type(block) not in tried:  # a pass through every block of a large model would be long work
                with home.on(index, CPU):
                    halves(block, call, entering, f"block {index}")
                tried.add(type(block))


def _check_width(pruning: Pruning, blocks: int | None) -> None:
    if blocks is not None and pruning.window_width > blocks:
        raise BadInput(f"model.window: {pruning.window} is more than the model's {blocks} blocks; give fewer.")


def _check_memory(
    pruning: Pruning,
    data: CalibrationText,
    evaluation: EvaluationText,
    home: Home,
    call: BlockCall,
    entering: Tensor,
    device: torch.device,
    sequences: int,
    needs: Needs,
    processes: int,
) -> None:
    """Whether backward passes fit into memory, if they take place on the host; block 0 is there to be measured."""
    of_model = isinstance(pruning.mask, GBLM) and pruning.mask.backward == "model"
    if of_model and isinstance(home, Offloaded):
        raise BadInput(
            "model.mask: GBLM with backward 'model' needs the whole model in memory, but model.offload leaves it "
            "on disk; give backward 'blocks', which finds the same gradients block by block."
        )
    if device.type != "cpu":
        return
    model, blocks, free = home.model, home.blocks, available_memory(CPU) // processes
    if of_model:
        loaded = sum(p.nbytes for p in model.parameters())  # which is counted as needed, but lies there already
        batch = min(data.batch_size, data.observed)
        needed = whole_model_memory(model, blocks, call, entering, batch) - loaded
        if needed > free:
            raise BadInput(
                f"model.mask: GBLM with backward 'model' needs {needed / 1e9:.2f} GB of memory beside the model, but "
                f"{free / 1e9:.2f} GB are free; give backward 'blocks', which finds the same gradients block by block, "
                "or a lower data.batch_size."
            )
    if pruning.reconstruction != "none":

        def beside(choice: Pruning) -> int:
            training = sum(training_memory(choice, home, call, entering, data.batch_size))
            streams = stream_memory(choice, evaluation.errors, home, entering, sequences)
            return training + (streams if needs.streams == "memory" else 0)

        if (needed := beside(pruning)) > free:
            width = pruning.window_width
            ways = ["a smaller model.window"] if width > 1 else []
            for way, leaner in _leaner(pruning):
                with suppress(BadInput):  # blocks that cannot be cut into halves: no way out
                    if (less := beside(leaner)) < needed:
                        ways.append(f"{way} ({less / 1e9:.2f} GB)")
            ways += ["fewer data.samples", "or a lower data.batch_size"]
            raise BadInput(
                f"model.reconstruction: {pruning.reconstruction} needs {needed / 1e9:.2f} GB of memory for "
                f"{width} block{'s' if width > 1 else ''} at a time, but {free / 1e9:.2f} GB are free; give "
                f"{', '.join(ways)}."
            )


def _leaner(pruning: Pruning) -> Iterator[tuple[str, Pruning]]:
    """Choices that train fewer numbers at a time, and the settings that say so."""
    yield "model.trained adapters", replace(pruning, trained="adapters")
    yield "model.reconstruction sublayer", replace(pruning, reconstruction="sublayer")
    yield "model.reconstruction layer", replace(pruning, reconstruction="layer")


def check_vocabulary(model: PreTrainedModel, tokens: Sequence[Tensor]) -> None:
    """Whether the model has embeddings for all tokens.

    Raises:
        BadInput: it has not.
    """
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings.weight, Tensor)
    rows = len(embeddings.weight)
    highest = max((int(some.max()) for some in tokens), default=0)
    if highest >= rows:
        raise BadInput(
            f"model.checkpoint: its tokenizer makes tokens up to {highest}, but the model has embeddings for {rows}; "
            "give the tokenizer that belongs to the model."
        )


def _check_positions(config: PreTrainedConfig, data: CalibrationText, evaluation: EvaluationText) -> None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = {
        "data.sequence_length": data.sequence_length,
        "evaluation.window_length": evaluation.window_length if evaluation.texts else None,
    }
    for key, length in lengths.items():
        if positions is not None and length is not None and length > positions:
            raise BadInput(f"{key}: {length} is more than the model's {positions} positions; give at most that.")
