"""What an answer to chapter 04 must satisfy. The truth is computed in fp64; see flash_edu/testing.py for the bound."""

import dataclasses
import functools
import math
import re

import pytest
import torch
from frames import left_alone
from torch.utils._python_dispatch import TorchDispatchMode

from flash_edu.figures import largest_allocation, peak_memory, watch
from flash_edu.reference import causal_mask, naive_attention_with_lse
from flash_edu.testing import assert_close, eager, make_case, truth

INF = math.inf
STEP = 'See "One row, two blocks of keys": the step for one row, and every tile does the same.'


def assert_near(name, got, want, plain, tile=None):
    """assert_close, but on few numbers plain PyTorch may be lucky: a few roundings of the truth are always allowed."""
    rounded = want * (1 + 8 * torch.finfo(plain.dtype).eps)
    error, few = (
        (x.double() - want).nan_to_num(0.0).abs().amax() if x.numel() else 0 for x in (plain, rounded)
    )
    assert_close(name, got, want, plain if error > few else rounded.to(plain.dtype), tile=tile)


def tiled(answer, case, block_q, block_k):
    """(out, lse) of the answer, and a line that says what was asked. Inputs must come back unchanged."""
    options = {"causal": case.causal, "scale": case.scale, "block_q": block_q, "block_k": block_k}
    with left_alone("tiled_attention", q=case.q, k=case.k, v=case.v):
        got = answer.tiled_attention(case.q, case.k, case.v, **options)
    asked = (
        f"q {tuple(case.q.shape)}, k {tuple(case.k.shape)}, v {tuple(case.v.shape)}, block_q={block_q}, block_k={block_k}"
    )
    asked += ", causal=True" * case.causal + f", scale={case.scale}" * (case.scale is not None)
    assert isinstance(got, (tuple, list)) and len(got) == 2, (
        f"{asked}\ntiled_attention returned {type(got).__name__}, expected a pair (out, lse)."
    )
    return *got, asked


def assert_attention(answer, case, block_q, block_k, look, nan=None):
    """Output and LSE are as near to the truth as plain PyTorch's. `nan`: where to look if there is NaN."""
    out, lse, asked = tiled(answer, case, block_q, block_k)
    look = nan if nan and (out.isnan().any() or lse.isnan().any()) else look
    rest = "so m and l are too. What is left is acc, and its division by l."
    try:
        assert_both(out, lse, truth(case), eager(case), rest, tile=block_q)
    except AssertionError as wrong:
        raise AssertionError(f"{asked}\n{wrong}\n{look}") from None


def assert_both(out, lse, want, plain, rest, tile=None):
    """O and L are right. If O is not, a line says whether L is, since that halves the search; `rest` says what then is left."""
    try:
        assert_near("O", out, want["out"], plain["out"], tile=tile)
    except AssertionError as wrong:
        try:
            assert_near("L", lse, want["lse"], plain["lse"])
        except AssertionError as also:
            lines = str(also).splitlines()
            shown = next((line for line in lines if line.startswith("L[")), lines[0])
        else:
            shown = f"Every L is right, {rest}"
        raise AssertionError(f"{wrong}\n{shown}") from None
    assert_near("L", lse, want["lse"], plain["lse"], tile=tile)


def still_right(answer, what, *claims):
    """Claims of an earlier exercise, made again: a later step mends the same lines."""
    for claim in claims:
        try:
            claim(answer)
        except AssertionError as wrong:
            said = claim.__doc__.splitlines()[0]
            raise AssertionError(f'{what}, "{said}":\n{wrong}') from None


# 4.1 tiled_attention


@pytest.mark.exercise("4.1")
def test_one_row_two_tiles(answer):
    """one query and two tiles of two keys, that you can check by hand"""
    scores = torch.tensor([[[[1.0, 3.0, 2.0, 5.0]]]])  # (1, 1, 1, 4)
    k = torch.eye(4)[None, None]  # the identity: the scores are the query itself
    v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [1.0, 5.0]]]])  # (1, 1, 4, 2)
    out, lse = answer.tiled_attention(scores, k, v, scale=1.0, block_q=1, block_k=2)
    want, want_lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
    got = f"O = {[round(x, 4) for x in out.flatten().tolist()]}, L = {lse.item():.4f}"
    assert out.shape == want.shape and torch.allclose(out, want, rtol=1e-5, atol=0), (
        f"{got}, expected O = {[round(x, 4) for x in want.flatten().tolist()]}.\n"
        f"The scores are [1, 3] and then [2, 5]. After the first tile m = 3, l = 1.1353, acc = [0.1353, 1].\n{STEP}"
    )
    assert torch.allclose(lse, want_lse, rtol=1e-5, atol=0), (
        f"{got}, expected L = {want_lse.item():.4f}.\nL = m + log l with the last m and the last l, natural log."
    )


