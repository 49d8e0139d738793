"""Attention in plain PyTorch: the definition of right, and the backend that runs on any device.

`naive_attention` is the formula. `tiled_forward` and `tiled_backward` are FlashAttention with tensors for tiles: they
never hold more than one tile of scores, so their memory is linear in the sequence length.

Shapes: q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv); Hq is a multiple of Hkv, and query head h reads
key/value head h // (Hq / Hkv).
"""
import torch
from torch import Tensor

from flash_edu.layout import empty_like_rows, empty_outputs

NEG_INF = float("-inf")


def causal_mask(nq: int, nk: int, device: torch.device | str | None = None) -> Tensor:
    """(Nq, Nk) bool, True = attend. Aligned bottom-right: the last query sees every key.

    Nq = 2, Nk = 4:  1 1 1 0      Nq = 4, Nk = 2:  0 0
                     1 1 1 1                       0 0
                                                   1 0
                                                   1 1
    """
    rows = torch.arange(nq, device=device)[:, None]
    cols = torch.arange(nk, device=device)[None, :]
    return cols <= rows + (nk - nq)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None) -> Tensor:
    """softmax(scale * Q K^T) V, (B, Hq, Nq, Dv), with the N x N matrix in memory. A row with no key gives 0."""
    return naive_attention_with_lse(q, k, v, causal=causal, scale=scale)[0]


def naive_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `naive_attention`, and the log-sum-exp of each row of scores, (B, Hq, Nq), natural log, fp32 or wider."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, Hq, Nk, D)
    s = q @ k.mT * scale  # (B, Hq, Nq, Nk)
    if causal:
        s = s.masked_fill(~causal_mask(*s.shape[-2:], s.device), NEG_INF)
    lse = s.to(_accumulator(s.dtype)).logsumexp(dim=-1)  # (B, Hq, Nq)
    p = s.softmax(dim=-1).masked_fill((lse == NEG_INF)[..., None], 0.0)  # softmax of nothing is 0, not 0/0
    return p @ v, lse


def tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float, block_q: int = 128, block_k: int = 128
) -> tuple[Tensor, Tensor]:
    """FlashAttention-2, Algorithm 1 (Dao 2023). Returns out (B, Hq, Nq, Dv) and lse (B, Hq, Nq)."""
    out, lse = empty_outputs(q, v)
    wide = _accumulator(q.dtype)
    q_heads, out_heads, lse_heads = (_by_kv_head(x, k.shape[1]) for x in (q, out, lse[..., None]))
    for i in range(0, q.shape[2], block_q):
        q_i = q_heads[..., i : i + block_q, :]  # (B, Hkv, G, bq, D)
        rows = q_i.shape[-2]
        q_i = q_i.to(wide).flatten(2, 3)  # (B, Hkv, G*bq, D): the group's heads read the same K tile
        m = q_i.new_full((*q_i.shape[:3], 1), NEG_INF)  # running maximum
        l = torch.zeros_like(m)  # running sum of exp(s - m)
        o = q_i.new_zeros(*q_i.shape[:3], v.shape[-1])  # running, unnormalised output
        for j in range(0, _keys_seen(i + rows, q, k, causal), block_k):
            k_j, v_j = (x[:, :, j : j + block_k].to(wide) for x in (k, v))  # (B, Hkv, bk, D)
            s = _mask_tile(q_i @ k_j.mT * scale, i, rows, j, q, k, causal)  # (B, Hkv, G*bq, bk)
            m_new = torch.maximum(m, s.amax(dim=-1, keepdim=True))
            anchor = m_new.masked_fill(m_new == NEG_INF, 0.0)  # -inf - -inf is not a number
            p = (s - anchor).exp()
            rescale = (m - anchor).exp()
            l = l * rescale + p.sum(dim=-1, keepdim=True)
            o = o * rescale + p @ v_j
            m = m_new
        o = o / l.masked_fill(l == 0, 1.0)
        out_heads[..., i : i + rows, :] = o.unflatten(2, (-1, rows)).to(out.dtype)
        lse_heads[..., i : i + rows, :] = (m + l.log()).unflatten(2, (-1, rows))
    return out, lse


def tiled_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
    block_q: int = 128,
    block_k: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention-2, Algorithm 2 (Dao 2023), with the gradient of lse. Returns dq, dk, dv like q, k, v.

    P is recomputed from lse, and dS = P * (dP - D) with D = rowsum(dO * O) - dlse: the derivative of lse with respect
    to the scores is P itself, so its gradient joins D with the opposite sign.
    """
    wide = _accumulator(q.dtype)
    delta = (dout.to(wide) * out.to(wide)).sum(dim=-1)
    delta = delta if dlse is None else delta - dlse
    dq = empty_like_rows(q, wide).zero_()
    dk, dv = empty_like_rows(k), empty_like_rows(v)
    q_, dq_, dout_, lse_, delta_ = (_by_kv_head(x, k.shape[1]) for x in (q, dq, dout, lse[..., None], delta[..., None]))
    for j in range(0, k.shape[2], block_k):
        k_j, v_j = (x[:, :, j : j + block_k].to(wide) for x in (k, v))
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        for i in range(_first_query(j, q, k, causal) // block_q * block_q, q.shape[2], block_q):
            tile = (..., slice(i, i + block_q), slice(None))
            rows = min(block_q, q.shape[2] - i)
            q_i, dout_i, lse_i, delta_i = (x[tile].to(wide).flatten(2, 3) for x in (q_, dout_, lse_, delta_))
            s = _mask_tile(q_i @ k_j.mT * scale, i, rows, j, q, k, causal)
            p = (s - lse_i.masked_fill(lse_i == NEG_INF, 0.0)).exp()  # (B, Hkv, G*bq, bk)
            ds = p * (dout_i @ v_j.mT - delta_i)
            dv_j += p.mT @ dout_i
            dk_j += ds.mT @ q_i * scale
            dq_[tile] += (ds @ k_j * scale).unflatten(2, (-1, rows))
        dk[:, :, j : j + block_k] = dk_j.to(k.dtype)
        dv[:, :, j : j + block_k] = dv_j.to(v.dtype)
    return dq.to(q.dtype), dk, dv


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, N, ...) -> (B, Hkv, G, N, ...), a view: the query heads that share a key/value head stand together."""
    return x.unflatten(1, (kv_heads, -1))


def _keys_seen(query_end: int, q: Tensor, k: Tensor, causal: bool) -> int:
    """How many keys, from the first, any query before `query_end` attends to."""
    nq, nk = q.shape[2], k.shape[2]
    return max(0, min(nk, min(query_end, nq) + nk - nq)) if causal else nk


def _first_query(key_start: int, q: Tensor, k: Tensor, causal: bool) -> int:
    """The first query that attends to key `key_start`."""
    return max(0, key_start - (k.shape[2] - q.shape[2])) if causal else 0


def _mask_tile(s: Tensor, i: int, rows: int, j: int, q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Put -inf on the scores of tile (i, j) that the causal mask hides; only tiles on the diagonal have any."""
    offset = k.shape[2] - q.shape[2]
    cols = s.shape[-1]
    if causal and j + cols - 1 > i + offset:
        query = torch.arange(i, i + rows, device=s.device)[:, None]
        key = torch.arange(j, j + cols, device=s.device)
        keep = key <= query + offset
        s.unflatten(2, (-1, rows)).masked_fill_(~keep, NEG_INF)
    return s
