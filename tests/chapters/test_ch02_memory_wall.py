"""What an answer to chapter 02 must satisfy. The truth is what running code was seen to move, or exact arithmetic."""

import math
from fractions import Fraction

import pytest
import torch

from flash_edu.figures import count_traffic

COUNTS = ("dots", "scores", "weights", "output")
SIZES = [(1, 1, 4, 4, 4, 2), (2, 3, 5, 9, 8, 6), (1, 2, 11, 3, 4, 7), (3, 1, 1, 13, 5, 5), (2, 2, 7, 1, 3, 10)]


def as_counts(got, call):
    """The two whole numbers that an answer returned, once they are that."""
    assert got is not None, f"{call} returned None.\nA function that ends without `return` gives None."
    assert isinstance(got, tuple) and len(got) == 2, (
        f"{call} returned {got!r}, of type {type(got).__name__}, expected two numbers: (flops, bytes)."
    )
    for what, number in zip(("flops", "bytes"), got):
        assert type(number) is int, (
            f"{call}: {what} = {number!r} is of type {type(number).__name__}, expected int.\n"
            "Things that are counted are whole numbers. Multiply plain Python ints; nothing is divided or rounded."
        )
    return got


def cost(answer, a, b, dtype=torch.float32):
    call = f"matmul_cost({tuple(a)}, {tuple(b)}, {dtype})"
    return as_counts(answer.matmul_cost(a, b, dtype), call), call


# 2.1 matmul_cost


@pytest.mark.exercise("2.1")
def test_matmul_by_hand(answer):
    """a product of (2, 3) and (3, 4) that you can count by hand: 48 flops, 104 bytes"""
    (flops, nbytes), call = cost(answer, (2, 3), (3, 4))
    assert (flops, nbytes) == (48, 104), (
        f"{call} = ({flops}, {nbytes}), expected (48, 104).\n"
        "8 numbers come out, and each takes 3 multiplications and 3 additions. 6 + 12 numbers are read and 8 written."
    )


@pytest.mark.exercise("2.1")
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (5, 7, 3), (16, 2, 31), (1, 64, 9), (9, 64, 1)])
def test_matmul_flops(answer, m, k, n):
    """each of the M N results takes K multiplications and K additions"""
    (flops, _), call = cost(answer, (m, k), (k, n))
    assert flops == 2 * m * k * n, (
        f"{call}: {flops} flops, expected 2 * {m} * {k} * {n} = {2 * m * k * n}.\n"
        "Multiply three lengths: rows of a, columns of b, and the length that is summed over, once."
    )


@pytest.mark.exercise("2.1")
@pytest.mark.parametrize("m, k, n", [(1, 1, 1), (5, 7, 3), (16, 2, 31), (1, 64, 9), (9, 64, 1)])
def test_matmul_bytes(answer, m, k, n):
    """a and b are read once and the result is written once"""
    (_, nbytes), call = cost(answer, (m, k), (k, n))
    right = 4 * (m * k + k * n + m * n)
    assert nbytes == right, (
        f"{call}: {nbytes} bytes, expected {right}.\n"
        f"a has {m * k} numbers, b {k * n}, the result {m * n}; 4 bytes each."
    )


@pytest.mark.exercise("2.1")
@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (3, 1, 2)])
def test_matmul_leading_dims(answer, batch):
    """all dims in front, however many, multiply flops and bytes alike"""
    a, b = (*batch, 3, 7), (*batch, 7, 4)
    (flops, nbytes), call = cost(answer, a, b)
    right = math.prod(batch) * 168, math.prod(batch) * 244
    assert (flops, nbytes) == right, (
        f"{call} = ({flops}, {nbytes}), expected {right}.\n"
        f"That is {math.prod(batch)} of the product (3, 7) @ (7, 4), each with its own a, b and result."
    )


@pytest.mark.exercise("2.1")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_matmul_dtype(answer, dtype):
    """the dtype changes the bytes, and not the flops"""
    (flops, nbytes), call = cost(answer, (2, 5, 7), (2, 7, 3), dtype)
    right = 420, 2 * (35 + 21 + 15) * dtype.itemsize
    assert (flops, nbytes) == right, (
        f"{call} = ({flops}, {nbytes}), expected {right}.\n"
        f"A number of {dtype} has {dtype.itemsize} bytes. Flops are counted, whatever they are done in."
    )


