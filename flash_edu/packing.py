"""Batches of sequences of different lengths, with padding and without: `pack` takes it out, `unpack` puts it back."""
from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """What `pack` gives, and `flash_attention_varlen` and `unpack` take."""

    values: Tensor  # (total, ...)
    cu_seqlens: Tensor  # (B + 1,) int32: 0, and where each sequence ends
    max_seqlen: int  # the length of the padded batch
    places: Tensor  # (total,) int64: where each token lies in the flattened batch


def pack(x: Tensor, real: Tensor) -> Packed:
    """The real tokens of a padded batch, one sequence behind the other.

    Args:
        x: (B, N, ...).
        real: (B, N) bool, True = a real token. Padding may be left, right or between.

    How many tokens there are decides a shape, so on a GPU this waits for it, once for a whole model: pack the embeddings,
    run every layer packed, and unpack the result. max_seqlen is N, which costs no waiting and is never too small.
    """
    for name, y in (("x", x), ("real", real)):
        if not isinstance(y, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(y).__name__}")
    if real.dtype != torch.bool:
        raise TypeError(f"real must be bool (True = a real token), got {real.dtype}")
    if real.ndim != 2 or x.shape[:2] != real.shape:
        raise ValueError(f"real must be (batch, seq), the first two dimensions of x, got {tuple(real.shape)} and x {tuple(x.shape)}")
    places = real.flatten().nonzero()[:, 0]
    ends = real.sum(1).cumsum(0)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
    return Packed(x.flatten(0, 1)[places], cu_seqlens, real.shape[1], places)


def unpack(values: Tensor, packed: Packed) -> Tensor:
    """Results (total, ...) back in the places that their tokens had: (B, N, ...), 0 where there was padding."""
    total = packed.places.shape[0]
    if values.shape[0] != total:
        raise ValueError(f"values must have a row for each of the {total} packed tokens, got {tuple(values.shape)}")
    batch = packed.cu_seqlens.shape[0] - 1
    room = values.new_zeros(batch * packed.max_seqlen, *values.shape[1:])
    return room.index_copy(0, packed.places, values).unflatten(0, (batch, packed.max_seqlen))
