"""What an answer to chapter 11 must satisfy.

Each exercise is judged alone: keep_tile is given the right philox, and the two halves of attention the right keep_tile. The
truth of the bits is computed in Python's whole numbers, and that of attention in fp64 (flash_edu/testing.py).
"""

import contextlib
import dataclasses
from unittest import mock

import pytest
import torch
from frames import left_alone

from flash_edu import philox as package
from flash_edu.course import device
from flash_edu.testing import assert_close, eager, make_case, results_from_saved, truth

WORD = 0xFFFFFFFF
SEEDS = [(0, 0), (1, 0), (123456789123456789, 987654321987654321), (-1, -1), (-(2**62), 2**62 - 5)]


def words_of(counter, key, rounds):
    """Philox 4x32 in Python's whole numbers, which have no end: four words of counter, two of key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & WORD, (a >> 32) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def hexed(words):
    return " ".join(f"{x & (2**64 - 1):08x}" for x in words)


def numbers(*values, where="cpu"):
    return torch.tensor(values, dtype=torch.int64, device=where)


def draw_words(*shape, seed):
    return torch.randint(0, 2**32, shape, generator=torch.Generator().manual_seed(seed))


def right_philox(counter, key, rounds=7):
    """For whoever calls philox: the right words, of a shape that was checked."""
    assert isinstance(counter, torch.Tensor) and counter.dim() >= 1 and counter.shape[0] == 4, (
        f"philox takes one tensor of counters, (4, ...); it got {tuple(getattr(counter, 'shape', ['no tensor']))}."
    )
    assert tuple(key.shape) == (2,), f"philox takes a key of the shape (2,); it got {tuple(key.shape)}."
    for name, x in (("counter", counter), ("key", key)):
        assert x.dtype == torch.int64, f"philox takes int64; its {name} is {x.dtype}."
        wrong = (x < 0) | (x > WORD)
        assert not wrong.any(), (
            f"philox takes words from 0 to 2^32 - 1; its {name} holds {x[wrong].flatten()[0].item()}. `& WORD` makes a word."
        )
    assert rounds == package.ROUNDS, f"This mask is made with {package.ROUNDS} rounds, which is what philox does if nobody asks; you asked for {rounds}."
    seed = key[0] | (key[1] << 32)
    return torch.stack(torch.broadcast_tensors(*package._philox(list(counter), seed)))


# 11.1 philox

ROUND = "One round is in the docstring, and in the notebook's \"One round\": both products first, then the four new words."
KNOWN = [
    ((0, 0, 0, 0), (0, 0), 10, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((WORD,) * 4, (WORD,) * 2, 10, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 10, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ((0, 0, 0, 0), (0, 0), 7, "5f6fb709 0d893f64 4f121f81 4f730a48"),
]  # published by the authors: Random123, kat_vectors


def words_from(answer, counter, key, *rounds):
    with left_alone("philox", counter=counter, key=key):
        got = answer.philox(counter, key, *rounds)
    assert isinstance(got, torch.Tensor), f"philox returned {type(got).__name__}, expected a tensor."
    assert got.dtype == torch.int64, f"philox returned {got.dtype}, expected torch.int64."
    assert got.shape == counter.shape, f"counter {tuple(counter.shape)}: the words are {tuple(got.shape)}, expected the same shape."
    return got


def judge_words(answer, counter, key, rounds, look):
    """Each of the words, (4, n) counters at once."""
    got = words_from(answer, counter, key, rounds).reshape(4, -1)
    for place, c in enumerate(counter.reshape(4, -1).T.tolist()):
        want = words_of(c, key.tolist(), rounds)
        mine = got[:, place].tolist()
        assert mine == want, (
            f"counter {hexed(c)}, key {hexed(key.tolist())}, rounds {rounds}:\n"
            f"words    {hexed(mine)}\nexpected {hexed(want)}\n{look}"
        )


@pytest.mark.exercise("11.1")
def test_one_round(answer):
    """one round, and no round"""
    small = numbers(1, 2, 3, 4)
    judge_words(answer, small, numbers(5, 6), 0, "Without a round the words are the counter's.")
    judge_words(answer, small, numbers(5, 6), 1, ROUND)
    judge_words(answer, draw_words(4, 8, seed=1), draw_words(2, seed=2), 1, ROUND)


@pytest.mark.exercise("11.1")
def test_two_rounds(answer):
    """two rounds and three: the key moves on after each"""
    look = "After a round, KEY_STEPS[0] is added to k0 and KEY_STEPS[1] to k1, and `& WORD` throws away what is carried over."
    for rounds in (2, 3):
        judge_words(answer, draw_words(4, 8, seed=3), draw_words(2, seed=4), rounds, look)


@pytest.mark.exercise("11.1")
def test_known_answers(answer):
    """the words that the authors of Philox publish"""
    for counter, key, rounds, want in KNOWN:
        got = hexed(words_from(answer, numbers(*counter), numbers(*key), rounds).tolist())
        assert got == want, (
            f"counter {hexed(counter)}, key {hexed(key)}, rounds {rounds}:\nwords    {got}\nexpected {want}\n{ROUND}"
        )


@pytest.mark.exercise("11.1")
def test_default_rounds(answer):
    """7 rounds, unless another number is asked for"""
    counter, key = draw_words(4, 3, seed=5), draw_words(2, seed=6)
    got, want = words_from(answer, counter, key), words_from(answer, counter, key, 7)
    assert got.equal(want), f"Without `rounds`: {hexed(got[:, 0].tolist())}, and with rounds=7: {hexed(want[:, 0].tolist())}."


@pytest.mark.exercise("11.1")
def test_words_stay_words(answer):
    """large words and large keys: a product past 2^63, and every result from 0 to 2^32 - 1"""
    counter = torch.cat([draw_words(4, 40, seed=7) | (1 << 31), torch.full((4, 1), WORD)], dim=1)
    look = "A product past 2^63 is negative as an int64, and >> 32 fills up with ones: `(x >> 32) & WORD` is the high word."
    for rounds in (1, 7):
        got = words_from(answer, counter, numbers(WORD, WORD), rounds)
        wrong = (got < 0) | (got > WORD)
        assert not wrong.any(), f"rounds {rounds}: {got[wrong][0].item()} is no word, 0 to 2^32 - 1 ({WORD}).\n{look}"
        judge_words(answer, counter, numbers(WORD, WORD), rounds, look)


@pytest.mark.exercise("11.1")
def test_any_shape(answer):
    """any shape of counters; a word knows nothing of its neighbours, and two calls give the same"""
    counter, key = draw_words(4, 2, 3, 5, seed=8), draw_words(2, seed=9)
    all_at_once = words_from(answer, counter, key)
    one = words_from(answer, counter[:, 1, 2, 3], key)
    view = words_from(answer, counter.transpose(1, 3), key).transpose(1, 3)
    assert all_at_once[:, 1, 2, 3].equal(one), (
        f"counter {hexed(counter[:, 1, 2, 3].tolist())} alone gives {hexed(one.tolist())}, and among others "
        f"{hexed(all_at_once[:, 1, 2, 3].tolist())}. Every operation works place by place."
    )
    assert view.equal(all_at_once), "The same counters, seen through a transpose, gave other words."
    assert words_from(answer, counter, key).equal(all_at_once), "A second call gave other words. Is something kept between two calls?"


# 11.2 keep_tile

PLACE = (
    "counter = (col // 4, row, head, low word of the offset), key = (low, high word of the seed), and the weight's word is number\n"
    "col % 4 of the four. It is kept if its word >= threshold(dropout_p)."
)


EXACT = "keep is `word >= threshold`, compared as whole numbers: a float32 has 24 bits, and a word has 32."


def tile(heads, rows, cols):
    return [torch.as_tensor(x, dtype=torch.int64) for x in (heads, rows, cols)]


def keep_from(answer, seed, p, heads, rows, cols):
    """keep_tile, with the right philox below it."""
    asked = {"seed": seed, "heads": heads, "rows": rows, "cols": cols}
    with left_alone("keep_tile", **asked), mock.patch.object(answer, "philox", right_philox):
        got = answer.keep_tile(seed, p, heads, rows, cols)
    assert isinstance(got, torch.Tensor), f"keep_tile returned {type(got).__name__}, expected a tensor."
    assert got.dtype == torch.bool, f"keep_tile returned {got.dtype}, expected torch.bool: True where a weight is kept."
    want = (len(heads), len(rows), len(cols))
    assert tuple(got.shape) == want, f"keep_tile returned the shape {tuple(got.shape)}, expected (heads, rows, cols) = {want}."
    return got


def same_mask(got, want, what, look, places=None):
    """Bit by bit. `places`: the numbers of heads, rows and columns, if they do not count from 0."""
    wrong = got != want
    if not wrong.any():
        return
    h, i, j = wrong.nonzero()[0].tolist()
    if places:
        h, i, j = (x[n].item() for x, n in zip(places, (h, i, j)))
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} decisions are wrong. {got.double().mean():.3f} of the weights are kept, "
        f"expected {want.double().mean():.3f}.\nThe first: head {h}, row {i}, column {j}.\n{look}"
    )


def judge_tile(answer, seed, p, heads, rows, cols, what, look):
    seed, places = numbers(*seed), tile(heads, rows, cols)
    got = keep_from(answer, seed, p, *places)
    same_mask(got, package.kept(seed, p, *places), what, look, places)


@pytest.mark.exercise("11.2")
def test_the_first_four(answer):
    """four neighbouring columns are the four words of one counter"""
    seed, p = numbers(11, 0), 0.5
    fours = [words_of((number, 0, 0, 0), (11, 0), 7) for number in (0, 1)]
    got = keep_from(answer, seed, p, *tile([0], [0], range(8)))[0, 0].tolist()
    want = [word >= 2**31 for words in fours for word in words]
    assert got == want, (
        f"seed 11, offset 0, head 0, row 0, dropout 0.5. The words of columns 0 to 3 are {hexed(fours[0])}, and of 4 to 7 {hexed(fours[1])}.\n"
        f"Kept is what is not below 80000000: {want}; got {got}.\n{PLACE}"
    )


@pytest.mark.exercise("11.2")
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_of_flash_edu(answer, p):
    """the mask is flash_edu's own, bit by bit"""
    for seed in SEEDS:
        judge_tile(answer, seed, p, range(3), range(17), range(23), f"seed and offset {seed}, dropout {p}", PLACE)


