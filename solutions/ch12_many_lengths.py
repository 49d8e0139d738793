"""Chapter 12: texts of many lengths in one tensor, one behind the other, and a kernel that keeps them apart.

B texts; text b has nq[b] queries and nk[b] keys. Packed, all rows of all texts lie in one tensor, and nothing
else: q is (total_q, H, D), k and v are (total_k, H, D), with total_q = sum nq, total_k = sum nk. The layout,
and the name cu_seqlens, are those of flash_attn_varlen_func (github.com/Dao-AILab/flash-attention).

Limits, on purpose: those of chapter 07. As many key heads as query heads, and D a power of two, 16 or more.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


def cu_seqlens(lengths: Tensor) -> Tensor:
    """12.1  Where each text begins and ends in the packed tensor: the lengths added up, and a 0 before them.

    lengths (B,) of any integer dtype, or a padding mask (B, N) of dtype bool, True = a real token
    -> cu (B + 1,) int32, on the device of lengths

        cu[0] = 0,   cu[b + 1] = lengths[0] + ... + lengths[b]      text b has rows cu[b] to cu[b + 1] - 1

    A mask says for each place whether a token stands there. A text is as long as it has tokens, wherever they
    stand. A length may be 0. Nothing is brought to the CPU, as by .item() or .tolist(): that waits for the GPU.
    """
    # your code here (about 3 lines)
    if lengths.dtype == torch.bool:
        lengths = lengths.sum(1)  # (B, N) -> (B,)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    # end of your code


def pack(x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """12.2  Take the padding out: the real rows of a padded batch, one text behind the other.

    x (B, N, ...) of any dtype, real (B, N) bool, True = a real token
    -> values (total, ...), places (total,) int64

        places = the numbers b * N + n of all real tokens, from small to large
        values[t] = x[b, n]  for  places[t] = b * N + n

    Padding may stand before, behind or between the tokens of a text. Gradients flow from values to x.
    No loop over the texts: the number of operations does not depend on B.
    """
    # your code here: 12.2 pack, pick the real rows (about 2 lines)
    places = real.flatten().nonzero()[:, 0]  # (total,)
    return x.flatten(0, 1)[places], places
    # end of your code


def unpack(values: Tensor, places: Tensor, B: int, N: int) -> Tensor:
    """12.2  Put it back: each row where it stood in the padded batch, and zeros where there was padding.

    values (total, ...) of any dtype, places (total,) int64 from `pack` -> x (B, N, ...) of the same dtype

        x[b, n] = values[t]  if places[t] = b * N + n,  else 0

    `...` need not be what `pack` was given: what a model made of the tokens comes back here. Gradients flow
    from x to values. No loop over the texts.
    """
    # your code here: 12.2 pack, put the rows back (about 2 lines)
    padded = values.new_zeros(B * N, *values.shape[1:])
    return padded.index_copy(0, places, values).unflatten(0, (B, N))
    # end of your code


def tile_starts(cu: Tensor, block_m: int) -> Tensor:
    """12.3  How many tiles come before each text, if every text is cut into tiles of block_m rows by itself.

    cu (B + 1,) int32 -> starts (B + 1,) int32, on the device of cu

        tiles[b] = ceil((cu[b + 1] - cu[b]) / block_m)                  an empty text has none
        starts[0] = 0,   starts[b + 1] = tiles[0] + ... + tiles[b]      starts[B] is the number of all tiles

    No loop over the texts, and nothing is brought to the CPU.
    """
    # your code here: 12.3 find_tile, the table (about 2 lines)
    tiles = (cu.diff() + block_m - 1) // block_m  # (B,) rounded up
    return cu_seqlens(tiles)
    # end of your code


def find_tile(starts: Tensor, tiles: Tensor, block_m: int) -> tuple[Tensor, Tensor]:
    """12.3  Which text a tile belongs to, and which row of that text is its first.

    starts (B + 1,) int32 from `tile_starts`; tiles (T,) int32, numbers of tiles, in any order, 0 or more
    -> text (T,), first (T,), of any integer dtype

        starts[text] <= tile < starts[text + 1]          first = (tile - starts[text]) * block_m

    Tiles from starts[B] on do not exist. Their text is B, which does not exist either; their first may be
    anything. No loop over texts or tiles.
    """
    # your code here: 12.3 find_tile, the search (about 2 lines)
    text = torch.searchsorted(starts, tiles, right=True) - 1  # (T,) texts that start at or before it, less 1
    return text, (tiles - starts[text]) * block_m
    # end of your code


@triton.jit
def varlen_kernel(
    Q, K, V, O, L, cu_q, cu_k, starts,
    stride_qn, stride_qh, stride_qd,
    stride_kn, stride_kh, stride_kd,
    stride_vn, stride_vh, stride_vd,
    stride_on, stride_oh, stride_od,
    H, B, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    CAUSAL: tl.constexpr,
):  # fmt: skip
    """12.4  One tile of O and L of one text: chapter 07's kernel, with a text to find and to stay inside.

    Q and O are (total_q, H, D), K and V are (total_k, H, D), L is (total_q, H), float32 and contiguous.
    cu_q and cu_k (12.1) and starts (12.3) are (B + 1,) int32. BLOCK_B is a power of two, B or more.
    Program (t, h) computes tile t, of head h:

        b     = how many texts have all their tiles before tile t: starts[1] to starts[B] that are <= t
        first = (t - starts[b]) * BLOCK_M                        my first row, counted in text b
        nq    = cu_q[b + 1] - cu_q[b],   nk = cu_k[b + 1] - cu_k[b]

    and then rows first to first + BLOCK_M - 1 of text b as in chapter 07, with Nq = nq and Nk = nk. The
    text's queries begin at row cu_q[b] of Q, O and L, its keys at row cu_k[b] of K and V. The grid may have
    more programs than there are tiles: one with b = B returns at once. CAUSAL: row i of a text sees its key j
    when j <= i + nk - nq. A row that sees no key gets O = 0 and L = -inf.
    """
    t = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)

    # your code here: 12.4 varlen, which text is mine, and which of its rows is my first (about 6 lines)
    texts = tl.arange(0, BLOCK_B)
    ends = tl.load(starts + 1 + texts, mask=texts < B, other=2147483647)  # where each text's tiles end
    b = tl.sum((ends <= t).to(tl.int32), axis=0)
    if b == B:
        return
    first = (t - tl.load(starts + b)) * BLOCK_M
    # end of your code

    # your code here: 12.4 varlen, where my text begins, and how long it is (about 4 lines)
    q_start = tl.load(cu_q + b).to(tl.int64)  # what is multiplied by a stride is int64
    k_start = tl.load(cu_k + b).to(tl.int64)
    nq = tl.load(cu_q + b + 1) - tl.load(cu_q + b)
    nk = tl.load(cu_k + b + 1) - tl.load(cu_k + b)
    # end of your code

    # your code here: 12.4 varlen, move the pointers: Q, O, L to my first row, K, V to my text (about 5 lines)
    Q += (q_start + first) * stride_qn + h * stride_qh
    K += k_start * stride_kn + h * stride_kh
    V += k_start * stride_vn + h * stride_vh
    O += (q_start + first) * stride_on + h * stride_oh
    L += (q_start + first) * H + h
    # end of your code

    r = tl.arange(0, BLOCK_M)  # (BLOCK_M,) rows of the tile
    c = tl.arange(0, BLOCK_N)  # (BLOCK_N,) its columns, the keys
    d = tl.arange(0, D)  # (D,)
    rows = first + r  # (BLOCK_M,) which queries of my text these are

    q = tl.load(Q + r[:, None] * stride_qn + d[None, :] * stride_qd, mask=rows[:, None] < nq, other=0.0)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    end = nk
    # your code here: 12.4 varlen, causal: the first key that none of my rows sees (about 2 lines)
    if CAUSAL:
        end = tl.minimum(nk, first + BLOCK_M + nk - nq)
    # end of your code

    for start in range(0, end, BLOCK_N):
        keys = start + c  # (BLOCK_N,) which keys of my text these are
        k = tl.load(K + c[:, None] * stride_kn + d[None, :] * stride_kd, mask=keys[:, None] < nk, other=0.0)
        s = scale * tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)

        # your code here: 12.4 varlen, hide keys past my text's end, and past the diagonal (about 4 lines)
        seen = keys[None, :] < nk
        if CAUSAL:
            seen = seen & (keys[None, :] <= rows[:, None] + nk - nq)
        s = tl.where(seen, s, float("-inf"))
        # end of your code

        m_new = tl.maximum(m, tl.max(s, axis=1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key seen yet: -inf - -inf is NaN
        alpha = tl.exp(m - m_safe)
        p = tl.exp(s - m_safe[:, None])
        l = alpha * l + tl.sum(p, axis=1)
        v = tl.load(V + c[:, None] * stride_vn + d[None, :] * stride_vd, mask=keys[:, None] < nk, other=0.0)
        acc = alpha[:, None] * acc + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new
        K += BLOCK_N * stride_kn  # on to the next tile of keys
        V += BLOCK_N * stride_vn

    l = tl.where(l == 0.0, 1.0, l)  # a row that saw no key: O = 0 / 1, L = -inf + log 1
    # your code here: 12.4 varlen, store the rows of O and L that my text has (about 2 lines)
    tl.store(O + r[:, None] * stride_on + d[None, :] * stride_od, acc / l[:, None], mask=rows[:, None] < nq)
    tl.store(L + r * H, m + tl.log(l), mask=rows < nq)
    # end of your code


def flash_forward_varlen(q, k, v, cu_q, cu_k, *, causal=False, scale=None, block_m=64, block_n=32):
    """Attention within each of many texts: out (total_q, H, D) in q's dtype, and lse (total_q, H) float32.

    q is (total_q, H, D), k and v are (total_k, H, D), all float16, bfloat16 or float32, with any strides.
    cu_q and cu_k are (B + 1,) int32 (12.1), on the same device. causal lets query i of a text see its key j
    when j <= i + nk - nq. scale is 1 / sqrt(D) unless given. block_m and block_n: powers of two, 16 or more.
    """
    total_q, H, D = q.shape
    B = cu_q.shape[0] - 1
    scale = 1 / math.sqrt(D) if scale is None else scale
    out = torch.empty_like(q)
    lse = torch.empty((total_q, H), dtype=torch.float32, device=q.device)
    # A text wastes less than one tile, so there are no more tiles than this: known without asking the GPU.
    tiles = (total_q + B * (block_m - 1)) // block_m
    if total_q:
        varlen_kernel[(tiles, H)](
            q, k, v, out, lse, cu_q, cu_k, tile_starts(cu_q, block_m),
            *q.stride(), *k.stride(), *v.stride(), *out.stride(), H, B, scale,
            D=D, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_B=max(16, triton.next_power_of_2(B)), CAUSAL=causal,
            num_warps=4 if block_m <= 64 else 8, num_stages=2,
        )  # fmt: skip
    return out, lse
