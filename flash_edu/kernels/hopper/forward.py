"""The forward on Hopper: one warp copies K and V, two groups of four warps compute, each with 64 queries or more.

FlashAttention-3 (Shah et al. 2024), sections 3.1 and 3.2: the producer runs ahead in a ring of buffers; the two consumers
take turns on the tensor cores, so that one multiplies while the other computes exponentials; and within a consumer the
product with V of one tile runs beside the softmax of the next. Scores are kept in base 2, as in kernels/forward.py.

Keys are walked from the last visible one to the first. So whatever has to be hidden, the tail and the diagonal, is in the
first tiles, and the loop over the others has no mask.
"""
import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flash_edu.kernels.common import LN2, LOG2E
from flash_edu.kernels.hopper.tiles import HopperTile, forward_tile
from flash_edu.kernels.launch import device_of
from flash_edu.layout import empty_outputs
from flash_edu.rules import Rules

CONSUMERS = gl.constexpr(2)  # warp groups that compute
LN_2 = gl.constexpr(LN2.value)
GLUON_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.jit
def take_turn(WG: gl.constexpr):
    """Wait until the other consumer has passed on the tensor cores. 256 threads meet at each of the two named barriers."""
    threads = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    if WG == 0:
        gl.inline_asm_elementwise(
            "bar.sync 8, 256; mov.b32 $0, $1;", "=r,r", [threads], dtype=gl.int32, is_pure=False, pack=1
        )
    else:
        gl.inline_asm_elementwise(
            "bar.sync 9, 256; mov.b32 $0, $1;", "=r,r", [threads], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def pass_turn(WG: gl.constexpr):
    """Let the other consumer have the tensor cores, without waiting for it."""
    threads = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    if WG == 0:
        gl.inline_asm_elementwise(
            "bar.arrive 9, 256; mov.b32 $0, $1;", "=r,r", [threads], dtype=gl.int32, is_pure=False, pack=1
        )
    else:
        gl.inline_asm_elementwise(
            "bar.arrive 8, 256; mov.b32 $0, $1;", "=r,r", [threads], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def hide(s, last, start_n, BLOCK_N: gl.constexpr):
    """-inf in the columns behind each row's last visible key."""
    keys = start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s.type.layout))
    return gl.where(gl.expand_dims(keys, 0) <= gl.expand_dims(last, 1), s, float("-inf"))


@gluon.jit
def softmax_step(s, m, l, to_log2, P: gl.constexpr, MASKED: gl.constexpr, dtype: gl.constexpr):
    """One tile of scores: its weights as an operand of wgmma in registers, the repair of O, and the new m and l."""
    m_new = gl.maximum(m, gl.max(s, 1) * to_log2)
    anchor = m_new
    if MASKED:
        anchor = gl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is not a number
    repair = gl.exp2(m - anchor)
    p = gl.exp2(s * to_log2 - gl.expand_dims(anchor, 1))
    l = l * repair + gl.sum(p, 1)
    return gl.convert_layout(p.to(dtype), P), repair, m_new, l