@pytest.mark.exercise("11.2")
@pytest.mark.parametrize(
    "rows, cols",
    [
        (range(5, 12), range(4, 12)),
        (range(3), range(7, 9)),
        (range(40, 41), range(1, 30)),
        ([9, 2, 2, 30], [3, 17, 0, 6, 6]),
        (range(20, 0, -3), range(0, 40, 5)),
    ],
    ids=["a tile", "2 columns", "1 row", "any order", "strides"],
)
def test_a_tile_is_a_part_of_the_mask(answer, rows, cols):
    """a tile is a part of the whole mask, wherever it is cut out"""
    look = f"Only the numbers in heads, rows and cols count, never where they stand in the tile.\n{PLACE}"
    judge_tile(answer, SEEDS[2], 0.4, [4, 1], rows, cols, f"rows {list(rows)[:4]}, columns {list(cols)[:4]}", look)


@pytest.mark.exercise("11.2")
def test_far_places(answer):
    """far down a long text, and in a late head"""
    judge_tile(answer, SEEDS[3], 0.5, [70000, 3], [2**20 + 1, 5], range(2**22, 2**22 + 9), "heads 70000 and 3, rows 2^20 + 1 and 5", PLACE)


@pytest.mark.exercise("11.2")
def test_another_offset(answer):
    """another seed and another offset give another mask; of the offset only the low word counts"""
    places = tile(range(2), range(32), range(32))
    first = keep_from(answer, numbers(3, 7), 0.5, *places)
    for seed in ((3, 8), (4, 7), (3 + 2**32, 7), (7, 3)):
        agree = (keep_from(answer, numbers(*seed), 0.5, *places) == first).double().mean().item()
        assert 0.4 < agree < 0.6, f"seed and offset (3, 7) and {seed}: {agree:.0%} of the decisions agree, expected about half.\n{PLACE}"
    again = keep_from(answer, numbers(3, 7 + 2**32), 0.5, *places)
    assert again.equal(first), f"Offsets 7 and 7 + 2^32 have the same low word, and gave different masks.\n{PLACE}"


