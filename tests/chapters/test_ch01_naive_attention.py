"""What an answer to chapter 01 must satisfy. The truth is fp64; the bound is that of flash_edu/testing.py."""

import dataclasses
import functools
from unittest import mock

import pytest
import torch
from frames import left_alone

from flash_edu.testing import assert_close, eager, make_case, truth

NEW_ROW = "\n      "


def draw(mask):
    """A mask as rows of 1s and 0s."""
    return NEW_ROW.join(" ".join(str(int(x)) for x in row) for row in mask.tolist()) or "(no rows)"


def assert_mask(answer, rows, nk, look):
    """The answer's mask is the one drawn in `rows`, a string like "10 11"."""
    want = torch.tensor([[int(x) for x in row] for row in rows.split()], dtype=torch.bool).reshape(-1, nk)
    nq = len(want)
    got = answer.causal_mask(nq, nk)
    assert isinstance(got, torch.Tensor), (
        f"causal_mask({nq}, {nk}) returned {type(got).__name__}, expected a tensor."
    )
    assert got.shape == want.shape, (
        f"causal_mask({nq}, {nk}) has shape {tuple(got.shape)}, expected ({nq}, {nk}):\n"
        "a row per query, a column per key."
    )
    assert got.bool().equal(want), (
        f"causal_mask({nq}, {nk}) is{NEW_ROW}{draw(got.bool())}\n    expected{NEW_ROW}{draw(want)}\n{look}"
    )


def assert_made_there(call, look):
    """call() makes each of its tensors on the CPU, which it was given: one made without a device lands elsewhere."""
    with torch.device("meta"):  # the default now; on a machine with a GPU it is the CPU
        try:
            device = call().device.type
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error).lower():
                raise
            device = "meta"
    assert device != "meta", look
    assert device == "cpu", f"The result is on {device!r}, expected 'cpu'."


def output_of(answer, q, k, v, **options):
    """The answer's O, from copies of the inputs: what becomes of these is a claim of its own."""
    got = answer.naive_attention(q.clone(), k.clone(), v.clone(), **options)
    assert isinstance(got, torch.Tensor), (
        f"naive_attention returned something of type {type(got).__name__}, expected one tensor, O."
    )
    return got


def assert_attention(answer, case, look):
    """The answer's output is as near to the truth as plain PyTorch's."""
    got = output_of(answer, case.q, case.k, case.v, causal=case.causal, scale=case.scale)
    shapes = ", ".join(f"{name} {tuple(getattr(case, name).shape)}" for name in "qkv")
    try:
        assert_close("O", got, truth(case)["out"], eager(case)["out"])
    except AssertionError as wrong:
        raise AssertionError(f"{shapes}, causal={case.causal}, scale={case.scale}\n{wrong}\n{look}") from None


# 1.1 causal_mask

MASK_FORMULA = "Query i sees key j if j <= i + Nk - Nq. With Nq = Nk that is j <= i."


@pytest.mark.exercise("1.1")
def test_square_mask(answer):
    """as many queries as keys: each word sees itself and the words before it"""
    assert_mask(
        answer, "100 110 111", 3, f"True means attend, and a word may look at itself.\n{MASK_FORMULA}"
    )


@pytest.mark.exercise("1.1")
def test_fewer_queries_than_keys(answer):
    """fewer queries than keys: the last query sees every key"""
    look = (
        "The 1s end in the lower right corner: the last query is the newest word; everything is in its past."
    )
    assert_mask(answer, "1110 1111", 4, f"{look}\n{MASK_FORMULA}")
    assert_mask(answer, "11111", 5, f"{look}\n{MASK_FORMULA}")


@pytest.mark.exercise("1.1")
def test_more_queries_than_keys(answer):
    """more queries than keys: the first queries see nothing"""
    look = "The last query still sees every key; count back from there, one key fewer per row, until none is left."
    assert_mask(answer, "00 00 10 11", 2, f"{look}\n{MASK_FORMULA}")
    assert_mask(answer, "000 000 100 110 111", 3, f"{look}\n{MASK_FORMULA}")


