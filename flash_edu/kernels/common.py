"""What the forward and backward kernels share: reading and writing tiles, and products of rows.

Names: M counts queries, N counts keys. `o_` is a vector of offsets, `b_` a block of values. Row `i` of a tile that starts
at `start` is row `start + i` of the tensor. Strides are passed in, so batch, heads and sequence may lie in any order; the
numbers of one row, its columns, must be neighbours.
"""
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E): the GPU's exponential unit computes exp2
LN2 = tl.constexpr(0.6931471805599453)

# Arguments of which Triton must not compile a variant per value class (1, multiple of 16): lengths change from call to call.
SIZES = ["num_heads", "group", "longest", "Nq", "Nk"]


@triton.jit
def tile_pointers(ptr, start, stride_row, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers to rows start .. start + ROWS of a matrix. int64: a tensor may span more than 2^31 elements."""
    o_row = tl.arange(0, ROWS).to(tl.int64)
    o_col = tl.arange(0, COLS)
    origin = ptr + tl.cast(start, tl.int64) * stride_row
    return origin + o_row[:, None] * stride_row + o_col[None, :]


@triton.jit
def tile_mask(start, num_rows, NUM_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """True inside the matrix. (ROWS, COLS), or (ROWS, 1) where every column exists."""
    mask = (start + tl.arange(0, ROWS) < num_rows)[:, None]
    if NUM_COLS != COLS:
        mask = mask & (tl.arange(0, COLS) < NUM_COLS)[None, :]
    return mask


@triton.jit
def load_tile(
    ptr, start, stride_row, num_rows,
    NUM_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, CHECK_ROWS: tl.constexpr, first_row=None,
):  # fmt: skip
    """Rows start .. start + ROWS as a (ROWS, COLS) block, 0 outside the matrix, which begins at first_row if that is given.

    CHECK_ROWS = False promises that all rows exist. Columns need checking when the head dim is not a power of two.
    """
    p_tile = tile_pointers(ptr, start, stride_row, ROWS, COLS)
    if CHECK_ROWS:
        mask = tile_mask(start, num_rows, NUM_COLS, ROWS, COLS)
        if first_row is not None:
            mask = mask & (start + tl.arange(0, ROWS) >= first_row)[:, None]
        b_tile = tl.load(p_tile, mask=mask, other=0.0)
    elif NUM_COLS != COLS:
        b_tile = tl.load(p_tile, mask=(tl.arange(0, COLS) < NUM_COLS)[None, :], other=0.0)
    else:
        b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def store_tile(
    ptr, b_tile, start, stride_row, num_rows,
    NUM_COLS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Write a (ROWS, COLS) block to rows start .. start + ROWS, in the tensor's dtype, leaving out what lies outside."""
    p_tile = tile_pointers(ptr, start, stride_row, ROWS, COLS)
    mask = tile_mask(start, num_rows, NUM_COLS, ROWS, COLS)
    tl.store(p_tile, b_tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot_rows(b_a, b_b, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """A B^T for two blocks of rows, (M, D) and (N, D): all their dot products, (M, N).

    SPLIT > 1 sums SPLIT products of D / SPLIT columns each. In one product every warp holds whole rows of A, and fp32 rows
    of 256 columns fill its registers; in several, each warp takes other columns. Below 16 columns tl.dot has no product.
    """
    if SPLIT == 1 or b_a.shape[1] < 16 * SPLIT:
        b_dots = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)
    else:
        b_a = tl.reshape(b_a, [b_a.shape[0], SPLIT, b_a.shape[1] // SPLIT])
        b_b = tl.reshape(b_b, [b_b.shape[0], SPLIT, b_b.shape[1] // SPLIT])
        b_parts = tl.dot(tl.permute(b_a, [1, 0, 2]), tl.permute(b_b, [1, 2, 0]), input_precision=PRECISION)
        b_dots = tl.sum(b_parts, 0)
    return b_dots



@triton.jit
def tanh(x):
    """To the last places, as softcap multiplies the error: near 0, where 1 - t cancels, by its series."""
    t = tl.exp2(tl.abs(x) * -2 * LOG2E)
    far = (1 - t) / (1 + t)
    y = x * x
    near = 1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
    limit = 0.01 if x.dtype == tl.float64 else 0.25  # the series' next term is below the rounding
    return tl.where(tl.abs(x) < limit, x * near, tl.where(x < 0, -far, far))


@triton.jit
def tanh_slope(x):
    """1 - tanh(x)^2, also where tanh is so near 1 that the difference would be all rounding."""
    t = tl.exp2(tl.abs(x) * -2 * LOG2E)
    return 4 * t / ((1 + t) * (1 + t))