@pytest.mark.exercise("2.1")
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_matmul_is_what_runs(answer, batch):
    """running code is seen to do and to move as much"""
    a, b = torch.ones(*batch, 6, 11), torch.ones(*batch, 11, 5)
    traffic = count_traffic(torch.matmul, a, b)
    (flops, nbytes), call = cost(answer, a.shape, b.shape)
    assert (flops, nbytes) == (traffic.flops, traffic.bytes), (
        f"{call} = ({flops}, {nbytes}).\n"
        f"count_traffic(torch.matmul, a, b) saw ({traffic.flops}, {traffic.bytes}) for these shapes."
    )


@pytest.mark.exercise("2.1")
def test_matmul_large(answer):
    """shapes too large for any machine are counted exactly"""
    m, k, n = 1_000_003, 999_983, 1_000_033
    (flops, nbytes), call = cost(answer, (3, m, k), (3, k, n), torch.float16)
    right = 6 * m * k * n, 6 * (m * k + k * n + m * n)
    assert (flops, nbytes) == right, (
        f"{call} = ({flops}, {nbytes}), expected {right}.\n"
        "Python's ints have no largest number. A float on the way, such as 2.0 or 1e9, rounds."
    )


@pytest.mark.exercise("2.1")
def test_matmul_leaves_the_shapes(answer):
    """shapes given as lists are as they were before"""
    a, b = [2, 3, 4], [2, 4, 5]
    got, right = answer.matmul_cost(a, b, torch.float32), (240, 4 * 2 * (12 + 20 + 15))
    assert (a, b) == ([2, 3, 4], [2, 4, 5]), (
        f"The shapes [2, 3, 4] and [2, 4, 5] were changed to {a} and {b}.\n"
        "`.pop()` and `+=` change the caller's list. `*batch, m, k = a_shape` makes a new one."
    )
    assert got == right, f"matmul_cost([2, 3, 4], [2, 4, 5], torch.float32) = {got}, expected {right}."


# 2.2 count_bytes


def bytes_of(answer, *sizes, element_size=4):
    """The answer's counts, once they are whole numbers with the right names."""
    call = f"count_bytes({', '.join(map(str, (*sizes, element_size)))})"
    got = answer.count_bytes(*sizes, element_size)
    assert got is not None, f"{call} returned None.\nA function that ends without `return` gives None."
    assert isinstance(got, dict), f"{call} returned something of type {type(got).__name__}, expected a dict."
    assert set(got) == set(COUNTS), (
        f"{call} has the names {', '.join(map(str, got))}; expected {', '.join(COUNTS)}, one for each operation."
    )
    for name in COUNTS:
        assert type(got[name]) is int, (
            f"{call}: {name} = {got[name]!r} is of type {type(got[name]).__name__}, expected int."
        )
    return {name: got[name] for name in COUNTS}, call


def seen(batch, heads, nq, nk, d, dv, dtype=torch.float32):
    """What the four operations move when they run."""
    q, k, v = (torch.ones(batch, heads, n, w, dtype=dtype) for n, w in ((nq, d), (nk, d), (nk, dv)))
    steps = {}
    dots = count_traffic(torch.matmul, q, k.mT)
    scores = count_traffic(torch.mul, dots.result, d**-0.5)
    weights = count_traffic(torch.softmax, scores.result, -1)
    output = count_traffic(torch.matmul, weights.result, v)
    for name, traffic in zip(COUNTS, (dots, scores, weights, output)):
        steps[name] = traffic.bytes
    return steps


def assert_bytes(answer, names, sizes, look):
    got, call = bytes_of(answer, *sizes)
    right = seen(*sizes)
    for name in names:
        assert got[name] == right[name], (
            f"{call}: {name} moves {got[name]} bytes, expected {right[name]}.\n{look}"
        )


@pytest.mark.exercise("2.2")
def test_bytes_by_hand(answer):
    """the toy, which you can count by hand: 192, 128, 128 and 128 bytes"""
    got, call = bytes_of(answer, 1, 1, 4, 4, 4, 2)
    assert list(got.values()) == [192, 128, 128, 128], (
        f"{call} = {got},\nexpected dots 192, scores 128, weights 128, output 128.\n"
        "The toy: q and k have 16 numbers each, every table has 16, v and the output have 8 each; 4 bytes a number."
    )


