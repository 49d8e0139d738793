"""Decoding: attention of a few new queries to a cache of keys and values that grows in place, in pages or not."""
import torch
from torch import Tensor

from flash_edu import arguments, kvcache_ops
from flash_edu.arguments import DTYPES, check_tensor, require, require_tensor
from flash_edu.backends import pick_backend
from flash_edu.rules import limits

LONGEST = 2**30  # keys: positions are 32-bit numbers in the kernel, and so are their sums with a window
PAGE_MULTIPLE = 16


def flash_attention_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of new queries to the keys and values that a cache holds, each sequence at its own length.

    For generation: one query a sequence, or a few when several tokens are guessed at once. k and v, if given,
    are first written into the cache, in place, at positions cache_seqlens[b] .. cache_seqlens[b] + Nnew - 1.
    `cache_seqlens` itself is not changed: add Nnew to it when all layers are done. A step of a model:

        for layer, (k_cache, v_cache) in zip(layers, caches):      # (B, Hkv, Nmax, D); lengths (B,) int32
            q, k, v = layer.project(x)
            out = flash_attention_kvcache(q, k_cache, v_cache, lengths, k=k, v=v)
            ...
        lengths += k.shape[2]

    Split-KV decoding (Flash-Decoding: Dao, Haziza, Massa and Sizov 2023), with as many parts of each sequence
    as fill the GPU. Pages are those of PagedAttention (Kwon et al. 2023, arXiv:2309.06180). Nothing waits for
    the GPU, so a call can be captured in a CUDA graph, and replayed after cache_seqlens, block_table and the
    rest have been changed in place.

    Args:
        q: queries (B, Hq, Nq, D), fp16, bf16 or fp32 (fp64 with backend "torch"), any strides: the last Nq
            tokens of each sequence.
        k_cache: keys (B, Hkv, Nmax, D), dtype and device of q; Hq a multiple of Hkv, as in `flash_attention`.
            Any strides, but the head dim must be contiguous. What lies behind a sequence's end is never used,
            and may be NaN.
        v_cache: values (B, Hkv, Nmax, Dv), likewise. D and Dv are any sizes from 1 to 256.
        cache_seqlens: (B,) int32 or int64, on the device of q: how many keys of each sequence are in the
            cache before this call. A sequence has len = cache_seqlens[b] + Nnew keys (Nnew = 0 without k and
            v).
        k, v: (B, Hkv, Nnew, D) and (B, Hkv, Nnew, Dv): new keys and values, both or neither.
        block_table: (B, pages_per_sequence) int32. The caches are then pages, (num_pages, Hkv, page_size, D
            or Dv), with page_size a multiple of 16, and token t of sequence b is row t % page_size of page
            block_table[b, t // page_size]. Pages lie in any order. Sequences may share pages that are only
            read. Entries behind a sequence's end may be anything.
        causal: query i attends to keys 0 .. i + len - Nq: aligned bottom-right, the last query sees every
            key.
        scale: what the scores are multiplied with; 1 / sqrt(D) if None.
        window: (left, right): query i attends to keys i + len - Nq - left .. i + len - Nq + right. None or -1
            is no limit. Keys that no query sees are not read.
        softcap: scores become softcap * tanh(score / softcap), after scale and before ALiBi.
        alibi_slopes: (Hq,) or (B, Hq), fp32: slope * |i + len - Nq - j| is subtracted from the score of query
            i and key j.
        sinks: (Hq,), fp16, bf16, fp32 or fp64: for each head one more score in the softmax, without a value.
        backend: "triton" (CUDA, or a CPU under TRITON_INTERPRET=1), "torch" (any device, slow), or "auto".

    Returns:
        out (B, Hq, Nq, Dv), dtype of q. A query with nothing to attend to, as in a sequence of length 0,
        gives 0. The same inputs give the same bits.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and value.
        NotImplementedError: no backend, or not the named one, can serve the request; or q, k, v, a cache,
            slopes or sinks require a gradient (decoding has none) while gradients are recorded.

    Lengths and page numbers are on the GPU and are not checked, which would mean to wait for it. Nothing
    outside the tensors is ever read or written: a length below 0 counts as 0, and one above the capacity
    (Nmax, or pages_per_sequence * page_size) as the capacity. New keys that do not fit are dropped, and len
    is then the capacity. A page number that does not exist is read as the nearest one that does, and not
    written. The results of such a sequence mean nothing; those of the others are right. Under autocast, q, k
    and v are cast to the dtype of the cache.
    """
    q, k, v = _cast_to_cache(q, k, v, k_cache)
    _check_caches(q, k_cache, v_cache, cache_seqlens, block_table)
    new = _check_new(k, v, q, k_cache, v_cache, block_table)
    _check_per_head("alibi_slopes", alibi_slopes, q, (torch.float32,), (q.shape[:2], q.shape[1:2]))
    _check_per_head("sinks", sinks, q, DTYPES, (q.shape[1:2],))
    names = ("q", "k", "v", "k_cache", "v_cache", "alibi_slopes", "sinks")
    for name, x in zip(names, (q, k, v, k_cache, v_cache, alibi_slopes, sinks)):
        _reject_gradient(name, x)
    scale = q.shape[-1] ** -0.5 if scale is None else arguments.check_scale(scale)
    softcap = arguments.check_softcap(softcap)
    left, right = _limits(causal, window)
    backend = pick_backend(backend, q)
    require(
        backend == "torch" or q.dtype != torch.float64,
        NotImplementedError,
        lambda: f"backend={backend!r} cannot serve this: its kernels sum in float32, q is float64; backend='torch' can",
    )
    with torch.no_grad():  # there is no gradient, so autograd need not ask
        if new:
            kvcache_ops.kvcache_append(k_cache, v_cache, k, v, cache_seqlens, block_table, backend)
        return kvcache_ops.kvcache_attention(
            q, k_cache, v_cache, cache_seqlens, block_table, new, left, right, scale, softcap, alibi_slopes, sinks, backend
        )


def _cast_to_cache(q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Tensor):
    """Under autocast the cache has a dtype already, and it is the others that can follow."""
    for name, x in (("q", q), ("k_cache", k_cache)):
        require_tensor(name, x)
    if q.dtype == k_cache.dtype or not _autocasting(q.device.type):
        return q, k, v
    return tuple(x.to(k_cache.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in (q, k, v))


def _autocasting(device: str) -> bool:
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None) -> None:
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, x, q, "batch or pages")
    _check_integers("cache_seqlens", cache_seqlens, q, (torch.int32, torch.int64), 1)
    _check_rows("k_cache", k_cache)
    _check_rows("v_cache", v_cache)
    if block_table is None:
        require(
            k_cache.shape[0] == q.shape[0],
            ValueError,
            lambda: f"k_cache must have the batch size of q, got {k_cache.shape[0]} and {q.shape[0]}",
        )
    else:
        _check_integers("block_table", block_table, q, (torch.int32,), 2)
        require(
            k_cache.shape[2] > 0 and k_cache.shape[2] % PAGE_MULTIPLE == 0,
            ValueError,
            lambda: f"k_cache: with block_table, page_size must be a multiple of {PAGE_MULTIPLE}, got {k_cache.shape[2]}",
        )
    require(
        k_cache.shape[3] == q.shape[3],
        ValueError,
        lambda: f"k_cache must have the head_dim of q, got {k_cache.shape[3]} and {q.shape[3]}",
    )
    require(
        v_cache.shape[:3] == k_cache.shape[:3],
        ValueError,
        lambda: f"v_cache must have the shape of k_cache except for head_dim, got {tuple(v_cache.shape)} and {tuple(k_cache.shape)}",
    )
    require(
        q.shape[1] == k_cache.shape[1] or (k_cache.shape[1] > 0 and q.shape[1] % k_cache.shape[1] == 0),
        ValueError,
        lambda: f"the number of heads of q must be a multiple of that of k_cache, got {q.shape[1]} and {k_cache.shape[1]}",
    )
    require(
        _capacity(k_cache, block_table) < LONGEST,
        NotImplementedError,
        lambda: f"k_cache: a sequence may have fewer than {LONGEST} places, got {_capacity(k_cache, block_table)}",
    )


def _check_rows(name: str, cache: Tensor) -> None:
    require(
        cache.stride(-1) == 1 or cache.shape[-1] == 1,
        ValueError,
        lambda: f"{name} must have a contiguous head dim (it is read in place, and never copied), got strides {cache.stride()}",
    )


def _check_integers(name: str, x: object, q: Tensor, dtypes: tuple[torch.dtype, ...], ndim: int) -> None:
    """A tensor of lengths or page numbers: one entry, or row of entries, for each sequence."""
    require_tensor(name, x)
    words = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    require(x.dtype in dtypes, TypeError, lambda: f"{name} must be {words}, got {str(x.dtype).removeprefix('torch.')}")
    require(
        x.ndim == ndim and x.shape[0] == q.shape[0],
        ValueError,
        lambda: f"{name} must have shape ({q.shape[0]}{',' if ndim == 1 else ', pages_per_sequence'}), got {tuple(x.shape)}",
    )
    require(x.device == q.device, ValueError, lambda: f"{name} must be on the device of q, got {x.device} and {q.device}")


def _check_new(k: object, v: object, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor | None) -> int:
    """How many keys are new."""
    if k is None and v is None:
        return 0
    missing = "k" if k is None else "v"
    require(
        k is not None and v is not None, ValueError, lambda: f"k and v must be given both or neither, got {missing}=None"
    )
    check_tensor("k", k, q)
    check_tensor("v", v, q)
    _check_written("k", k, k_cache, (q.shape[0], k_cache.shape[1], k.shape[2], k_cache.shape[3]))
    _check_written("v", v, v_cache, (q.shape[0], k_cache.shape[1], k.shape[2], v_cache.shape[3]))
    capacity = _capacity(k_cache, block_table)
    require(
        k.shape[2] <= capacity,
        ValueError,
        lambda: f"k must not be longer than the cache, got {k.shape[2]} new keys for {capacity} places",
    )
    return k.shape[2]


def _check_written(name: str, x: Tensor, cache: Tensor, shape: tuple[int, ...]) -> None:
    require(
        tuple(x.shape) == shape,
        ValueError,
        lambda: f"{name} must have shape {shape}: batch of q, heads of k_cache, length of k, head_dim of {name}_cache; "
        f"got {tuple(x.shape)}",
    )
    require(
        all(stride > 0 for size, stride in zip(cache.shape, cache.stride()) if size > 1),
        ValueError,
        lambda: f"{name}_cache: {name} cannot be written to an expanded tensor, got strides {cache.stride()}",
    )


def _check_per_head(
    name: str, x: object, q: Tensor, dtypes: tuple[torch.dtype, ...], shapes: tuple[tuple[int, ...], ...]
) -> None:
    if x is None:
        return
    require_tensor(name, x)
    words = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    require(x.dtype in dtypes, TypeError, lambda: f"{name} must be {words}, got {str(x.dtype).removeprefix('torch.')}")
    require(
        x.shape in shapes,
        ValueError,
        lambda: f"{name} must have shape {' or '.join(str(tuple(shape)) for shape in shapes)}, got {tuple(x.shape)}",
    )
    require(x.device == q.device, ValueError, lambda: f"{name} must be on the device of q, got {x.device} and {q.device}")


def _reject_gradient(name: str, x: Tensor | None) -> None:
    require(
        x is None or not (x.requires_grad and torch.is_grad_enabled()),
        NotImplementedError,
        lambda: f"{name} requires a gradient, and decoding has none: call under torch.no_grad(), detach {name}, or train with "
        "flash_attention",
    )


def _limits(causal: object, window: object) -> tuple[int, int]:
    """How many keys a query sees before and after its own position. LONGEST: all."""
    arguments.check_flag("causal", causal)
    arguments.check_window(window)
    left, right = (LONGEST if side is None else min(side, LONGEST) for side in limits(causal, window))
    return left, right


def _capacity(k_cache: Tensor, block_table: Tensor | None) -> int:
    return k_cache.shape[2] * (1 if block_table is None else block_table.shape[1])
