"""What an answer to chapter 07 must satisfy.

The truth is computed in fp64; the bound is that of flash_edu/testing.py. Tiles are small, so that short sequences have many.
Every run's outputs lie in memory full of NaN, between fences (frames.py).
"""

import dataclasses
import math

import pytest
import torch
from frames import assert_inside, framed, left_alone, nan_outputs

from flash_edu._environment import interpreting
from flash_edu.course import device, on_gpu, toy
from flash_edu.figures import trace_file, trace_triton
from flash_edu.testing import assert_close, eager, make_case, truth

pytestmark = pytest.mark.filterwarnings(
    "ignore:All-NaN slice"
)  # NumPy's word on a tile of NaN, which some claims plant

HALF = [torch.float16, torch.bfloat16] if on_gpu else [torch.float16]  # the interpreter gets bfloat16 wrong
STORES = "rows are stored with mask=rows[:, None] < Nq (O) and mask=rows < Nq (L), at the addresses of their own tile."
ADDRESSES = "The pointers already stand at your first row: is the address counted with r?"


def case_of(nq, nk, d=16, batch=1, heads=2, **options):
    """Random inputs, in memory full of NaN: reading past the end does no harm, and always shows."""
    options = {"hot": 3.0, "seed": nq + nk} | options
    case = make_case(batch, heads, nq=nq, nk=nk, d=d, device=device, **options)
    return dataclasses.replace(case, q=framed(case.q), k=framed(case.k), v=framed(case.v))


def run(answer, case, block_m=16, block_n=16):
    """The learner's out and lse."""
    inputs = left_alone("flash_forward", q=case.q, k=case.k, v=case.v)
    look = f"Look at the stores: {STORES}" if case.q.shape[2] % block_m else ADDRESSES
    with inputs, nan_outputs(look, "O", "L"):
        return answer.flash_forward(
            case.q, case.k, case.v, causal=case.causal, scale=case.scale, block_m=block_m, block_n=block_n
        )


def judge(answer, case, look, block_m=16, block_n=16, nan=""):
    """out and lse are as near to the truth as plain PyTorch's at the same dtype. `nan` is said if there is NaN in out."""
    out, lse = run(answer, case, block_m, block_n)
    right, plain = truth(case), eager(case)
    shape, causal = tuple(case.q.shape), f", causal={case.causal}" if case.causal else ""
    asked = f"q {shape}, Nk {case.k.shape[2]}, {str(case.q.dtype)[6:]}, tiles {block_m} x {block_n}{causal}"
    for name, got, key in (("O", out, "out"), ("L", lse, "lse")):
        try:
            assert_close(name, got, right[key], plain[key], tile=block_m)
        except AssertionError as wrong:
            look = f"{look}\n{nan}" if nan and out.isnan().any() else look
            look = about_lse(lse, right["lse"]) if name == "L" else first_of_lse(lse, right["lse"]) + look
            raise AssertionError(f"{asked}\n{wrong}\n{look}") from None
    return out, lse


def first_of_lse(got, want):
    """A line on L, for failures that show only O: right L means that m and l are right too."""
    if got.shape != want.shape:
        return ""
    return f"The first L is {got.flatten()[0].item():.6g}, expected {want.flatten()[0].item():.6g}.\n"


def about_lse(got, want):
    """O is right and L is not: what the numbers of L say."""
    seen = want.isfinite()
    if seen.any() and torch.allclose(
        got[seen].double() * math.log(2), want[seen].double(), rtol=1e-4, atol=1e-4
    ):
        return "O is right, and L is in base 2. L is the natural log: multiply it by log(2)."
    return "O is right and L is not. L = m + log(l), natural log, one number per row, with the final m and l."


def rounded(x):
    return [round(number, 4) for number in x.tolist()]


# 7.1 flash_forward


@pytest.mark.exercise("7.1")
def test_by_hand(answer):
    """the toy, four times over: the same O, and L larger by log 4"""
    wide = [torch.nn.functional.pad(x, (0, 16 - x.shape[1])).repeat(4, 1) for x in (toy.q, toy.k, toy.v)]
    q, k, v = (
        x.to(device)[None, None] for x in wide
    )  # (1, 1, 16, 16): four rows repeated, columns of 0 added
    case = dataclasses.replace(make_case(heads=1, nq=16, nk=16, d=16), q=q, k=k, v=v, scale=toy.scale)
    out, lse = (x.cpu() for x in run(answer, case))
    want = toy.scores.softmax(-1) @ toy.v
    got = out[0, 0, :4, :2]
    assert torch.allclose(got, want, rtol=1e-5), (
        f"The first four rows of O are\n{got}\nexpected, as in chapter 01,\n{want}\n"
        "Each key stands there four times, so each has a quarter of the weight, four times. One tile holds all keys:\n"
        "print(s) in the kernel, and compare it with toy.scores; then p, then l."
    )
    want = toy.scores.logsumexp(-1) + torch.tensor(4.0).log()
    assert torch.allclose(lse[0, 0, :4], want, rtol=1e-5), (
        f"L = {rounded(lse[0, 0, :4])}\nexpected {rounded(want)}\n{about_lse(lse[0, 0, :4], want)}"
    )


