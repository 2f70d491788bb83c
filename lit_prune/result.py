"""What a run has made of the model: an ordinary Hugging Face folder, and the dense model under the same masks."""

import copy

from torch import Tensor, nn

from lit_prune import ranks
from lit_prune.masks import NeuronMask, bits
from lit_prune.method import Pruning
from lit_prune.models import (
    Home,
    Offloaded,
    linear_layers,
    oriented,
    save_model,
    save_offloaded,
    set_mlp_width,
    slice_block,
    slice_neurons,
    weight_of,
)
from lit_prune.preflight import Loaded, open_model
from lit_prune.run_folder import RunFolder
from lit_prune.walk import MASK


class Result:
    """The model of a run whose blocks are all final.

    Args:
        pruning: what was done to it.
        loaded: the model; its blocks are final, or on disk.
        folder: the run's, which holds final blocks and masks.

    Attributes:
        home: the model as it was written, once it is.
    """

    def __init__(self, pruning: Pruning, loaded: Loaded, folder: RunFolder) -> None:
        self.loaded = loaded
        self.folder = folder
        self.home = loaded.home
        self.sliced = isinstance(pruning.mask, NeuronMask) and pruning.mask.slice

    def save(self) -> dict[str, int]:
        """Write it, without the neurons that a mask has taken out if they are to go for good.

        Returns:
            The parameters that the model had, and those that were written.
        """
        loaded, path = self.loaded, self.folder.path / "model"
        dense = self.home.model.num_parameters()
        if isinstance(self.home, Offloaded):
            if self.sliced:
                set_mlp_width(loaded.model.config, int(self._kept(0).sum()))
            if ranks.rank() == 0:
                save_offloaded(self.home, loaded.tokenizer, loaded.dtype, path, self._final)
            ranks.wait()
            self.home = open_model(str(path), offload=True)
        else:
            if self.sliced:
                slice_neurons(loaded.model, loaded.blocks, [self._kept(index) for index in range(len(loaded.blocks))])
            if ranks.rank() == 0:
                save_model(loaded.model, loaded.tokenizer, loaded.dtype, path)
            ranks.wait()
            loaded.model.float()  # type: ignore[no-untyped-call]
        return {"dense": dense, "saved": self.home.model.num_parameters()}

    def masked_only(self) -> Home:
        """The dense model under this run's masks: all that reconstruction has changed is taken back."""
        dense = self.loaded.home
        if isinstance(dense, Offloaded):

            def read_masked(index: int) -> dict[str, Tensor]:
                tensors = dense.read_block(index)
                self._mask(index, dense.blocks[index], tensors)
                return tensors

            return Offloaded(dense.model, dense.blocks, read_masked, dense.read_outside)
        dense.model.to("meta")  # type: ignore[arg-type]  # or two models would be in memory
        home = open_model(self.loaded.path, offload=False)
        for index, block in enumerate(home.blocks):
            self._mask(index, block, dict(block.state_dict()))
        return home

    def _kept(self, index: int) -> Tensor:
        """Which of a block's MLP neurons stay, bool, shape (neurons,)."""
        neurons = self.loaded.plans[index].neurons
        assert neurons is not None
        shape = weight_of(linear_layers(self.loaded.blocks[index])[neurons.reader]).shape
        return bits.unpack(self.folder.load_block(index)[MASK + neurons.reader], shape)[0]

    def _final(self, index: int) -> dict[str, Tensor]:
        """A final block's tensors as they go into the result."""
        stored = self.folder.load_block(index)
        tensors = {name: tensor for name, tensor in stored.items() if not name.startswith(MASK)}
        neurons = self.loaded.plans[index].neurons
        if neurons is None or not self.sliced:
            return tensors
        block = copy.deepcopy(self.loaded.blocks[index])
        block.load_state_dict(tensors, assign=True)
        slice_block(block, neurons, self._kept(index))
        return dict(block.state_dict())

    def _mask(self, index: int, block: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Zero in a dense block's tensors what this run has pruned."""
        stored = self.folder.load_block(index)
        for name, layer in linear_layers(block).items():
            if (mask := stored.get(MASK + name)) is not None:
                weight = oriented(layer, tensors[f"{name}.weight"])
                weight.mul_(bits.unpack(mask, weight.shape))
