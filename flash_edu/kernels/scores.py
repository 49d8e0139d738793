"""Between Q K^T and the softmax: what a request asks of its scores (flash_edu/rules.py), as small functions for one tile.

`rules` is a tuple of kernel arguments. A rule that is not asked for is None there; the compiler then leaves out its branch, so
that it costs nothing. Query numbers `i` and key numbers `j` broadcast against each other, in either orientation: the kernel for
dK and dV holds its tiles transposed.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_edu import patterns
from flash_edu.kernels.common import LOG2E, load_tile, tanh, tanh_slope
from flash_edu.philox import ROUNDS, dropout_threshold
from flash_edu.rules import Rules

PHILOX_ROUNDS = tl.constexpr(ROUNDS)
PLAN_BLOCK = tl.constexpr(patterns.PLAN_BLOCK)


YES, NO = tl.constexpr(True), tl.constexpr(False)  # made once: at each launch Triton compares them, fastest if they are the same


class KernelRules(NamedTuple):
    """Rules as a kernel takes them: tensors become pointers. None: not asked for. Names in capitals are known when compiling."""

    left: int | None
    right: int | None
    softcap: float | None
    slopes: Tensor | None
    slopes_stride: int | None  # from one batch to the next; heads are neighbours
    bias: Tensor | None  # a float mask
    keep: Tensor | None  # a boolean mask, as bytes
    mask_strides: tuple[int, ...] | None  # over batch, heads, queries, keys; 0 where the mask has one for all
    padding: Tensor | None  # as bytes
    real: Tensor | None  # (B, 2) int32: the first real key, and one past the last
    sinks: Tensor | None
    seed: Tensor | None
    dropout_threshold: int | None
    dropout_scale: float | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    mask_mod: object
    score_mod: object
    score_grad: object
    buffers: tuple[Tensor, ...]
    plan: Tensor | None  # of the walk that this kernel makes, see patterns.py
    plan_strides: tuple[int, ...] | None  # over batch, heads, tiles
    CHANGES_SCORES: tl.constexpr  # are scores more than scaled products?
    HIDES_KEYS: tl.constexpr  # does a mask hide keys that a walk cannot leave out? Then no tile may be taken as a whole
    HIDES_ANY: tl.constexpr


def kernel_rules(rules: Rules, q: Tensor, k: Tensor, walk: int) -> KernelRules:
    """walk: how the kernel goes, 0 from queries to keys, 1 from keys to queries.

    Nothing here waits for the GPU.
    """
    shape = (*q.shape[:3], k.shape[2])
    mask = None if rules.mask is None else rules.mask.expand(shape)
    boolean = mask is not None and mask.dtype == torch.bool
    slopes = None if rules.slopes is None else rules.slopes.contiguous()
    padding = None if rules.padding is None else rules.padding.contiguous()
    pattern = patterns.get(rules.pattern)
    plan = _plan_of(pattern, rules, q, k, walk)
    drops = rules.dropout_p > 0
    hides_keys = boolean or padding is not None or (pattern and pattern.mask_mod) is not None
    hides_any = hides_keys or rules.left is not None or rules.right is not None
    return KernelRules(
        left=rules.left,
        right=rules.right,
        softcap=rules.softcap,
        slopes=slopes,
        slopes_stride=None if slopes is None else slopes.stride(0) * (slopes.shape[0] > 1),
        bias=None if boolean else mask,
        keep=mask.view(torch.uint8) if boolean else None,
        mask_strides=None if mask is None else mask.stride(),
        padding=None if padding is None else padding.view(torch.uint8),
        real=None if padding is None else _real_range(padding),
        sinks=None if rules.sinks is None else rules.sinks.contiguous(),
        seed=rules.seed if drops else None,
        dropout_threshold=dropout_threshold(rules.dropout_p) if drops else None,
        dropout_scale=1 / (1 - rules.dropout_p) if drops else None,
        cu_q=rules.cu_q,
        cu_k=rules.cu_k,
        mask_mod=pattern and pattern.mask_mod,
        score_mod=pattern and pattern.score_mod,
        score_grad=pattern and pattern.score_grad,
        buffers=tuple(rules.buffers),
        plan=plan,
        plan_strides=None if plan is None else _steps(plan),
        CHANGES_SCORES=YES if _changes_scores(rules, boolean, pattern) else NO,
        HIDES_KEYS=YES if hides_keys else NO,
        HIDES_ANY=YES if hides_any else NO,
    )


def _changes_scores(rules: Rules, boolean: bool, pattern: patterns.Pattern | None) -> bool:
    added = rules.slopes is not None or (rules.mask is not None and not boolean)
    return rules.softcap is not None or added or (pattern and pattern.score_mod) is not None


def loads_scores(rules: Rules) -> bool:
    """Does each pair of a query and a key need something from memory?"""
    return rules.mask is not None or len(rules.buffers) > 0


def units(rules: Rules, asked: KernelRules) -> tuple[float, float]:
    """The scale, and what turns the kernel's scores into base 2: products are not scaled yet, changed scores are."""
    to_log2 = LOG2E.value if asked.CHANGES_SCORES.value else rules.scale * LOG2E.value
    return rules.scale, to_log2