@pytest.mark.exercise("7.1")
@pytest.mark.parametrize("nk", [16, 32, 112])
def test_many_tiles_of_keys(answer, nk):
    """O and L are right however many tiles of keys there are"""
    judge(
        answer,
        case_of(16, nk),
        MERGE if nk > 16 else "One tile holds all keys here: there is nothing to merge.",
    )


MERGE = (
    "When a later tile has a larger maximum, what l and acc hold was measured against the old one: multiply both by\n"
    "alpha = exp(m - m_new), and keep m_new as the next tile's m."
)


@pytest.mark.exercise("7.1")
def test_maximum_in_any_tile(answer):
    """the largest score may come in the first tile or in the last"""
    case = case_of(16, 64, hot=1.0)
    for start in (0, 48):
        k = case.k.clone()
        k[:, :, start : start + 16] *= 12  # these keys have the largest scores of every row
        judge(
            answer,
            dataclasses.replace(case, k=k),
            f"Keys {start} to {start + 15} have the largest scores.\n{MERGE}",
        )


@pytest.mark.exercise("7.1")
def test_every_tile_of_queries(answer):
    """every row of every head is written, by the program that owns it"""
    judge(
        answer,
        case_of(48, 32, batch=2, heads=3),
        "If only the first tile or the first head is right: Q, O and L already point at your own rows,\n"
        "so your addresses use r, 0 to BLOCK_M - 1. NaN is memory that nobody wrote.",
    )


@pytest.mark.exercise("7.1")
@pytest.mark.parametrize("block_m, block_n", [(16, 32), (32, 16), (64, 32), (32, 64)])
def test_block_size(answer, block_m, block_n):
    """block size does not change the answer"""
    look = "The same problem with tiles of 16 x 16 is another claim. Is a 16, or the wrong BLOCK, written in somewhere?"
    judge(answer, case_of(64, 64, heads=1), look, block_m, block_n)


@pytest.mark.exercise("7.1")
@pytest.mark.parametrize("d", [32, 64, 128])
def test_head_dim(answer, d):
    """the head dimension may be 32, 64 or 128"""
    judge(answer, case_of(16, 32, d=d), "Is a 16 written in where D belongs?")


@pytest.mark.exercise("7.1")
@pytest.mark.parametrize("hot", [300.0, 3e4])
def test_hot_scores(answer, hot):
    """scores in the thousands give finite, right numbers"""
    look = "exp(1000) is infinite. Subtract m_new, the row's maximum so far, before tl.exp: all exponents are then 0 or less."
    judge(answer, case_of(16, 48, hot=hot), look)


@pytest.mark.exercise("7.1")
def test_scores_far_below_zero(answer):
    """scores far below zero are as good as any"""
    for size, where in ((50, "far above"), (-1, "below"), (-50, "far below")):
        case = case_of(16, 48)
        case = dataclasses.replace(case, q=size * case.q.abs(), k=case.k.abs())
        look = f"Every score is {where} 0 here. The running maximum starts at -inf: 0 or -1 may be above all of them."
        judge(answer, case, look)


@pytest.mark.exercise("7.1")
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.4])
def test_scale(answer, scale):
    """the scale that was asked for is applied, once"""
    look = f"scale={scale}: the scores are {scale} * Q K^T, and nothing else; the kernel gets the number as `scale`."
    judge(answer, case_of(16, 32, scale=scale, hot=1.0), look)


@pytest.mark.exercise("7.1")
def test_default_scale(answer):
    """without a scale, scores are divided by sqrt(D)"""
    look = "Without a scale the wrapper passes 1 / sqrt(D); the kernel multiplies every score by it, before softmax."
    judge(answer, case_of(16, 32, d=64, hot=2.0), look)


