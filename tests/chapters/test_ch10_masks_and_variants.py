"""What an answer to chapter 10 must satisfy. The truth is computed in fp64, text by text or head by head."""

import itertools

import pytest
import torch
from frames import left_alone

from flash_edu.testing import assert_close, by_formula, differentiate, eager, make_case, truth

LENGTHS = [(1, 7), (5, 5), (4, 9), (9, 4), (6, 1)]


def near(name, got, want, plain, look):
    """assert_close with `look` below; a few roundings of the truth are always allowed, and the dtype must be right."""
    assert isinstance(got, torch.Tensor), f"{name} is a {type(got).__name__}, expected a tensor.\n{look}"
    assert got.dtype == plain.dtype, f"{name} has the dtype {got.dtype}, expected {plain.dtype}."
    rounded = (want * (1 + 8 * torch.finfo(plain.dtype).eps)).to(plain.dtype)

    def error(x):
        return (x.double() - want).nan_to_num(0.0).abs().max()

    try:
        assert_close(name, got, want, plain if error(plain) > error(rounded) else rounded)
    except AssertionError as wrong:
        raise AssertionError(f"{wrong}\n{look}") from None


# 10.1 causal_offset


@pytest.mark.exercise("10.1")
@pytest.mark.parametrize("align", ["top-left", "bottom-right"])
def test_causal_keep(answer, align):
    """each query sees the keys that its alignment gives it, for any Nq and Nk"""
    for nq, nk in LENGTHS:
        got = answer.causal_keep(nq, nk, align=align)
        want = torch.tensor([[j <= i + (nk - nq) * (align == "bottom-right") for j in range(nk)] for i in range(nq)])
        asked = f'causal_keep({nq}, {nk}, align="{align}")'
        assert isinstance(got, torch.Tensor) and got.dtype == torch.bool, f"{asked} is no tensor of bool: {got!r}"
        assert got.shape == want.shape, f"{asked} has the shape {tuple(got.shape)}, expected ({nq}, {nk})"
        assert got.equal(want), f"{asked} is\n{got.int().tolist()}, expected\n{want.int().tolist()}"


@pytest.mark.exercise("10.1")
def test_one_new_query(answer):
    """bottom-right, one new query sees the whole cache; top-left, it sees one key"""
    for align, want in (("bottom-right", 8), ("top-left", 1)):
        seen = int(answer.causal_keep(1, 8, align=align).sum())
        assert seen == want, f"{align}: 1 query, 8 keys, and it sees {seen} of them, expected {want}."


# 10.2 padding


def padded(lengths, seed=0, dtype=torch.float32, hot=3.0):
    case = make_case(len(lengths), 2, nq=5, nk=9, d=8, dv=6, hot=hot, seed=seed, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(9, generator=generator) for _ in lengths])
    return case, order < torch.tensor(lengths)[:, None]  # padding before, behind and between


def assert_padded(answer, case, real, look, scale=None, planted=None):
    q, k, v = case.q, case.k, case.v
    if planted is not None:
        hidden = ~real[:, None, :, None]
        k, v = k.masked_fill(hidden, planted), v.masked_fill(hidden, planted)
    with left_alone("padded_attention", q=q, k=k, v=v, real=real):
        got = answer.padded_attention(q, k, v, real, scale=scale)
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def alone(dtype):  # each text without its padding
        out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=dtype)
        for b in range(len(q)):
            if real[b].any():
                s = factor * (q[b].to(dtype) @ k[b][:, real[b]].to(dtype).mT)
                out[b] = s.softmax(-1) @ v[b][:, real[b]].to(dtype)
        return out

    near("O", got, alone(torch.float64), alone(q.dtype), look)


@pytest.mark.exercise("10.2")
def test_padding(answer):
    """padding gets no weight, wherever it stands"""
    look = "Hide scores, not keys: a score of 0 has the weight exp(0) = 1."
    for seed, lengths in enumerate(([9, 4, 1], [3, 7], [9])):
        for hot in (0.1, 3.0, 30.0):
            assert_padded(answer, *padded(lengths, seed, hot=hot), look)


