"""The gradient of a float mask: dS, summed over what the mask broadcasts over. Only asked for when the mask needs it.

dS is as large as the mask's own broadcast shape, N x N times heads, and never stored: one program owns one tile of the mask,
walks all scores that it was added to, and recomputes P and dP for each. No atomics.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_edu.kernels.common import SIZES, dot_rows, load_tile
from flash_edu.kernels.launch import device_of, dot_precision, head_blocks, lse_strides, row_strides, wide
from flash_edu.kernels.scores import changed_scores_and_slopes, dropout_keeps, kernel_rules, load_keys, load_lse, units, visible, weights
from flash_edu.rules import Rules

BLOCK = 32


@triton.jit(do_not_specialize=[*SIZES, "num_batches"])
def mask_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dmask_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_dom, stride_lb, stride_lh,
    num_batches, num_heads, group, Nq, Nk, scale, to_log2, rules,
    BATCHES: tl.constexpr, HEADS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """BATCHES, HEADS, QUERIES, KEYS: does the mask have an entry for each? Otherwise one stands for all."""
    tiles_n = tl.cdiv(Nk, BLOCK) if KEYS else 1
    tiles_m = tl.cdiv(Nq, BLOCK) if QUERIES else 1
    tile_n = tl.program_id(0) % tiles_n
    tile_m = tl.program_id(0) // tiles_n % tiles_m
    which = (tl.program_id(0) // tiles_n // tiles_m).to(tl.int64)
    mask_heads = num_heads if HEADS else 1
    mask_batch = which // mask_heads
    mask_head = which % mask_heads

    b_sum = tl.zeros([BLOCK, BLOCK], dtype=WIDE)
    for batch in range(mask_batch, mask_batch + 1 if BATCHES else num_batches):
        for head in range(mask_head, mask_head + 1 if HEADS else num_heads):
            for start_m in range(tile_m * BLOCK, tile_m * BLOCK + 1 if QUERIES else Nq, BLOCK):
                for start_n in range(tile_n * BLOCK, tile_n * BLOCK + 1 if KEYS else Nk, BLOCK):
                    o_m = start_m + tl.arange(0, BLOCK)
                    i = o_m[:, None]
                    j = start_n + tl.arange(0, BLOCK)[None, :]
                    p_q = q_ptr + batch * stride_qb + head * stride_qh
                    p_do = do_ptr + batch * stride_dob + head * stride_doh
                    p_k = k_ptr + batch * stride_kb + head // group * stride_kh
                    p_v = v_ptr + batch * stride_vb + head // group * stride_vh
                    p_row = batch * stride_lb + head * stride_lh
                    b_q = load_tile(p_q, start_m, stride_qm, Nq, D, BLOCK, BLOCK_D, True)
                    b_k = load_keys(p_k, start_n, stride_kn, Nq, Nk, rules, D, BLOCK, BLOCK_D, True)
                    b_s = dot_rows(b_q, b_k, SPLIT, PRECISION) * scale
                    b_s, _, b_slope = changed_scores_and_slopes(b_s, batch, head, i, j, Nq, Nk, rules)
                    b_p = weights(b_s, load_lse(lse_ptr + p_row, o_m, Nq)[:, None], to_log2, rules)
                    b_do = load_tile(p_do, start_m, stride_dom, Nq, DV, BLOCK, BLOCK_DV, True)
                    b_v = load_keys(p_v, start_n, stride_vn, Nq, Nk, rules, DV, BLOCK, BLOCK_DV, True)
                    b_dp = dot_rows(b_do, b_v, SPLIT, PRECISION)
                    if rules.seed is not None:
                        b_kept = dropout_keeps(batch * num_heads + head, start_m, start_n, rules, BLOCK, BLOCK)
                        b_dp = tl.where(b_kept, b_dp * rules.dropout_scale, 0.0)
                    b_delta = tl.load(delta_ptr + p_row + o_m, mask=o_m < Nq, other=0.0)
                    b_keep = visible(batch, head, i, j, Nq, Nk, rules) & (i < Nq)
                    b_sum += tl.where(b_keep, b_p * (b_dp - b_delta[:, None]) * b_slope, 0.0)

    rows = Nq if QUERIES else 1
    cols = Nk if KEYS else 1
    o_m = tile_m.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_n = tile_n * BLOCK + tl.arange(0, BLOCK)
    p_mask = dmask_ptr + which * rows * cols
    if QUERIES and KEYS:
        tl.store(p_mask + o_m[:, None] * cols + o_n[None, :], b_sum, mask=(o_m < rows)[:, None] & (o_n < cols)[None, :])
    elif QUERIES:
        tl.store(p_mask + o_m, tl.sum(b_sum, 1), mask=o_m < rows)
    elif KEYS:
        tl.store(p_mask + o_n, tl.sum(b_sum, 0), mask=o_n < cols)
    else:
        tl.store(p_mask, tl.sum(b_sum))


def mask_gradient(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, rules: Rules
) -> Tensor:
    """The gradient of rules.mask, in its shape. delta is D = rowsum(dO * O) - dlse, (B, Hq, Nq)."""
    batch, heads, nq, _ = q.shape
    nk, shape = k.shape[2], rules.mask.shape
    has = [size > 1 or full == 1 for size, full in zip(shape, (batch, heads, nq, nk))]
    dmask = torch.empty(shape, dtype=delta.dtype, device=q.device)
    tiles = (triton.cdiv(nq, BLOCK) if has[2] else 1) * (triton.cdiv(nk, BLOCK) if has[3] else 1)
    asked = kernel_rules(rules, q, k, walk=0)._replace(plan=None, plan_strides=None)
    with device_of(q):
        mask_gradient_kernel[(shape[0] * shape[1] * tiles,)](
            q, k, v, dout, lse, delta, dmask, *row_strides(q, k, v, dout), *lse_strides(lse, False),
            batch, heads, heads // k.shape[1], nq, nk, *units(rules, asked), asked,
            **dict(zip(("BATCHES", "HEADS", "QUERIES", "KEYS"), has)), **head_blocks(q, v), BLOCK=BLOCK, SPLIT=1,
            PRECISION=dot_precision(q.dtype), WIDE=wide(q.dtype), num_warps=4,
        )  # fmt: skip
    return dmask.to(rules.mask.dtype)
