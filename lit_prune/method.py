"""What a run does: the settings of `lit-prune fit` beside data, trainer and evaluation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lit_prune.accelerators import SingleHPUStrategy
from lit_prune.errors import BadInput
from lit_prune.masks import Allocation, MaskMethod, Sparsity, Wanda
from lit_prune.masks.solvers import Solver
from lit_prune.models import BlockCall, Part, Window, halves, layers_in_order
from lit_prune.modules.reconstruction import (
    Decay,
    Loss,
    OptimizerFactory,
    SchedulerFactory,
    Trained,
    paper_optimizer,
)

CUTS = {"layer": layers_in_order, "sublayer": halves}
"""How forms of reconstruction cut a block into parts."""


@dataclass(frozen=True)
class Pruning:
    """What is pruned, by which mask, and how it is reconstructed.

    Attributes:
        checkpoint: a hub id, a local Hugging Face folder, a .gguf file, or a published file (package://...).
        sparsity: the share of weights to remove, such as 0.5, or n:m such as 2:4, which keeps n of every m.
        mask: the mask method by class, such as Wanda, SparseGPT or ADMM.
        solver: updates the weights that the mask leaves, by class: ADMM or ConjugateGradient; none by default.
        skip: layers left dense, by a pattern of their full names, or several, such as *.k_proj or model.layers.0.*
        sparsities: other sparsities for layers, by patterns of their full names; the last that matches counts.
        allocation: how the sparsity is shared out among blocks, by class: OWL or ByError; uniformly by default.
        offload: leave weights on disk until they are needed, one window of blocks at a time; by default whether the
            model does not fit into memory.
        true_sequential: prune each layer by what it gets from those of its block that are pruned already, as GPTQ does
            by that name, in the one pass that leads on; by default statistics are those of the dense block, and so are
            gradients either way. Takes more memory; only with reconstruction none, and not with independent.
        reconstruction: what is trained at a time: `none`; `layer`, one linear layer; `sublayer`, attention or MLP;
            `block` (BR); `cross_block` (CR), a window of blocks.
        window: how many blocks cross_block trains together; other forms take no window.
        stride: by how many blocks the window of cross_block moves on, at most as many as it holds.
        global_propagation: train towards the dense model's own stream (GP), not the dense part on the sparse stream; of
            no effect with independent.
        independent: a propagation of its own, in the place of global_propagation: train on the dense model's own stream
            and towards it, and let masks and solvers see it, so that no part depends on what came of those before.
        loss: `mse`; `relative`, each token's squared error as a share of its target's energy; or `cosine`, one minus
            each token's cosine similarity. What callbacks and schedules monitor is reconstruction_loss/train and, if
            there is held-out text, reconstruction_loss/held_out.
        trained: `all` that a part is made of; `pruned`, the kept weights of pruned layers; `pruned_norms_biases`, these
            and all norms and biases of the part; or `adapters`, a low-rank change of the pruned layers under their
            masks.
        rank: of the adapters; what else is trained takes no rank.
        compile: let torch.compile make one program of a block for its training, which serves all blocks like it.
    """

    checkpoint: str
    sparsity: Sparsity
    mask: MaskMethod = field(default_factory=Wanda)
    solver: Solver | None = None
    skip: str | list[str] = field(default_factory=list)
    sparsities: dict[str, Sparsity] = field(default_factory=dict)
    allocation: Allocation | None = None
    offload: bool | None = None
    true_sequential: bool = False
    reconstruction: Literal["none", "layer", "sublayer", "block", "cross_block"] = "block"
    window: int = 2
    stride: int = 1
    global_propagation: bool = True
    independent: bool = False
    loss: Loss = "mse"
    trained: Trained = "all"
    rank: int = 16
    compile: bool = False

    @property
    def skipped(self) -> list[str]:
        """The patterns of layers left dense."""
        return [self.skip] if isinstance(self.skip, str) else self.skip

    @property
    def window_width(self) -> int:
        """How many blocks are trained together."""
        return self.window if self.reconstruction == "cross_block" else 1

    @property
    def window_stride(self) -> int:
        """By how many blocks the window moves on."""
        return self.stride if self.reconstruction == "cross_block" else 1

    def parts(self, block: nn.Module, call: BlockCall, sample: Tensor) -> list[Part]:
        """What of a block is trained at a time, as one of a window; `sample` enters it, shape (1, sequence, width).

        Raises:
            BadInput: the block cannot be cut into halves.
        """
        cut = CUTS.get(self.reconstruction)
        return cut(block, call, sample) if cut else [Window([block], [call])]

    @property
    def observes(self) -> bool:
        """Whether mask or solver have to know of a layer's inputs."""
        return self.mask.statistic is not None or self.solver is not None

    @property
    def learns_from_one_pass(self) -> bool:
        """Whether the pass through a block for its statistics gives what it is trained towards, too."""
        return self.reconstruction == "block" and not self.global_propagation and not self.independent

    @property
    def keeps_dense_blocks(self) -> bool:
        """Whether blocks are needed as they were after they have been pruned: as targets made later."""
        late = self.reconstruction == "cross_block" and not self.global_propagation and not self.independent
        return late or self.reconstruction in ("layer", "sublayer")

    def leads_dense_stream(self, errors: bool) -> bool:
        """Whether what the untouched model computes between its blocks is needed, be it to measure their errors."""
        return errors or self.independent or (self.global_propagation and self.reconstruction != "none")

    @property
    def prunes_by_sparse_stream(self) -> bool:
        """Whether mask or solver have to know what the pruned model computes between its blocks."""
        return (self.observes or self.mask.gradient == "block") and not self.independent

    def leads_sparse_stream(self, errors: bool) -> bool:
        """Whether what the pruned model computes between its blocks is needed, be it to measure their errors."""
        return errors or self.prunes_by_sparse_stream or (self.reconstruction != "none" and not self.independent)

    @property
    def has_independent_blocks(self) -> bool:
        """Whether each block is trained once, by what does not depend on how others are."""
        return self.independent and self.reconstruction in ("layer", "sublayer", "block")

    @property
    def changes_weights(self) -> bool:
        """Whether weights that the mask leaves are changed by anything at all."""
        return self.mask.updates or self.solver is not None or self.reconstruction != "none"


@dataclass(frozen=True)
class Training:
    """How a unit is trained.

    Attributes:
        trainer: makes a fresh Trainer; keyword arguments override the user's.
        optimizer: makes the optimiser from a unit's parameters.
        lr_scheduler: see `Reconstruction`.
        seed: of the whole run; every block derives its own from it, so that it does not matter what ran before.
    """

    trainer: Callable[..., L.Trainer]
    optimizer: OptimizerFactory = paper_optimizer
    lr_scheduler: Decay | SchedulerFactory = "linear"
    seed: int = 0

    def trainer_for(self, **arguments: Any) -> L.Trainer:
        """A Trainer for one short job inside a run: silent, and saving nothing of its own."""
        silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        # sequences are shared out among ranks already
        return self.trainer(**silent, use_distributed_sampler=False, **arguments)

    def apart(self, device: torch.device) -> "Training":
        """The same on one device by itself."""
        strategy = SingleHPUStrategy.strategy_name if device.type == "hpu" else "auto"
        devices = 1 if device.index is None else [device.index]
        return replace(self, trainer=partial(self.trainer, devices=devices, num_nodes=1, strategy=strategy))


@contextmanager
def refusals() -> Iterator[None]:
    """Say in one sentence what Lightning, an optimiser or a schedule refuses.

    Raises:
        BadInput: it does.
    """
    try:
        yield
    except (MisconfigurationException, ArithmeticError, ValueError, TypeError, RuntimeError) as error:
        raise BadInput(f"trainer: {' '.join(str(error).split())}") from error
