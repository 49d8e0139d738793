"""What an answer to chapter 06 must satisfy.

The truth is computed in fp64; the bound is that of flash_edu/testing.py. Blocks are small, so that little data has many.
Inputs are views into memory full of NaN, and outputs that torch.empty makes lie in such memory, between fences (frames.py).
"""

import contextlib

import pytest
import torch
from frames import assert_inside, left_alone, nan_outputs
from programs import in_order, touching

from flash_edu._environment import interpreting
from flash_edu.course import device, toy
from flash_edu.figures import trace_file, trace_triton
from flash_edu.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's word on NaN and overflow in a block


def draw(*shape, hot=1.0, seed=0, dtype=torch.float32):
    """Random normal numbers times `hot`, as a view into memory full of NaN."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return framed(torch.randn(*shape, generator=generator, dtype=torch.float64).mul(hot).to(device, dtype))


def framed(x):
    """The same numbers, with NaN before and after them, and, in a matrix, beside every row."""
    memory = torch.full([size + 3 + 70 for size in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    view = memory[tuple(slice(3, 3 + size) for size in x.shape)]
    view.copy_(x)
    return view


def whole(x):
    """The same numbers, with nothing around them."""
    return x.contiguous()


VIEWS = {
    "every second element of a longer tensor": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "stored column by column": lambda x: x.mT.contiguous().mT,
    "a slice of a wider matrix": framed,
}


def run(function, *inputs, look="", outputs=1, **options):
    """What the learner's function returns. It may not change its inputs, nor write beside its outputs."""
    names = {f"argument {number}": x for number, x in enumerate(inputs, 1)}
    with left_alone(function.__name__, **names), nan_outputs(look, *["The output"] * outputs):
        got = function(*inputs, **options)
    assert isinstance(got, torch.Tensor), f"{function.__name__} returned {type(got).__name__}, expected a tensor"
    return got


def judge(function, formula, *inputs, look, says=None, **options):
    """The function's result is as near to the formula's in fp64 as the formula's own at the inputs' dtype."""
    got = run(function, *inputs, look=look, **options)
    right, plain = formula(*(x.double() for x in inputs)), formula(*inputs)
    given = ", ".join(str(tuple(x.shape)) for x in inputs)
    asked = ", ".join([f"{given} {str(inputs[0].dtype)[6:]}", *(f"{name}={x}" for name, x in options.items())])
    try:
        assert_close("out", got, right, plain)
    except AssertionError as wrong:
        raise AssertionError(f"{says or function.__name__}, {asked}\n{wrong}\n{look}") from None
    assert got.dtype == plain.dtype, f"The result is {got.dtype}, expected {plain.dtype}."
    return got


def same(got, want, what, look, atol=1e-6):
    """By hand: a few numbers, shown in full."""
    got, want = got.cpu(), want.cpu()
    close = got.shape == want.shape and torch.allclose(got, want, rtol=1e-5, atol=atol)
    assert close, f"{what}\ngot      {shown(got)}\nexpected {shown(want)}\n{look}"


def shown(x):
    return [shown(row) for row in x] if x.dim() > 1 else [round(number, 4) for number in x.tolist()]


def inside(answer, name, tensors, look, **options):
    """No load and no store of a program leaves its tensor, even where it would do no harm."""
    if interpreting():
        with nan_outputs(look, "The output"):
            trace = trace_triton(lambda: getattr(answer, name)(*tensors.values(), **options), tensors)
    else:
        trace = trace_file(answer.__file__, name, tensors, **options)
    assert_inside(trace, look)


@contextlib.contextmanager
def recorded():
    """What programs touch, or None where kernels are compiled: nobody can look into those."""
    with touching() if interpreting() else contextlib.nullcontext() as touched:
        yield touched


def programs_needed(answer, name, tensors, needed, look, **options):
    """One program for each block, and no more."""
    with recorded() as touched:
        getattr(answer, name)(*tensors, **options)
    if touched:
        started = len(touched.started)
        assert started == needed, f"{started} programs were started, and {needed} are needed.\n{look}"


