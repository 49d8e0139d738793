"""Chapter 11, dropout: whether a weight is kept follows from its place alone, so the decision can be made again.

    philox           32 random bits from a counter and a key, without a state
    keep_tile        which weights of a tile are kept, for any tile
    dropout_forward  attention in tiles, with dropout
    dropout_backward its gradients, with other tiles and the same decisions
    keep_kernel      keep_tile in Triton

Shapes: B batch, H heads, Nq queries, Nk keys, D numbers in a query or a key, Dv in a value. A word is 32 bits. PyTorch
has hardly any arithmetic for unsigned words, so a word lies in an int64, as a number from 0 to 2^32 - 1.

Limits, on purpose: full attention, as many key heads as query heads, fp32 or fp64. Masks (chapter 10) hide scores;
dropout comes after them, and they change nothing about it.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

WORD = 0xFFFFFFFF  # 32 ones: x & WORD is the low word of x, and (x >> 32) & WORD the high one
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Philox 4x32: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # what is added to the key after each round
ROUNDS = 7  # as in flash_edu: the fewest that pass all tests of BigCrush, says the paper


def philox(counter: Tensor, key: Tensor, rounds: int = ROUNDS) -> Tensor:
    """11.1  Philox 4x32: four random words from four words of counter and two of key. A pure function.

    counter (4, ...) int64, key (2,) int64, all from 0 to 2^32 - 1 -> words (4, ...) int64, from 0 to 2^32 - 1

    One round, with the counter's words c0 .. c3 and the key's words k0, k1 (^ is exclusive or; Salmon et al. 2011):
        a = MULTIPLIERS[0] * c0,   b = MULTIPLIERS[1] * c2          64 bits each: a high word and a low word
        c0, c1, c2, c3 = high(b) ^ c1 ^ k0,   low(b),   high(a) ^ c3 ^ k1,   low(a)
    and after each round KEY_STEPS is added to the key, word by word, modulo 2^32.

    A product may pass 2^63. int64 then wraps around, and its 64 bits are the right ones all the same. But >> 32 fills up
    with the sign, so the high word needs & WORD too.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    # your code here (about 5 lines)
    raise NotImplementedError("11.1 philox is not written yet")
    # end of your code
    return torch.stack((c0, c1, c2, c3))


def threshold(dropout_p: float) -> int:
    """A weight is dropped if its 32 random bits, as a number, are below this. Given.

    dropout_p, from 0 up to but not 1, in steps of 2^-32.
    """
    return min(round(dropout_p * 2**32), WORD)