@pytest.mark.exercise("4.1")
@pytest.mark.parametrize(
    "nq, nk, d, block_q, block_k",
    [(32, 32, 16, 8, 8), (24, 60, 24, 8, 12), (80, 16, 32, 16, 4), (64, 64, 40, 64, 64)],
)
def test_attention(answer, nq, nk, d, block_q, block_k):
    """tiles that fit: the output is softmax(scale Q K^T) V, and L its log-sum-exp"""
    look = f"For each tile: repair l AND acc by exp(m - m_new), then add. Divide by l once, after the last tile.\n{STEP}"
    case = make_case(2, 3, nq=nq, nk=nk, d=d, hot=3.0, seed=nq)
    assert_attention(answer, case, block_q, block_k, look)


@pytest.mark.exercise("4.1")
def test_block_size(answer):
    """block size does not change the answer"""
    case = make_case(nq=48, nk=48, d=16, hot=4.0, seed=1)
    look = (
        "Only the tile sizes are new here. What is added twice, or not repaired, when there are more tiles, or fewer?\n"
        "m, l and acc start anew for each tile of queries, and go on from one tile of keys to the next."
    )
    for block_q, block_k in ((48, 48), (48, 8), (8, 48), (16, 24), (24, 16), (1, 48), (48, 1), (3, 2)):
        assert_attention(answer, case, block_q, block_k, look)


@pytest.mark.exercise("4.1")
def test_values_of_another_width(answer):
    """the values may have another width than the keys"""
    for d, dv in ((16, 6), (8, 40)):
        look = (
            f"D = {d} and Dv = {dv}. acc and O are as wide as V; the scale comes from the width of Q and K."
        )
        assert_attention(answer, make_case(nq=32, nk=48, d=d, dv=dv, seed=d), 16, 8, look)


@pytest.mark.exercise("4.1")
def test_scale(answer):
    """the scale is 1 / sqrt(D), or the one that is given"""
    for scale in (None, 1.0, 0.3, 0.0, -0.5):
        look = "scale=None means D ** -0.5. Any number may be given, 0 too; it multiplies Q K^T once, before the maximum."
        assert_attention(answer, make_case(nq=16, nk=32, d=64, scale=scale, seed=2), 8, 16, look)


@pytest.mark.exercise("4.1")
def test_large_scores(answer):
    """scores near 1000 and near -1000 neither overflow nor vanish"""
    case = make_case(nq=16, nk=32, d=16, seed=3)
    for level in (1000.0, -1000.0):
        k = case.k.clone()
        k[..., 0] = level / 10.0
        q = case.q.clone()
        q[..., 0] = 10.0
        look = (
            f"Every score is near {level:.0f}. m starts at -inf, below every score, never at 0 or at -100; and exp only\n"
            "ever sees S - m_new and m - m_new."
        )
        assert_attention(answer, dataclasses.replace(case, q=q, k=k, scale=1.0), 8, 8, look)


@pytest.mark.exercise("4.1")
def test_rows_far_apart(answer):
    """rows far apart in one tile: each has its own maximum"""
    case = make_case(nq=16, nk=32, d=16, seed=19)
    q, k = case.q.clone(), case.k.clone()
    q[..., 0], k[..., 0] = torch.linspace(-100, 100, 16), 10.0
    look = (
        "Row 0 has scores near -1000 and row 15 near 1000. With one maximum for the whole tile the low rows vanish: take\n"
        "it along the last dimension, amax(dim=-1)."
    )
    assert_attention(answer, dataclasses.replace(case, q=q, k=k, scale=1.0), 8, 8, look)


