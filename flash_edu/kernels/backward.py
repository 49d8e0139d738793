"""The fused backward: D, then dK and dV, then dQ. No atomics, so the same inputs give the same bits.

FlashAttention-2, Algorithm 2 (Dao 2023), split in two passes. Both recompute P from the saved lse:
    P = exp(scale * Q K^T - lse),  dP = dO V^T,  dS = P * (dP - D),  D = rowsum(dO * O) - dlse,
    dV = P^T dO,  dK = scale * dS^T Q,  dQ = scale * dS K.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_edu.kernels.common import LOG2E, SIZES, attends, dot_rows, load_tile, store_tile
from flash_edu.kernels.launch import device_of, dot_precision, head_blocks, row_strides
from flash_edu.kernels.tiles import choose_tile
from flash_edu.layout import empty_like_rows


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
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    num_heads, group, Nq, Nk, scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program per tile of keys walks the queries, of every query head that reads this key/value head (of num_heads).

    Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T stand ready as left operands. A query past the end
    has lse = +inf, hence P = 0. A key past the end fills only its own rows of dK and dV, which are never stored.
    """
    num_tiles = tl.cdiv(Nk, BLOCK_N)
    start_n = tl.program_id(0) % num_tiles * BLOCK_N
    head_index = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, kv_head = head_index // num_heads, head_index % num_heads
    p_k = k_ptr + batch * stride_kb + kv_head * stride_kh
    p_v = v_ptr + batch * stride_vb + kv_head * stride_vh
    b_k = load_tile(p_k, start_n, stride_kn, Nk, D, BLOCK_N, BLOCK_D, True)
    b_v = load_tile(p_v, start_n, stride_vn, Nk, DV, BLOCK_N, BLOCK_DV, True)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=WIDE)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=WIDE)

    # Causal: queries before `start` see none of these keys. (Masking only the tiles on the diagonal, as the forward does,
    # would take a second loop; the compiler then runs out of registers.)
    start = 0
    if CAUSAL:
        start = tl.maximum(0, start_n - (Nk - Nq)) // BLOCK_M * BLOCK_M
    num_steps = tl.cdiv(tl.maximum(0, Nq - start), BLOCK_M)
    head = kv_head * group
    start_m = start
    for _ in range(group * num_steps):
        o_m = start_m + tl.arange(0, BLOCK_M)
        row = (batch * num_heads * group + head) * Nq
        p_q = q_ptr + batch * stride_qb + head * stride_qh
        b_q = load_tile(p_q, start_m, stride_qm, Nq, D, BLOCK_M, BLOCK_D, True)
        b_lse = tl.load(lse_ptr + row + o_m, mask=o_m < Nq, other=float("inf"))
        b_st = dot_rows(b_k, b_q, SPLIT, PRECISION)  # (BLOCK_N, BLOCK_M)
        b_pt = tl.exp2(b_st * scale_log2 - b_lse[None, :] * LOG2E)
        if CAUSAL:
            b_pt = tl.where(tl.trans(attends(start_m, start_n, Nq, Nk, BLOCK_M, BLOCK_N, CAUSAL)), b_pt, 0.0)
        p_do = do_ptr + batch * stride_dob + head * stride_doh
        b_do = load_tile(p_do, start_m, stride_dom, Nq, DV, BLOCK_M, BLOCK_DV, True)
        b_dv = tl.dot(b_pt.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION, out_dtype=b_dv.dtype)
        b_delta = tl.load(delta_ptr + row + o_m, mask=o_m < Nq, other=0.0)
        b_dpt = dot_rows(b_v, b_do, SPLIT, PRECISION)
        b_dst = b_pt * (b_dpt - b_delta[None, :])
        b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION, out_dtype=b_dk.dtype)
        start_m += BLOCK_M
        head = tl.where(start_m >= Nq, head + 1, head)
        start_m = tl.where(start_m >= Nq, start, start_m)

    p_dk = dk_ptr + batch * stride_dkb + kv_head * stride_dkh
    p_dv = dv_ptr + batch * stride_dvb + kv_head * stride_dvh
    store_tile(p_dk, b_dk * scale, start_n, stride_dkn, Nk, D, BLOCK_N, BLOCK_D)
    store_tile(p_dv, b_dv, start_n, stride_dvn, Nk, DV, BLOCK_N, BLOCK_DV)


