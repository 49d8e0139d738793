"""Every option of flash_attention once, at sizes that fit everywhere: for the tests of what PyTorch does with our operators."""
import pytest
import torch
import triton
import triton.language as tl
from this_machine import DEVICE, ON_GPU

from flash_edu import Pattern

BATCH, HEADS, KV_HEADS, DIM = 2, 2, 1, 16


@triton.jit
def near(batch, head, i, j, buffers):
    return tl.abs(i - j) <= tl.load(buffers[0] + head)


@triton.jit
def tilted(score, batch, head, i, j, buffers):
    return score + 0.1 * (j - i)


@triton.jit
def tilted_grad(score, batch, head, i, j, buffers):
    return 1.0 + 0.0 * score


PATTERN = Pattern(near, tilted, tilted_grad, buffers=(torch.arange(3, 3 + HEADS, device=DEVICE),))


def holes(*shape):
    """About two of three True."""
    return torch.rand(shape, device=DEVICE) < 0.67


OPTIONS = {
    "plain": lambda nq, nk: {},
    "causal": lambda nq, nk: {"causal": True},
    "window": lambda nq, nk: {"window": (9, 4)},
    "bool mask": lambda nq, nk: {"attn_mask": holes(BATCH, 1, nq, nk)},
    "float mask": lambda nq, nk: {"attn_mask": torch.randn(1, HEADS, nq, nk, device=DEVICE)},
    "learned mask": lambda nq, nk: {"attn_mask": torch.randn(HEADS, 1, nk, device=DEVICE, requires_grad=True)},
    "padding": lambda nq, nk: {"key_padding_mask": holes(BATCH, nk)},
    "alibi": lambda nq, nk: {"alibi_slopes": torch.rand(BATCH, HEADS, device=DEVICE)},
    "softcap": lambda nq, nk: {"softcap": 2.0},
    "sinks": lambda nq, nk: {"sinks": torch.randn(HEADS, device=DEVICE, requires_grad=True)},
    "pattern": lambda nq, nk: {"pattern": PATTERN},
    "dropout": lambda nq, nk: {"dropout_p": 0.3},
}
ASKED_TOGETHER = ("window", "learned mask", "padding", "alibi", "softcap", "sinks", "pattern", "dropout")
OPTIONS["many at once"] = lambda nq, nk: {name: x for each in ASKED_TOGETHER for name, x in OPTIONS[each](nq, nk).items()}
FEW = ("plain", "causal", "learned mask", "many at once")  # where the interpreter would take too long for each


def ask(name, nq, nk, seed=0) -> dict:
    """The option's arguments; the same each time."""
    torch.manual_seed(seed)
    return OPTIONS[name](nq, nk)


def tensors(backend, nq=20, nk=30, *, requires_grad=True, dtype=None):
    """q, k, v; fp16 for the kernels, whose interpreter cannot do bf16."""
    torch.manual_seed(1)
    dtype = dtype or (torch.float16 if backend == "triton" else torch.float32)
    shapes = ((BATCH, HEADS, nq, DIM), (BATCH, KV_HEADS, nk, DIM), (BATCH, KV_HEADS, nk, DIM))
    return [torch.randn(shape, device=DEVICE, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def learned(asked) -> list:
    """What among an option's arguments has a gradient."""
    return [x for x in asked.values() if isinstance(x, torch.Tensor) and x.requires_grad]


def packed(backend, lengths_q, lengths_k, *, requires_grad=True):
    """Arguments of flash_attention_varlen: q, k, v, and the rest of them."""
    (total_q, starts_q), (total_k, starts_k) = ((sum(x), torch.tensor([0, *x]).cumsum(0)) for x in (lengths_q, lengths_k))
    q, k, v = tensors(backend, total_q, total_k, requires_grad=False)
    inputs = [x[0].transpose(0, 1).contiguous().requires_grad_(requires_grad) for x in (q, k, v)]
    starts = (x.to(DEVICE, torch.int32) for x in (starts_q, starts_k))
    return inputs, (*starts, max(lengths_q), max(lengths_k))


def skip_if_slow(option, backend):
    """What PyTorch makes of an option is the same in both backends; the interpreter looks at a few."""
    if backend == "triton" and not ON_GPU and option in OPTIONS and option not in FEW:
        pytest.skip("every option is tried with backend='torch', and on a GPU")


COMPILER = "inductor" if ON_GPU else "aot_eager"