@pytest.mark.exercise("4.1")
def test_rising_scores(answer):
    """the maximum of a row moves with every tile, or never"""
    case = make_case(nq=8, nk=64, d=8, seed=4)
    steps = torch.linspace(-100, 100, 64)
    for order, what in ((steps, "grows from tile to tile"), (steps.flip(0), "stands in the first tile")):
        q, k = case.q.clone(), case.k.clone()
        q[..., 0], k[..., 0] = 1.0, order
        look = (
            f"The maximum {what}. m is the maximum of all tiles so far, not of this one; l and acc are repaired by the same\n"
            f"factor, exp(m - m_new): old minus new, so never above 1.\n{STEP}"
        )
        assert_attention(answer, dataclasses.replace(case, q=q, k=k, scale=1.0), 8, 8, look)


@pytest.mark.exercise("4.1")
def test_double_precision(answer):
    """in double precision the answer is right to double precision"""
    case = make_case(nq=24, nk=36, d=16, dtype=torch.float64, hot=2.0, seed=5)
    out, lse, asked = tiled(answer, case, 8, 12)
    want = truth(case)
    some = 1 + 16 * torch.finfo(torch.float64).eps  # plain PyTorch is the truth here: allow a few roundings
    try:
        assert_close("O", out, want["out"], want["out"] * some)
        assert_close("L", lse, want["lse"], want["lse"] * some)
    except AssertionError as wrong:
        raise AssertionError(
            f"{asked}, float64\n{wrong}\n"
            "If only this claim fails, the error is small, but far above fp64's own. Nothing belongs in the denominator but l,\n"
            "no 1e-6; and new tensors take the dtype of the tile: q_tile.new_zeros(...), torch.zeros_like(...)."
        ) from None


@pytest.mark.exercise("4.1")
def test_half_precision(answer):
    """half precision in, float32 inside: the sums over keys are not rounded at every tile"""
    case = make_case(1, 2, nq=16, nk=1024, d=16, dtype=torch.float16, seed=6)
    case = dataclasses.replace(case, v=case.v + 2)  # values of one sign: a rounding error a tile adds up
    out, lse, asked = tiled(answer, case, 16, 2)
    want = naive_attention_with_lse(case.q.double(), case.k.double(), case.v.double())
    plain = naive_attention_with_lse(case.q.float(), case.k.float(), case.v.float())  # rounded to fp16 below
    asked += ", float16"
    assert out.dtype == torch.float16, f"{asked}\nO is {out.dtype}, expected the dtype of q, torch.float16."
    assert lse.dtype == torch.float32, f"{asked}\nL is {lse.dtype}, expected torch.float32."
    try:
        assert_close("O", out, want[0], plain[0].half())
        assert_near("L", lse, want[1], plain[1])
    except AssertionError as wrong:
        raise AssertionError(
            f"{asked}\n{wrong}\n"
            "If only this claim fails: fp16 keeps 11 bits, and rounding m, l or acc to it after each of 512 tiles adds up.\n"
            "load_tile gives float32: keep m, l and acc in it. Only the finished O is rounded, when it is stored."
        ) from None


@pytest.mark.exercise("4.1")
def test_memory(answer):
    """nothing of N x N numbers is made, not even in pieces"""
    case, n = make_case(1, 1, nq=256, nk=256, d=8, seed=7), 256

    def call():
        return answer.tiled_attention(case.q, case.k, case.v, block_q=32, block_k=32)

    largest = largest_allocation(call)
    assert largest.elements < n * n // 8, (
        f"N = {n}, blocks of 32: a tensor of shape {largest.shape} was made by {largest.op}, {largest.elements:,} numbers.\n"
        f"The scores of a tile are 32 x 32 = 1,024 numbers; nothing needs more than O itself, {n * 8:,}."
    )
    peak = peak_memory(call)
    assert peak < n * n * 4 // 2, (
        f"N = {n}, blocks of 32: {peak:,} bytes are held at once, and N x N numbers would be {n * n * 4:,}.\n"
        "Is every tile kept, in a list perhaps? A tile of S or P is gone when the next one comes."
    )


@pytest.mark.exercise("4.1")
def test_loads(answer):
    """Q is loaded once, K and V once for each tile of queries"""
    case = make_case(1, 1, nq=48, nk=64, d=8, dv=4, seed=8)
    trace, watched = watch(q=case.q, k=case.k, v=case.v)
    answer.tiled_attention(**watched, block_q=16, block_k=8)
    for name, x, times in (("q", case.q, 1), ("k", case.k, 3), ("v", case.v, 3)):
        got, want = trace.bytes_loaded(name), times * x.numel() * 4
        assert got == want, (
            f"Nq = 48 in tiles of 16 is 3 tiles of queries. {got:,} bytes of {name} were loaded, expected {want:,}: "
            f"{times} times {name}'s {x.numel() * 4:,}.\nUse q_tile, k_tile and v_tile; do not go back to q, k and v."
        )


