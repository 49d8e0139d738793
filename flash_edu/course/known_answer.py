"""A kernel whose answer is known: is Triton sane here? (Its interpreter is known to compute bfloat16 wrongly.)"""
import torch
import triton
import triton.language as tl


@triton.jit
def dot_kernel(A, B, C, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tile = i[:, None] * SIZE + i[None, :]
    tl.store(C + tile, tl.dot(tl.load(A + tile), tl.load(B + tile)))


def dot_error(dtype: torch.dtype, device: str) -> float:
    """The largest error of a 16 x 16 tl.dot, as a share of the largest result."""
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    got = torch.empty(16, 16, device=device)
    dot_kernel[(1,)](a, b, got, SIZE=16)
    want = a.double() @ b.double()
    return ((got - want).abs().max() / want.abs().max()).item()