def _plan_of(pattern: patterns.Pattern | None, rules: Rules, q: Tensor, k: Tensor, walk: int) -> Tensor | None:
    """The plan to walk along, if the pattern alone decides what is hidden."""
    others = (rules.left, rules.right, rules.padding, rules.cu_q)
    boolean = rules.mask is not None and rules.mask.dtype == torch.bool
    if pattern is None or pattern.mask_mod is None or boolean or any(x is not None for x in others):
        return None
    return pattern.plan(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.device)[walk]


def _steps(plan: Tensor) -> tuple[int, ...]:
    """Strides over batch, heads and tiles; 0 where one plan serves all."""
    return tuple(stride * (size > 1) for stride, size in zip(plan.stride()[:2], plan.shape)) + (plan.stride(2),)


def _real_range(padding: Tensor) -> Tensor:
    """(B, 2) int32: where the real tokens of each sequence begin and end. What lies outside is not even loaded."""
    n = padding.shape[1]
    place = torch.arange(n, device=padding.device, dtype=torch.int32)
    first = torch.where(padding, place, n).amin(1)
    end = torch.where(padding, place + 1, 0).amax(1)
    return torch.stack((first, end), 1)


# --- scores -----------------------------------------------------------------------------------------------


@triton.jit
def changed_scores(b_s, batch, head, i, j, Nq, Nk, rules):
    """Scaled scores -> scores, in natural units."""
    if rules.softcap is not None:
        b_s = rules.softcap * tanh(b_s / rules.softcap)
    return after_softcap(b_s, batch, head, i, j, Nq, Nk, rules, True)


@triton.jit
def changed_scores_and_slopes(b_s, batch, head, i, j, Nq, Nk, rules):
    """As changed_scores, and the derivatives of each score: by the scaled one, and by what a float mask adds to it."""
    b_slope = tl.full(b_s.shape, 1.0, b_s.dtype)
    b_mask_slope = b_slope
    if rules.softcap is not None:
        b_share = b_s / rules.softcap
        b_s, b_slope = rules.softcap * tanh(b_share), tanh_slope(b_share)
    if rules.score_grad is not None:
        b_before = after_softcap(b_s, batch, head, i, j, Nq, Nk, rules, False)
        i_in, j_in = inside(i, j, Nq, Nk)
        b_mask_slope = tl.zeros_like(b_s) + rules.score_grad(b_before, batch, head, i_in, j_in, rules.buffers)  # a number, perhaps
        b_mask_slope = b_mask_slope.to(b_s.dtype)
        if rules.bias is not None:
            b_mask_slope = tl.where(b_before == float("-inf"), 0.0, b_mask_slope)
        b_slope *= b_mask_slope
    return after_softcap(b_s, batch, head, i, j, Nq, Nk, rules, True), b_slope, b_mask_slope


@triton.jit
def after_softcap(b_s, batch, head, i, j, Nq, Nk, rules, SCORE_MOD: tl.constexpr):
    """Add ALiBi and a float mask; then what the user's score_mod makes of it."""
    if rules.slopes is not None:
        distance = tl.abs(i + (Nk - Nq) - j).to(b_s.dtype)
        b_s -= tl.load(rules.slopes + batch * rules.slopes_stride + head).to(b_s.dtype) * distance
    if rules.bias is not None:
        p_bias = rules.bias + mask_offsets(batch, head, i, j, rules)
        b_s += tl.load(p_bias, mask=(i < Nq) & (j < Nk), other=0.0).to(b_s.dtype)
    if SCORE_MOD and rules.score_mod is not None:
        i_in, j_in = inside(i, j, Nq, Nk)
        b_changed = tl.zeros_like(b_s) + rules.score_mod(b_s, batch, head, i_in, j_in, rules.buffers)
        b_changed = b_changed.to(b_s.dtype)
        if rules.bias is not None:
            b_changed = tl.where(b_s == float("-inf"), b_s, b_changed)  # what a float mask hides stays hidden
        b_s = b_changed
    return b_s


@triton.jit
def inside(i, j, Nq, Nk):
    """Places that a user's function may load for: the last ones in place of those that lie past the end."""
    return tl.minimum(i, Nq - 1), tl.minimum(j, Nk - 1)