@pytest.mark.exercise("4.1")
def test_device(answer):
    """new tensors are made on q's device"""
    for device in ("cpu", "meta"):  # "meta" stands for a GPU: its tensors have shapes and a device, but no numbers
        q, k, v = (torch.ones(1, 2, n, 4, device=device) for n in (8, 12, 12))
        try:
            answer.tiled_attention(q, k, v, block_q=4, block_k=4)
        except Exception as error:
            if device == "cpu":
                raise
            assert not re.search("(expected|same) device", str(error)), (
                "With q, k and v on another device than the CPU, a tensor on the CPU met one of theirs. torch.zeros(...)\n"
                "makes it on the CPU unless it is given device=q.device. q_tile.new_zeros(...), q_tile.new_full(...) and\n"
                "torch.zeros_like(m) make it where q_tile or m is."
            )


# 4.2 causal

RULE = "Query i sees key j if j <= i + Nk - Nq: the last query sees every key."


@pytest.mark.exercise("4.2")
@pytest.mark.parametrize(
    "n, block_q, block_k", [(32, 8, 8), (48, 8, 16), (48, 16, 8), (30, 15, 6), (30, 3, 2), (32, 32, 32), (12, 1, 1)]
)
def test_causal(answer, n, block_q, block_k):
    """each word sees itself and the words before it, whatever the tiles"""
    look = (
        "With Nq = Nk that is j <= i, and two places have to follow it. The loop ends one past the last key that any of\n"
        "these rows sees. In it, the mask hides from each row the keys past its own: keys and rows hold their numbers.\n"
        f"{RULE}"
    )
    assert_attention(
        answer, make_case(2, 2, nq=n, nk=n, d=16, hot=3.0, causal=True, seed=n), block_q, block_k, look
    )


@pytest.mark.exercise("4.2")
def test_fewer_queries_than_keys(answer):
    """fewer queries than keys: the last query sees every key"""
    look = f"The mask is aligned bottom-right. Both places need Nk - Nq: where the loop ends, and which keys are hidden.\n{RULE}"
    for nq, nk, block_q, block_k in ((16, 48, 8, 8), (8, 60, 4, 12), (1, 24, 1, 8), (24, 32, 12, 4)):
        assert_attention(
            answer, make_case(nq=nq, nk=nk, d=16, hot=3.0, causal=True, seed=nk), block_q, block_k, look
        )


@pytest.mark.exercise("4.2")
def test_more_queries_than_keys(answer):
    """more queries than keys: a row that sees nothing gives O = 0 and L = -inf"""
    look = (
        "The first Nq - Nk rows see no key: acc = 0, l = 0, m = -inf. 0/0 is NaN, so divide such a row by any other number;\n"
        f"m + log l is -inf by itself. And S - m_new is NaN where m_new is -inf: subtract anchor(m_new).\n{RULE}"
    )
    for nq, nk, block_q, block_k in ((48, 16, 8, 8), (32, 24, 16, 8), (12, 1, 4, 1), (64, 32, 16, 32)):
        assert_attention(
            answer, make_case(nq=nq, nk=nk, d=16, hot=3.0, causal=True, seed=nq), block_q, block_k, look
        )
    case = make_case(nq=24, nk=16, d=16, causal=True, seed=21)
    low = dataclasses.replace(case, q=40 * case.q.abs() + 40, k=-case.k.abs() - 1)  # every score is far below 0
    look = (
        "Every score is far below 0. Only m_new is anchored: repair = exp(m - anchor(m_new)) is 0 where m is -inf. With m anchored\n"
        "too, it is exp(0 - m_new), infinite here, and infinity times an l of 0 is NaN."
    )
    assert_attention(answer, low, 8, 8, look)


