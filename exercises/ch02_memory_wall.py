"""Chapter 02, the memory wall: how much attention computes, how much it moves, and what a machine makes of that.

Shapes: B batch, H heads, Nq queries, Nk keys; D numbers in a query or a key, Dv in a value. Counts are plain
Python: no tensor is made.
"""

import math

import torch


def matmul_cost(a_shape, b_shape, dtype: torch.dtype) -> tuple[int, int]:
    """2.1  Flops and bytes of a @ b, from the shapes alone.

        flops = 2 M K N for each product of (M, K) with (K, N)
        bytes = a and b, read once each, and the result (M, N), written once

    Args:
        a_shape: (..., M, K), a tuple, list or torch.Size.
        b_shape: (..., K, N). The dims in `...` are the same as in a_shape: as many products, side by side.
            There may be any number of them, none too.
        dtype: of a, b and the result. `dtype.itemsize` is the number of bytes of one number.

    Returns:
        (flops, bytes), whole numbers (int). A multiplication is one flop, an addition is another.

    The shapes are left as they are.
    """
    # your code here (about 5 lines)
    raise NotImplementedError("2.1 matmul_cost is not written yet")
    # end of your code


def count_bytes(
    batch: int, heads: int, nq: int, nk: int, d: int, dv: int, element_size: int
) -> dict[str, int]:
    """2.2  Bytes that each operation of naive attention reads and writes.

        dots    = q @ k.mT                      (B, H, Nq, Nk)
        scores  = dots * scale                  (B, H, Nq, Nk)
        weights = scores.softmax(dim=-1)        (B, H, Nq, Nk)
        output  = weights @ v                   (B, H, Nq, Dv)

    Each operation reads each of its inputs from memory once and writes its result there once. A transposed
    view moves nothing, and neither does the one number `scale`. There is no mask.

    Args:
        batch, heads, nq, nk, d, dv: the sizes of q (B, H, Nq, D), k (B, H, Nk, D) and v (B, H, Nk, Dv).
        element_size: bytes of one number: 4 for fp32, 2 for fp16.

    Returns:
        {"dots": bytes, "scores": bytes, "weights": bytes, "output": bytes}, whole numbers (int).
    """
    # your code here (about 8 lines)
    raise NotImplementedError("2.2 count_bytes is not written yet")
    # end of your code


def arithmetic_intensity(
    batch: int, heads: int, nq: int, nk: int, d: int, dv: int, element_size: int
) -> tuple[float, float]:
    """2.3  Flops per byte, of naive attention and of an ideal fused one.

        intensity = flops / bytes                                  (Williams et al. 2009: operational intensity)

    Both do the flops of the two matrix products, Q K^T and P V; scale and softmax are not counted.
    Naive attention moves what count_bytes says, all four operations together.
    Ideal fused attention reads q, k and v once and writes the output once, and moves nothing else.

    Args:
        as for count_bytes.

    Returns:
        (naive, fused), two floats.
    """
    # your code here (about 5 lines)
    raise NotImplementedError("2.3 arithmetic_intensity is not written yet")
    # end of your code


def roofline_time(flops: float, nbytes: float, peak: float, bandwidth: float) -> tuple[float, str]:
    """2.4  The least time that an operation can take, and what it waits for.

    The machine computes and moves at the same time, so the operation takes as long as the slower of the two:

        seconds = max(flops / peak, bytes / bandwidth)             (Williams et al. 2009: the roofline)

    Args:
        flops: what it computes; may be 0.
        nbytes: what it moves; may be 0.
        peak: flops per second that the machine can do, above 0.
        bandwidth: bytes per second that the machine can move, above 0.

    Returns:
        (seconds, bound): bound is "memory" if moving takes longer than computing, else "compute".
        If both take equally long it is "compute".
    """
    # your code here (about 3 lines)
    raise NotImplementedError("2.4 roofline_time is not written yet")
    # end of your code
