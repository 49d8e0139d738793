"""The forms a rule may take: masks of every shape, dtype and layout, windows of every kind, padding, slopes, softcaps, sinks."""
from dataclasses import replace

import pytest
import torch
from some_rules import NEG_INF, bool_mask, check, float_mask, padding
from this_machine import DEVICE, ON_GPU

from flash_edu import flash_attention, flash_attention_with_lse
from flash_edu.testing import assert_close, by_formula, differentiate, eager, make_case, truth

B, H = 2, 2
LENGTHS = {"Nq < Nk": (113, 203), "Nq > Nk": (203, 113)} if ON_GPU else {"Nq < Nk": (18, 35), "Nq > Nk": (33, 19)}


@pytest.fixture(params=LENGTHS)
def lengths(request):
    return LENGTHS[request.param]


def check_form(backend, lengths, batch=B, heads=H, **options):
    check(backend, (batch, heads, 1, *lengths, 16, 16), **options)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# --- masks

FORMS = ["", "1", "k", "11", "q1", "1k", "qk", "1qk", "hq1", "h1k", "11qk", "1hqk", "b11k", "b1qk", "bh1k", "bhq1", "bhqk", "bh11"]


@pytest.mark.parametrize("make", [bool_mask, float_mask])
@pytest.mark.parametrize("form", FORMS)
def test_masks_broadcast(form, make, generator, backend):
    """b, h, q, k: the mask has an entry for each; 1: it has one for all."""
    place = FORMS.index(form)
    lengths = list(LENGTHS.values())[place % 2]
    sizes = dict(zip("1bhqk", (1, B, H, *lengths)))
    mask = make(tuple(sizes[letter] for letter in form), generator)
    check_form(backend, lengths, attn_mask=mask, causal=place % 4 > 1)


@pytest.mark.parametrize("make", [bool_mask, float_mask])
@pytest.mark.parametrize(
    "view",
    [
        lambda mask, h: mask[0, 0].expand(*mask.shape),
        lambda mask, h: mask[:, :1].expand(-1, h, -1, -1),
        lambda mask, h: mask.transpose(0, 1).contiguous().transpose(0, 1),
        lambda mask, h: mask.transpose(2, 3).contiguous().transpose(2, 3),
        lambda mask, h: mask.repeat_interleave(3, 3)[..., 1::3],
        lambda mask, h: torch.nn.functional.pad(mask, (2, 3, 5, 1), value=1)[..., 5:-1, 2:-3],
    ],
    ids=["one for all", "one for all heads", "heads first", "keys first", "every third column", "a part of a larger one"],
)
def test_masks_in_any_layout(view, make, generator, backend):
    lengths = LENGTHS["Nq < Nk"]
    mask = view(make((B, H, *lengths), generator), H)
    assert mask.shape == (B, H, *lengths)
    check_form(backend, lengths, attn_mask=mask)


@pytest.mark.parametrize("mask_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_float_masks_of_other_dtypes(dtype, mask_dtype, lengths, generator, backend):
    check_form(backend, lengths, dtype=dtype, attn_mask=float_mask((1, H, *lengths), generator, mask_dtype))


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_that_hides_everything(causal, backend):
    lengths = LENGTHS["Nq > Nk"]
    for mask in (torch.zeros(1, 1, dtype=torch.bool), torch.full(lengths, NEG_INF)):
        check_form(backend, lengths, attn_mask=mask.to(DEVICE), causal=causal)


@pytest.mark.parametrize("least", [-1e4, -1e9, -1e12, -1e30, torch.finfo(torch.float32).min])
def test_a_mask_of_large_numbers(least, generator, backend):
    """Some hide with a large negative number. Where a whole row is hidden so, its result means nothing, but it must be finite:
    with a gradient of 0, as padding has, it must not reach the gradients of the others."""
    lengths = LENGTHS["Nq < Nk"]
    keep = bool_mask((1, 1, *lengths), generator)
    seeing = keep.any(-1)[..., None]
    case = make_case(B, H, 1, *lengths, 16, device=DEVICE, attn_mask=keep)
    case.dout.mul_(seeing)
    case.dlse.mul_(seeing[..., 0])
    right, plain = truth(case), eager(case)
    large = replace(case, options={"attn_mask": torch.zeros_like(keep, dtype=torch.float32).masked_fill(~keep, least)})
    got = differentiate(flash_attention_with_lse, large, backend=backend)
    for name in right:
        assert got[name].isfinite().all() or name == "lse"
        hidden = ~seeing[..., 0] if name == "lse" else ~seeing
        skip = hidden if name in ("out", "lse") else torch.zeros_like(hidden)[..., :1, :]
        assert_close(name, *(x[name].masked_fill(skip, 0.0) for x in (got, right, plain)))


@pytest.mark.parametrize("axis", range(4), ids=["batch", "head", "query", "key"])
@pytest.mark.parametrize("make", [bool_mask, float_mask])
def test_masks_past_2_to_the_31(make, axis, generator, backend):
    """A view whose last elements lie more than 2^31 from its first. Untouched pages of the buffer cost nothing."""
    shape = (B, H, 18, 20)
    far = 2**31 // (shape[axis] - 1) + 64
    strides = [(H * 360, 360, 20, 1)[a] if a != axis else far for a in range(4)]
    options = {"dtype": torch.float16} if make is float_mask else {"dtype": torch.bool}
    large = torch.empty(far * (shape[axis] - 1) + 2 * H * 360, device=DEVICE, **options)
    mask = large.as_strided(shape, strides).copy_(make(shape, generator))
    check_form(backend, shape[2:], attn_mask=mask)


@pytest.mark.gpu
def test_a_mask_of_more_than_2_to_the_31_elements():
    """... in the forward, and in the gradient that is written for it."""
    n, last = 46400, 40
    q, k, v = torch.randn(3, 1, 1, n, 16, device=DEVICE, dtype=torch.float16)
    mask = torch.randn(n, n, device=DEVICE, dtype=torch.float16).requires_grad_()
    assert mask.numel() > 2**31
    out = flash_attention(q, k, v, attn_mask=mask, backend="triton")
    dout = torch.zeros_like(out)
    dout[:, :, -last:] = 1.0
    (got,) = torch.autograd.grad(out, mask, dout)
    part = mask.detach()[-last:].double().requires_grad_()
    right = by_formula(q[:, :, -last:].double(), k.double(), v.double(), attn_mask=part)[0]
    (want,) = torch.autograd.grad(right.sum(), part)
    assert (out[:, :, -last:] - right).abs().max() < 1e-2 * right.abs().max()
    assert (got[-last:] - want).abs().max() < 1e-2 * want.abs().max()
    assert not got[:-last].any()


# --- windows

WINDOWS = [(0, 0), (0, None), (None, 0), (-1, -1), (-1, 0), (0, -1), (None, None), (3, 2), (5, None), (None, 5), (15, 16),
           (16, 0), (31, 1), (1, 40), (1000, 1000), (1000, 3), (7, 1000)]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_windows(window, causal, backend):
    for lengths in [(113, 203), (203, 113)] if ON_GPU else [(35, 51), (49, 33)]:
        check_form(backend, lengths, batch=1, heads=1, window=window, causal=causal)


@pytest.mark.parametrize("lengths", [(70, 5), (5, 90), (90, 90)], ids=str)
def test_windows_that_leave_rows_or_keys_out(lengths, backend):
    """With more queries than keys the first see none; with fewer, nobody sees the first keys: whole tiles of them."""
    for window in ((2, 1), (20, 0), (40, 3)):
        check_form(backend, lengths, batch=1, heads=1, window=window)


# --- padding


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (9, 4)], ids=str)
def test_paddings(window, causal, generator, backend):
    """Left, right, with holes, and nothing but padding; more than a tile of it."""
    check_form(backend, (40, 110), batch=4, heads=1, key_padding_mask=padding(4, 110, generator), causal=causal, window=window)


