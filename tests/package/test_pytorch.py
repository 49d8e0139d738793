"""Working inside PyTorch: operators, torch.compile, autocast, checkpointing, modules."""
import inspect

import pytest
import torch
from this_machine import DEVICE, ON_GPU
from torch.utils.checkpoint import checkpoint

import flash_edu
from flash_edu import FlashAttention, MultiHeadFlashAttention, flash_attention, flash_attention_with_lse, ops
from flash_edu.reference import naive_attention
from flash_edu.testing import differentiate, make_case


def operands(backend, *, nq=20, nk=30, requires_grad=True):
    dtype = torch.float16 if backend == "triton" else torch.float32
    shapes = ((1, 4, nq, 16), (1, 2, nk, 16), (1, 2, nk, 16))
    return [torch.randn(s, device=DEVICE, dtype=dtype, requires_grad=requires_grad) for s in shapes]


@pytest.mark.parametrize("causal", [False, True])
def test_opcheck_forward(causal, backend):
    torch.library.opcheck(ops.attention_forward, (*operands(backend), causal, 0.25, backend))


@pytest.mark.parametrize("with_dlse", [False, True])
def test_opcheck_backward(with_dlse, backend):
    q, k, v = operands(backend, requires_grad=False)
    out, lse = ops.attention_forward(q, k, v, True, 0.25, backend)
    dlse = torch.randn_like(lse) if with_dlse else None
    torch.library.opcheck(ops.attention_backward, (torch.randn_like(out), dlse, q, k, v, out, lse, True, 0.25, backend))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, backend):
    compiler = "inductor" if ON_GPU else "aot_eager"

    def layer(q, k, v):
        out, lse = flash_attention_with_lse(q * 1.0, k, v, causal=True, backend=backend)
        return out.sin(), lse

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=compiler)
    for nq, nk in ((20, 30), (33, 47)):
        inputs = operands(backend, nq=nq, nk=nk)
        plain, fast = layer(*inputs), compiled(*inputs)
        grads = [torch.autograd.grad(out.sum() + lse.sum(), inputs) for out, lse in (plain, fast)]
        for x, y in zip((*plain, *grads[0]), (*fast, *grads[1])):
            torch.testing.assert_close(x, y)


def test_compile_a_module_with_inductor():
    torch.manual_seed(0)
    module = MultiHeadFlashAttention(32, 4, causal=True, num_kv_heads=2).to(DEVICE)
    x = torch.randn(2, 17, 32, device=DEVICE)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x), rtol=1e-4, atol=1e-5)