# 6.1 vector_add

GRID = "The grid is a tuple with the number of programs: N / block, rounded up: (triton.cdiv(N, block),)."
TAIL = "The mask is offsets < N, on both loads and on the store: offsets from N on belong to nobody."


def add(x, y):
    return x + y


@pytest.mark.exercise("6.1")
def test_five_numbers(answer):
    """five numbers, in two blocks of four"""
    x, y = (torch.tensor(numbers, device=device) for numbers in ([1.0, 2, 3, 4, 5], [10.0, 20, 30, 40, 50]))
    got = run(answer.vector_add, x, y, look=TAIL, block=4)
    look = f"Program 0 owns elements 0 to 3, program 1 element 4. nan: nobody stored there.\n{GRID}"
    same(got, x + y, "[1, 2, 3, 4, 5] + [10, 20, 30, 40, 50], block=4", look)


@pytest.mark.exercise("6.1")
@pytest.mark.parametrize("n", [16, 48])
def test_whole_blocks(answer, n):
    """a length that the block divides"""
    judge(answer.vector_add, add, draw(n), draw(n, seed=1), look=GRID, block=16)


@pytest.mark.exercise("6.1")
@pytest.mark.parametrize("n", [1, 7, 37, 61])
def test_ragged(answer, n):
    """a length that the block does not divide, or does not fill"""
    look = f"{n} elements in blocks of 16: the last block has {-n % 16} that do not exist.\n{TAIL}\n{GRID}"
    judge(answer.vector_add, add, draw(n), draw(n, seed=1), look=look, block=16)


@pytest.mark.exercise("6.1")
@pytest.mark.parametrize("block", [1, 8, 64, 1024])
def test_block(answer, block):
    """block size does not change the answer"""
    look = "Is a number written in where BLOCK, or block, belongs?"
    judge(answer.vector_add, add, draw(50), draw(50, seed=1), look=look, block=block)


@pytest.mark.exercise("6.1")
@pytest.mark.parametrize("steps", [(2, 1), (1, 3), (3, 2), (0, 1)])
def test_vector_strides(answer, steps):
    """x and y may have any strides, each its own"""
    generator = torch.Generator().manual_seed(5)
    longer = [torch.randn(3 * 41, generator=generator).to(device) for _ in range(2)]
    x, y = (v[:1].expand(41) if step == 0 else v[: 41 * step : step] for v, step in zip(longer, steps))
    look = (
        "Element n of X lies at X + n * stride_x, element n of Y at Y + n * stride_y. OUT is contiguous.\n"
        "The mask asks about n, not about the address."
    )
    judge(answer.vector_add, add, x, y, look=look, says=f"vector_add, strides {steps[0]} and {steps[1]}", block=16)


@pytest.mark.exercise("6.1")
def test_half_precision(answer):
    """float16 stays float16"""
    x, y = (draw(33, seed=seed, dtype=torch.float16) for seed in (0, 1))
    judge(answer.vector_add, add, x, y, look="The output has the dtype of x.", block=16)


@pytest.mark.exercise("6.1")
@pytest.mark.parametrize("n", [33, 48])
def test_add_stays_inside(answer, n):
    """no program reads or writes outside, and none is started for nothing"""
    x, y = whole(draw(n)), whole(draw(n, seed=1))
    inside(answer, "vector_add", {"x": x, "y": y}, TAIL, block=16)
    programs_needed(answer, "vector_add", (x, y), 3, GRID, block=16)


# 6.2 row_softmax


def softmax(x):
    return x.softmax(dim=-1)


EMPTY = (
    'What does not exist must weigh nothing: load it as -inf, other=float("-inf"). exp(-inf) is 0, and -inf is no maximum.'
)


@pytest.mark.exercise("6.2")
def test_toy_rows(answer):
    """the toy's scores: the weights of chapter 01"""
    scores = toy.scores.to(device)
    got = run(answer.row_softmax, scores, look=MINE)
    same(got, softmax(scores), f"scores {shown(toy.scores)}", "Four programs, one row each.\n" + MINE)


