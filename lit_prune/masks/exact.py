"""Float32 as it is: where rounding to TF32 or bfloat16 would show in what is summed, factorised or solved for."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_MATMULS: list[Any] = [getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn)]
BACKENDS = [matmul for matmul in _MATMULS if hasattr(matmul, "fp32_precision")]
"""What multiplies matrices and can be told in which precision; nothing before PyTorch 2.9, which knows one for all."""


@contextmanager
def exact() -> Iterator[None]:
    """Multiply float32 matrices in float32, whatever the user allows forward passes, and outside of autocast.

    Also a decorator. What `torch.set_float32_matmul_precision`, `allow_tf32` or `fp32_precision` said counts again
    afterwards. PyTorch refuses to read the older of these where the newer was used, so that it is not asked here.
    """
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for kind in {"cpu", accelerator.type if accelerator else "cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if BACKENDS:
            for backend in BACKENDS:
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                backend.fp32_precision = "ieee"
        else:
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
