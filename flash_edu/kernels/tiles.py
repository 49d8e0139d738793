"""Tile sizes: how many queries and keys a program holds at once, with how many warps and pipeline stages.

Bigger tiles reuse each loaded byte more often, until they no longer fit in registers (the compiler spills) or in shared
memory (launch.with_room then takes a smaller one). The table is chosen by what the compiler reports and by measurement,
once, here: no search at the user's first call. Every tile of it is compiled by tests/package/test_compiled.py.
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

    def smaller(self) -> "Tile | None":
        """The next one to try if this one does not fit in shared memory: fewer stages first, then fewer keys, then queries."""
        if self.num_stages > 1:
            return self._replace(num_stages=self.num_stages - 1)
        if max(self.block_m, self.block_n) <= 16:
            return None
        wider = "block_n" if self.block_n >= self.block_m else "block_m"
        return self._replace(**{wider: getattr(self, wider) // 2})


HEAD_DIMS = (64, 128, 256)  # a row of the table serves all head dims up to its own

# Three stages for fp32 at head dim 64, forward: 32.6 TFLOP/s on an H100, in spite of 32 spilled bytes; 29.6 with two, 28.8 with one.
# (kernel, GPU, bytes of an element) -> a tile for each of HEAD_DIMS. "sm_90" is Hopper; "sm_80" is Ampere and every other
# GPU: its tiles stay below the 99 KB of shared memory that consumer cards have.
TILES = {
    ("forward", "sm_90", 2): (Tile(128, 64, 8, 4), Tile(64, 64, 4, 3), Tile(128, 32, 8, 3)),
    ("backward_kv", "sm_90", 2): (Tile(64, 64, 4, 2), Tile(32, 128, 8, 3), Tile(32, 64, 8, 2)),
    ("backward_q", "sm_90", 2): (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 32, 8, 3)),
    ("forward", "sm_80", 2): (Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 32, 8, 2)),
    ("backward_kv", "sm_80", 2): (Tile(32, 64, 4, 2), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1)),
    ("backward_q", "sm_80", 2): (Tile(64, 64, 4, 3), Tile(64, 64, 8, 2), Tile(32, 32, 4, 1)),
    ("forward", "sm_80", 4): (Tile(32, 32, 4, 3), Tile(16, 32, 4, 1), Tile(16, 32, 8, 1, 8)),
    ("backward_kv", "sm_80", 4): (Tile(32, 32, 8, 1), Tile(32, 16, 8, 1), Tile(16, 16, 8, 1, 8)),
    ("backward_q", "sm_80", 4): (Tile(32, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1, 8)),
}

# In the interpreter any tile fits and none is fast: small ones, of different sizes, so that small tests cross their edges.
INTERPRETED = {"forward": Tile(32, 16, 4, 1), "backward_kv": Tile(16, 32, 4, 1), "backward_q": Tile(32, 16, 4, 1, 2)}


def choose_tile(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device, *, loads_scores: bool = False) -> Tile:
    """The tile of `kernel` ("forward", "backward_kv" or "backward_q") for the larger of the two head dims.

    loads_scores: each pair of a query and a key needs something from memory, a mask. It takes as much room in each stage as K
    and V together, so there are two stages at most.
    """
    if device.type == "cpu":
        return INTERPRETED[kernel]
    tile = TILES[kernel, _gpu(dtype, device), dtype.itemsize][_row(head_dim)]
    return tile._replace(num_stages=min(tile.num_stages, 2)) if loads_scores else tile


def _gpu(dtype: torch.dtype, device: torch.device) -> str:
    return "sm_90" if dtype.itemsize == 2 and torch.cuda.get_device_capability(device)[0] == 9 else "sm_80"


def _row(head_dim: int) -> int:
    return next(i for i, limit in enumerate(HEAD_DIMS) if head_dim <= limit)


class DecodeTile(NamedTuple):
    """A tile of the decoding kernel, where rows are queries times the query heads that share a key/value head."""

    block_m: int  # rows
    block_n: int  # keys
    num_warps: int
    num_stages: int
    split: int = 1  # as in Tile

    def options(self, *, paged: bool) -> dict[str, int]:
        """As keyword arguments of a launch. With pages, loading a key takes two loads, the first for its page, and the compiler
        gives each half of the stages."""
        stages = 2 * self.num_stages - 1 if paged else self.num_stages
        sizes = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "SPLIT": self.split}
        return sizes | {"num_warps": self.num_warps, "num_stages": stages}


# (GPU, bytes of an element, rows) -> a tile for each of HEAD_DIMS. 16 rows are the fewest that tl.dot takes; fp32 has only those,
# since more would not fit in registers.
DECODE_TILES = {
    ("sm_90", 2, 16): (DecodeTile(16, 128, 4, 3), DecodeTile(16, 64, 4, 3), DecodeTile(16, 64, 8, 3)),
    ("sm_90", 2, 64): (DecodeTile(64, 64, 4, 3), DecodeTile(64, 64, 4, 3), DecodeTile(64, 32, 8, 3)),
    ("sm_80", 2, 16): (DecodeTile(16, 64, 4, 4), DecodeTile(16, 64, 4, 3), DecodeTile(16, 32, 4, 3)),
    ("sm_80", 2, 64): (DecodeTile(64, 32, 4, 4), DecodeTile(64, 32, 8, 4), DecodeTile(64, 16, 8, 3)),
    ("sm_80", 4, 16): (DecodeTile(16, 32, 4, 4), DecodeTile(16, 32, 4, 3), DecodeTile(16, 16, 8, 2, 8)),
}
INTERPRETED_DECODE = {16: DecodeTile(16, 32, 2, 1), 64: DecodeTile(64, 16, 2, 1, 2)}


def choose_decode_tile(head_dim: int, rows: int, dtype: torch.dtype, device: torch.device) -> DecodeTile:
    """The tile for the larger of the two head dims, and so many rows that share a key/value head."""
    block_m = 16 if rows <= 16 or dtype.itemsize > 2 and device.type == "cuda" else 64
    if device.type == "cpu":
        return INTERPRETED_DECODE[block_m]
    return DECODE_TILES[_gpu(dtype, device), dtype.itemsize, block_m][_row(head_dim)]