@pytest.mark.exercise("4.2")
def test_future_does_not_leak(answer):
    """changing the future changes no bit of the past"""
    case = make_case(nq=32, nk=40, d=16, causal=True, seed=9)
    before, lse_before, asked = tiled(answer, case, 8, 8)
    for first in (9, 23, 39):  # keys from here on are changed
        k, v = case.k.clone(), case.v.clone()
        k[..., first:, :] *= -30
        v[..., first:, :] += 1e6
        after, lse_after, _ = tiled(answer, dataclasses.replace(case, k=k, v=v), 8, 8)
        past = first - (40 - 32)  # query i sees keys up to i + 8
        same = (after == before).all(-1) & (lse_after == lse_before)
        wrong = (~same[..., :past]).nonzero()
        assert not len(wrong), (
            f"{asked}\nKeys and values from {first} on were changed, and row {wrong[0, -1]} changed with them. It may see\n"
            f"keys up to {wrong[0, -1] + 8}.\n{RULE}"
        )


@pytest.mark.exercise("4.2")
@pytest.mark.parametrize(
    "nq, nk, block_q, block_k", [(64, 64, 8, 8), (32, 64, 16, 8), (64, 32, 8, 16), (48, 48, 12, 4)]
)
def test_dead_tiles(answer, nq, nk, block_q, block_k):
    """a tile of keys that no row sees is not loaded, and every other is loaded once"""
    case = make_case(1, 1, nq=nq, nk=nk, d=8, causal=True, seed=nq)
    trace, watched = watch(q=case.q, k=case.k, v=case.v)
    answer.tiled_attention(**watched, causal=True, block_q=block_q, block_k=block_k)
    ends = [start + block_q + nk - nq for start in range(0, nq, block_q)]  # of the keys that a tile sees
    want = sum(-(-min(nk, max(0, end)) // block_k) for end in ends)
    for name in "kv":
        got = sum(event.name == name for event in trace.events)
        assert got == want, (
            f"q {tuple(case.q.shape)}, k {tuple(case.k.shape)}, block_q={block_q}, block_k={block_k}, causal=True\n"
            f"{got} tiles of {name} were loaded, expected {want} of the {nq // block_q} x {nk // block_k}.\n"
            "The last row of a tile of queries, start_q + block_q - 1, sees the most keys: end the loop behind its last one."
        )


class _MasksMade(TorchDispatchMode):
    """Counts the boolean tensors that are as large as a tile."""

    def __init__(self, tile):
        super().__init__()
        self.tile, self.count = tile, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, torch.Tensor)
            and result.dtype == torch.bool
            and tuple(result.shape[-2:]) == self.tile
        ):
            self.count += 1
        return result


@pytest.mark.exercise("4.2")
def test_masks_on_the_diagonal(answer):
    """only the tiles that the diagonal cuts are masked"""
    for nq, nk, block_q, block_k in ((64, 80, 4, 8), (30, 30, 3, 2), (24, 16, 3, 2)):
        one = _masks_made(answer, block_q, block_k, block_q, block_k)  # all that is made for one tile, which is cut
        made = _masks_made(answer, nq, nk, block_q, block_k)
        tiles = [
            tile
            for rows in causal_mask(nq, nk).split(block_q)
            for tile in rows.split(block_k, dim=1)
            if tile.any()
        ]
        cut = sum(not tile.all() for tile in tiles)
        asked = f"Nq = {nq}, Nk = {nk}, block_q={block_q}, block_k={block_k}, causal=True\n"
        assert one and made, f"{asked}A tile that the diagonal cuts got no mask."
        assert made <= one * cut, (
            f"{asked}{made // one} of the {len(tiles)} live tiles were masked; the diagonal cuts {cut} of them.\n"
            "The answer may be right, but in the other tiles every row sees every key. Make a mask only if the last key of the\n"
            "tile, start_k + block_k - 1, is hidden from its first row, start_q (whose last visible key is start_q + Nk - Nq)."
        )


def _masks_made(answer, nq, nk, block_q, block_k):
    case = make_case(1, 1, nq=nq, nk=nk, d=12, causal=True, seed=10)
    with _MasksMade((block_q, block_k)) as masks:
        answer.tiled_attention(case.q, case.k, case.v, causal=True, block_q=block_q, block_k=block_k)
    return masks.count


FULL = (
    test_one_row_two_tiles,
    test_block_size,
    test_values_of_another_width,
    test_scale,
    test_large_scores,
    test_rows_far_apart,
    test_rising_scores,
    test_double_precision,
    test_device,
)


@pytest.mark.exercise("4.2")
def test_full_is_still_right(answer):
    """without causal, full attention is still right"""
    still_right(answer, "causal=False, a claim of 4.1", *FULL)


