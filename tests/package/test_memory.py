"""Memory beyond inputs, outputs and gradients grows linearly with N, and nothing N x N is ever kept, whatever is asked."""
import pytest
import torch
from options import PATTERN
from this_machine import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from flash_edu import flash_attention, flash_attention_varlen, ops
from flash_edu.reference import naive_attention


def randn(*shape, **kwargs):
    return torch.randn(shape, device=DEVICE, **kwargs)


# What a call of N queries and keys may be asked, for 2 heads. Masks of N x N are the caller's own.
ASKED = {
    "nothing": lambda n: {},
    "causal": lambda n: {"causal": True},
    "window": lambda n: {"window": (100, 0)},
    "padding": lambda n: {"key_padding_mask": (torch.arange(n, device=DEVICE) < n - 30)[None]},
    "alibi": lambda n: {"alibi_slopes": randn(2)},
    "softcap": lambda n: {"softcap": 5.0},
    "sinks": lambda n: {"sinks": randn(2, requires_grad=True)},
    "dropout": lambda n: {"dropout_p": 0.2},
    "pattern": lambda n: {"pattern": PATTERN},
    "float mask of a row": lambda n: {"attn_mask": randn(n, requires_grad=True)},
    "boolean mask": lambda n: {"attn_mask": randn(n, n) > 0},
    "float mask": lambda n: {"attn_mask": randn(1, 1, n, n)},
    "float mask with a gradient": lambda n: {"attn_mask": randn(1, 1, n, n, requires_grad=True)},
}
EVERYTHING = ("window", "padding", "alibi", "softcap", "sinks", "dropout", "pattern", "float mask")
ASKED["everything"] = lambda n: {name: x for each in EVERYTHING for name, x in ASKED[each](n).items()}


def tensors_of(asked):
    return [x for x in asked.values() if isinstance(x, torch.Tensor)]


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest tensor that any operation made anew; inside our operators too."""

    inside = {operator.overload: operator.compute for operator in (ops.attention_forward, ops.attention_backward)}
    elements = 0

    def __init__(self):
        super().__init__()
        self.sizes = []  # of all of them

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.inside:
            with self:
                return self.inside[func](*args)
        out = func(*args, **(kwargs or {}))
        given = {self.place(x) for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and self.place(x) not in given:
                self.sizes.append(x.numel())
                self.elements = max(self.sizes)
        return out

    @staticmethod
    def place(x):
        return x.untyped_storage().data_ptr()


def largest_allocation(attention, n, **asked):
    q = randn(1, 2, n, 16, requires_grad=True)
    with LargestAllocation() as seen:
        attention(q, q, q, **asked).sum().backward()
    return seen.elements


def test_the_measure_sees_what_operators_do_inside():
    n = 256
    assert largest_allocation(naive_attention, n) == 2 * n * n
    q = randn(1, 1, n, 16)
    seen = LargestAllocation()
    seen.inside = {ops.attention_forward.overload: lambda q, k, v, *asked: (naive_attention(q, k, v), q.new_empty(0))}
    with seen:
        flash_attention(q, q, q, backend="torch")
    assert seen.elements == n * n


@pytest.mark.parametrize("name", ASKED)
def test_the_torch_backend_never_holds_n_by_n(name):
    n, heads, tile = 1024, 2, 128
    asked = ASKED[name](n)
    at_most = max(n * 16 * heads, 4 * heads * tile * tile)  # q, k, v; or the random bits of a tile
    if name == "float mask with a gradient":
        at_most = n * n  # the gradient itself
    assert largest_allocation(flash_attention, n, backend="torch", **asked) <= at_most


def test_the_gradient_of_a_mask_is_made_once(backend):
    n = 256  # of which a tile is a quarter
    q, mask = randn(1, 1, n, 16), randn(n, n, requires_grad=True)
    with LargestAllocation() as seen:
        flash_attention(q, q, q, attn_mask=mask, backend=backend).sum().backward()
    assert sum(size >= n * n for size in seen.sizes) == 1
    assert mask.grad is not None


@pytest.mark.parametrize("name", ASKED)
def test_saved_tensors(name, backend):
    """What autograd keeps is q, k, v, out, lse, what the caller brought, and the two numbers of a dropout."""
    n, d = 192, 16
    q, k, v = (randn(1, 2, n, d, requires_grad=True) for _ in range(3))
    asked, kept = ASKED[name](n), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        flash_attention(q, k, v, backend=backend, **asked)
    brought = [q, k, v, *tensors_of(asked), *(PATTERN.buffers if "pattern" in asked else ())]
    places = {x.untyped_storage().data_ptr() for x in brought}
    new = [x for x in kept if x.untyped_storage().data_ptr() not in places]
    assert len(kept) - len(new) == len(brought), "inputs are kept once, and not copied"
    assert sum(x.numel() for x in new) == 2 * (n * d + n) + 2 * ("dropout_p" in asked)


def test_saved_tensors_of_packed_sequences(backend):
    total, d = 192, 16
    q, k, v = (randn(total, 2, d, requires_grad=True) for _ in range(3))
    cu, kept = torch.tensor([0, 100, total], dtype=torch.int32, device=DEVICE), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        flash_attention_varlen(q, k, v, cu, cu, 100, 100, backend=backend)
    assert sum(kept) == 2 * (3 * total * d + total * d + total) + 2 * 3


# on a GPU, the whole of it


def peak_beyond_results(attend, inputs):
    """Bytes at the peak of forward and backward, beyond inputs, outputs and gradients."""
    dout = torch.randn_like(inputs[0])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(*inputs[:3])
    out.backward(dout)
    results = [out, *(x.grad for x in inputs if x.grad is not None)]
    return torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in results)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ASKED)
def test_peak_memory_is_linear_in_n(name):
    lengths = (1024, 8192) if "mask" in name or name == "everything" else (4096, 32768)

    def extra(n):
        asked = ASKED[name](n)
        inputs = [randn(1, 2, n, 64, dtype=torch.float16, requires_grad=True) for _ in range(3)] + tensors_of(asked)
        return peak_beyond_results(lambda *x: flash_attention(*x, **asked, backend="triton"), inputs)

    learned = any(x.requires_grad for x in tensors_of(ASKED[name](16)))
    small, large = map(extra, lengths)
    tiles = (lengths[1] // 128) ** 2 * 2  # a pattern's plan has a few numbers for each tile, of both heads
    plan = 64 * tiles if name in ("pattern", "everything") else 0
    each_row = 4 + 4 + 32 + learned * 3 * 4 * 64  # lse, D and a few more; D in PyTorch, if a mask or sinks learn
    assert large <= 8.5 * small + plan + 2**16
    assert large <= each_row * 2 * lengths[1] + plan + 2**20


@pytest.mark.gpu
def test_peak_memory_of_packed_sequences():
    def extra(n):
        inputs = [randn(n, 2, 64, dtype=torch.float16, requires_grad=True) for _ in range(3)]
        cu = torch.tensor([0, 100, n // 2, n], dtype=torch.int32, device=DEVICE)
        return peak_beyond_results(
            lambda *x: flash_attention_varlen(*x, cu, cu, n // 2, n // 2, causal=True, backend="triton"), inputs
        )

    small, large = extra(4096), extra(32768)
    assert large <= 8.5 * small + 2**16
    assert large <= (4 + 4 + 32) * 2 * 32768 + 2**20
