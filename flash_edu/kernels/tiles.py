"""Tile sizes: how many queries and keys a program holds at once, with how many warps and pipeline stages.

Bigger tiles reuse each loaded byte more often, until they no longer fit in registers (the compiler spills) or in shared
memory (the launch fails). The table is chosen by what the compiler reports and by measurement, once, here: no search at
the user's first call. Every tile of it is compiled by tests/package/test_compiled.py.
"""
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int
    split: int = 1  # into how many products the head dim is split, see common.dot_rows

    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "SPLIT"), self))


HEAD_DIMS = (64, 128, 256)  # a row of the table serves all head dims up to its own

# (kernel, GPU, bytes of an element) -> a tile for each of HEAD_DIMS. "sm_90" is Hopper; "sm_80" is Ampere and every other
# GPU: its tiles stay below the 99 KB of shared memory that consumer cards have.
TILES = {
    ("forward", "sm_90", 2): (Tile(128, 64, 8, 4), Tile(64, 64, 4, 3), Tile(128, 32, 8, 3)),
    ("backward_kv", "sm_90", 2): (Tile(64, 64, 4, 2), Tile(32, 128, 8, 3), Tile(32, 64, 8, 2)),
    ("backward_q", "sm_90", 2): (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 3)),
    ("forward", "sm_80", 2): (Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 8, 2)),
    ("backward_kv", "sm_80", 2): (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    ("backward_q", "sm_80", 2): (Tile(64, 64, 4, 3), Tile(64, 64, 8, 2), Tile(32, 32, 4, 1)),
    ("forward", "sm_80", 4): (Tile(32, 32, 4, 2), Tile(16, 32, 4, 1), Tile(16, 32, 8, 1, 8)),
    ("backward_kv", "sm_80", 4): (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1, 8)),
    ("backward_q", "sm_80", 4): (Tile(32, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1, 8)),
}

# In the interpreter any tile fits and none is fast: small ones, of different sizes, so that small tests cross their edges.
INTERPRETED = {"forward": Tile(32, 16, 4, 1), "backward_kv": Tile(16, 32, 4, 1), "backward_q": Tile(32, 16, 4, 1, 2)}


def choose_tile(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The tile of `kernel` ("forward", "backward_kv" or "backward_q") for the larger of the two head dims."""
    if device.type == "cpu":
        return INTERPRETED[kernel]
    gpu = "sm_90" if dtype.itemsize == 2 and torch.cuda.get_device_capability(device)[0] == 9 else "sm_80"
    row = next(i for i, limit in enumerate(HEAD_DIMS) if head_dim <= limit)
    return TILES[kernel, gpu, dtype.itemsize][row]