def keep_tile(seed: Tensor, dropout_p: float, heads: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """11.2  Which weights of a tile are kept: (heads, rows, cols) bool, True = keep.

    seed (2,) int64: seed and offset, any numbers. heads, rows, cols: 1-D int64, the places of the tile, which may be any
    places, in any order. The head's number is batch * H + head.

    The weight at (head, row, col) has the word number col % 4 of philox(counter, key), with
        counter = (col // 4, row, head, low word of the offset)
        key     = (low word, high word) of the seed
    and is kept if its word >= threshold(dropout_p). flash_edu/philox.py has the same convention.
    """
    # your code here (about 5 lines)
    raise NotImplementedError("11.2 keep_tile is not written yet")
    # end of your code


def dropout_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor,
    dropout_p: float,
    *,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[Tensor, Tensor]:
    """11.3  Attention with dropout, one tile at a time.

    q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), seed (2,) int64
    -> out (B, H, Nq, Dv), lse (B, H, Nq)

        P = softmax(scale * Q K^T)      L_i = log sum_j exp(S_ij)       both without dropout
        O = (P * Z) V                   Z_ij = 1 / (1 - dropout_p) where keep_tile keeps, and 0 elsewhere

    The loop is chapter 04's. A row's sum l counts the dropped weights too, since dropout comes after the softmax.
    A scale of None means 1 / sqrt(D). Any lengths of 1 or more; the last tile is shorter.
    """
    B, H, nq, D = q.shape
    nk = k.shape[2]
    scale = D**-0.5 if scale is None else scale
    out, lse = q.new_empty(B, H, nq, v.shape[-1]), q.new_empty(B, H, nq)
    heads = torch.arange(B * H, device=q.device)  # the number of each head, batch by batch

    for i in range(0, nq, block_q):
        q_i = q[:, :, i : i + block_q]  # (B, H, bq, D)
        rows = torch.arange(i, i + q_i.shape[2], device=q.device)  # which queries these are
        m = q_i.new_full(q_i.shape[:3], -math.inf)  # (B, H, bq)
        l = torch.zeros_like(m)
        acc = q_i.new_zeros(*m.shape, v.shape[-1])  # (B, H, bq, Dv)
        for j in range(0, nk, block_k):
            k_j, v_j = k[:, :, j : j + block_k], v[:, :, j : j + block_k]
            cols = torch.arange(j, j + k_j.shape[2], device=q.device)  # which keys these are
            s = scale * (q_i @ k_j.mT)  # (B, H, bq, bk)
            # your code here: 11.3 dropout_forward, add the tile to m, l and acc (about 7 lines)
            raise NotImplementedError("11.3 dropout_forward is not written yet")
            # end of your code
        # your code here: 11.3 dropout_forward, the tile of O and of L (about 2 lines)
        raise NotImplementedError("11.3 dropout_forward is not written yet")
        # end of your code
    return out, lse


def dropout_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    dropout_p: float,
    *,
    scale: float | None = None,
    block_q: int = 32,
    block_k: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:
    """11.4  The gradients, from what the forward left: O, L, the seed and the offset.

    dout and out (B, H, Nq, Dv), q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), lse (B, H, Nq), seed (2,)
    -> dq, dk, dv, shaped like q, k, v

        P_ij = exp(S_ij - L_i),   Delta = rowsum(dO * O),   Z as in 11.3, made again
        dV = (P * Z)^T dO         dP = (dO V^T) * Z
        dS = P * (dP - Delta)     dQ = scale * dS K,   dK = scale * dS^T Q      (Dao et al. 2022, appendix B.4)

    The tiles are others than the forward's, and their order too: for each tile of keys, all tiles of queries.
    """
    B, H, nq, D = q.shape
    nk = k.shape[2]
    scale = D**-0.5 if scale is None else scale
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    heads = torch.arange(B * H, device=q.device)

    # your code here: 11.4 dropout_backward, Delta (about 1 line)
    raise NotImplementedError("11.4 dropout_backward is not written yet")
    # end of your code
    for j in range(0, nk, block_k):
        k_j, v_j = k[:, :, j : j + block_k], v[:, :, j : j + block_k]
        cols = torch.arange(j, j + k_j.shape[2], device=q.device)
        for i in range(0, nq, block_q):
            q_i, dout_i = q[:, :, i : i + block_q], dout[:, :, i : i + block_q]
            rows = torch.arange(i, i + q_i.shape[2], device=q.device)
            s = scale * (q_i @ k_j.mT)  # (B, H, bq, bk)
            # your code here: 11.4 dropout_backward, add the tile to dv, dk and dq (about 8 lines)
            raise NotImplementedError("11.4 dropout_backward is not written yet")
            # end of your code
    return dq, dk, dv


@triton.jit
def keep_kernel(
    Seed, Keep, Nq, Nk, limit,
    ROUNDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """11.5  One tile of the mask of one head.

    Seed (2,) int64: seed and offset. Keep (heads, Nq, Nk) bool, contiguous. limit is threshold(dropout_p).
    Program (i, j, head) writes BLOCK_M rows from i * BLOCK_M on and BLOCK_N columns from j * BLOCK_N on; only those that exist.

    tl.philox(seed, c0, c1, c2, c3, rounds) takes the whole seed as its key, and the four words of the counter, int32, which
    broadcast. It gives the four random words, uint32. limit may be 2^32 - 1: compare with it as int64.
    """
    i, j, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    cols = j * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    seed = tl.load(Seed)
    offset = tl.load(Seed + 1).to(tl.int32)  # its low word

    # your code here: 11.5 keep_kernel, keep (BLOCK_M, BLOCK_N) (about 4 lines)
    tl.static_assert(False, "11.5 keep_kernel is not written yet")
    # end of your code

    place = head.to(tl.int64) * Nq * Nk + rows[:, None].to(tl.int64) * Nk + cols[None, :]
    tl.store(Keep + place, keep, mask=(rows[:, None] < Nq) & (cols[None, :] < Nk))


def keep_mask(seed, dropout_p, heads, nq, nk, *, block_m=32, block_n=32):
    """The mask of all heads, made tile by tile: (heads, Nq, Nk) bool, on the device of seed.

    Attention never stores this: its kernels make a tile of it where they need one. Here we want to look at it.
    """
    keep = torch.empty(heads, nq, nk, dtype=torch.bool, device=seed.device)
    keep_kernel[(triton.cdiv(nq, block_m), triton.cdiv(nk, block_n), heads)](
        seed, keep, nq, nk, threshold(dropout_p), ROUNDS=ROUNDS, BLOCK_M=block_m, BLOCK_N=block_n,
    )  # fmt: skip
    return keep