@pytest.mark.exercise("10.2")
def test_negative_scores_with_padding(answer):
    """scores near -1000 beside padding: softmax's maximum is that of the real keys"""
    case, real = padded([4, 6], 7)
    case.q[..., 0], case.k[..., 0] = 100.0, -10.0
    assert_padded(answer, case, real, "Hide with -inf, before the maximum is taken; no finite number is low enough.", 1.0)


@pytest.mark.exercise("10.2")
def test_padding_scale(answer):
    """the scale is 1 / sqrt(D), or the one that is given"""
    for scale in (None, 1.0, 0.0, -0.4):
        assert_padded(answer, *padded([5, 8], 3), f"scale={scale}.", scale)


@pytest.mark.exercise("10.2")
def test_only_padding(answer):
    """a text of padding alone gives zeros, not NaN"""
    case, real = padded([0, 5, 0], 4)
    assert_padded(answer, case, real, "Every score is -inf there: anchor the maximum, and divide by 1 where the sum is 0.")


@pytest.mark.exercise("10.2")
def test_padding_holds_anything(answer):
    """padding may hold NaN, infinity or huge numbers"""
    for planted in (float("nan"), float("inf"), float("-inf"), 3e38):
        case, real = padded([4, 0, 7], 5)
        assert_padded(answer, case, real, f"Padding holds {planted}. 0 * NaN is NaN: hide the values too.", None, planted)


@pytest.mark.exercise("10.2")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_padding_in_halves(answer, dtype):
    """in half precision too: what hides a score must exist in its dtype"""
    for seed, hot in enumerate((0.1, 1.0, 30.0)):
        look = f"Inputs in {str(dtype)[6:]}, scores up to about {30 * hot:.0f}. Hide with -inf: every float dtype has it."
        assert_padded(answer, *padded([9, 4, 0], seed, dtype, hot), look)


# 10.3 window_tiles


@pytest.mark.exercise("10.3")
@pytest.mark.parametrize("nq, nk", [(10, 10), (4, 13), (13, 4), (1, 9), (9, 1), (7, 0)])
def test_window_tiles(answer, nq, nk):
    """exactly the tiles with a key that some query sees"""
    limits, blocks = (None, 0, 1, 3, 20), ((4, 4), (3, 2), (2, 5), (16, 1))
    for left, right, (block_q, block_k) in itertools.product(limits, limits, blocks):
        for start in range(0, nq, block_q):
            seen = {
                j // block_k
                for i in range(start, min(nq, start + block_q))
                for j in range(nk)
                if (left is None or j >= i + nk - nq - left) and (right is None or j <= i + nk - nq + right)
            }
            got = answer.window_tiles(start, nq, nk, block_q=block_q, block_k=block_k, left=left, right=right)
            assert isinstance(got, range) and list(got) == sorted(seen), (
                f"window_tiles({start}, {nq}, {nk}, {block_q=}, {block_k=}, {left=}, {right=}) is {got}, "
                f"expected the tiles {sorted(seen)}."
            )


# 10.4 score_rules


def wanted(raw, rules):
    """The rules again, in fp64, by loops over heads, rows and columns."""
    raw = raw.double()
    s = raw * rules["scale"]
    if (cap := rules.get("softcap")) is not None:
        s = cap * torch.tanh(s / cap)
    nq, nk = raw.shape[-2:]
    if (slopes := rules.get("slopes")) is not None:
        for h, i, j in itertools.product(range(raw.shape[1]), range(nq), range(nk)):
            s[:, h, i, j] -= slopes[h].double() * abs(i + nk - nq - j)
    if (bias := rules.get("bias")) is not None:
        s = s + bias.double()
    if (keep := rules.get("keep")) is not None:
        s = torch.where(keep, s, -torch.inf)
    return s


def every_rule(nq, nk, seed):
    generator = torch.Generator().manual_seed(seed)
    raw = 40 * torch.randn(2, 3, nq, nk, generator=generator)
    raw[0, 0, 0, 0] = float("nan")
    bias, keep = torch.randn(nq, nk, generator=generator), torch.rand(2, 1, nq, nk, generator=generator) < 0.7
    keep[0, :, 0, 0] = False
    bias[-1, -1] = -torch.inf
    return raw, {"softcap": 5.0, "slopes": torch.tensor([0.5, 0.25, 2.0]), "bias": bias, "keep": keep}