@triton.jit
def weights(b_s, b_anchor, to_log2, rules):
    """exp2(to_log2 * score - anchor), and never more than 1: a mask of -1e9 loses the difference to rounding."""
    b_exponent = b_s * to_log2 - b_anchor
    if rules.bias is not None or rules.score_mod is not None:
        b_exponent = tl.where(b_exponent > 0.0, 0.0, b_exponent)  # not tl.minimum, which may hide a NaN
    return tl.exp2(b_exponent)


@triton.jit
def mask_offsets(batch, head, i, j, rules):
    start = batch * rules.mask_strides[0] + head * rules.mask_strides[1]
    return start + i.to(tl.int64) * rules.mask_strides[2] + j.to(tl.int64) * rules.mask_strides[3]


# --- what is hidden ---------------------------------------------------------------------------------------


@triton.jit
def visible(batch, head, i, j, Nq, Nk, rules):
    """Does query i attend to key j? Keys past the end are hidden; queries past the end may be anything."""
    keep = j < Nk
    if rules.right is not None:
        keep = keep & (j <= i + (Nk - Nq) + rules.right)
    if rules.left is not None:
        keep = keep & (j >= i + (Nk - Nq) - rules.left)
    if rules.padding is not None:
        keep = keep & (tl.load(rules.padding + batch * Nk + j, mask=j < Nk, other=0) != 0)
    if rules.keep is not None:
        p_keep = rules.keep + mask_offsets(batch, head, i, j, rules)
        keep = keep & (tl.load(p_keep, mask=(i < Nq) & (j < Nk), other=0) != 0)
    if rules.mask_mod is not None:
        i_in, j_in = inside(i, j, Nq, Nk)
        keep = keep & (i < Nq) & (rules.mask_mod(batch, head, i_in, j_in, rules.buffers) != 0)
    return keep


@triton.jit
def load_lse(p_lse, i, Nq):
    """The log-sum-exp of the queries i in base 2; +inf, which makes every weight 0, where a query sees nothing or is none."""
    b_lse = tl.load(p_lse + i, mask=i < Nq, other=float("inf"))
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)


