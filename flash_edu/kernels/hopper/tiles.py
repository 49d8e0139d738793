"""Tile sizes of the Hopper kernels."""
from typing import NamedTuple


class HopperTile(NamedTuple):
    block_m: int  # queries of one of the two consumers
    block_n: int  # keys
    stages: int  # buffers for tiles of K, and as many for V

    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return dict(zip(("BLOCK_M", "BLOCK_N", "STAGES"), self))


FORWARD = {64: HopperTile(64, 128, 4), 128: HopperTile(64, 128, 2), 256: HopperTile(64, 64, 2)}


def forward_tile(head_dim: int) -> HopperTile:
    return FORWARD[head_dim]
