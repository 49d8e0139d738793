"""Random bits that can be made again: Philox 4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A counter and a key give four numbers, without any state. The counter is the place of a weight in P, so that a forward and a
backward with other tiles, on another device, drop the same weights. 7 rounds pass all of BigCrush (section 4.4 there).
"""
import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def dropout_threshold(p: float) -> int:
    """A weight is dropped if its 32 random bits are below this."""
    return min(round(p * 2**32), LOW)


def kept(seed: Tensor, p: float, head: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """(heads, rows, cols) bool: which weights a dropout of p keeps. Every 4 neighbouring columns share a counter.

    seed (2,) int64: seed and offset. head, rows, cols: the places, int64, 1-D; head is batch * Hq + head.
    """
    counter = [cols[None, None, :] // 4, rows[None, :, None], head[:, None, None], seed[1]]
    bits = torch.stack(torch.broadcast_tensors(*_philox(counter, seed[0])))  # (4, heads, rows, cols)
    chosen = bits.gather(0, (cols % 4).expand(bits.shape[1:])[None])[0]
    return chosen >= dropout_threshold(p)


def _philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    c = [x & LOW for x in counter]
    key = [seed & LOW, (seed >> 32) & LOW]
    for _ in range(ROUNDS):
        a, b = MULTIPLIERS[0] * c[0], MULTIPLIERS[1] * c[2]  # the low 64 bits of the product, and those are all there are
        c = [_high(b) ^ c[1] ^ key[0], b & LOW, _high(a) ^ c[3] ^ key[1], a & LOW]
        key = [(k + step) & LOW for k, step in zip(key, KEY_STEPS)]
    return c


def _high(product: Tensor) -> Tensor:
    return (product >> 32) & LOW
