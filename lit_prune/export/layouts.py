"""Linear layers in sparse layouts, for inference."""

import logging
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_prune.errors import BadInput, reason
from lit_prune.models import linear_layers, weight_of

log = logging.getLogger(__name__)

Layout = Literal["dense", "semi_structured", "csr"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class CSRLinear(nn.Module):
    """A linear layer whose weight is in compressed sparse rows, with indices of 32 bits, which is what MKL reads.

    Args:
        weight: shape (out, in), on a CPU.
        bias: shape (out,), or none.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            rows = weight.to_sparse_csr()
            parts = (rows.crow_indices().int(), rows.col_indices().int(), rows.values())
            self.register_buffer("weight", torch.sparse_csr_tensor(*parts, weight.shape, check_invariants=True))
        self.register_buffer("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output, shape (..., out), for inputs of shape (..., in)."""
        # nn.functional.linear takes such weights too, but is 10 times as slow for more than one token
        output = (self.weight @ inputs.reshape(-1, inputs.shape[-1]).T).T
        if self.bias is not None:
            output = output + self.bias
        return output.reshape(*inputs.shape[:-1], -1)


def to_csr(model: PreTrainedModel) -> tuple[int, int]:
    """Have those linear layers in compressed sparse rows that are smaller so.

    Args:
        model: in float32 or float64, on a CPU; it is changed in place.

    Returns:
        How many layers are, and how many there are.

    Raises:
        BadInput: none is, or the dtype has no such product.
    """
    if model.dtype not in (torch.float32, torch.float64):
        raise BadInput(f"layout: csr has no fast product in {model.dtype}; give the dtype float32.")
    layers = _convertible(model)
    sparse = {name: layer for name, layer in layers.items() if _csr_bytes(weight_of(layer)) < weight_of(layer).nbytes}
    if not sparse:
        raise BadInput(
            "layout: no layer of this model would be smaller in csr, which stores a column beside every value; "
            "it is for layers of which well over half of the weights are zero, so give dense."
        )
    for name, layer in sparse.items():
        model.set_submodule(name, CSRLinear(weight_of(layer), _bias(layer)))
    return len(sparse), len(layers)


def two_of_four(weight: Tensor) -> bool:
    """Whether every four consecutive inputs of a row, shape (out, in), have at most two weights that are not zero."""
    return weight.shape[1] % 4 == 0 and bool((weight.reshape(-1, 4).count_nonzero(1) <= 2).all())


def to_semi_structured(model: PreTrainedModel) -> tuple[int, int]:
    """Have those linear layers as PyTorch's semi-structured tensors that are 2:4 and of a shape that these can have.

    Args:
        model: on an NVIDIA GPU; it is changed in place.

    Returns:
        How many layers are, and how many there are.

    Raises:
        BadInput: none is, or the GPU cannot.
    """
    layers = _convertible(model)
    fitting = {name: layer for name, layer in layers.items() if two_of_four(weight_of(layer))}
    if not fitting:
        raise BadInput(
            "layout: semi_structured needs layers with two of every four weights, and this model has none; "
            "prune with --model.sparsity 2:4, or give dense."
        )
    converted = 0
    why = ""
    for name, layer in fitting.items():
        weight, bias = weight_of(layer).contiguous(), _bias(layer)
        try:
            sparse = torch.sparse.to_sparse_semi_structured(weight)
        except RuntimeError as error:  # a shape, dtype or GPU that PyTorch has no kernel for; it says which
            why = reason(error)
            continue
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        made.weight = nn.Parameter(sparse, requires_grad=False)
        made.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
        model.set_submodule(name, made)
        converted += 1
    if converted < len(fitting):
        log.warning("%d layers that are 2:4 stay dense: %s", len(fitting) - converted, why)
    if not converted:
        raise BadInput(f"layout: semi_structured does not work for any layer here ({why}); give dense.")
    return converted, len(layers)


def _convertible(model: PreTrainedModel) -> dict[str, nn.Module]:
    """All linear layers but those whose weight is the embedding's too."""
    outside = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return {name: m for name, m in linear_layers(model).items() if id(m.weight) not in outside}


def _bias(layer: nn.Module) -> Tensor | None:
    return layer.bias.detach() if isinstance(layer.bias, Tensor) else None


def _csr_bytes(weight: Tensor) -> int:
    kept = int(weight.count_nonzero())
    return kept * (weight.itemsize + 4) + 4 * (weight.shape[0] + 1)
