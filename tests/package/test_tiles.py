"""A tile that does not fit in shared memory gives way to the first smaller one that does."""
import pytest
import triton

from flash_edu.kernels.launch import with_room
from flash_edu.kernels.tiles import TILES, Tile


def shared(tile):
    """Much as it is: K and V of head dim 64 for each stage, and a mask of 4 bytes."""
    return (tile.block_n * 64 * 2 * 2 + tile.block_m * tile.block_n * 4) * tile.num_stages


def launcher(limit, tried):
    def launch(tile):
        tried.append(tile)
        if shared(tile) > limit:
            raise triton.OutOfResources(shared(tile), limit, "shared memory")

    return launch


def test_a_tile_that_fits_is_taken_at_once():
    tried = []
    with_room(launcher(10**6, tried), Tile(128, 64, 8, 4))
    assert tried == [Tile(128, 64, 8, 4)]


@pytest.mark.parametrize("tile", sorted({tile for row in TILES.values() for tile in row}))
def test_stages_go_first_and_then_the_wider_side(tile):
    tried = []
    with_room(launcher(12_000, tried), tile)
    assert tried[0] == tile and shared(tried[-1]) <= 12_000
    assert [shared(x) > 12_000 for x in tried] == [True] * (len(tried) - 1) + [False]
    assert all(x.num_stages == 1 or x.block_m == tile.block_m and x.block_n == tile.block_n for x in tried)


def test_what_fits_nowhere_says_so():
    tried = []
    with pytest.raises(triton.OutOfResources):
        with_room(launcher(0, tried), Tile(64, 32, 4, 2))
    assert tried[-1] == Tile(16, 16, 4, 1)
