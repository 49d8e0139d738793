"""Chapter 08: attention's backward pass as three Triton kernels.

    delta   one program per tile of queries:   Delta = rowsum(dO * O) - dL
    dK, dV  one program per tile of keys:      walks over the queries, recomputes P from L
    dQ      one program per tile of queries:   walks over the keys, recomputes P from L

Each output element is written by one program, so nothing is added up across programs, and the gradients are
the same bits on every run. The price is that S and dP are computed twice.

Limits, on purpose: as many key heads as query heads, and a head dimension that is a power of two, 16 or more.
The package lifts both (flash_edu/kernels/backward.py); chapter 10 sums dK and dV over the heads of a group.
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def delta_kernel(
    dO, O, dL, Delta,
    stride_dob, stride_doh, stride_don, stride_dod,
    stride_ob, stride_oh, stride_on, stride_od,
    H, Nq,
    D: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DL: tl.constexpr,
):  # fmt: skip
    """Delta = rowsum(dO * O) - dL, one number per query (D in chapter 05 and in FlashAttention-2).

    dO and O are (B, H, Nq, D). dL and Delta are (B, H, Nq), float32 and contiguous. With HAS_DL false, dL is
    not read. Program (i, bh) computes entries i * BLOCK_M to (i + 1) * BLOCK_M, those below Nq, of head
    bh % H of sequence bh // H.
    """
    i = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64) // H
    h = tl.program_id(1).to(tl.int64) % H
    first = i.to(tl.int64) * BLOCK_M
    dO += b * stride_dob + h * stride_doh + first * stride_don
    O += b * stride_ob + h * stride_oh + first * stride_on
    dL += (b * H + h) * Nq + first
    Delta += (b * H + h) * Nq + first

    r = tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    d = tl.arange(0, D)  # (D,)
    rows = i * BLOCK_M + r  # (BLOCK_M,) which queries these are

    # your code here: 8.1 delta (about 6 lines)
    tl.static_assert(False, "8.1 delta is not written yet")
    # end of your code


def flash_delta(dout, out, dlse=None, *, block_m=64):
    """rowsum(dout * out) - dlse: (B, H, Nq), float32. dout and out are (B, H, Nq, D), with any strides.

    dlse is (B, H, Nq), or None if nobody asks for the gradient of lse.
    """
    B, H, Nq, D = out.shape
    delta = torch.empty((B, H, Nq), dtype=torch.float32, device=out.device)
    delta_kernel[(triton.cdiv(Nq, block_m), B * H)](
        dout, out, delta if dlse is None else dlse.contiguous(), delta, *dout.stride(), *out.stride(),
        H, Nq, D=D, BLOCK_M=block_m, HAS_DL=dlse is not None,
    )  # fmt: skip
    return delta


@triton.jit
def dkdv_kernel(
    Q, K, V, dO, L, Delta, dK, dV,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_don, stride_dod,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd,
    stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    H, Nq, Nk, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One tile of dK = scale dS^T Q and of dV = P^T dO (FlashAttention-2, Algorithm 2; chapter 05).

    Q and dO are (B, H, Nq, D), K, V, dK and dV are (B, H, Nk, D), L and Delta are (B, H, Nq), float32 and
    contiguous. Program (j, bh) computes rows j * BLOCK_N to (j + 1) * BLOCK_N, those below Nk, of dK and dV.
    Every tile of scores is kept transposed, a row per key:

        for each tile of queries that sees one of my keys:
            S^T  = scale K Q^T           P^T  = exp(S^T - L)            0 where query i may not see key j
            dV  += P^T dO                dP^T = V dO^T
            dS^T = P^T * (dP^T - Delta)  dK  += dS^T Q
        at the end                       dK  *= scale

    With CAUSAL, query i sees key j when j <= i + Nk - Nq. A query that sees no key adds nothing.
    Rows of Q, dO, L and Delta from Nq on are loaded as zeros.
    """
    j = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64) // H
    h = tl.program_id(1).to(tl.int64) % H
    first = j.to(tl.int64) * BLOCK_N  # my first key
    Q += b * stride_qb + h * stride_qh
    dO += b * stride_dob + h * stride_doh
    L += (b * H + h) * Nq
    Delta += (b * H + h) * Nq
    K += b * stride_kb + h * stride_kh + first * stride_kn
    V += b * stride_vb + h * stride_vh + first * stride_vn
    dK += b * stride_dkb + h * stride_dkh + first * stride_dkn
    dV += b * stride_dvb + h * stride_dvh + first * stride_dvn

    r = tl.arange(0, BLOCK_M)  # (BLOCK_M,) queries of a tile
    c = tl.arange(0, BLOCK_N)  # (BLOCK_N,) keys of a tile
    d = tl.arange(0, D)  # (D,)
    keys = j * BLOCK_N + c  # (BLOCK_N,) which keys these are

    # My tiles of K and V stay on the chip for the whole walk.
    k = tl.load(K + c[:, None] * stride_kn + d[None, :] * stride_kd, mask=keys[:, None] < Nk, other=0.0)
    v = tl.load(V + c[:, None] * stride_vn + d[None, :] * stride_vd, mask=keys[:, None] < Nk, other=0.0)
    dk = tl.zeros((BLOCK_N, D), tl.float32)
    dv = tl.zeros((BLOCK_N, D), tl.float32)

    # With CAUSAL, down to a tile's start: rounded up, it would miss the first query that sees my first key.
    begin = 0
    # your code here: 8.2 dkdv, CAUSAL: the first tile of queries that sees my first key (about 2 lines)
    tl.static_assert(False, "8.2 dkdv is not written yet")
    # end of your code
    # Q and dO move to the first tile of the walk; L and Delta stay, for rows counts from 0 of the head.
    # int64: the product can pass 2^31. tl.cast: begin may be the plain 0 above, and a number has no .to.
    Q += tl.cast(begin, tl.int64) * stride_qn
    dO += tl.cast(begin, tl.int64) * stride_don

    for start in range(begin, Nq, BLOCK_M):
        rows = start + r  # (BLOCK_M,) which queries these are
        q = tl.load(Q + r[:, None] * stride_qn + d[None, :] * stride_qd, mask=rows[:, None] < Nq, other=0.0)
        do_tile = dO + r[:, None] * stride_don + d[None, :] * stride_dod
        do = tl.load(do_tile, mask=rows[:, None] < Nq, other=0.0)
        lse = tl.load(L + rows, mask=rows < Nq, other=0.0)
        delta = tl.load(Delta + rows, mask=rows < Nq, other=0.0)
        lse = tl.where(lse == float("-inf"), 0.0, lse)  # saw no key: -inf - -inf is NaN

        # your code here: 8.2 dkdv, add this tile's part to dv and dk (about 9 lines)
        tl.static_assert(False, "8.2 dkdv is not written yet")
        # end of your code

        Q += BLOCK_M * stride_qn  # on to the next tile of queries
        dO += BLOCK_M * stride_don

    # scale is a factor of S alone, and dK comes from S: dK is multiplied by it, dV is not.
    # your code here: 8.2 dkdv, store my rows of dK and dV (about 2 lines)
    tl.static_assert(False, "8.2 dkdv is not written yet")
    # end of your code


