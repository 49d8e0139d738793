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
    offset = nk - nq if align == "bottom-right" else 0
    return keys <= rows + offset
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
    s = (scale * (q @ k.mT)).masked_fill(hidden, -math.inf)  # (B, H, Nq, Nk)
    p = (s - anchor(s.amax(dim=-1, keepdim=True))).exp()
    l = p.sum(dim=-1, keepdim=True)  # (B, H, Nq, 1), 0 where there is nothing to attend to
    v = v.masked_fill(hidden.mT, 0.0)  # 0 * NaN is NaN: a weight of 0 is not enough
    return p @ v / l.masked_fill(l == 0, 1.0)
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
    low = 0 if left is None else max(0, start_q + offset - left)  # first key of the first query
    high = nk if right is None else min(nk, start_q + block_q + offset + right)  # one past the last key of the last
    if low >= high:
        return range(0)
    return range(low // block_k, (high - 1) // block_k + 1)
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
    s = raw * scale
    if softcap is not None:
        s = softcap * (s / softcap).tanh()
    if slopes is not None:
        rows = torch.arange(nq, device=raw.device)[:, None] + nk - nq
        distance = (rows - torch.arange(nk, device=raw.device)).abs()  # (Nq, Nk)
        s = s - slopes[:, None, None] * distance
    if bias is not None:
        s = s + bias
    if keep is not None:
        s = s.masked_fill(~keep, -math.inf)
    return s
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
    b, h, nq, d = q.shape
    rows = q.reshape(b, k.shape[1], -1, d)  # (B, Hkv, G * Nq, D): the group's queries, one below the other
    s = scale * (rows @ k.mT)  # (B, Hkv, G * Nq, Nk)
    out, lse = s.softmax(dim=-1) @ v, s.logsumexp(dim=-1)
    return out.reshape(b, h, nq, -1), lse.reshape(b, h, nq)
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
    groups = (k.shape[1], -1)
    q5, out5, dout5 = (x.unflatten(1, groups) for x in (q, out, dout))  # (B, Hkv, G, Nq, ...)
    k5, v5 = k[:, :, None], v[:, :, None]  # (B, Hkv, 1, Nk, ...)
    p = (scale * (q5 @ k5.mT) - lse.unflatten(1, groups)[..., None]).exp()  # (B, Hkv, G, Nq, Nk)
    ds = p * (dout5 @ v5.mT - (dout5 * out5).sum(dim=-1, keepdim=True))
    dq = (scale * (ds @ k5)).flatten(1, 2)  # (B, H, Nq, D)
    dk = (scale * (ds.mT @ q5)).sum(dim=2)  # (B, Hkv, Nk, D)
    dv = (p.mT @ dout5).sum(dim=2)  # (B, Hkv, Nk, Dv)
    return dq, dk, dv
    # end of your code