@pytest.mark.exercise("1.1")
def test_mask_is_boolean(answer):
    """the mask holds True and False, not numbers"""
    got = answer.causal_mask(3, 5)
    assert got.dtype == torch.bool, (
        f"causal_mask(3, 5) has dtype {got.dtype}, expected torch.bool.\n"
        "`~mask` means 'not' for booleans only: ~1 is -2. A comparison gives booleans; so does .bool()."
    )


@pytest.mark.exercise("1.1")
def test_mask_is_on_the_device_asked_for(answer):
    """the mask is made on the device asked for"""
    look = (
        "causal_mask(3, 5, device='cpu') was asked for, but a tensor inside was made without device=.\n"
        "Give device=device to each torch.arange or torch.ones. Scores on a GPU need a mask on the same GPU."
    )
    assert_made_there(lambda: answer.causal_mask(3, 5, device="cpu"), look)


@pytest.mark.exercise("1.1")
def test_mask_without_rows(answer):
    """no queries, or no keys, gives an empty mask"""
    for nq, nk in ((0, 3), (3, 0)):
        got = tuple(answer.causal_mask(nq, nk).shape)
        assert got == (nq, nk), f"causal_mask({nq}, {nk}) has shape {got}, expected ({nq}, {nk})."


# 1.2 naive_attention


@pytest.mark.exercise("1.2")
def test_by_hand(answer):
    """two words that you can check by hand"""
    q = torch.tensor([[[[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]])
    k = torch.tensor([[[[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]]])
    v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])  # the identity: O shows the weights
    got = output_of(answer, q, k, v)
    assert got.shape == (1, 1, 2, 2), f"O has shape {tuple(got.shape)}, expected (1, 1, 2, 2)."
    want = torch.tensor([[2.0, 0.0], [0.0, 0.0]]).softmax(-1)  # scores: 4 / sqrt(4) = 2, and 0
    assert torch.allclose(got[0, 0], want, rtol=1e-5, atol=0), (
        f"O = {[[round(x, 4) for x in row] for row in got[0, 0].tolist()]}, "
        f"expected {[[round(x, 4) for x in row] for row in want.tolist()]}.\n"
        "The scores are [[2, 0], [0, 0]]; softmax goes along each row (dim=-1), and V is the identity here.\n"
        "Compare your scores and your weights with these, one step at a time."
    )


@pytest.mark.exercise("1.2")
@pytest.mark.parametrize(
    "nq, nk, d, dv", [(7, 7, 8, 8), (13, 29, 16, 16), (31, 5, 40, 40), (1, 17, 4, 4), (6, 1, 3, 3)]
)
def test_formula(answer, nq, nk, d, dv):
    """any number of queries and keys gives softmax(scale Q K^T) V"""
    case = make_case(2, 3, nq=nq, nk=nk, d=d, dv=dv, hot=2.0, seed=nq)
    assert_attention(
        answer, case, "Are the scores (B, H, Nq, Nk), a row per query, and does each row of weights sum to 1?"
    )


@pytest.mark.exercise("1.2")
def test_values_of_another_width(answer):
    """the values may have another width than the keys"""
    for d, dv in ((16, 5), (4, 24)):
        case = make_case(nq=11, nk=19, d=d, dv=dv, seed=d)
        assert_attention(
            answer, case, "O is as wide as V. The scale comes from the width of Q and K, never from V."
        )


@pytest.mark.exercise("1.2")
def test_heads_stay_apart(answer):
    """each head of each batch entry is attention on its own"""
    case = make_case(3, 2, nq=9, nk=14, d=8, seed=1)
    together = output_of(answer, case.q, case.k, case.v)
    for b in range(3):
        for h in range(2):
            q, k, v = (x[b : b + 1, h : h + 1] for x in (case.q, case.k, case.v))
            alone = output_of(answer, q, k, v)
            assert torch.allclose(together[b : b + 1, h : h + 1], alone, rtol=1e-4, atol=1e-6), (
                f"Head {h} of batch entry {b} gives other numbers alone than together with the others.\n"
                "Heads must not mix: softmax over dim=-1 only, and transpose the last two dims only."
            )


@pytest.mark.exercise("1.2")
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.7])
def test_scale_given(answer, scale):
    """a scale that is given is used instead of 1/sqrt(D)"""
    case = make_case(nq=12, nk=10, d=8, scale=scale, seed=2)
    assert_attention(
        answer, case, f"scale={scale} was given, so the scores are {scale} * Q K^T, and nothing else."
    )