@gluon.jit
def attend_to_tiles(
    q, o, p, m, l, k_tiles, v_tiles, signals, lo, hi, num_tiles, last, to_log2, WG: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, MASKED: gl.constexpr, S: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Steps lo to hi of the walk: S of this tile and O of the tile before are one turn on the tensor cores."""
    k_full, k_empty, v_full, v_empty = signals
    dtype: gl.constexpr = q.dtype
    STAGES: gl.constexpr = k_tiles.shape[0]
    O_ROW: gl.constexpr = gl.SliceLayout(1, o.type.layout)
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S)
    for step in range(lo, hi):
        now, before = step % STAGES, (step - 1) % STAGES
        take_turn(WG)
        k = k_tiles.index(now).reshape([BLOCK_N, D])
        s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
        o = warpgroup_mma(p, v_tiles.index(before).reshape([BLOCK_N, D]), o, is_async=True)
        pass_turn(WG)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_empty.index(now), count=1)
        if MASKED:
            s = hide(s, last, (num_tiles - 1 - step) * BLOCK_N, BLOCK_N)
        p_next, repair, m, l = softmax_step(s, m, l, to_log2, P, MASKED, dtype)
        # Waiting for the next K has to be done some time. Here, it also keeps ptxas from moving the wait for O above the softmax.
        mbarrier.wait(k_full.index((step + 1) % STAGES), ((step + 1) // STAGES) & 1, pred=step + 1 < num_tiles)
        o, p, p_next, l = warpgroup_mma_wait(0, deps=(o, p, p_next, l))
        mbarrier.arrive(v_empty.index(before), count=1)
        o = o * gl.expand_dims(gl.convert_layout(repair, O_ROW), 1)
        p = p_next
    return o, p, m, l


@gluon.jit
def consume(
    q_tiles, k_tiles, v_tiles, q_full, signals, o_desc, lse_ptr, batch, head, start, num_tiles, num_heads, Nq, Nk, to_log2,
    WG: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    """Rows start + WG * BLOCK_M and the following, from their first score to O and L in memory."""
    k_full, k_empty, v_full, v_empty = signals
    dtype: gl.constexpr = q_tiles.dtype
    STAGES: gl.constexpr = k_tiles.shape[0]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    MASKED: gl.constexpr = CAUSAL or RAGGED
    start_m = start + WG * BLOCK_M
    rows = start_m + gl.arange(0, BLOCK_M, layout=ROW)
    last = gl.full([BLOCK_M], 0, gl.int32, ROW) + (Nk - 1)
    if CAUSAL:
        last = gl.minimum(last, rows + (Nk - Nq))
    o = gl.zeros([BLOCK_M, D], gl.float32, O)
    m = gl.full([BLOCK_M], float("-inf"), gl.float32, ROW)
    l = gl.zeros([BLOCK_M], gl.float32, ROW)
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, S)

    # The first tile, which has no tile before it.
    q_stored = q_tiles.index(WG)
    q = q_stored.reshape([BLOCK_M, D])
    mbarrier.wait(q_full.index(WG), 0)
    if WG == 1:
        pass_turn(WG)  # the first turn is consumer 0's
    mbarrier.wait(k_full.index(0), 0)
    take_turn(WG)
    k = k_tiles.index(0).reshape([BLOCK_N, D])
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    pass_turn(WG)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(0), count=1)
    if MASKED:
        s = hide(s, last, (num_tiles - 1) * BLOCK_N, BLOCK_N)
    p, _, m, l = softmax_step(s, m, l, to_log2, P, MASKED, dtype)
    mbarrier.wait(k_full.index(1 % STAGES), (1 // STAGES) & 1, pred=num_tiles > 1)

    # The others: first those that the diagonal cuts, then those that every row sees whole.
    diagonal = 1
    if CAUSAL:
        seen_by_all = gl.maximum(gl.minimum(start_m + (Nk - Nq) + 1, Nk), 0)
        diagonal = gl.maximum(num_tiles - seen_by_all // BLOCK_N, 1)
        o, p, m, l = attend_to_tiles(
            q, o, p, m, l, k_tiles, v_tiles, signals, 1, diagonal, num_tiles, last, to_log2,
            WG, BLOCK_M, BLOCK_N, D, True, S, P,
        )  # fmt: skip
    o, p, m, l = attend_to_tiles(
        q, o, p, m, l, k_tiles, v_tiles, signals, diagonal, num_tiles, num_tiles, last, to_log2,
        WG, BLOCK_M, BLOCK_N, D, False, S, P,
    )  # fmt: skip

    final = (num_tiles - 1) % STAGES
    mbarrier.wait(v_full.index(final), ((num_tiles - 1) // STAGES) & 1)
    o = warpgroup_mma(p, v_tiles.index(final).reshape([BLOCK_N, D]), o, is_async=True)
    o, p = warpgroup_mma_wait(0, deps=(o, p))
    if WG == 0:
        take_turn(WG)  # consumer 1 has passed on once more than was taken: a barrier must not be left half full

    # Normalise once, at the end. A row that attended to nothing has l = 0: out = 0 and lse = -inf.
    empty = l == 0.0
    l = gl.where(empty, 1.0, l)
    lse = gl.where(empty, float("-inf"), (m + gl.log2(l)) * LN_2)
    gl.store(lse_ptr + (batch * num_heads + head).to(gl.int64) * Nq + rows, lse, mask=rows < Nq)
    o = o * gl.expand_dims(gl.convert_layout(1.0 / l, gl.SliceLayout(1, O)), 1)
    q.store(o.to(dtype))  # q is not needed any more, and its buffer has the right shape
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [batch, head, start_m, 0], q_stored)
    tma.store_wait(0)


@gluon.jit
def consume_first(
    q_tiles, k_tiles, v_tiles, q_full, signals, o_desc, lse_ptr, batch, head, start, num_tiles, num_heads, Nq, Nk, to_log2,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    consume(
        q_tiles, k_tiles, v_tiles, q_full, signals, o_desc, lse_ptr, batch, head, start, num_tiles, num_heads, Nq, Nk, to_log2,
        0, BLOCK_M, BLOCK_N, D, CAUSAL, RAGGED,
    )  # fmt: skip


@gluon.jit
def consume_second(
    q_tiles, k_tiles, v_tiles, q_full, signals, o_desc, lse_ptr, batch, head, start, num_tiles, num_heads, Nq, Nk, to_log2,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, CAUSAL: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    consume(
        q_tiles, k_tiles, v_tiles, q_full, signals, o_desc, lse_ptr, batch, head, start, num_tiles, num_heads, Nq, Nk, to_log2,
        1, BLOCK_M, BLOCK_N, D, CAUSAL, RAGGED,
    )  # fmt: skip


@gluon.jit
def produce(
    q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, signals, batch, head, group, start, num_tiles,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Copy the two tiles of Q, then K and V from the last tile to the first, as buffers become free."""
    k_full, k_empty, v_full, v_empty = signals
    STAGES: gl.constexpr = k_tiles.shape[0]
    for wg in gl.static_range(CONSUMERS):
        mbarrier.expect(q_full.index(wg), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(
            q_desc, [batch, head, start + wg * BLOCK_M, 0], q_full.index(wg), q_tiles.index(wg)
        )
    for step in range(num_tiles):
        now, phase = step % STAGES, (step // STAGES) & 1
        first = [batch, head // group, (num_tiles - 1 - step) * BLOCK_N, 0]
        mbarrier.wait(k_empty.index(now), phase ^ 1)
        mbarrier.expect(k_full.index(now), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, first, k_full.index(now), k_tiles.index(now))
        mbarrier.wait(v_empty.index(now), phase ^ 1)
        mbarrier.expect(v_full.index(now), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, first, v_full.index(now), v_tiles.index(now))


@gluon.jit
def new_signals(NUM: gl.constexpr, COUNT: gl.constexpr):
    """NUM barriers in shared memory, each of which COUNT arrivals complete."""
    signals = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(signals.index(i), count=COUNT)
    return signals


@gluon.jit(do_not_specialize=["num_heads", "group", "Nq", "Nk"])
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, num_heads, group, Nq, Nk, to_log2,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    RAGGED: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    # Which queries, of which head? Causal tiles further down see more keys: they start first.
    tile = gl.program_id(0)
    if CAUSAL:
        tile = gl.num_programs(0) - 1 - tile
    start = tile * CONSUMERS * BLOCK_M
    head, batch = gl.program_id(1) % num_heads, gl.program_id(1) // num_heads
    num_seen = Nk
    if CAUSAL:
        num_seen = gl.minimum(Nk, start + CONSUMERS * BLOCK_M + (Nk - Nq))
    num_tiles = gl.maximum(gl.cdiv(num_seen, BLOCK_N), 1)  # where nothing is seen, one tile is walked, and hidden

    dtype: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, BLOCK_M, D], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    q_full = new_signals(CONSUMERS, 1)
    k_full, k_empty = new_signals(STAGES, 1), new_signals(STAGES, CONSUMERS)
    v_full, v_empty = new_signals(STAGES, 1), new_signals(STAGES, CONSUMERS)
    fence_async_shared()
    signals = (k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (consume_first, (
                q_tiles, k_tiles, v_tiles, q_full, signals, o_desc, lse_ptr, batch, head, start, num_tiles,
                num_heads, Nq, Nk, to_log2, BLOCK_M, BLOCK_N, D, CAUSAL, RAGGED,
            )),
            (consume_second, (
                q_tiles, k_tiles, v_tiles, q_full, signals, o_desc, lse_ptr, batch, head, start, num_tiles,
                num_heads, Nq, Nk, to_log2, BLOCK_M, BLOCK_N, D, CAUSAL, RAGGED,
            )),
            (produce, (
                q_desc, k_desc, v_desc, q_tiles, k_tiles, v_tiles, q_full, signals, batch, head, group, start,
                num_tiles, BLOCK_M, BLOCK_N,
            )),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [240, 24],  # and registers of each of their threads; the first consumer takes what is left
    )  # fmt: skip


def why_not(q: Tensor, k: Tensor, v: Tensor, rules: Rules) -> str | None:
    """None if these kernels serve this request, else the reason they do not."""
    if q.dtype not in GLUON_DTYPES:
        return f"it computes in float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] not in (64, 128, 256):
        return "its head dims are 64, 128 and 256, the same for keys and values"
    plain = Rules(rules.scale, right=rules.right if rules.right == 0 else None)
    if any(asked is not given for asked, given in zip(rules[1:-2], plain[1:-2])) or rules.buffers:
        return "it knows full and causal attention, and nothing else that a request can ask"
    if not all(map(_copied_in_tiles, (q, k, v))):
        return "rows, heads and batches must begin at multiples of 16 bytes, and not overlap"
    return None


def _copied_in_tiles(x: Tensor) -> bool:
    """What the tensor memory accelerator asks of an address and of strides."""
    steps = [stride * x.element_size() for stride, size in zip(x.stride()[:-1], x.shape) if size > 1]
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)


def describe(x: Tensor, rows: int) -> TensorDescriptor:
    """x (B, H, N, D) as the tensor memory accelerator takes it, in tiles of `rows` rows of one head. Rows outside are read as
    zeros and not written."""
    block, dtype = [1, 1, rows, x.shape[-1]], GLUON_DTYPES[x.dtype]
    strides = [stride if size > 1 else x.shape[-1] for stride, size in zip(x.stride()[:-1], x.shape)]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def forward(q: Tensor, k: Tensor, v: Tensor, rules: Rules, tile: HopperTile | None = None) -> tuple[Tensor, Tensor]:
    """Launch the forward: out (B, Hq, Nq, D) and lse (B, Hq, Nq), of inputs that `why_not` has nothing against."""
    batch, heads, nq, head_dim = q.shape
    nk = k.shape[2]
    tile = tile or forward_tile(head_dim)
    out, lse = empty_outputs(q, v)
    grid = (triton.cdiv(nq, CONSUMERS.value * tile.block_m), batch * heads)
    with device_of(q):
        forward_kernel[grid](
            describe(q, tile.block_m), describe(k, tile.block_n), describe(v, tile.block_n), describe(out, tile.block_m), lse,
            heads, heads // k.shape[1], nq, nk, rules.scale * LOG2E.value,
            D=head_dim, CAUSAL=rules.right == 0, RAGGED=nk % tile.block_n != 0, num_warps=4, **tile.options(),
        )  # fmt: skip
    return out, lse
