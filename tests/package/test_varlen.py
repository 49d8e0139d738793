"""Packed sequences: each as if it were alone, by fp64; and `pack` and `unpack`, which go there and back."""
from dataclasses import replace

import pytest
import torch
from packed_cases import check, cumulative, packed_attention, packed_case
from some_rules import dtypes_of, make_rules
from this_machine import DEVICE, ON_GPU

from flash_edu import (
    flash_attention,
    flash_attention_varlen,
    flash_attention_varlen_with_lse,
    pack,
    unpack,
)
from flash_edu.testing import assert_close, differentiate, eager, make_case, truth

LENGTHS = {
    "several": ((20, 0, 33, 5, 1), (17, 9, 40, 0, 1)),
    "one": ((37,), (50,)),
    "many": ((3, 1, 4, 1, 5, 9, 2, 6, 5, 3), (2, 7, 1, 8, 2, 8, 1, 8, 2, 8)),
    "no queries": ((0, 0), (5, 3)),
    "no keys": ((5, 3), (0, 0)),
    "nothing": ((0, 0, 0), (0, 0, 0)),
}
if ON_GPU:
    LENGTHS |= {"long": ((500, 0, 1, 333, 128), (600, 77, 1, 200, 128))}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths(name, causal, backend):
    for n, (dtype, heads) in enumerate(zip(dtypes_of(backend), [(2, 2), (4, 2), (3, 1)])):
        check(backend, LENGTHS[name], packed_case(LENGTHS[name], *heads, dtype=dtype, causal=causal, seed=n))


RULES = [["window"], ["causal", "window"], ["alibi"], ["causal", "alibi"], ["softcap"], ["sinks"], ["causal", "softcap", "sinks"],
         ["causal", "window", "alibi", "softcap", "sinks"]]  # fmt: skip


@pytest.mark.parametrize("rules", RULES, ids=" and ".join)
def test_rules(rules, backend):
    lengths = LENGTHS["long" if ON_GPU else "several"]
    options = make_rules(rules, len(lengths[0]), 2, *map(max, lengths))
    dtypes = dtypes_of(backend)
    check(backend, lengths, packed_case(lengths, dtype=dtypes[RULES.index(rules) % len(dtypes)], **options))


def test_slopes_for_all_sequences(backend):
    check(backend, LENGTHS["several"], packed_case(LENGTHS["several"], alibi_slopes=torch.tensor([0.3, 0.7], device=DEVICE)))


def test_sinks_where_there_is_no_key(backend):
    case = packed_case(LENGTHS["no keys"], sinks=torch.tensor([0.5, -3.0], device=DEVICE))
    check(backend, LENGTHS["no keys"], case)
    got = differentiate(packed_attention(LENGTHS["no keys"]), case, backend=backend)
    assert torch.equal(got["lse"], case.options["sinks"][None, :, None].expand(1, 2, 8)) and not got["out"].any()


@pytest.mark.parametrize("d, dv", [(8, 40), (64, 16), (1, 3)])
def test_head_dims(d, dv, backend):
    check(backend, LENGTHS["many"], packed_case(LENGTHS["many"], d=d, dv=dv))


def test_max_seqlen_may_be_too_large(backend):
    lengths = LENGTHS["several"]
    case = packed_case(lengths, causal=True)
    exact, large = (differentiate(packed_attention(lengths, longest), case, backend=backend) for longest in (None, 500))
    assert all(torch.equal(exact[name], large[name]) for name in exact)


def test_gradcheck(backend):
    if backend == "triton" and ON_GPU:
        pytest.skip("fp64 kernels run in the interpreter only: make test")
    lengths = ((2, 0, 1), (1, 1, 2))
    attention = packed_attention(lengths)
    torch.manual_seed(0)
    inputs = [torch.randn(1, 1, n, 2, dtype=torch.float64, device=DEVICE, requires_grad=True) for n in (3, 4, 4)]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, softcap=2.0, backend=backend), inputs)


