"""Decoding in plain PyTorch: what `flash_attention_kvcache` means, and its backend for any device.

One sequence at a time, over the whole capacity of its cache: it never asks how long a sequence is, since on a
GPU the answer would have to be waited for.
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
    with torch.autocast(q.device.type, enabled=False):  # sums stay wide
        for b in range(q.shape[0]):
            keys, values = (_sequence(cache, table, b) for cache in (k_cache, v_cache))
            length = (seqlens[b].long().clamp(0, keys.shape[1]) + new).clamp(max=keys.shape[1])
            slopes_b = slopes[b] if slopes is not None and slopes.ndim == 2 else slopes
            out[b] = _attend(q[b], keys, values, length, left, right, scale, softcap, slopes_b, sinks)
    return out


def _attend(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, left: int, right: int, scale: float, softcap: float | None,
    slopes: Tensor | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """One sequence: q (Hq, Nq, D) and the whole cache, k (Hkv, N, D) and v (Hkv, N, Dv), of which `length`
    keys are there.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q_heads = q.to(wide).unflatten(0, (k.shape[0], -1))  # (Hkv, G, Nq, D): the group's heads read the same keys
    key = torch.arange(k.shape[1], device=q.device)
    position = torch.arange(q.shape[1], device=q.device)[:, None] + length - q.shape[1]  # (Nq, 1): of the queries, among the keys
    s = (q_heads @ k[:, None].to(wide).mT * scale).flatten(0, 1)  # (Hq, Nq, N)
    if softcap is not None:
        s = softcap * (s / softcap).tanh()
    if slopes is not None:
        s = s - slopes.to(wide)[:, None, None] * (position - key).abs()
    keep = (key < length) & (key >= position - left) & (key <= position + right)
    p = _softmax(s.masked_fill(~keep, NEG_INF), sinks).unflatten(0, (k.shape[0], -1))
    v = v.masked_fill((key >= length)[:, None], 0.0)  # whatever lies behind the last key: 0 * NaN is NaN
    return (p @ v[:, None].to(wide)).flatten(0, 1).to(q.dtype)


def _sequence(cache: Tensor, table: Tensor | None, b: int) -> Tensor:
    """The cache of sequence b, (Hkv, capacity, D): its pages in order, if it has pages."""
    if table is None:
        return cache[b]
    pages = cache[table[b].long().clamp(0, cache.shape[0] - 1)]  # (pages, Hkv, page_size, D)
    return pages.transpose(0, 1).flatten(1, 2)


def _softmax(s: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the last axis of (Hq, Nq, N); a sink is one more score of each row. A row without any score gives
    0.
    """
    keys = s.shape[-1]
    if sinks is not None:
        s = torch.cat((s, sinks.to(s.dtype)[:, None, None].expand(-1, s.shape[1], 1)), dim=-1)
    empty = (s == NEG_INF).all(dim=-1, keepdim=True)
    return s.softmax(dim=-1).masked_fill(empty, 0.0)[..., :keys]


def _capacity(cache: Tensor, table: Tensor | None) -> int:
    return cache.shape[2] * (1 if table is None else table.shape[1])
