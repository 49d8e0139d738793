"""Chapter 03, online softmax: the maximum and the sum of a row that arrives in pieces.

Two numbers stand for a piece of a row of scores s: its maximum m, and its sum l = sum_j exp(s_j - m).
"""

import math

import torch
from torch import Tensor


def anchor(m: Tensor) -> Tensor:
    """What to subtract from scores whose maximum is m. Given; the notebook shows why it is needed.

    m itself, or 0 where m is -inf: there no score has counted yet, and -inf - (-inf) is not a number.
    """
    return m.masked_fill(m == -math.inf, 0.0)


def safe_softmax(scores: Tensor) -> Tensor:
    """3.1  Softmax along the last dimension, for scores of any size.

        P_j = exp(s_j - m) / sum_i exp(s_i - m),   m = max_i s_i    (Milakov & Gimelshein 2018, algorithm 2)

    Args:
        scores: (..., N), N at least 1. A score of -inf is masked: its weight is 0.

    Returns:
        The weights, (..., N), in the dtype of the scores. Each row has its own maximum and its own sum.
        A row that holds nothing but -inf gives zeros, not NaN.

    The scores are left as they are. Write it with amax, exp and sum: `torch.softmax` would hide the point.
    """
    # your code here (about 4 lines)
    m = scores.amax(dim=-1, keepdim=True)  # (..., 1)
    weights = (scores - anchor(m)).exp()  # (..., N), the largest is exp(0) = 1
    total = weights.sum(dim=-1, keepdim=True)  # (..., 1)
    return weights / total.masked_fill(total == 0, 1.0)  # 0 / 1 for a row of nothing
    # end of your code


def online_softmax(blocks) -> tuple[Tensor, Tensor]:
    """3.2  The maximum and the sum of rows that arrive in blocks of columns; each block is seen once.

    With the block's scores s and the pair (m, l) of everything before it,

        m_new = max(m, max_j s_j)
        l_new = l exp(m - m_new) + sum_j exp(s_j - m_new)           (Milakov & Gimelshein 2018, algorithm 3)

    Args:
        blocks: tensors (..., n), one after the other; n may differ, the other dimensions do not. They may come
            from a generator: a block is gone once the next one is asked for, so do not collect them.

    Returns:
        m (...) and l (...): the maximum over all blocks, and the sum of exp(s - m) over all blocks.
        A row in which every score is -inf gives m = -inf and l = 0.
    """
    # Nothing seen yet: the pair (-inf, 0). Numbers without dims fit rows of any shape, fp64 and a GPU included.
    m = torch.tensor(-math.inf)
    l = torch.tensor(0.0)
    for s in blocks:
        # your code here (about 4 lines)
        m_new = torch.maximum(m, s.amax(dim=-1))  # (...)
        repair = (m - anchor(m_new)).exp()  # (...), 1 where the maximum has not moved
        l = l * repair + (s - anchor(m_new)[..., None]).exp().sum(dim=-1)
        m = m_new
        # end of your code
    return m, l


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """3.3  The pair of two pieces together, from the pair of each.

        m = max(m_a, m_b)
        l = l_a exp(m_a - m) + l_b exp(m_b - m)                     (Milakov & Gimelshein 2018, section 3.1)

    Args:
        a, b: the pairs (m, l) of two pieces of the same rows; m and l are (...). The pair of an empty piece is
            (-inf, 0). It changes nothing, and two of them make another.

    Returns:
        m (...) and l (...).
    """
    (m_a, l_a), (m_b, l_b) = a, b
    # your code here (about 3 lines)
    m = torch.maximum(m_a, m_b)
    l = l_a * (m_a - anchor(m)).exp() + l_b * (m_b - anchor(m)).exp()
    return m, l
    # end of your code