# 4.3 ragged

NAN = (
    "NaN does not come from a padded key: its score is a number, 0. Look at the two exponentials of 4.1, which 4.2 mends:\n"
    "S - anchor(m_new) and m - anchor(m_new), with m as it is. Then look at the division, where l is 0."
)


@pytest.mark.exercise("4.3")
@pytest.mark.parametrize(
    "nq, nk, block_q, block_k",
    [(37, 41, 16, 16), (13, 29, 4, 8), (31, 5, 8, 4), (17, 64, 8, 16), (64, 17, 16, 8), (7, 7, 2, 3)],
)
def test_ragged(answer, nq, nk, block_q, block_k):
    """a length that the block does not divide"""
    look = (
        "The last tile reaches past the end. load_tile fills it with zeros, and a key of zeros has score 0, not -inf:\n"
        "it takes weight from the real keys. Put -inf where keys >= nk."
    )
    assert_attention(answer, make_case(2, 2, nq=nq, nk=nk, d=20, hot=3.0, seed=nq), block_q, block_k, look, NAN)


@pytest.mark.exercise("4.3")
def test_padding_gets_no_weight(answer):
    """scores far below 0: a padded key, whose score is 0, must not win"""
    case = make_case(nq=11, nk=19, d=16, seed=11)
    case = dataclasses.replace(case, q=20 * case.q.abs() + 20, k=-case.k.abs() - 1)
    look = (
        "Every real score is far below 0. If a padded key counts with its score of 0, it takes all the weight, and its value\n"
        "is zeros. If it only counts for the maximum, every real weight is exp(-100) or less. Put -inf there before that."
    )
    assert_attention(answer, case, 4, 8, look, NAN)


@pytest.mark.exercise("4.3")
def test_real_scores_of_zero(answer):
    """a real key may have the score 0: it is its number that says whether a key exists"""
    look = "All real scores are 0 here, like those of the padded keys. keys >= nk tells them apart, a score cannot."
    assert_attention(answer, make_case(nq=11, nk=19, d=16, scale=0.0, seed=20), 4, 8, look, NAN)


@pytest.mark.exercise("4.3")
def test_blocks_larger_than_the_lengths(answer):
    """blocks larger than the sequence"""
    look = "One tile holds everything, and most of it is padding. Are all keys from nk on hidden, and only those?"
    for nq, nk, block_q, block_k in ((5, 9, 64, 64), (9, 5, 16, 128), (1, 3, 32, 32), (3, 1, 32, 32)):
        assert_attention(answer, make_case(heads=4, nq=nq, nk=nk, d=16, seed=nk), block_q, block_k, look, NAN)


@pytest.mark.exercise("4.3")
def test_default_blocks(answer):
    """the default blocks, and lengths that are prime"""
    case = make_case(nq=67, nk=131, d=32, hot=2.0, seed=12)
    out, lse = answer.tiled_attention(case.q, case.k, case.v)
    want, plain = truth(case), eager(case)
    assert_near("O", out, want["out"], plain["out"])
    assert_near("L", lse, want["lse"], plain["lse"])


@pytest.mark.exercise("4.3")
@pytest.mark.parametrize(
    "nq, nk, block_q, block_k",
    [(29, 29, 8, 8), (13, 37, 8, 16), (37, 13, 8, 4), (23, 22, 64, 64), (22, 23, 5, 7), (5, 2, 16, 16)],
)
def test_ragged_and_causal(answer, nq, nk, block_q, block_k):
    """ragged and causal at once, with more queries than keys and with fewer"""
    look = f"Nk - Nq is any whole number here: the diagonal does not start in the corner of a tile.\n{RULE}"
    case = make_case(heads=3, nq=nq, nk=nk, d=16, hot=3.0, causal=True, seed=nq)
    assert_attention(answer, case, block_q, block_k, look, NAN)


@pytest.mark.exercise("4.3")
@pytest.mark.parametrize("causal", [False, True])
def test_no_keys(answer, causal):
    """no keys at all gives O = 0 and L = -inf; no queries gives nothing"""
    look = "Without keys the inner loop never runs: acc = 0, l = 0, m = -inf. 0/0 is NaN, so divide by another number."
    for nq, nk in ((5, 0), (0, 5)):
        case = make_case(nq=nq, nk=nk, d=8, dv=4, causal=causal)
        out, lse, asked = tiled(answer, case, 4, 4)
        assert out.shape == (1, 2, nq, 4) and lse.shape == (1, 2, nq), (
            f"{asked}\nO {tuple(out.shape)}, L {tuple(lse.shape)}"
        )
        assert (out == 0).all() and (lse == -INF).all(), (
            f"{asked}\nO = {out[0, 0, 0].tolist()}, L = {lse[0, 0, 0]}\n{look}"
        )