@pytest.mark.exercise("2.2")
@pytest.mark.parametrize("sizes", SIZES)
def test_bytes_of_dots(answer, sizes):
    """dots: reads q and k, writes a table"""
    look = "q has B H Nq D numbers, k has B H Nk D, the table has B H Nq Nk. Each of the three is moved once."
    assert_bytes(answer, ["dots"], sizes, look)


@pytest.mark.exercise("2.2")
@pytest.mark.parametrize("sizes", SIZES)
def test_bytes_of_scores(answer, sizes):
    """scores: reads a table, writes a table"""
    look = "The dots are read, the scores are written: both have B H Nq Nk numbers. The scale itself is one number."
    assert_bytes(answer, ["scores"], sizes, look)


@pytest.mark.exercise("2.2")
@pytest.mark.parametrize("sizes", SIZES)
def test_bytes_of_weights(answer, sizes):
    """weights: softmax reads a table, writes a table"""
    look = "Softmax is one operation here: the scores are read once, the weights are written once, B H Nq Nk each."
    assert_bytes(answer, ["weights"], sizes, look)


@pytest.mark.exercise("2.2")
@pytest.mark.parametrize("sizes", SIZES)
def test_bytes_of_output(answer, sizes):
    """output: reads the weights and v, writes the output"""
    look = "The weights have B H Nq Nk numbers, v has B H Nk Dv, the output has B H Nq Dv: as wide as v, not as q."
    assert_bytes(answer, ["output"], sizes, look)


@pytest.mark.exercise("2.2")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_bytes_of_other_dtypes(answer, dtype):
    """numbers of 2 or of 8 bytes move half or twice as much"""
    got, call = bytes_of(answer, 2, 3, 5, 9, 8, 6, element_size=dtype.itemsize)
    right = seen(2, 3, 5, 9, 8, 6, dtype)
    assert got == right, (
        f"{call} =\n{got}, expected\n{right}.\nEvery number that is moved has `element_size` bytes, in all four."
    )


@pytest.mark.exercise("2.2")
def test_bytes_of_long_texts(answer):
    """a text far too long for any machine is counted exactly"""
    n = 100_000_007
    got, call = bytes_of(answer, 3, 5, n, n, 64, 48, element_size=2)
    table = 30 * n * n
    right = [table + 30 * 128 * n, 2 * table, 2 * table, table + 30 * 96 * n]
    assert list(got.values()) == right, (
        f"{call} =\n{list(got.values())}, expected\n{right}.\n"
        "Python's ints have no largest number; a float on the way rounds. No tensor has to be made to count it."
    )


# 2.3 arithmetic_intensity


def intensities(answer, *sizes, element_size=4):
    call = f"arithmetic_intensity({', '.join(map(str, (*sizes, element_size)))})"
    got = answer.arithmetic_intensity(*sizes, element_size)
    assert got is not None, f"{call} returned None.\nA function that ends without `return` gives None."
    assert isinstance(got, tuple) and len(got) == 2, (
        f"{call} returned {got!r}, of type {type(got).__name__}, expected two numbers: (naive, fused)."
    )
    for name, x in zip(("naive", "fused"), got):
        assert isinstance(x, float), (
            f"{call}: {name} = {x!r} is of type {type(x).__name__}, expected float. `/` keeps the fraction, `//` drops it."
        )
    return got, call


def flops_of(batch, heads, nq, nk, d, dv):
    return 2 * batch * heads * nq * nk * (d + dv)


def naive_intensity(*sizes, element_size=4):
    """From what running code moves, at 4 bytes a number."""
    return float(Fraction(4 * flops_of(*sizes), element_size * sum(seen(*sizes).values())))


def fused_intensity(batch, heads, nq, nk, d, dv, element_size=4):
    numbers = batch * heads * (nq * d + nk * (d + dv) + nq * dv)
    return float(Fraction(flops_of(batch, heads, nq, nk, d, dv), element_size * numbers))


def assert_intensity(name, got, right, call, look):
    assert math.isclose(got, right, rel_tol=1e-9), f"{call}: {name} = {got:.6g}, expected {right:.6g}.\n{look}"


