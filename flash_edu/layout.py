"""How tensors lie in memory: kernels read and write rows, whose numbers (the head dim) are neighbours.

Batch, heads and sequence may lie in any order and at any distance, so the usual views, (batch, seq, heads * dim) split into
heads among them, are read in place. A tensor whose head dim is strided, or expanded, is copied once: a kernel would read it
many times, one number at a time. (It would also have ptxas 12.8 compile addresses that it sometimes gets wrong.)
"""
import torch
from torch import Tensor


def in_rows(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, else a copy of x that is."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def empty_like_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a result of x's shape, in rows; batch, heads and sequence lie in x's order if x itself is in rows."""
    if x.stride(-1) == 1:
        room = torch.empty_like(x, dtype=dtype)
        if room.stride(-1) == 1:  # an overlapping x may have a second stride of 1
            return room
    return x.new_empty(x.shape, dtype=dtype)


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out (B, Hq, Nq, Dv), laid out as q where their shapes agree, and for lse (B, Hq, Nq), fp32 or wider."""
    out = empty_like_rows(q) if v.shape[-1] == q.shape[-1] else q.new_empty((*q.shape[:3], v.shape[-1]))
    return out, q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