@pytest.mark.exercise("7.1")
@pytest.mark.parametrize("nq, nk", [(16, 96), (96, 16)])
def test_lengths_differ(answer, nq, nk):
    """there may be more keys than queries, or fewer"""
    look = "The loop runs over the keys, Nk of them; the programs are for the queries, Nq of them. Is one taken for the other?"
    judge(answer, case_of(nq, nk), look)


@pytest.mark.exercise("7.1")
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(answer, dtype):
    """half precision in, half precision out, and float32 on the way"""
    out, lse = judge(answer, case_of(32, 64, dtype=dtype, hot=1.0), HALVES)
    assert out.dtype == dtype and lse.dtype == torch.float32, (
        f"O is {out.dtype} and L is {lse.dtype}, expected {dtype} and torch.float32."
    )


HALVES = (
    "m, l and acc are float32 whatever the inputs are; tl.dot adds up in float32 by itself. Only p is rounded, to v's\n"
    "dtype, and O once, when it is stored."
)


@pytest.mark.exercise("7.1")
@pytest.mark.parametrize("dtype", HALF)
def test_accumulator(answer, dtype):
    """a sum that float16 cannot hold: acc grows far beyond 65504"""
    case = case_of(16, 512, dtype=dtype, hot=0.1)
    case = dataclasses.replace(case, v=case.v + 250)  # acc is not divided yet: up to 512 * 250
    judge(
        answer,
        case,
        f"V is near 250 and there are 512 keys: before the division, acc is near 128000.\n{HALVES}",
        16,
        64,
    )


@pytest.mark.exercise("7.1")
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_any_strides(answer, order):
    """inputs may be views: heads and rows exchanged, columns apart"""
    case = case_of(16, 32, batch=2, heads=2)
    views = (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # stored as (B, N, H, D)
        lambda x: x.mT.contiguous().mT,  # stored column by column
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],  # every second column of a wider tensor
    )
    q, k, v = (views[i](x) for i, x in zip(order, (case.q, case.k, case.v)))
    judge(
        answer,
        dataclasses.replace(case, q=q, k=k, v=v),
        "The same numbers, stored in another order. Every row index is multiplied by its own tensor's row stride, every\n"
        "column index by its own column stride: stride_qd is not always 1, and K's strides are not V's, nor O's those of Q.",
    )


@pytest.mark.exercise("7.1")
def test_repeated_runs(answer):
    """two runs give the same bits"""
    case = case_of(32, 64)
    for name, first, second in zip("OL", run(answer, case), run(answer, case)):
        assert first.equal(second), (
            f"{name} differs from one run to the next. Does a program write rows of another?"
        )


# 7.2 causal


@pytest.mark.exercise("7.2")
def test_first_row(answer):
    """the first word sees itself, and nothing else"""
    case = case_of(16, 16, causal=True)
    out, lse = run(answer, case)
    right = truth(case)
    assert torch.allclose(out[:, :, 0], case.v[:, :, 0], rtol=1e-5), (
        f"O[0] = {out[0, 0, 0, :3].tolist()}..., expected V[0] = {case.v[0, 0, 0, :3].tolist()}...\n"
        f"L[0] = {lse[0, 0, 0].item():.4f}, expected {right['lse'][0, 0, 0].item():.4f}, the one score it sees.\n"
        f"{saw(out, lse)}\n{RULE}"
    )


RULE = "Row i sees key j when j <= i + Nk - Nq: j = i too. tl.where(keys[None, :] <= rows[:, None] + Nk - Nq, s, -inf)."


def saw(out, lse):
    if lse[0, 0, 0].isinf() or out[0, 0, 0].isnan().any():
        return "Your first row saw no key at all: is the mask < where it should be <=?"
    return "Your first row saw later keys. If 7.2 is not written yet, this is what you get."


@pytest.mark.exercise("7.2")
@pytest.mark.parametrize("block_m, block_n", [(16, 16), (32, 16), (16, 64), (16, 32), (64, 64)])
def test_causal(answer, block_m, block_n):
    """causal is right for any shape of tile"""
    look = f"{RULE}\nIf only some rows are wrong, look at where the loop ends, and at which tiles are masked."
    judge(answer, case_of(64, 64, heads=1, causal=True), look, block_m, block_n)


