"""Memory beyond inputs, outputs and gradients grows linearly with N, and nothing N x N is ever kept."""
import pytest
import torch
from this_machine import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from flash_edu import flash_attention
from flash_edu.reference import naive_attention


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest tensor any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def largest_allocation(attention, n):
    q = torch.randn(1, 1, n, 16, requires_grad=True)
    with LargestAllocation() as seen:
        attention(q, q, q, causal=True).sum().backward()
    return seen.elements


def test_the_torch_backend_never_holds_n_by_n():
    n = 2048
    assert largest_allocation(naive_attention, n) == n * n
    assert largest_allocation(lambda *x, **kw: flash_attention(*x, backend="torch", **kw), n) <= n * 128


def test_saved_tensors(backend):
    """What autograd keeps is q, k, v, out and lse."""
    n, d = 192, 16
    q, k, v = (torch.randn(1, 2, n, d, device=DEVICE, requires_grad=True) for _ in range(3))
    out = flash_attention(q, k, v, backend=backend)
    saved = [x for x in out.grad_fn.saved_tensors if x is not None] if hasattr(out.grad_fn, "saved_tensors") else []
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        flash_attention(q, k, v, backend=backend)
    assert kept, "nothing was saved: this test sees nothing"
    assert sum(kept) == 2 * (3 * n * d + n * d + n)
    assert all(x.numel() < n * n for x in saved)


@pytest.mark.gpu
def test_peak_memory_is_linear_in_n():
    def extra(n):
        """Peak bytes beyond inputs, outputs and gradients, forward and backward."""
        q, k, v, dout = (torch.randn(1, 4, n, 64, device=DEVICE, dtype=torch.float16) for _ in range(4))
        for x in (q, k, v):
            x.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = flash_attention(q, k, v, causal=True, backend="triton")
        out.backward(dout)
        results = sum(x.numel() * x.element_size() for x in (out, q.grad, k.grad, v.grad))
        return torch.cuda.max_memory_allocated() - before - results

    small, large = extra(4096), extra(32768)
    assert large <= 8.5 * small
    assert large <= 4 * 32768 * (4 + 4 + 8), "more than lse, D and rounding for each row"
