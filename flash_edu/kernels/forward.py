"""The fused forward: one program per tile of queries walks the keys and keeps only m, l and O.

FlashAttention-2, Algorithm 1 (Dao 2023). Scores are kept in base 2: with c = scale * log2(e), exp(scale * s) is
exp2(c * s), and c * s - m is one fused multiply-add.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_edu.kernels.common import LN2, LOG2E, SIZES, attends, dot_rows, load_tile, store_tile
from flash_edu.kernels.launch import device_of, dot_precision, head_blocks, row_strides
from flash_edu.kernels.tiles import choose_tile
from flash_edu.layout import empty_outputs


@triton.jit
def attend_to_tiles(
    b_o, b_l, b_m, b_q, p_k, p_v, start_m, lo, hi, stride_kn, stride_vn, Nq, Nk, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys lo .. hi into (O, l, m), one tile at a time. MASKED: some of these scores must not count."""
    for start_n in range(lo, hi, BLOCK_N):
        b_k = load_tile(p_k, start_n, stride_kn, Nk, D, BLOCK_N, BLOCK_D, MASKED)
        b_s = dot_rows(b_q, b_k, SPLIT, PRECISION)  # (BLOCK_M, BLOCK_N)
        if MASKED:
            b_s = tl.where(attends(start_m, start_n, Nq, Nk, BLOCK_M, BLOCK_N, CAUSAL), b_s, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * scale_log2)
        b_anchor = b_m_new
        if MASKED:
            b_anchor = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)  # -inf - -inf is not a number
        b_p = tl.exp2(b_s * scale_log2 - b_anchor[:, None])
        b_rescale = tl.exp2(b_m - b_anchor)
        b_l = b_l * b_rescale + tl.sum(b_p, 1)
        b_o = b_o * b_rescale[:, None]
        b_v = load_tile(p_v, start_n, stride_vn, Nk, DV, BLOCK_N, BLOCK_DV, MASKED)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION, out_dtype=b_o.dtype)
        b_m = b_m_new
    return b_o, b_l, b_m


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    num_heads, group, Nq, Nk, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Which tile of queries, of which head? Causal tiles further down see more keys: they start first.
    num_tiles = tl.cdiv(Nq, BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    if CAUSAL:
        tile = num_tiles - 1 - tile
    start_m = tile * BLOCK_M
    head_index = tl.program_id(0) // num_tiles
    batch = (head_index // num_heads).to(tl.int64)
    head = (head_index % num_heads).to(tl.int64)
    p_k = k_ptr + batch * stride_kb + head // group * stride_kh
    p_v = v_ptr + batch * stride_vb + head // group * stride_vh

    b_q = load_tile(
        q_ptr + batch * stride_qb + head * stride_qh, start_m, stride_qm, Nq, D, BLOCK_M, BLOCK_D, True
    )
    b_o = tl.zeros([BLOCK_M, BLOCK_DV], dtype=WIDE)
    b_l = tl.zeros([BLOCK_M], dtype=WIDE)
    b_m = tl.full([BLOCK_M], float("-inf"), dtype=WIDE)

    # Keys up to `full` are seen by every query of the tile: no mask. From there to `end`, some are hidden or missing.
    full = Nk
    end = Nk
    if CAUSAL:
        full = tl.minimum(Nk, tl.maximum(0, start_m + 1 + Nk - Nq))
        end = tl.minimum(Nk, tl.maximum(0, start_m + BLOCK_M + Nk - Nq))
    full = full // BLOCK_N * BLOCK_N
    b_o, b_l, b_m = attend_to_tiles(
        b_o, b_l, b_m, b_q, p_k, p_v, start_m, 0, full, stride_kn, stride_vn, Nq, Nk, scale_log2,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SPLIT, CAUSAL, False, PRECISION,
    )  # fmt: skip
    if full < end:  # the test also keeps the compiler from mixing the two loops' matrix products, and serialising both
        b_o, b_l, b_m = attend_to_tiles(
            b_o, b_l, b_m, b_q, p_k, p_v, start_m, full, end, stride_kn, stride_vn, Nq, Nk, scale_log2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SPLIT, CAUSAL, True, PRECISION,
        )  # fmt: skip

    # Normalise once, at the end. A row that attended to nothing has l = 0: out = 0 and lse = -inf.
    empty = b_l == 0.0
    b_o = b_o / tl.where(empty, 1.0, b_l)[:, None]
    b_lse = tl.where(empty, float("-inf"), (b_m + tl.log2(tl.where(empty, 1.0, b_l))) * LN2)
    store_tile(
        o_ptr + batch * stride_ob + head * stride_oh, b_o, start_m, stride_om, Nq, DV, BLOCK_M, BLOCK_DV
    )
    o_m = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head_index.to(tl.int64) * Nq + o_m, b_lse, mask=o_m < Nq)


def forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward: out (B, Hq, Nq, Dv) and lse (B, Hq, Nq), of inputs in rows."""
    out, lse = empty_outputs(q, v)
    tile = choose_tile("forward", max(q.shape[-1], v.shape[-1]), q.dtype, q.device)
    batch, heads, nq, _ = q.shape
    grid = (triton.cdiv(nq, tile.block_m) * batch * heads,)
    with device_of(q):
        forward_kernel[grid](
            q, k, v, out, lse, *row_strides(q, k, v, out), heads, heads // k.shape[1], nq, k.shape[2], scale * LOG2E.value,
            **head_blocks(q, v), **tile.options(), CAUSAL=causal,
            PRECISION=dot_precision(q.dtype), WIDE=tl.float64 if q.dtype == torch.float64 else tl.float32,
        )  # fmt: skip
    return out, lse