MINE = "Program m loads row m, from X + m * stride_m + cols * stride_n, and stores it at OUT + m * N + cols."


@pytest.mark.exercise("6.2")
@pytest.mark.parametrize("n", [1, 3, 37, 64, 65])
def test_ragged_rows(answer, n):
    """rows of any length, a power of two or not"""
    judge(answer.row_softmax, softmax, draw(5, n, hot=3.0), look=f"The block has more than {n} places.\n{EMPTY}\n{MINE}")


@pytest.mark.exercise("6.2")
@pytest.mark.parametrize("shift", [-50.0, 50.0, -3e3])
def test_rows_far_from_zero(answer, shift):
    """rows far above or below zero: what does not exist takes no weight"""
    x = framed(draw(4, 21) + shift)
    judge(answer.row_softmax, softmax, x, look=f"Every number is near {shift}.\n{EMPTY}", says="row_softmax")


@pytest.mark.exercise("6.2")
@pytest.mark.parametrize("hot", [100.0, 1e4])
def test_hot_rows(answer, hot):
    """numbers in the thousands give finite, right weights"""
    look = "exp(100) is too large for float32. Subtract the row's maximum first: every exponent is then 0 or less."
    judge(answer.row_softmax, softmax, draw(4, 29, hot=hot), look=look)


@pytest.mark.exercise("6.2")
def test_rows_differ(answer):
    """each row has its own maximum and its own sum"""
    x = draw(6, 16)
    x = framed(x * torch.tensor([1.0, 100, 1, 1e4, 0, 3], device=device)[:, None])
    judge(answer.row_softmax, softmax, x, look=f"Row 3 is ten thousand times row 0. {MINE}")


@pytest.mark.exercise("6.2")
def test_hidden_scores(answer):
    """a score of -inf has the weight 0"""
    x = draw(4, 23)
    x[:, 5:9], x[1, 0], x[2, 22] = float("-inf"), float("-inf"), float("-inf")
    judge(answer.row_softmax, softmax, x, look="exp(-inf - max) is 0 by itself. NaN: was the maximum -inf?")


@pytest.mark.exercise("6.2")
@pytest.mark.parametrize("view", VIEWS)
def test_row_strides(answer, view):
    """x may lie in memory in any order"""
    look = f"{view}, strides differ from (N, 1). {MINE}"
    judge(answer.row_softmax, softmax, VIEWS[view](whole(draw(7, 19))), look=look)


@pytest.mark.exercise("6.2")
@pytest.mark.parametrize("n, hot", [(40, 3.0), (300, 1.0), (300, 30.0)])
def test_half_rows(answer, n, hot):
    """float16 in, float16 out"""
    look = "Make the block float32 right after the load: .to(tl.float32). The store converts back by itself."
    judge(answer.row_softmax, softmax, draw(9, n, hot=hot, dtype=torch.float16), look=look)


@pytest.mark.exercise("6.2")
def test_rows_stay_inside(answer):
    """no program reads or writes outside its tensors"""
    inside(answer, "row_softmax", {"x": whole(draw(3, 21))}, "mask=cols < N, on the load and on the store.")


# 6.3 matmul


def product(a, b):
    return a @ b


PLACES = (
    "A's tile: rows down (stride_am), ks across (stride_ak). B's: ks down (stride_bk), cols across (stride_bn).\n"
    "C's: rows down (stride_cm), cols across (stride_cn)."
)
EDGES = (
    "A exists where rows < M and ks < K, B where ks < K and cols < N, C where rows < M and cols < N.\n"
    "What a mask leaves out of a load must be 0 (other=0.0): it is multiplied, and added up."
)
SUM = "acc starts at 0, in float32, and every tile of K adds tl.dot(a, b) to it."
SMALL = {"block_m": 16, "block_n": 16, "block_k": 16}