def test_rows_of_a_larger_tensor(backend):
    """q, k and v as one linear layer gives them, (total, heads, 3 * dim), and gradients of any strides."""
    lengths = (LENGTHS["several"][0],) * 2
    cu, longest = cumulative(lengths[0]), max(lengths[0])
    case = packed_case(lengths, 2, 2, 16, 16)
    one = torch.cat([x[0].transpose(0, 1) for x in (case.q, case.k, case.v)], -1).requires_grad_()
    out = flash_attention_varlen(*one.split(16, -1), cu, cu, longest, longest, causal=True, backend=backend)
    out.backward(case.dout[0].mT.contiguous().mT.transpose(0, 1))
    apart = replace(case, causal=True, dlse=torch.zeros_like(case.dlse))
    want = differentiate(packed_attention(lengths), apart, backend=backend)
    assert torch.equal(out, want["out"][0].transpose(0, 1))
    for got, name in zip(one.grad.split(16, -1), ("dq", "dk", "dv")):
        assert torch.equal(got, want[name][0].transpose(0, 1))


def test_offsets_past_2_to_the_31(backend):
    """The second sequence starts more than 2^31 elements after the first."""
    case = make_case(1, 2, 2, 40, 40, d=16, device=DEVICE, dtype=torch.float16)
    far = 2**31 // 20 + 64
    cu = cumulative((21, 19))
    inputs = [
        torch.empty(39 * far + 32, dtype=x.dtype, device=DEVICE).as_strided((40, 2, 16), (far, 16, 1)).copy_(x[0].transpose(0, 1))
        for x in (case.q, case.k, case.v)
    ]
    near = [x[0].transpose(0, 1) for x in (case.q, case.k, case.v)]
    results = []
    for tensors in (inputs, near):
        tensors = [x.requires_grad_() for x in tensors]
        out = flash_attention_varlen(*tensors, cu, cu, 21, 21, causal=True, backend=backend)
        results.append([out, *torch.autograd.grad(out, tensors, case.dout[0].transpose(0, 1))])
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    """Packed and dense, with every rule: the host only launches."""
    lengths = LENGTHS["long"]
    packed = make_rules(["causal", "window", "alibi", "softcap", "sinks", "dropout"], 5, 2, 0, 0)
    dense = make_rules(["float mask", "padding", "alibi", "softcap", "sinks", "pattern", "dropout"], 2, 2, 100, 120)
    cu_q, cu_k = map(cumulative, lengths)
    q, k, v = (torch.randn(sum(x), h, 16, device=DEVICE, requires_grad=True) for x, h in zip((*lengths, lengths[1]), (2, 1, 1)))
    a, b, c = (torch.randn(2, h, n, 16, device=DEVICE, requires_grad=True) for n, h in ((100, 2), (120, 1), (120, 1)))

    def run():
        flash_attention_varlen(q, k, v, cu_q, cu_k, 500, 600, **packed, backend="triton").sum().backward()
        flash_attention(a, b, c, **dense, backend="triton").sum().backward()

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- pack and unpack

REAL = {
    "right": lambda n: torch.arange(n) < torch.tensor([n, 3, n - 1])[:, None],
    "left": lambda n: torch.arange(n) >= torch.tensor([0, n - 2, 5])[:, None],
    "between": lambda n: torch.rand(3, n, generator=torch.Generator().manual_seed(0)) < 0.6,
    "one sequence is none": lambda n: torch.arange(n) < torch.tensor([n, 0, 4])[:, None],
    "all of it": lambda n: torch.zeros(3, n, dtype=torch.bool),
    "none": lambda n: torch.ones(3, n, dtype=torch.bool),
}


@pytest.fixture(params=REAL)
def real(request):
    return REAL[request.param](20).to(DEVICE)


