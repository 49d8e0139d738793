"""Chapter 05, the backward by hand: six formulas, one function each, and then the same six on tiles.

Symbols, as in the FlashAttention papers; dX is the gradient of the loss with respect to X:

    S = scale * Q K^T    P = softmax(S)    O = P V    L_i = log sum_j exp(S_ij)

Shapes: the dots in (..., Nq, D) are batch and heads, or nothing at all, as for the toy. fp32 or fp64.
"""

import torch
from torch import Tensor


def grad_v(p: Tensor, dout: Tensor) -> Tensor:
    """5.1  The gradient of V in O = P V.

    p (..., Nq, Nk), dout (..., Nq, Dv) -> dv (..., Nk, Dv)

    Value j is in every output row i, with weight P_ij. So row i sends its gradient back, with that weight:
        dV_j = sum_i P_ij dO_i                                  (Dao et al. 2022, appendix B.2)
    """
    # your code here (about 1 line)
    return p.mT @ dout
    # end of your code


def grad_p(dout: Tensor, v: Tensor) -> Tensor:
    """5.2  The gradient of P in O = P V.

    dout (..., Nq, Dv), v (..., Nk, Dv) -> dp (..., Nq, Nk)

    Weight P_ij multiplies value j on its way to output row i:
        dP_ij = sum_c dO_ic V_jc                                (Dao et al. 2022, appendix B.2)
    """
    # your code here (about 1 line)
    return dout @ v.mT
    # end of your code


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """5.3  D, one number per row of P: the mean of the row's dP, weighted by P.

    dout (..., Nq, Dv), out (..., Nq, Dv) -> delta (..., Nq)

    It needs neither P nor dP:
        D_i = sum_j P_ij dP_ij = sum_c dO_ic O_ic               (Dao et al. 2022, appendix B.2)
    """
    # your code here (about 1 line)
    return (dout * out).sum(dim=-1)
    # end of your code


def grad_s(p: Tensor, dp: Tensor, delta: Tensor) -> Tensor:
    """5.4  The gradient of S in P = softmax(S), where every row is a softmax of its own.

    p (..., Nq, Nk), dp (..., Nq, Nk), delta (..., Nq) -> ds (..., Nq, Nk)

        dS_ij = P_ij (dP_ij - D_i)                              (Dao et al. 2022, appendix B.2)
    """
    # your code here (about 1 line)
    return p * (dp - delta[..., None])
    # end of your code


def grad_q(ds: Tensor, k: Tensor, *, scale: float) -> Tensor:
    """5.5  The gradient of Q in S = scale * Q K^T.

    ds (..., Nq, Nk), k (..., Nk, D) -> dq (..., Nq, D)

        dQ_i = scale * sum_j dS_ij K_j                          (Dao et al. 2022, appendix B.2)
    """
    # your code here (about 1 line)
    return scale * (ds @ k)
    # end of your code


def grad_k(ds: Tensor, q: Tensor, *, scale: float) -> Tensor:
    """5.6  The gradient of K in S = scale * Q K^T.

    ds (..., Nq, Nk), q (..., Nq, D) -> dk (..., Nk, D)

        dK_j = scale * sum_i dS_ij Q_i                          (Dao et al. 2022, appendix B.2)
    """
    # your code here (about 1 line)
    return scale * (ds.mT @ q)
    # end of your code


def recompute_p(q: Tensor, k: Tensor, lse: Tensor, *, scale: float, keep: Tensor | None = None) -> Tensor:
    """5.7  P, or any tile of it, made again from Q, K and L.

    q (..., rows, D), k (..., columns, D), lse (..., rows) -> p (..., rows, columns)

        P_ij = exp(S_ij - L_i), and 0 where `keep` is False     (Dao 2023, algorithm 2)

    keep: None, or (rows, columns) bool, True = attend.
    A row with nothing to attend to has L = -inf; its P is 0.
    """
    # your code here (about 4 lines)
    s = scale * (q @ k.mT)  # (..., rows, columns)
    p = (s - lse[..., None]).exp()
    if keep is not None:
        p = p.masked_fill(~keep, 0.0)  # after exp: whatever a hidden score gave, infinite or NaN, is replaced
    return p
    # end of your code


def causal_tile(i: int, j: int, rows: int, columns: int, *, nq: int, nk: int, device=None) -> Tensor:
    """Given. The causal mask of the tile that starts at query i, key j: (rows, columns) bool, True = attend.

    Query i sees key j if j <= i + Nk - Nq, as in chapters 01 and 04: the last query sees every key.
    device: where the mask is made. Give it that of q.
    """
    query = torch.arange(i, i + rows, device=device)[:, None]
    key = torch.arange(j, j + columns, device=device)
    return key <= query + nk - nq


