"""What an answer to chapter 12 must satisfy: the table of ends, packing, the search for a tile, and the kernel.

The kernel is judged text by text: the truth of each is computed in fp64, from that text alone. Inputs and outputs lie in
memory full of NaN, and so does every neighbour that a text must not read.
"""

import dataclasses
from contextlib import contextmanager
from itertools import pairwise
from unittest import mock

import pytest
import torch
from frames import assert_inside, left_alone, nan_outputs
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_edu._environment import interpreting
from flash_edu.course import device, on_gpu
from flash_edu.figures import trace_file, trace_triton
from flash_edu.testing import assert_close, eager, make_case, truth

pytestmark = [  # NumPy's words on a tile of NaN or infinity, which some claims plant
    pytest.mark.filterwarnings("ignore:All-NaN slice"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

HALF = [torch.float16, torch.bfloat16] if on_gpu else [torch.float16]  # the interpreter gets bfloat16 wrong


def ends_of(lengths):
    """The right cu, as a list."""
    ends = [0]
    for n in lengths:
        ends.append(ends[-1] + n)
    return ends


def numbers(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


def is_int32(name, got, size):
    assert isinstance(got, torch.Tensor), f"{name} is a {type(got).__name__}, expected a tensor of {size} numbers."
    assert tuple(got.shape) == (size,), (
        f"{name} has the shape {tuple(got.shape)}, expected ({size},). It is {got.flatten()[:8].tolist()}."
    )
    assert got.dtype == torch.int32, f"{name} has the dtype {got.dtype}, expected torch.int32: kernels read 4 bytes a number."
    assert got.device.type == torch.device(device).type, f"{name} is on {got.device}, expected {device}."


class Watch(TorchDispatchMode):
    """Counts operations, and copies to the CPU."""

    def __init__(self):
        super().__init__()
        self.count, self.to_cpu = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        got = func(*args, **(kwargs or {}))
        self.count += 1
        if isinstance(got, torch.Tensor) and got.device.type == "cpu":
            self.to_cpu += any(isinstance(x, torch.Tensor) and x.device.type != "cpu" for x in args)
        return got


def operations(function, *args):
    with Watch() as watch:
        function(*args)
    return watch.count


def no_loop(who, function, few, many):
    """`function` takes as many operations for many texts as for few."""
    first, second = operations(function, *few), operations(function, *many)
    assert first == second, (
        f"{who}: {first} operations for 3 texts, {second} for 30. On a GPU each is a launch of its own: let one\n"
        "operation treat all texts at once."
    )


@contextmanager
def nothing_comes_back(who):
    """Inside, tensors of the device "cuda" have shapes and no numbers: asking for a number fails, as it would wait on a GPU."""
    with FakeTensorMode() as mode, Watch() as watch:
        try:
            yield mode
        except AssertionError:
            raise
        except DataDependentOutputException as wrong:
            raise AssertionError(
                f"{who} asks for a number of a tensor ({wrong.func}): `.item()`, `.tolist()`, `int(...)`, `if x > 0`, a loop over\n"
                "its elements. On a GPU Python then waits for all work before it. The dtype and the shape are known without."
            ) from None
        except Exception as wrong:
            if "is not written yet" in str(wrong):
                raise
            raise AssertionError(f"{who}, with inputs on a GPU: {type(wrong).__name__}: {str(wrong)[:300]}") from None
    assert not watch.to_cpu, f"{who} copies {watch.to_cpu} tensor(s) from the GPU to the CPU. Python waits for that."


@contextmanager
def no_numbers(who):
    """Inside, tensors of the device "meta" have shapes and no numbers."""
    try:
        yield
    except Exception as wrong:
        if "is not written yet" in str(wrong):
            raise
        raise AssertionError(
            f"{who}, with tensors that have shapes and no numbers: {type(wrong).__name__}: {str(wrong)[:300]}\n"
            "Does it ask for a number: `.item()`, `.tolist()`, `int(...)`, a loop over elements? On a GPU that waits."
        ) from None


# 12.1 cu_seqlens


def ends_from(answer, x):
    with left_alone("cu_seqlens", lengths=x):
        got = answer.cu_seqlens(x)
    is_int32("cu", got, x.shape[0] + 1)
    return got.tolist()


@pytest.mark.exercise("12.1")
@pytest.mark.parametrize("lengths", [[3, 5, 2], [7], [1, 1, 1, 1], [40, 2, 19, 300]], ids=str)
def test_ends(answer, lengths):
    """from lengths: a 0, and where each text ends"""
    got, want = ends_from(answer, numbers(lengths, torch.int64)), ends_of(lengths)
    assert got == want, f"lengths {lengths}: cu = {got}, expected {want}. Text b begins where the texts before it end."


@pytest.mark.exercise("12.1")
@pytest.mark.parametrize("lengths", [[0, 4], [4, 0], [3, 0, 0, 2], [0, 0]], ids=str)
def test_empty_texts_have_a_place(answer, lengths):
    """a text without tokens begins and ends at the same row"""
    got, want = ends_from(answer, numbers(lengths)), ends_of(lengths)
    assert got == want, f"lengths {lengths}: cu = {got}, expected {want}. An empty text is a text: its number is not left out."


MASKS = {
    "padding behind": [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]],
    "padding before": [[0, 1, 1, 1], [0, 0, 0, 1]],
    "padding between": [[1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]],
    "no token at all": [[0, 0, 0], [1, 1, 0]],
    "square": [[1, 1, 0], [1, 0, 0], [1, 0, 0]],
}


@pytest.mark.exercise("12.1")
@pytest.mark.parametrize("name", MASKS)
def test_ends_of_a_mask(answer, name):
    """from a padding mask: a text is as long as it has real tokens, wherever they stand"""
    mask = MASKS[name]
    got, want = ends_from(answer, numbers(mask, torch.bool)), ends_of(map(sum, mask))
    assert got == want, f"mask {mask}: cu = {got}, expected {want}. A row of the mask is a text; True counts, its place does not."


@pytest.mark.exercise("12.1")
@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.int8, torch.int32, torch.int64])
def test_lengths_of_any_integer_dtype(answer, dtype):
    """lengths may be small integers, and their sum large"""
    lengths = [100, 120, 90, 127, 3, 111]
    got, want = ends_from(answer, numbers(lengths, dtype)), ends_of(lengths)
    assert got == want, f"lengths {lengths} of {dtype}: cu = {got}, expected {want}. The sums need more room than the lengths."


