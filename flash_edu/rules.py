"""What a request asks of the scores, between Q K^T and the softmax: one tuple, which every backend is given.

The order is FlashAttention 2's: scale, softcap, ALiBi and float mask added, a pattern's score_mod; then what is hidden: boolean
mask, padding, window, a pattern's mask_mod. Sinks join the sum of the softmax, dropout comes after it.
"""
from typing import NamedTuple

import torch
from torch import Tensor

NO_LIMIT = -1  # in a window


class Rules(NamedTuple):
    """Positions are aligned bottom-right: query i stands at key i + Nk - Nq. None, or an empty list: the rule is not there."""

    scale: float
    left: int | None = None  # a query sees so many keys before its own position
    right: int | None = None  # and so many after it; causal is 0
    softcap: float | None = None
    dropout_p: float = 0.0
    mask: Tensor | None = None  # (B or 1, Hq or 1, Nq or 1, Nk or 1): bool, True = attend; or float, added to the scores
    padding: Tensor | None = None  # (B, Nk) bool, True = a real token
    slopes: Tensor | None = None  # (B or 1, Hq) fp32: slope * |distance| is subtracted from the score
    sinks: Tensor | None = None  # (Hq,): one more score in each row's softmax, whose value is 0
    seed: Tensor | None = None  # (2,) int64: seed and offset of the dropout
    cu_q: Tensor | None = None  # (B + 1,) int32: where each sequence's queries start, if they are packed in one row
    cu_k: Tensor | None = None
    max_q: int = 0  # the longest sequence, if packed
    max_k: int = 0
    pattern: str | None = None  # the name of a Pattern, see patterns.py
    buffers: list[Tensor] = []  # what the pattern reads
    first_head: int = 0  # the number that dropout gives to batch 0, head 0; not an argument of the operators

    @property
    def packed(self) -> bool:
        return self.cu_q is not None


# The same fields, as the schema of an operator.
SCHEMA = (
    "float scale, SymInt? left, SymInt? right, float? softcap, float dropout_p, Tensor? mask, Tensor? padding, Tensor? slopes, "
    "Tensor? sinks, Tensor? seed, Tensor? cu_q, Tensor? cu_k, SymInt max_q, SymInt max_k, str? pattern, Tensor[] buffers"
)


def limits(causal: bool, window: tuple[int | None, int | None] | None) -> tuple[int | None, int | None]:
    """(left, right) of a window; causal sees nothing to the right."""
    left, right = (None if side in (None, NO_LIMIT) else side for side in window or (None, None))
    if causal:
        right = 0 if right is None else min(right, 0)
    return left, right


def four_dims(mask: Tensor | None) -> Tensor | None:
    """A mask that broadcasts to (B, Hq, Nq, Nk), with all four dimensions."""
    return mask if mask is None else mask[(None,) * (4 - mask.ndim)]


def two_dims(slopes: Tensor | None) -> Tensor | None:
    """(Hq,) or (B, Hq) as (1 or B, Hq), fp32."""
    if slopes is None:
        return None
    return (slopes if slopes.ndim == 2 else slopes[None]).detach().to(torch.float32)