@pytest.mark.exercise("11.2")
def test_the_rate(answer):
    """the share that is kept is 1 - p, within 5 standard errors; and p = 0 keeps all"""
    places = tile(range(4), range(128), range(128))
    n = 4 * 128 * 128
    for p in (0.0, 1e-12, 0.01, 0.25, 0.5, 0.75, 0.99, 1 - 1e-12):
        share = keep_from(answer, numbers(*SEEDS[2]), p, *places).double().mean().item()
        error = (p * (1 - p) / n) ** 0.5
        assert abs(share - (1 - p)) <= 5 * error + 1e-6, (
            f"dropout {p:g}: {share:.5f} of {n} weights are kept, expected {1 - p:.5f}, and the standard error is {error:.5f}.\n"
            "A word is any number from 0 to 2^32 - 1, all as likely. `word >= threshold(dropout_p)` is True for the share 1 - p."
        )


@pytest.mark.exercise("11.2")
def test_each_weight_is_its_own(answer):
    """heads, rows and columns decide for themselves: neighbours agree half of the time"""
    kept = keep_from(answer, numbers(*SEEDS[2]), 0.5, *tile(range(4), range(64), range(64)))
    for axis, name in enumerate(("heads", "rows", "columns")):
        for step in (1, 2, 3):
            agree = (kept == kept.roll(step, axis)).double().mean().item()
            assert 0.45 < agree < 0.55, f"{name} {step} apart agree in {agree:.0%} of their decisions, expected half.\n{PLACE}"


