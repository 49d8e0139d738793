"""What an answer to chapter 03 must satisfy.

The truth is computed in fp64, and the bound is relative: a few roundings of the number itself, at its own dtype. (The
bound of flash_edu/testing.py, twice the error of plain PyTorch, asks for many numbers; here there are often one or four.)
"""

import functools
import itertools
import math
import weakref

import pytest
import torch
from frames import left_alone
from torch.overrides import TorchFunctionMode

INF = math.inf
LOWEST = torch.tensor([-3e38, -2e38, -2e38])  # near the lowest fp32 numbers, but finite


def rows_like(*shape, spread=4.0, level=0.0, dtype=torch.float32, seed=0):
    """Random scores, `spread` apart, around `level`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread + level).to(dtype)


def show(x):
    """A number, or a few of them, as a reader writes them."""
    x = torch.as_tensor(x)
    if x.dim() == 0:
        return f"{x.item():.5g}"
    numbers = [show(y) for y in x.flatten()[:8]]
    return f"[{', '.join(numbers)}{', ...' if x.numel() > 8 else ''}]"


def assert_near(name, got, want, dtype, roundings):
    """Raise AssertionError, in words, unless each number of `got` is within so many roundings of `want`."""
    assert got.shape == want.shape, f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    limits = torch.finfo(dtype)
    allowed = limits.eps * roundings * want.abs() + limits.tiny  # what is smaller than tiny may as well be 0
    right = ((got.double() - want).abs() <= allowed) | (got == want)  # infinities may be equal; NaN never is
    wrong = ~right
    if wrong.any():
        lines = []
        if want.numel() > 1:
            lines.append(f"{name}: {int(wrong.sum())} of {wrong.numel()} numbers are wrong")
        for at in map(tuple, wrong.nonzero()[:3].tolist()):
            place = f"[{', '.join(map(str, at))}]" if at else ""
            x, y = got[at].item(), want[at].item()
            digits = 6 if abs(x - y) > 1e-5 * abs(y) or x != x else 17
            lines.append(f"{name}{place} = {x:.{digits}g}, expected {y:.{digits}g}")
        raise AssertionError("\n".join(lines))


def show_blocks(blocks):
    """Blocks of one row in full; blocks of many rows by their widths."""
    if blocks[0].dim() == 1 and sum(b.numel() for b in blocks) <= 12:
        return "blocks " + ", ".join(show(b) for b in blocks)
    widths = ", ".join(str(b.shape[-1]) for b in blocks)
    return f"{len(blocks)} blocks of {widths} columns, rows {tuple(blocks[0].shape[:-1])}"


NO_STAND_IN = "No number like -1e4 or -1e9 can stand in for -inf."


# 3.1 safe_softmax


def softmax_truth(scores):
    """Softmax in fp64; a row of nothing gives zeros."""
    return scores.double().softmax(dim=-1).nan_to_num(0.0)


def softmax_roundings(scores):
    """How many roundings each weight may be off: a rounding of s - m is |s - m| times larger in exp(s - m)."""
    below = scores.double().amax(dim=-1, keepdim=True) - scores.double()
    return 8 + below.nan_to_num(0.0, posinf=0.0)


class FirstNaN(TorchFunctionMode):
    """Inside, notes the operation that gives the first NaN: "sub", "div", ... or "" if there is none."""

    op = ""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self.op and isinstance(result, torch.Tensor) and result.isnan().any():
            self.op = func.__name__.strip("_")
        return result


def about_nothing(op):
    """What to look at in a row of nothing but -inf, whose first NaN came from this operation."""
    if op in ("sub", "rsub", "isub"):
        return (
            "The first NaN comes from a subtraction: the maximum of a row of -inf is -inf, and -inf - (-inf) is NaN.\n"
            "Subtract anchor(m) instead of m."
        )
    if "div" in op:
        return (
            "The first NaN comes from a division: the sum of a row of -inf is 0, and 0/0 is NaN.\n"
            "Divide such a row by any other number."
        )
    where = f"The first NaN comes from {op}. " if op else ""
    return f"{where}Every term of a row of -inf is exp(-inf) = 0, and so are its sum and its weights."


def assert_weights(answer, scores, look):
    """The weights are right to a few roundings, and the scores are untouched. `look` may depend on the first NaN."""
    with left_alone("safe_softmax", scores=scores), FirstNaN() as first:
        got = answer.safe_softmax(scores)
    if callable(look):
        look = look(first.op)
    asked = f"safe_softmax({show(scores)})" if scores.dim() == 1 else f"scores of shape {tuple(scores.shape)}"
    assert isinstance(got, torch.Tensor), f"safe_softmax returned {type(got).__name__}, expected one tensor."
    try:
        assert_near("P", got, softmax_truth(scores), scores.dtype, softmax_roundings(scores))
    except AssertionError as wrong:
        raise AssertionError(f"{asked}\n{wrong}\n{look}") from None
    assert got.dtype == scores.dtype, (
        f"{scores.dtype} scores gave {got.dtype} weights. Keep the dtype of the scores."
    )


@pytest.mark.exercise("3.1")
def test_textbook(answer):
    """scores that never overflow: the weights of the textbook formula"""
    look = "P_j = exp(s_j - m) / sum_i exp(s_i - m). All along the last dimension, dim=-1."
    assert_weights(answer, torch.tensor([1.0, 3.0, 2.0, 5.0]), look)
    for shape in ((7,), (5, 13), (2, 3, 31), (4, 1)):
        assert_weights(answer, rows_like(*shape, spread=1.0, seed=len(shape)), look)


@pytest.mark.exercise("3.1")
def test_large_scores(answer):
    """scores of 1000 and of -1000 give weights, not NaN"""
    for level in (1000.0, -1000.0):
        look = (
            f"The scores are near {level:.0f}. exp(1000) is infinite and exp(-1000) is 0 in fp32, so inf/inf or 0/0.\n"
            'Subtract the row\'s own maximum before exp. See "Why the textbook formula is not enough".'
        )
        assert_weights(answer, torch.tensor([1.0, 3.0, 2.0, 5.0]) + level, look)
        assert_weights(answer, rows_like(3, 17, level=level, seed=1), look)
    assert_weights(answer, LOWEST, f"These scores are finite, so one of them is the maximum. {NO_STAND_IN}")


@pytest.mark.exercise("3.1")
def test_each_row_has_its_maximum(answer):
    """rows far apart: each row subtracts its own maximum"""
    scores = rows_like(4, 9, seed=2) + torch.tensor([400.0, 0.0, -400.0, -2000.0])[:, None]
    look = (
        "The rows lie near 400, 0, -400 and -2000. With one maximum for the whole tensor, the low rows vanish to 0.\n"
        "amax(dim=-1, keepdim=True) gives one maximum per row, shaped (..., 1) so that it can be subtracted."
    )
    assert_weights(answer, scores, look)
    assert_weights(answer, scores.reshape(2, 2, 9), look)


@pytest.mark.exercise("3.1")
def test_wide_row(answer):
    """scores far apart in one row: the largest is what to subtract"""
    scores = torch.tensor([[-300.0, 300.0, 298.0, 0.0], [150.0, -150.0, 149.0, -1000.0]])
    look = (
        "The row reaches from -300 to 300. With its mean or its minimum subtracted, the largest exponent is still far\n"
        "above 88. With its maximum subtracted it is 0, and no weight can overflow."
    )
    assert_weights(answer, scores, look)
    assert_weights(answer, rows_like(5, 12, spread=200.0, seed=22), look)


@pytest.mark.exercise("3.1")
def test_double_precision(answer):
    """in double precision the weights are right to double precision"""
    look = (
        "If only this claim fails, the error is small, but far above fp64's own. Every row with a score has a sum of at least\n"
        "1 and needs no 1e-6: only a sum of exactly 0 is replaced. And do not convert the scores to another dtype."
    )
    assert_weights(answer, rows_like(6, 11, dtype=torch.float64, seed=3), look)


@pytest.mark.exercise("3.1")
def test_masked_scores(answer):
    """a score of -inf gets weight 0 and disturbs nobody"""
    scores = rows_like(3, 6, seed=4)
    scores[0, 0] = scores[1, 2:] = scores[2, 5] = -INF
    look = "exp(-inf) is 0: a masked score needs no special treatment if its row has a finite one."
    assert_weights(answer, scores, look)
    look = "The row's maximum is its largest score, -1000 here. A masked score is -inf in it, never 0."
    assert_weights(answer, torch.tensor([-1000.0, -1001.0, -INF]), look)


@pytest.mark.exercise("3.1")
def test_row_of_nothing(answer):
    """a row of nothing but -inf gives zeros, and its neighbours are right"""
    scores = rows_like(3, 5, seed=5)
    scores[1] = -INF
    assert_weights(answer, scores, about_nothing)
    assert_weights(answer, torch.full((4,), -INF), about_nothing)


# 3.2 online_softmax


def pair_truth(scores):
    """(m, l) in fp64."""
    m = scores.double().amax(dim=-1)
    return m, (scores.double() - m.masked_fill(m == -INF, 0.0)[..., None]).exp().sum(dim=-1)


def assert_pair(got, scores, asked, look, about_m, about_shape):
    """The pair is the maximum and the sum of the rows.

    `look` is for those whose m is right: it is about l, and may depend on it.
    """
    assert isinstance(got, (tuple, list)) and len(got) == 2, (
        f"{asked}\nreturned {type(got).__name__}, expected a pair (m, l)."
    )
    m, l = (torch.as_tensor(x) for x in got)
    want = pair_truth(scores)
    if m.shape != want[0].shape or l.shape != want[1].shape:
        look = about_shape
    elif not m.equal(want[0].to(m.dtype)):
        look = about_m
    elif callable(look):
        look = look(l)
    try:
        assert_near("m", m, want[0], scores.dtype, 0)  # a maximum is never rounded
        assert_near("l", l, want[1], scores.dtype, 8 + scores.shape[-1])  # at most one repair per score
    except AssertionError as wrong:
        raise AssertionError(f"{asked}\n{wrong}\n{look}") from None


M_SO_FAR = (
    "m is the largest score so far, in each row: the larger of the m before the block and the block's own maximum.\n"
    f"It starts at -inf. {NO_STAND_IN}\n"
    "anchor is only for what is subtracted: keep m itself, -inf too, in the pair."
)
NO_KEEPDIM = (
    "No keepdim here: m and l are (...), one number per row, as amax(dim=-1) and sum(dim=-1) give it."
)


def assert_online(answer, blocks, look):
    """online_softmax(blocks) is the pair of the blocks put side by side."""
    with left_alone("online_softmax", **{f"block {i}": block for i, block in enumerate(blocks)}):
        pair = answer.online_softmax(blocks)
    assert_pair(pair, torch.cat(blocks, dim=-1), show_blocks(blocks), look, M_SO_FAR, NO_KEEPDIM)


TOY = torch.tensor([1.0, 3.0, 2.0, 5.0])
REPAIR = (
    "Terms measured against the old maximum cannot be added to terms measured against the new one: first multiply l by\n"
    'exp(m - m_new), old minus new. See "One pass, two numbers".'
)


@pytest.mark.exercise("3.2")
def test_one_block(answer):
    """one block gives the row's own maximum and sum"""
    look = "With one block there is nothing to repair: l is the sum of exp(s - m) over the block."
    for scores in (TOY, rows_like(1, seed=6), rows_like(23, seed=7)):
        assert_online(answer, [scores], look)