@pytest.mark.exercise("2.3")
def test_intensity_by_hand(answer):
    """the toy, which you can count by hand: 192 flops, 576 bytes or 192 bytes"""
    (naive, fused), call = intensities(answer, 1, 1, 4, 4, 4, 2)
    if not math.isclose(naive, 1 / 3):
        test_bytes_by_hand(answer)  # if count_bytes is to blame, this says so
    assert math.isclose(naive, 1 / 3) and math.isclose(fused, 1), (
        f"{call} = ({naive:.6g}, {fused:.6g}), expected (0.333333, 1).\n"
        "128 flops for Q K^T and 64 for P V. Naive moves 192 + 128 + 128 + 128 bytes, fused 64 + 64 + 32 + 32."
    )


@pytest.mark.exercise("2.3")
@pytest.mark.parametrize("sizes", SIZES)
def test_naive_intensity(answer, sizes):
    """naive: the flops of both products over the bytes of all four operations"""
    (naive, _), call = intensities(answer, *sizes)
    look = (
        "Flops: 2 B H Nq Nk D for Q K^T and 2 B H Nq Nk Dv for P V. Bytes: the sum of what count_bytes gives, "
        "which has to be right too."
    )
    assert_intensity("naive", naive, naive_intensity(*sizes), call, look)


@pytest.mark.exercise("2.3")
@pytest.mark.parametrize("sizes", SIZES)
def test_fused_intensity(answer, sizes):
    """fused: the same flops over q, k, v and the output, once each"""
    (_, fused), call = intensities(answer, *sizes)
    look = "q has B H Nq D numbers, k B H Nk D, v B H Nk Dv, the output B H Nq Dv. No table of Nq Nk is moved."
    assert_intensity("fused", fused, fused_intensity(*sizes), call, look)


@pytest.mark.exercise("2.3")
@pytest.mark.parametrize("element_size", [1, 2, 8])
def test_intensity_of_other_dtypes(answer, element_size):
    """half the bytes a number, twice the intensity of both"""
    sizes = (2, 3, 5, 9, 8, 6)
    (naive, fused), call = intensities(answer, *sizes, element_size=element_size)
    look = f"element_size is {element_size}: so many bytes has each number that is moved. Flops do not depend on it."
    assert_intensity("naive", naive, naive_intensity(*sizes, element_size=element_size), call, look)
    assert_intensity("fused", fused, fused_intensity(*sizes, element_size=element_size), call, look)


@pytest.mark.exercise("2.3")
def test_intensity_ignores_batch_and_heads(answer):
    """more texts or more heads change neither"""
    few, _ = intensities(answer, 1, 1, 50, 70, 16, 24)
    many, call = intensities(answer, 8, 12, 50, 70, 16, 24)
    assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(few, many)), (
        f"{call} = ({many[0]:.6g}, {many[1]:.6g}); with one text and one head it is ({few[0]:.6g}, {few[1]:.6g}).\n"
        "Each head of each text brings its own flops and its own bytes, so that the quotient stays."
    )


@pytest.mark.exercise("2.3")
def test_intensity_of_long_texts(answer):
    """a long text: naive stops at (D + Dv) / (3 element_size), fused grows as N"""
    n, d = 10**9, 64
    (naive, fused), call = intensities(answer, 1, 1, n, n, d, d, element_size=2)
    look = "Six tables of N N hold naive down: 4 D flops for 6 numbers of 2 bytes. Fused moves 4 N D numbers."
    assert_intensity("naive", naive, 4 * d * n / (12 * n + 8 * d), call, look)
    assert_intensity("fused", fused, n / 2, call, look)


@pytest.mark.exercise("2.3")
def test_intensity_of_one_query(answer):
    """one query, as when a model writes: fused has about 1 flop per byte in fp16"""
    sizes = (1, 1, 1, 100_000, 64, 64)
    (_, fused), call = intensities(answer, *sizes, element_size=2)
    look = "All keys and values are read for one query: 2 flops for each number of 2 bytes."
    assert_intensity("fused", fused, fused_intensity(*sizes, element_size=2), call, look)


# 2.4 roofline_time


