"""What a run has made of the model: an ordinary Hugging Face folder, and the dense model under the same masks."""

import copy
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from lit_prune import ranks
from lit_prune.heap import give_back
from lit_prune.masks import NeuronMask, bits
from lit_prune.method import Pruning
from lit_prune.models import (
    Home,
    Offloaded,
    linear_layers,
    oriented,
    parameters,
    save_blockwise,
    set_mlp_width,
    slice_block,
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
    """

    def __init__(self, pruning: Pruning, loaded: Loaded, folder: RunFolder) -> None:
        self.loaded = loaded
        self.folder = folder
        self.sliced = isinstance(pruning.mask, NeuronMask) and pruning.mask.slice

    def save(self) -> dict[str, int]:
        """Write it, without the neurons that a mask has taken out if they are to go for good.

        Returns:
            The parameters that the model had, and those that were written.
        """
        loaded, model, path = self.loaded, self.loaded.model, self.path
        dense, home = model.num_parameters(), loaded.home
        if self.sliced:
            set_mlp_width(model.config, int(self._kept(0).sum()))
        outside = home.outside_in_parts(loaded.dtype)
        if not isinstance(home, Offloaded):  # its blocks lie in the run's folder: no two models in memory
            model.to("meta")  # type: ignore[arg-type]
        give_back()  # what pruning has left
        if ranks.rank() == 0:
            save_blockwise(model, loaded.blocks, loaded.tokenizer, loaded.dtype, path, outside, self._final)
        ranks.wait()
        return {"dense": dense, "saved": parameters(str(path))}

    @property
    def path(self) -> Path:
        """The folder that is written."""
        return self.folder.path / "model"

    @cached_property
    def home(self) -> Home:
        """The model as it was written."""
        return open_model(str(self.path), isinstance(self.loaded.home, Offloaded))

    def masked_only(self) -> Home:
        """The dense model under this run's masks: all that reconstruction has changed is taken back."""
        dense = self.loaded.home
        if isinstance(dense, Offloaded):

            def read_masked(index: int) -> dict[str, Tensor]:
                tensors = dense.read_block(index)
                self._mask(index, dense.blocks[index], tensors)
                return tensors

            masked = copy.copy(dense)
            masked.read_block = read_masked
            return masked
        vars(self).pop("home", None)  # or two models would be in memory
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