@pytest.mark.exercise("7.2")
@pytest.mark.parametrize(
    "nq, nk, block_m, block_n", [(16, 64, 16, 16), (32, 80, 16, 16), (32, 96, 32, 16), (32, 64, 16, 32)]
)
def test_fewer_queries(answer, nq, nk, block_m, block_n):
    """fewer queries than keys: the last query sees every key"""
    look = f"Nk - Nq = {nk - nq}: row 0 already sees {nk - nq + 1} keys. Both the mask and the end of the loop need Nk - Nq.\n{RULE}"
    judge(answer, case_of(nq, nk, heads=1, causal=True), look, block_m, block_n)


@pytest.mark.exercise("7.2")
@pytest.mark.parametrize(
    "nq, nk, block_m, block_n", [(64, 32, 16, 16), (64, 48, 32, 16), (64, 16, 32, 16), (48, 32, 16, 32)]
)
def test_more_queries(answer, nq, nk, block_m, block_n):
    """more queries than keys: rows that see nothing give O = 0 and L = -inf"""
    case = case_of(nq, nk, causal=True)
    out, lse = run(answer, case, block_m, block_n)
    empty = nq - nk
    first = (
        f"With {nq} queries and {nk} keys, rows 0 to {empty - 1} see no key. Tiles are {block_m} x {block_n}."
    )
    counts = {"rows of O": int(out.isnan().any(-1).sum()), "numbers of L": int(lse.isnan().sum())}
    found = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
    assert not found, (
        f"{first}\nNaN: {found}.\n"
        "Three places can make NaN: s - m_new in p and m - m_new in alpha, where both are -inf, and acc / l, where both are 0."
    )
    assert (out[:, :, :empty] == 0).all() and (lse[:, :, :empty] == float("-inf")).all(), (
        f"{first}\nO[0] = {out[0, 0, 0, :3].tolist()}..., expected zeros. L[0] = {lse[0, 0, 0].item()}, expected -inf.\n{RULE}"
    )
    judge(answer, case, f"{first} They are right; later rows are not.\n{RULE}", block_m, block_n)


@pytest.mark.exercise("7.2")
def test_hidden_keys_do_not_matter(answer):
    """changing what a row cannot see does not change a bit of it"""
    case = case_of(32, 32, causal=True)
    k, v = case.k.clone(), case.v.clone()
    k[:, :, 21:], v[:, :, 21:] = 30 * k[:, :, 21:], -7.0
    before, after = run(answer, case), run(answer, dataclasses.replace(case, k=k, v=v))
    for name, x, y in zip("OL", before, after):
        x, y = x[:, :, :21], y[:, :, :21]
        changed = (x != y) & ~(x.isnan() & y.isnan())
        changed = changed.any(-1) if name == "O" else changed
        assert not changed.any(), (
            f"Keys 21 to 31 changed, and so did {name} of row {int(changed[0, 0].int().argmax())}, which must not see them.\n"
            f"A key is hidden by a score of -inf before m_new, p and l are computed from s.\n{RULE}"
        )


@pytest.mark.exercise("7.2")
@pytest.mark.parametrize("nq, nk", [(48, 48), (32, 64), (64, 48)])
def test_walk_stops(answer, nq, nk):
    """the walk stops at the diagonal: tiles that no row of mine sees are not read"""
    case = case_of(nq, nk, causal=True)
    judge(answer, case, RULE)
    seen = 16 + nk - nq  # what the first tile of queries sees
    k, v = case.k.clone(), case.v.clone()
    k[:, :, seen:], v[:, :, seen:] = float("nan"), float("nan")
    out, lse = run(answer, dataclasses.replace(case, k=k, v=v))
    right, plain = truth(case), eager(case)
    for name, got, key in (("O", out, "out"), ("L", lse, "lse")):
        try:
            assert_close(name, got[:, :, :16], right[key][:, :, :16], plain[key][:, :, :16])
        except AssertionError as wrong:
            raise AssertionError(
                f"Nq {nq}, Nk {nk}. Rows 0 to 15 see keys 0 to {seen - 1}. They come out right, but not if K and V are NaN from\n"
                f"key {seen} on:\n{wrong}\nMasked scores are not enough: 0 * NaN is NaN, and half of the reading and multiplying is for nothing.\n"
                "The loop may end at (i + 1) * BLOCK_M + Nk - Nq, or at Nk if that is smaller."
            ) from None


@pytest.mark.exercise("7.2")
def test_causal_is_a_choice(answer):
    """causal=False still lets every row see every key"""
    judge(
        answer,
        case_of(32, 48),
        "CAUSAL is False here: the mask and the shorter walk belong inside `if CAUSAL:`.",
    )