@pytest.mark.exercise("4.3")
def test_earlier_steps_are_still_right(answer):
    """where the blocks divide the lengths, full and causal attention are still right"""
    still_right(answer, "causal=False, a claim of 4.1", *FULL)
    causal = test_fewer_queries_than_keys, test_more_queries_than_keys, test_future_does_not_leak
    still_right(answer, "causal=True, a claim of 4.2", *causal)


# 4.4 merge_attention


def halves(case, cuts):
    """(out, lse) in fp64 for each piece of the keys between the cuts, rounded to the dtype of the case."""
    edges = [0, *cuts, case.k.shape[-2]]
    q, k, v = (x.double() for x in (case.q, case.k, case.v))
    parts = [(k[..., a:b, :], v[..., a:b, :]) for a, b in zip(edges, edges[1:])]
    pieces = [naive_attention_with_lse(q, *part, scale=case.scale) for part in parts]
    return [(out.to(case.q.dtype), lse.to(case.dlse.dtype)) for out, lse in pieces]


def assert_merged(got, case, what, look):
    """The merged pair is attention over all keys."""
    assert isinstance(got, (tuple, list)) and len(got) == 2, (
        f"{what}\nmerge_attention returned {type(got).__name__}, expected a pair (out, lse)."
    )
    try:
        assert_both(*got, truth(case), eager(case), "so what is left is O: the two shares, and what they multiply.")
    except AssertionError as wrong:
        raise AssertionError(f"{what}\n{wrong}\n{look}") from None


SHARES = (
    "exp(L_a) is the sum of exp(scores) over the keys of a. So a's share of all the weight is exp(L_a - L), with\n"
    "L = log(exp L_a + exp L_b), and O is the mean of O_a and O_b, weighted by their shares."
)


@pytest.mark.exercise("4.4")
@pytest.mark.parametrize("cut", [24, 5, 47])
def test_two_sets_of_keys(answer, cut):
    """attention over two sets of keys, merged, is attention over all of them"""
    case = make_case(2, 3, nq=21, nk=48, d=16, hot=3.0, seed=cut)
    a, b = halves(case, [cut])
    with left_alone("merge_attention", out_a=a[0], lse_a=a[1], out_b=b[0], lse_b=b[1]):
        got = answer.merge_attention(*a, *b)
    assert_merged(got, case, f"48 keys, cut before key {cut}", SHARES)
    assert_merged(
        answer.merge_attention(*b, *a), case, f"48 keys, cut before key {cut}, the second set first", SHARES
    )


@pytest.mark.exercise("4.4")
def test_many_sets(answer):
    """any number of pieces, merged in any order"""
    case = make_case(nq=13, nk=40, d=16, hot=3.0, seed=13)
    pieces = halves(case, [3, 11, 18, 30])

    def merge(a, b):
        return answer.merge_attention(*a, *b)

    assert_merged(functools.reduce(merge, pieces), case, "5 pieces, merged from left to right", SHARES)
    assert_merged(functools.reduce(merge, pieces[::-1]), case, "5 pieces, merged from right to left", SHARES)
    a, b, c, d, e = pieces
    assert_merged(merge(merge(a, b), merge(c, merge(d, e))), case, "5 pieces, merged as a tree", SHARES)


@pytest.mark.exercise("4.4")
def test_large_lse(answer):
    """L of 1000 or of -1000 neither overflows nor vanishes"""
    for level in (1000.0, -1000.0):
        case = make_case(nq=8, nk=32, d=16, seed=14)
        q, k = case.q.clone(), case.k.clone()
        q[..., 0], k[..., 0] = 10.0, level / 10.0
        case = dataclasses.replace(case, q=q, k=k, scale=1.0)
        a, b = halves(case, [10])
        look = f"L is near {level:.0f}, and exp of that is inf or 0. Only ever take exp of a difference; torch.logaddexp does too."
        assert_merged(answer.merge_attention(*a, *b), case, f"every score near {level:.0f}", look)