def test_a_padding_mask_in_another_layout(generator, backend):
    real = padding(4, 40, generator).t().contiguous().t()
    check_form(backend, (35, 40), batch=4, key_padding_mask=real)
    check_form(backend, (35, 40), batch=4, key_padding_mask=torch.ones(1, 1, dtype=torch.bool, device=DEVICE).expand(4, 40))


# --- slopes, softcap, sinks


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.rand(H),
        lambda: torch.rand(B, H),
        lambda: torch.rand(H, B).t(),
        lambda: torch.rand(1, H).expand(B, H),
        lambda: torch.tensor([0.0, -0.5]),
        lambda: torch.rand(H, dtype=torch.float16),
        lambda: torch.rand(H, dtype=torch.float64),
        lambda: torch.tensor([30.0, 1e4]),
    ],
    ids=["(H,)", "(B, H)", "transposed", "expanded", "0 and negative", "float16", "float64", "steep"],
)
def test_slopes(make, lengths, backend):
    torch.manual_seed(0)
    check_form(backend, lengths, alibi_slopes=make().to(DEVICE))


@pytest.mark.parametrize("softcap", [1e-2, 0.5, 30.0, 1e3, 1e6, 50])
def test_softcaps(softcap, backend):
    """Small: every weight nearly the same. Large: nothing is capped, and nothing may be lost either."""
    check_form(backend, LENGTHS["Nq < Nk"], softcap=softcap)


def test_slope_of_a_full_softcap(backend):
    """Where tanh is nearly 1, its slope 1 - tanh^2 is a small number, and has all its places. One key: only the lse has a gradient."""
    q, k, v = (torch.tensor(x, device=DEVICE).reshape(1, 1, -1, 1) for x in ([-8.0, -6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0, 8.0], [1.0], [1.0]))
    _, lse = flash_attention_with_lse(q.requires_grad_(), k, v, softcap=1.0, scale=1.0, backend=backend)
    (dq,) = torch.autograd.grad(lse.sum(), q)
    torch.testing.assert_close(dq.double(), q.double().cosh() ** -2, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("sink", [0.0, -1e4, 1e4, -50.0, 50.0, NEG_INF])
@pytest.mark.parametrize("causal", [False, True])
def test_sinks(sink, causal, lengths, backend):
    check_form(backend, lengths, sinks=torch.tensor([sink, 0.5], device=DEVICE), causal=causal)


def test_sinks_of_other_dtypes(backend):
    for dtype, sink_dtype in ((torch.float16, torch.float16), (torch.float32, torch.float64), (torch.float16, torch.float32)):
        check_form(backend, LENGTHS["Nq > Nk"], dtype=dtype, sinks=torch.tensor([1.5, -0.5], device=DEVICE, dtype=sink_dtype))


def test_a_sink_alone(backend):
    """Without a key to attend to, the sink is all there is: out = 0, lse = sink."""
    sinks = torch.tensor([1.5, -2.0], device=DEVICE, requires_grad=True)
    for nk, options in ((0, {}), (5, {"attn_mask": torch.tensor(False, device=DEVICE)})):
        q, k = torch.randn(1, 2, 4, 16, device=DEVICE), torch.randn(1, 2, nk, 16, device=DEVICE)
        out, lse = flash_attention_with_lse(q, k, k, sinks=sinks, backend=backend, **options)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(lse, sinks[None, :, None].expand_as(lse))
        (gradient,) = torch.autograd.grad((out + lse[..., None]).sum(), sinks)
        assert torch.equal(gradient, torch.full_like(sinks, 4.0 * 16))
