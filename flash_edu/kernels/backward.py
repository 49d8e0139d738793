"""The fused backward: D, then dK and dV, then dQ. No atomics, so the same inputs give the same bits.

FlashAttention-2, Algorithm 2 (Dao 2023), split in two passes. Both recompute P from the saved lse:
    P = exp(scale * Q K^T - lse),  dP = dO V^T,  dS = P * (dP - D),  D = rowsum(dO * O) - dlse,
    dV = P^T dO,  dK = scale * dS^T Q,  dQ = scale * dS K.
With dropout, the weights that are kept are made again, Z = keep / (1 - p): dV = (P * Z)^T dO, dP = (dO V^T) * Z.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_edu.kernels.common import SIZES, dot_rows, load_tile, store_tile
from flash_edu.kernels.launch import (
    device_of,
    dot_precision,
    head_blocks,
    longest_key,
    longest_query,
    lse_strides,
    num_sequences,
    row_strides,
    wide,
)
from flash_edu.kernels.scores import (
    changed_scores_and_slopes,
    changes_scores,
    dropout_keeps,
    hides_any,
    hides_keys,
    kernel_rules,
    key_at,
    keys_walk,
    load_keys,
    load_lse,
    queries_walk,
    query_at,
    sequence,
    units,
    visible,
    weights,
    zero_unseen,
)
from flash_edu.kernels.tiles import choose_tile
from flash_edu.layout import empty_like_rows
from flash_edu.rules import Rules


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr,
    stride_ob, stride_oh, stride_om, stride_dob, stride_doh, stride_dom,
    stride_lb, stride_lh, stride_lm, num_heads, Nq,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """D = rowsum(dO * O) - dlse: what every dS of a row subtracts."""
    num_tiles = tl.cdiv(Nq, BLOCK_M)
    start_m = tl.program_id(0) % num_tiles * BLOCK_M
    head_index = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = head_index // num_heads, head_index % num_heads
    p_o = o_ptr + batch * stride_ob + head * stride_oh
    p_do = do_ptr + batch * stride_dob + head * stride_doh
    b_o = load_tile(p_o, start_m, stride_om, Nq, DV, BLOCK_M, BLOCK_DV, True)
    b_do = load_tile(p_do, start_m, stride_dom, Nq, DV, BLOCK_M, BLOCK_DV, True)
    b_delta = tl.sum(b_o.to(WIDE) * b_do.to(WIDE), 1)
    o_m = start_m + tl.arange(0, BLOCK_M)
    if HAS_DLSE:
        p_dlse = dlse_ptr + batch * stride_lb + head * stride_lh + o_m.to(tl.int64) * stride_lm
        b_delta -= tl.load(p_dlse, mask=o_m < Nq, other=0.0)
    tl.store(delta_ptr + head_index * Nq + o_m, b_delta, mask=o_m < Nq)


@triton.jit(do_not_specialize=SIZES)
def dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_dom,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, stride_lb, stride_lh,
    num_heads, group, longest, Nq, Nk, scale, to_log2, rules,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys walks the queries, of every query head that reads this key/value head (of num_heads).

    Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T stand ready as left operands. A query past the end
    has lse = +inf, hence P = 0. A key past the end fills only its own rows of dK and dV, which are never stored.
    """
    num_tiles = tl.cdiv(longest, BLOCK_N)
    start_n = tl.program_id(0) % num_tiles * BLOCK_N
    head_index = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, kv_head = head_index // num_heads, head_index % num_heads
    first_q, Nq = sequence(rules.cu_q, batch, Nq)
    first_k, Nk = sequence(rules.cu_k, batch, Nk)
    if rules.cu_k is not None:
        if start_n >= Nk:
            return
    p_k = k_ptr + batch * stride_kb + kv_head * stride_kh + first_k * stride_kn
    p_v = v_ptr + batch * stride_vb + kv_head * stride_vh + first_k * stride_vn
    b_k = load_keys(p_k, start_n, stride_kn, Nq, Nk, rules, D, BLOCK_N, BLOCK_D, True)
    b_v = load_keys(p_v, start_n, stride_vn, Nq, Nk, rules, DV, BLOCK_N, BLOCK_DV, True)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=WIDE)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=WIDE)
    j = start_n + tl.arange(0, BLOCK_N)[:, None]

    # One loop over the queries of all heads in a row. (Masking only the tiles on the diagonal, as the forward does, would
    # take a second loop; the compiler then runs out of registers.)
    start, end, tiles, num_full = queries_walk(start_n, batch, kv_head, Nq, Nk, rules, BLOCK_M, BLOCK_N)
    num_steps = tl.cdiv(tl.maximum(0, end - start), BLOCK_M)
    head = kv_head * group
    position = start
    for _ in range(group * num_steps):
        start_m = query_at(position, tiles, num_full, rules)
        o_m = start_m + tl.arange(0, BLOCK_M)
        i = o_m[None, :]
        p_row = batch * stride_lb + head * stride_lh + first_q
        b_q = load_tile(
            q_ptr + batch * stride_qb + head * stride_qh + first_q * stride_qm,
            start_m, stride_qm, Nq, D, BLOCK_M, BLOCK_D, True,
        )  # fmt: skip
        b_lse = load_lse(lse_ptr + p_row, o_m, Nq)
        b_st = dot_rows(b_k, b_q, SPLIT, PRECISION)  # (BLOCK_N, BLOCK_M)
        if changes_scores(rules):
            b_st, b_slope, _ = changed_scores_and_slopes(b_st * scale, batch, head, i, j, Nq, Nk, rules)
        b_pt = weights(b_st, b_lse[None, :], to_log2, rules)
        if hides_any(rules):
            b_keep = visible(batch, head, i, j, Nq, Nk, rules)
            b_pt = tl.where(b_keep, b_pt, 0.0)
        b_do = load_tile(
            do_ptr + batch * stride_dob + head * stride_doh + first_q * stride_dom,
            start_m, stride_dom, Nq, DV, BLOCK_M, BLOCK_DV, True,
        )  # fmt: skip
        b_zt = b_pt
        if rules.seed is not None:
            b_kept = tl.trans(dropout_keeps(batch * num_heads * group + head, start_m, start_n, rules, BLOCK_M, BLOCK_N))
            b_zt = tl.where(b_kept, b_pt * rules.dropout_scale, 0.0)
        b_dv = tl.dot(b_zt.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION, out_dtype=b_dv.dtype)
        b_delta = tl.load(delta_ptr + p_row + o_m, mask=o_m < Nq, other=0.0)
        b_dpt = dot_rows(b_v, b_do, SPLIT, PRECISION)
        if rules.seed is not None:
            b_dpt = tl.where(b_kept, b_dpt * rules.dropout_scale, 0.0)
        b_dst = b_pt * (b_dpt - b_delta[None, :])
        if changes_scores(rules):
            b_dst *= b_slope
        if hides_keys(rules):
            b_dst = tl.where(b_keep, b_dst, 0.0)  # a hidden value may be NaN, and so is 0 * NaN
        b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION, out_dtype=b_dk.dtype)
        position += BLOCK_M
        head = tl.where(position >= end, head + 1, head)
        position = tl.where(position >= end, start, position)

    p_dk = dk_ptr + batch * stride_dkb + kv_head * stride_dkh + first_k * stride_dkn
    p_dv = dv_ptr + batch * stride_dvb + kv_head * stride_dvh + first_k * stride_dvn
    store_tile(p_dk, b_dk * scale, start_n, stride_dkn, Nk, D, BLOCK_N, BLOCK_D)
    store_tile(p_dv, b_dv, start_n, stride_dvn, Nk, DV, BLOCK_N, BLOCK_DV)