@pytest.mark.parametrize("shape", [(), (7,), (2, 5)], ids=str)
def test_there_and_back(shape, real):
    x = torch.randn(3, 20, *shape, device=DEVICE, requires_grad=True)
    packed = pack(x, real)
    assert torch.equal(packed.values, x[real]) and packed.max_seqlen == 20
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [0, *real.sum(1).cumsum(0).tolist()]
    back = unpack(packed.values, packed)
    wide = real.view(3, 20, *(1 for _ in shape))
    assert torch.equal(back, x.masked_fill(~wide, 0.0))
    weight = torch.randn_like(back)
    (gradient,) = torch.autograd.grad(back, x, weight)
    assert torch.equal(gradient, weight.masked_fill(~wide, 0.0))


@pytest.mark.parametrize("causal", [False, True])
def test_padded_and_packed_are_equal(causal, real, backend):
    """Self-attention in a padded batch, and packed: the same at every real token, and the same gradients."""
    torch.manual_seed(0)
    x = torch.randn(3, 20, 2, 3 * 16, device=DEVICE)
    results = []
    for packs in (False, True):
        leaf = x.clone().requires_grad_()
        if packs:
            packed = pack(leaf, real)
            seqlens = packed.cu_seqlens, packed.cu_seqlens, packed.max_seqlen, packed.max_seqlen
            out = flash_attention_varlen(*packed.values.split(16, -1), *seqlens, causal=causal, backend=backend)
            out = unpack(out, packed)
        else:
            q, k, v = (y.transpose(1, 2) for y in leaf.split(16, -1))
            out = flash_attention(q, k, v, causal=causal, key_padding_mask=real, backend=backend).transpose(1, 2)
            out = out * real[..., None, None]
        results += [(out, *torch.autograd.grad(out.square().sum(), leaf))]
    for name, a, b in zip(("out", "gradient"), *results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_each_sequence_has_its_own_dropout(backend):
    """Sequence b drops what batch b of a padded batch drops: its places count from its own start."""
    lengths = torch.tensor([20, 0, 7], device=DEVICE)
    real = torch.arange(20, device=DEVICE) < lengths[:, None]
    q = torch.zeros(3, 2, 20, 16, device=DEVICE)
    v = torch.eye(20, device=DEVICE).expand(3, 2, 20, 20)
    torch.manual_seed(1)
    padded = flash_attention(q, q, v, dropout_p=0.5, backend=backend) != 0
    qs, vs = (pack(x.transpose(1, 2), real) for x in (q, v))
    torch.manual_seed(1)
    out = flash_attention_varlen(
        qs.values, qs.values, vs.values, qs.cu_seqlens, qs.cu_seqlens, 20, 20, dropout_p=0.5, backend=backend
    )
    packed = unpack(out, qs).transpose(1, 2) != 0
    for b, n in enumerate(lengths.tolist()):
        assert torch.equal(packed[b, :, :n, :n], padded[b, :, :n, :n])
    assert not torch.equal(packed[0, :, :7, :7], packed[2, :, :7, :7])


def test_dropout_is_right_in_both_directions(backend):
    """By the padded batch, whose gradients test_rules.py checks."""
    real = REAL["right"](20).to(DEVICE)
    case = make_case(3, 2, 1, 20, 20, 16, device=DEVICE, dropout_p=0.4, key_padding_mask=real, causal=True)
    case.dout.mul_(real[:, None, :, None])
    case.dlse.mul_(real[:, None])

    def packed_batch(q, k, v, *, key_padding_mask, **options):
        q, k, v = (pack(x.transpose(1, 2), real) for x in (q, k, v))
        out, lse = flash_attention_varlen_with_lse(
            q.values, k.values, v.values, q.cu_seqlens, k.cu_seqlens, 20, 20, **options
        )
        return unpack(out, q).transpose(1, 2), unpack(lse, q).transpose(1, 2)

    got, right, plain = differentiate(packed_batch, case, backend=backend), truth(case), eager(case)
    for name in right:
        hidden = ~real[:, None, :, None] if name != "lse" else ~real[:, None]
        assert_close(name, *(x[name].masked_fill(hidden, 0.0) for x in (got, right, plain)))
