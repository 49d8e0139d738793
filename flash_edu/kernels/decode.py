"""Attention to a KV cache: few queries, many keys, so that all the time goes into reading K and V once.

Split-KV decoding (Flash-Decoding: Dao, Haziza, Massa and Sizov 2023, pytorch.org/blog/flash-decoding;
PyTorch's flex_decoding is a relative). A token asks only one query of each head, which would leave most of a
GPU idle, so the keys of a sequence are divided too. The same merge, of partial results by their log-sum-exp,
is made three times:

  - within a warp, tile after tile: the online softmax of forward.py;
  - between the warps of a program, once at its end. Each warp has walked keys of its own, a fraction of every
    tile, and none has waited for another's maximum: its products are tl.dot's with the warp as their batch;
  - between the programs that share a sequence, by the second kernel.

The `group` query heads that share a key/value head are rows of the same tile, so that their keys are read
once for all.
"""
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_edu.kernels.common import LOG2E, dot_rows
from flash_edu.kernels.launch import device_of, dot_precision, head_blocks, row_strides
from flash_edu.kernels.tiles import DecodeTile, choose_decode_tile
from flash_edu.layout import empty_output

# Numbers that change from call to call: no variant of a kernel for each class of values.
SIZES = ["kv_heads", "group", "Nq", "Nnew", "capacity", "num_pages", "left", "right", "num_splits"]
FILL = 4  # times as many programs as fit on the GPU at once: lengths differ, and who is done early takes another
SHORTEST = 16  # tiles: a program with fewer pays more for its start than the balance is worth
MOST_SPLITS = 256
COPY_ROWS = 16  # new keys that a program of append_kernel copies


# --- where a key lies -------------------------------------------------------------------------------------


@triton.jit
def length_of(seqlens_ptr, batch, Nnew, capacity):
    """Keys of a sequence, the new ones among them. No value in cache_seqlens makes it less than 0 or more
    than fits.
    """
    before = tl.minimum(tl.maximum(tl.load(seqlens_ptr + batch), 0), capacity).to(tl.int32)
    return tl.minimum(before + Nnew, capacity)


@triton.jit
def page_of(p_page, num_pages):
    """A page number from the table, forced to exist: what stands there is the user's, and may be anything."""
    return tl.minimum(tl.maximum(tl.load(p_page), 0), num_pages - 1).to(tl.int64)


