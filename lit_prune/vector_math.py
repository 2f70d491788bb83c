"""MKL's vector functions, each called once by one thread as soon as this is imported.

MKL chooses a function's kernel when it is first called. Where several threads do that at once, as PyTorch's do for any
large tensor, one of them can compute its whole share with a kernel of low accuracy, that once and never again
(https://github.com/pytorch/pytorch/issues/188792; MKL 2024.2 of PyTorch's wheels; measured here: the cosines of rotary
embeddings were wrong by up to 1.5e-4 in 23 of 3000 processes). A run would not repeat, and a resumed one differ.
"""

import torch

FUNCTIONS = (
    *(torch.sqrt, torch.exp, torch.expm1, torch.log, torch.log10, torch.log1p, torch.log2),
    *(torch.sin, torch.cos, torch.tan, torch.asin, torch.acos, torch.atan, torch.sinh, torch.cosh, torch.tanh),
    *(torch.erf, torch.erfc, torch.erfinv, torch.trunc),
)

for _dtype in (torch.float32, torch.float64):
    for _function in FUNCTIONS:
        _function(torch.full((1,), 0.5, dtype=_dtype))
