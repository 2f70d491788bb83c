"""A device of type "hpu" that computes on the CPU, so that what runs on a Gaudi can be tested without one.

It is PyTorch's PrivateUse1 device under another name. Its tensors are ordinary ones with storage of their own, marked
as lying on the device; by way of DLPack the mark is set and taken away without a copy. Every operation computes on the
CPU in the same memory, by the CPU's own kernels. As on real hardware an operation refuses tensors of two devices,
except for copies and for CPU tensors without dimensions. A process that has installed the device cannot go back.
"""

import ctypes
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.attention import SDPBackend
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "hpu"
ON_CPU, ON_DEVICE = 1, 12
"""DLPack's kDLCPU and kDLExtDev."""

aten = torch.ops.aten
CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

COMPOSITE = ("ImplicitAutograd", "ExplicitAutograd", "ExplicitAutogradNonFunctional")

VIEWS = (aten.as_strided, aten.view, aten._reshape_alias, aten.unfold)
"""Operations on shape and strides alone: the CPU's own kernels do for any device."""

LOWER = (aten.linear, aten.matmul, aten.mm, aten.bmm, aten.addmm, aten.scaled_dot_product_attention)
"""What autocast computes in lower precision, as far as it is met here."""

last = ""
"""The operation that was computed last."""

_kept: list[torch.library.Library] = []


def install(module: ModuleType) -> None:
    """Make the device known to PyTorch.

    Args:
        module: becomes `torch.hpu`.
    """
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    everything, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_compute, "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in _of_the_cpu_alone():
        some.impl(name, partial(_compute, _named(name)), "PrivateUse1")
    for view in VIEWS:
        some.impl(view.default, _as_on_cpu(view.default), "PrivateUse1")
    some.impl(aten.copy_.default, _copy, "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        some.impl(aten.scaled_dot_product_attention.default, _attention, key)
    for operation in LOWER:
        some.impl(operation.default, _lowered(operation.default), "AutocastPrivateUse1")
    _kept.extend([everything, some])
    torch._has_compatible_shallow_copy_type = lambda *_: True
    torch.Tensor.data = property(torch._C.TensorBase.data.__get__, _set_data)


def _of_the_cpu_alone() -> list[str]:
    """Operations for which other devices would take a composition of several, which rounds otherwise."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::") and has(name, "CPU"))
    return [name for name in names if any(has(name, f"Composite{kind}") for kind in COMPOSITE)]


def _named(name: str) -> Any:
    packet, _, overload = name.removeprefix("aten::").partition(".")
    return getattr(getattr(aten, packet), overload or "default")


_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _marked(tensor: Tensor, device: int) -> Tensor:
    """A tensor of the same memory on another device."""
    capsule = torch._C._to_dlpack(tensor)
    fields = (ctypes.c_int32 * 4).from_address(_address(capsule, b"dltensor"))  # a pointer, kind of device, its number
    fields[2] = device
    return torch._C._from_dlpack(capsule)


def _there(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == NAME


def _compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation, by the CPU's kernel."""
    global last
    last = str(operation)
    arguments = operation._schema.arguments
    given = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    for argument, value in given:
        changed = argument.alias_info is not None and argument.alias_info.is_write
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if any(not _there(leaf) and (leaf.ndim or changed) for leaf in leaves):
            raise RuntimeError(f"{operation}: expected all tensors on one device, but found {NAME} and cpu")
    marks: dict[int, tuple[Tensor, Tensor]] = {}  # by the CPU's tensor, kept so that no other gets its number

    def to_cpu(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        if not _there(leaf):
            return leaf
        unmarked = _marked(leaf, ON_CPU)
        marks[id(unmarked)] = unmarked, leaf
        return unmarked

    def back(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return marks[id(leaf)][1] if id(leaf) in marks else _marked(leaf, ON_DEVICE)

    # a kernel may resize what it writes to, which it cannot do here, unless it is an input as well
    written = [argument.name for argument in arguments if argument.is_out]
    inputs = {id(leaf) for leaf in tree_leaves(args)}
    targets = {name: kwargs[name] for name in written if id(kwargs[name]) not in inputs}
    args, kwargs = tree_map(to_cpu, (args, kwargs))
    result = operation(*args, **kwargs | {name: torch.empty(0, dtype=t.dtype) for name, t in targets.items()})
    for name, target in targets.items():
        values = result[written.index(name)] if isinstance(result, tuple) else result
        _put(target, values)
        marks[id(values)] = values, target
    return tree_map(back, result)


def _put(target: Tensor, values: Tensor) -> None:
    """Set a tensor of the device, and its size, to values on the CPU."""
    if target.shape != values.shape:
        marked = _marked(values, ON_DEVICE)
        set_ = aten.set_.source_Storage_storage_offset
        set_.redispatch(CPU_KERNELS, target, marked.untyped_storage(), 0, marked.shape, marked.stride())
    else:
        _copy(target, values)


def _set_data(tensor: Tensor, values: Tensor) -> None:
    """Let a tensor go to another device, which PrivateUse1 alone of all devices does not allow."""
    if tensor.device.type == values.device.type:
        return torch._C.TensorBase.data.__set__(tensor, values)
    gradient, values = tensor.grad, values.detach()
    if isinstance(tensor, nn.Parameter):
        values = nn.Parameter(values, tensor.requires_grad)
    torch._C._swap_tensor_impl(tensor, values)
    if gradient is not None:
        tensor.grad = gradient.to(tensor.device)
    return None


def _as_on_cpu(view: Any) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: view.redispatch(CPU_KERNELS, *args, **kwargs)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Between any two devices."""
    to, of = (_marked(tensor, ON_CPU) if _there(tensor) else tensor for tensor in (target, source))
    to.copy_(of)
    return target


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Tensor:
    """As PyTorch chooses it on a CPU, so that results are the same to the bit."""

    def to_cpu(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None else _marked(tensor.detach(), ON_CPU).requires_grad_(tensor.requires_grad)

    inputs = query, key, value, attn_mask
    shapes_alone = isinstance(query, FakeTensor)  # while torch.compile looks on
    choice = None if shapes_alone else torch._fused_sdp_choice(*map(to_cpu, inputs), dropout_p, is_causal, **more)
    if choice == SDPBackend.FLASH_ATTENTION.value:
        kernel = aten._scaled_dot_product_flash_attention_for_cpu.default
        return kernel(*inputs[:3], dropout_p, is_causal, attn_mask=attn_mask, scale=more.get("scale"))[0]
    return aten._scaled_dot_product_attention_math(*inputs, dropout_p, is_causal, **more)[0]


def _lowered(operation: Any) -> Callable[..., Tensor]:
    """With float32 tensors cast to what autocast computes in."""

    def cast(leaf: Any) -> Any:
        return leaf.to(torch.get_autocast_dtype(NAME)) if _there(leaf) and leaf.dtype == torch.float32 else leaf

    def lowered(*args: Any, **kwargs: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return lowered