@triton.jit
def tile_keys(start_n, BLOCK_N: tl.constexpr, WARPS: tl.constexpr):
    """The numbers of a tile's keys: (BLOCK_N,), or if warps walk apart (WARPS, BLOCK_N / WARPS)."""
    if WARPS == 1:
        o_n = start_n + tl.arange(0, BLOCK_N)
    else:
        o_warp = tl.arange(0, WARPS) * (BLOCK_N // WARPS)
        o_n = start_n + o_warp[:, None] + tl.arange(0, BLOCK_N // WARPS)[None, :]
    return o_n


@triton.jit
def tile_rows(
    start_n, table_ptr, stride_page, stride_n, capacity, num_pages,
    BLOCK_N: tl.constexpr, WARPS: tl.constexpr, PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """How far from the cache's first row the rows of a tile lie, shaped as its keys. start_n is a multiple of
    BLOCK_N.
    """
    if table_ptr is None:
        first = tl.cast(start_n, tl.int64) * stride_n
        o_row = first + tile_keys(0, BLOCK_N, WARPS).to(tl.int64) * stride_n
    elif PAGE_SIZE % BLOCK_N == 0:  # the tile lies in one page
        page = page_of(table_ptr + start_n // PAGE_SIZE, num_pages)
        first = page * stride_page + tl.cast(start_n % PAGE_SIZE, tl.int64) * stride_n
        o_row = first + tile_keys(0, BLOCK_N, WARPS).to(tl.int64) * stride_n
    else:
        o_n = tl.minimum(tile_keys(start_n, BLOCK_N, WARPS), capacity - 1)  # the table ends where the capacity does
        page = page_of(table_ptr + o_n // PAGE_SIZE, num_pages)
        o_row = page * stride_page + (o_n % PAGE_SIZE).to(tl.int64) * stride_n
    return o_row


@triton.jit
def load_rows(p_cache, o_row, there, NUM_COLS: tl.constexpr, COLS: tl.constexpr, MASKED: tl.constexpr):
    """Rows of K or V: o_row's shape and COLS more, 0 where a row is not there. Unmasked, all are there."""
    o_col = tl.arange(0, COLS)[None, :] if len(o_row.shape) == 1 else tl.arange(0, COLS)[None, None, :]
    p_rows = p_cache + tl.expand_dims(o_row, len(o_row.shape)) + o_col
    if MASKED:
        b_rows = tl.load(p_rows, mask=tl.expand_dims(there, len(there.shape)) & (o_col < NUM_COLS), other=0.0)
    elif NUM_COLS != COLS:
        b_rows = tl.load(p_rows, mask=o_col < NUM_COLS, other=0.0)
    else:
        b_rows = tl.load(p_rows)
    return b_rows


# --- attention to a tile ----------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """To fp32's last places, as softcap multiplies the error: near 0, where 1 - t cancels, by its series."""
    t = tl.exp2(tl.abs(x) * -2 * LOG2E)
    far = (1 - t) / (1 + t)
    y = x * x
    near = 1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * near, tl.where(x < 0, -far, far))


@triton.jit
def attend_to_tile(
    b_o, b_l, b_m, b_q, b_query, b_slope, p_k, p_v, start_n, table_ptr, stride_kp, stride_kn, stride_vp, stride_vn,
    capacity, num_pages, lo, length, left, right, score_scale, softcap_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    WARPS: tl.constexpr, SPLIT: tl.constexpr, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into (O, l, m). MASKED: it has keys outside lo .. length, or some that only some
    queries see.

    Shapes: b_q (M, D), b_s (M, N), b_o (M, Dv), b_l and b_m (M,), each with a first axis of WARPS if warps
    walk apart. b_query (M, 1): the queries' positions among the keys.
    """
    ROWS_AXIS: tl.constexpr = len(b_q.shape) - 2
    o_n = tile_keys(start_n, BLOCK_N, WARPS)
    there = (o_n >= lo) & (o_n < length)
    o_k = tile_rows(start_n, table_ptr, stride_kp, stride_kn, capacity, num_pages, BLOCK_N, WARPS, PAGE_SIZE)
    b_k = load_rows(p_k, o_k, there, D, BLOCK_D, MASKED)
    o_v = tile_rows(start_n, table_ptr, stride_vp, stride_vn, capacity, num_pages, BLOCK_N, WARPS, PAGE_SIZE)
    b_v = load_rows(p_v, o_v, there, DV, BLOCK_DV, MASKED)

    if WARPS == 1:
        b_s = dot_rows(b_q, b_k, SPLIT, PRECISION)
    else:
        b_s = tl.dot(b_q, tl.permute(b_k, (0, 2, 1)), input_precision=PRECISION)
    b_key = tl.expand_dims(o_n, ROWS_AXIS)
    if softcap_scale is not None:
        b_s = tanh(b_s * softcap_scale)
    to_base_2 = score_scale
    if b_slope is not None:
        b_s = b_s * score_scale - b_slope * tl.abs(b_query - b_key).to(b_s.dtype)
        to_base_2 = 1.0
    if MASKED:
        keep = (b_key < length) & (b_key >= b_query - left) & (b_key <= b_query + right)
        b_s = tl.where(keep, b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, ROWS_AXIS + 1) * to_base_2)
    b_anchor = b_m_new
    if MASKED:
        b_anchor = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)  # -inf - -inf is not a number
    b_p = tl.exp2(b_s * to_base_2 - tl.expand_dims(b_anchor, ROWS_AXIS + 1))
    b_rescale = tl.exp2(b_m - b_anchor)
    b_l = b_l * b_rescale + tl.sum(b_p, ROWS_AXIS + 1)
    b_o = b_o * tl.expand_dims(b_rescale, ROWS_AXIS + 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION, out_dtype=b_o.dtype)
    return b_o, b_l, b_m_new


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seqlens_ptr, table_ptr, slopes_ptr, sinks_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_om, stride_os, stride_tb, stride_sb,
    kv_heads, group, Nq, Nnew, capacity, num_pages, left, right, num_splits, score_scale, softcap_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr, PAGE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows, split, key/value head and sequence. A row is a query of a head: query *
    group + head.

    Rows that share keys stand next to each other in the grid, so that what one reads is in the cache for the
    next.
    """
    num_tiles_m = tl.cdiv(Nq * group, BLOCK_M)
    o_m = tl.program_id(0) % num_tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(0) // num_tiles_m % num_splits
    head_index = tl.program_id(0) // (num_tiles_m * num_splits)
    kv_head = (head_index % kv_heads).to(tl.int64)
    batch = (head_index // kv_heads).to(tl.int64)
    query = o_m // group
    head = kv_head * group + o_m % group
    in_rows = query < Nq

    # Which keys does any query see, lo .. length, and which of their tiles are this program's, begin .. end?
    length = length_of(seqlens_ptr, batch, Nnew, capacity)
    first_position = length - Nq  # of query 0, among the keys: aligned bottom-right
    lo = tl.maximum(0, first_position - left)
    first_tile = lo // BLOCK_N
    num_tiles = tl.maximum(0, tl.cdiv(length, BLOCK_N) - first_tile)
    begin = (first_tile + (split * num_tiles) // num_splits) * BLOCK_N
    end = (first_tile + ((split + 1) * num_tiles) // num_splits) * BLOCK_N
    # Tiles in full_lo .. full_hi are seen whole, by every query: the last one's window begins latest, the
    # first one's ends first.
    full_lo = tl.cdiv(tl.maximum(0, length - 1 - left), BLOCK_N) * BLOCK_N
    full_lo = tl.minimum(end, tl.maximum(begin, full_lo))
    full_hi = tl.maximum(0, tl.minimum(length, first_position + 1 + right)) // BLOCK_N * BLOCK_N
    full_hi = tl.maximum(full_lo, tl.minimum(end, full_hi))

    p_k = k_ptr + kv_head * stride_kh
    p_v = v_ptr + kv_head * stride_vh
    if table_ptr is None:
        p_k += batch * stride_kb
        p_v += batch * stride_vb
        p_table = table_ptr
    else:
        p_table = table_ptr + batch * stride_tb

    o_d = tl.arange(0, BLOCK_D)
    p_q = q_ptr + batch * stride_qb + head * stride_qh + query.to(tl.int64) * stride_qm
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=in_rows[:, None] & (o_d < D)[None, :], other=0.0)
    b_query = (first_position + query)[:, None]
    b_slope = None
    if slopes_ptr is not None:
        b_slope = tl.load(slopes_ptr + batch * stride_sb + head, mask=in_rows, other=0.0).to(tl.float32)[:, None] * LOG2E
    if WARPS == 1:
        b_o = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
        b_l = tl.zeros([BLOCK_M], dtype=tl.float32)
        b_m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    else:
        b_q = tl.broadcast_to(b_q[None, :, :], [WARPS, BLOCK_M, BLOCK_D])
        b_o = tl.zeros([WARPS, BLOCK_M, BLOCK_DV], dtype=tl.float32)
        b_l = tl.zeros([WARPS, BLOCK_M], dtype=tl.float32)
        b_m = tl.full([WARPS, BLOCK_M], float("-inf"), dtype=tl.float32)

    for start_n in range(full_lo, full_hi, BLOCK_N):
        b_o, b_l, b_m = attend_to_tile(
            b_o, b_l, b_m, b_q, b_query, b_slope, p_k, p_v, start_n, p_table, stride_kb, stride_kn, stride_vb, stride_vn,
            capacity, num_pages, lo, length, left, right, score_scale, softcap_scale,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, WARPS, SPLIT, PAGE_SIZE, False, PRECISION,
        )  # fmt: skip
    # The ragged tiles, before and after: a few, of few programs. Not pipelined, they take no shared memory
    # from the others.
    before = (full_lo - begin) // BLOCK_N
    for i in tl.range(0, before + (end - full_hi) // BLOCK_N, num_stages=1):
        start_n = tl.where(i < before, begin + i * BLOCK_N, full_hi + (i - before) * BLOCK_N)
        b_o, b_l, b_m = attend_to_tile(
            b_o, b_l, b_m, b_q, b_query, b_slope, p_k, p_v, start_n, p_table, stride_kb, stride_kn, stride_vb, stride_vn,
            capacity, num_pages, lo, length, left, right, score_scale, softcap_scale,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, WARPS, SPLIT, PAGE_SIZE, True, PRECISION,
        )  # fmt: skip

    # Merge the warps, and the sink, a score without a value, which must count in one split only.
    b_top = b_m if WARPS == 1 else tl.max(b_m, 0)
    if sinks_ptr is not None:
        b_sink = tl.load(sinks_ptr + head, mask=in_rows & (split == 0), other=float("-inf")).to(tl.float32) * LOG2E
        b_top = tl.maximum(b_top, b_sink)
    b_anchor = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_weight = tl.exp2(b_m - b_anchor)
    b_l = b_l * b_weight
    b_o = b_o * tl.expand_dims(b_weight, len(b_weight.shape))
    if WARPS > 1:
        b_l = tl.sum(b_l, 0)
        b_o = tl.sum(b_o, 0)
    if sinks_ptr is not None:
        b_l += tl.exp2(b_sink - b_anchor)

    # Normalise. A row that attended to nothing has l = 0: out = 0 and, in base 2 here, lse = -inf.
    empty = b_l == 0.0
    b_l = tl.where(empty, 1.0, b_l)
    b_o = b_o / b_l[:, None]
    o_dv = tl.arange(0, BLOCK_DV)
    p_out = out_ptr + batch * stride_ob + head * stride_oh + query.to(tl.int64) * stride_om + split * stride_os
    mask = in_rows[:, None] & (o_dv < DV)[None, :]
    tl.store(p_out[:, None] + o_dv[None, :], b_o.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None:
        row = (batch * kv_heads * group + head) * Nq + query
        tl.store(lse_ptr + row * num_splits + split, tl.where(empty, float("-inf"), b_anchor + tl.log2(b_l)), mask=in_rows)


@triton.jit(do_not_specialize=["heads", "Nq", "num_splits"])
def merge_kernel(
    part_ptr, lse_ptr, out_ptr, stride_ob, stride_oh, stride_om, heads, Nq, num_splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per query of a head: its splits' results, always in one order, weighted by exp2(lse)."""
    row = tl.program_id(0).to(tl.int64)
    o_dv = tl.arange(0, BLOCK_DV)
    b_o = tl.zeros([BLOCK_DV], dtype=tl.float32)
    l = tl.cast(0.0, tl.float32)
    m = tl.cast(float("-inf"), tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        b_lse = tl.load(lse_ptr + row * num_splits + o_s, mask=o_s < num_splits, other=float("-inf"))
        p_part = part_ptr + (row * num_splits + o_s)[:, None] * DV + o_dv[None, :]
        b_part = tl.load(p_part, mask=(o_s < num_splits)[:, None] & (o_dv < DV)[None, :], other=0.0)
        m_new = tl.maximum(m, tl.max(b_lse, 0))
        anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
        b_weight = tl.exp2(b_lse - anchor)
        rescale = tl.exp2(m - anchor)
        l = l * rescale + tl.sum(b_weight, 0)
        b_o = b_o * rescale + tl.sum(b_part * b_weight[:, None], 0)
        m = m_new
    b_o = b_o / tl.where(l == 0.0, 1.0, l)
    batch, head, query = row // Nq // heads, row // Nq % heads, row % Nq
    p_out = out_ptr + batch * stride_ob + head * stride_oh + query * stride_om
    tl.store(p_out + o_dv, b_o.to(out_ptr.dtype.element_ty), mask=o_dv < DV)


@triton.jit(do_not_specialize=SIZES)
def append_kernel(
    new_k_ptr, new_v_ptr, k_ptr, v_ptr, seqlens_ptr, table_ptr,
    stride_nkb, stride_nkh, stride_nkn, stride_nvb, stride_nvh, stride_nvn,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, stride_tb,
    kv_heads, Nnew, capacity, num_pages,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """One program per key/value head and BLOCK_N new keys. A key that does not fit, or whose page does not
    exist, is dropped.
    """
    num_tiles = tl.cdiv(Nnew, BLOCK_N)
    o_n = tl.program_id(0) % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    head_index = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, kv_head = head_index // kv_heads, head_index % kv_heads
    place = length_of(seqlens_ptr, batch, 0, capacity) + o_n
    fits = (o_n < Nnew) & (place < capacity)
    o_n = o_n.to(tl.int64)
    if table_ptr is None:
        o_k = batch * stride_kb + place.to(tl.int64) * stride_kn
        o_v = batch * stride_vb + place.to(tl.int64) * stride_vn
    else:
        page = tl.load(table_ptr + batch * stride_tb + place // PAGE_SIZE, mask=fits, other=-1).to(tl.int64)
        fits = fits & (page >= 0) & (page < num_pages)
        o_k = page * stride_kb + (place % PAGE_SIZE).to(tl.int64) * stride_kn
        o_v = page * stride_vb + (place % PAGE_SIZE).to(tl.int64) * stride_vn
    o_new_k = batch * stride_nkb + kv_head * stride_nkh + o_n * stride_nkn
    o_new_v = batch * stride_nvb + kv_head * stride_nvh + o_n * stride_nvn
    copy_rows(new_k_ptr + o_new_k, k_ptr + kv_head * stride_kh + o_k, fits, D, BLOCK_D)
    copy_rows(new_v_ptr + o_new_v, v_ptr + kv_head * stride_vh + o_v, fits, DV, BLOCK_DV)


@triton.jit
def copy_rows(p_from, p_to, there, NUM_COLS: tl.constexpr, COLS: tl.constexpr):
    o_col = tl.arange(0, COLS)[None, :]
    mask = there[:, None] & (o_col < NUM_COLS)
    tl.store(p_to[:, None] + o_col, tl.load(p_from[:, None] + o_col, mask=mask), mask=mask)


# --- launches ---------------------------------------------------------------------------------------------


def append(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, table: Tensor | None) -> None:
    """Write k and v behind each sequence's keys, in place. Tensors in rows; arguments as in
    flash_attention_kvcache.
    """
    batch, kv_heads, new, _ = k.shape
    grid = (batch * kv_heads * _cdiv(new, COPY_ROWS),)
    with device_of(k):
        append_kernel[grid](
            k, v, k_cache, v_cache, seqlens, table, *row_strides(k, v, k_cache, v_cache), _stride(table),
            kv_heads, new, _capacity(k_cache, table), k_cache.shape[0], **head_blocks(k, v), BLOCK_N=COPY_ROWS,
            PAGE_SIZE=_page_size(k_cache, table), num_warps=4,
        )  # fmt: skip


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
    *,
    num_splits: int = 0,
    tile: DecodeTile | None = None,
) -> Tensor:
    """out (B, Hq, Nq, Dv). Tensors in rows; num_splits 0 and tile None are chosen here, from shapes alone."""
    batch, heads, nq, d = q.shape
    kv_heads, dv = k_cache.shape[1], v_cache.shape[-1]
    capacity, page_size = _capacity(k_cache, table), _page_size(k_cache, table)
    tile = tile or choose_decode_tile(max(d, dv), nq * heads // kv_heads, q.dtype, q.device)
    programs = batch * kv_heads * _cdiv(nq * heads // kv_heads, tile.block_m)  # for each split
    num_splits = num_splits or choose_splits(programs, min(capacity, nq + left), tile, q.device)
    out = empty_output(q, v_cache)
    part, lse, split_stride = out, None, 0
    if num_splits > 1:
        part = q.new_empty((batch, heads, nq, num_splits, dv), dtype=torch.float32)
        lse = q.new_empty((batch, heads, nq, num_splits), dtype=torch.float32)
        split_stride = dv
    softcap_scale, score_scale = (None, scale) if softcap is None else (scale / softcap, softcap)
    blocks = head_blocks(q, v_cache)
    with device_of(q):
        decode_kernel[(programs * num_splits,)](
            q, k_cache, v_cache, part, lse, seqlens, table, slopes, sinks, *row_strides(q, k_cache, v_cache, part),
            split_stride, _stride(table), _stride(slopes) if slopes is not None and slopes.ndim == 2 else 0,
            kv_heads, heads // kv_heads, nq, new, capacity, k_cache.shape[0], left, right, num_splits,
            score_scale * LOG2E.value, softcap_scale, **blocks, **tile.options(paged=table is not None),
            PAGE_SIZE=page_size, PRECISION=dot_precision(q.dtype),
        )  # fmt: skip
        if num_splits > 1:
            merge_kernel[(batch * heads * nq,)](
                part, lse, out, *row_strides(out), heads, nq, num_splits, DV=dv, BLOCK_DV=blocks["BLOCK_DV"],
                BLOCK_S=32, num_warps=4,
            )  # fmt: skip
    return out


def choose_splits(programs: int, keys: int, tile: DecodeTile, device: torch.device) -> int:
    """Into how many parts to divide each sequence, of at most `keys` keys, if a part takes `programs`
    programs.

    Enough that every place on the GPU is taken; beyond that, as many as balance sequences of different
    lengths.
    """
    tiles = _cdiv(keys, tile.block_n)
    places = tile.resident * _processors(device)
    splits = max(places // programs, min(FILL * places // programs, tiles // SHORTEST))
    return max(1, min(splits, tiles, MOST_SPLITS))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv is made for kernels, and takes 4 us outside of them


def _page_size(k_cache: Tensor, table: Tensor | None) -> int:
    """0 if the cache is not paged: its length must not select a variant of the kernel."""
    return 0 if table is None else k_cache.shape[2]


def _capacity(k_cache: Tensor, table: Tensor | None) -> int:
    return k_cache.shape[2] * (1 if table is None else table.shape[1])


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