@pytest.mark.exercise("6.3")
def test_toy_product(answer):
    """the toy: Q times K transposed, the scores before the scale"""
    q, k = toy.q.to(device), toy.k.to(device)
    got = run(answer.matmul, q, k.T, look=EDGES, **SMALL)
    same(got, toy.scores / toy.scale, "Q K^T of the toy, (4, 4) @ (4, 4)", f"{PLACES}\n{EDGES}")


@pytest.mark.exercise("6.3")
def test_one_tile(answer):
    """one tile: 16 x 16 times 16 x 16"""
    judge(answer.matmul, product, draw(16, 16), draw(16, 16, seed=1), look=f"One program, one turn.\n{PLACES}", **SMALL)


@pytest.mark.exercise("6.3")
@pytest.mark.parametrize("k", [32, 80])
def test_walk_along_k(answer, k):
    """K longer than a tile: the products of all tiles are added"""
    judge(answer.matmul, product, draw(16, k), draw(k, 16, seed=1), look=f"ks = start + tl.arange(0, BLOCK_K). {SUM}", **SMALL)


@pytest.mark.exercise("6.3")
def test_every_tile(answer):
    """every tile of C is computed by the program that owns it"""
    look = "Program (i, j): rows start at i * BLOCK_M, cols at j * BLOCK_N. nan: nobody stored there."
    judge(answer.matmul, product, draw(48, 16), draw(16, 32, seed=1), look=f"{look}\n{PLACES}", **SMALL)


@pytest.mark.exercise("6.3")
@pytest.mark.parametrize("m, n, k", [(16, 16, 5), (16, 16, 37), (21, 16, 16), (16, 21, 16)])
def test_one_ragged_side(answer, m, n, k):
    """one side that the block does not divide"""
    a, b = draw(m, k, hot=3.0), draw(k, n, seed=1)
    judge(answer.matmul, product, a, b, look=f"M {m}, N {n}, K {k}, and blocks of 16.\n{EDGES}", **SMALL)


@pytest.mark.exercise("6.3")
@pytest.mark.parametrize("m, n, k", [(37, 53, 29), (1, 67, 23), (71, 1, 1), (5, 3, 97)])
@pytest.mark.parametrize("blocks", [(16, 32, 16), (32, 16, 64), (64, 64, 32)])
def test_prime_sides(answer, m, n, k, blocks):
    """prime sides, and any blocks"""
    options = dict(zip(SMALL, blocks))
    a, b = draw(m, k, hot=30.0), draw(k, n, seed=1)
    judge(answer.matmul, product, a, b, look=f"{EDGES}\nIs the right BLOCK with each side?", **options)


@pytest.mark.exercise("6.3")
@pytest.mark.parametrize("first, second", [(0, 1), (1, 0), (1, 2), (2, 1)])
def test_product_strides(answer, first, second):
    """A and B may lie in memory in any order, each its own"""
    names = list(VIEWS)
    a, b = VIEWS[names[first]](whole(draw(21, 35))), VIEWS[names[second]](whole(draw(35, 19, seed=1)))
    look = f"A: {names[first]}. B: {names[second]}.\n{PLACES}"
    judge(answer.matmul, product, a, b, look=look, **SMALL)


@pytest.mark.exercise("6.3")
def test_half_product(answer):
    """float16 in and out, and a float32 accumulator between"""
    half = torch.float16
    judge(answer.matmul, product, draw(20, 64, dtype=half), draw(64, 33, seed=1, dtype=half), look=SUM, **SMALL)
    # Large terms that cancel: the sum is small in the end, and large half way.
    a, b = draw(16, 64, hot=30.0), draw(64, 16, seed=1)
    a, b = torch.cat([a, a + draw(16, 64, seed=2)], 1).to(half), torch.cat([b, -b]).to(half)
    look = f"Half way the sum is large, in the end small: whatever was rounded to float16 on the way is lost.\n{SUM}"
    judge(answer.matmul, product, framed(a), framed(b), look=look, **SMALL)


