"""What an answer to chapter 05 must satisfy.

The truth is autograd's, in fp64. Inputs are fp64 too, and an answer may be as far off as fp32 would round it:
room for every order of operations, and none for another formula. One test asks for fp32's own accuracy.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from frames import left_alone
from torch.autograd.gradcheck import GradcheckError

from flash_edu.figures import largest_allocation, watch
from flash_edu.reference import causal_mask, naive_attention_with_lse
from flash_edu.testing import assert_close, eager, make_case, truth

SHAPES = [(4, 4, 3, 2), (7, 13, 5, 11), (31, 6, 16, 4), (1, 9, 2, 7), (10, 1, 3, 3)]  # Nq, Nk, D, Dv
BLOCKS = [(16, 16), (8, 32), (32, 8), (7, 11), (128, 128)]  # queries, keys
READ = "The formula is in the docstring, and the notebook derives it."


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are tiny: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ask(function, **inputs):
    """Call the learner's function, and see that it left its inputs alone."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    with left_alone(function.__name__, **tensors):
        return function(**inputs)


def judge(name, got, right, look, plain=None, tile=None):
    """`got` is as near to the truth as its rounding to fp32 is; or as near as `plain`, if given."""
    assert isinstance(got, torch.Tensor), f"{name} should be a tensor; it is of type {type(got).__name__}."
    try:
        assert_close(name, got, right, right.float() if plain is None else plain, tile=tile)
    except AssertionError as wrong:
        raise AssertionError(f"{wrong}\n{look}") from None


def same(name, got, right, look):
    """For numbers that can be checked by hand: a few roundings apart, and no more."""
    assert isinstance(got, torch.Tensor), f"{name} should be a tensor; it is of type {type(got).__name__}."
    right = torch.as_tensor(right, dtype=got.dtype)
    assert got.shape == right.shape and torch.allclose(got, right, rtol=1e-6, atol=1e-12), (
        f"{name} = {got.tolist()}, expected {right.tolist()}\n{look}"
    )


