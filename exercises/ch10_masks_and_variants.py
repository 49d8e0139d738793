"""Chapter 10, masks and variants: which keys a query sees, what is added to a score, and heads that share keys.

Shapes: B batch, H query heads, Hkv key heads, Nq queries, Nk keys, D numbers in a query or a key, Dv in a value.
Every mask is True where a query may attend.
"""

import math

import torch
from torch import Tensor

from .ch03_online_softmax import anchor


def causal_keep(nq: int, nk: int, *, align: str = "bottom-right", device=None) -> Tensor:
    """10.1  The causal mask, for either way to lay Nq queries beside Nk keys.

    -> (Nq, Nk) bool, True = attend

        "top-left":      query i sees the keys j <= i                   (PyTorch's is_causal)
        "bottom-right":  query i sees the keys j <= i + Nk - Nq         (FlashAttention 2.1 and later, flash_edu)

    Raises:
        ValueError: for any other align.
    """
    if align not in ("top-left", "bottom-right"):
        raise ValueError(f'align must be "top-left" or "bottom-right", got {align!r}')
    rows = torch.arange(nq, device=device)[:, None]
    keys = torch.arange(nk, device=device)
    # your code here (about 2 lines)
    raise NotImplementedError("10.1 causal_offset is not written yet")
    # end of your code


def padded_attention(q: Tensor, k: Tensor, v: Tensor, real: Tensor, *, scale: float | None = None) -> Tensor:
    """10.2  Attention over the real keys of each text alone.

    q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), real (B, Nk) bool, True = a real key
    -> out (B, H, Nq, Dv) in the dtype of q

        S_ij = scale * Q_i K_j for a real key j, -inf for padding;   O = softmax(S) V

    A text without a real key gives zeros. K and V of padding may hold anything, NaN and infinity too. Any float dtype.
    scale: None means 1 / sqrt(D).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    hidden = ~real[:, None, None, :]  # (B, 1, 1, Nk), for every head and every query
    # your code here (about 6 lines)
    raise NotImplementedError("10.2 padding is not written yet")
    # end of your code


def window_tiles(
    start_q: int, nq: int, nk: int, *, block_q: int, block_k: int, left: int | None, right: int | None
) -> range:
    """10.3  The numbers of the key tiles that a tile of queries needs, and no other.

    The queries are start_q .. start_q + block_q - 1, as far as they exist: 0 <= start_q < Nq. Key tile t holds the
    keys t * block_k .. (t + 1) * block_k - 1, as far as they exist. With offset = Nk - Nq, query i sees the keys j with

        i + offset - left <= j <= i + offset + right,   0 <= j < Nk

    left, right: 0 or more; None is no limit. Causal is right = 0. If no query sees a key, the range is empty.
    """
    offset = nk - nq
    # your code here (about 5 lines)
    raise NotImplementedError("10.3 window_tiles is not written yet")
    # end of your code


def score_rules(
    raw: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """10.4  From Q K^T to the scores that softmax gets, each rule in its place.

    raw (B, H, Nq, Nk) = Q K^T -> scores (B, H, Nq, Nk)

        1. S = scale * raw
        2. S = softcap * tanh(S / softcap)                              (Gemma 2 caps its scores so)
        3. S = S - slopes[h] * |i + Nk - Nq - j|                        (ALiBi, Press et al. 2022)
        4. S = S + bias
        5. S = -inf where keep is False

    None leaves a step out. slopes (H,), bias and keep broadcast to (B, H, Nq, Nk), keep is bool.
    """
    nq, nk = raw.shape[-2:]
    # your code here (about 11 lines)
    raise NotImplementedError("10.4 score_rules is not written yet")
    # end of your code


def gqa_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """10.5  Attention in which G = H / Hkv query heads share a head of keys and values, which is not repeated.

    q (B, H, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv) -> out (B, H, Nq, Dv), lse (B, H, Nq)

    Query head h reads key head h // G: heads 0 .. G - 1 read head 0, and so on (Ainslie et al. 2023).
    K and V keep their Hkv heads: no copy of H heads is made. lse is the natural log of the sum of exp of the scores.
    scale: None means 1 / sqrt(D).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # your code here (about 5 lines)
    raise NotImplementedError("10.5 gqa is not written yet")
    # end of your code


def gqa_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """10.6  The gradients of `gqa_attention`: a shared head gets the sum over its group.

    dout and out (B, H, Nq, Dv), lse (B, H, Nq), q, k, v as above -> dq, dk, dv, shaped like q, k, v

        P_ij = exp(S_ij - L_i),   dS_ij = P_ij (dP_ij - sum_c dO_ic O_ic)       (chapter 05)
        dV = sum over the group of P^T dO,   dK = sum over the group of scale * dS^T Q
    """
    # your code here (about 9 lines)
    raise NotImplementedError("10.6 gqa_backward is not written yet")
    # end of your code