@pytest.mark.exercise("1.2")
def test_scale_zero(answer):
    """scale=0 gives the plain mean of the values"""
    case = make_case(nq=5, nk=9, d=8, scale=0.0, seed=3)
    assert_attention(
        answer,
        case,
        "All scores are 0, so all weights are equal. 0 is a scale too: ask `if scale is None`; `scale or default` loses a 0.",
    )


@pytest.mark.exercise("1.2")
def test_hot_scores(answer):
    """scores in the thousands give finite, right numbers"""
    case = make_case(nq=23, nk=23, d=16, hot=100.0, seed=4)
    whole = dataclasses.replace(case, q=case.q.round(), k=(10 * case.k).round())  # no score needs rounding
    assert_attention(
        answer,
        whole,
        "exp(1000) is infinite; S - logsumexp(S) loses digits. torch.softmax subtracts each row's maximum.",
    )


@pytest.mark.exercise("1.2")
@pytest.mark.parametrize("nq, nk", [(17, 17), (5, 31), (1, 13)])
def test_causal(answer, nq, nk):
    """causal hides the future, and the last query sees every key"""
    case = make_case(2, 2, nq=nq, nk=nk, d=8, causal=True, hot=2.0, seed=5)
    assert_attention(
        answer,
        case,
        "Hide a key by giving it the score -inf before softmax, where causal_mask(Nq, Nk) is False.",
    )


@pytest.mark.exercise("1.2")
def test_hidden_keys_do_not_matter(answer):
    """changing keys and values that are hidden changes nothing"""
    case = make_case(nq=8, nk=8, d=8, causal=True, seed=6)
    before = output_of(answer, case.q, case.k, case.v, causal=True)
    k, v = case.k.clone(), case.v.clone()
    k[:, :, 5:], v[:, :, 5:] = 30 * k[:, :, 5:], -7.0
    after = output_of(answer, case.q, k, v, causal=True)
    assert torch.allclose(before[:, :, :5], after[:, :, :5], rtol=1e-5, atol=1e-7), (
        "Words 5 to 7 changed, and so did the outputs of words 0 to 4, which must not see them.\n"
        "Is the score -inf before softmax? A weight set to 0 after softmax has already taken its share."
    )


@pytest.mark.exercise("1.2")
def test_hidden_below_any_score(answer):
    """a hidden key gets no weight, however low the visible scores are"""
    case = make_case(nq=6, nk=9, d=8, causal=True, seed=7)
    case = dataclasses.replace(
        case, q=-3e3 * case.q.abs(), k=3e3 * case.k.abs()
    )  # all scores are far below -1e6
    assert_attention(
        answer, case, "The visible scores are below -1e6 here. -inf is below every score; -1e4 or 0 is not."
    )


@pytest.mark.exercise("1.2")
@pytest.mark.parametrize("nq, nk", [(7, 3), (5, 1), (13, 11)])
def test_rows_without_a_key(answer, nq, nk):
    """a query with nothing to attend to gives zeros, not NaN"""
    case = make_case(2, 2, nq=nq, nk=nk, d=8, causal=True, seed=8)
    assert_attention(
        answer,
        case,
        f"With {nq} queries and {nk} keys, the first {nq - nk} see no key. Of a row of nothing but -inf, softmax makes 0/0.\n"
        "Fill the weights with 0 where mask.any(dim=-1, keepdim=True) is False.",
    )


