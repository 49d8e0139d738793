"""What an answer to chapter 08 must satisfy.

Each kernel is judged alone: O, L and Delta that it needs are computed here, in fp64. The bound is that of flash_edu/testing.py.
Tiles are small, so that short sequences have many. Every run's outputs lie in memory full of NaN (frames.py).
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from frames import assert_inside, framed, left_alone, nan_outputs

from flash_edu._environment import interpreting
from flash_edu.course import device, on_gpu, toy
from flash_edu.figures import trace_file, trace_triton
from flash_edu.testing import assert_close, eager, results_from_saved, make_case, truth

pytestmark = pytest.mark.filterwarnings(
    "ignore:All-NaN slice"
)  # NumPy's word on a tile of NaN, which some claims plant

HALF = [torch.float16, torch.bfloat16] if on_gpu else [torch.float16]  # the interpreter gets bfloat16 wrong


def case_of(nq, nk, d=16, batch=1, heads=2, **options):
    """Random inputs, in memory full of NaN: reading past the end does no harm, and always shows."""
    options = {"hot": 3.0, "seed": nq + nk} | options
    case = make_case(batch, heads, nq=nq, nk=nk, d=d, device=device, **options)
    return dataclasses.replace(
        case, **{name: framed(getattr(case, name)) for name in ("q", "k", "v", "dout")}
    )


def solve(case):
    """What the kernels are given: O, L, dL and Delta as the forward and the delta kernel leave them; and the right gradients."""
    right = truth(case)
    out, lse = right["out"].to(case.q.dtype), right["lse"].float()
    dlse = case.dlse.masked_fill(lse.isinf(), 0.0)
    delta = ((case.dout.double() * out.double()).sum(-1) - dlse).float()
    plain = eager(case)
    for name, x in results_from_saved(
        case, out, lse
    ).items():  # O and L are rounded, and P = exp(S - L) with them
        if (x - right[name]).abs().max() > (plain[name] - right[name]).abs().max():
            plain[name] = x
    asked = f"q {tuple(case.q.shape)}, Nk {case.k.shape[2]}, {str(case.q.dtype)[6:]}, causal={case.causal}"
    scale = case.q.shape[-1] ** -0.5 if case.scale is None else case.scale
    return SimpleNamespace(
        out=out, lse=lse, dlse=dlse, delta=delta, right=right, plain=plain, asked=asked, scale=scale
    )


OUTPUTS = {"flash_delta": ["Delta"], "flash_dkdv": ["dK", "dV"], "flash_dq": ["dQ"]}  # in the order in which they are made


def ask(answer, name, case, given, **tile):
    """answer.flash_dkdv or answer.flash_dq on this case."""
    inputs = {"q": case.q, "k": case.k, "v": case.v, "dout": case.dout, "lse": given.lse, "delta": given.delta}
    if name == "flash_dkdv":
        mask, look = "keys[:, None] < Nk", "The pointers already stand at your first key: is the address counted with c?"
        ragged = case.k.shape[2] % tile["block_n"]
    else:
        mask, look = "rows[:, None] < Nq", "The pointers already stand at your first row: is the address counted with r?"
        ragged = case.q.shape[2] % tile["block_m"]
    look = f"Does its store have mask={mask}? {look}" if ragged else look
    with left_alone(name, **inputs), nan_outputs(look, *OUTPUTS[name]):
        return getattr(answer, name)(
            case.q,
            case.k,
            case.v,
            case.dout,
            given.lse,
            given.delta,
            causal=case.causal,
            scale=case.scale,
            **tile,
        )


def compare(name, got, given, look, tile=None, nan=""):
    """`nan` is said if there is NaN in got."""
    key = name.lower()
    look = f"{look}\n{nan}" if nan and got.isnan().any() else look
    try:
        assert_close(name, got, given.right[key], given.plain[key], tile=tile)
    except AssertionError as wrong:
        said = about_scale(name, got.double(), given.right[key], given.scale) if name != "dV" else None
        raise AssertionError(f"{given.asked}\n{wrong}\n{said or look}") from None


def about_scale(name, got, want, scale):
    """The one mistake that the numbers themselves show."""
    if scale in (0, 1) or not got.isfinite().all():
        return None
    size = want.abs().max()
    if torch.allclose(got * scale / size, want / size, rtol=1e-2, atol=1e-3):
        return f"Every number of {name} is 1 / scale times too large: S = scale Q K^T, so {name} is multiplied by scale, once."
    if torch.allclose(got / size, want * scale / size, rtol=1e-2, atol=1e-3 * scale**2):
        return f"Every number of {name} is scale times too small: it was multiplied by scale twice."
    return None


def judge_dkdv(answer, case, look, block_m=16, block_n=16, nan=""):
    given = solve(case)
    dk, dv = ask(answer, "flash_dkdv", case, given, block_m=block_m, block_n=block_n)
    given.asked += f", tiles of {block_m} queries and {block_n} keys"
    compare("dV", dv, given, look, block_n, nan)
    compare("dK", dk, given, f"dV is right, so P is. {DK}\n{look}", block_n, nan)


def judge_dq(answer, case, look, block_m=16, block_n=16, nan=""):
    given = solve(case)
    dq = ask(answer, "flash_dq", case, given, block_m=block_m, block_n=block_n)
    given.asked += f", tiles of {block_m} queries and {block_n} keys"
    compare("dQ", dq, given, look, block_m, nan)


DK = (
    "Look at dP^T = V dO^T, at dS^T = P^T * (dP^T - Delta) with Delta along the queries, and at dK += dS^T Q."
)
DQ = "P = exp(S - L), dP = dO V^T, dS = P * (dP - Delta) with one Delta per row, dQ += dS K, and scale once."
PT = "S^T = scale K Q^T has a row per key, so L and Delta are [None, :], and P^T = exp(S^T - L) needs no maximum."
RULE = "Query i sees key j when j <= i + Nk - Nq; the score of any other pair is -inf before exp."


WAYS = (
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # stored as (B, N, H, D)
    lambda x: x.mT.contiguous().mT,  # stored column by column
    lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],  # every second column of a wider tensor
    lambda x: torch.cat([x, x], dim=2)[:, :, : x.shape[2]],  # heads further apart
)


def views(case, order):
    """The same numbers in other orders in memory, a different one for each of q, k, v and dout."""
    names = ("q", "k", "v", "dout")
    return dataclasses.replace(case, **{name: WAYS[i](getattr(case, name)) for i, name in zip(order, names)})


STRIDES = (
    "The same numbers, stored in another order. Every row index is multiplied by its own tensor's row stride, every\n"
    "column index by its own column stride. dO may even have strides of 0."
)


# 8.1 delta


@pytest.mark.exercise("8.1")
def test_delta_by_hand(answer):
    """three rows that you can check by hand"""
    dout, out = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 16)
    dout[0, 0, :, :2] = torch.tensor([[1.0, 2.0], [0.0, 3.0], [1.0, 1.0]])
    out[0, 0, :, :2] = torch.tensor([[5.0, 1.0], [9.0, 2.0], [4.0, -4.0]])
    dlse = torch.tensor([[[0.0, 1.0, 2.0]]])
    with nan_outputs("Look at the store: mask=rows < Nq, at Delta + r.", "Delta"):
        got = answer.flash_delta(dout.to(device), out.to(device), dlse.to(device), block_m=16).cpu()
    assert got.flatten().tolist() == [7.0, 5.0, -2.0], (
        f"dO = [1, 2], [0, 3], [1, 1]   O = [5, 1], [9, 2], [4, -4]   dL = 0, 1, 2\nDelta = {got.flatten().tolist()}, "
        "expected [7, 5, -2].\nDelta = rowsum(dO * O) - dL: 1*5 + 2*1 - 0 = 7, then 0*9 + 3*2 - 1 = 5, then 4 - 4 - 2 = -2."
    )


def judge_delta(answer, case, look, dlse=True, block_m=16, way=lambda x: x):
    """`way` lays O out in memory."""
    given = solve(case)
    given.out = way(given.out)
    gradient = given.dlse if dlse else None
    inputs = {"dout": case.dout, "out": given.out} | ({"dlse": gradient} if dlse else {})
    look_outside = "Look at the store: mask=rows < Nq, at Delta + r."
    with left_alone("flash_delta", **inputs), nan_outputs(look_outside, "Delta"):
        got = answer.flash_delta(case.dout, given.out, gradient, block_m=block_m)
    want = (case.dout.double() * given.out.double()).sum(-1) - (given.dlse.double() if dlse else 0)
    plain = (case.dout.float() * given.out.float()).sum(-1) - (given.dlse if dlse else 0)
    try:
        assert_close("Delta", got, want, plain, tile=block_m)
    except AssertionError as wrong:
        raise AssertionError(
            f"dO {tuple(case.dout.shape)}, {str(case.dout.dtype)[6:]}\n{wrong}\n{look}"
        ) from None


@pytest.mark.exercise("8.1")
@pytest.mark.parametrize("nq, d", [(37, 16), (1, 32), (32, 128)])
def test_delta(answer, nq, d):
    """every row of every head, at any length"""
    look = "Every program writes its own rows, those below Nq. NaN is memory that nobody wrote."
    judge_delta(answer, case_of(nq, 8, d=d, batch=2, heads=3), look)


@pytest.mark.exercise("8.1")
def test_delta_without_dlse(answer):
    """without a gradient of L, nothing is subtracted"""
    look = (
        "HAS_DL is False here: Delta = rowsum(dO * O), and dL must not be read. Is the load inside `if HAS_DL:`?"
    )
    judge_delta(answer, case_of(21, 8), look, dlse=False)


@pytest.mark.exercise("8.1")
def test_delta_block_size(answer):
    """block size does not change Delta"""
    for block_m in (16, 32, 128):
        judge_delta(
            answer,
            case_of(70, 8),
            f"BLOCK_M = {block_m}. Is a number written in where BLOCK_M belongs?",
            block_m=block_m,
        )


@pytest.mark.exercise("8.1")
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 0, 1, 2), (1, 2, 3, 0)])
def test_delta_strides(answer, order):
    """dO and O may be any views"""
    judge_delta(answer, views(case_of(21, 8, batch=2, heads=3), order), STRIDES, way=WAYS[order[0]])


@pytest.mark.exercise("8.1")
def test_delta_of_a_sum(answer):
    """out.sum().backward() sends one number for all of dO: every stride is 0"""
    case = case_of(21, 8)
    case = dataclasses.replace(case, dout=torch.ones((), device=device).expand(case.dout.shape))
    judge_delta(answer, case, STRIDES)


@pytest.mark.exercise("8.1")
@pytest.mark.parametrize("dtype", HALF)
def test_delta_half(answer, dtype):
    """half-precision inputs are multiplied and added up in float32"""
    case = case_of(21, 8, d=64, dtype=dtype, hot=0.5)
    case = dataclasses.replace(case, dout=200 * case.dout, v=200 * case.v)
    look = "Products reach 10^5 here, and float16 ends at 65504: do.to(tl.float32) * o.to(tl.float32), then tl.sum."
    judge_delta(answer, case, look)


@pytest.mark.exercise("8.1")
def test_delta_stays_inside(answer):
    """no program reads or writes outside its tensors"""
    case = case_of(21, 8)
    tensors = {"do": case.dout, "o": framed(solve(case).out), "dl": framed(case.dlse).contiguous()}
    assert_inside(
        record(answer, "flash_delta", tensors, block_m=16),
        "mask=rows[:, None] < Nq on dO and O, rows < Nq on dL and Delta.",
    )


def record(answer, function, tensors, **options):
    """What the kernel reads and writes, as the interpreter sees it."""
    if not interpreting():
        return trace_file(answer.__file__, function, tensors, **options)
    with nan_outputs("Look at the mask of its store.", *OUTPUTS[function]):
        return trace_triton(lambda: getattr(answer, function)(*tensors.values(), **options), tensors)


def inputs_of(case, given):
    return {"q": case.q, "k": case.k, "v": case.v, "do": case.dout, "l": given.lse, "delta": given.delta}


# 8.2 dkdv


def toy_case():
    """The toy with columns of zeros, and a gradient of whole numbers."""
    q, k, v = (
        torch.nn.functional.pad(x, (0, 16 - x.shape[1]))[None, None].to(device) for x in (toy.q, toy.k, toy.v)
    )
    dout = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -1.0]])
    dout = torch.nn.functional.pad(dout, (0, 14))[None, None].to(device)
    blank = make_case(heads=1, nq=4, nk=4, d=16, device=device)
    return dataclasses.replace(blank, q=q, k=k, v=v, dout=dout, scale=toy.scale)


@pytest.mark.exercise("8.2")
def test_dkdv_toy(answer):
    """the toy: four words in a tile of 16"""
    judge_dkdv(
        answer,
        toy_case(),
        f"{PT}\nPrint s_t, p_t and dp_t: S, P and dP of the notebook, transposed. delta is another one here, and ds_t with it.",
    )


@pytest.mark.exercise("8.2")
@pytest.mark.parametrize("nq", [16, 32, 80])
def test_dkdv_many_tiles(answer, nq):
    """dK and dV add up over all tiles of queries"""
    judge_dkdv(answer, case_of(nq, 16), f"{PT}\ndv and dk are sums over every tile of queries, from 0 to Nq.")


@pytest.mark.exercise("8.2")
def test_dkdv_every_tile(answer):
    """every row of every head is written, by the program that owns it"""
    look = "K, V, dK and dV already point at your own first key, so their addresses use c. NaN is memory that nobody wrote."
    judge_dkdv(answer, case_of(16, 32, batch=2, heads=3), look)


@pytest.mark.exercise("8.2")
@pytest.mark.parametrize("block_m, block_n", [(16, 32), (32, 16), (64, 64)])
@pytest.mark.parametrize("causal", [False, True])
def test_dkdv_block_size(answer, block_m, block_n, causal):
    """block size does not change the gradients"""
    look = f"BLOCK_M counts queries, BLOCK_N keys: the walk goes in steps of BLOCK_M.\n{RULE}"
    judge_dkdv(answer, case_of(64, 64, heads=1, causal=causal), look, block_m, block_n)


@pytest.mark.exercise("8.2")
@pytest.mark.parametrize("d", [32, 128])
def test_dkdv_head_dim(answer, d):
    """the head dimension may be larger"""
    judge_dkdv(answer, case_of(16, 32, d=d), "Is a 16 written in where D belongs?")


@pytest.mark.exercise("8.2")
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.4])
def test_dkdv_scale(answer, scale):
    """the scale that was asked for is used in S and in dK"""
    look = f"scale={scale}: S = scale Q K^T, so dK = scale dS^T Q. Both need it, once each."
    judge_dkdv(answer, case_of(32, 16, scale=scale, hot=1.0), look)


@pytest.mark.exercise("8.2")
def test_dkdv_hot(answer):
    """peaked softmaxes: scores in the hundreds"""
    judge_dkdv(
        answer, case_of(48, 32, hot=100.0), f"{PT}\nexp(S - L) is at most 1; exp(S) alone is infinite here."
    )


@pytest.mark.exercise("8.2")
@pytest.mark.parametrize("dtype", HALF)
def test_dkdv_half(answer, dtype):
    """half precision, with float32 sums"""
    judge_dkdv(answer, case_of(48, 32, hot=1.0), PT)
    judge_dkdv(answer, case_of(48, 32, dtype=dtype, hot=1.0), f"In float32 the same case comes out right. {HALVES}")


HALVES = "Whatever the inputs are, sums stay float32, and only the two factors of a tl.dot are rounded."


@pytest.mark.exercise("8.2")
@pytest.mark.parametrize("dtype", HALF)
def test_dkdv_accumulator(answer, dtype):
    """a sum that float16 cannot hold on the way: dv grows beyond 65504 and comes back"""
    sign = torch.where(torch.arange(512, device=device) < 256, 300.0, -300.0)[:, None]
    judge_dkdv(answer, case_of(512, 1, heads=1, hot=0.1), f"One key, seen by 512 queries. {PT}", 64, 16)
    case = case_of(512, 1, dtype=dtype, heads=1, hot=0.1)
    case = dataclasses.replace(case, dout=framed((case.dout + sign).to(dtype)))
    look = "One key, seen by 512 queries: dV = sum of dO, +300 for the first half and -300 for the second. In float32, and with\n"
    judge_dkdv(answer, case, f"{look}smaller numbers, such a case comes out right.\n{HALVES} Is dv float32?", 64, 16)


@pytest.mark.exercise("8.2")
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 2, 3, 0), (2, 3, 0, 1)])
def test_dkdv_strides(answer, order):
    """inputs may be any views"""
    judge_dkdv(answer, views(case_of(32, 16, batch=2, heads=2), order), STRIDES)


@pytest.mark.exercise("8.2")
def test_dkdv_of_a_sum(answer):
    """out.sum().backward() sends one number for all of dO"""
    case = case_of(21, 19)
    judge_dkdv(
        answer, dataclasses.replace(case, dout=torch.ones((), device=device).expand(case.dout.shape)), STRIDES
    )


@pytest.mark.exercise("8.2")
@pytest.mark.parametrize(
    "nq, nk, block_m, block_n",
    [(48, 48, 16, 16), (32, 96, 16, 32), (16, 64, 32, 16), (64, 32, 16, 16), (48, 46, 16, 16)],
)
def test_dkdv_causal(answer, nq, nk, block_m, block_n):
    """causal, with fewer queries than keys, and with more"""
    look = f"Nk - Nq = {nk - nq}. {RULE}\nKey j is first seen by query j + Nq - Nk, or by query 0: the walk begins at the tile of that query.\nA tile needs its mask unless its first query sees my last key."
    judge_dkdv(answer, case_of(nq, nk, heads=1, causal=True), look, block_m, block_n)


@pytest.mark.exercise("8.2")
@pytest.mark.parametrize("nq, nk, block_n", [(48, 48, 16), (32, 64, 16), (64, 48, 32)])
def test_dkdv_begins_late(answer, nq, nk, block_n):
    """the walk begins at the diagonal: queries that see none of my keys are not read"""
    case = case_of(nq, nk, heads=1, causal=True)
    judge_dkdv(answer, case, RULE, 16, block_n)
    given = solve(case)
    mine = (nk - 1) // block_n * block_n  # the first key of the last tile
    unseen = (mine + nq - nk) // 16 * 16  # queries before it see none of its keys
    q, dout = case.q.clone(), case.dout.clone()
    q[:, :, :unseen], dout[:, :, :unseen] = float("nan"), float("nan")
    dk, dv = ask(
        answer, "flash_dkdv", dataclasses.replace(case, q=q, dout=dout), given, block_m=16, block_n=block_n
    )
    for name, got in (("dV", dv), ("dK", dk)):
        part = SimpleNamespace(asked=given.asked, scale=given.scale)
        part.right, part.plain = (
            {name.lower(): x[name.lower()][:, :, mine:]} for x in (given.right, given.plain)
        )
        look = (
            f"Keys {mine} to {nk - 1} are not seen by queries 0 to {unseen - 1}. If these queries are NaN, {name} is no longer right:\n"
            "they were read. Masked scores are not enough: 0 * NaN is NaN, and the reading is for nothing.\n"
            "begin = max(0, first key + Nq - Nk), rounded down to a tile's start."
        )
        compare(name, got[:, :, mine:], part, look)


def far_below_zero():
    """A causal case whose visible scores are below -20000. All numbers are whole, so the scores are exact."""
    case = case_of(32, 32, causal=True)
    q, k = (x.abs().round().clamp(1, 3) for x in (case.q, case.k))
    return dataclasses.replace(case, q=-5000 * q, k=k)


BELOW = "All visible scores are below -20000 here. -inf is below every score; -1e4 or 0 is not: exp(-1e4 - L) is infinite."


@pytest.mark.exercise("8.2")
def test_dkdv_hidden_far_below_zero(answer):
    """a hidden pair adds nothing, however low the visible scores are"""
    judge_dkdv(answer, far_below_zero(), f"{BELOW}\n{RULE}")


@pytest.mark.exercise("8.2")
@pytest.mark.parametrize("nq, nk", [(37, 53), (53, 37)])
@pytest.mark.parametrize("causal", [False, True])
def test_dkdv_primes(answer, nq, nk, causal):
    """prime lengths, causal and not"""
    look = f"{RULE}\nLengths that tiles do not divide: i and j count real queries and keys, Nq and Nk are the real lengths."
    judge_dkdv(answer, case_of(nq, nk, heads=1, causal=causal), look, 16, 32)


@pytest.mark.exercise("8.2")
@pytest.mark.parametrize("nq, nk", [(1, 1), (1, 23), (5, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_dkdv_short(answer, nq, nk, causal):
    """sequences shorter than a tile"""
    judge_dkdv(answer, case_of(nq, nk, batch=3, heads=3, causal=causal), f"{PT}\n{RULE}", 32, 32)


@pytest.mark.exercise("8.2")
def test_dkdv_stays_inside(answer):
    """no program reads or writes outside its tensors, and NaN around them stays out"""
    case = case_of(21, 27, causal=True)
    tensors = inputs_of(case, solve(case))
    nan = (
        "There is NaN in it, and in the memory around Q, K, V and dO. Does the walk begin before query 0, or is something read\n"
        "without a mask? Rows of dK and dV that nobody wrote are NaN too: their mask is keys[:, None] < Nk."
    )
    judge_dkdv(answer, case, f"{PT}\n{RULE}", nan=nan)
    trace = record(answer, "flash_dkdv", tensors, causal=True, block_m=16, block_n=16)
    assert_inside(trace, "mask=keys[:, None] < Nk on dK and dV; the frame's loads have theirs.")


@pytest.mark.exercise("8.2")
def test_dkdv_repeated(answer):
    """two runs give the same bits"""
    case = case_of(40, 33, causal=True)
    given, tile = solve(case), {"block_m": 16, "block_n": 16}
    runs = (ask(answer, "flash_dkdv", case, given, **tile) for _ in range(2))
    for name, first, second in zip(("dK", "dV"), *runs):
        assert first.equal(second), (
            f"{name} differs from one run to the next. Does a program write rows of another?"
        )


# 8.3 dq


@pytest.mark.exercise("8.3")
def test_dq_toy(answer):
    """the toy: four words in a tile of 16"""
    judge_dq(
        answer,
        toy_case(),
        f"{DQ}\nPrint s, p and dp: those of the notebook. delta is another one here, and ds with it.",
    )


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("nk", [16, 32, 80])
def test_dq_many_tiles(answer, nk):
    """dQ adds up over all tiles of keys"""
    judge_dq(
        answer,
        case_of(16, nk),
        f"{DQ}\nThe walk goes over every tile of keys; are K and V moved on at the end of each turn?",
    )


@pytest.mark.exercise("8.3")
def test_dq_every_tile(answer):
    """every row of every head is written, by the program that owns it"""
    look = "Q, dO and dQ already point at your own first row, so their addresses use r. NaN is memory that nobody wrote."
    judge_dq(answer, case_of(32, 16, batch=2, heads=3), look)


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("block_m, block_n", [(16, 32), (32, 16), (64, 64)])
@pytest.mark.parametrize("causal", [False, True])
def test_dq_block_size(answer, block_m, block_n, causal):
    """block size does not change dQ"""
    judge_dq(
        answer,
        case_of(64, 64, heads=1, causal=causal),
        f"BLOCK_M counts queries, BLOCK_N keys.\n{RULE}",
        block_m,
        block_n,
    )


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("d", [32, 128])
def test_dq_head_dim(answer, d):
    """the head dimension may be larger"""
    judge_dq(answer, case_of(32, 16, d=d), "Is a 16 written in where D belongs?")


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("scale", [1.0, 0.0, -0.4])
def test_dq_scale(answer, scale):
    """the scale that was asked for is used in S and in dQ"""
    look = f"scale={scale}: S = scale Q K^T, so dQ = scale dS K. Both need it, once each."
    judge_dq(answer, case_of(16, 32, scale=scale, hot=1.0), look)


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("dtype", HALF)
def test_dq_half(answer, dtype):
    """half precision, with float32 sums"""
    judge_dq(answer, case_of(32, 48, hot=1.0), DQ)
    judge_dq(answer, case_of(32, 48, dtype=dtype, hot=1.0), f"In float32 the same case comes out right. {HALVES}")


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("dtype", HALF)
def test_dq_accumulator(answer, dtype):
    """a sum that float16 cannot hold on the way: dq grows beyond 65504 and comes back"""
    sign = torch.where(torch.arange(512, device=device) % 2 == 0, 1.0, -1.0)[
        :, None
    ]  # dS is + for even keys, - for odd
    late = torch.where(torch.arange(512, device=device) < 256, 1.0, -1.0)[:, None]
    case = case_of(1, 512, dtype=dtype, heads=1, hot=0.0, d=16, scale=1.0)
    judge_dq(answer, case_of(1, 512, heads=1), f"One query that sees 512 keys. {DQ}", 16, 64)
    k, v = 300 * sign * late + 0 * case.k, 300 * sign + 0 * case.v
    k, v = framed(k.to(dtype)), framed(v.to(dtype))
    case = dataclasses.replace(case, k=k, v=v, dout=torch.ones_like(case.dout))
    look = "The first 256 keys add up to more than float16 holds, and the others take it away again. In float32, and with smaller\n"
    judge_dq(answer, case, f"{look}numbers, such a case comes out right.\n{HALVES} Is dq float32?", 16, 64)


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 2, 3, 0), (2, 3, 0, 1)])
def test_dq_strides(answer, order):
    """inputs may be any views"""
    judge_dq(answer, views(case_of(16, 32, batch=2, heads=2), order), STRIDES)


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize(
    "nq, nk, block_m, block_n",
    [(48, 48, 16, 16), (32, 96, 16, 32), (16, 64, 32, 16), (64, 32, 32, 16), (48, 46, 16, 16)],
)
def test_dq_causal(answer, nq, nk, block_m, block_n):
    """causal, with fewer queries than keys, and with more: a query that sees nothing has dQ = 0"""
    look = f"Nk - Nq = {nk - nq}. {RULE}\nThe walk ends where the forward's does: at (i + 1) * BLOCK_M + Nk - Nq, or at Nk.\nA tile needs its mask unless my first row sees its last key."
    judge_dq(answer, case_of(nq, nk, heads=1, causal=True), look, block_m, block_n)


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("nq, nk", [(48, 48), (32, 64)])
def test_dq_stops(answer, nq, nk):
    """the walk stops at the diagonal: tiles that no row of mine sees are not read"""
    case = case_of(nq, nk, heads=1, causal=True)
    judge_dq(answer, case, RULE)
    given, seen = solve(case), 16 + nk - nq
    k, v = case.k.clone(), case.v.clone()
    k[:, :, seen:], v[:, :, seen:] = float("nan"), float("nan")
    dq = ask(answer, "flash_dq", dataclasses.replace(case, k=k, v=v), given, block_m=16, block_n=16)
    given.right, given.plain = ({"dq": x["dq"][:, :, :16]} for x in (given.right, given.plain))
    look = (
        f"Rows 0 to 15 see keys 0 to {seen - 1}. If K and V are NaN from key {seen} on, dQ of these rows is no longer right:\n"
        "such keys were read. Masked scores are not enough: 0 * NaN is NaN, and the reading is for nothing.\n"
        "The walk ends at (i + 1) * BLOCK_M + Nk - Nq, or at Nk."
    )
    compare("dQ", dq[:, :, :16], given, look)


@pytest.mark.exercise("8.3")
def test_dq_hidden_far_below_zero(answer):
    """a hidden key adds nothing, however low the visible scores are"""
    judge_dq(answer, far_below_zero(), f"{BELOW}\n{RULE}")


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("nq, nk", [(37, 53), (53, 37)])
@pytest.mark.parametrize("causal", [False, True])
def test_dq_primes(answer, nq, nk, causal):
    """prime lengths, causal and not"""
    look = f"{RULE}\nKeys from Nk on do not exist: their scores are -inf, and they are not read."
    judge_dq(answer, case_of(nq, nk, heads=1, causal=causal), look, 32, 16, NAN)


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("nk", [19, 3, 31])
def test_dq_ragged_below_zero(answer, nk):
    """a key that does not exist stays out, even where all scores are far below zero"""
    case = case_of(16, nk)
    case = dataclasses.replace(case, q=-20 * case.q.abs(), k=case.k.abs())
    nan = "L is far below 0 here. A key that does not exist has the score 0, and exp(0 - L) is infinite: infinity times 0 is NaN."
    judge_dq(answer, case, DQ, nan=f"{nan}\n{NAN}")


NAN = (
    "There is NaN in dQ, and in memory past the end of K and V: do both loads have mask=keys[:, None] < Nk, and other=0.0?\n"
    "Rows of dQ that nobody wrote are NaN too: their mask is rows[:, None] < Nq."
)


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("nq, nk", [(1, 1), (1, 23), (5, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_dq_short(answer, nq, nk, causal):
    """sequences shorter than a tile"""
    judge_dq(answer, case_of(nq, nk, batch=3, heads=3, causal=causal), f"{DQ}\n{RULE}", 32, 32, NAN)


@pytest.mark.exercise("8.3")
def test_dq_stays_inside(answer):
    """no program reads or writes outside its tensors, and NaN around them stays out"""
    case = case_of(21, 27, causal=True)
    tensors = inputs_of(case, solve(case))
    judge_dq(answer, case, f"{DQ}\n{RULE}", nan=NAN)
    trace = record(answer, "flash_dq", tensors, causal=True, block_m=16, block_n=16)
    assert_inside(trace, "mask=keys[:, None] < Nk on K and V, rows[:, None] < Nq on dQ.")


@pytest.mark.exercise("8.3")
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_all_three(answer, dtype):
    """the three together give the gradients of the forward, with tiles left at their defaults"""
    case = case_of(77, 101, d=32, dtype=dtype, causal=True, hot=1.0)
    given = solve(case)
    with nan_outputs("Look at its store.", "Delta", "dK", "dV", "dQ"):
        got = answer.flash_backward(
            case.dout, given.dlse, case.q, case.k, case.v, given.out, given.lse, causal=True, scale=case.scale
        )
    for name, x in zip(("dQ", "dK", "dV"), got):
        compare(
            name,
            x,
            given,
            "Tiles are 32 x 64 and 64 x 32 here. If the claims on small tiles hold: is a 16 written in somewhere?",
        )