@pytest.mark.exercise("3.2")
def test_where_it_is_cut(answer):
    """cutting the row elsewhere does not change the answer"""
    for widths in ((2, 2), (1, 3), (3, 1), (1, 1, 1, 1)):
        assert_online(answer, list(TOY.split(widths)), REPAIR)
    for width in (1, 2, 5, 7, 50):
        assert_online(answer, list(rows_like(53, seed=8).split(width)), REPAIR)


@pytest.mark.exercise("3.2")
def test_rising_and_falling(answer):
    """rows that only rise, or only fall: the maximum moves always, or never"""
    rising = torch.linspace(-30, 30, 24)
    for scores, what in ((rising, "rises with every block"), (rising.flip(0), "is found in the first block")):
        assert_online(answer, list(scores.split(4)), f"The maximum {what}.\n{REPAIR}")


@pytest.mark.exercise("3.2")
def test_order_of_blocks(answer):
    """the order of the blocks does not change the answer"""
    for order in itertools.permutations(TOY.split(1)):
        assert_online(answer, list(order), f"Only the order of the blocks is new here.\n{REPAIR}")


@pytest.mark.exercise("3.2")
def test_many_rows(answer):
    """many rows at once: each has its own m and l"""
    look = (
        "amax(dim=-1) and sum(dim=-1) give one number per row, (...). To subtract it from a block (..., n), it needs a\n"
        "last dimension: m_new[..., None]. The maximum moves in one row and not in another; the repair is row by row."
    )
    for shape in ((3, 14), (2, 3, 19), (14, 14)):
        scores = rows_like(*shape, spread=8.0, seed=shape[-1])
        assert_online(answer, list(scores.split(4, dim=-1)), look)


