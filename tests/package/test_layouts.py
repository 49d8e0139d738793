"""Any strides in, any strides of gradients, offsets past 2^31 elements."""
import pytest
import torch
from this_machine import DEVICE

from flash_edu import flash_attention, flash_attention_with_lse, ops
from flash_edu.layout import empty_like_rows
from flash_edu.testing import assert_close, differentiate, eager, make_case, truth

LAYOUTS = {
    "as given": lambda x: x,
    "(batch, seq, heads, dim)": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "head_dim strided": lambda x: x.mT.contiguous().mT,
    "every other element": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "heads and batch swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "odd offset into a bigger tensor": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1))[..., 1:-1, 3:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_gradients(layout, backend):
    case = make_case(2, 4, 2, 50, 70, d=32, device=DEVICE, dtype=torch.float16, causal=True)
    right, plain = truth(case), eager(case)
    change = LAYOUTS[layout]
    inputs = [change(x).requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = flash_attention_with_lse(*inputs, causal=True, backend=backend)
    grads = torch.autograd.grad([out, lse], inputs, [change(case.dout), case.dlse.mT.contiguous().mT])
    for name, got in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads)):
        assert_close(name, got, right[name], plain[name])


def test_stride_0_gradient(backend):
    """out.sum().backward() hands the kernel one number, seen everywhere."""
    case = make_case(1, 2, 1, 45, 61, d=16, device=DEVICE, causal=True)
    case.dout.fill_(1.0)
    case.dlse.zero_()
    right, plain = truth(case), eager(case)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    flash_attention(q, k, v, causal=True, backend=backend).sum().backward()
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        assert_close(name, x.grad, right[name], plain[name])


def test_expanded_inputs(backend):
    """One key/value head seen by a whole batch, through strides of 0."""
    case = make_case(1, 2, 2, 33, 40, d=16, device=DEVICE)
    alone = flash_attention(case.q, case.k, case.v, backend=backend)
    q, k, v = (x.expand(3, -1, -1, -1) for x in (case.q, case.k, case.v))
    out = flash_attention(q, k, v, backend=backend)
    assert torch.equal(out, alone.expand_as(out))


def test_output_is_laid_out_as_the_query(backend):
    """So that a model's (batch, seq, heads * dim) view of it costs nothing."""
    q = torch.randn(2, 30, 4, 16, device=DEVICE).transpose(1, 2)
    out = flash_attention(q, q, q, backend=backend)
    assert out.stride() == q.stride()
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("which", ["batch", "head", "row"])
def test_offsets_past_2_to_the_31(which, backend):
    """A view whose last elements lie more than 2^31 elements from its first. Untouched pages of the buffer cost nothing."""
    case = make_case(2, 2, 2, 40, 40, d=16, device=DEVICE, dtype=torch.float16)
    right, plain = truth(case), eager(case)
    far = 2**31 + 64
    strides = {"batch": (far, 640, 16, 1), "head": (640, far, 16, 1), "row": (16, 32, far // 32, 1)}[which]
    size = sum((n - 1) * stride for n, stride in zip(case.q.shape, strides)) + 1
    assert size > 2**31
    inputs = [
        torch.empty(size, dtype=x.dtype, device=DEVICE).as_strided(x.shape, strides).copy_(x).requires_grad_()
        for x in (case.q, case.k, case.v)
    ]
    out, lse = flash_attention_with_lse(*inputs, backend=backend)
    grads = torch.autograd.grad([out, lse], inputs, [case.dout, case.dlse])
    for name, got in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads)):
        assert_close(name, got, right[name], plain[name])


@pytest.mark.parametrize("layout", ["(batch, seq, heads, dim)", "head_dim strided", "every other element"])
def test_layouts_of_results(layout, backend):
    """In rows, whatever the inputs; and the same under torch.compile, which asks the fake implementation."""
    case = make_case(2, 4, 4, 33, 40, d=16, device=DEVICE)
    q, k, v = (LAYOUTS[layout](x) for x in (case.q, case.k, case.v))
    want = [empty_like_rows(x) for x in (q, q, k, v)]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attention(*inputs, backend=backend)
    grads = torch.autograd.grad(out, inputs, LAYOUTS[layout](case.dout))
    assert [x.stride() for x in (out, *grads)] == [x.stride() for x in want]
    assert all(x.stride(-1) == 1 for x in want)
    torch.library.opcheck(ops.attention_forward, (q, k, v, False, 0.25, backend), test_utils=["test_faketensor"])
    saved = (case.dout.mT.contiguous().mT, None, q.detach(), k.detach(), v.detach(), out.detach(), case.dlse, False, 0.25, backend)
    torch.library.opcheck(ops.attention_backward, saved, test_utils=["test_faketensor"])


def test_inputs_are_left_alone(backend):
    case = make_case(1, 2, 2, 33, 40, d=16, device=DEVICE)
    before = [x.clone() for x in (case.q, case.k, case.v, case.dout, case.dlse)]
    differentiate(flash_attention_with_lse, case, backend=backend)
    for x, y in zip((case.q, case.k, case.v, case.dout, case.dlse), before):
        assert torch.equal(x, y)
