"""out, lse, dq, dk and dv against fp64, by the relative bound of flash_edu.testing, every flag both ways."""
import itertools

import pytest
import torch
from this_machine import DEVICE, ON_GPU

from flash_edu import flash_attention_with_lse, merge_attention
from flash_edu.reference import naive_attention_with_lse
from flash_edu.testing import assert_close, differentiate, eager, results_from_saved, make_case, truth

LENGTHS = [(1, 239), (113, 203), (128, 217), (799, 3), (1023, 1024)]
LENGTHS += [(nk, nq) for nq, nk in LENGTHS]
SMALL = [(1, 83), (37, 67), (64, 49), (75, 3), (47, 48)]  # the same kinds, for the interpreter: it takes 5 ms a tile
SMALL += [(nk, nq) for nq, nk in SMALL]
HEAD_DIMS = [16, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 256]
HEADS = [(3, 3), (4, 2), (3, 1)]  # multi-head, grouped-query, multi-query
HALF = [torch.float16, torch.bfloat16]


def check(case, backend):
    got = differentiate(flash_attention_with_lse, case, backend=backend)
    right, plain = truth(case), eager(case)
    for name in right:
        assert_close(name, got[name], right[name], plain[name])


def dtypes_of(backend):
    if backend == "triton" and not ON_GPU:
        return [torch.float32, torch.float16]  # Triton's interpreter computes bf16 wrongly, and we refuse it
    return [torch.float32, *HALF]


def interpreted(backend):
    return backend == "triton" and not ON_GPU


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths(lengths, causal, backend):
    nq, nk = SMALL[LENGTHS.index(lengths)] if interpreted(backend) else lengths
    for i, (dtype, (heads, kv_heads)) in enumerate(zip(dtypes_of(backend), HEADS)):
        case = make_case(
            2 if ON_GPU else 1, heads, kv_heads, nq, nk, d=64, dtype=dtype, device=DEVICE, causal=causal, hot=2.0, seed=i
        )
        check(case, backend)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_head_dims(d, causal, backend):
    nq, nk = (113, 203) if not interpreted(backend) else (37, 67)
    for dtype in dtypes_of(backend) if ON_GPU else dtypes_of(backend)[:1]:
        check(make_case(1, 2, 1, nq, nk, d=d, dtype=dtype, device=DEVICE, causal=causal), backend)


@pytest.mark.parametrize("d, dv", [(64, 32), (40, 128), (192, 128), (16, 1), (1, 16), (256, 59)])
def test_value_head_dim_differs(d, dv, backend):
    for causal in (False, True):
        check(make_case(1, 2, 2, 45, 70, d=d, dv=dv, dtype=dtypes_of(backend)[-1], device=DEVICE, causal=causal), backend)


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.3])
def test_scale(scale, backend):
    for causal in (False, True):
        check(make_case(1, 2, 1, 50, 61, d=16, device=DEVICE, causal=causal, scale=scale), backend)