@pytest.mark.exercise("6.3")
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_float32_products(answer, scale):
    """float32 products keep their 23 bits"""
    look = f'On a GPU float32 tiles are rounded to TF32 unless you ask: tl.dot(a, b, input_precision="ieee").\n{SUM}'
    judge(answer.matmul, product, draw(16, 200, hot=scale), draw(200, 16, seed=1), look=look, **SMALL)


@pytest.mark.exercise("6.3")
def test_product_stays_inside(answer):
    """no program reads or writes outside its tensors"""
    tensors = {"a": whole(draw(21, 27)), "b": whole(draw(27, 35))}
    inside(answer, "matmul", tensors, EDGES, **SMALL)


@pytest.mark.exercise("6.3")
def test_each_number_of_c_is_stored_once(answer):
    """each number of C is stored by one program, once, after the loop"""
    with recorded() as touched:
        answer.matmul(draw(40, 40), draw(40, 24, seed=1), **SMALL)
    if touched:
        for one, other, verb, _ in touched.conflicts():
            raise AssertionError(f"Program {one[:2]} stores what program {other[:2]} {verb} too.\n{PLACES}")
        stored = sum(touched.times.get("stores", {}).values())
        assert stored == 960, f"C has 40 * 24 = 960 numbers, and {stored} were stored. The store comes after the loop."


# 6.4 repair_out_of_bounds


def neighbours(x):
    padded = torch.nn.functional.pad(x, (1, 1))
    return padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]


ENDS = (
    "The first element of a row has no left neighbour, and the last has no right one. What lies there is the row before,\n"
    "or the next, or memory of somebody else. Each load needs the mask of its own address: has_left, has_right."
)


@pytest.mark.exercise("6.4")
def test_two_rows_of_five(answer):
    """two rows of five: no row looks into the other"""
    memory = torch.full((30,), 100.0, device=device)
    x = memory[10:20].view(2, 5)
    x.copy_(torch.tensor([[1.0, 2, 3, 4, 5], [10, 20, 30, 40, 50]]))
    got = run(answer.neighbour_sums, x, look=ENDS, block=8)
    same(got, neighbours(x), "rows 1 2 3 4 5 and 10 20 30 40 50, with 100s around them", ENDS)


@pytest.mark.exercise("6.4")
@pytest.mark.parametrize("n", [2, 13, 16])
def test_one_block_a_row(answer, n):
    """rows that fit in a block"""
    judge(answer.neighbour_sums, neighbours, draw(4, n, hot=30.0), look=ENDS, block=16)


@pytest.mark.exercise("6.4")
@pytest.mark.parametrize("n", [16, 17, 24, 25, 45])
def test_blocks_meet(answer, n):
    """rows of several blocks: neighbours in another block count"""
    look = f"Blocks of 8: element 7 has a right neighbour, element 8 a left one. They lie in other blocks.\n{ENDS}"
    judge(answer.neighbour_sums, neighbours, draw(3, n), look=look, block=8)


@pytest.mark.exercise("6.4")
def test_no_neighbours(answer):
    """a row of one element is left as it is"""
    judge(answer.neighbour_sums, neighbours, draw(5, 1), look=f"Element 0 is the first and the last.\n{ENDS}", block=4)


@pytest.mark.exercise("6.4")
@pytest.mark.parametrize("view", VIEWS)
def test_neighbour_strides(answer, view):
    """x may lie in memory in any order"""
    judge(answer.neighbour_sums, neighbours, VIEWS[view](whole(draw(6, 21))), look=f"{view}. {ENDS}", block=16)


@pytest.mark.exercise("6.4")
@pytest.mark.parametrize("n", [16, 21])
def test_neighbours_stay_inside(answer, n):
    """no program reads outside of x, even where the number is not used"""
    inside(answer, "neighbour_sums", {"x": whole(draw(3, n))}, f"{ENDS} In the tail of the last block neither exists.", block=16)


# 6.5 repair_missing_mask


def normalised(x):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


