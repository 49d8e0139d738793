"""Chapter 00, start here: one small function, to learn how a check talks to you."""

import math


def softmax_scale(head_dim: int) -> float:
    """0.1  The number that scores are multiplied by before softmax.

        scale = 1 / sqrt(d)                                        (Vaswani et al. 2017, section 3.2.1)

    Args:
        head_dim: d, how many numbers one query or one key has. A whole number, 1 or more.

    Returns:
        A Python float. softmax_scale(4) is 0.5.
    """
    # your code here (about 1 line)
    raise NotImplementedError("0.1 softmax_scale is not written yet")
    # end of your code
