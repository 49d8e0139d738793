"""Chapter 06: first kernels. Three to write, and three to repair.

Each kernel has a wrapper below it: the function that makes the output, chooses the grid and starts the kernel.
The checks call the wrappers. All tensors are on one device: a GPU, or the CPU in Triton's interpreter.

Limits, on purpose: a tensor has fewer than 2^31 elements, so that offsets fit in int32. Chapter 07 lifts that.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def vector_add_kernel(X, Y, OUT, stride_x, stride_y, N, BLOCK: tl.constexpr):
    """OUT[n] = X[n] + Y[n] for n = 0 to N - 1.

    Element n of X lies at X + n * stride_x, element n of Y at Y + n * stride_y. OUT is contiguous: its stride is 1.
    Program i owns the elements i * BLOCK to (i + 1) * BLOCK - 1. Those from N on do not exist.
    """
    # your code here: 6.1 vector_add, my offsets, two loads and a store (about 5 lines)
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = offsets < N
    x = tl.load(X + offsets * stride_x, mask=inside, other=0.0)
    y = tl.load(Y + offsets * stride_y, mask=inside, other=0.0)
    tl.store(OUT + offsets, x + y, mask=inside)
    # end of your code


def vector_add(x, y, block=1024):
    """x + y, for x and y of shape (N,), one dtype, any strides. block: elements of a program, a power of two."""
    (N,) = x.shape
    out = torch.empty(N, dtype=x.dtype, device=x.device)
    # your code here: 6.1 vector_add, the grid, and the launch (about 2 lines)
    grid = (triton.cdiv(N, block),)
    vector_add_kernel[grid](x, y, out, x.stride(0), y.stride(0), N, BLOCK=block)
    # end of your code
    return out


@triton.jit
def row_softmax_kernel(X, OUT, stride_m, stride_n, N, BLOCK: tl.constexpr):
    """OUT[m, n] = exp(X[m, n] - max of row m) / sum over the row of the same. Program m computes row m.

    X is (M, N) with any strides, OUT is (M, N) and contiguous. BLOCK is a power of two, N or more, so one block
    holds the whole row. Arithmetic is float32, whatever the dtype of X.
    """
    # your code here: 6.2 row_softmax, one row from load to store (about 7 lines)
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)  # (BLOCK,)
    inside = cols < N
    x = tl.load(X + row * stride_m + cols * stride_n, mask=inside, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))  # (BLOCK,), 0 past the end
    total = tl.sum(e, axis=0)
    tl.store(OUT + row * N + cols, e / total, mask=inside)
    # end of your code


def row_softmax(x):
    """softmax along the rows of x, (M, N), any strides, float32 or float16; the same dtype and shape."""
    M, N = x.shape
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    row_softmax_kernel[(M,)](x, out, x.stride(0), x.stride(1), N, BLOCK=triton.next_power_of_2(N))
    return out


@triton.jit
def matmul_kernel(
    A, B, C,
    stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of C = A B, with A (M, K), B (K, N) and C (M, N).

    Program (i, j) owns the rows i * BLOCK_M to (i + 1) * BLOCK_M - 1 of C, and the columns j * BLOCK_N to
    (j + 1) * BLOCK_N - 1. It walks along K, BLOCK_K at a time, and adds up products of tiles in float32:

        C[rows, cols] = sum over tiles of K:  A[rows, ks] B[ks, cols]

    No side has to be a multiple of its block. All three blocks are powers of two, 16 or more.
    """
    i = tl.program_id(0)
    j = tl.program_id(1)
    # your code here: 6.3 matmul, my rows, my columns, and an empty accumulator (about 3 lines)
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    cols = j * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # end of your code

    for start in range(0, K, BLOCK_K):
        # your code here: 6.3 matmul, load a tile of A and one of B, add their product (about 6 lines)
        ks = start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        a_inside = (rows[:, None] < M) & (ks[None, :] < K)
        b_inside = (ks[:, None] < K) & (cols[None, :] < N)
        a = tl.load(A + rows[:, None] * stride_am + ks[None, :] * stride_ak, mask=a_inside, other=0.0)
        b = tl.load(B + ks[:, None] * stride_bk + cols[None, :] * stride_bn, mask=b_inside, other=0.0)
        acc += tl.dot(a, b, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        # end of your code

    # your code here: 6.3 matmul, store my tile of C (about 2 lines)
    c_inside = (rows[:, None] < M) & (cols[None, :] < N)
    tl.store(C + rows[:, None] * stride_cm + cols[None, :] * stride_cn, acc, mask=c_inside)
    # end of your code


def matmul(a, b, block_m=64, block_n=64, block_k=32):
    """a @ b for a (M, K) and b (K, N), both float32 or both float16, any strides; the result has their dtype."""
    (M, K), N = a.shape, b.shape[1]
    c = torch.empty((M, N), dtype=a.dtype, device=a.device)
    grid = (triton.cdiv(M, block_m), triton.cdiv(N, block_n))
    matmul_kernel[grid](
        a, b, c, *a.stride(), *b.stride(), *c.stride(), M, N, K,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return c


@triton.jit
def neighbour_sums_kernel(X, OUT, stride_m, stride_n, N, BLOCK: tl.constexpr):
    """OUT[m, n] = X[m, n - 1] + X[m, n] + X[m, n + 1]; a neighbour outside of row m counts as 0.

    X is (M, N) with any strides, OUT is (M, N) and contiguous. Program (m, i) owns the elements i * BLOCK to
    (i + 1) * BLOCK - 1 of row m.

    6.4  As it stands, three loads share one mask, which is right for the middle one alone. Nothing that stands
    here has to go: a name may be given a new value between the marks.
    """
    m = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    inside = cols < N
    has_left = inside
    has_right = inside
    # your code here: 6.4 repair_out_of_bounds, who has a neighbour (about 2 lines)
    has_left = inside & (cols > 0)
    has_right = cols < N - 1
    # end of your code
    x = X + m * stride_m + cols * stride_n  # (BLOCK,) addresses
    left = tl.load(x - stride_n, mask=has_left, other=0.0)
    middle = tl.load(x, mask=inside, other=0.0)
    right = tl.load(x + stride_n, mask=has_right, other=0.0)
    tl.store(OUT + m * N + cols, left + middle + right, mask=inside)


def neighbour_sums(x, block=256):
    """Each element of x, (M, N), plus its neighbours to the left and right in its row. float32, any strides."""
    M, N = x.shape
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    neighbour_sums_kernel[(M, triton.cdiv(N, block))](x, out, x.stride(0), x.stride(1), N, BLOCK=block)
    return out


@triton.jit
def normalise_rows_kernel(X, OUT, stride_m, stride_n, N, eps, BLOCK: tl.constexpr):
    """OUT[m, n] = (X[m, n] - mean) / sqrt(variance + eps), with the mean and variance of row m.

        mean = sum of X[m, n] / N          variance = sum of (X[m, n] - mean)^2 / N

    X is (M, N) with any strides, OUT is (M, N) and contiguous. Program m computes row m, in one block of BLOCK
    elements, N or more.

    6.5  As it stands, both sums count what lies past the end of the row. Nothing that stands here has to go.
    """
    m = tl.program_id(0)
    cols = tl.arange(0, BLOCK)  # (BLOCK,)
    inside = cols < N
    x = tl.load(X + m * stride_m + cols * stride_n, mask=inside)
    # your code here: 6.5 repair_missing_mask, what the first sum may count (about 1 line)
    x = tl.where(inside, x, 0.0)
    # end of your code
    mean = tl.sum(x, axis=0) / N
    centred = x - mean
    # your code here: 6.5 repair_missing_mask, what the second sum may count (about 1 line)
    centred = tl.where(inside, centred, 0.0)
    # end of your code
    variance = tl.sum(centred * centred, axis=0) / N
    tl.store(OUT + m * N + cols, centred / tl.sqrt(variance + eps), mask=inside)


def normalise_rows(x, eps=1e-5):
    """Each row of x, (M, N), float32, any strides, with mean 0 and variance 1: layer norm without its weights."""
    M, N = x.shape
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    normalise_rows_kernel[(M,)](x, out, x.stride(0), x.stride(1), N, eps, BLOCK=triton.next_power_of_2(N))
    return out


@triton.jit
def column_sums_kernel(X, OUT, stride_m, stride_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Program i adds rows i * BLOCK_M to (i + 1) * BLOCK_M - 1 of X, (M, N), to the N numbers at OUT.

    BLOCK_N is a power of two, N or more. OUT is float32 and contiguous.

    6.6  As it stands, every program loads from the same N numbers, adds, and stores. On a GPU two may load before
    either stores, and one sum is lost. Give each program N numbers of its own.
    """
    i = tl.program_id(0)
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)  # my rows of X
    cols = tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    x = tl.load(X + rows[:, None] * stride_m + cols[None, :] * stride_n, mask=inside, other=0.0)
    # your code here: 6.6 repair_race, move OUT to my own numbers (about 1 line)
    OUT += i * N
    # end of your code
    old = tl.load(OUT + cols, mask=cols < N, other=0.0)
    tl.store(OUT + cols, old + tl.sum(x, axis=0), mask=cols < N)


def column_sums(x, block_m=64):
    """The sum of each column of x, (M, N), float32, any strides: (N,). The same bits in every run."""
    M, N = x.shape
    programs = triton.cdiv(M, block_m)
    out = torch.zeros(N, dtype=x.dtype, device=x.device)
    # your code here: 6.6 repair_race, room for every program (about 1 line)
    out = torch.zeros((programs, N), dtype=x.dtype, device=x.device)
    # end of your code
    column_sums_kernel[(programs,)](
        x, out, x.stride(0), x.stride(1), M, N, BLOCK_M=block_m, BLOCK_N=triton.next_power_of_2(N)
    )
    # your code here: 6.6 repair_race, one sum of all programs' sums (about 1 line)
    out = out.sum(dim=0)
    # end of your code
    return out