@pytest.mark.exercise("10.4")
def test_score_rules(answer):
    """each rule alone, any two, and all together"""
    names = ("softcap", "slopes", "bias", "keep")
    for seed, (nq, nk) in enumerate(((4, 4), (2, 7), (6, 3), (1, 5))):
        raw, rules = every_rule(nq, nk, seed)
        for count in range(5):
            for chosen in itertools.combinations(names, count):
                asked = {"scale": 0.3} | {name: rules[name] for name in chosen}
                x = raw if "keep" in chosen else raw.nan_to_num(1.0)
                with left_alone("score_rules", raw=x, **{n: rules[n] for n in ("slopes", "bias", "keep")}):
                    got = answer.score_rules(x, **asked)
                want = wanted(x, asked)
                assert isinstance(got, torch.Tensor) and got.shape == want.shape, f"score_rules returned {got!r}"
                assert got.dtype == raw.dtype, f"scores have the dtype {got.dtype}, expected {raw.dtype}."
                if not torch.allclose(got.double(), want, rtol=1e-5, atol=1e-5):
                    at = tuple((~torch.isclose(got.double(), want, rtol=1e-5, atol=1e-5)).nonzero()[0].tolist())
                    raise AssertionError(
                        f"scale and {', '.join(chosen) or 'nothing else'}, Nq={nq}, Nk={nk}: S{list(at)} = {got[at]:.6g}, "
                        f"expected {want[at]:.6g}.\nThe order is that of the docstring, and keep comes last."
                    )


# 10.5 gqa, 10.6 gqa_backward


def shared(heads, kv_heads, seed=0, **options):
    return make_case(2, heads, kv_heads, nq=5, nk=11, d=8, dv=6, hot=3.0, seed=seed, **options)


GROUPS = [(4, 2), (6, 2), (3, 1), (4, 4), (6, 3)]
GROUPED = "Query head h reads key head h // G: neighbours share. unflatten(1, (Hkv, G)), not (G, Hkv)."


@pytest.mark.exercise("10.5")
@pytest.mark.parametrize("heads, kv_heads", GROUPS)
def test_gqa(answer, heads, kv_heads):
    """groups of query heads read one head of keys and values"""
    for scale in (None, 0.7):
        case = shared(heads, kv_heads, heads, scale=scale)
        mixed = case.q.transpose(1, 2).contiguous().transpose(1, 2)  # as a projection leaves it
        for q in (case.q, mixed):
            with left_alone("gqa_attention", q=q, k=case.k, v=case.v):
                out, lse = answer.gqa_attention(q, case.k, case.v, scale=scale)
            want, plain = truth(case), eager(case)
            near("O", out, want["out"], plain["out"], GROUPED)
            near("L", lse, want["lse"], plain["lse"], GROUPED)


@pytest.mark.exercise("10.5")
def test_nothing_is_repeated(answer):
    """no copy of K or V with H heads is made"""
    from flash_edu.figures import largest_allocation

    case = make_case(1, 8, 1, nq=1, nk=512, d=64, seed=3)
    most = largest_allocation(lambda: answer.gqa_attention(case.q, case.k, case.v))
    most = getattr(most, "bytes", most)
    size = case.k.numel() * case.k.element_size()
    assert most < 4 * size, (
        f"the largest tensor made has {most:,} bytes, and K has {size:,}: is it repeated for every query head?\n{GROUPED}"
    )


@pytest.mark.exercise("10.6")
@pytest.mark.parametrize("heads, kv_heads", GROUPS)
def test_gqa_backward(answer, heads, kv_heads):
    """dK and dV of a shared head are sums over its group"""
    for scale in (0.35, 1.0):
        case = shared(heads, kv_heads, heads + 1, scale=scale)
        case.dlse.zero_()
        saved = differentiate(by_formula, case)
        given = {"dout": case.dout, "q": case.q, "k": case.k, "v": case.v, "out": saved["out"], "lse": saved["lse"]}
        with left_alone("gqa_backward", **given):
            got = answer.gqa_backward(*given.values(), scale=scale)
        want, plain = truth(case), eager(case)
        assert isinstance(got, (tuple, list)) and len(got) == 3, f"gqa_backward returned {type(got).__name__}."
        for name, x in zip(("dq", "dk", "dv"), got):
            near(name, x, want[name], plain[name], GROUPED)