@pytest.mark.exercise("11.2")
def test_at_the_threshold(answer):
    """a word at the threshold is kept, and the word before it is dropped"""
    for head, row, col in ((0, 0, 0), (2, 5, 6), (1, 3, 11)):
        word = words_of((col // 4, row, head, 9), (77, 0), 7)[col % 4]
        for limit, decision in ((word, "kept"), (word + 1, "dropped")):
            what = f"the threshold is {limit:08x}; at head {head}, row {row}, column {col} the word is {word:08x}, which is {decision}"
            judge_tile(answer, (77, 9), limit / 2**32, range(3), range(8), range(16), what, EXACT)


# 11.3 dropout_forward


@contextlib.contextmanager
def right_mask(answer, who, nq, nk, block_q, block_k):
    """Inside, keep_tile is right, and remembers the tiles it was asked for: each within a block, and every place once."""
    asked = []

    def keep_tile(seed, p, heads, rows, cols):
        assert rows.dim() == cols.dim() == heads.dim() == 1, "keep_tile takes heads, rows and cols with one dimension each."
        asked.append((rows, cols))
        return package.kept(seed, p, heads, rows, cols)

    with mock.patch.object(answer, "keep_tile", keep_tile):
        yield
    assert asked, f"{who} never asked keep_tile which weights are kept."
    largest = max((len(r), len(c)) for r, c in asked)
    assert all(len(r) <= block_q and len(c) <= block_k for r, c in asked), (
        f"{who} asked for a mask of {largest[0]} x {largest[1]} at once. Tiles are {block_q} x {block_k} here: rows and cols hold the places."
    )
    times = torch.zeros(nq, nk, dtype=torch.int64)
    for r, c in asked:
        times[r[:, None], c] += 1
    assert (times == 1).all(), f"{who} asked for {int((times == 0).sum())} decisions never, and for {int((times > 1).sum())} more than once."


def case_of(p, nq=37, nk=41, d=16, dv=None, batch=2, heads=3, **options):
    """A case with dropout, and its seed and offset: what flash_attention would draw after manual_seed(seed)."""
    options = {"hot": 3.0, "seed": nq + nk} | options
    case = make_case(batch, heads, nq=nq, nk=nk, d=d, dv=dv, dropout_p=p, **options)
    case.dlse.zero_()
    torch.manual_seed(case.seed)
    return case, package.draw_seed(torch.device("cpu"))


def near(name, got, want, plain, look, tile=None):
    """assert_close with `look` below it; on few numbers plain PyTorch may be lucky, so a few roundings are always allowed."""
    assert isinstance(got, torch.Tensor), f"{name} should be a tensor; it is of type {type(got).__name__}."
    assert got.dtype == plain.dtype, f"{name} is {got.dtype}, expected {plain.dtype}."
    rounded = (want * (1 + 8 * torch.finfo(plain.dtype).eps)).to(plain.dtype)
    errors = [(x.double() - want).abs().max() for x in (plain, rounded)]
    try:
        assert_close(name, got, want, rounded if errors[1] > errors[0] else plain, tile=tile)
    except AssertionError as wrong:
        raise AssertionError(f"{wrong}\n{look}") from None


FORWARD = (
    "Only the weights that go into acc are dropped. m and l count all, and the rest of the loop is chapter 04's. At the end\n"
    "O = acc / l / (1 - dropout_p)."
)


def forward_of(answer, case, seed, p, block_q, block_k):
    who = "dropout_forward"
    with (
        left_alone(who, q=case.q, k=case.k, v=case.v, seed=seed),
        right_mask(answer, who, case.q.shape[2], case.k.shape[2], block_q, block_k),
    ):
        got = answer.dropout_forward(case.q, case.k, case.v, seed, p, scale=case.scale, block_q=block_q, block_k=block_k)
    assert isinstance(got, tuple) and len(got) == 2, f"{who} returned {type(got).__name__}, expected a pair (out, lse)."
    return got


def judge_forward(answer, p, look, block_q=16, block_k=8, case=None, **options):
    case, seed = case or case_of(p, **options)
    out, lse = forward_of(answer, case, seed, p, block_q, block_k)
    right, plain = truth(case), eager(case)
    asked = f"dropout {p}, q {tuple(case.q.shape)}, Nk {case.k.shape[2]}, tiles of {block_q} x {block_k}"
    near("L", lse, right["lse"], plain["lse"], f"{asked}\nL is that of attention without dropout.\n{look}", block_q)
    near("O", out, right["out"], plain["out"], f"{asked}\nL is right, so m and l are.\n{look}", block_q)


@pytest.mark.exercise("11.3")
def test_forward_by_hand(answer):
    """one query and four keys, that you can check by hand"""
    q, k, v = torch.zeros(1, 1, 1, 16), torch.ones(1, 1, 4, 16), torch.eye(4)[None, None]
    keep = torch.tensor([[[True, False, True, True]]])
    with mock.patch.object(answer, "keep_tile", lambda seed, p, heads, rows, cols: keep[:, rows][:, :, cols]):
        out, lse = answer.dropout_forward(q, k, v, numbers(0, 0), 0.5, block_q=1, block_k=2)
    got = [round(x, 4) for x in out.flatten().tolist()]
    assert got == [0.5, 0.0, 0.5, 0.5] and round(lse.item(), 4) == 1.3863, (
        f"All scores are 0, so P is 1/4 four times. Kept are keys 0, 2 and 3, dropout is 0.5, and V is the identity, so that O is\n"
        f"what becomes of P: expected [0.5, 0.0, 0.5, 0.5] and L = log 4 = 1.3863; got {got} and {lse.item():.4f}.\n{FORWARD}"
    )


@pytest.mark.exercise("11.3")
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_forward(answer, p):
    """O is attention with dropout, and L that without"""
    judge_forward(answer, p, FORWARD)
    judge_forward(answer, p, FORWARD, nq=20, nk=64, d=32, dv=8, batch=1)


@pytest.mark.exercise("11.3")
def test_forward_tiles(answer):
    """tile sizes do not change which weights drop"""
    look = f"Only the tile sizes differ here.\n{FORWARD}"
    for block_q, block_k in ((64, 64), (8, 32), (32, 4), (5, 7), (1, 41), (37, 1)):
        judge_forward(answer, 0.3, look, block_q, block_k, batch=1)


@pytest.mark.exercise("11.3")
def test_no_dropout(answer):
    """p = 0 is attention"""
    judge_forward(answer, 0.0, "Nothing is dropped, and 1 / (1 - 0) is 1: this is chapter 04's tiled attention.", seed=3)


@pytest.mark.exercise("11.3")
def test_forward_large_scores(answer):
    """scores near 1000 and near -1000, and a maximum that moves with every tile, or never"""
    for level in (1000.0, -1000.0):
        case, seed = case_of(0.4, batch=1, hot=1.0)
        q, k = case.q.clone(), case.k.clone()
        q[..., 0], k[..., 0] = 10.0, level / 10.0
        moved = dataclasses.replace(case, q=q, k=k, scale=1.0)
        judge_forward(answer, 0.4, f"Scores are near {level:.0f}. exp sees S - m_new and m - m_new only.", case=(moved, seed))
    case, seed = case_of(0.4, batch=1, hot=1.0)
    for order in (torch.linspace(-80, 80, 41), torch.linspace(80, -80, 41)):
        q, k = case.q.clone(), case.k.clone()
        q[..., 0], k[..., 0] = 1.0, order
        moved = dataclasses.replace(case, q=q, k=k, scale=1.0)
        look = f"m counts the dropped weights too: their scores are part of the row.\n{FORWARD}"
        judge_forward(answer, 0.4, look, case=(moved, seed))


@pytest.mark.exercise("11.3")
def test_forward_double_and_views(answer):
    """float64 stays float64; and inputs may be views"""
    judge_forward(answer, 0.2, "In float64. Is something cast to float32?", dtype=torch.float64, scale=0.7)
    case, seed = case_of(0.2)
    views = {name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    judge_forward(answer, 0.2, "The same numbers, stored as (B, N, H, D).", case=(dataclasses.replace(case, **views), seed))


@pytest.mark.exercise("11.3")
def test_the_mean_is_attention(answer):
    """over many seeds the mean of O is attention without dropout"""
    case, _ = case_of(0.5, nq=3, nk=9, d=8, batch=1, heads=2, dtype=torch.float64, hot=1.0)
    with mock.patch.object(answer, "keep_tile", package.kept):
        draws = [answer.dropout_forward(case.q, case.k, case.v, numbers(n, 0), 0.5, block_q=2, block_k=4)[0] for n in range(400)]
    many = torch.stack(draws)
    want = (case.q @ case.k.mT * 8**-0.5).softmax(-1) @ case.v
    off = ((many.mean(0) - want).abs() / (many.std(0) / 400**0.5 + 1e-9)).max().item()
    assert off < 5, (
        f"The mean of 400 outputs is up to {off:.1f} standard errors away from attention. What is kept has to grow by 1 / (1 - p),\n"
        f"so that each weight keeps its mean.\n{FORWARD}"
    )


# 11.4 dropout_backward

BACKWARD = (
    "P = exp(S - L) is the softmax, without dropout. Z = keep / (1 - dropout_p) multiplies P in dV, and dO V^T in dP. Delta is\n"
    "rowsum(dO * O), and dS = P * (dP - Delta) has P alone: its Z is in dP already."
)


def judge_backward(answer, p, look, block_q=8, block_k=16, case=None, **options):
    case, seed = case or case_of(p, **options)
    right, plain = truth(case), eager(case)
    out, lse = right["out"].to(case.q.dtype), right["lse"].to(case.q.dtype)
    for name, x in results_from_saved(case, out, lse).items():  # from O and L as they are given here
        if (x.double() - right[name]).abs().max() > (plain[name].double() - right[name]).abs().max():
            plain[name] = x
    given = {"dout": case.dout, "q": case.q, "k": case.k, "v": case.v, "out": out, "lse": lse, "seed": seed}
    who = "dropout_backward"
    with left_alone(who, **given), right_mask(answer, who, case.q.shape[2], case.k.shape[2], block_q, block_k):
        got = answer.dropout_backward(*given.values(), p, scale=case.scale, block_q=block_q, block_k=block_k)
    assert isinstance(got, tuple) and len(got) == 3, f"{who} returns three tensors: dq, dk, dv, in this order."
    asked = f"dropout {p}, q {tuple(case.q.shape)}, Nk {case.k.shape[2]}, tiles of {block_q} x {block_k}"
    for name, x, tile in zip(("dv", "dq", "dk"), (got[2], got[0], got[1]), (block_k, block_q, block_k)):
        shown = f"{name[0]}{name[1].upper()}"
        before = "dV is right, so P and Z are.\n" * (name != "dv")
        near(shown, x, right[name], plain[name], f"{asked}\n{before}{look}", tile)


@pytest.mark.exercise("11.4")
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_backward(answer, p):
    """dQ, dK and dV are autograd's, through the same mask"""
    judge_backward(answer, p, BACKWARD)
    judge_backward(answer, p, BACKWARD, nq=20, nk=64, d=32, dv=8, batch=1)


@pytest.mark.exercise("11.4")
def test_backward_tiles(answer):
    """the backward's tiles and their order do not matter: the mask is the forward's"""
    look = f"Only the tile sizes differ here.\n{BACKWARD}"
    for block_q, block_k in ((64, 64), (8, 32), (32, 4), (5, 7), (1, 41), (37, 1)):
        judge_backward(answer, 0.3, look, block_q, block_k, batch=1)


@pytest.mark.exercise("11.4")
def test_backward_no_dropout(answer):
    """p = 0: the backward of chapter 05"""
    judge_backward(answer, 0.0, "Nothing is dropped: these are chapter 05's formulas.", seed=4)


@pytest.mark.exercise("11.4")
@pytest.mark.parametrize("scale", [1.0, 0.3, -0.5])
def test_backward_scale(answer, scale):
    """any scale"""
    judge_backward(answer, 0.25, f"scale={scale}. It is in S, and once in dQ and in dK.\n{BACKWARD}", scale=scale, hot=1.0, batch=1)


@pytest.mark.exercise("11.4")
def test_backward_of_views(answer):
    """dO may be a view: one number seen as many, as out.sum().backward() sends it, or a transposed tensor"""
    case, seed = case_of(0.3)
    for dout in (torch.ones(()).expand_as(case.dout), case.dout.transpose(1, 2).contiguous().transpose(1, 2)):
        look = f"dO is a view with strides {dout.stride()}: no writing into it, and no .view() of it."
        judge_backward(answer, 0.3, look, case=(dataclasses.replace(case, dout=dout), seed))


@pytest.mark.exercise("11.4")
def test_backward_double_and_large(answer):
    """float64 stays float64; and scores in the hundreds"""
    judge_backward(answer, 0.3, BACKWARD, dtype=torch.float64)
    judge_backward(answer, 0.3, f"Scores are in the hundreds.\n{BACKWARD}", hot=30.0)


# 11.5 keep_kernel

KERNEL = (
    "tl.philox(seed, c0, c1, c2, c3, ROUNDS) with the counters (cols // 4, rows, head, offset), columns along [None, :] and rows along\n"
    "[:, None]. The word is number cols % 4 of the four; as int64, it is compared with limit."
)


def judge_kernel(answer, seed, p, heads, nq, nk, look=KERNEL, **blocks):
    seed = numbers(*seed, where=device)
    with left_alone("keep_kernel", Seed=seed):
        got = answer.keep_mask(seed, p, heads, nq, nk, **blocks)
    places = (torch.arange(n, device=device) for n in (heads, nq, nk))
    same_mask(got, package.kept(seed, p, *places), f"seed and offset {tuple(seed.tolist())}, dropout {p:g}", look)


@pytest.mark.exercise("11.5")
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_kernel(answer, p):
    """the kernel's mask is flash_edu's, bit by bit"""
    judge_kernel(answer, SEEDS[2], p, 2, 32, 64)


@pytest.mark.exercise("11.5")
def test_kernel_tiles(answer):
    """tile sizes do not change the mask, nor do lengths that they do not divide"""
    for block_m, block_n in ((16, 16), (64, 16), (16, 64)):
        look = f"Tiles of {block_m} x {block_n}.\n{KERNEL}"
        judge_kernel(answer, SEEDS[1], 0.4, 2, 37, 41, look, block_m=block_m, block_n=block_n)


@pytest.mark.exercise("11.5")
@pytest.mark.parametrize("seed", SEEDS, ids=str)
def test_kernel_seeds(answer, seed):
    """any seed and any offset, below 0 too"""
    judge_kernel(answer, seed, 0.3, 3, 16, 32)


@pytest.mark.exercise("11.5")
def test_kernel_rate(answer):
    """p = 0 keeps all, and p near 1 hardly any"""
    for p in (0.0, 1e-9, 0.51, 1 - 1e-9):
        judge_kernel(answer, SEEDS[2], p, 1, 32, 32, f"limit is {min(round(p * 2**32), WORD)}.\n{KERNEL}")


@pytest.mark.exercise("11.5")
def test_kernel_at_the_limit(answer):
    """a word at the limit is kept, and the word before it is dropped"""
    for head, row, col in ((0, 0, 0), (1, 5, 6), (1, 30, 11)):
        word = words_of((col // 4, row, head, 9), (77, 0), 7)[col % 4]
        for limit, decision in ((word, "kept"), (word + 1, "dropped")):
            at = f"limit is {limit:08x}; at head {head}, row {row}, column {col} the word is {word:08x}, which is {decision}"
            look = f"{at}.\nkeep is `word >= limit`, compared as int64: a float32 has 24 bits, and a word has 32."
            judge_kernel(answer, (77, 9), limit / 2**32, 2, 32, 32, look)