COUNT = (
    "Both sums run over the whole block. What lies past the end of the row must be 0 in each of them:\n"
    "tl.where(inside, block, 0.0), before the sum. Zeros in x are not zeros in x - mean."
)


@pytest.mark.exercise("6.5")
def test_three_numbers(answer):
    """a row of three numbers: 1, 2, 6"""
    x = torch.tensor([[1.0, 2, 6]], device=device)
    got = run(answer.normalise_rows, x, look=COUNT)
    mean, variance = 3.0, (4 + 1 + 9) / 3
    about = "The mean is 3, the variance (4 + 1 + 9) / 3 = 4.6667. The block has 4 places.\n" + COUNT
    if torch.isfinite(got).all() and got[0, 2] != got[0, 1]:  # two differences tell both numbers that were used
        deviation = (4.0 / (got[0, 2] - got[0, 1])).item()
        used = 2.0 - got[0, 1].item() * deviation
        about = f"By your numbers the mean is {used:.4f} and the variance {deviation**2:.4f}.\n{about}"
    same(got, (x - mean) / (variance + 1e-5) ** 0.5, "normalise_rows of [[1, 2, 6]]", about)


@pytest.mark.exercise("6.5")
@pytest.mark.parametrize("n", [16, 64])
def test_full_rows(answer, n):
    """rows that fill their block"""
    judge(answer.normalise_rows, normalised, draw(4, n, hot=3.0), look=f"Nothing is missing here. Divide by N.\n{COUNT}")


@pytest.mark.exercise("6.5")
@pytest.mark.parametrize("n", [2, 5, 33, 100])
def test_tails(answer, n):
    """rows that do not fill their block"""
    judge(answer.normalise_rows, normalised, draw(5, n, hot=30.0), look=COUNT)


@pytest.mark.exercise("6.5")
@pytest.mark.parametrize("shift", [-20.0, 20.0])
def test_mean_far_from_zero(answer, shift):
    """rows whose mean is far from 0"""
    look = f"The mean is near {shift:.0f}, so x - mean is near {-shift:.0f} where x was 0.\n{COUNT}"
    judge(answer.normalise_rows, normalised, framed(draw(4, 41) + shift), look=look)


@pytest.mark.exercise("6.5")
def test_constant_rows(answer):
    """a row of equal numbers becomes zeros"""
    x = framed(torch.full((3, 6), 2.0, device=device))
    # A GPU's division is rounded once or twice: the mean may miss 2.0 by its last bit, and 1/sqrt(eps) enlarges that.
    same(run(answer.normalise_rows, x, look=COUNT), torch.zeros(3, 6), "rows of 2.0, six each", COUNT, atol=1e-3)


@pytest.mark.exercise("6.5")
def test_eps(answer):
    """eps is under the root, and counts when the variance is small"""
    x = draw(3, 11, hot=1e-3)
    centred = x.double() - x.double().mean(dim=-1, keepdim=True)
    want = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-4).sqrt()
    got = run(answer.normalise_rows, x, look=COUNT, eps=1e-4)
    same(got.double(), want, "numbers near 0.001, eps = 1e-4", f"sqrt(variance + eps).\n{COUNT}")


@pytest.mark.exercise("6.5")
@pytest.mark.parametrize("view", VIEWS)
def test_normalise_strides(answer, view):
    """x may lie in memory in any order"""
    judge(answer.normalise_rows, normalised, VIEWS[view](whole(draw(6, 21))), look=f"{view}. {COUNT}")


@pytest.mark.exercise("6.5")
def test_normalise_stays_inside(answer):
    """no program reads or writes outside its tensors"""
    inside(answer, "normalise_rows", {"x": whole(draw(3, 21))}, "mask=inside, on the load and on the store.")


# 6.6 repair_race


def sums(x):
    return x.sum(dim=0)


OWN = (
    "Give every program a place of its own: out has a row for each, the kernel moves OUT to row i,\n"
    "and after the launch the rows are added up."
)