@pytest.mark.exercise("12.1")
def test_lengths_may_be_a_view(answer):
    """lengths may be every second number of a tensor, and are left as they are"""
    lengths = numbers([3, 9, 1, 9, 4, 9])[::2]
    assert ends_from(answer, lengths) == [0, 3, 4, 8], f"lengths [3, 1, 4]: cu = {answer.cu_seqlens(lengths).tolist()}"


@pytest.mark.exercise("12.1")
@pytest.mark.parametrize("mask", [False, True])
def test_ends_without_waiting(answer, mask):
    """on a GPU, cu is made there, and Python waits for nothing"""
    with nothing_comes_back("cu_seqlens"):
        x = torch.empty(*(3, 7)[: 1 + mask], dtype=torch.bool if mask else torch.int64, device="cuda")
        got = answer.cu_seqlens(x)
        assert got.device.type == "cuda", f"cu of lengths on a GPU is on {got.device}."
        assert tuple(got.shape) == (4,), f"cu has the shape {tuple(got.shape)}, expected (4,) for 3 texts."


@pytest.mark.exercise("12.1")
def test_ends_without_a_loop(answer):
    """thirty texts take as many operations as three"""
    no_loop("cu_seqlens", answer.cu_seqlens, [numbers([4] * 3)], [numbers([4] * 30)])


# 12.2 pack


def random_mask(B, N, seed):
    return (torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) < 0.6).to(device)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def packed(answer, x, real):
    """The learner's values and places, of the right shapes and dtypes."""
    with left_alone("pack", x=x, real=real):
        got = answer.pack(x, real)
    assert isinstance(got, tuple | list) and len(got) == 2, "Return two tensors: values, places."
    values, places = got
    total = int(real.sum())
    shape = (total, *x.shape[2:])
    assert tuple(values.shape) == shape, f"values have the shape {tuple(values.shape)}, expected {shape}: {total} real tokens."
    assert values.dtype == x.dtype, f"values have the dtype {values.dtype}, expected that of x, {x.dtype}."
    assert tuple(places.shape) == (total,), f"places have the shape {tuple(places.shape)}, expected ({total},)."
    assert places.dtype == torch.int64, f"places have the dtype {places.dtype}, expected torch.int64."
    return values, places


