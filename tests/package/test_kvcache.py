"""Decoding against fp64, one sequence at a time: ragged lengths, pages, appending, every flag, both backends.

Whatever a sequence does not use holds NaN: places behind its end, pages that are nobody's. Table entries
behind a sequence's end point nowhere.
"""
import inspect
import itertools
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from this_machine import DEVICE, ON_GPU
from torch import Tensor

import flash_edu
from flash_edu import flash_attention, flash_attention_kvcache, kvcache_ops
from flash_edu.course import bounds
from flash_edu.testing import assert_close

HEADS = [(3, 3), (4, 2), (7, 1), (14, 2)]  # multi-head, grouped-query, multi-query, groups of seven
NAN = float("nan")


@dataclass(frozen=True)
class Problem:
    """A call, and the keys that each sequence then attends to."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    seqlens: Tensor
    k: Tensor | None
    v: Tensor | None
    table: Tensor | None
    keys: list[Tensor]  # for each sequence (Hkv, len, D): cached and new
    values: list[Tensor]
    options: dict = field(default_factory=dict)

    def call(self, backend: str) -> Tensor:
        return flash_attention_kvcache(
            self.q, self.k_cache, self.v_cache, self.seqlens, k=self.k, v=self.v, block_table=self.table, **self.options,
            backend=backend,
        )  # fmt: skip


def make_problem(
    lengths=(40, 7), heads=2, kv_heads=1, nq=1, d=32, dv=None, *, capacity=None, new=0, page_size=None, dtype=torch.float32,
    hot=1.0, index=torch.int32, seed=0, **options,
) -> Problem:  # fmt: skip
    """Random inputs; `lengths` counts the new keys."""
    generator = torch.Generator().manual_seed(seed)
    dv = dv or d
    capacity = capacity or max(*lengths, 1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    keys = [draw(kv_heads, n, d) for n in lengths]
    values = [draw(kv_heads, n, dv) for n in lengths]
    caches = [torch.full((len(lengths), kv_heads, capacity, n), NAN, dtype=dtype, device=DEVICE) for n in (d, dv)]
    for b, n in enumerate(lengths):
        caches[0][b, :, : n - new] = keys[b][:, : n - new]
        caches[1][b, :, : n - new] = values[b][:, : n - new]
    table = None
    if page_size:
        caches, table = paged(caches, lengths, page_size, seed)
    k, v = (torch.stack([x[:, -new:] for x in xs]) if new else None for xs in (keys, values))
    seqlens = torch.tensor([n - new for n in lengths], dtype=index, device=DEVICE)
    q = draw(len(lengths), heads, nq, d) * hot
    return Problem(q, *caches, seqlens, k, v, table, keys, values, options)


def paged(caches, lengths, page_size, seed):
    """The same caches in pages, in random order, with some pages that are nobody's."""
    batch, kv_heads, capacity, _ = caches[0].shape
    count = -(-capacity // page_size)
    order = torch.randperm(batch * count + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    pages = [torch.full((len(order), kv_heads, page_size, x.shape[3]), NAN, dtype=x.dtype, device=DEVICE) for x in caches]
    table = torch.tensor([-1, 10**9], dtype=torch.int32, device=DEVICE).repeat(batch, count)[:, :count].clone()
    for b, n in enumerate(lengths):
        for i in range(-(-n // page_size)):
            table[b, i] = order[b * count + i]
            for x, y in zip(caches, pages):
                part = x[b, :, i * page_size : (i + 1) * page_size]
                y[order[b * count + i], :, : part.shape[1]] = part
    return pages, table


def naive(problem: Problem, dtype: torch.dtype) -> Tensor:
    """The formula, for one sequence after the other, in `dtype`."""
    o = {"causal": True, "scale": None, "window": None, "softcap": None, "alibi_slopes": None, "sinks": None} | problem.options
    q = problem.q.to(dtype)
    batch, heads, nq, d = q.shape
    rows = []
    for b in range(batch):
        k, v = (x[b].to(dtype).repeat_interleave(heads // x[b].shape[0], dim=0) for x in (problem.keys, problem.values))
        n = k.shape[1]
        s = q[b] @ k.mT * (d**-0.5 if o["scale"] is None else o["scale"])  # (Hq, Nq, n)
        if o["softcap"]:
            s = o["softcap"] * (s / o["softcap"]).tanh()
        i, j = torch.arange(nq, device=q.device)[:, None] + n - nq, torch.arange(n, device=q.device)
        if o["alibi_slopes"] is not None:
            slopes = o["alibi_slopes"] if o["alibi_slopes"].ndim == 1 else o["alibi_slopes"][b]
            s = s - slopes.to(dtype)[:, None, None] * (i - j).abs().to(dtype)
        keep = torch.ones(nq, n, dtype=torch.bool, device=q.device)
        if o["causal"]:
            keep &= j <= i
        left, right = o["window"] or (None, None)
        if left not in (None, -1):
            keep &= j >= i - left
        if right not in (None, -1):
            keep &= j <= i + right
        s = s.masked_fill(~keep, float("-inf"))
        if o["sinks"] is not None:
            s = torch.cat([s, o["sinks"].to(dtype)[:, None, None].expand(-1, nq, 1)], dim=-1)
        p = s.softmax(-1).nan_to_num(0.0)[..., :n] if s.shape[-1] else s
        rows.append(p @ v)
    return torch.stack(rows)


def check(problem: Problem, backend: str) -> Tensor:
    got = problem.call(backend)
    assert got.dtype == problem.q.dtype
    assert_close("out", got, naive(problem, torch.float64), naive(problem, problem.q.dtype))
    return got


def dtypes_of(backend):
    if backend == "triton" and not ON_GPU:
        return [torch.float32, torch.float16]  # Triton's interpreter computes bf16 wrongly, and we refuse it
    return [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[None, 1, 3])
def splits(request, backend, monkeypatch):
    """How many programs share a sequence: as chosen, or forced."""
    if request.param is not None:
        if backend == "torch":
            pytest.skip("plain PyTorch does not split")
        from flash_edu.kernels import decode

        monkeypatch.setattr(decode, "choose_splits", lambda *_: request.param)
    return request.param


# --- right ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("nq", [1, 3, 17])
def test_ragged_lengths(nq, heads, causal, backend):
    for i, dtype in enumerate(dtypes_of(backend)):
        check(make_problem((0, 1, 65, 100), *heads, nq, dtype=dtype, causal=causal, hot=2.0, seed=i), backend)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("nq", [1, 3])
def test_splits(nq, page_size, splits, backend):
    """More parts than tiles, parts that are empty, one part: the same answer."""
    problem = make_problem((1, 150, 0, 33), 4, 2, nq, page_size=page_size, dtype=torch.float16, hot=3.0)
    slopes, sinks = torch.rand(4, device=DEVICE), torch.randn(4, device=DEVICE)
    for options in ({}, {"window": (40, 0), "alibi_slopes": slopes, "sinks": sinks}):
        check(replace(problem, options=options), backend)


def test_more_splits_than_one_round_of_the_merge(monkeypatch):
    from flash_edu.kernels import decode

    monkeypatch.setattr(decode, "choose_splits", lambda *_: 70)
    check(make_problem((300, 2048), 1, 1, 2, d=16, dtype=torch.float16, hot=3.0), "triton")


@pytest.mark.parametrize("d, dv", [(40, 40), (59, 59), (80, 80), (96, 96), (128, 128), (256, 256), (64, 32), (16, 128), (192, 1)])
def test_head_dims(d, dv, backend):
    for dtype in dtypes_of(backend)[-2:]:
        check(make_problem((45, 70), 4, 2, 2, d, dv, dtype=dtype), backend)
        check(make_problem((45, 70), 4, 2, 2, d, dv, dtype=dtype, page_size=32, new=2), backend)


OPTIONS = {
    "full": {"causal": False},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "a wide softcap": {"softcap": 1000.0, "causal": False},  # near 0, tanh must keep every place
    "one slope for a head": {"alibi_slopes": "heads"},
    "slopes of each sequence": {"alibi_slopes": "batch"},
    "slopes, full": {"alibi_slopes": "heads", "causal": False},
    "sinks": {"sinks": "fp32"},
    "sinks in half": {"sinks": "half"},
    "window": {"window": (20, 0)},
    "window of one": {"window": (0, 0)},
    "window, no limit": {"window": (-1, None)},
    "window to the left": {"window": (33, None), "causal": False},
    "window to the right": {"window": (None, 3), "causal": False},
    "window both ways": {"window": (17, 2), "causal": False},
    "causal wins over the window": {"window": (17, 2)},
    "a window wider than the keys": {"window": (5000, 5000), "causal": False},
    "all of them": {"scale": 0.4, "softcap": 3.0, "alibi_slopes": "batch", "sinks": "fp32", "window": (30, 0)},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, backend):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    tensors = {"heads": draw(4).abs(), "batch": draw(4, 4).abs(), "fp32": draw(4), "half": draw(4).half()}
    options = {key: tensors[value] if isinstance(value, str) else value for key, value in OPTIONS[name].items()}
    for nq, page_size, dtype in ((1, None, torch.float16), (5, None, torch.float32), (5, 16, torch.float16)):
        check(make_problem((0, 1, 100, 67), 4, 2, nq, dtype=dtype, page_size=page_size, **options), backend)


@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
@pytest.mark.parametrize("new", [0, 1, 20])
def test_pages(new, page_size, backend):
    lengths = [max(n, new) for n in (0, page_size, page_size + 1, 2 * page_size - 1)]
    check(make_problem(lengths, 4, 2, 3, new=new, page_size=page_size, dtype=torch.float16), backend)


def test_shared_pages(backend):
    """Two sequences with the same beginning, stored once."""
    problem = make_problem((64, 64), 4, 2, page_size=16)
    table = problem.table.clone()
    table[1, :2] = table[0, :2]
    for x in (problem.keys, problem.values):
        x[1][:, :32] = x[0][:, :32]
    check(replace(problem, table=table), backend)


def test_pages_and_none_give_the_same(backend):
    """Where a key lies changes nothing: not one bit."""
    plain = make_problem((37, 64), 4, 2, 2, dtype=torch.float16)
    pages = make_problem((37, 64), 4, 2, 2, dtype=torch.float16, page_size=16)
    assert torch.equal(plain.call(backend), pages.call(backend))


@pytest.mark.parametrize("hot", [0.0, 10.0, 50.0])
def test_cold_and_hot_scores(hot, backend):
    for dtype in dtypes_of(backend):
        check(make_problem((65, 97), 4, 2, 2, dtype=dtype, hot=hot), backend)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_length_dtypes(index, backend):
    check(make_problem((30, 5), 4, 2, index=index, new=1, page_size=16), backend)


def test_a_row_that_sees_nothing(backend):
    """More queries than keys: the first ones stand before the first key."""
    problem = make_problem((3, 0), 2, 1, 10)
    got = check(problem, backend)
    assert not got[0, :, :7].any() and got[0, :, 7:].all() and not got[1].any()
    sinks = torch.tensor([0.5, float("-inf")], device=DEVICE)
    assert not check(replace(problem, options={"sinks": sinks}), backend)[1].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("heads", [(8, 1), (32, 8), (8, 8), (40, 1)], ids=str)
@pytest.mark.parametrize("page_size", [None, 16, 64, 256])
def test_long_sequences(page_size, heads, d, dtype):
    lengths = (5000, 4, 2048, 777)  # each has room for the new ones
    for nq in (1, 4):
        check(make_problem(lengths, *heads, nq, d, dtype=dtype, page_size=page_size, new=nq, hot=2.0), "triton")
        check(make_problem(lengths, *heads, nq, d, dtype=dtype, page_size=page_size, window=(1000, 0)), "triton")


@pytest.mark.parametrize("seed", range(40 if ON_GPU else 12))
def test_random_requests(seed, backend):
    pick = random.Random(seed)
    kv_heads, group = pick.randint(1, 3), pick.choice([1, 2, 5, 8])
    batch, new, longest = pick.randint(1, 4), pick.choice([0, 0, 1, 4]), 3000 if ON_GPU else 90
    lengths = [pick.choice([new, new + 1, new + pick.randint(0, longest), 16 * pick.randint(1, 5)]) for _ in range(batch)]
    options = {"causal": pick.random() < 0.7, "window": pick.choice([None, None, (pick.randint(0, 60), None), (10, 10)])}
    options |= {"softcap": pick.choice([None, None, 5.0]), "scale": pick.choice([None, 0.2])}
    options |= {"alibi_slopes": torch.rand(kv_heads * group, device=DEVICE) if pick.random() < 0.3 else None}
    options |= {"sinks": torch.randn(kv_heads * group, device=DEVICE) if pick.random() < 0.3 else None}
    problem = make_problem(
        lengths, kv_heads * group, kv_heads, pick.choice([1, 1, 2, 6]), pick.choice([16, 32, 64]), new=new,
        capacity=max(*lengths, 1) + pick.randint(0, 40), page_size=pick.choice([None, None, 16, 32]),
        dtype=pick.choice(dtypes_of(backend)), hot=pick.choice([1.0, 4.0]), seed=seed, **options,
    )  # fmt: skip
    check(problem, backend)


# --- the cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 16])
def test_appending_writes_the_new_keys_and_nothing_else(page_size, backend):
    problem = make_problem((9, 20, 16), 4, 2, 3, capacity=20, new=3, page_size=page_size, dv=24)
    before = [x.clone() for x in (problem.k_cache, problem.v_cache, problem.seqlens)]
    check(problem, backend)
    assert torch.equal(problem.seqlens, before[2])
    for cache, old, new in ((problem.k_cache, before[0], problem.k), (problem.v_cache, before[1], problem.v)):
        for b, (start, t) in itertools.product(range(3), zip((0, 0, 0), range(3))):
            place = int(problem.seqlens[b]) + start + t
            page, row = (b, place) if page_size is None else (problem.table[b, place // 16], place % 16)
            old[page, :, row] = new[b, :, t]
        assert torch.equal(cache.nan_to_num(123.0), old.nan_to_num(123.0))


def test_without_new_keys_nothing_is_written(backend):
    problem = make_problem((9, 20), 4, 2, 3)
    everything = (problem.q, problem.k_cache, problem.v_cache, problem.seqlens)
    before = [x.clone() for x in everything]
    problem.call(backend)
    for x, y in zip(everything, before):
        assert torch.equal(x.nan_to_num(123.0), y.nan_to_num(123.0))


LAYOUTS = {
    "(batch, seq, heads, dim)": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "heads and batch swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "a part of a bigger tensor": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1, 2, 0), value=NAN)[:, 2:, 1:-1, 3:-2],
}


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, page_size, backend):
    problem = make_problem((30, 41), 4, 2, 2, new=2, page_size=page_size, dtype=torch.float16)
    change = LAYOUTS[layout]
    names = ("q", "k_cache", "v_cache", "k", "v")
    problem = replace(problem, **{name: change(getattr(problem, name)) for name in names})
    got = check(problem, backend)
    assert got.stride() == torch.empty_like(problem.q).stride()
    assert torch.equal(problem.k_cache[0, :, 28:30] if page_size is None else problem.k[0], problem.k[0])


def test_strided_head_dims_of_new_tensors(backend):
    """q, k and v are small, and copied if they must be."""
    problem = make_problem((30, 41), 4, 2, 2, new=2)
    strided = {name: getattr(problem, name).mT.contiguous().mT for name in ("q", "k", "v")}
    check(replace(problem, **strided), backend)


def test_slices_of_lengths_tables_and_slopes(backend):
    problem = make_problem((30, 41), 4, 2, 2, page_size=16, alibi_slopes=torch.rand(2, 4, 2, device=DEVICE)[..., 1])
    seqlens = problem.seqlens.repeat_interleave(2)[::2]
    table = problem.table.repeat_interleave(2, dim=1)[:, ::2]
    check(replace(problem, seqlens=seqlens, table=table), backend)
    wider = torch.cat((problem.table, problem.table), dim=1)[:, : problem.table.shape[1]]
    check(replace(problem, table=wider), backend)


@pytest.mark.parametrize("page_size", [None, 16])
def test_lengths_out_of_range_touch_nothing_outside(page_size, backend):
    """The caches stand in a frame. Lengths of one sequence are absurd; the others' results are right."""
    for absurd in (-5, -(2**31), 33, 2**31 - 1):
        problem = make_problem((20, 25, 31), 4, 2, 2, capacity=32, new=2, page_size=page_size)
        frames = [torch.nn.functional.pad(x, (0, 0, 1, 1, 0, 0, 1, 1), value=77.0) for x in (problem.k_cache, problem.v_cache)]
        inside = [x[1:-1, :, 1:-1] for x in frames]
        right = naive(problem, torch.float64)
        problem = replace(problem, k_cache=inside[0], v_cache=inside[1])
        problem.seqlens[1] = absurd
        problem.k_cache.nan_to_num_(0.0)
        problem.v_cache.nan_to_num_(0.0)
        if page_size:
            problem.table.clamp_(0, problem.k_cache.shape[0] - 1)
        got = problem.call(backend)
        assert got.isfinite().all()
        for b in (0, 2):
            torch.testing.assert_close(got[b].double(), right[b], rtol=1e-5, atol=1e-5)
        for frame in frames:
            frame[1:-1, :, 1:-1] = 77.0
            assert (frame == 77.0).all()


def test_keys_that_do_not_fit_are_dropped(backend):
    problem = make_problem((6, 8), 2, 1, 1, capacity=8, new=3)
    problem.seqlens[1] = 7  # one of three fits
    problem.k_cache[1, :, :7] = problem.keys[1][:, :7]
    problem.v_cache[1, :, :7] = problem.values[1][:, :7]
    for xs, new in ((problem.keys, problem.k), (problem.values, problem.v)):
        xs[1] = torch.cat((xs[1][:, :7], new[1, :, :1]), dim=1)
    check(problem, backend)
    assert torch.equal(problem.k_cache[1, :, 7], problem.k[1, :, 0])


def test_pages_that_do_not_exist_are_not_written(backend):
    problem = make_problem((20, 25), 4, 2, 1, new=2, page_size=16)
    problem.table[0] = torch.tensor([-7, 10**6], dtype=torch.int32)
    before = problem.k_cache.clone()
    problem.call(backend)
    page, row = problem.table[1, 1], 25 - 2 - 16
    before[page, :, row : row + 2] = problem.k[1]
    assert torch.equal(problem.k_cache.nan_to_num(123.0), before.nan_to_num(123.0))


@pytest.mark.skipif(ON_GPU, reason="Triton's interpreter can be watched")
@pytest.mark.parametrize("page_size", [None, 16])
def test_kernels_stay_within_their_tensors(page_size):
    """Not one address outside, whatever stands in lengths and tables: the last tile ends behind cache and
    table.
    """
    problem = make_problem((48, 20, 47), 4, 2, 2, capacity=48, new=1, page_size=page_size, window=(25, 0))
    with bounds.checked():
        check(problem, "triton")
        problem.k_cache.nan_to_num_(0.0)
        problem.v_cache.nan_to_num_(0.0)
        for absurd in (-(2**31), -1, 48, 2**31 - 1):
            problem.seqlens[2] = absurd
            problem.call("triton")
            if page_size:
                problem.table[2] = absurd
                problem.call("triton")


@pytest.mark.parametrize("which", ["batch", "head", "row"])
def test_offsets_past_2_to_the_31(which, backend):
    problem = make_problem((40, 33), 2, 2, 2, 16, new=1, dtype=torch.float16)
    far = 2**31 + 64
    strides = {"batch": (far, 640, 16, 1), "head": (640, far, 16, 1), "row": (16, 32, far // 32, 1)}[which]
    size = sum((n - 1) * stride for n, stride in zip(problem.k_cache.shape, strides)) + 1
    far_away = [
        torch.empty(size, dtype=x.dtype, device=DEVICE).as_strided(x.shape, strides).copy_(x)
        for x in (problem.k_cache, problem.v_cache)
    ]
    check(replace(problem, k_cache=far_away[0], v_cache=far_away[1]), backend)


@pytest.mark.parametrize("shapes", [((0, 2, 1, 16), (0, 2, 8, 16)), ((2, 2, 0, 16), (2, 2, 8, 16)), ((2, 2, 1, 16), (2, 2, 0, 16))])
def test_empty(shapes, backend):
    q, cache = (torch.randn(shape, device=DEVICE) for shape in shapes)
    lengths = torch.full(shapes[0][:1], 5, dtype=torch.int32, device=DEVICE)
    out = flash_attention_kvcache(q, cache, cache, lengths, backend=backend)
    assert torch.equal(out, torch.zeros_like(q))


def test_same_inputs_same_bits(backend, splits):
    problem = make_problem((200, 131), 8, 2, 2, dtype=torch.float16, page_size=16)
    first = problem.call(backend)
    assert all(torch.equal(first, problem.call(backend)) for _ in range(50 if ON_GPU else 2))


@pytest.mark.parametrize("page_size", [None, 16])
def test_a_generation_is_full_attention_at_each_step(page_size, backend):
    """A prompt, then twenty tokens one by one; the whole sequence through flash_attention is the same."""
    dtype, prompt, steps = torch.float32, 11, 20
    torch.manual_seed(0)
    n = prompt + steps
    q, k, v = (torch.randn(2, heads, n, 16, device=DEVICE, dtype=dtype) for heads in (4, 2, 2))
    full = flash_attention(q, k, v, causal=True, backend="torch")
    cache = [torch.full((2, 2, 48, 16), NAN, device=DEVICE, dtype=dtype) for _ in range(2)]
    table = None
    if page_size:
        cache = [x.view(2, 2, 3, 16, 16).transpose(1, 2).flatten(0, 1).contiguous() for x in cache]
        table = torch.tensor([[4, 0, 2], [1, 5, 3]], dtype=torch.int32, device=DEVICE)
    lengths = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    start = 0
    for size in (prompt, *[1] * steps):
        part = slice(start, start + size)
        out = flash_attention_kvcache(
            q[:, :, part], *cache, lengths, k=k[:, :, part], v=v[:, :, part], block_table=table, backend=backend
        )
        torch.testing.assert_close(out, full[:, :, part], rtol=1e-5, atol=1e-5)
        lengths += size
        start += size


# --- in PyTorch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 16])
def test_opcheck(page_size, backend):
    p = make_problem((20, 9), 4, 2, 2, new=2, page_size=page_size, dtype=torch.float16)
    p.k_cache.nan_to_num_(0.0)  # opcheck compares, and NaN is not NaN
    p.v_cache.nan_to_num_(0.0)
    slopes = torch.rand(4, device=DEVICE)
    torch.library.opcheck(kvcache_ops.kvcache_append, (p.k_cache, p.v_cache, p.k, p.v, p.seqlens, p.table, backend))
    attention = (p.q, p.k_cache, p.v_cache, p.seqlens, p.table, 2, 7, 0, 0.25, 3.0, slopes, slopes, backend)
    torch.library.opcheck(kvcache_ops.kvcache_attention.overload, attention)
    attention = (p.q.mT.contiguous().mT, p.k_cache, p.v_cache, p.seqlens, p.table, 0, 7, 0, 0.25, None, None, None, backend)
    torch.library.opcheck(kvcache_ops.kvcache_attention.overload, attention)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("page_size", [None, 16])
def test_compile_fullgraph(page_size, dynamic, backend):
    """Five steps of a compiled loop: the caches, changed in place, and the results are those of the plain
    one.
    """

    def step(q, k_cache, v_cache, lengths, k, v, table):
        out = flash_attention_kvcache(q * 1.0, k_cache, v_cache, lengths, k=k, v=v, block_table=table, window=(9, 0), backend=backend)
        return out.sin()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="inductor" if ON_GPU else "aot_eager")
    problem = make_problem((5, 12), 4, 2, 1, capacity=40, page_size=page_size, dtype=torch.float16)
    if page_size:
        problem.table.copy_(torch.arange(6, device=DEVICE).view(2, 3))
    filled = [torch.randn_like(x) for x in (problem.k_cache, problem.v_cache)]
    caches = [[x.clone() for x in filled] for _ in range(2)]
    lengths = problem.seqlens.clone()
    for new in (1, 1, 1, 2, 3):
        q, k, v = (torch.randn(2, heads, new, 32, device=DEVICE, dtype=torch.float16) for heads in (4, 2, 2))
        plain = step(q, *caches[0], lengths, k, v, problem.table)
        fast = compiled(q, *caches[1], lengths, k, v, problem.table)
        torch.testing.assert_close(plain, fast)
        assert all(torch.equal(x, y) for x, y in zip(*caches))
        lengths += new


def test_autocast_casts_to_the_cache(backend):
    problem = make_problem((20, 9), 4, 2, 2, new=2, dtype=torch.float16)
    right = problem.call(backend)
    wide = {name: getattr(problem, name).float() for name in ("q", "k", "v")}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = replace(problem, **wide).call(backend)
    assert got.dtype == torch.float16 and torch.equal(got, right)


def test_inference_mode(backend):
    problem = make_problem((20, 9), 4, 2, 2, new=2)
    with torch.inference_mode():
        check(problem, backend)


def test_parameters_are_fine_without_gradients(backend):
    problem = make_problem((20, 9), 4, 2, 2, sinks=torch.nn.Parameter(torch.randn(4, device=DEVICE)))
    with torch.no_grad():
        check(replace(problem, q=problem.q.clone().requires_grad_()), backend)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 64])
def test_nothing_waits_for_the_gpu(page_size, backend):
    problem = make_problem((20, 9), 4, 2, 2, new=2, page_size=page_size, sinks=torch.randn(4, device=DEVICE))
    problem.call(backend)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        problem.call(backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 64])
def test_cuda_graph(page_size, backend):
    """Captured once, replayed with other lengths, tokens and pages."""
    problems = [
        make_problem(lengths, 8, 2, 1, 64, new=1, capacity=600, page_size=page_size, dtype=torch.float16, seed=i)
        for i, lengths in enumerate([(500, 3), (17, 333), (1, 600)])
    ]
    names = [name for name in ("q", "k_cache", "v_cache", "seqlens", "k", "v", "table") if getattr(problems[0], name) is not None]
    static = replace(problems[0], **{name: getattr(problems[0], name).clone() for name in names})
    static.call(backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = static.call(backend)
    for problem in problems:
        for name in names:
            getattr(static, name).copy_(getattr(problem, name))
        graph.replay()
        assert_close("out", out, naive(problem, torch.float64), naive(problem, torch.float16))


@pytest.mark.gpu
def test_many_sequences():
    check(make_problem([i % 50 for i in range(3000)], 24, 24, 1, 16, dtype=torch.float16), "triton")


def test_fp64_is_for_plain_pytorch():
    problem = make_problem((20, 9), 4, 2, 2, dtype=torch.float64, softcap=3.0)
    check(problem, "torch")
    check(problem, "auto")
    with pytest.raises(NotImplementedError, match="float64.*backend='torch' can"):
        problem.call("triton")


def test_auto_is_torch_on_a_cpu_and_triton_on_a_gpu():
    problem = make_problem((20, 9), 4, 2, 2)
    assert torch.equal(problem.call("auto"), problem.call("triton" if ON_GPU else "torch"))


def test_choosing_splits():
    """Long sequences are shared by many, a big batch needs no sharing, and no part is emptier than a tile."""
    from flash_edu.kernels import decode
    from flash_edu.kernels.tiles import DecodeTile

    tile = DecodeTile(16, 64, 4, 4)
    choose = lambda programs, keys: decode.choose_splits(programs, keys, tile, torch.device("cpu"))  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_processors", lambda device: 132)
        assert choose(8, 131072) == choose(8, 4096) == 16  # one program for each multiprocessor
        assert choose(1, 131072) == 132
        assert choose(8, 100) == 2  # tiles
        assert choose(8, 1) == choose(8, 0) == 1
        assert choose(100, 4096) == choose(5000, 131072) == 1


# --- wrong calls ------------------------------------------------------------------------------------------


def x(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


def call(**changes):
    arguments = {
        "q": x(2, 4, 1, 16), "k_cache": x(2, 2, 32, 16), "v_cache": x(2, 2, 32, 16),
        "cache_seqlens": torch.tensor([3, 4], dtype=torch.int32),
    } | changes  # fmt: skip
    return flash_attention_kvcache(**arguments)


def paged_call(**changes):
    return call(**{"k_cache": x(8, 2, 16, 16), "v_cache": x(8, 2, 16, 16), "block_table": x(2, 2, dtype=torch.int32)} | changes)


NEW = {"k": x(2, 2, 1, 16), "v": x(2, 2, 1, 16)}
WRONG_CALLS = {
    "q is a list": (lambda: call(q=[1.0]), TypeError, ["q", "torch.Tensor", "list"]),
    "k_cache is None": (lambda: call(k_cache=None), TypeError, ["k_cache", "torch.Tensor", "NoneType"]),
    "v_cache is a tuple": (lambda: call(v_cache=(1,)), TypeError, ["v_cache", "torch.Tensor", "tuple"]),
    "lengths are a list": (lambda: call(cache_seqlens=[3, 4]), TypeError, ["cache_seqlens", "torch.Tensor", "list"]),
    "lengths are a number": (lambda: call(cache_seqlens=3), TypeError, ["cache_seqlens", "torch.Tensor", "int"]),
    "lengths are floats": (lambda: call(cache_seqlens=x(2)), TypeError, ["cache_seqlens", "int32", "float32"]),
    "lengths of another batch": (lambda: call(cache_seqlens=x(3, dtype=torch.int32)), ValueError, ["cache_seqlens", "(2,)", "(3,)"]),
    "lengths elsewhere": (
        lambda: call(cache_seqlens=x(2, dtype=torch.int32, device="meta")), ValueError, ["cache_seqlens", "device of q", "meta"]
    ),
    "q has 3 dimensions": (lambda: call(q=x(2, 1, 16)), ValueError, ["q", "4 dimensions", "(2, 1, 16)"]),
    "k_cache is sparse": (lambda: call(k_cache=x(2, 2, 32, 16).to_sparse()), TypeError, ["k_cache", "dense", "sparse"]),
    "q is int": (lambda: call(q=x(2, 4, 1, 16, dtype=torch.int64)), TypeError, ["q", "float16", "int64"]),
    "dtypes differ": (lambda: call(k_cache=x(2, 2, 32, 16, dtype=torch.float16)), TypeError, ["k_cache", "dtype of q", "float16"]),
    "devices differ": (lambda: call(v_cache=x(2, 2, 32, 16, device="meta")), ValueError, ["v_cache", "device of q", "meta"]),
    "head_dim too large": (lambda: call(q=x(2, 4, 1, 300)), NotImplementedError, ["q", "256", "300"]),
    "head_dims differ": (lambda: call(q=x(2, 4, 1, 32)), ValueError, ["k_cache", "head_dim of q", "16", "32"]),
    "batches differ": (lambda: call(q=x(3, 4, 1, 16), cache_seqlens=x(3, dtype=torch.int32)), ValueError, ["k_cache", "batch", "2", "3"]),
    "caches differ": (lambda: call(v_cache=x(2, 2, 31, 16)), ValueError, ["v_cache", "k_cache", "31", "32"]),
    "heads do not divide": (lambda: call(q=x(2, 3, 1, 16)), ValueError, ["multiple", "3", "2"]),
    "head dim strided": (lambda: call(k_cache=x(2, 2, 16, 32).mT), ValueError, ["k_cache", "contiguous", "strides"]),
    "k without v": (lambda: call(k=NEW["k"]), ValueError, ["k and v", "both or neither", "v=None"]),
    "v without k": (lambda: call(v=NEW["v"]), ValueError, ["k and v", "both or neither", "k=None"]),
    "k of another batch": (lambda: call(k=x(1, 2, 1, 16), v=NEW["v"]), ValueError, ["k", "(2, 2, 1, 16)", "(1, 2, 1, 16)"]),
    "k with the heads of q": (lambda: call(k=x(2, 4, 1, 16), v=NEW["v"]), ValueError, ["k", "heads of k_cache", "(2, 4, 1, 16)"]),
    "v longer than k": (lambda: call(k=NEW["k"], v=x(2, 2, 2, 16)), ValueError, ["v", "length of k", "(2, 2, 2, 16)"]),
    "k of another dtype": (lambda: call(k=x(2, 2, 1, 16).half(), v=NEW["v"]), TypeError, ["k", "dtype of q", "float16"]),
    "more new keys than places": (lambda: call(k=x(2, 2, 33, 16), v=x(2, 2, 33, 16)), ValueError, ["k", "33", "32"]),
    "appending to an expanded cache": (
        lambda: call(k_cache=x(1, 2, 32, 16).expand(2, -1, -1, -1), **NEW), ValueError, ["k_cache", "expanded", "(0, 512, 16, 1)"]
    ),
    "table is int64": (lambda: paged_call(block_table=x(2, 2, dtype=torch.int64)), TypeError, ["block_table", "int32", "int64"]),
    "table has 1 dimension": (lambda: paged_call(block_table=x(2, dtype=torch.int32)), ValueError, ["block_table", "(2,"]),
    "table of another batch": (lambda: paged_call(block_table=x(3, 2, dtype=torch.int32)), ValueError, ["block_table", "(3, 2)"]),
    "page size": (lambda: paged_call(k_cache=x(8, 2, 24, 16), v_cache=x(8, 2, 24, 16)), ValueError, ["page_size", "16", "24"]),
    "more new keys than pages hold": (lambda: paged_call(k=x(2, 2, 33, 16), v=x(2, 2, 33, 16)), ValueError, ["k", "33", "32"]),
    "causal is a tensor": (lambda: call(causal=x(1)), TypeError, ["causal", "True or False"]),
    "causal is None": (lambda: call(causal=None), TypeError, ["causal", "True or False", "None"]),
    "scale is 0": (lambda: call(scale=0), ValueError, ["scale", "positive", "0"]),
    "scale is a tensor": (lambda: call(scale=x(1)), TypeError, ["scale", "number", "Tensor"]),
    "window is a number": (lambda: call(window=5), TypeError, ["window", "pair", "5"]),
    "window of three": (lambda: call(window=(1, 2, 3)), TypeError, ["window", "pair", "(1, 2, 3)"]),
    "window of floats": (lambda: call(window=(1.5, 0)), TypeError, ["window", "whole numbers", "1.5"]),
    "window is negative": (lambda: call(window=(-2, 0)), ValueError, ["window", "-1 (no limit)", "(-2, 0)"]),
    "softcap is 0": (lambda: call(softcap=0.0), ValueError, ["softcap", "positive", "0.0"]),
    "softcap is infinite": (lambda: call(softcap=float("inf")), ValueError, ["softcap", "finite", "inf"]),
    "softcap is a string": (lambda: call(softcap="30"), TypeError, ["softcap", "number", "str"]),
    "slopes are a list": (lambda: call(alibi_slopes=[1.0] * 4), TypeError, ["alibi_slopes", "torch.Tensor", "list"]),
    "slopes in half": (lambda: call(alibi_slopes=x(4).half()), TypeError, ["alibi_slopes", "float32", "float16"]),
    "slopes of the kv heads": (lambda: call(alibi_slopes=x(2)), ValueError, ["alibi_slopes", "(2, 4) or (4,)", "(2,)"]),
    "slopes elsewhere": (lambda: call(alibi_slopes=x(4, device="meta")), ValueError, ["alibi_slopes", "device of q", "meta"]),
    "sinks are ints": (lambda: call(sinks=x(4, dtype=torch.int32)), TypeError, ["sinks", "float32", "int32"]),
    "sinks for each sequence": (lambda: call(sinks=x(2, 4)), ValueError, ["sinks", "(4,)", "(2, 4)"]),
    "backend unknown": (lambda: call(backend="cuda"), ValueError, ["backend", "triton", "'cuda'"]),
    "backend hopper": (lambda: call(backend="hopper"), NotImplementedError, ["hopper", "backend='torch'"]),
    "q requires a gradient": (lambda: call(q=x(2, 4, 1, 16, requires_grad=True)), NotImplementedError, ["q requires a gradient", "no_grad"]),
    "k requires a gradient": (
        lambda: call(k=x(2, 2, 1, 16, requires_grad=True), v=NEW["v"]), NotImplementedError, ["k requires a gradient"]
    ),
    "v requires a gradient": (
        lambda: call(k=NEW["k"], v=x(2, 2, 1, 16, requires_grad=True)), NotImplementedError, ["v requires a gradient"]
    ),
    "sinks require a gradient": (lambda: call(sinks=x(4, requires_grad=True)), NotImplementedError, ["sinks requires a gradient"]),
    "a positional option": (lambda: flash_attention_kvcache(x(1), x(1), x(1), x(1), x(1)), TypeError, ["positional"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call(name):
    wrong, error, words = WRONG_CALLS[name]
    with pytest.raises(error) as raised:
        wrong()
    message = str(raised.value)
    assert all(word in message for word in words), message


def test_the_calls_that_wrong_ones_vary_are_right():
    assert call().shape == paged_call().shape == (2, 4, 1, 16)


def test_signature():
    signature = inspect.signature(flash_attention_kvcache)
    bare = str(signature.replace(
        parameters=[p.replace(annotation=p.empty) for p in signature.parameters.values()], return_annotation=signature.empty
    ))  # fmt: skip
    assert bare == (
        "(q, k_cache, v_cache, cache_seqlens, *, k=None, v=None, block_table=None, causal=True, scale=None, window=None, "
        "softcap=None, alibi_slopes=None, sinks=None, backend='auto')"
    )
    assert "flash_attention_kvcache" in flash_edu.__all__
