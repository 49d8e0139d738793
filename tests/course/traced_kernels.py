"""Small kernels for test_figures.py to trace: each function launches one."""

import torch
import triton
import triton.language as tl


@triton.jit
def scores_kernel(q_ptr, k_ptr, s_ptr, Nq, Nk, D: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """One program per tile of queries; every tile of keys in turn."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, D)
    q = tl.load(q_ptr + rows[:, None] * D + dims[None, :], mask=(rows < Nq)[:, None], other=0.0)
    for start in range(0, Nk, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        if MASKED:
            k = tl.load(k_ptr + cols[:, None] * D + dims[None, :], mask=(cols < Nk)[:, None], other=0.0)
        else:
            k = tl.load(k_ptr + cols[:, None] * D + dims[None, :])
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        inside = (rows < Nq)[:, None] & (cols < Nk)[None, :]
        tl.store(s_ptr + rows[:, None] * Nk + cols[None, :], s, mask=inside)


def scores(q, k, block=16, masked=True):
    """Q K^T of (Nq, D) and (Nk, D)."""
    s = q.new_empty(q.shape[0], k.shape[0])
    grid = (triton.cdiv(q.shape[0], block),)
    scores_kernel[grid](q, k, s, *s.shape, D=q.shape[1], BLOCK=block, MASKED=masked)
    return s


def scores_of_a_short_view(buffer, rows):
    """As `scores`, without the mask: the last tile of keys runs past the `rows` of k, into its own storage."""
    return scores(buffer[:16], buffer[:rows], masked=False)


@triton.jit
def strided_kernel(x_ptr, out_ptr, stride_h, stride_n, N, D: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, D)
    p_x = x_ptr + tl.program_id(1) * stride_h + rows[:, None] * stride_n + dims[None, :]
    x = tl.load(p_x, mask=(rows < N)[:, None])
    tl.atomic_add(out_ptr + tl.program_id(1), tl.sum(x))


def sum_of_keys(q, k, v):
    """Sums each head of k (B, H, N, D), whatever its strides; q and v are not touched."""
    out = k.new_zeros(k.shape[1])
    grid = (triton.cdiv(k.shape[2], 16), k.shape[1])
    strided_kernel[grid](k, out, k.stride(1), k.stride(2), k.shape[2], D=k.shape[3], BLOCK=16)
    return out


@triton.jit
def copy_kernel(src_ptr, dst_ptr, N, D: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    src = tl.make_tensor_descriptor(src_ptr, [N, D], [D, 1], [BLOCK, D])
    dst = tl.make_tensor_descriptor(dst_ptr, [N, D], [D, 1], [BLOCK, D])
    dst.store([start, 0], src.load([start, 0]))


def copy_by_descriptors(src):
    dst = torch.empty_like(src)
    copy_kernel[(triton.cdiv(src.shape[0], 16),)](src, dst, src.shape[0], D=src.shape[1], BLOCK=16)
    return dst


@triton.jit
def tile_of_product_kernel(A, B, C, M, N, K, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        ks = start + tl.arange(0, BLOCK)
        a = tl.load(A + rows[:, None] * K + ks[None, :], mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0)
        b = tl.load(B + ks[:, None] * N + cols[None, :], mask=(ks < K)[:, None] & (cols < N)[None, :], other=0.0)
        acc += tl.dot(a, b, input_precision="ieee")
    tl.store(C + rows[:, None] * N + cols[None, :], acc, mask=(rows < M)[:, None] & (cols < N)[None, :])


def product(a, b):
    """A B of (M, K) and (K, N), one program for each 16 x 16 tile."""
    (M, K), N = a.shape, b.shape[1]
    c = a.new_empty(M, N)
    tile_of_product_kernel[(triton.cdiv(M, 16), triton.cdiv(N, 16))](a, b, c, M, N, K, BLOCK=16)
    return c


@triton.jit
def shared_sum_kernel(X, OUT, N: tl.constexpr, STEP: tl.constexpr):
    here = tl.arange(0, N)
    out = OUT + tl.program_id(0) * STEP + here
    tl.store(out, tl.load(out) + tl.load(X + tl.program_id(0) * N + here))


def shared_sum(x, step):
    """Program i adds row i of x, (M, N), to the N numbers of out from i * step on."""
    out = x.new_zeros(len(x) * x.shape[1])
    shared_sum_kernel[(len(x),)](x, out, N=x.shape[1], STEP=step)
    return out