@pytest.mark.exercise("3.2")
def test_far_from_zero(answer):
    """scores near 1000 and near -1000"""
    for level in (1000.0, -1000.0):
        look = (
            f"Every score is near {level:.0f}. exp only ever sees s - m_new and m - m_new, never s or m alone. What is subtracted\n"
            "is anchored, and nothing else: the factor of the first block is exp(-inf - m_new) = 0."
        )

        def about(l, look=look):
            return look if not l.isfinite().all() or (l == 0).any() else REPAIR

        assert_online(answer, list((TOY + level).split(2)), about)
        assert_online(answer, list(rows_like(4, 21, level=level, seed=9).split(5, dim=-1)), about)
    assert_online(answer, list(LOWEST.split(2)), REPAIR)


@pytest.mark.exercise("3.2")
def test_double_precision_pair(answer):
    """in double precision the pair is right to double precision"""
    look = (
        "If only this claim fails, the error is small, but far above fp64's own. Is something added to l, or is a block\n"
        "converted to fp32?"
    )
    assert_online(answer, list(rows_like(3, 40, dtype=torch.float64, seed=10).split(7, dim=-1)), look)


@pytest.mark.exercise("3.2")
def test_masked_block(answer):
    """a block of nothing but -inf changes nothing, wherever it stands"""
    nothing = torch.full((2,), -INF)
    look = (
        "A block of -inf adds 0 to l. When it comes first, m_new is still -inf, and -inf - (-inf) is NaN:\n"
        "subtract anchor(m_new), in the terms and in the repair factor, and anchor nothing else."
    )
    for at in range(3):
        for scores in (TOY, torch.tensor([-200.0, -201.0, -203.0, -202.0])):
            blocks = list(scores.split(2))
            blocks.insert(at, nothing)
            assert_online(answer, blocks, lambda l: look if l.isnan().any() else REPAIR)