@pytest.mark.exercise("6.6")
def test_sums_by_hand(answer):
    """four rows, two programs"""
    x = torch.tensor([[1.0, 2, 3], [10, 20, 30], [100, 200, 300], [1000, 2000, 3000]], device=device)
    same(run(answer.column_sums, x, look=OWN, block_m=2), sums(x), "columns of 1 10 100 1000 and so on, block_m=2", OWN)


@pytest.mark.exercise("6.6")
@pytest.mark.parametrize("m, n, block_m", [(37, 16, 8), (45, 33, 8), (64, 21, 16), (1, 5, 4), (3, 1, 1)])
def test_ragged_sums(answer, m, n, block_m):
    """any number of rows and columns"""
    judge(answer.column_sums, sums, draw(m, n, hot=30.0), look=f"{-(-m // block_m)} programs. {OWN}", block_m=block_m)


@pytest.mark.exercise("6.6")
@pytest.mark.parametrize("m, n", [(40, 21), (64, 16)])
def test_no_two_programs_meet(answer, m, n):
    """no program stores where another loads or stores"""
    if interpreting():
        with touching() as touched:
            run(answer.column_sums, draw(m, n), look=OWN, block_m=8)
        for one, other, verb, _ in touched.conflicts():
            pairs = {(one, other) for one, other, _, _ in touched.conflicts()}
            raise AssertionError(
                f"Program {one[0]} stores to an address where program {other[0]} {verb} too; {len(pairs)} such pairs.\n"
                f"On a GPU both may run at the same time, and one sum is lost. The interpreter runs them in turn.\n{OWN}"
            )
    else:  # nobody can look into compiled programs, but so many of them do meet
        judge(answer.column_sums, sums, draw(50_000, n), look=OWN, block_m=1)


@pytest.mark.exercise("6.6")
def test_any_order(answer):
    """the programs may run in any order: the same bits come out"""
    x = draw(104, 19, hot=30.0)
    first = run(answer.column_sums, x, look=OWN, block_m=8)
    for seed in range(3):
        with in_order(shuffled(seed)) if interpreting() else contextlib.nullcontext():
            again = run(answer.column_sums, x, look=OWN, block_m=8)
        changed = int((first != again).sum())
        assert not changed, (
            f"{changed} of {first.numel()} sums changed when the 13 programs ran in another order.\n"
            "Floating point sums depend on their order. Atomic additions come in any order, so they do not repeat.\n" + OWN
        )


def shuffled(seed):
    generator = torch.Generator().manual_seed(seed)
    orders = {}
    return lambda count: orders.setdefault(count, torch.randperm(count, generator=generator).tolist())


@pytest.mark.exercise("6.6")
@pytest.mark.parametrize("view", VIEWS)
def test_sum_strides(answer, view):
    """x may lie in memory in any order"""
    judge(answer.column_sums, sums, VIEWS[view](whole(draw(26, 13))), look=f"{view}. {OWN}", block_m=8)


@pytest.mark.exercise("6.6")
def test_twice(answer):
    """a second call starts from zero"""
    x = draw(20, 9)
    run(answer.column_sums, x, look=OWN, block_m=8)
    judge(answer.column_sums, sums, x, look=f"torch.zeros, in every call.\n{OWN}", block_m=8)


@pytest.mark.exercise("6.6")
def test_work_is_shared(answer):
    """the work is still shared: each program loads its own rows of x, once"""
    x = whole(draw(40, 16))
    with recorded() as touched:
        answer.column_sums(x, block_m=8)
    if touched:
        start, size = x.data_ptr(), 4
        for program, did in touched.programs.items():
            rows = {(address - start) // size // 16 for address in did.get("loads", ()) if 0 <= address - start < 2560}
            assert len(rows) <= 8, f"Program {program[0]} loads {len(rows)} rows of x, where block_m=8.\n{OWN}"
        assert len(touched.started) >= 5, f"{len(touched.started)} programs for 40 rows in blocks of 8: five share the work.\n{OWN}"