def predicted(answer, *given):
    call = f"roofline_time({', '.join(f'{x:g}' for x in given)})"
    got = answer.roofline_time(*given)
    assert got is not None, f"{call} returned None.\nA function that ends without `return` gives None."
    assert isinstance(got, tuple) and len(got) == 2, (
        f"{call} returned {got!r}, of type {type(got).__name__}, expected (seconds, bound)."
    )
    seconds, bound = got
    assert isinstance(seconds, float | int) and not isinstance(seconds, bool), (
        f"{call}: seconds = {seconds!r} is of type {type(seconds).__name__}, expected a number."
    )
    assert bound in ("memory", "compute"), f'{call}: bound = {bound!r}, expected "memory" or "compute".'
    return seconds, bound, call


def assert_predicted(answer, given, seconds, bound, look):
    got, which, call = predicted(answer, *given)
    assert math.isclose(got, seconds, rel_tol=1e-9) and which == bound, (
        f'{call} = ({got:.6g}, "{which}"), expected ({seconds:.6g}, "{bound}").\n{look}'
    )


@pytest.mark.exercise("2.4")
def test_time_when_computing_takes_longer(answer):
    """600 flops at 100 a second, 50 bytes at 20 a second: 6 seconds, compute"""
    look = "Computing takes 6 s, moving 2.5 s. Both go on at the same time, so it is done after 6 s."
    assert_predicted(answer, (600, 50, 100, 20), 6.0, "compute", look)


@pytest.mark.exercise("2.4")
def test_time_when_moving_takes_longer(answer):
    """100 flops at 100 a second, 50 bytes at 20 a second: 2.5 seconds, memory"""
    look = "Computing takes 1 s, moving 2.5 s. The whole waits for the moving, so it is bound by memory."
    assert_predicted(answer, (100, 50, 100, 20), 2.5, "memory", look)


@pytest.mark.exercise("2.4")
def test_more_flops_than_bytes_may_still_be_memory(answer):
    """more flops than bytes is not yet bound by compute"""
    look = (
        "The machine does 100 flops in the time of one byte here, the operation only 30 for each byte: it waits.\n"
        "Compare times, not flops with bytes."
    )
    assert_predicted(answer, (3000, 100, 1e5, 1e3), 0.1, "memory", look)


@pytest.mark.exercise("2.4")
def test_fewer_flops_than_bytes_may_be_compute(answer):
    """fewer flops than bytes may be bound by compute"""
    look = "A machine that computes slowly and moves fast: 4 s of computing, 0.5 s of moving."
    assert_predicted(answer, (40, 50, 10, 100), 4.0, "compute", look)


@pytest.mark.exercise("2.4")
def test_at_the_ridge(answer):
    """equally long is called compute"""
    look = "Computing takes 2 s and moving takes 2 s: the time is 2 s, and the contract calls that \"compute\"."
    assert_predicted(answer, (64, 16, 32, 8), 2.0, "compute", look)


@pytest.mark.exercise("2.4")
def test_only_moving(answer):
    """no flops: a copy is bound by memory"""
    assert_predicted(answer, (0, 48, 100, 16), 3.0, "memory", "0 flops take no time; 48 bytes at 16 a second take 3 s.")


@pytest.mark.exercise("2.4")
def test_only_computing(answer):
    """no bytes: all on the chip is bound by compute"""
    look = "48 flops at 16 a second take 3 s, and 0 bytes take no time. flops / bytes does not exist here."
    assert_predicted(answer, (48, 0, 16, 100), 3.0, "compute", look)


@pytest.mark.exercise("2.4")
@pytest.mark.parametrize("intensity", [0.25, 1, 8, 290, 310, 5000])
def test_it_is_the_roofline(answer, intensity):
    """flops over seconds is the lower of peak and intensity times bandwidth"""
    peak, bandwidth, nbytes = 9.9e14, 3.3e12, 1e9  # the ridge lies at 300 flops per byte
    flops = intensity * nbytes
    roof = min(peak, intensity * bandwidth)
    look = f"{intensity} flops per byte against the ridge, peak / bandwidth = 300: the rate is {roof:.4g} flops a second."
    assert_predicted(
        answer,
        (flops, nbytes, peak, bandwidth),
        flops / roof,
        "memory" if intensity < 300 else "compute",
        look,
    )
