"""Chapter 07: attention's forward pass as one Triton kernel.

One program owns one tile of Q: BLOCK_M rows of one head. It walks over the keys and values, BLOCK_N at a
time, keeps the running softmax of chapter 03 on the chip, and writes its rows of O and L once. No score is
ever stored.

Limits, on purpose: as many key heads as query heads, and a head dimension that is a power of two, 16 or more.
The package lifts both (flash_edu/kernels/forward.py); chapter 10 shows how.
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def flash_forward_kernel(
    Q, K, V, O, L,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_on, stride_od,
    H, Nq, Nk, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One tile of O = softmax(S) V and of L = logsumexp(S), S = scale Q K^T (FlashAttention-2, Algorithm 1).

    Q and O are (B, H, Nq, D), K and V are (B, H, Nk, D), L is (B, H, Nq), float32 and contiguous.
    Program (i, bh) computes rows i * BLOCK_M to (i + 1) * BLOCK_M of O and L, for head bh % H of sequence
    bh // H:

        m = -inf,  l = 0,  acc = 0
        for each tile of keys:   s = scale q k^T             m_new = max(m, rowmax s)
                                 p = exp(s - m_new)          alpha = exp(m - m_new)
                                 l = alpha l + rowsum p      acc = alpha acc + p v      m = m_new
        O = acc / l,  L = m + log l

    7.1  Every row sees every key, and the tiles divide Nq and Nk.
    7.2  CAUSAL: row i sees key j when j <= i + Nk - Nq. A row that sees no key gets O = 0 and L = -inf.
         This takes the marked lines, two new lines among those of 7.1, and their use beside them.
    7.3  Any Nq and Nk: rows from Nq on are neither read nor written, keys from Nk on are neither read nor
         counted. This takes the marked lines, a mask on every load and store of 7.1, and other=0.0 on the loads.
    """
    # Which tile is mine? Everything that is multiplied by a stride is int64: the product can pass 2^31.
    i = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64) // H
    h = tl.program_id(1).to(tl.int64) % H
    first = i.to(tl.int64) * BLOCK_M  # my first row

    # Move each pointer to what I work on: Q, O and L to my first row, K and V to key 0 of my head.
    Q += b * stride_qb + h * stride_qh + first * stride_qn
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    O += b * stride_ob + h * stride_oh + first * stride_on
    L += (b * H + h) * Nq + first

    # Inside a tile, offsets are small.
    r = tl.arange(0, BLOCK_M)  # (BLOCK_M,) rows of the tile
    c = tl.arange(0, BLOCK_N)  # (BLOCK_N,) its columns, the keys
    d = tl.arange(0, D)  # (D,)
    rows = i * BLOCK_M + r  # (BLOCK_M,) which queries these are

    # your code here: 7.1 flash_forward, load my Q tile, start m, l and acc (about 4 lines)
    tl.static_assert(False, "7.1 flash_forward is not written yet")
    # end of your code

    end = Nk
    # your code here: 7.2 causal, the first key that none of my rows sees (about 2 lines)
    # end of your code

    for start in range(0, end, BLOCK_N):
        keys = start + c  # (BLOCK_N,) which keys these are

        # your code here: 7.1 flash_forward, load a tile of K, compute the scores s (about 2 lines)
        tl.static_assert(False, "7.1 flash_forward is not written yet")
        # end of your code

        # your code here: 7.2 causal, hide the keys past the diagonal (about 3 lines)
        # end of your code

        # your code here: 7.3 ragged, hide the keys that do not exist (about 2 lines)
        # end of your code

        # your code here: 7.1 flash_forward, update m, l and acc with a tile of V (about 7 lines)
        tl.static_assert(False, "7.1 flash_forward is not written yet")
        # end of your code

        K += BLOCK_N * stride_kn  # on to the next tile of keys
        V += BLOCK_N * stride_vn

    # your code here: 7.1 flash_forward, finish and store my rows of O and L (about 2 lines)
    tl.static_assert(False, "7.1 flash_forward is not written yet")
    # end of your code


def flash_forward(q, k, v, *, causal=False, scale=None, block_m=64, block_n=32):
    """Attention by one kernel: out (B, H, Nq, D) in q's dtype, and lse (B, H, Nq), natural log, float32.

    q is (B, H, Nq, D), k and v are (B, H, Nk, D), all float16, bfloat16 or float32, with any strides.
    causal lets query i see key j when j <= i + Nk - Nq. scale is 1 / sqrt(D) unless given.
    block_m and block_n are the rows and keys of a tile: powers of two, 16 or more.
    """
    B, H, Nq, D = q.shape
    Nk = k.shape[2]
    scale = 1 / math.sqrt(D) if scale is None else scale
    out = torch.empty_like(q)
    lse = torch.empty((B, H, Nq), dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(Nq, block_m), B * H)  # one program per tile of Q, in every head
    flash_forward_kernel[grid](
        q, k, v, out, lse, *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        H, Nq, Nk, scale, D=D, BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal,
        # How many threads work on a tile (32 to a warp), and how far ahead loads run: chapter 16.
        num_warps=4 if block_m <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return out, lse
