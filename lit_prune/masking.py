"""One block's masks and solved weights, whatever a mask method has to know for them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lit_prune import ranks
from lit_prune.data import BATCH, lockstep, outputs, require_finite_layers
from lit_prune.data.transfer import storing
from lit_prune.errors import BadInput
from lit_prune.finite import all_finite
from lit_prune.heap import without_holes
from lit_prune.masks import GBLM, LayerMask, LayerStatistics, NeuronMask
from lit_prune.masks.statistics import NOTHING, GradientNorm, InputNorm
from lit_prune.method import Pruning
from lit_prune.models import BlockCall, left_out, linear_layers, watch_inputs
from lit_prune.modules import (
    blockwise_gradients,
    join,
    load_gradients,
    observe,
    prune_layers,
    prune_neurons,
    regional_gradients,
    save_gradients,
    sharing,
    whole_model_gradients,
)
from lit_prune.plan import BlockPlan
from lit_prune.preflight import Loaded
from lit_prune.run_folder import RunFolder

Kind = tuple[type[nn.Module], tuple[str, ...]]
"""Of blocks that compute alike: their class, and which of their layers matter."""


class Masking:
    """Statistics, masks and solved weights of one block after the other.

    Args:
        pruning: what is done to the model.
        plans: what is pruned of every block.
        folder: where the gradients of the language model lie until they are used.
        device: where to compute.
    """

    def __init__(self, pruning: Pruning, plans: list[BlockPlan], folder: RunFolder, device: torch.device) -> None:
        self.pruning = pruning
        self.plans = plans
        self.folder = folder
        self.device = device
        self._last: dict[Kind, str] = {}
        self._together: dict[Kind, Mapping[str, Sequence[str]]] = {}

    def gradients_of_language_model(self, loaded: Loaded, calls: list[BlockCall], tokens: Tensor, size: int) -> None:
        """For GBLM: a file for each block, which also a resumed run reads, since the dense model is gone by then.

        Args:
            loaded: the dense model.
            calls: its blocks' call arguments.
            tokens: the calibration samples, shape (samples, sequence).
            size: samples in one pass.
        """
        method, folder = self.pruning.mask, self.folder
        wanted = range(folder.entered, len(calls))
        if not isinstance(method, GBLM) or all(folder.gradients(index).exists() for index in wanted):
            return
        if method.backward == "model":
            of_model = whole_model_gradients(loaded.model, loaded.blocks, tokens, method.p, size, self.device)
            for index, gradients in enumerate(of_model):
                save_gradients(folder.gradients(index), gradients)
        else:
            scratch = folder.path / "hidden" / str(ranks.rank())
            walk = blockwise_gradients(loaded.home, calls, tokens, method.p, size, self.device, scratch)
            for index, gradients in walk:
                save_gradients(folder.gradients(index), gradients)

    def layers(self, index: int, block: nn.Module) -> dict[str, nn.Module]:
        """The layers of a block that are pruned, by name."""
        return {name: layer for name, layer in linear_layers(block).items() if name in self.plans[index].sparsity}

    def observe(
        self,
        index: int,
        block: nn.Module,
        forward: Callable[[Tensor], Tensor],
        hidden: Tensor,
        out: Tensor | None = None,
        let_go: Callable[[], None] = lambda: None,
        before: int = 0,
    ) -> Mapping[str, LayerStatistics]:
        """What mask method and solver have to know of a block's layers, by one pass through it.

        Args:
            index: the block's.
            block: the block.
            forward: from hidden states to hidden states.
            hidden: the calibration samples that enter it, shape (samples, sequence, width).
            out: takes the block's output, unless it is not needed.
            let_go: called when a batch has been dealt with.
            before: how many samples enter it on ranks of lower numbers.
        """
        plan, method, layers = self.plans[index], self.pruning.mask, self.layers(index, block)
        watched = {plan.neurons.reader: layers[plan.neurons.reader]} if plan.neurons and layers else layers
        if not self.pruning.observes:
            watched = {}
        tokens = before * hidden.shape[1]
        with ExitStack() as stack:
            statistics = stack.enter_context(observe(watched, method, self.pruning.solver, plan.name, tokens))
            store = stack.enter_context(storing())
            if out is None:
                stack.enter_context(self._last_left_out(block, watched, -(-len(hidden) // BATCH)))
            needed = watched or out is not None
            for rows, output in outputs(forward, hidden, self.device, let_go=let_go) if needed else ():
                if out is not None:
                    store(out[rows], output)
        self._join(statistics, forward, hidden)
        gradients = self._gradients(index, forward, layers, hidden)
        return statistics | {
            name: statistics.get(name, NOTHING)._replace(gradient=gradient) for name, gradient in gradients.items()
        }

    def _join(
        self, statistics: Mapping[str, LayerStatistics], forward: Callable[[Tensor], Tensor], hidden: Tensor
    ) -> None:
        """Count what has reached other ranks, too, and see that it is numbers, before a method fails by it.

        Each rank looks at its own first: in the sum of all it could not be told whose layer is to blame.

        Raises:
            NotFinite: it is not; tells which layer has put it out.
            BadInput: it is, but too large to be squared.
        """
        norms = [known.inputs for known in statistics.values() if isinstance(known.inputs, InputNorm)]
        if not all(inputs.finite for inputs in norms):
            require_finite_layers(forward, hidden, self.device)
        join(statistics)
        for inputs in norms:
            if not all_finite(inputs.norm):
                raise BadInput(
                    f"What enters layer '{inputs.name}' is so large that its squares are infinite in float32; give a "
                    "sound checkpoint."
                )

    def _gradients(
        self, index: int, forward: Callable[[Tensor], Tensor], layers: Mapping[str, nn.Module], hidden: Tensor
    ) -> Mapping[str, GradientNorm]:
        """What the mask method has to know of gradients, by layer name; nothing of most methods."""
        method = self.pruning.mask
        if method.gradient is None:
            return {}
        if method.gradient != "block":
            return load_gradients(self.folder.gradients(index), method.p)
        with without_holes():
            gradients = regional_gradients(forward, layers, hidden, device=self.device)
        for norm in gradients.values():
            norm.join()
        return gradients

    def arrivals(
        self,
        index: int,
        block: nn.Module,
        forward: Callable[[Tensor], Tensor],
        hidden: Tensor,
        let_go: Callable[[], None] = lambda: None,
        before: int = 0,
    ) -> Iterator[Mapping[str, LayerStatistics]]:
        """Lead calibration samples through a block, in place, and halt where they have all come to layers to be pruned.

        Args:
            index: the block's.
            block: the block, some of whose layers may be pruned at each halt.
            forward: from hidden states to hidden states.
            hidden: the samples that enter it, shape (samples, sequence, width); takes what leaves it.
            let_go: called when a batch has been dealt with.
            before: how many samples enter the block on ranks of lower numbers.

        Yields:
            What mask method and solver have to know of the layers that see the input that has come, by their names.

        Raises:
            BadInput: some layers do not run.
        """
        method, layers = self.pruning.mask, self.layers(index, block)
        gradients = self._gradients(index, forward, layers, hidden)
        together = self._seeing_one_input(block, layers, forward, hidden[:1].to(self.device))
        if idle := set(layers).difference(*together.values()):
            raise BadInput(
                f"model.true_sequential: {', '.join(sorted(idle))} of {self.plans[index].name} take no part in what it "
                "computes; leave them out by model.skip."
            )
        first = {name: layers[name] for name in together}
        with observe(first, method, self.pruning.solver, self.plans[index].name, before * hidden.shape[1]) as known:
            for name in lockstep(forward, hidden, first, hidden, self.device, let_go=let_go):
                one = known.pop(name)  # so that who looks for a layer that is not finite adds nothing to it
                arrived = {other: one._replace(gradient=gradients.get(other)) for other in together[name]}
                self._join(arrived, forward, hidden)
                yield arrived

    def _seeing_one_input(
        self, block: nn.Module, layers: Mapping[str, nn.Module], forward: Callable[[Tensor], Tensor], sample: Tensor
    ) -> Mapping[str, Sequence[str]]:
        """The layers that see one and the same input, by the one of them that runs first.

        One block of a kind shows it by one sequence, for all of that kind.
        """
        kind = type(block), tuple(layers)
        if kind not in self._together:
            with observe(layers, self.pruning.mask, self.pruning.solver) as seen, torch.no_grad():
                forward(sample)
            self._together[kind] = {group[0]: group for _, group in sharing([*seen], seen)}
        return self._together[kind]

    @contextmanager
    def _last_left_out(self, block: nn.Module, layers: Mapping[str, nn.Module], batches: int) -> Iterator[None]:
        """Leave out the product of the layer that runs last, which no input depends on, once a block has shown which.

        Args:
            block: the block.
            layers: by name, those whose inputs matter.
            batches: how many pass through the block inside the context.
        """
        kind = type(block), tuple(layers)
        if kind in self._last:
            with left_out(layers[self._last[kind]]):
                yield
            return
        ran: list[str] = []
        with watch_inputs(layers, lambda name, _: ran.append(name)):
            yield
        if ran and ran.count(ran[-1]) == batches:  # or it would run earlier in a pass, too
            self._last[kind] = ran[-1]

    def prune(self, index: int, block: nn.Module, statistics: Mapping[str, LayerStatistics]) -> dict[str, Tensor]:
        """Prune a block's layers, or the neurons of its MLP, and solve for the weights that stay.

        Args:
            index: the block's.
            block: the block.
            statistics: by layer name; empty if the method needs none. With `true_sequential` no others are pruned.

        Returns:
            The masks by layer name.
        """
        plan, method, solver = self.plans[index], self.pruning.mask, self.pruning.solver
        layers = self.layers(index, block)
        if not layers:
            return {}
        if isinstance(method, NeuronMask):
            assert plan.neurons is not None
            share = plan.sparsity[plan.neurons.reader]
            return prune_neurons(layers, plan.neurons, statistics, method, share, solver)
        assert isinstance(method, LayerMask)
        if self.pruning.true_sequential:
            layers = {name: layers[name] for name in statistics}
        return prune_layers(layers, statistics, method, plan.sparsity, solver)