@pytest.mark.parametrize("hot", [0.0, 10.0, 50.0])
def test_cold_and_hot_scores(hot, backend):
    """All weights equal, and all weight on one key: where a missing maximum overflows."""
    for causal, dtype in itertools.product((False, True), dtypes_of(backend)):
        check(make_case(1, 2, 2, 65, 97, d=32, dtype=dtype, device=DEVICE, causal=causal, hot=hot), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_every_combination(d, lengths, heads, causal, dtype):
    check(make_case(2, *heads, *lengths, d=d, dtype=dtype, device=DEVICE, causal=causal, hot=2.0), "triton")


@pytest.mark.gpu
def test_tf32_follows_the_switch_of_pytorch():
    case = make_case(1, 2, 2, 200, 200, d=64, device=DEVICE)
    exact = truth(case)["out"]
    allowed = torch.backends.cuda.matmul.allow_tf32
    try:
        errors = []
        for torch.backends.cuda.matmul.allow_tf32 in (False, True):
            out = differentiate(flash_attention_with_lse, case, backend="triton")["out"]
            errors.append((out - exact).abs().max().item())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    assert errors[0] < 1e-5 < errors[1] < 1e-2


def test_unused_outputs_get_no_gradient(backend):
    """Only lse used: dv must be exactly 0. Only out used: as if dlse were 0."""
    case = make_case(1, 2, 2, 40, 50, d=16, device=DEVICE, causal=True)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    _, lse = flash_attention_with_lse(q, k, v, causal=True, backend=backend)
    lse.backward(case.dlse)
    assert torch.equal(v.grad, torch.zeros_like(v))
    assert q.grad.abs().max() > 0

    without = make_case(1, 2, 2, 40, 50, d=16, device=DEVICE, causal=True)
    without.dlse.zero_()
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    flash_attention_with_lse(q, k, v, causal=True, backend=backend)[0].backward(case.dout)
    right, plain = truth(without), eager(without)
    for name, x in (("dq", q), ("dk", k), ("dv", v)):
        assert_close(name, x.grad, right[name], plain[name])


def test_gradcheck(backend):
    """fp64 makes finite differences mean something; on a GPU the Triton kernels do not take fp64."""
    if backend == "triton" and ON_GPU:
        pytest.skip("fp64 kernels run in the interpreter only: make test")
    torch.manual_seed(0)
    for causal, (nq, nk) in itertools.product((False, True), ((5, 7), (7, 5))):
        inputs = [
            torch.randn(1, heads, n, d, dtype=torch.float64, device=DEVICE, requires_grad=True)
            for heads, n, d in ((2, nq, 4), (1, nk, 4), (1, nk, 3))
        ]

        def attention(q, k, v, causal=causal):
            out, lse = flash_attention_with_lse(q, k, v, causal=causal, backend=backend)
            return out, lse.masked_fill(lse.isinf(), 0.0)  # -inf has no finite differences

        assert torch.autograd.gradcheck(attention, inputs, fast_mode=backend == "triton")  # the interpreter takes minutes else


def test_merging_two_halves_of_the_keys(backend):
    """... gives attention over all keys, and the right gradients through lse."""
    case = make_case(1, 2, 2, 70, 91, d=16, device=DEVICE, hot=3.0)

    def in_halves(q, k, v, *, causal, scale):
        halves = (
            flash_attention_with_lse(q, k[:, :, part], v[:, :, part], backend=backend)
            for part in (slice(0, 40), slice(40, None))
        )
        (out_a, lse_a), (out_b, lse_b) = halves
        return merge_attention(out_a, lse_a, out_b, lse_b)

    got, right, plain = differentiate(in_halves, case), truth(case), eager(case)
    for name in right:
        assert_close(name, got[name], right[name], 2 * plain[name] - right[name])  # two roundings instead of one


def test_merging_with_nothing():
    out, lse = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5)
    nothing = torch.zeros_like(out), torch.full_like(lse, float("-inf"))
    for merged in (merge_attention(out, lse, *nothing), merge_attention(*nothing, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)
    both = [x.clone().requires_grad_() for x in (*nothing, *nothing)]
    merged_out, merged_lse = merge_attention(*both)
    assert torch.equal(merged_out, nothing[0]) and torch.equal(merged_lse, nothing[1])
    merged_out.sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in both)


