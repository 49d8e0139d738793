"""The two operators of decoding: `flash_edu::kvcache_append` writes new keys and values,
`flash_edu::kvcache_attention` reads.

Two, so that torch.compile knows of each step what it changes: an attention that declared the caches as
changed might have them copied. Neither has a gradient.
"""
import torch
from torch import Tensor

from flash_edu import kvcache_reference
from flash_edu.layout import empty_output, in_rows
from flash_edu.operators import operator


def _implementation(backend: str):
    """The module with `append` and `decode` of a backend. Triton is imported on first use."""
    if backend == "triton":
        from flash_edu.kernels import decode

        return decode
    return kvcache_reference


@torch.library.custom_op("flash_edu::kvcache_append", mutates_args=("k_cache", "v_cache"))
def kvcache_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    backend: str,
) -> None:
    """Write k and v behind each sequence's keys. Arguments are those of `flash_attention_kvcache`, already
    checked.
    """
    if k_cache.numel() and k.numel():
        table = block_table if block_table is None else in_rows(block_table)
        _implementation(backend).append(k_cache, v_cache, in_rows(k), in_rows(v), cache_seqlens.contiguous(), table)


@kvcache_append.register_fake
def _(k_cache, v_cache, k, v, cache_seqlens, block_table, backend):
    return None


@operator(
    "kvcache_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? block_table, SymInt new, SymInt left, SymInt right, "
    "float scale, float? softcap, Tensor? alibi_slopes, Tensor? sinks, str backend) -> Tensor",
)
def kvcache_attention(
    q, k_cache, v_cache, cache_seqlens, block_table, new, left, right, scale, softcap, alibi_slopes, sinks, backend
):
    """out (B, Hq, Nq, Dv) over the first cache_seqlens + new keys of each sequence; query i, at i + length -
    Nq, sees `left` keys before and `right` keys after its own place. The rest as in
    `flash_attention_kvcache`, already checked."""
    if q.numel() == 0 or k_cache.numel() == 0:  # nothing to compute, or nothing to attend to
        return empty_output(q, v_cache).zero_()
    seqlens = cache_seqlens.contiguous()
    table, slopes, sinks = (x if x is None else in_rows(x) for x in (block_table, alibi_slopes, sinks))
    decode = _implementation(backend).decode
    return decode(in_rows(q), k_cache, v_cache, seqlens, table, new, left, right, scale, softcap, slopes, sinks)


@kvcache_attention.register_fake
def _(q, k_cache, v_cache, cache_seqlens, block_table, new, left, right, scale, softcap, alibi_slopes, sinks, backend):
    return empty_output(q, v_cache)
