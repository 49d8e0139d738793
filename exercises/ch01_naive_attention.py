"""Chapter 01, naive attention: the formula in PyTorch, with the N x N matrix in memory.

Shapes: B batch, H heads, Nq queries, Nk keys; D numbers in a query or a key (the formula's d), Dv in a value.
"""

import torch
from torch import Tensor


def causal_mask(nq: int, nk: int, device: torch.device | str | None = None) -> Tensor:
    """1.1  Which of nk keys each of nq queries may look at: True = attend.

    Aligned bottom-right: the queries are the last nq words of a text of nk words, so the last sees every key.
    Query i sees key j if

        j <= i + Nk - Nq            (FlashAttention 2; PyTorch's SDPA aligns top-left instead)

    nq = 2, nk = 4:  1 1 1 0      nq = 4, nk = 2:  0 0
                     1 1 1 1                       0 0
                                                   1 0
                                                   1 1
    Returns:
        (Nq, Nk) bool, on `device`.
    """
    # your code here (about 3 lines)
    raise NotImplementedError("1.1 causal_mask is not written yet")
    # end of your code


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> Tensor:
    """1.2  Attention by the formula.

        S = scale * Q K^T,   P = softmax(S) row by row,   O = P V     (Vaswani et al. 2017, equation 1)

    Args:
        q: (B, H, Nq, D).
        k: (B, H, Nk, D). Nk may differ from Nq.
        v: (B, H, Nk, Dv). Dv may differ from D.
        causal: if True, hide the keys that `causal_mask(Nq, Nk)` hides. The mask is made on the device of q.
        scale: any number, 0 too; None means 1 / sqrt(D).

    Returns:
        O (B, H, Nq, Dv), in the dtype of q. A query that sees no key at all gives zeros, not NaN.

    q, k and v are left as they are, and gradients flow to all three; they are finite too.
    """
    # your code here (about 9 lines)
    raise NotImplementedError("1.2 naive_attention is not written yet")
    # end of your code
