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


@triton.jit
def loop_kernel(OUT, TIMES):
    count = 0
    for _ in range(0, TIMES):
        count += 1
    tl.store(OUT, count)


def loops(device: str) -> bool:
    """Does a loop run as often as a number says that is known only at the call? Triton 3.6's interpreter cannot, with NumPy 2.4."""
    out = torch.zeros(1, dtype=torch.int32, device=device)
    try:
        loop_kernel[(1,)](out, 5)
    except Exception:  # the interpreter wraps a TypeError of NumPy's in an error of its own
        return False
    return out.item() == 5