def flash_dkdv(q, k, v, dout, lse, delta, *, causal=False, scale=None, block_m=32, block_n=64):
    """dk and dv, (B, H, Nk, D) each, in k's and v's dtype. lse and delta are (B, H, Nq), float32.

    q and dout are (B, H, Nq, D), k and v are (B, H, Nk, D), with any strides: out.sum().backward() sends a
    dout whose strides are all 0. block_m is the queries of a tile, block_n the keys.
    """
    B, H, Nq, D = q.shape
    Nk = k.shape[2]
    scale = 1 / math.sqrt(D) if scale is None else scale
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dkdv_kernel[(triton.cdiv(Nk, block_n), B * H)](
        q, k, v, dout, lse.contiguous(), delta.contiguous(), dk, dv,
        *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dk.stride(), *dv.stride(),
        H, Nq, Nk, scale, D=D, BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal,
        # How many threads work on a tile (32 to a warp), and how far ahead loads run: chapter 16.
        num_warps=4 if block_n <= 64 else 8, num_stages=2,
    )  # fmt: skip
    return dk, dv


@triton.jit
def dq_kernel(
    Q, K, V, dO, L, Delta, dQ,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_dob, stride_doh, stride_don, stride_dod,
    stride_dqb, stride_dqh, stride_dqn, stride_dqd,
    H, Nq, Nk, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """One tile of dQ = scale dS K (FlashAttention-2, Algorithm 2; chapter 05).

    Q, dO and dQ are (B, H, Nq, D), K and V are (B, H, Nk, D), L and Delta are (B, H, Nq), float32 and
    contiguous. Program (i, bh) computes rows i * BLOCK_M to (i + 1) * BLOCK_M, those below Nq, of dQ. It
    walks as the forward does:

        for each tile of keys that one of my rows sees:
            S   = scale Q K^T            P   = exp(S - L)               0 where row i may not see key j
            dP  = dO V^T                 dS  = P * (dP - Delta)
            dQ += dS K
        at the end                       dQ *= scale

    With CAUSAL, row i sees key j when j <= i + Nk - Nq. A row that sees no key has L = -inf and dQ = 0.
    """
    i = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64) // H
    h = tl.program_id(1).to(tl.int64) % H
    first = i.to(tl.int64) * BLOCK_M  # my first row
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    Q += b * stride_qb + h * stride_qh + first * stride_qn
    dO += b * stride_dob + h * stride_doh + first * stride_don
    dQ += b * stride_dqb + h * stride_dqh + first * stride_dqn
    L += (b * H + h) * Nq + first
    Delta += (b * H + h) * Nq + first

    r = tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    c = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    d = tl.arange(0, D)  # (D,)
    rows = i * BLOCK_M + r  # (BLOCK_M,) which queries these are

    q = tl.load(Q + r[:, None] * stride_qn + d[None, :] * stride_qd, mask=rows[:, None] < Nq, other=0.0)
    do = tl.load(dO + r[:, None] * stride_don + d[None, :] * stride_dod, mask=rows[:, None] < Nq, other=0.0)
    lse = tl.load(L + r, mask=rows < Nq, other=0.0)
    delta = tl.load(Delta + r, mask=rows < Nq, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # saw no key: -inf - -inf is NaN

    # your code here: 8.3 dq, start dq and walk over the keys (about 20 lines)
    tl.static_assert(False, "8.3 dq is not written yet")
    # end of your code


def flash_dq(q, k, v, dout, lse, delta, *, causal=False, scale=None, block_m=64, block_n=32):
    """dq, (B, H, Nq, D), in q's dtype. The arguments are those of flash_dkdv."""
    B, H, Nq, D = q.shape
    Nk = k.shape[2]
    scale = 1 / math.sqrt(D) if scale is None else scale
    dq = torch.empty_like(q)
    dq_kernel[(triton.cdiv(Nq, block_m), B * H)](
        q, k, v, dout, lse.contiguous(), delta.contiguous(), dq,
        *q.stride(), *k.stride(), *v.stride(), *dout.stride(), *dq.stride(),
        H, Nq, Nk, scale, D=D, BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal,
        num_warps=4 if block_m <= 64 else 8, num_stages=2,  # as in flash_dkdv
    )  # fmt: skip
    return dq


def flash_backward(dout, dlse, q, k, v, out, lse, *, causal=False, scale=None):
    """dq, dk, dv of flash_forward(q, k, v), from dout and dlse, the gradients of out and lse (or None)."""
    delta = flash_delta(dout, out, dlse)
    dk, dv = flash_dkdv(q, k, v, dout, lse, delta, causal=causal, scale=scale)
    dq = flash_dq(q, k, v, dout, lse, delta, causal=causal, scale=scale)
    return dq, dk, dv
