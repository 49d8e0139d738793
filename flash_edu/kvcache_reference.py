"""Decoding in plain PyTorch: what `flash_attention_kvcache` means, and its backend for any device.

One sequence at a time, over the whole capacity of its cache: it never asks how long a sequence is, since on a GPU the answer
would have to be waited for.
"""
import torch
from torch import Tensor

from flash_edu.layout import empty_output

NEG_INF = float("-inf")


def append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, table: Tensor | None) -> None:
    """Write k and v behind each sequence's keys, in place. Keys that do not fit are dropped."""
    capacity, new = _capacity(k_cache, table), k.shape[2]
    start = seqlens.long().clamp(0, capacity)  # (B,)
    first = start.clamp(max=capacity - new)  # `new` places that exist; before `start`, the keys stay as they are
    place = first[:, None] + torch.arange(new, device=k.device)  # (B, Nnew)
    source = place - start[:, None]  # the new key that belongs there
    writes = source >= 0
    page, row = torch.arange(len(start), device=k.device)[:, None], place
    if table is not None:
        page, row = table.long().gather(1, place // k_cache.shape[2]), place % k_cache.shape[2]
        writes = writes & (page >= 0) & (page < k_cache.shape[0])
        page = page.clamp(0, k_cache.shape[0] - 1)
    for cache, x in ((k_cache, k), (v_cache, v)):
        fresh = x.transpose(1, 2).take_along_dim(source.clamp(min=0)[:, :, None, None], dim=1)  # (B, Nnew, Hkv, D)
        cache[page, :, row] = torch.where(writes[:, :, None, None], fresh, cache[page, :, row])


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens: Tensor,
    table: Tensor | None,
    new: int,
    left: int,
    right: int,
    scale: float,
    softcap: float | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """out (B, Hq, Nq, Dv). Arguments as in kvcache_ops.kvcache_attention."""
    out = empty_output(q, v_cache)
    wide = torch.promote_types(q.dtype, torch.float32)
    capacity, (batch, heads, nq, _) = _capacity(k_cache, table), q.shape
    lengths = (seqlens.long().clamp(0, capacity) + new).clamp(max=capacity)
    key = torch.arange(capacity, device=q.device)
    query = torch.arange(nq, device=q.device)[:, None]
    for b in range(batch):
        position = query + lengths[b] - nq  # (Nq, 1): of the queries, among the keys
        exists = key < lengths[b]
        k, v = (_sequence(cache, table, b, wide) for cache in (k_cache, v_cache))  # (Hkv, 1, capacity, D)
        v = v.masked_fill(~exists[:, None], 0.0)  # whatever lies behind the last key: 0 * NaN is NaN
        s = q[b].to(wide).unflatten(0, (k.shape[0], -1)) @ k.mT * scale  # (Hkv, G, Nq, capacity)
        s = s.flatten(0, 1)
        if softcap is not None:
            s = softcap * (s / softcap).tanh()
        if slopes is not None:
            s = s - slopes.expand(batch, heads)[b].to(wide)[:, None, None] * (position - key).abs()
        s = s.masked_fill(~(exists & (key >= position - left) & (key <= position + right)), NEG_INF)
        p = _softmax(s, sinks).unflatten(0, (k.shape[0], -1))
        out[b] = (p @ v).flatten(0, 1).to(out.dtype)
    return out


def _sequence(cache: Tensor, table: Tensor | None, b: int, dtype: torch.dtype) -> Tensor:
    """The cache of sequence b, (Hkv, 1, capacity, D): its pages in order, if it has pages."""
    if table is None:
        return cache[b, :, None].to(dtype)
    pages = cache[table[b].long().clamp(0, cache.shape[0] - 1)]  # (pages, Hkv, page_size, D)
    return pages.transpose(0, 1).flatten(1, 2)[:, None].to(dtype)


def _softmax(s: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last axis of (Hq, Nq, N); a sink is one more score of each row. A row without any score gives 0."""
    keys = s.shape[-1]
    if sinks is not None:
        s = torch.cat((s, sinks.to(s.dtype)[:, None, None].expand(-1, s.shape[1], 1)), dim=-1)
    empty = (s == NEG_INF).all(dim=-1, keepdim=True)
    return s.softmax(dim=-1).masked_fill(empty, 0.0)[..., :keys]


def _capacity(cache: Tensor, table: Tensor | None) -> int:
    return cache.shape[2] * (1 if table is None else table.shape[1])
