"""The fused forward: one program per tile of queries walks the keys and keeps only m, l and O.

FlashAttention-2, Algorithm 1 (Dao 2023). Scores are kept in base 2: with c = scale * log2(e), exp(scale * s) is
exp2(c * s), and c * s - m is one fused multiply-add. What else a request asks of its scores is in scores.py.
"""
import triton
import triton.language as tl
from torch import Tensor

from flash_edu.kernels.common import LN2, LOG2E, SIZES, dot_rows, load_tile, store_tile
from flash_edu.kernels.launch import (
    device_of,
    dot_precision,
    head_blocks,
    longest_query,
    lse_strides,
    num_sequences,
    row_strides,
    wide,
)
from flash_edu.kernels.scores import (
    changed_scores,
    changes_scores,
    dropout_keeps,
    hides_keys,
    kernel_rules,
    key_at,
    keys_walk,
    load_keys,
    sequence,
    units,
    visible,
    weights,
    zero_unseen,
)
from flash_edu.kernels.tiles import choose_tile
from flash_edu.layout import empty_outputs
from flash_edu.rules import Rules


@triton.jit
def attend_to_tiles(
    b_o, b_l, b_m, b_q, p_k, p_v, batch, head, num_heads, start_m, lo, hi, tiles, hole_start, hole,
    stride_kn, stride_vn, Nq, Nk, scale, to_log2, rules,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold the keys of a walk into (O, l, m), one tile at a time. MASKED: some of these scores must not count."""
    i = start_m + tl.arange(0, BLOCK_M)[:, None]
    for position in range(lo, hi, BLOCK_N):
        start_n = key_at(position, tiles, hole_start, hole, rules, BLOCK_N)
        j = start_n + tl.arange(0, BLOCK_N)[None, :]
        b_k = load_keys(p_k, start_n, stride_kn, Nq, Nk, rules, D, BLOCK_N, BLOCK_D, MASKED)
        b_s = dot_rows(b_q, b_k, SPLIT, PRECISION)  # (BLOCK_M, BLOCK_N)
        if changes_scores(rules):
            b_s = changed_scores(b_s * scale, batch, head, i, j, Nq, Nk, rules)
        if MASKED:
            b_keep = visible(batch, head, i, j, Nq, Nk, rules)
            b_s = tl.where(b_keep, b_s, float("-inf"))
        b_m_new = tl.maximum(b_m, tl.max(b_s, 1) * to_log2)
        b_anchor = b_m_new
        if MASKED or changes_scores(rules):
            b_anchor = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)  # -inf - -inf is not a number
        b_p = weights(b_s, b_anchor[:, None], to_log2, rules)
        b_rescale = tl.exp2(b_m - b_anchor)
        b_l = b_l * b_rescale + tl.sum(b_p, 1)
        b_o = b_o * b_rescale[:, None]
        b_v = load_keys(p_v, start_n, stride_vn, Nq, Nk, rules, DV, BLOCK_N, BLOCK_DV, MASKED)
        if MASKED and hides_keys(rules):
            b_v = zero_unseen(b_v, tl.max(b_keep.to(tl.int32), 0) > 0)
        if rules.seed is not None:
            b_p = tl.where(dropout_keeps(batch * num_heads + head, start_m, start_n, rules, BLOCK_M, BLOCK_N), b_p, 0.0)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION, out_dtype=b_o.dtype)
        b_m = b_m_new
    return b_o, b_l, b_m


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om, stride_lb, stride_lh,
    num_heads, group, longest, Nq, Nk, scale, to_log2, rules,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # Which tile of queries, of which head? Causal tiles further down see more keys: they start first.
    num_tiles = tl.cdiv(longest, BLOCK_M)
    tile = tl.program_id(0) % num_tiles
    if rules.right is not None:
        tile = num_tiles - 1 - tile
    start_m = tile * BLOCK_M
    head_index = tl.program_id(0) // num_tiles
    batch = (head_index // num_heads).to(tl.int64)
    head = (head_index % num_heads).to(tl.int64)
    first_q, Nq = sequence(rules.cu_q, batch, Nq)
    first_k, Nk = sequence(rules.cu_k, batch, Nk)
    if rules.cu_q is not None:
        if start_m >= Nq:
            return
    p_q = q_ptr + batch * stride_qb + head * stride_qh + first_q * stride_qm
    p_k = k_ptr + batch * stride_kb + head // group * stride_kh + first_k * stride_kn
    p_v = v_ptr + batch * stride_vb + head // group * stride_vh + first_k * stride_vn

    b_q = load_tile(p_q, start_m, stride_qm, Nq, D, BLOCK_M, BLOCK_D, True)
    b_o = tl.zeros([BLOCK_M, BLOCK_DV], dtype=WIDE)
    b_l = tl.zeros([BLOCK_M], dtype=WIDE)
    b_m = tl.full([BLOCK_M], float("-inf"), dtype=WIDE)

    full_lo, full_hi, full_tiles, lo, hi, tiles, hole = keys_walk(start_m, batch, head, Nq, Nk, rules, BLOCK_M, BLOCK_N)
    b_o, b_l, b_m = attend_to_tiles(
        b_o, b_l, b_m, b_q, p_k, p_v, batch, head, num_heads, start_m, full_lo, full_hi, full_tiles, full_hi, 0,
        stride_kn, stride_vn, Nq, Nk, scale, to_log2, rules,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SPLIT, False, PRECISION,
    )  # fmt: skip
    if lo < hi:  # the test also keeps the compiler from mixing the two loops' matrix products, and serialising both
        b_o, b_l, b_m = attend_to_tiles(
            b_o, b_l, b_m, b_q, p_k, p_v, batch, head, num_heads, start_m, lo, hi, tiles, full_lo, hole,
            stride_kn, stride_vn, Nq, Nk, scale, to_log2, rules,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, SPLIT, True, PRECISION,
        )  # fmt: skip

    # Normalise once, at the end. A row that attended to nothing has l = 0: out = 0 and lse = -inf.
    if rules.sinks is not None:
        b_o, b_l, b_m = add_sink(b_o, b_l, b_m, tl.load(rules.sinks + head).to(WIDE) * LOG2E)
    empty = b_l == 0.0
    b_o = b_o / tl.where(empty, 1.0, b_l)[:, None]
    if rules.seed is not None:
        b_o *= rules.dropout_scale
    b_lse = tl.where(empty, float("-inf"), (b_m + tl.log2(tl.where(empty, 1.0, b_l))) * LN2)
    p_o = o_ptr + batch * stride_ob + head * stride_oh + first_q * stride_om
    store_tile(p_o, b_o, start_m, stride_om, Nq, DV, BLOCK_M, BLOCK_DV)
    o_m = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + batch * stride_lb + head * stride_lh + first_q + o_m, b_lse, mask=o_m < Nq)


@triton.jit
def add_sink(b_o, b_l, b_m, sink):
    """One more score for each row, in base 2, whose value is 0."""
    b_m_new = tl.maximum(b_m, sink)
    b_anchor = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_rescale = tl.exp2(b_m - b_anchor)
    return b_o * b_rescale[:, None], b_l * b_rescale + tl.exp2(sink - b_anchor), b_m_new


def forward(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Launch the forward: out (B, Hq, Nq, Dv) and lse (B, Hq, Nq), of inputs in rows."""
    out, lse = empty_outputs(q, v)
    tile = choose_tile("forward", max(q.shape[-1], v.shape[-1]), q.dtype, q.device)
    heads, longest = q.shape[1], longest_query(q, rules)
    asked = kernel_rules(rules, q, k, walk=0)
    with device_of(q):
        forward_kernel[(triton.cdiv(longest, tile.block_m) * num_sequences(q, rules) * heads,)](
            q, k, v, out, lse, *row_strides(q, k, v, out, packed=rules.packed), *lse_strides(lse, rules.packed),
            heads, heads // k.shape[1], longest, q.shape[2], k.shape[2], *units(rules, asked), asked,
            **head_blocks(q, v), **tile.options(), PRECISION=dot_precision(q.dtype), WIDE=wide(q.dtype),
        )  # fmt: skip
    return out, lse
