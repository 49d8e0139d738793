"""What every launch needs to know about its tensors."""
import contextlib

import torch
import triton
from torch import Tensor


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensors' own."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def row_strides(*tensors: Tensor) -> list[int]:
    """For each tensor, how far apart its batches, its heads and its rows lie. Columns are neighbours (layout.in_rows)."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def dot_precision(dtype: torch.dtype) -> str:
    """How fp32 products are computed. Three TF32 products each keep the precision of fp32 (a sum's error is up to a few times
    that of fp32 multiply-adds where few terms are summed, and smaller where many are) and run two to three times as fast; if
    the user has allowed PyTorch's own products to be one TF32 product, so are ours."""
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