@triton.jit
def accumulate_dq(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, batch, head, num_heads, start_m, lo, hi, tiles, hole_start, hole,
    stride_kn, stride_vn, Nq, Nk, scale, to_log2, rules,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys of a walk contribute to one tile's dQ."""
    i = start_m + tl.arange(0, BLOCK_M)[:, None]
    for position in range(lo, hi, BLOCK_N):
        start_n = key_at(position, tiles, hole_start, hole, rules, BLOCK_N)
        j = start_n + tl.arange(0, BLOCK_N)[None, :]
        b_k = load_keys(p_k, start_n, stride_kn, Nq, Nk, rules, D, BLOCK_N, BLOCK_D, MASKED)
        b_s = dot_rows(b_q, b_k, SPLIT, PRECISION)  # (BLOCK_M, BLOCK_N)
        if changes_scores(rules):
            b_s, b_slope, _ = changed_scores_and_slopes(b_s * scale, batch, head, i, j, Nq, Nk, rules)
        b_p = weights(b_s, b_lse[:, None], to_log2, rules)
        if MASKED:
            b_keep = visible(batch, head, i, j, Nq, Nk, rules)
            b_p = tl.where(b_keep, b_p, 0.0)
        b_v = load_keys(p_v, start_n, stride_vn, Nq, Nk, rules, DV, BLOCK_N, BLOCK_DV, MASKED)
        b_dp = dot_rows(b_do, b_v, SPLIT, PRECISION)
        if rules.seed is not None:
            b_kept = dropout_keeps(batch * num_heads + head, start_m, start_n, rules, BLOCK_M, BLOCK_N)
            b_dp = tl.where(b_kept, b_dp * rules.dropout_scale, 0.0)
        b_ds = b_p * (b_dp - b_delta[:, None])
        if changes_scores(rules):
            b_ds *= b_slope
        if MASKED and hides_keys(rules):
            b_ds = tl.where(b_keep, b_ds, 0.0)  # a hidden value may be NaN, and so is 0 * NaN
            b_k = zero_unseen(b_k, tl.max(b_keep.to(tl.int32), 0) > 0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION, out_dtype=b_dq.dtype)
    return b_dq


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_dom,
    stride_dqb, stride_dqh, stride_dqm, stride_lb, stride_lh,
    num_heads, group, longest, Nq, Nk, scale, to_log2, rules,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries walks the keys, as in the forward."""
    num_tiles = tl.cdiv(longest, BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    if rules.right is not None:
        tile = num_tiles - 1 - tile
    start_m = tile * BLOCK_M
    head_index = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = head_index // num_heads, head_index % num_heads
    first_q, Nq = sequence(rules.cu_q, batch, Nq)
    first_k, Nk = sequence(rules.cu_k, batch, Nk)
    if rules.cu_q is not None:
        if start_m >= Nq:
            return
    p_q = q_ptr + batch * stride_qb + head * stride_qh + first_q * stride_qm
    p_do = do_ptr + batch * stride_dob + head * stride_doh + first_q * stride_dom
    p_k = k_ptr + batch * stride_kb + head // group * stride_kh + first_k * stride_kn
    p_v = v_ptr + batch * stride_vb + head // group * stride_vh + first_k * stride_vn

    o_m = start_m + tl.arange(0, BLOCK_M)
    p_row = batch * stride_lb + head * stride_lh + first_q
    b_q = load_tile(p_q, start_m, stride_qm, Nq, D, BLOCK_M, BLOCK_D, True)
    b_do = load_tile(p_do, start_m, stride_dom, Nq, DV, BLOCK_M, BLOCK_DV, True)
    b_lse = load_lse(lse_ptr + p_row, o_m, Nq)
    b_delta = tl.load(delta_ptr + p_row + o_m, mask=o_m < Nq, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=WIDE)

    full_lo, full_hi, full_tiles, lo, hi, tiles, hole = keys_walk(start_m, batch, head, Nq, Nk, rules, BLOCK_M, BLOCK_N)
    b_dq = accumulate_dq(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, batch, head, num_heads, start_m, full_lo, full_hi, full_tiles, full_hi, 0,
        stride_kn, stride_vn, Nq, Nk, scale, to_log2, rules,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SPLIT, False, PRECISION,
    )  # fmt: skip
    if lo < hi:
        b_dq = accumulate_dq(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, batch, head, num_heads, start_m, lo, hi, tiles, full_lo, hole,
            stride_kn, stride_vn, Nq, Nk, scale, to_log2, rules,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SPLIT, True, PRECISION,
        )  # fmt: skip
    p_dq = dq_ptr + batch * stride_dqb + head * stride_dqh + first_q * stride_dqm
    store_tile(p_dq, b_dq * scale, start_m, stride_dqm, Nq, D, BLOCK_M, BLOCK_D)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the three kernels: dq, dk, dv, laid out as q, k, v. All in rows; dlse in any strides."""
    delta = _delta(dout, dlse, out, lse)
    dq, dk, dv = (empty_like_rows(x) for x in (q, k, v))
    inputs = (q, k, v, dout, lse, delta)
    strides = row_strides(q, k, v, dout, packed=rules.packed)
    lse_steps, sequences = lse_strides(lse, rules.packed), num_sequences(q, rules)
    heads, kv_heads = q.shape[1], k.shape[1]
    sizes = (q.shape[2], k.shape[2])
    options = head_blocks(q, v) | {"PRECISION": dot_precision(q.dtype), "WIDE": wide(q.dtype)}
    head_dim = max(q.shape[-1], v.shape[-1])
    with device_of(q):
        tile = choose_tile("backward_kv", head_dim, q.dtype, q.device)
        longest, asked = longest_key(k, rules), kernel_rules(rules, q, k, walk=1)
        dk_dv_kernel[(triton.cdiv(longest, tile.block_n) * sequences * kv_heads,)](
            *inputs, dk, dv, *strides, *row_strides(dk, dv, packed=rules.packed), *lse_steps,
            kv_heads, heads // kv_heads, longest, *sizes, *units(rules, asked), asked, **options, **tile.options(),
        )  # fmt: skip
        tile = choose_tile("backward_q", head_dim, q.dtype, q.device)
        longest, asked = longest_query(q, rules), kernel_rules(rules, q, k, walk=0)
        dq_kernel[(triton.cdiv(longest, tile.block_m) * sequences * heads,)](
            *inputs, dq, *strides, *row_strides(dq, packed=rules.packed), *lse_steps,
            heads, heads // kv_heads, longest, *sizes, *units(rules, asked), asked, **options, **tile.options(),
        )  # fmt: skip
    return dq, dk, dv


def _delta(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> Tensor:
    """D = rowsum(dO * O) - dlse, (B, Hq, Nq)."""
    delta = torch.empty_like(lse)
    batch, heads, nq, dv = out.shape
    block_m, block_dv = 64, max(16, triton.next_power_of_2(dv))
    dlse_strides = (0, 0, 0) if dlse is None else dlse.stride()
    with device_of(out):
        delta_kernel[(triton.cdiv(nq, block_m) * batch * heads,)](
            out, dout, dlse, delta, *row_strides(out, dout), *dlse_strides, heads, nq,
            DV=dv, BLOCK_DV=block_dv, BLOCK_M=block_m, HAS_DLSE=dlse is not None, WIDE=wide(out.dtype),
        )  # fmt: skip
    return delta