@contextmanager
def poisoned():
    """Inside, memory that nobody wrote holds NaN, or 77."""

    def spoiled(make):
        return lambda *args, **kwargs: (lambda x: x.fill_(float("nan") if x.is_floating_point() else 77))(make(*args, **kwargs))

    with (
        mock.patch.object(torch, "empty", spoiled(torch.empty)),
        mock.patch.object(torch, "empty_like", spoiled(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", spoiled(torch.Tensor.new_empty)),
    ):
        yield


def unpacked(answer, values, places, B, N):
    with left_alone("unpack", values=values, places=places), poisoned():
        got = answer.unpack(values, places, B, N)
    shape = (B, N, *values.shape[1:])
    assert tuple(got.shape) == shape, f"unpack gives the shape {tuple(got.shape)}, expected {shape}."
    assert got.dtype == values.dtype, f"unpack gives {got.dtype}, expected that of values, {values.dtype}."
    return got


@pytest.mark.exercise("12.2")
def test_pack_by_hand(answer):
    """two texts that you can read"""
    x = numbers([[11, 12, 13], [21, 22, 23]], torch.int64)
    real = numbers([[1, 1, 0], [1, 1, 1]], torch.bool)
    values, places = packed(answer, x, real)
    assert values.tolist() == [11, 12, 21, 22, 23], f"values = {values.tolist()}, expected [11, 12, 21, 22, 23]: text 0, then text 1."
    assert places.tolist() == [0, 1, 3, 4, 5], (
        f"places = {places.tolist()}, expected [0, 1, 3, 4, 5]. Token n of text b stands at b * N + n, and N = 3."
    )
    back = unpacked(answer, values, places, 2, 3)
    assert back.tolist() == [[11, 12, 0], [21, 22, 23]], f"unpack gives {back.tolist()}, expected [[11, 12, 0], [21, 22, 23]]."


SHAPES = [(3, 5), (4, 7, 2), (2, 6, 3, 4), (1, 9, 2), (5, 1, 3)]


@pytest.mark.exercise("12.2")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_any_padding(answer, shape):
    """padding stands before, behind and between; a token may be a number, a row, or a row for each head"""
    x, real = random(*shape, seed=1), random_mask(*shape[:2], seed=sum(shape))
    real[-1, -1] = True
    values, places = packed(answer, x, real)
    for t, (b, n) in enumerate(real.nonzero().tolist()):
        assert places[t] == b * shape[1] + n, (
            f"x {shape}: places[{t}] = {int(places[t])}, expected {b * shape[1] + n}: token {n} of text {b}, b * N + n."
        )
        assert values[t].equal(x[b, n]), f"x {shape}: values[{t}] is not x[{b}, {n}], the token at place {int(places[t])}."


@pytest.mark.exercise("12.2")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_there_and_back(answer, shape):
    """unpack puts every token where it stood, and zeros where there was padding"""
    x, real = random(*shape, seed=2), random_mask(*shape[:2], seed=sum(shape) + 1)
    real[0, 0] = True
    back = unpacked(answer, *packed(answer, x, real), *shape[:2])
    assert back[real].equal(x[real]), f"x {shape}: {int((back[real] != x[real]).sum())} numbers of real tokens came back changed."
    assert (back[~real] == 0).all(), (
        f"x {shape}: {int((back[~real] != 0).sum())} numbers in the padding are not 0. Memory from torch.empty holds anything;\n"
        "zeros have to be asked for."
    )


@pytest.mark.exercise("12.2")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_dtypes_stay(answer, dtype):
    """tokens keep their dtype: halves, doubles, ids"""
    x = random(3, 4, 2, seed=3).mul(10).to(dtype)
    real = random_mask(3, 4, seed=3)
    back = unpacked(answer, *packed(answer, x, real), 3, 4)
    assert back[real].equal(x[real]), f"{dtype}: {int((back[real] != x[real]).sum())} numbers came back changed."


@pytest.mark.exercise("12.2")
def test_other_values_come_back(answer):
    """what comes back need not be what was packed: other numbers for each token, another dtype"""
    x, real = random(3, 5, 8, seed=4), random_mask(3, 5, seed=4)
    _, places = packed(answer, x, real)
    other = random(len(places), 2, 3, seed=5, dtype=torch.float64)
    back = unpacked(answer, other, places, 3, 5)
    assert back[real].equal(other) and (back[~real] == 0).all(), (
        f"values {tuple(other.shape)}, places {places.tolist()}: {int((back[real] != other).sum())} numbers are not where they should be."
    )


@pytest.mark.exercise("12.2")
@pytest.mark.parametrize("fill", [0, 1])
def test_nothing_and_everything(answer, fill):
    """a batch without padding, and one without a token"""
    x = random(2, 3, 4, seed=6)
    real = torch.full((2, 3), bool(fill), device=device)
    values, places = packed(answer, x, real)
    back = unpacked(answer, values, places, 2, 3)
    assert back.equal(fill * x), f"{len(places)} real tokens: sum {back.sum().item():.4f}, expected {(fill * x).sum().item():.4f}."


@pytest.mark.exercise("12.2")
def test_views_can_be_packed(answer):
    """x may be a view: texts along its second dim, columns apart"""
    x = random(6, 4, 10, seed=7).transpose(0, 1)[..., ::2]  # (4, 6, 5)
    real = random_mask(6, 4, seed=8).T  # (4, 6)
    values, places = packed(answer, x, real)
    assert values.equal(x[real]), f"{int((values != x[real]).sum())} of {values.numel()} values are those of other tokens."
    want = real.flatten().nonzero()[:, 0].tolist()
    assert places.tolist() == want, f"places = {places.tolist()}, expected {want}."


@pytest.mark.exercise("12.2")
def test_padding_may_hold_anything(answer):
    """NaN in the padding never gets into a value"""
    x, real = random(3, 5, 4, seed=9), random_mask(3, 5, seed=9)
    x = x.masked_fill(~real[..., None], float("nan"))
    values, places = packed(answer, x, real)
    back = unpacked(answer, values, places, 3, 5)
    for name, y in (("values", values), ("what unpack gives", back)):
        assert not y.isnan().any(), f"{int(y.isnan().sum())} numbers of {name} are NaN. 0 * NaN is NaN: pick rows, do not multiply."


@pytest.mark.exercise("12.2")
def test_gradients_flow(answer):
    """gradients go the way back: to each real token its own, to padding 0"""
    x, real = random(3, 5, 4, seed=10).requires_grad_(), random_mask(3, 5, seed=10)
    weight = random(3, 5, 4, seed=11)
    values, places = answer.pack(x, real)
    assert values.requires_grad, f"values of {len(places)} tokens carry no gradient: is there a .detach(), .data or no_grad?"
    values = values * 2
    values.retain_grad()
    back = answer.unpack(values, places, 3, 5)
    assert back.requires_grad, f"What unpack made of {len(places)} tokens carries no gradient."
    (back * weight).sum().backward()
    for name, got, want in (("values", values.grad, weight[real]), ("x", x.grad, 2 * weight * real[..., None])):
        assert torch.allclose(got, want), (
            f"The gradient of {name} has the sum {got.sum().item():.4f}, expected {want.sum().item():.4f}."
        )


@pytest.mark.exercise("12.2")
def test_pack_without_a_loop(answer):
    """thirty texts take as many operations as three, there and back"""
    few, many = ((random(B, 4, 2), torch.ones(B, 4, dtype=torch.bool, device=device)) for B in (3, 30))
    no_loop("pack", answer.pack, few, many)
    few, many = ((random(B * 4, 2), torch.arange(B * 4, device=device), B, 4) for B in (3, 30))
    no_loop("unpack", answer.unpack, few, many)


# 12.3 find_tile

TABLES = [([40, 0, 17, 16], 16), ([5], 32), ([0, 0, 33, 1], 16), ([100, 64, 65, 0], 64), ([0, 7, 0, 0, 9], 4)]


def starts_of(lengths, block_m):
    """The right table, as a list."""
    return ends_of([-(-n // block_m) for n in lengths])


def table(answer, lengths, block_m):
    cu = numbers(ends_of(lengths))
    with left_alone("tile_starts", cu=cu):
        got = answer.tile_starts(cu, block_m)
    is_int32("starts", got, len(lengths) + 1)
    return got


def found(answer, starts, tiles, block_m):
    """The learner's texts and first rows, as lists."""
    starts, tiles = numbers(starts), numbers(tiles)
    with left_alone("find_tile", starts=starts, tiles=tiles):
        got = answer.find_tile(starts, tiles, block_m)
    assert isinstance(got, tuple | list) and len(got) == 2, "Return two tensors: text, first."
    for name, x in zip(("text", "first"), got):
        assert x.shape == tiles.shape, f"{name} has the shape {tuple(x.shape)}, expected {tuple(tiles.shape)}."
        assert not x.is_floating_point(), f"{name} has the dtype {x.dtype}, expected integers: divide with //."
    return [x.tolist() for x in got]


@pytest.mark.exercise("12.3")
@pytest.mark.parametrize("lengths, block_m", TABLES, ids=str)
def test_table(answer, lengths, block_m):
    """the table: each text is cut by itself, its last tile may be short, and an empty text has no tile"""
    got, want = table(answer, lengths, block_m).tolist(), starts_of(lengths, block_m)
    assert got == want, (
        f"lengths {lengths}, tiles of {block_m}: starts = {got}, expected {want}.\n"
        "Round up for each text, then add up. Rounding the ends would let a tile hold the end of one text and the start of the next."
    )


@pytest.mark.exercise("12.3")
@pytest.mark.parametrize("lengths, block_m", TABLES, ids=str)
def test_every_tile_is_found(answer, lengths, block_m):
    """every tile knows its text and its first row, and together they cover every row once"""
    starts = starts_of(lengths, block_m)
    text, first = found(answer, starts, list(range(starts[-1])), block_m)
    want = [(b, i) for b, n in enumerate(lengths) for i in range(0, n, block_m)]
    for tile, right in enumerate(want):
        assert (text[tile], first[tile]) == right, (
            f"lengths {lengths}, tiles of {block_m}, starts {starts}: tile {tile} is said to be text {text[tile]}, first row\n"
            f"{first[tile]}; expected text {right[0]}, first row {right[1]}."
        )


@pytest.mark.exercise("12.3")
def test_tiles_in_any_order(answer):
    """tiles may be asked for in any order, and twice"""
    text, first = found(answer, [0, 3, 3, 5, 6], [5, 0, 4, 2, 4], 16)
    assert text == [3, 0, 2, 0, 2], f"starts [0, 3, 3, 5, 6], tiles [5, 0, 4, 2, 4]: text = {text}, expected [3, 0, 2, 0, 2]."
    assert first == [0, 0, 16, 32, 16], f"starts [0, 3, 3, 5, 6], tiles [5, 0, 4, 2, 4]: first = {first}, expected [0, 0, 16, 32, 16]."


@pytest.mark.exercise("12.3")
@pytest.mark.parametrize("starts", [[0, 3, 5], [0, 3, 5, 5, 5], [0, 0]], ids=str)
def test_tiles_that_do_not_exist(answer, starts):
    """a tile past the last one belongs to text B, which does not exist"""
    tiles = [starts[-1], starts[-1] + 4]
    text, _ = found(answer, starts, tiles, 16)
    B = len(starts) - 1
    assert text == [B, B], f"starts {starts}, tiles {tiles}: text = {text}, expected [{B}, {B}]: there are texts 0 to {B - 1}."


@pytest.mark.exercise("12.3")
def test_many_texts(answer):
    """a thousand texts of random lengths, many of them empty"""
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randint(0, 90, (1000,), generator=generator) * (torch.rand(1000, generator=generator) < 0.7)).tolist()
    starts = starts_of(lengths, 32)
    assert table(answer, lengths, 32).tolist() == starts, "The table of 1000 random lengths, tiles of 32, is wrong."
    text, first = found(answer, starts, list(range(starts[-1])), 32)
    want = [(b, i) for b, n in enumerate(lengths) for i in range(0, n, 32)]
    wrong = [tile for tile, right in enumerate(want) if (text[tile], first[tile]) != right]
    assert not wrong, f"{len(wrong)} of {len(want)} tiles are wrong, the first is tile {wrong[0]}: {text[wrong[0]]}, {first[wrong[0]]}."


@pytest.mark.exercise("12.3")
def test_table_without_waiting(answer):
    """on a GPU, Python waits for nothing, and thirty texts take as many operations as three"""
    with nothing_comes_back("12.3"):
        starts = answer.tile_starts(torch.empty(4, dtype=torch.int32, device="cuda"), 16)
        assert starts.device.type == "cuda", f"starts of cu on a GPU are on {starts.device}."
    with no_numbers("find_tile"):
        answer.find_tile(*(torch.empty(n, dtype=torch.int32, device="meta") for n in (4, 5)), 16)
    few, many = (numbers(ends_of([20] * B)) for B in (3, 30))
    no_loop("tile_starts", answer.tile_starts, (few, 16), (many, 16))
    few, many = (numbers(starts_of([20] * B, 16)) for B in (3, 30))
    no_loop("find_tile", answer.find_tile, (few, few[:-1], 16), (many, many[:-1], 16))


# 12.4 varlen

RULE = "Row i of a text sees its key j when j <= i + nk - nq: with nq and nk of this text alone."
FIND = (
    "\nA program counts its rows from its text's first row (masks), and its addresses from cu_q[b] or cu_k[b] (pointers)."
)
STORES = "rows are stored with mask=rows[:, None] < nq (O) and mask=rows < nq (L): a tile ends where its text ends."


@dataclasses.dataclass
class Batch:
    """Texts, each a Case of its own, and all of them packed."""

    texts: list
    q: torch.Tensor  # (total_q, H, D)
    k: torch.Tensor
    v: torch.Tensor
    nq: list
    nk: list

    @property
    def cu(self):
        return numbers(ends_of(self.nq)), numbers(ends_of(self.nk))


def framed_rows(x):
    """The same numbers as a view into a larger tensor, with NaN before and after."""
    memory = torch.full((x.shape[0] + 3 + 70, *x.shape[1:]), float("nan"), dtype=x.dtype, device=x.device)
    view = memory[3 : 3 + x.shape[0]]
    view.copy_(x)
    return view


def batch_of(nq, nk=None, d=16, heads=1, **options):
    nk = nq if nk is None else nk
    options = {"hot": 3.0} | options
    texts = [
        make_case(1, heads, nq=n, nk=m, d=d, device=device, seed=100 * b + n + m, **options)
        for b, (n, m) in enumerate(zip(nq, nk))
    ]
    q, k, v = (torch.cat([getattr(text, name)[0].transpose(0, 1) for text in texts]) for name in "qkv")
    return Batch(texts, framed_rows(q), framed_rows(k), framed_rows(v), list(nq), list(nk))


def run(answer, batch, block_m=16, block_n=16):
    """The learner's out and lse."""
    cu_q, cu_k = batch.cu
    text = batch.texts[0]
    inputs = left_alone("flash_forward_varlen", q=batch.q, k=batch.k, v=batch.v, cu_q=cu_q, cu_k=cu_k)
    with inputs, nan_outputs(f"Look at the stores: {STORES}", "O", "L"):
        return answer.flash_forward_varlen(
            batch.q, batch.k, batch.v, cu_q, cu_k,
            causal=text.causal, scale=text.scale, block_m=block_m, block_n=block_n,
        )  # fmt: skip


def judge(answer, batch, look, block_m=16, block_n=16):
    """Every text is as near to its own truth as plain PyTorch is."""
    out, lse = run(answer, batch, block_m, block_n)
    cu_q, cu_k = ends_of(batch.nq), ends_of(batch.nk)
    for b, text in enumerate(batch.texts):
        if not batch.nq[b]:
            continue
        rows = slice(cu_q[b], cu_q[b + 1])
        right, plain = truth(text), eager(text)
        asked = f"texts of {batch.nq} queries and {batch.nk} keys, heads: {text.q.shape[1]}, {str(out.dtype)[6:]}, tiles {block_m} x {block_n}"
        asked += ", causal" * text.causal + f"\nText {b}: rows {rows.start} to {rows.stop - 1} of O, keys {cu_k[b]} to {cu_k[b + 1] - 1}."
        for name, got, key in (("O", out, "out"), ("L", lse, "lse")):
            try:
                assert_close(name, got[rows].transpose(0, 1)[None], right[key], plain[key], tile=block_m)
            except AssertionError as wrong:
                kept = "O of this text is right, and L is not.\n" if name == "L" else ""
                raise AssertionError(f"{asked}\n{wrong}\n{kept}{look}") from None
    return out, lse


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("n", [16, 21, 48])
def test_one_text(answer, n):
    """one text alone: what chapter 07 computes"""
    judge(answer, batch_of([n]), f"With one text, cu is [0, {n}], and nothing has to be searched.{FIND}")


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("lengths", [[16, 16], [32, 16, 48]], ids=str)
def test_each_text_has_its_own_keys(answer, lengths):
    """each text attends to its own keys, and to no others"""
    judge(answer, batch_of(lengths), f"All lengths are multiples of the tile here.{FIND}")


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("lengths", [[5, 3], [17, 31, 1, 40], [23, 2, 37]], ids=str)
def test_ragged_texts(answer, lengths):
    """lengths that the tile does not divide: a tile ends with its text"""
    look = f"Behind a text's last key stands the next text's first. A key is there when keys < nk.\n{STORES}"
    judge(answer, batch_of(lengths), look)


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("nq, nk", [([5, 20, 33], [30, 3, 17]), ([1, 1, 1], [40, 7, 16]), ([35, 18], [4, 50])], ids=str)
def test_queries_and_keys_of_different_number(answer, nq, nk):
    """a text may have more keys than queries, or fewer"""
    judge(answer, batch_of(nq, nk), f"cu_q counts rows of Q, O and L; cu_k counts rows of K and V.{FIND}")


EMPTY = [
    ([0, 20, 7], None),
    ([20, 0, 0, 7], None),
    ([20, 7, 0], None),
    ([0, 0, 9], [5, 0, 12]),
    ([9, 0, 20], [0, 8, 19]),
    ([3, 18], [0, 0]),
]


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("nq, nk", EMPTY, ids=str)
def test_empty_texts(answer, nq, nk, causal):
    """texts without queries, without keys, without either: first, last, and in between"""
    look = "An empty text has no tile; the count of texts that end at or before t passes over it. No key: O = 0, L = -inf."
    judge(answer, batch_of(nq, nk, causal=causal), look)


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("block_m, block_n", [(16, 32), (32, 16), (64, 32)])
@pytest.mark.parametrize("causal", [False, True])
def test_block_size(answer, block_m, block_n, causal):
    """block size does not change the answer"""
    batch = batch_of([20, 5, 40], [37, 40, 31], causal=causal)
    judge(answer, batch, "Tiles of 16 x 16 are another claim. Is a 16, or the wrong BLOCK, written in somewhere?", block_m, block_n)


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("lengths", [[16], [32, 48], [21, 3, 40]], ids=str)
def test_causal(answer, lengths):
    """causal: every text has a first word of its own, which sees itself alone"""
    judge(answer, batch_of(lengths, causal=True), RULE)


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize(
    "nq, nk", [([5, 20, 33], [30, 23, 49]), ([1, 1, 1], [40, 7, 16]), ([35, 18, 20], [4, 50, 20])], ids=str
)
def test_causal_is_bottom_right(answer, nq, nk):
    """causal with queries and keys of different number: each text's last query sees all of its keys"""
    judge(answer, batch_of(nq, nk, causal=True), f"{RULE} The walk's end needs nk - nq too.")


@pytest.mark.exercise("12.4")
def test_walk_stops(answer):
    """causal: the walk stops at the diagonal of its own text"""
    batch = batch_of([20, 48], causal=True)
    out, _ = judge(answer, batch, RULE)
    k, v = batch.k.clone(), batch.v.clone()
    k[20 + 16 :], v[20 + 16 :] = float("nan"), float("nan")  # keys 16 on of text 1: its first tile of queries sees none
    again, _ = run(answer, dataclasses.replace(batch, k=k, v=v))
    same = again[20:36].equal(out[20:36])
    assert same, (
        f"Text 1 has 48 words. Its rows 0 to 15 see keys 0 to 15. With NaN from key 16 on, {int(again[20:36].isnan().sum())} of\n"
        "their numbers are NaN: those keys were loaded. The walk may end at first + BLOCK_M + nk - nq, or at nk if that is smaller."
    )


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("causal", [False, True])
def test_no_leak(answer, causal):
    """changing one text changes no bit of another"""
    batch = batch_of([21, 35, 14], [21, 30, 9], causal=causal)
    edges, key_edges = list(pairwise(ends_of(batch.nq))), list(pairwise(ends_of(batch.nk)))
    before = run(answer, batch)
    for changed, ((q0, q1), (k0, k1)) in enumerate(zip(edges, key_edges)):
        q, k, v = batch.q.clone(), batch.k.clone(), batch.v.clone()
        q[q0:q1], k[k0:k1], v[k0:k1] = 1e4, float("nan"), float("inf")
        after = run(answer, dataclasses.replace(batch, q=q, k=k, v=v))
        for name, x, y in zip("OL", before, after):
            for b, (start, stop) in enumerate(edges):
                x_b, y_b = x[start:stop], y[start:stop]
                different = (x_b != y_b) & ~(x_b.isnan() & y_b.isnan())
                assert b == changed or not different.any(), (
                    f"Q, K and V of text {changed} changed, and so did {int(different.sum())} numbers of {name} of text {b}.\n"
                    f"No row, and no key, of another text may be read.{FIND}\n{STORES}"
                )


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("heads", [1, 3])
def test_heads(answer, heads):
    """one head or three: heads of a text do not mix"""
    judge(answer, batch_of([19, 6, 16], heads=heads), "Head h begins h * stride_h after head 0, in every tensor, and at h in L.")


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("count", [16, 17])
def test_many_short_texts(answer, count):
    """many short texts: as many as BLOCK_B, and one more than a power of two"""
    lengths = [(5 * b) % 7 for b in range(count)]
    judge(answer, batch_of(lengths, heads=1), "BLOCK_B is a power of two: numbers past starts[B] must not be counted.", 16, 16)


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)], ids=str)
def test_any_strides(answer, order):
    """inputs may be views: one third of a wider tensor, heads before rows, columns apart"""
    batch = batch_of([18, 7], [20, 31], heads=2)
    views = (
        lambda x: torch.stack((x, x + 1, x - 1), dim=1)[:, 0],  # of (total, 3, H, D), as one linear layer makes q, k and v
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # stored as (H, total, D)
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],  # every second column of a wider tensor
    )
    q, k, v = (views[i](x) for i, x in zip(order, (batch.q, batch.k, batch.v)))
    look = "The same numbers, stored in another order. Every row number is multiplied by its own tensor's row stride."
    judge(answer, dataclasses.replace(batch, q=q, k=k, v=v), look)


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(answer, dtype):
    """half precision in, half precision out, and float32 on the way"""
    out, lse = judge(answer, batch_of([33, 12], d=32, dtype=dtype, hot=1.0, causal=True), RULE, 32, 16)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32), f"O is {out.dtype}, L is {lse.dtype}."