def draw(*shape, seed, hot=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * hot


def weights(*shape, seed):
    """Rows of a peaked softmax."""
    return draw(*shape, seed=seed, hot=3.0).softmax(dim=-1)


def autograd(function, inputs, gradients):
    """The gradients of `inputs` when `gradients` arrive at what `function` returns."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    torch.autograd.backward(outputs if isinstance(outputs, tuple) else (outputs,), gradients)
    return [x.grad for x in leaves]


def solved(nq, nk, d=8, dv=None, *, causal=False, scale=None, hot=2.0, seed=0, batch=2, heads=2):
    """A case in fp64 with everything the passes need, and what they must return."""
    case = make_case(
        batch,
        heads,
        nq=nq,
        nk=nk,
        d=d,
        dv=dv,
        causal=causal,
        scale=scale,
        hot=hot,
        seed=seed,
        dtype=torch.float64,
    )
    right = truth(case)
    dlse = case.dlse.masked_fill(right["lse"].isinf(), 0.0)
    case = SimpleNamespace(**vars(case), out=right["out"], lse=right["lse"], right=right)
    case.dlse, case.delta = dlse, (case.dout * case.out).sum(-1) - dlse
    case.scale = d**-0.5 if scale is None else scale
    case.asked = f"Nq {nq}, Nk {nk}, D {d}, Dv {dv or d}, causal {causal}"
    return case


# 5.1 grad_v


@pytest.mark.exercise("5.1")
def test_grad_v_by_hand(answer):
    """two rows that you can check by hand"""
    p = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 0.25]])
    dout = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    got = ask(answer.grad_v, p=p, dout=dout)
    same(
        "dV",
        got,
        [[1.0, 2.0], [0.0, 1.0], [0.0, 1.0]],
        f"Value 0 gets 1 * dO_0 + 0.5 * dO_1 = [1, 2]. {READ}",
    )


@pytest.mark.exercise("5.1")
@pytest.mark.parametrize("nq, nk, d, dv", SHAPES)
def test_grad_v(answer, nq, nk, d, dv):
    """any shape: each value's gradient is the sum over the rows that used it"""
    p, v, dout = weights(2, 3, nq, nk, seed=1), draw(2, 3, nk, dv, seed=2), draw(2, 3, nq, dv, seed=3)
    (right,) = autograd(lambda v: p @ v, [v], [dout])
    look = (
        "Sum over the queries i, with the weights P_ij as they are. .mT transposes the last two dimensions."
    )
    judge("dV", ask(answer.grad_v, p=p, dout=dout), right, look)


@pytest.mark.exercise("5.1")
def test_grad_v_of_a_sum(answer):
    """the gradient that out.sum().backward() sends: dV is what each key received"""
    p = weights(1, 2, 5, 7, seed=4)
    dout = torch.ones((), dtype=torch.float64).expand(1, 2, 5, 3)  # one number in memory, seen as many
    got = ask(answer.grad_v, p=p, dout=dout)
    judge(
        "dV",
        got,
        p.sum(-2)[..., None].expand(1, 2, 7, 3),
        "All dO are 1, so dV_j is the sum of column j of P.",
    )


# 5.2 grad_p


@pytest.mark.exercise("5.2")
def test_grad_p_by_hand(answer):
    """one row that you can check by hand"""
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    got = ask(answer.grad_p, dout=torch.tensor([[3.0, -1.0]]), v=v)
    same("dP", got, [[3.0, -1.0, 4.0]], f"The last one is dO_0 . V_2 = 3 * 2 - 1 * 2 = 4. {READ}")


@pytest.mark.exercise("5.2")
@pytest.mark.parametrize("nq, nk, d, dv", SHAPES)
def test_grad_p(answer, nq, nk, d, dv):
    """any shape: a weight's gradient is its row's dO times its key's value"""
    p, v, dout = weights(2, 3, nq, nk, seed=5), draw(2, 3, nk, dv, seed=6), draw(2, 3, nq, dv, seed=7)
    (right,) = autograd(lambda p: p @ v, [p], [dout])
    look = "Entry (i, j) is the dot product of row i of dO and row j of V: a row per query, a column per key."
    judge("dP", ask(answer.grad_p, dout=dout, v=v), right, look)


@pytest.mark.exercise("5.2")
def test_grad_p_of_a_sum(answer):
    """the gradient of out.sum(): one number, seen everywhere, makes each row of dP the sums of V's rows"""
    v = draw(2, 3, 9, 5, seed=8)
    dout = torch.ones((), dtype=v.dtype).expand(2, 3, 6, 5)  # strides of 0, as autograd sends it
    look = "With dO all ones, dP_ij is the sum of row j of V, the same for every query i."
    judge("dP", ask(answer.grad_p, dout=dout, v=v), v.sum(-1)[..., None, :].expand(2, 3, 6, 9), look)


# 5.3 row_delta


@pytest.mark.exercise("5.3")
def test_row_delta_by_hand(answer):
    """two rows that you can check by hand"""
    got = ask(
        answer.row_delta,
        dout=torch.tensor([[1.0, 2.0], [0.0, 3.0]]),
        out=torch.tensor([[3.0, 4.0], [5.0, 6.0]]),
    )
    same("D", got, [11.0, 18.0], f"D_0 = 1 * 3 + 2 * 4 = 11: one number for each row. {READ}")


@pytest.mark.exercise("5.3")
@pytest.mark.parametrize("nq, nk, d, dv", SHAPES)
def test_row_delta(answer, nq, nk, d, dv):
    """any shape: D is the mean of the row's dP, weighted by P, without P"""
    p, v, dout = weights(2, 3, nq, nk, seed=8), draw(2, 3, nk, dv, seed=9), draw(2, 3, nq, dv, seed=10)
    right = (p * (dout @ v.mT)).sum(-1)
    got = ask(answer.row_delta, dout=dout, out=p @ v)
    judge(
        "D", got, right, "Multiply dO and O entry by entry, and sum over each row (dim=-1): shape (..., Nq)."
    )


@pytest.mark.exercise("5.3")
def test_row_delta_of_a_sum(answer):
    """the gradient of out.sum(): D is the sum of each row of the output"""
    out = draw(2, 3, 6, 5, seed=9)
    dout = torch.ones((), dtype=out.dtype).expand_as(out)  # strides of 0, as autograd sends it
    look = "With dO all ones, D_i is the sum of row i of O: one number for each query."
    judge("D", ask(answer.row_delta, dout=dout, out=out), out.sum(-1), look)


# 5.4 grad_s


@pytest.mark.exercise("5.4")
def test_grad_s_by_hand(answer):
    """one row that you can check by hand"""
    p, dp = torch.tensor([[0.25, 0.25, 0.5]]), torch.tensor([[4.0, 0.0, 2.0]])
    got = ask(answer.grad_s, p=p, dp=dp, delta=torch.tensor([2.0]))
    look = f"The mean is D = 2. Score 0 has dP = 4, which is 2 above it: 0.25 * (4 - 2) = 0.5. {READ}"
    same("dS", got, [[0.5, -0.5, 0.0]], look)


@pytest.mark.exercise("5.4")
@pytest.mark.parametrize("nq, nk, d, dv", SHAPES)
def test_grad_s(answer, nq, nk, d, dv):
    """any shape: dS is autograd's gradient of softmax"""
    s, dp, dlse = draw(2, 3, nq, nk, seed=11, hot=3.0), draw(2, 3, nq, nk, seed=12), draw(2, 3, nq, seed=13)
    (right,) = autograd(lambda s: (s.softmax(-1), s.logsumexp(-1)), [s], [dp, dlse])
    p = s.softmax(-1)
    got = ask(answer.grad_s, p=p, dp=dp, delta=(p * dp).sum(-1) - dlse)
    judge(
        "dS",
        got,
        right,
        "Subtract the row's own D, delta[..., None], from dP first; then multiply by P, once.",
    )


@pytest.mark.exercise("5.4")
def test_grad_s_rows_sum_to_zero(answer):
    """every row of dS sums to zero: softmax does not feel a shift of its scores"""
    p, dp = weights(2, 3, 6, 6, seed=14), draw(2, 3, 6, 6, seed=15)
    got = ask(answer.grad_s, p=p, dp=dp, delta=(p * dp).sum(-1)).sum(-1)
    worst = got.abs().max().item()
    assert worst < 1e-12, (
        f"a row of dS sums to {worst:.3g}. With as many queries as keys, both delta[..., None, :]\n"
        "and delta[..., None] fit. One subtracts column j's number, the other row i's: D belongs to the row."
    )


# 5.5 grad_q and 5.6 grad_k


@pytest.mark.exercise("5.5")
def test_grad_q_by_hand(answer):
    """one query that you can check by hand"""
    k = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    got = ask(answer.grad_q, ds=torch.tensor([[1.0, 0.0, -1.0]]), k=k, scale=0.5)
    same("dQ", got, [[0.5, -0.5]], f"0.5 * (1 * K_0 - 1 * K_2) = 0.5 * ([2, 0] - [1, 1]). {READ}")


@pytest.mark.exercise("5.5")
@pytest.mark.parametrize("nq, nk, d, dv", SHAPES)
@pytest.mark.parametrize("scale", [0.3, -2.0])
def test_grad_q(answer, nq, nk, d, dv, scale):
    """any shape and any scale: dQ is autograd's"""
    q, k, ds = draw(2, 3, nq, d, seed=16), draw(2, 3, nk, d, seed=17), draw(2, 3, nq, nk, seed=18)
    (right,) = autograd(lambda q: scale * (q @ k.mT), [q], [ds])
    look = f"The scale is {scale} here, and it is a factor of dQ, once. The sum goes over the keys j."
    judge("dQ", ask(answer.grad_q, ds=ds, k=k, scale=scale), right, look)


@pytest.mark.exercise("5.5")
def test_grad_q_is_linear(answer):
    """a dS twice as large gives a dQ twice as large"""
    k, ds = draw(2, 9, 5, seed=26), draw(2, 6, 9, seed=27)
    once = ask(answer.grad_q, ds=ds, k=k, scale=0.3)
    judge("dQ", ask(answer.grad_q, ds=2 * ds, k=k, scale=0.3), 2 * once, "dQ is a sum of terms, each a factor times dS.")


@pytest.mark.exercise("5.6")
def test_grad_k_is_linear(answer):
    """a dS twice as large gives a dK twice as large"""
    q, ds = draw(2, 6, 5, seed=28), draw(2, 6, 9, seed=29)
    once = ask(answer.grad_k, ds=ds, q=q, scale=0.3)
    judge("dK", ask(answer.grad_k, ds=2 * ds, q=q, scale=0.3), 2 * once, "dK is a sum of terms, each a factor times dS.")


@pytest.mark.exercise("5.6")
def test_grad_k_by_hand(answer):
    """one key that you can check by hand"""
    q = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    got = ask(answer.grad_k, ds=torch.tensor([[1.0], [0.0], [-1.0]]), q=q, scale=0.5)
    same("dK", got, [[0.5, -0.5]], f"0.5 * (1 * Q_0 - 1 * Q_2) = 0.5 * ([2, 0] - [1, 1]). {READ}")


@pytest.mark.exercise("5.6")
@pytest.mark.parametrize("nq, nk, d, dv", SHAPES)
@pytest.mark.parametrize("scale", [0.3, -2.0])
def test_grad_k(answer, nq, nk, d, dv, scale):
    """any shape and any scale: dK is autograd's"""
    q, k, ds = draw(2, 3, nq, d, seed=19), draw(2, 3, nk, d, seed=20), draw(2, 3, nq, nk, seed=21)
    (right,) = autograd(lambda k: scale * (q @ k.mT), [k], [ds])
    look = f"The scale is {scale} here, and a factor of dK, once. The sum goes over queries: dS transposed."
    judge("dK", ask(answer.grad_k, ds=ds, q=q, scale=scale), right, look)


# 5.7 recompute_p


@pytest.mark.exercise("5.7")
@pytest.mark.parametrize("nq, nk, d, dv", SHAPES)
@pytest.mark.parametrize("hot", [1.0, 300.0])
def test_recompute(answer, nq, nk, d, dv, hot):
    """P comes back from Q, K and L, also for scores in the hundreds"""
    q, k = draw(2, 3, nq, d, seed=22, hot=hot), draw(2, 3, nk, d, seed=23)
    s = 0.4 * (q @ k.mT)
    got = ask(answer.recompute_p, q=q, k=k, lse=s.logsumexp(-1), scale=0.4)
    look = (
        "P = exp(scale * Q K^T - L). L is that of the scaled scores, in natural logarithms, one number a row."
    )
    judge("P", got, s.softmax(-1), look)


@pytest.mark.exercise("5.7")
def test_recompute_a_tile(answer):
    """a tile of P has the same numbers as that part of the whole P"""
    q, k = draw(2, 3, 9, 4, seed=24, hot=2.0), draw(2, 3, 12, 4, seed=25)
    s = 0.5 * (q @ k.mT)
    got = ask(
        answer.recompute_p, q=q[..., 2:7, :], k=k[..., 5:8, :], lse=s.logsumexp(-1)[..., 2:7], scale=0.5
    )
    look = (
        "A tile holds a part of each row, and its rows do not sum to 1: L already holds the whole row's sum."
    )
    judge("P[2:7, 5:8]", got, s.softmax(-1)[..., 2:7, 5:8], look)


@pytest.mark.exercise("5.7")
def test_recompute_masked(answer):
    """a weight is 0 where keep is False, and a row that keeps nothing is 0, not NaN"""
    q, k, keep = draw(2, 3, 8, 4, seed=26, hot=2.0), draw(2, 3, 5, 4, seed=27), causal_mask(8, 5)
    s = (0.5 * (q @ k.mT)).masked_fill(~keep, float("-inf"))
    right = s.softmax(-1).nan_to_num(0.0)
    got = ask(answer.recompute_p, q=q, k=k, lse=s.logsumexp(-1), scale=0.5, keep=keep)
    look = (
        "keep is True where the query attends. Rows 0 to 2 keep nothing, so their L is -inf.\n"
        "Whatever exp makes of S - L there, the weight is 0."
    )
    judge("P", got, right, look)


@pytest.mark.exercise("5.7")
def test_recompute_hidden_score_is_huge(answer):
    """a hidden score may be larger than every visible one"""
    q, k, keep = draw(6, 4, seed=28), draw(6, 4, seed=29), causal_mask(6, 6)
    k[5] = 4000 * q[0]  # hidden from rows 0 to 4; exp(S - L) is infinite in row 0
    s = (0.5 * (q @ k.mT)).masked_fill(~keep, float("-inf"))
    got = ask(answer.recompute_p, q=q, k=k, lse=s.logsumexp(-1), scale=0.5, keep=keep)
    judge(
        "P",
        got,
        s.softmax(-1),
        "Multiplying by keep leaves infinity * 0, which is NaN. masked_fill replaces.",
    )


# 5.8 key_pass and 5.9 query_pass

PASSES = {"key_pass": ("dk", "dv"), "query_pass": ("dq",)}
START = {
    "key_pass": "dK_j and dV_j start at zero with each tile of keys, and every tile of queries adds to them.",
    "query_pass": "dQ_i starts at zero with each tile of queries, and every tile of keys adds to it.",
}
INNER = {
    "key_pass": "The inner loop starts at the tile that holds the first query to see one of these keys.",
    "query_pass": "The inner loop ends one past the last key that the tile's last query sees.",
}


def both_passes(test):
    """The same claim for exercise 5.8 and for exercise 5.9."""
    ids = {"key_pass": "5.8", "query_pass": "5.9"}
    cases = [pytest.param(name, marks=pytest.mark.exercise(ids[name]), id=name) for name in PASSES]
    return pytest.mark.parametrize("which", cases)(test)


def pass_inputs(case):
    return {name: getattr(case, name) for name in ("dout", "q", "k", "v", "lse", "delta")}


def judge_pass(answer, which, case, block_q, block_k, look):
    """Run one pass on a solved case, and compare what it returns."""
    inputs = pass_inputs(case)
    options = {"scale": case.scale, "causal": case.causal, "block_q": block_q, "block_k": block_k}
    got = ask(getattr(answer, which), **inputs, **options)
    got = got if isinstance(got, tuple) else (got,)
    names = PASSES[which]
    assert len(got) == len(names), (
        f"{which} returned {len(got)} tensors, expected {len(names)}: {', '.join(names)}."
    )
    for name, x in zip(names, got):
        tile = block_q if name == "dq" else block_k
        judge(name, x, case.right[name], f"{case.asked}, block_q {block_q}, block_k {block_k}\n{look}", tile=tile)


@both_passes
def test_one_tile(answer, which):
    """when one tile holds everything, it is the formulas"""
    look = (
        "There is one tile of each, larger than both: P, dP, dS, and the gradients, added once. All zeros? Then it was never "
        "visited: a count of tiles is rounded up."
    )
    judge_pass(answer, which, solved(12, 20, 8, 5), 32, 32, look)


@both_passes
@pytest.mark.parametrize("block_q, block_k", BLOCKS)
def test_block_size(answer, which, block_q, block_k):
    """the block size does not change the answer"""
    judge_pass(answer, which, solved(32, 64, 8, seed=1), block_q, block_k, START[which])


@both_passes
@pytest.mark.parametrize(
    "nq, nk, d, dv", [(37, 53, 16, 5), (53, 37, 3, 16), (1, 71, 7, 7), (67, 1, 4, 9), (17, 16, 8, 8)]
)
def test_ragged(answer, which, nq, nk, d, dv):
    """lengths that the block does not divide, and values of another width than the keys"""
    look = f"The last tiles have {nq % 16} queries and {nk % 16} keys. Were they visited?\n{START[which]}"
    judge_pass(answer, which, solved(nq, nk, d, dv, seed=2), 16, 16, look)


@both_passes
def test_hot(answer, which):
    """scores in the hundreds"""
    look = "Every exponent is S - L with the L of the whole row: never above 0, so nothing overflows."
    judge_pass(answer, which, solved(29, 31, 16, hot=100.0, seed=6), 8, 8, look)


@both_passes
@pytest.mark.parametrize("scale", [0.07, -1.0])
def test_scale(answer, which, scale):
    """a scale of your own"""
    look = f"The scale is {scale} here. It belongs in S, and, once more, in dQ and dK."
    judge_pass(answer, which, solved(19, 25, 16, scale=scale, seed=7), 8, 8, look)


@both_passes
def test_no_large_tensor(answer, which):
    """nothing larger than an input or a pair of tiles is ever in memory"""
    case = solved(192, 192, 4, batch=1, heads=1, seed=9)
    options = {"scale": case.scale, "block_q": 16, "block_k": 16}
    assert_no_large_tensor(getattr(answer, which), pass_inputs(case), options)


@both_passes
def test_device(answer, which):
    """new tensors, masks too, are made on q's device"""
    inputs, options = pass_inputs(solved(16, 24, causal=True)), {"scale": 0.3, "causal": True, "block_q": 8, "block_k": 8}
    for device in ("cpu", "meta"):  # "meta" stands for a GPU: its tensors have shapes and a device, but no numbers
        try:
            getattr(answer, which)(**{name: x.to(device) for name, x in inputs.items()}, **options)
        except Exception as error:
            if device == "cpu":
                raise
            assert not re.search("(expected|same) device", str(error)), (
                "With the inputs on another device than the CPU, a tensor on the CPU met one of theirs. torch.zeros_like(k_j)\n"
                "and q.new_zeros(...) follow their tensor. causal_tile(...) and torch.zeros(...) need device=q.device."
            )


@both_passes
@pytest.mark.parametrize("hot", [2.0, 100.0])
@pytest.mark.parametrize("block_q, block_k", BLOCKS)
def test_causal(answer, which, block_q, block_k, hot):
    """causal: a hidden pair of query and key has no part in any gradient"""
    look = (
        "Each tile has its own mask, causal_tile(i, j, rows, columns, nq=nq, nk=nk, device=q.device), and its own rows of L.\n"
        f"And is a tile left out? {INNER[which]}"
    )
    judge_pass(answer, which, solved(64, 64, 8, causal=True, hot=hot, seed=3), block_q, block_k, look)


@both_passes
@pytest.mark.parametrize("nq, nk", [(23, 61), (1, 50), (16, 48)])
def test_causal_fewer_queries(answer, which, nq, nk):
    """causal with fewer queries than keys: the last query sees every key"""
    look = f"Query i sees key j if j <= i + Nk - Nq = i + {nk - nq}. Where do your loops start and end?"
    for block_q, block_k in BLOCKS:
        judge_pass(answer, which, solved(nq, nk, 8, causal=True, seed=4), block_q, block_k, look)


@both_passes
@pytest.mark.parametrize("nq, nk", [(61, 23), (50, 1), (48, 16)])
def test_causal_more_queries(answer, which, nq, nk):
    """causal with more queries than keys: a query that sees nothing has no gradient, and gives none"""
    look = (
        f"Query i sees key j if j <= i + Nk - Nq = i - {nq - nk}: the first {nq - nk} queries see nothing.\n"
        "Their L is -inf, and they add 0 to every gradient, not NaN. Where do your loops start and end?"
    )
    for block_q, block_k in BLOCKS:
        judge_pass(answer, which, solved(nq, nk, 8, causal=True, seed=5), block_q, block_k, look)


@both_passes
@pytest.mark.parametrize("nq, nk", [(48, 48), (24, 56), (56, 24), (45, 51)])
def test_hidden_tiles_are_skipped(answer, which, nq, nk):
    """causal: a pair of tiles with nothing to see is not loaded"""
    case, block = solved(nq, nk, 4, causal=True, batch=1, heads=1, seed=8), 8
    trace, watched = watch(**pass_inputs(case))
    getattr(answer, which)(**watched, scale=case.scale, causal=True, block_q=block, block_k=block)
    mask = causal_mask(nq, nk)
    for (q0, q1), (k0, k1) in trace.tiles(rows="q", columns="k", inner="q" if which == "key_pass" else "k"):
        assert mask[q0:q1, k0:k1].any(), (
            f"Nq {nq}, Nk {nk}, blocks of {block}: queries {q0} to {q1 - 1} met keys {k0} to {k1 - 1},\n"
            f"and none of them sees any. Query {q1 - 1} sees the keys up to {q1 - 1 + nk - nq}.\n"
            f"Let the inner loop {'start' if which == 'key_pass' else 'end'} where there is something to see."
        )


def assert_no_large_tensor(function, inputs, options):
    largest = largest_allocation(function, **inputs, **options)
    allowed = inputs["q"].numel()
    assert largest.elements <= allowed, (
        f"{function.__name__} made a tensor {tuple(largest.shape)}, with {largest.elements} numbers;\n"
        f"q has {allowed}, and a tile of P 256. Cut first, then multiply: P, dP and dS exist as tiles only."
    )


# 5.10 tiled_backward


def backward_inputs(case):
    return {name: getattr(case, name) for name in ("dout", "q", "k", "v", "out", "lse")}


def judge_backward(answer, case, look, *, plain=None, **options):
    got = ask(answer.tiled_backward, **backward_inputs(case), causal=case.causal, **options)
    assert isinstance(got, tuple) and len(got) == 3, (
        "tiled_backward returns three tensors: dq, dk, dv, in this order."
    )
    for name, x in zip(("dq", "dk", "dv"), got):
        judge(name, x, case.right[name], f"{case.asked}\n{look}", plain and plain[name])


def without_dlse(case):
    """The same case, with no gradient at lse."""
    inputs = [case.q, case.k, case.v]
    gradients = autograd(lambda q, k, v: naive(q, k, v, case)[0], inputs, [case.dout])
    case.right = dict(zip(("dq", "dk", "dv"), gradients))
    return case


def naive(q, k, v, case):
    """out and lse by the formula; rows with nothing to attend give 0 and -inf."""
    return naive_attention_with_lse(q, k, v, causal=case.causal, scale=case.scale)


BACKWARD_SHAPES = [(33, 47, False), (47, 47, True), (20, 41, True), (41, 20, True)]


@pytest.mark.exercise("5.10")
@pytest.mark.parametrize("nq, nk, causal", BACKWARD_SHAPES)
def test_backward(answer, nq, nk, causal):
    """dQ, dK and dV are autograd's"""
    case = without_dlse(solved(nq, nk, 16, 8, causal=causal, seed=10))
    look = "Are both passes right? Then look at what they got: D = rowsum(dO * O), scale, causal, blocks."
    judge_backward(answer, case, look, block_q=16, block_k=8)


@pytest.mark.exercise("5.10")
@pytest.mark.parametrize("nq, nk, causal", BACKWARD_SHAPES)
def test_backward_lse(answer, nq, nk, causal):
    """a gradient that arrives at L flows on to Q and K"""
    case = solved(nq, nk, 16, 8, causal=causal, seed=11)
    look = "dlse is given here. dL_i/dS_ij = P_ij, so dS = P * (dP - (D - dlse)): the passes get D - dlse."
    judge_backward(answer, case, look, dlse=case.dlse, block_q=16, block_k=8)


@pytest.mark.exercise("5.10")
@pytest.mark.parametrize("scale", [None, 0.0, 0.9])
def test_backward_scale(answer, scale):
    """scale=None means 1 / sqrt(D); any other number is taken as it is"""
    case = solved(21, 18, 16, 4, scale=scale, seed=12)
    look = f"The scale given is {scale}. Both passes get {case.scale:g}, from `options`."
    judge_backward(answer, case, look, dlse=case.dlse, scale=scale, block_q=16, block_k=16)


@pytest.mark.exercise("5.10")
def test_backward_blocks(answer):
    """the block sizes reach both passes: the gradients stay, and no large tensor is made"""
    case = solved(26, 34, 8, causal=True, seed=13)
    for block_q, block_k in BLOCKS:
        look = f"block_q {block_q}, block_k {block_k}: both passes get them from `options`."
        judge_backward(answer, case, look, dlse=case.dlse, block_q=block_q, block_k=block_k)
    case = solved(192, 192, 4, batch=1, heads=1, seed=13)
    assert_no_large_tensor(answer.tiled_backward, backward_inputs(case), {"block_q": 16, "block_k": 16})


@pytest.mark.exercise("5.10")
def test_backward_of_views(answer):
    """dO may be a view: one number seen as many, as out.sum().backward() sends it, or a transposed tensor"""
    case = solved(19, 23, 8, causal=True, seed=14)
    one = torch.ones((), dtype=torch.float64)
    for dout in (one.expand_as(case.out), case.dout.transpose(1, 2).contiguous().transpose(1, 2)):
        case.dout = dout
        look = f"dO is a view with strides {dout.stride()}: no writing into it, and no .view() of it."
        judge_backward(answer, without_dlse(case), look, block_q=8, block_k=8)


@pytest.mark.exercise("5.10")
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(answer, causal):
    """PyTorch's gradcheck finds no difference between these gradients and small steps"""
    case = solved(5, 4, 3, 2, causal=causal, batch=1, heads=1, seed=15)

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            out, lse = naive(q, k, v, case)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse[..., 1:]  # causal: row 0 sees nothing, and its L = -inf has no slope

        @staticmethod
        def backward(ctx, dout, dlse):
            dlse = torch.nn.functional.pad(dlse, (1, 0))
            return answer.tiled_backward(
                dout, *ctx.saved_tensors, dlse=dlse, causal=causal, block_q=2, block_k=3
            )

    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
    try:
        torch.autograd.gradcheck(Attention.apply, inputs)
    except GradcheckError as error:
        which = next((name for i, name in enumerate("qkv") if f"input {i}" in str(error)), "an input")
        raise AssertionError(
            f"gradcheck moved the numbers of {which} a little, and the outputs did not follow it.\n{error}"
        ) from None


@pytest.mark.exercise("5.10")
def test_backward_fp32(answer):
    """in fp32 it is as exact as the untiled formulas in fp32"""
    case = solved(67, 83, 16, 24, hot=3.0, causal=True, seed=16)
    for name in ("q", "k", "v", "dout", "out", "lse", "dlse"):
        setattr(case, name, getattr(case, name).float())
    look = "The formulas are right; the arithmetic loses digits. Is a sum or a tile kept in half precision?"
    judge_backward(answer, case, look, plain=untiled(case), dlse=case.dlse, block_q=16, block_k=32)


def untiled(case):
    """The untiled formulas at the case's dtype. The scale may go into Q, K or S: the least exact counts."""
    keep = causal_mask(case.q.shape[-2], case.k.shape[-2])
    delta = (case.dout * case.out).sum(-1) - case.dlse
    found = []
    for s in (
        (case.q * case.scale) @ case.k.mT,
        case.q @ (case.k * case.scale).mT,
        case.q @ case.k.mT * case.scale,
    ):
        p = (s - case.lse[..., None]).exp().masked_fill(~keep, 0.0)
        ds = p * (case.dout @ case.v.mT - delta[..., None])
        found.append(
            {"dq": ds @ case.k * case.scale, "dk": ds.mT @ case.q * case.scale, "dv": p.mT @ case.dout}
        )
    return {
        name: max((f[name] for f in found), key=lambda x: (x - case.right[name]).abs().max())
        for name in found[0]
    }


# 5.11 grouped_backward

GROUPS = (
    "With group = Hq / Hkv, query head h reads key head h // group: 0 0 1 1 for 4 query heads and 2 key heads. Every reader\n"
    "of a head sends its gradient back to it, and they add up."
)


def grouped(heads, kv_heads, nq=13, nk=17, d=8, dv=None, dtype=torch.float64, **options):
    """A case in which query heads share key heads, and what plain PyTorch makes of it at its own dtype."""
    case = make_case(2, heads, kv_heads, nq, nk, d, dv, dtype=dtype, hot=2.0, **options)
    case.dlse.zero_()
    right = truth(case)
    inputs = {name: getattr(case, name) for name in ("dout", "q", "k", "v")}
    return case, inputs | {"out": right["out"].to(dtype), "lse": right["lse"].to(dtype)}, right


def judge_grouped(answer, heads, kv_heads, look, block_q=8, block_k=8, **options):
    case, inputs, right = grouped(heads, kv_heads, **options)
    got = ask(answer.grouped_backward, **inputs, causal=case.causal, scale=case.scale, block_q=block_q, block_k=block_k)
    assert isinstance(got, tuple) and len(got) == 3, "grouped_backward returns three tensors: dq, dk, dv, in this order."
    plain = eager(case) if case.q.dtype == torch.float32 else {}
    for name, x in zip(("dq", "dk", "dv"), got):
        asked = f"{heads} query heads, {kv_heads} key heads, causal={case.causal}"
        judge(name, x, right[name], f"{asked}\n{look}", plain.get(name))


@pytest.mark.exercise("5.11")
def test_two_readers_of_one_head(answer):
    """two query heads read one key head: its gradients are the sum of both"""
    judge_grouped(answer, 2, 1, GROUPS, seed=21)


@pytest.mark.exercise("5.11")
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (6, 2), (6, 3), (8, 2)])
def test_groups(answer, heads, kv_heads):
    """each group of query heads sends its gradients to its own key head"""
    judge_grouped(answer, heads, kv_heads, GROUPS, seed=22)


@pytest.mark.exercise("5.11")
def test_a_head_for_each(answer):
    """as many key heads as query heads: nothing is added up"""
    judge_grouped(answer, 3, 3, "group is 1 here, and the answer is tiled_backward's. Is a number written in for the group?", seed=23)


@pytest.mark.exercise("5.11")
@pytest.mark.parametrize("nq, nk", [(19, 19), (9, 21), (21, 9)])
def test_grouped_options(answer, nq, nk):
    """causal, scale and the block sizes are passed on"""
    look = f"`**options` are those of tiled_backward: hand all of them on.\n{GROUPS}"
    judge_grouped(answer, 4, 2, look, nq=nq, nk=nk, dv=5, causal=True, scale=0.7, block_q=4, block_k=16, seed=24)
    _, inputs, _ = grouped(4, 2, 128, 128, 4)
    assert_no_large_tensor(answer.grouped_backward, inputs, {"block_q": 16, "block_k": 16})


@pytest.mark.exercise("5.11")
def test_grouped_fp32(answer):
    """in fp32 it is as exact as plain PyTorch"""
    judge_grouped(answer, 4, 2, "The formulas are right; the arithmetic loses digits. What is rounded?", nq=40, nk=50, d=16, dtype=torch.float32, seed=25)