@triton.jit
def accumulate_dq(
    b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, start_m, lo, hi,
    stride_kn, stride_vn, Nq, Nk, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys lo .. hi contribute to one tile's dQ."""
    for start_n in range(lo, hi, BLOCK_N):
        b_k = load_tile(p_k, start_n, stride_kn, Nk, D, BLOCK_N, BLOCK_D, MASKED)
        b_s = dot_rows(b_q, b_k, SPLIT, PRECISION)  # (BLOCK_M, BLOCK_N)
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None] * LOG2E)
        if MASKED:
            b_p = tl.where(attends(start_m, start_n, Nq, Nk, BLOCK_M, BLOCK_N, CAUSAL), b_p, 0.0)
        b_v = load_tile(p_v, start_n, stride_vn, Nk, DV, BLOCK_N, BLOCK_DV, MASKED)
        b_dp = dot_rows(b_do, b_v, SPLIT, PRECISION)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION, out_dtype=b_dq.dtype)
    return b_dq


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_dom,
    stride_dqb, stride_dqh, stride_dqm, num_heads, group, Nq, Nk, scale, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program per tile of queries walks the keys, as in the forward."""
    num_tiles = tl.cdiv(Nq, BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    if CAUSAL:
        tile = num_tiles - 1 - tile
    start_m = tile * BLOCK_M
    head_index = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = head_index // num_heads, head_index % num_heads
    p_q = q_ptr + batch * stride_qb + head * stride_qh
    p_do = do_ptr + batch * stride_dob + head * stride_doh
    p_k = k_ptr + batch * stride_kb + head // group * stride_kh
    p_v = v_ptr + batch * stride_vb + head // group * stride_vh

    o_m = start_m + tl.arange(0, BLOCK_M)
    b_q = load_tile(p_q, start_m, stride_qm, Nq, D, BLOCK_M, BLOCK_D, True)
    b_do = load_tile(p_do, start_m, stride_dom, Nq, DV, BLOCK_M, BLOCK_DV, True)
    b_lse = tl.load(lse_ptr + head_index * Nq + o_m, mask=o_m < Nq, other=float("inf"))
    b_delta = tl.load(delta_ptr + head_index * Nq + o_m, mask=o_m < Nq, other=0.0)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=WIDE)

    full = Nk
    end = Nk
    if CAUSAL:
        full = tl.minimum(Nk, tl.maximum(0, start_m + 1 + Nk - Nq))
        end = tl.minimum(Nk, tl.maximum(0, start_m + BLOCK_M + Nk - Nq))
    full = full // BLOCK_N * BLOCK_N
    b_dq = accumulate_dq(
        b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, start_m, 0, full, stride_kn, stride_vn,
        Nq, Nk, scale_log2, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SPLIT, CAUSAL, False, PRECISION,
    )  # fmt: skip
    if full < end:
        b_dq = accumulate_dq(
            b_dq, b_q, b_do, b_lse, b_delta, p_k, p_v, start_m, full, end, stride_kn, stride_vn,
            Nq, Nk, scale_log2, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SPLIT, CAUSAL, True, PRECISION,
        )  # fmt: skip
    p_dq = dq_ptr + batch * stride_dqb + head * stride_dqh
    store_tile(p_dq, b_dq * scale, start_m, stride_dqm, Nq, D, BLOCK_M, BLOCK_D)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the three kernels: dq, dk, dv, laid out as q, k, v. All in rows; dlse in any strides."""
    delta = _delta(dout, dlse, out, lse)
    dq, dk, dv = (empty_like_rows(x) for x in (q, k, v))
    inputs = (q, k, v, dout, lse, delta)
    strides = row_strides(q, k, v, dout)
    batch, heads, nq, _ = q.shape
    kv_heads, nk = k.shape[1:3]
    sizes = (heads // kv_heads, nq, nk, scale, scale * LOG2E.value)
    options = head_blocks(q, v) | {
        "CAUSAL": causal, "PRECISION": dot_precision(q.dtype), "WIDE": _wide(q.dtype),
    }  # fmt: skip
    head_dim = max(q.shape[-1], v.shape[-1])
    with device_of(q):
        tile = choose_tile("backward_kv", head_dim, q.dtype, q.device)
        dk_dv_kernel[(triton.cdiv(nk, tile.block_n) * batch * kv_heads,)](
            *inputs, dk, dv, *strides, *row_strides(dk, dv), kv_heads, *sizes, **options, **tile.options()
        )
        tile = choose_tile("backward_q", head_dim, q.dtype, q.device)
        dq_kernel[(triton.cdiv(nq, tile.block_m) * batch * heads,)](
            *inputs, dq, *strides, *row_strides(dq), heads, *sizes, **options, **tile.options()
        )
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
            DV=dv, BLOCK_DV=block_dv, BLOCK_M=block_m, HAS_DLSE=dlse is not None, WIDE=_wide(out.dtype),
        )  # fmt: skip
    return delta


def _wide(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32
