"""Chapter 04, tiled attention: exact attention that never holds more than one tile of scores.

Shapes: B batch, H heads, Nq queries, Nk keys, D numbers in a query or a key, Dv in a value.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from .ch03_online_softmax import anchor


def load_tile(x: Tensor, start: int, size: int) -> Tensor:
    """Rows start .. start + size - 1 of x (..., N, D), as a tile (..., size, D). Given.

    A tile always has `size` rows, as on a GPU; rows past the end of x are filled with zeros. Its numbers are
    float32, whatever the dtype of x (float64 stays): every sum over many keys is kept in at least that.
    """
    rows = x[..., start : start + size, :]
    missing = size - rows.shape[-2]
    return pad(rows, (0, 0, 0, missing)).to(torch.promote_types(x.dtype, torch.float32))


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    block_q: int = 64,
    block_k: int = 64,
) -> tuple[Tensor, Tensor]:
    """Attention one tile at a time, and the log-sum-exp of each row of scores.

        S = scale * Q K^T,   O = softmax(S) V,   L_i = log sum_j exp(S_ij)

    For a tile of block_q queries, m = -inf, l = 0, acc = 0; then for each tile of block_k keys and values
        S = scale * Q K^T                                         (block_q, block_k)
        m_new = max(m, rowmax S),  p = exp(S - m_new),  repair = exp(m - m_new)
        l = repair * l + rowsum p,   acc = repair * acc + p V,   m = m_new
    and at the end O = acc / l, L = m + log l.                      (Dao 2023, algorithm 1)

    4.1  tiled_attention: full attention, when the blocks divide Nq and Nk. Three places. New tensors are made on q's
         device, and in the dtype of the tile.
    4.2  causal: query i sees the keys j <= i + Nk - Nq. A key tile that no row of the query tile sees is not loaded;
         only a tile that the diagonal cuts is masked. A row that sees no key gives O = 0, L = -inf. Two new
         places, and three lines of 4.1 to mend: both exponentials subtract anchor(m_new), where m itself stays
         as it is, and the division where l is 0.
    4.3  ragged: any Nq and Nk, and blocks larger than either. A key past the end must get no weight. One place.

    Args:
        q: (B, H, Nq, D).
        k: (B, H, Nk, D).
        v: (B, H, Nk, Dv).
        scale: None means 1 / sqrt(D).

    Returns:
        out (B, H, Nq, Dv) in the dtype of q, and lse (B, H, Nq) in float32 (float64 for float64), natural log.
    """
    nq, nk = q.shape[-2], k.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = q.new_empty(*q.shape[:-1], v.shape[-1])  # (B, H, Nq, Dv)
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))  # (B, H, Nq)

    for start_q in range(0, nq, block_q):
        q_tile = load_tile(q, start_q, block_q)  # (B, H, block_q, D)
        rows = torch.arange(start_q, start_q + block_q, device=q.device)  # which queries these are

        # your code here: 4.1 tiled_attention, start m, l and acc (about 3 lines)
        raise NotImplementedError("4.1 tiled_attention is not written yet")
        # end of your code

        end = nk
        # your code here: 4.2 causal, set end: one past the last key that any of these rows sees, at most nk (about 2 lines)
        # end of your code

        for start_k in range(0, end, block_k):
            k_tile = load_tile(k, start_k, block_k)  # (B, H, block_k, D)
            v_tile = load_tile(v, start_k, block_k)  # (B, H, block_k, Dv)
            keys = torch.arange(start_k, start_k + block_k, device=q.device)  # which keys these are
            s = q_tile @ k_tile.mT * scale  # (B, H, block_q, block_k)

            # your code here: 4.2 causal, hide the keys past the diagonal (about 3 lines)
            # end of your code

            # your code here: 4.3 ragged, hide the keys that do not exist (about 2 lines)
            # end of your code

            # your code here: 4.1 tiled_attention, add this tile to m, l and acc (about 6 lines)
            raise NotImplementedError("4.1 tiled_attention is not written yet")
            # end of your code

        # your code here: 4.1 tiled_attention, the tile of O and of L (about 3 lines)
        raise NotImplementedError("4.1 tiled_attention is not written yet")
        # end of your code

        real = min(block_q, nq - start_q)  # the last tile may hold fewer queries than rows
        out[..., start_q : start_q + real, :] = o_tile[..., :real, :]
        lse[..., start_q : start_q + real] = lse_tile[..., :real]
    return out, lse


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """4.4  Attention over two sets of keys together, from the output and L of each set alone.

        L = log(exp L_a + exp L_b)
        O = exp(L_a - L) O_a + exp(L_b - L) O_b                     (L: chapter 03's merge of (L_a, 1) and (L_b, 1))

    Args:
        out_a, out_b: (..., N, Dv), the outputs of the same queries over the one set and over the other.
        lse_a, lse_b: (..., N), their L: any size, and -inf (with an output of 0) for a query that saw no key.

    Returns:
        out (..., N, Dv) in the dtype of out_a, and lse (..., N) in the dtype of lse_a.
    """
    # your code here (about 4 lines)
    raise NotImplementedError("4.4 merge_attention is not written yet")
    # end of your code