class TestTheRuler:
    """The bound itself must be able to fail."""

    case = make_case(1, 2, 2, 64, 300, d=32, dtype=torch.float16)

    @pytest.mark.parametrize(
        "spoil",
        [torch.zeros_like, lambda x: 0.9 * x, lambda x: x * 1.02, lambda x: x.flip(-2), lambda x: x.fill_(float("nan"))],
        ids=["zeros", "x0.9", "x1.02", "rows reversed", "NaN"],
    )
    @pytest.mark.parametrize("draws", [0, 64])
    def test_wrong_answers_are_wrong(self, spoil, draws):
        right, plain = truth(self.case), eager(self.case, draws)
        for name in ("out", "dq", "dk", "dv"):
            with pytest.raises(AssertionError, match="values are wrong"):
                assert_close(name, spoil(plain[name].clone()), right[name], plain[name])

    @pytest.mark.parametrize(
        "spoil, said",
        [
            (lambda x: x * 2, "Every value is 2 times what it should be"),
            (torch.zeros_like, "Every value is 0"),
            (lambda x: x.index_fill(2, torch.arange(48, 64), 0.0), "Only in rows 48 to 63, of a tensor of shape (1, 2, 64, 32)"),
            (lambda x: x.index_fill(1, torch.tensor([1]), 9.0), "Only in head 1, of"),
            (lambda x: x.index_fill(2, torch.tensor([0]), float("nan")), "64 of them are NaN\nOnly in row 0, of"),
            (lambda x: x.index_fill(3, torch.arange(8), 9.0), "Only in columns 0 to 7, of"),
            (lambda x: x.flip(-2), "values are wrong"),
        ],
    )
    def test_what_wrong_values_have_in_common_is_said(self, spoil, said):
        right, plain = truth(self.case), eager(self.case)
        with pytest.raises(AssertionError) as error:
            assert_close("out", spoil(plain["out"].clone()), right["out"], plain["out"])
        assert said in str(error.value)
        assert ("Only in" in str(error.value)) == ("Only in" in said)

    @pytest.mark.parametrize(
        "rows, tile, said",
        [
            (range(48, 64), 16, "Only in the last of the 4 tiles of 16 rows\n"),
            (range(60, 64), 20, "Only in the last of the 4 tiles of 20 rows, which 4 rows do not fill\n"),
            ((0, 1, 33), 16, "Only in tiles 0, 2 of 4 (0 to 3, 16 rows each)\n"),
            (range(0, 64, 16), 16, ""),
            (range(48, 64), None, ""),
        ],
    )
    def test_which_tiles_are_wrong_is_said(self, rows, tile, said):
        right, plain = truth(self.case), eager(self.case)
        for name in ("out", "lse"):
            spoilt = plain[name].index_fill(2, torch.tensor([*rows]), 9.0)
            with pytest.raises(AssertionError) as error:
                assert_close(name, spoilt, right[name], plain[name], tile=tile)
            assert said in str(error.value) and ("tile" in str(error.value)) == bool(said)

    def test_what_should_be_hidden_is_said(self):
        case = make_case(nq=5, nk=3, causal=True)  # the first two rows see nothing
        right, plain = truth(case), eager(case)
        for name, value in (("out", "0"), ("lse", "-inf")):
            spoilt = plain[name].index_fill(2, torch.tensor([0, 1]), 9.0)
            with pytest.raises(AssertionError, match=f"Only where nothing is to be seen, and the value should be {value}"):
                assert_close(name, spoilt, right[name], plain[name])

    def test_eager_is_right(self):
        right, plain = truth(self.case), eager(self.case)
        for name in right:
            assert_close(name, plain[name], right[name], plain[name])

    @pytest.mark.parametrize("causal", [False, True])
    def test_formulas_from_saved_tensors_are_exact_in_fp64(self, causal):
        case = make_case(1, 4, 2, 20, 13, d=8, dtype=torch.float64, causal=causal)
        right = differentiate(naive_attention_with_lse, case)
        for slack in (0.0, 1e-15):
            for name, got in results_from_saved(case, right["out"], right["lse"], slack=slack).items():
                torch.testing.assert_close(got, right[name], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALF])
    def test_luck_of_few_numbers(self, dtype):
        """One sink: its gradient is one number, and any two ways to round O and P make other errors in it. Judged by 64 draws
        none of 300 more is wrong; by none, some are."""
        case = make_case(1, 1, 1, 100, 80, d=64, dtype=dtype, sinks=torch.tensor([0.5]))
        right = truth(case)
        dice = [torch.Generator().manual_seed(n) for n in range(1000, 1300)]
        others = [results_from_saved(case, right["out"], right["lse"].float(), dice=x) for x in dice]
        plain = {draws: eager(case, draws) for draws in (0, 64)}
        for other in others:
            for name in other:
                assert_close(name, other[name], right[name], plain[64][name])
        for name in ("dsinks", "dq"):
            with pytest.raises(AssertionError):
                assert_close(name, right[name] + 0.05, right[name], plain[64][name])
        for name in ("dsinks",) if dtype != torch.float32 else ():
            with pytest.raises(AssertionError):
                for other in others:
                    assert_close(name, other[name], right[name], plain[0][name])

    def test_luck_is_not_asked_for(self):
        """One key: P is 1, dP - D is a rounding and nothing else, and no two ways to compute it agree."""
        case = make_case(1, 2, 2, 64, 1, d=64)
        case.dlse.zero_()
        right, plain = truth(case), eager(case)
        other = results_from_saved(case, right["out"].float(), right["lse"].float(), slack=-1e-7)
        for name in other:
            assert_close(name, other[name], right[name], plain[name])
            with pytest.raises(AssertionError):
                assert_close(name, other[name] + 1e-4, right[name], plain[name])