@pytest.mark.exercise("12.4")
@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_scale(answer, scale):
    """the scale that was asked for, and scores in the hundreds"""
    judge(answer, batch_of([18, 5], scale=scale, hot=20.0), f"scale={scale}: all scores are that times Q K^T.")


@pytest.mark.exercise("12.4")
def test_scores_far_below_zero(answer):
    """a key of no text, or of the next, takes no weight from scores far below zero"""
    batch = batch_of([19, 3, 30])
    texts = [dataclasses.replace(text, q=-20 * text.q.abs(), k=text.k.abs()) for text in batch.texts]
    look = "All scores are far below 0: a key past the text's end, with the score 0, would take all of the weight. Its score is -inf."
    judge(answer, dataclasses.replace(batch, texts=texts, q=-20 * batch.q.abs(), k=batch.k.abs()), look)


@pytest.mark.exercise("12.4")
def test_repeated_runs(answer):
    """two runs give the same bits"""
    batch = batch_of([20, 7])
    for name, first, second in zip("OL", run(answer, batch), run(answer, batch)):
        assert first.equal(second), f"{name} differs in {int((first != second).sum())} numbers. Does a program write rows of another?"


@pytest.mark.exercise("12.4")
def test_no_program_touches_two_texts(answer):
    """a program reads and writes rows of one text, and a program without a tile reads none"""
    batch = batch_of([21, 0, 35, 14], [21, 4, 30, 9], heads=2)
    cu_q, cu_k = batch.cu
    tensors = {"q": batch.q, "k": batch.k, "v": batch.v, "cu_q": cu_q, "cu_k": cu_k}
    axes, tile = dict.fromkeys(("q", "k", "v", "o", "l"), 0), {"block_m": 16, "block_n": 16}
    if interpreting():
        with nan_outputs(f"Look at the stores: {STORES}", "O", "L"):
            trace = trace_triton(lambda: answer.flash_forward_varlen(*tensors.values(), **tile), tensors, row_axes=axes)
    else:
        trace = trace_file(answer.__file__, "flash_forward_varlen", tensors, row_axes=axes, **tile)
    assert_inside(trace, f"{FIND[1:]}\n{STORES}")
    texts = {}
    for event in trace.events:
        if event.name in axes:
            edges = ends_of(batch.nk if event.name in "kv" else batch.nq)
            inside = [b for b, (start, stop) in enumerate(pairwise(edges)) if start <= event.start and event.stop <= stop]
            asked = f"Program {event.program}: a {event.kind} of {event.name.upper()}, rows {event.start} to {event.stop - 1}"
            assert inside, f"{asked}, in more than one text: they begin at {edges[:-1]}.\n{STORES}"
            texts.setdefault(event.program, set()).add(inside[0])
    mixed = {program: sorted(seen) for program, seen in texts.items() if len(seen) > 1}
    assert not mixed, f"Programs that touched several texts: {mixed}.{FIND}"
    tiles = 2 * starts_of(batch.nq, 16)[-1]  # two heads
    assert len(texts) == tiles, f"{len(texts)} programs read rows, expected {tiles}: one for each tile of each head."