@pytest.mark.exercise("3.2")
def test_rows_of_nothing(answer):
    """a row of nothing but -inf gives m = -inf and l = 0, and its neighbours are right"""
    scores = rows_like(3, 8, seed=11)
    scores[1] = -INF
    look = "Row 1 is empty: each of its terms is exp(-inf - anchor(-inf)) = exp(-inf - 0) = 0, so its l is 0."
    assert_online(answer, list(scores.split(3, dim=-1)), lambda l: look if l[1] != 0 else REPAIR)


@pytest.mark.exercise("3.2")
def test_blocks_are_not_kept(answer):
    """each block is used once and let go"""
    alive = []

    def arrive():
        for number in range(6):
            kept = [n for n, block in enumerate(alive[:-1]) if block() is not None]
            assert not kept, (
                f"when block {number} was asked for, block {kept[0]} was still being kept.\n"
                "The point is never to hold the whole row: keep m and l, drop the block. No list of blocks, no torch.cat."
            )
            block = rows_like(5, seed=number)
            alive.append(weakref.ref(block))
            yield block
            del block

    got = answer.online_softmax(arrive())
    scores = torch.cat([rows_like(5, seed=number) for number in range(6)])
    asked = "6 blocks from a generator, which can be read once"
    assert_pair(got, scores, asked, "Loop over blocks once, with for.", M_SO_FAR, NO_KEEPDIM)


# 3.3 merge


def piece(scores):
    """The pair of a piece, in the dtype of its scores."""
    return tuple(x.to(scores.dtype) for x in pair_truth(scores))


LARGER = (
    f"m is the larger of m_a and m_b, row by row; -inf where both are. {NO_STAND_IN}\n"
    "anchor is only for what is subtracted: keep m itself in the pair."
)
AS_GIVEN = "m and l are (...), one number per row, as m_a and l_a are."


def assert_merge(got, scores, asked, look):
    """The merged pair is that of the scores of all pieces."""
    assert_pair(got, scores, asked, look, LARGER, AS_GIVEN)


def assert_merged(answer, a, b, look):
    """merge of the pairs of a and b is the pair of a and b side by side."""
    asked = f"merge of the pairs of {show(a)} and {show(b)}"
    if a.dim() > 1:
        asked = f"merge of the pairs of pieces {tuple(a.shape)} and {tuple(b.shape)}"
    assert_merge(answer.merge(piece(a), piece(b)), torch.cat([a, b], dim=-1), asked, look)


MERGE = (
    "Both sums are measured against their own maximum. Bring both to the common one: l_a times exp(m_a - m), and\n"
    "l_b times exp(m_b - m), with m the larger of the two."
)


@pytest.mark.exercise("3.3")
def test_halves(answer):
    """two halves make the whole, whichever holds the maximum"""
    for a, b in ((TOY[:2], TOY[2:]), (TOY[2:], TOY[:2]), (TOY[:1], TOY[1:]), (TOY[:2], TOY[:2])):
        assert_merged(answer, a, b, MERGE)
    assert_merged(answer, rows_like(17, seed=12), rows_like(4, seed=13), MERGE)