@pytest.mark.exercise("1.2")
def test_mask_is_on_the_device_of_q(answer):
    """the mask is made on the device of q"""
    case = make_case(nq=3, nk=5, d=4, causal=True, seed=13)
    look = (
        "q is on 'cpu', but a tensor inside was made without device=. On a GPU, the scores would be on the GPU and that\n"
        "tensor would not. Hand the device of q to causal_mask."
    )

    def call():
        return answer.naive_attention(case.q, case.k, case.v, causal=True)

    try:
        # torch.tensor(-inf) may be anywhere: a GPU takes single numbers from the CPU
        with mock.patch.object(torch, "tensor", functools.partial(torch.tensor, device="cpu")):
            assert_made_there(call, look)
    except AssertionError:
        test_mask_is_on_the_device_asked_for(answer)  # if causal_mask is to blame, this says so
        raise


@pytest.mark.exercise("1.2")
def test_inputs_unchanged(answer):
    """q, k and v are as they were before"""
    case = make_case(nq=6, nk=6, d=4, causal=True, seed=9)
    with left_alone("naive_attention", q=case.q, k=case.k, v=case.v):
        answer.naive_attention(case.q, case.k, case.v, causal=True)


@pytest.mark.exercise("1.2")
def test_transposed_inputs(answer):
    """inputs that are views, (B, N, H, D) seen as (B, H, N, D), give the same"""
    case = make_case(2, 3, nq=7, nk=11, d=8, seed=10)
    views = {
        name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v")
    }
    got = answer.naive_attention(**views)
    assert torch.allclose(got, output_of(answer, case.q, case.k, case.v), rtol=1e-5, atol=1e-6), (
        "The same numbers, stored in another order in memory, give another answer.\n"
        "Models hand over such views. .view() and .reshape() across dims mix rows up; @ and .mT do not."
    )


@pytest.mark.exercise("1.2")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(answer, dtype):
    """the output has the dtype of the inputs, and its precision"""
    case = make_case(nq=19, nk=23, d=16, dtype=dtype, causal=True, seed=11)
    got = output_of(answer, case.q, case.k, case.v, causal=True)
    assert got.dtype == dtype, (
        f"Inputs are {dtype}, O is {got.dtype}. If you compute in another dtype, end with .to(q.dtype)."
    )
    if dtype != torch.float64:
        assert_attention(
            answer, case, f"If the claims above hold, a step is done in fewer digits than {dtype} has."
        )
        return
    error = (
        (got - truth(case)["out"]).abs().max().item()
    )  # both are fp64, so there is nothing to compare with
    assert error < 1e-13, (
        f"With {dtype} inputs the largest error of O is {error:.1g}; it should be below 1e-13.\n"
        "Is a step done in fewer digits? .float() and constants made as fp32 tensors do that."
    )


NAN_GRADIENT = (
    "O is clean, but a NaN lived on the way to it, and 0 * NaN is NaN in the backward too.\n"
    "Put the zeros into the weights, before they are multiplied by V, and hide scores with masked_fill."
)
NAN_OUTPUT = (
    "O itself holds NaN, and the gradients have it from there. Mend O first: which rows of it are NaN?"
)


@pytest.mark.exercise("1.2")
@pytest.mark.parametrize("nq, nk, causal", [(9, 13, False), (13, 13, True), (8, 5, True)])
def test_gradients(answer, nq, nk, causal):
    """gradients flow to q, k and v, and are right"""
    case = make_case(nq=nq, nk=nk, d=8, dv=6, causal=causal, seed=12)
    case = dataclasses.replace(case, dlse=torch.zeros_like(case.dlse))  # only O is asked for
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    out = answer.naive_attention(q, k, v, causal=causal)
    assert out.requires_grad, (
        "O does not know where it came from. Something like .detach(), .data or no_grad cut it off."
    )
    out.backward(case.dout)
    right, plain = truth(case), eager(case)
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        assert x.grad is not None, (
            f"No gradient reached {name[1:]}. Something like .detach(), .data or .item() cut it off."
        )
        try:
            assert_close(name, x.grad, right[name], plain[name])
        except AssertionError as wrong:
            look = "If the claims about O hold, look for a step outside autograd."
            if x.grad.isnan().any():
                look = NAN_OUTPUT if out.isnan().any() else NAN_GRADIENT
            raise AssertionError(f"{nq} queries, {nk} keys, causal={causal}\n{wrong}\n{look}") from None
