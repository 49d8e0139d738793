"""What every launch needs to know about its tensors."""
import contextlib

import torch
import triton
from torch import Tensor


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """How fp32 products are computed: as fp32 (three TF32 products each, which on our tests err less than fp32's own
    multiply-adds and run four times as fast), or as one TF32 product if the user has allowed PyTorch's own to be that."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if _tf32_allowed() else "tf32x3"


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)  # since torch 2.9; asking for allow_tf32 may raise there
    if precision is None:
        return matmul.allow_tf32
    return (torch.backends.fp32_precision if precision == "none" else precision) == "tf32"


def head_blocks(q: Tensor, v: Tensor) -> dict[str, int]:
    """Head dims, and the powers of two (at least 16, the smallest tl.dot takes) that hold them."""
    d, dv = q.shape[-1], v.shape[-1]
    return {"D": d, "DV": dv, "BLOCK_D": _block(d), "BLOCK_DV": _block(dv)}


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