# The same, one case that can be checked by hand


@pytest.mark.exercise("10.1")
def test_square(answer):
    """for as many queries as keys both alignments are the lower triangle"""
    for align in ("top-left", "bottom-right"):
        assert answer.causal_keep(4, 4, align=align).equal(torch.ones(4, 4, dtype=torch.bool).tril()), align


@pytest.mark.exercise("10.3")
def test_one_query_and_a_cache(answer):
    """one new query needs the last tiles of the cache"""
    got = answer.window_tiles(0, 1, 100, block_q=16, block_k=10, left=15, right=0)
    assert got == range(8, 10), f"keys 84 to 99, in tiles of 10: got {got}, expected range(8, 10)"


@pytest.mark.exercise("10.3")
def test_no_limit(answer):
    """without limits every tile is needed"""
    got = answer.window_tiles(8, 20, 30, block_q=8, block_k=8, left=None, right=None)
    assert got == range(0, 4), f"got {got}, expected range(0, 4)"


@pytest.mark.exercise("10.4")
def test_hidden_after_the_cap(answer):
    """a hidden score stays -inf under a cap"""
    keep = torch.tensor([[[[True, False]]]])
    got = answer.score_rules(torch.zeros(1, 1, 1, 2), scale=1.0, softcap=2.0, keep=keep)
    assert got.flatten().tolist() == [0.0, float("-inf")], f"got {got.flatten().tolist()}, expected [0, -inf]"


@pytest.mark.exercise("10.4")
def test_alibi_of_one_query(answer):
    """the last query has distance 0 to the last key"""
    got = answer.score_rules(torch.zeros(1, 1, 1, 3), scale=1.0, slopes=torch.tensor([0.5]))
    assert got.flatten().tolist() == [-1.0, -0.5, 0.0], f"got {got.flatten().tolist()}, expected [-1, -0.5, 0]"


@pytest.mark.exercise("10.5")
def test_shared_by_neighbours(answer):
    """heads 0 and 1 read the first key head, heads 2 and 3 the second"""
    v = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    got = answer.gqa_attention(torch.ones(1, 4, 1, 1), torch.ones(1, 2, 1, 1), v)[0].flatten().tolist()
    assert got == [1.0, 1.0, 2.0, 2.0], f"got {got}, expected [1, 1, 2, 2].\n{GROUPED}"


@pytest.mark.exercise("10.6")
def test_one_key(answer):
    """with one key, dV is the sum of dO over the group"""
    one, dout = torch.ones(1, 2, 1, 1), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    k = torch.ones(1, 1, 1, 1)
    dv = answer.gqa_backward(dout, one, k, k, one, one[..., 0], scale=1.0)[2]
    assert dv.flatten().tolist() == [7.0], f"got {dv.flatten().tolist()}, expected [7]"


@pytest.mark.exercise("10.6")
def test_shapes(answer):
    """each gradient has the shape of its tensor"""
    case = shared(6, 2)
    saved = differentiate(by_formula, case)
    got = answer.gqa_backward(case.dout, case.q, case.k, case.v, saved["out"], saved["lse"], scale=8**-0.5)
    for name, x, y in zip("qkv", got, (case.q, case.k, case.v)):
        assert x.shape == y.shape, f"d{name} has the shape {tuple(x.shape)}, expected {tuple(y.shape)}"


@pytest.mark.exercise("10.2")
def test_padding_keeps_real_nan(answer):
    """a NaN in the value of a real key is not hidden"""
    torch.manual_seed(7)
    q, k, v = (torch.randn(1, 2, n, 8) for n in (3, 5, 5))
    v[:, :, 1, 2] = float("nan")  # key 1 is real, key 4 is padding
    out = answer.padded_attention(q, k, v, torch.tensor([[True, True, True, True, False]]))
    assert out is not None, "padded_attention returned None."
    assert out[..., 2].isnan().all(), (
        "The value of a real key held NaN, and the output does not.\n"
        "`nan_to_num` hides a bug in a real key as well. Zero the values where the mask says padding, nowhere else."
    )