@pytest.mark.exercise("7.2")
def test_causal_hot(answer):
    """a hidden score may be the largest, and the visible ones far below zero"""
    case = case_of(32, 32, causal=True)
    case = dataclasses.replace(case, q=-50 * case.q.abs(), k=case.k.abs())
    k = case.k.clone()
    k[:, :, 20:] *= -1  # keys 20 to 31 have large scores; rows before 20 must not see them
    look = "Hide a score with -inf: 0 is above every visible score here, and -1e4 is too near. Mask s before m_new is taken."
    judge(answer, dataclasses.replace(case, k=k), look)


# 7.3 ragged


@pytest.mark.exercise("7.3")
@pytest.mark.parametrize("nk", [5, 17, 31])
def test_ragged_keys(answer, nk):
    """a number of keys that the tile does not divide"""
    judge(
        answer,
        case_of(16, nk),
        f"Nk = {nk} and tiles of 16: the last one has {-nk % 16} keys too many.\n{TAIL}",
        nan=NAN,
    )


TAIL = (
    "A key that does not exist must weigh nothing: its score must be -inf. Loaded as zeros, it has the score 0, and\n"
    "exp(0 - m) joins l."
)
NAN = (
    "There is NaN in O, and in memory past the end of K and V. Do both loads have mask=keys[:, None] < Nk, and other=0.0?\n"
    "0 * NaN is NaN, so a weight of 0 does not stop it. Rows of O that nobody wrote are NaN too: their mask is rows < Nq."
)


@pytest.mark.exercise("7.3")
@pytest.mark.parametrize("nk", [19, 3])
def test_ragged_keys_below_zero(answer, nk):
    """a key that does not exist takes no weight from scores far below zero"""
    case = case_of(16, nk)
    case = dataclasses.replace(case, q=-20 * case.q.abs(), k=case.k.abs())
    judge(
        answer,
        case,
        f"All real scores are far below 0 here, so a score of 0 would take all of the weight.\n{TAIL}",
        nan=NAN,
    )


@pytest.mark.exercise("7.3")
@pytest.mark.parametrize("nq", [5, 17, 31])
def test_ragged_queries(answer, nq):
    """a number of queries that the tile does not divide"""
    look = f"Nq = {nq} and tiles of 16. Rows from Nq on belong to the next head, or to nobody: {STORES}"
    judge(answer, case_of(nq, 16, batch=2, heads=2), look)


@pytest.mark.exercise("7.3")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "nq, nk, block_m, block_n", [(37, 53, 16, 16), (53, 37, 16, 32), (61, 61, 32, 16), (23, 89, 64, 32)]
)
def test_primes(answer, nq, nk, block_m, block_n, causal):
    """prime lengths, causal and not"""
    look = f"{TAIL}\nCausal with ragged lengths: the diagonal is still j <= i + Nk - Nq, counted in real rows and keys."
    judge(answer, case_of(nq, nk, heads=1, causal=causal), look, block_m, block_n, NAN)


@pytest.mark.exercise("7.3")
@pytest.mark.parametrize("nq, nk", [(1, 1), (1, 23), (3, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_shorter_than_a_tile(answer, nq, nk, causal):
    """sequences shorter than a tile"""
    case = case_of(nq, nk, batch=3, heads=3, causal=causal)
    judge(answer, case, f"One tile holds everything, and most of it does not exist.\n{TAIL}", 32, 32, NAN)


@pytest.mark.exercise("7.3")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("causal", [False, True])
def test_ragged_half(answer, dtype, causal):
    """ragged in half precision, with larger tiles"""
    judge(answer, case_of(77, 101, d=32, dtype=dtype, causal=causal, hot=1.0), TAIL, 64, 32, NAN)


@pytest.mark.exercise("7.3")
def test_nan_around_the_inputs(answer):
    """memory around Q, K and V is never used"""
    judge(answer, case_of(21, 27), TAIL, nan=NAN)


@pytest.mark.exercise("7.3")
def test_no_access_outside(answer):
    """no program reads or writes outside its tensors"""
    case = case_of(21, 27)
    tensors = {"q": case.q, "k": case.k, "v": case.v}
    tile = {"block_m": 16, "block_n": 16}
    if interpreting():
        with nan_outputs(f"Look at the stores: {STORES}", "O", "L"):
            trace = trace_triton(lambda: answer.flash_forward(*tensors.values(), **tile), tensors)
    else:
        trace = trace_file(answer.__file__, "flash_forward", tensors, **tile)
    assert_inside(trace, "mask=rows[:, None] < Nq on Q and O, rows < Nq on L, keys[:, None] < Nk on K and V.")