@pytest.mark.exercise("3.3")
def test_pairs_unchanged(answer):
    """the pairs are as they were before"""
    a, b = piece(rows_like(5, 9, seed=14)), piece(rows_like(5, 30, spread=9.0, seed=15))
    with left_alone("merge", m_a=a[0], l_a=a[1], m_b=b[0], l_b=b[1]):
        answer.merge(a, b)


@pytest.mark.exercise("3.3")
def test_swapped(answer):
    """a with b is b with a"""
    a, b = piece(rows_like(5, 9, seed=14)), piece(rows_like(5, 30, spread=9.0, seed=15))
    one, other = answer.merge(a, b), answer.merge(b, a)
    for name, x, y in zip("ml", one, other):
        assert torch.allclose(x, y, rtol=1e-6, atol=0), (
            f"merge(a, b) gives {name} = {show(x)}, merge(b, a) gives {name} = {show(y)}.\n{MERGE}"
        )


@pytest.mark.exercise("3.3")
def test_any_tree(answer):
    """any tree of merges gives the answer of one pass"""
    scores = rows_like(3, 35, spread=8.0, seed=16)
    pieces = [piece(s) for s in scores.split(5, dim=-1)]
    chain = functools.reduce(answer.merge, pieces)
    assert_merge(chain, scores, "7 pieces, merged from left to right", MERGE)
    right = functools.reduce(lambda done, new: answer.merge(new, done), reversed(pieces))
    assert_merge(right, scores, "7 pieces, merged from right to left", MERGE)
    while len(pieces) > 1:
        pairs = [pieces[i : i + 2] for i in range(0, len(pieces), 2)]
        pieces = [answer.merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    assert_merge(pieces[0], scores, "7 pieces, merged two by two", MERGE)


@pytest.mark.exercise("3.3")
def test_far_apart(answer):
    """pieces far apart, and both far from zero"""
    look = f"exp(m_a) alone overflows near 1000 and vanishes near -1000. Only ever take exp of a difference.\n{MERGE}"
    for a, b in ((1000.0, 1003.0), (-1000.0, -1002.0), (1000.0, -1000.0), (-500.0, 500.0)):
        assert_merged(answer, TOY + a, rows_like(5, seed=17) + b, look)
    assert_merged(answer, LOWEST[:1], LOWEST[1:], MERGE)


@pytest.mark.exercise("3.3")
def test_rows_apart(answer):
    """each row merges with itself, by its own factor"""
    a, b = rows_like(4, 6, spread=9.0, seed=18), rows_like(4, 7, spread=9.0, seed=19)
    look = f"m and l hold one number per row. In some rows a has the maximum, in others b: the factors are row by row.\n{MERGE}"
    assert_merged(answer, a, b, look)
    assert_merged(answer, a.reshape(2, 2, 6), b.reshape(2, 2, 7), look)


@pytest.mark.exercise("3.3")
def test_double_precision_merge(answer):
    """in double precision the merged pair is right to double precision"""
    a, b = (rows_like(3, n, dtype=torch.float64, seed=n) for n in (8, 15))
    look = (
        "If only this claim fails, the error is small, but far above fp64's own. Is something added to l, or converted\n"
        "to fp32?"
    )
    assert_merged(answer, a, b, look)


@pytest.mark.exercise("3.3")
def test_empty_piece(answer):
    """an empty piece, (-inf, 0), changes nothing"""
    for level in (0.0, -1000.0, 1000.0):
        full = piece(rows_like(3, 8, level=level, seed=20))
        empty = (torch.full((3,), -INF), torch.zeros(3))
        for name, got in (
            ("merge(a, empty)", answer.merge(full, empty)),
            ("merge(empty, a)", answer.merge(empty, full)),
        ):
            for part, x, want in zip("ml", got, full):
                assert x.equal(want), (
                    f"{name} gives {part} = {show(x)}, expected that of a: {show(want)}. Its m is {show(full[0])}.\n"
                    "exp(-inf - m) is 0 and exp(m - m) is 1: the formula needs no special case for one empty piece.\n"
                    "Only what is subtracted is anchored, never m_a or m_b."
                )


@pytest.mark.exercise("3.3")
def test_two_empty_pieces(answer):
    """two empty pieces make an empty piece, not NaN"""
    a, b = rows_like(2, 8, seed=21), rows_like(2, 5, seed=23)
    a[1] = b[1] = -INF  # row 1 is empty in both, row 0 in neither
    look = "Where both pieces are empty, the larger maximum is -inf, and -inf - (-inf) is NaN: subtract anchor(m) instead of m."

    def about(l):
        return look if l.isnan().any() else MERGE

    assert_merged(answer, a, b, about)
    assert_merged(answer, torch.full((4,), -INF), torch.full((3,), -INF), about)
