"""Patterns for the tests: what people ask for, and functions with mistakes in them."""
import triton
import triton.language as tl

CAP = tl.constexpr(3.0)


@triton.jit
def prefix_lm(batch, head, i, j, buffers):
    """Causal, but a prefix, of its own length in each sequence, is seen by all."""
    return (j <= i) | (j < tl.load(buffers[0] + batch))


@triton.jit
def same_document(batch, head, i, j, buffers):
    """buffers[0]: the document of each query, (B, Nq); buffers[1]: of each key; buffers[2]: (Nq, Nk)."""
    rows, cols = tl.load(buffers[2]), tl.load(buffers[2] + 1)
    return tl.load(buffers[0] + batch * rows + i) == tl.load(buffers[1] + batch * cols + j)


@triton.jit
def dilated(batch, head, i, j, buffers):
    """Every third key of the 40 before; i - j is negative too."""
    return ((i - j) % 3 == 0) & (i - j < 40) & (i - j >= -3)


@triton.jit
def far_in_odd_heads(batch, head, i, j, buffers):
    return tl.where(head % 2 == 0, tl.abs(i - j) < 9, tl.abs(i - j) >= 9)


@triton.jit
def halves(batch, head, i, j, buffers):
    """Division towards zero: -1 // 2 is 0 here."""
    return (i - j) // 2 == 0


@triton.jit
def a_number(batch, head, i, j, buffers):
    """Not 0: attend."""
    return (i + j) % 4


@triton.jit
def table(batch, head, i, j, buffers):
    """buffers[0]: (B, H, Nq, Nk); buffers[1]: its strides."""
    place = batch * tl.load(buffers[1]) + head * tl.load(buffers[1] + 1) + i * tl.load(buffers[1] + 2) + j
    return tl.load(buffers[0] + place)


@triton.jit
def shared_table(batch, head, i, j, buffers):
    """buffers[0]: (Nq, Nk); buffers[1]: its row stride."""
    return tl.load(buffers[0] + i * tl.load(buffers[1]) + j)


@triton.jit
def relative_bias(score, batch, head, i, j, buffers):
    """buffers[0]: one number for each distance up to 15, of each head."""
    return score + tl.load(buffers[0] + head * 16 + tl.minimum(tl.abs(i - j), 15))


@triton.jit
def relative_bias_grad(score, batch, head, i, j, buffers):
    return 1.0


@triton.jit
def bend(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def capped(score, batch, head, i, j, buffers):
    """softcap=3, with a helper and a constant."""
    return CAP * bend(score / CAP)


@triton.jit
def capped_grad(score, batch, head, i, j, buffers):
    return 1.0 - bend(score / CAP) * bend(score / CAP)


# --- with mistakes


@triton.jit
def names_nothing(batch, head, i, j, buffers):
    keep = j <= i
    return keep & undefined_mask  # noqa: F821


@triton.jit
def is_not_in_triton(batch, head, i, j, buffers):
    return tl.nonsense(i - j) > 0


@triton.jit
def only_triton_knows(batch, head, i, j, buffers):
    return tl.cdiv(i, 2) > j


@triton.jit
def branches(batch, head, i, j, buffers):
    if i > j:
        return i > 0
    return j > 0


@triton.jit
def helper_with_a_mistake(x):
    return x + undefined_helper  # noqa: F821


@triton.jit
def mistaken_score(score, batch, head, i, j, buffers):
    return helper_with_a_mistake(score)