@pytest.mark.exercise("4.4")
def test_far_apart(answer):
    """two sets far apart: the weaker one adds nothing, and no NaN"""
    case = make_case(nq=8, nk=8, d=4, seed=15)
    ((out, lse),) = halves(case, [])
    other = torch.full_like(out, 7.0)
    for gap in (200.0, 5000.0):
        for got in (
            answer.merge_attention(out, lse, other, lse - gap),
            answer.merge_attention(other, lse - gap, out, lse),
        ):
            assert got[0].equal(out) and got[1].equal(lse), (
                f"L_a - L_b = {gap:.0f}: expected O = O_a and L = L_a, got O[0] = {got[0].flatten()[0]:.5g} "
                f"for {out.flatten()[0]:.5g}, L[0] = {got[1].flatten()[0]:.5g} for {lse.flatten()[0]:.5g}.\n{SHARES}"
            )


@pytest.mark.exercise("4.4")
def test_empty_set(answer):
    """a set of no keys, with L = -inf, changes nothing"""
    case = make_case(nq=9, nk=14, d=8, seed=16)
    ((out, lse),) = halves(case, [])
    nothing = torch.zeros_like(out), torch.full_like(lse, -INF)
    for what, got in (
        ("the second set is empty", answer.merge_attention(out, lse, *nothing)),
        ("the first set is empty", answer.merge_attention(*nothing, out, lse)),
    ):
        assert got[0].equal(out) and got[1].equal(lse), (
            f"{what}: expected the other set's O and L, got O[0] = {got[0].flatten()[0]:.5g} for {out.flatten()[0]:.5g}, "
            f"L[0] = {got[1].flatten()[0]:.5g} for {lse.flatten()[0]:.5g}.\nexp(-inf - L) is 0: that set's share."
        )


@pytest.mark.exercise("4.4")
def test_two_empty_sets(answer):
    """a query that saw no key in either set gives O = 0 and L = -inf, and its neighbours are right"""
    case = make_case(nq=9, nk=14, d=8, seed=17)
    (out_a, lse_a), (out_b, lse_b) = halves(case, [6])
    for out, lse in ((out_a, lse_a), (out_b, lse_b)):
        out[..., 4, :], lse[..., 4] = 0.0, -INF
    out, lse = answer.merge_attention(out_a, lse_a, out_b, lse_b)
    assert (out[..., 4, :] == 0).all() and (lse[..., 4] == -INF).all(), (
        f"row 4 saw nothing: O = {out[0, 0, 4, :3].tolist()}, L = {lse[0, 0, 4]}, expected zeros and -inf.\n"
        "-inf - (-inf) is NaN: subtract anchor(lse) instead of lse."
    )
    want, rest = truth(case), [0, 1, 2, 3, 5, 6, 7, 8]
    assert_near("O of the other rows", *(x["out"][..., rest, :] for x in ({"out": out}, want, eager(case))))
    assert_near("L of the other rows", *(x["lse"][..., rest] for x in ({"lse": lse}, want, eager(case))))


@pytest.mark.exercise("4.4")
def test_half_precision_merge(answer):
    """half precision in and out, L stays float32"""
    case = make_case(nq=33, nk=64, d=16, dtype=torch.float16, seed=18)
    a, b = halves(case, [20])
    out, lse = answer.merge_attention(*a, *b)
    assert out.dtype == torch.float16, (
        f"O_a is float16 and O came out as {out.dtype}. Round the sum with .to(out_a.dtype)."
    )
    assert lse.dtype == torch.float32, f"L_a is float32 and L came out as {lse.dtype}. Leave it as it is."
    want = naive_attention_with_lse(case.q.double(), case.k.double(), case.v.double())
    plain = naive_attention_with_lse(case.q.float(), case.k.float(), case.v.float())
    assert_close("O", out, want[0], plain[0].half())
    assert_near("L", lse, want[1], plain[1])
    far = [(out, lse + 1000) for out, lse in (a, b)]  # the same shares of the weight, and the same O
    look = "L and the shares are computed in the dtype of L; only O is rounded. float16 has steps of 1 near 1000."
    try:
        assert_close("O, with 1000 added to both L", answer.merge_attention(*far[0], *far[1])[0], want[0], plain[0].half())
    except AssertionError as wrong:
        raise AssertionError(f"{wrong}\n{look}") from None