def key_pass(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    scale: float,
    causal: bool = False,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[Tensor, Tensor]:
    """5.8  dK and dV, one tile of keys at a time.

    dout (..., Nq, Dv), q (..., Nq, D), k (..., Nk, D), v (..., Nk, Dv), lse and delta (..., Nq)
    -> dk (..., Nk, D), dv (..., Nk, Dv)

    For each tile j of block_k keys, and for each tile i of block_q queries that sees one of them:
        P from recompute_p,  dP from grad_p,  dS from grad_s    (Dao 2023, algorithm 2)
        dV_j += P^T dO_i,    dK_j += scale * dS^T Q_i

    Any Nq and Nk: the last tile is shorter when the block does not divide them.
    causal: query i sees key j if j <= i + Nk - Nq. Query tiles that see none of the keys are not loaded.
    """
    nq, nk = q.shape[-2], k.shape[-2]
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    # your code here (about 16 lines)
    for j in range(0, nk, block_k):
        k_j, v_j = k[..., j : j + block_k, :], v[..., j : j + block_k, :]
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        first = max(0, j - (nk - nq)) if causal else 0  # the first query that sees key j
        for i in range(first // block_q * block_q, nq, block_q):  # from the start of its tile
            q_i, dout_i = q[..., i : i + block_q, :], dout[..., i : i + block_q, :]
            lse_i, delta_i = lse[..., i : i + block_q], delta[..., i : i + block_q]
            rows, columns = q_i.shape[-2], k_j.shape[-2]
            keep = causal_tile(i, j, rows, columns, nq=nq, nk=nk, device=q.device) if causal else None
            p = recompute_p(q_i, k_j, lse_i, scale=scale, keep=keep)  # (..., rows, columns)
            ds = grad_s(p, grad_p(dout_i, v_j), delta_i)
            dv_j += grad_v(p, dout_i)
            dk_j += grad_k(ds, q_i, scale=scale)
        dk[..., j : j + block_k, :] = dk_j  # finished: no other tile of keys adds to these rows
        dv[..., j : j + block_k, :] = dv_j
    # end of your code
    return dk, dv


def query_pass(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    scale: float,
    causal: bool = False,
    block_q: int = 64,
    block_k: int = 64,
) -> Tensor:
    """5.9  dQ, one tile of queries at a time.

    The arguments of key_pass -> dq (..., Nq, D)

    For each tile i of block_q queries, and for each tile j of block_k keys that one of them sees:
        P from recompute_p,  dP from grad_p,  dS from grad_s    (Dao 2023, algorithm 2)
        dQ_i += scale * dS K_j

    causal: the last query of a tile sees the most keys. Key tiles that even it does not see are not loaded.
    """
    nq, nk = q.shape[-2], k.shape[-2]
    dq = torch.zeros_like(q)
    # your code here (about 14 lines)
    for i in range(0, nq, block_q):
        q_i, dout_i = q[..., i : i + block_q, :], dout[..., i : i + block_q, :]
        lse_i, delta_i = lse[..., i : i + block_q], delta[..., i : i + block_q]
        dq_i = torch.zeros_like(q_i)
        rows = q_i.shape[-2]
        end = i + rows + nk - nq if causal else nk  # the first key that none of them sees; it may be negative
        for j in range(0, end, block_k):
            k_j, v_j = k[..., j : j + block_k, :], v[..., j : j + block_k, :]
            columns = k_j.shape[-2]
            keep = causal_tile(i, j, rows, columns, nq=nq, nk=nk, device=q.device) if causal else None
            p = recompute_p(q_i, k_j, lse_i, scale=scale, keep=keep)  # (..., rows, columns)
            ds = grad_s(p, grad_p(dout_i, v_j), delta_i)
            dq_i += grad_q(ds, k_j, scale=scale)
        dq[..., i : i + block_q, :] = dq_i
    # end of your code
    return dq


def tiled_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    dlse: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """5.10  The whole backward: D once, then the two passes.

    dout and out (B, H, Nq, Dv), q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), lse (B, H, Nq)
    -> dq, dk, dv, shaped like q, k, v. A scale of None means 1 / sqrt(D).

    dlse: None, or (B, H, Nq): the gradient that arrives at L, when L was used too. dL_i / dS_ij = P_ij, so
        dS = P * (dP - D + dL) = P * (dP - (D - dL)):
    the passes stay as they are, and get another D.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {"scale": scale, "causal": causal, "block_q": block_q, "block_k": block_k}
    # your code here (about 6 lines)
    delta = row_delta(dout, out)  # (B, H, Nq)
    if dlse is not None:
        delta = delta - dlse
    dk, dv = key_pass(dout, q, k, v, lse, delta, **options)
    dq = query_pass(dout, q, k, v, lse, delta, **options)
    return dq, dk, dv
    # end of your code


def grouped_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """5.11  The backward when several query heads share a head of keys and values (grouped-query attention).

    dout and out (B, Hq, Nq, Dv), q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv), lse (B, Hq, Nq)
    -> dq, dk, dv, shaped like q, k, v. Hq is a multiple of Hkv; the options are those of tiled_backward.

    With group = Hq / Hkv, query heads 0 .. group - 1 read key head 0, the next `group` of them key head 1, and so on:
        dK_h = sum of dK over the query heads that read h, and so for dV      (Ainslie et al. 2023, section 2.2)
    """
    group = q.shape[1] // k.shape[1]
    # your code here (about 4 lines)
    wide = [x.repeat_interleave(group, dim=1) for x in (k, v)]  # (B, Hq, Nk, ...), a copy for each query head
    dq, dk, dv = tiled_backward(dout, q, *wide, out, lse, **options)
    dk, dv = (dx.unflatten(1, (-1, group)).sum(dim=2) for dx in (dk, dv))  # (B, Hkv, Nk, ...)
    return dq, dk, dv
    # end of your code