@triton.jit
def load_keys(
    ptr, start, stride_row, Nq, Nk, rules,
    NUM_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of rows of K or V. Those further back than the first query's window, which nobody sees, are not loaded."""
    if rules.left is not None:
        b_rows = load_tile(ptr, start, stride_row, Nk, NUM_COLS, ROWS, COLS, CHECK_ROWS, Nk - Nq - rules.left)
    else:
        b_rows = load_tile(ptr, start, stride_row, Nk, NUM_COLS, ROWS, COLS, CHECK_ROWS)
    return b_rows


@triton.jit
def zero_unseen(b_rows, seen):
    """Rows of K or V that no query of the tile sees may hold anything, NaN too, and 0 * NaN is NaN."""
    return tl.where(seen[:, None], b_rows, 0.0)


# --- which tiles a program walks --------------------------------------------------------------------------


@triton.jit
def sequence(cu, batch, n):
    """(first row, length) of a sequence: all n rows, unless sequences are packed one behind the other."""
    first = 0
    length = n
    if cu is not None:
        first = tl.load(cu + batch).to(tl.int64)
        length = (tl.load(cu + batch + 1) - first).to(tl.int32)
    return first, length


@triton.jit
def keys_walk(start_m, batch, head, Nq, Nk, rules, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a tile of queries finds its keys: two walks, each a range of positions and a list of tiles (see `key_at`).

    Of the first walk's tiles every query sees every key: they need no mask. Of the second's, some are hidden or missing.
    """
    if rules.plan is not None:
        full_lo, full_hi, full_tiles, lo, hi, masked_tiles = planned(start_m, batch, head, rules)
        hole = 0
    else:
        first, full_lo, full_hi, end = keys_seen(start_m, batch, Nq, Nk, rules, BLOCK_M, BLOCK_N)
        hole = full_hi - full_lo  # the masked tiles lie on both sides of the full ones
        if rules.left is not None:
            lo = first
            hi = end - hole
        else:
            lo = full_hi
            hi = end
        full_tiles = 0
        masked_tiles = 0
    return full_lo, full_hi, full_tiles, lo, hi, masked_tiles, hole


@triton.jit
def keys_seen(start_m, batch, Nq, Nk, rules, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """first .. end: the keys that some query of the tile sees; full_lo .. full_hi: those that every one sees, in whole tiles."""
    first = 0
    full_lo = 0
    full_hi = Nk
    end = Nk
    if rules.real is not None:
        first = tl.load(rules.real + 2 * batch)
        end = tl.load(rules.real + 2 * batch + 1)
    if rules.right is not None:
        full_hi = tl.minimum(Nk, tl.maximum(0, start_m + 1 + Nk - Nq + rules.right))
        end = tl.minimum(end, tl.maximum(0, start_m + BLOCK_M + Nk - Nq + rules.right))
    if rules.left is not None:
        full_lo = tl.maximum(0, start_m + BLOCK_M - 1 + Nk - Nq - rules.left)
        first = tl.maximum(first, start_m + Nk - Nq - rules.left)
    if rules.real is not None or rules.left is not None:
        end = tl.where(first < end, end, 0)
        first = first // BLOCK_N * BLOCK_N
    if rules.HIDES_KEYS:
        full_lo = first
        full_hi = first
    full_hi = full_hi // BLOCK_N * BLOCK_N
    if rules.left is not None:
        full_lo = tl.maximum(first, tl.cdiv(tl.minimum(full_lo, end), BLOCK_N) * BLOCK_N)
        full_hi = tl.maximum(full_lo, full_hi)
    return first, full_lo, full_hi, end


@triton.jit
def key_at(position, tiles, hole_start, hole, rules, BLOCK_N: tl.constexpr):
    """The first key of the tile at a position of a walk."""
    if rules.plan is not None:
        number = position // PLAN_BLOCK
        start_n = tl.load(tiles + number) * PLAN_BLOCK + (position - number * PLAN_BLOCK)
    elif rules.left is not None:
        start_n = tl.where(position >= hole_start, position + hole, position)
    else:
        start_n = position
    return start_n


@triton.jit
def queries_walk(start_n, batch, kv_head, Nq, Nk, rules, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where a tile of keys finds the queries that see some of it: a range of positions and a list (see `query_at`)."""
    tiles = 0
    num_full = 0
    if rules.plan is not None:
        start, end_full, tiles, _, end_masked, _ = planned(start_n, batch, kv_head, rules)
        num_full = end_full // PLAN_BLOCK
        end = end_full + end_masked
    else:
        start, end = queries_seeing(start_n, batch, Nq, Nk, rules, BLOCK_M, BLOCK_N)
    return start, end, tiles, num_full


@triton.jit
def queries_seeing(start_n, batch, Nq, Nk, rules, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """start .. end, and start is a multiple of BLOCK_M."""
    start = 0
    end = Nq
    first_key = start_n
    end_key = start_n + BLOCK_N
    if rules.real is not None:
        first_key = tl.maximum(first_key, tl.load(rules.real + 2 * batch))
        end_key = tl.minimum(end_key, tl.load(rules.real + 2 * batch + 1))
    if rules.right is not None:
        start = tl.maximum(0, first_key - (Nk - Nq) - rules.right) // BLOCK_M * BLOCK_M
    if rules.left is not None:
        end = tl.minimum(Nq, tl.maximum(0, end_key - (Nk - Nq) + rules.left))
    if rules.real is not None:
        end = tl.where(first_key < end_key, end, 0)
    return start, end


@triton.jit
def query_at(position, tiles, num_full, rules):
    """The first query of the tile at a position of a walk: first the list of whole tiles, then the other."""
    if rules.plan is not None:
        number = position // PLAN_BLOCK
        most = (rules.plan_strides[2] - 2) // 2
        place = tl.where(number < num_full, number, number - num_full + most)
        start_m = tl.load(tiles + place) * PLAN_BLOCK + (position - number * PLAN_BLOCK)
    else:
        start_m = position
    return start_m


# --- a plan: the tiles in which a user's mask_mod shows anything ------------------------------------------


@triton.jit
def planned(start, batch, head, rules):
    """A row of the plan, for the tile that starts at `start`: as keys_walk, with positions in the row's two lists."""
    p_row = rules.plan + batch * rules.plan_strides[0] + head * rules.plan_strides[1]
    p_row += start // PLAN_BLOCK * rules.plan_strides[2]
    num_full = tl.load(p_row)
    num_masked = tl.load(p_row + 1)
    most = (rules.plan_strides[2] - 2) // 2
    return 0, num_full * PLAN_BLOCK, p_row + 2, 0, num_masked * PLAN_BLOCK, p_row + 2 + most


# --- dropout ----------------------------------------------------------------------------------------------


@triton.jit
def dropout_keeps(head_index, start_m, start_n, rules, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, COLS) bool: the weights that dropout keeps, from their places alone (flash_edu/philox.py)."""
    i = start_m + tl.arange(0, ROWS)
    fours = start_n // 4 + tl.arange(0, COLS // 4)
    head = tl.cast(head_index, tl.int32)
    offset = tl.cast(tl.load(rules.seed + 1), tl.int32)
    r0, r1, r2, r3 = tl.philox(tl.load(rules.seed), fours[None, :], i[:, None], head, offset, PHILOX_ROUNDS)
    bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), [ROWS, COLS])
    return bits.to(tl.int64) >= rules.dropout_threshold