def test_autocast_casts_as_sdpa_does(backend):
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    q, k, v = (torch.randn(1, 2, 20, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    with torch.autocast(DEVICE, dtype=dtype):
        out = flash_attention(q, k, v, backend=backend)
        sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert out.dtype == dtype == sdpa.dtype
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32


def test_autocast_does_not_reach_inside(backend):
    """The same bits as casting by hand: the accumulators stay fp32."""
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    case = make_case(1, 2, 2, 40, 300, d=16, dtype=dtype, device=DEVICE)
    by_hand = differentiate(flash_attention_with_lse, case, backend=backend)

    def under_autocast(q, k, v, **kwargs):
        with torch.autocast(DEVICE, dtype=dtype):
            return flash_attention_with_lse(q, k, v, backend=backend, **kwargs)

    with torch.autocast(DEVICE, dtype=dtype):
        got = differentiate(under_autocast, case)
    assert all(torch.equal(by_hand[name], got[name]) for name in by_hand)


def test_autocast_leaves_fp64_alone():
    q = torch.randn(1, 1, 8, 16, dtype=torch.float64, device=DEVICE)
    with torch.autocast(DEVICE):
        assert flash_attention(q, q, q, backend="torch").dtype == torch.float64


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, backend):
    grads = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        q, k, v = operands(backend)
        attend = lambda *x: flash_attention(*x, causal=True, backend=backend)  # noqa: E731
        out = checkpoint(attend, q, k, v, use_reentrant=reentrant) if wrapped else attend(q, k, v)
        out.sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    assert all(torch.equal(x, y) for x, y in zip(*grads))


def test_double_backward_says_so(backend):
    q, k, v = operands(backend)
    (dq,) = torch.autograd.grad(flash_attention(q, k, v, backend=backend).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward"):
        dq.sum().backward()


def test_no_grad_and_inference_mode(backend):
    q, k, v = operands(backend)
    with torch.no_grad():
        assert not flash_attention(q, k, v, backend=backend).requires_grad
    with torch.inference_mode():
        flash_attention(q, k, v, backend=backend)


class TestFlashAttention:
    def test_is_the_function(self):
        q, k, v = operands("torch")
        for options in ({}, {"causal": True}, {"scale": 0.5}):
            assert torch.equal(FlashAttention(**options)(q, k, v), flash_attention(q, k, v, **options))

    def test_the_quick_start_of_the_guide(self):
        q, k, v = (torch.randn(2, 8, 1024, 64, device=DEVICE) for _ in range(3))
        out = FlashAttention(causal=False)(q, k, v)
        sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(out, sdpa, rtol=1e-4, atol=1e-5)

    def test_no_state(self):
        assert not FlashAttention().state_dict()


class TestMultiHeadFlashAttention:
    @pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
    @pytest.mark.parametrize("causal", [False, True])
    def test_is_the_formula(self, causal, num_kv_heads):
        torch.manual_seed(0)
        ours = MultiHeadFlashAttention(32, 4, causal=causal, num_kv_heads=num_kv_heads).to(DEVICE)
        plain = MultiHeadFlashAttention(
            32, 4, causal=causal, num_kv_heads=num_kv_heads, attention=naive_attention
        ).to(DEVICE)  # fmt: skip
        plain.load_state_dict(ours.state_dict())
        x = torch.randn(2, 19, 32, device=DEVICE)
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
        for module in (ours, plain):
            module(x).square().sum().backward()
        for a, b in zip(ours.parameters(), plain.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)

    def test_is_nn_multihead_attention(self):
        torch.manual_seed(0)
        ours, theirs = MultiHeadFlashAttention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True)
        weights, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
        with torch.no_grad():
            for layer, w, b in zip((ours.q_proj, ours.k_proj, ours.v_proj), weights, biases):
                layer.weight.copy_(w)
                layer.bias.copy_(b)
        ours.out_proj = theirs.out_proj
        x, context = torch.randn(2, 9, 32), torch.randn(2, 13, 32)
        torch.testing.assert_close(ours(x), theirs(x, x, x)[0])
        torch.testing.assert_close(ours(x, context), theirs(x, context, context)[0])

    def test_dropout_is_of_the_projection_and_in_training_only(self):
        module = MultiHeadFlashAttention(32, 4, dropout=0.5).to(DEVICE)
        x = torch.randn(2, 50, 32, device=DEVICE)
        zeros = (module(x) == 0).float().mean().item()
        assert 0.4 < zeros < 0.6
        module.eval()
        assert (module(x) != 0).all() and torch.equal(module(x), module(x))

    def test_without_bias(self):
        assert not [name for name in MultiHeadFlashAttention(32, 4, bias=False).state_dict() if "bias" in name]

    def test_state_dict_is_stable(self):
        keys = {f"{p}_proj.{w}" for p in ("q", "k", "v", "out") for w in ("weight", "bias")}
        assert set(MultiHeadFlashAttention(32, 4).state_dict()) == keys


def test_signatures():
    """The interface users were promised: names, order, defaults, and keyword-only after q, k, v."""
    expected = (
        "(q, k, v, *, causal=False, scale=None, window=None, attn_mask=None, key_padding_mask=None, "
        "alibi_slopes=None, softcap=None, dropout_p=0.0, backend='auto')"
    )
    for function in (flash_attention, flash_attention_with_lse):
        assert bare(function) == expected
    assert bare(FlashAttention) == "(causal=False, dropout=0.0, scale=None, window=None, softcap=None)"
    assert bare(FlashAttention.forward) == "(self, q, k, v, attn_mask=None, key_padding_mask=None)"
    assert bare(MultiHeadFlashAttention).startswith(
        "(d_model, num_heads, causal=False, dropout=0.0, num_kv_heads=None, bias=True"
    )
    assert bare(MultiHeadFlashAttention.forward) == "(self, x, context=None, key_padding_mask=None)"


def bare(function) -> str:
    signature = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))


def test_public_names_have_docstrings():
    for name in flash_edu.__all__:
        assert getattr(flash_edu, name).__doc__, name
