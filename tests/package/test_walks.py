"""Which tiles are loaded: each that holds a visible pair, once, and no other. Counted in the interpreter, load by load."""
import itertools

import pytest
import torch
from some_rules import EVERY, MAKERS, make_rules
from this_machine import ON_GPU

from flash_edu import flash_attention, flash_attention_varlen
from flash_edu.figures import trace_triton, watch
from flash_edu.figures.trace_job import interpreted_tiles
from flash_edu.reference import tiled_backward, tiled_forward
from flash_edu.rules import Rules, limits

pytestmark = pytest.mark.skipif(ON_GPU, reason="loads are traced in the interpreter: make test")
LENGTHS = [(40, 40), (37, 70), (70, 33)]
WINDOWS = [(0, 0), (5, 0), (20, 3), (3, 20), (None, 4), (4, None), (100, 100), (16, 15)]
TILES = [(16, 16), (32, 16), (16, 32)]


def inputs(nq, nk, heads=1, kv_heads=1):
    torch.manual_seed(0)
    return [torch.randn(1, h, n, 16, requires_grad=True) for h, n in ((heads, nq), (kv_heads, nk), (kv_heads, nk))]


def seen_pairs(nq, nk, left=None, right=None, real=None):
    i, j = torch.arange(nq)[:, None] + nk - nq, torch.arange(nk)[None, :]
    keep = torch.ones(nq, nk, dtype=torch.bool) if real is None else real.expand(nq, nk).clone()
    if left is not None:
        keep &= j >= i - left
    if right is not None:
        keep &= j <= i + right
    return keep


def live_tiles(keep, block_q, block_k):
    nq, nk = keep.shape
    rows = [(i, min(i + block_q, nq)) for i in range(0, nq, block_q)]
    columns = [(j, min(j + block_k, nk)) for j in range(0, nk, block_k)]
    return sorted((q, k) for q, k in itertools.product(rows, columns) if keep[slice(*q), slice(*k)].any())


def tiles_of(trace, block_k, kernel=None):
    """Of a tile, rows that no query sees may be left out."""
    found = (trace if kernel is None else trace.only(kernel=kernel)).tiles()
    return sorted((q, (start // block_k * block_k, stop)) for q, (start, stop) in found)


def check_walks(keep, tile, **options):
    """The three kernels that walk tiles, on one head."""
    q, k, v = inputs(*keep.shape)
    tensors = {"q": q, "k": k, "v": v}
    live = live_tiles(keep, *tile)
    with interpreted_tiles(*tile):
        run = lambda: flash_attention(q, k, v, backend="triton", **options)  # noqa: E731
        assert tiles_of(trace_triton(run, tensors), tile[1]) == live, "forward"
        out = run()
        backward = trace_triton(lambda: out.backward(torch.ones_like(out)), tensors)
    for kernel in ("dk_dv_kernel", "dq_kernel"):
        assert tiles_of(backward, tile[1], kernel) == live, kernel


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_windows(window, causal):
    place = WINDOWS.index(window)
    for n, (nq, nk) in enumerate(LENGTHS):
        check_walks(seen_pairs(nq, nk, *limits(causal, window)), TILES[(place + n) % 3], window=window, causal=causal)


PADDINGS = {
    "right": [(0, 20)], "left": [(45, 70)], "both": [(17, 50)], "inside a tile": [(33, 40)], "none": [(0, 70)], "all": [],
    "holes": [(3, 5), (18, 40)],
}  # fmt: skip


@pytest.mark.parametrize("window", [(None, None), (None, 0), (9, 3)], ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding(padding, window):
    """Padding before the first real key and after the last one. (Holes between are loaded, and hidden.)"""
    real = torch.zeros(1, 70, dtype=torch.bool)
    for part in PADDINGS[padding]:
        real[:, slice(*part)] = True
    span = real.clone()
    if real.any():
        span[:, PADDINGS[padding][0][0] : PADDINGS[padding][-1][1]] = True
    place = list(PADDINGS).index(padding)
    keep = seen_pairs(37, 70, *window, span)
    check_walks(keep, TILES[place % 3], window=window, key_padding_mask=real)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_windows_in_plain_pytorch(lengths):
    for (left, right), tile in itertools.product([*WINDOWS, (None, 0), (7, 0)], TILES):
        live = live_tiles(seen_pairs(*lengths, left, right), *tile)
        rules = Rules(0.25, left=left, right=right)
        blocks = {"block_q": tile[0], "block_k": tile[1]}
        q, k, v = (x.detach() for x in inputs(*lengths))
        trace, watched = watch(q=q, k=k, v=v)
        out, lse = tiled_forward(*watched.values(), rules, **blocks)
        assert sorted(trace.tiles()) == live, "forward"
        trace, watched = watch(q=q, k=k, v=v)
        tiled_backward(out, None, *watched.values(), out, lse, rules, **blocks)
        assert sorted(trace.tiles()) == live, "backward"


@pytest.mark.parametrize("window", [None, (9, 0)], ids=str)
def test_packed_sequences_are_walked_one_by_one(window):
    lengths_q, lengths_k = (20, 0, 33, 5), (17, 9, 40, 0)
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (lengths_q, lengths_k))
    q, k = (torch.randn(sum(x), 1, 16, requires_grad=True) for x in (lengths_q, lengths_k))
    v = torch.randn_like(k).requires_grad_()
    tensors, axes = {"q": q, "k": k, "v": v}, {"q": 0, "k": 0, "v": 0}
    live = []
    for b, (nq, nk) in enumerate(zip(lengths_q, lengths_k)):
        own = live_tiles(seen_pairs(nq, nk, *limits(False, window)), 16, 16)
        live += [tuple((x + int(first), y + int(first)) for (x, y), first in zip(tile, (cu_q[b], cu_k[b]))) for tile in own]

    def tiles(trace, kernel):
        """The first row of a tile may be left out where no query sees it."""
        return sorted((q, stop) for q, (_, stop) in trace.only(kernel=kernel).tiles())

    with interpreted_tiles(16, 16):
        run = lambda: flash_attention_varlen(q, k, v, cu_q, cu_k, 33, 40, window=window, backend="triton")  # noqa: E731
        forward = trace_triton(run, tensors, row_axes=axes)
        out = run()
        backward = trace_triton(lambda: out.backward(torch.ones_like(out)), tensors, row_axes=axes)
    for trace, kernel in ((forward, "forward_kernel"), (backward, "dk_dv_kernel"), (backward, "dq_kernel")):
        assert tiles(trace, kernel) == sorted((q, stop) for q, (_, stop) in live), kernel


@pytest.mark.parametrize("rules", [[name] for name in MAKERS] + [EVERY], ids=" and ".join)
def test_no_load_or_store_lies_outside_its_tensor(rules):
    options = make_rules(rules, 2, 1, 20, 37)
    q, k, v = (torch.randn(2, 1, n, 16, requires_grad=True) for n in (20, 37, 37))
    own = {name: x for name, x in options.items() if isinstance(x, torch.Tensor)}
    for name in own:
        if name in ("attn_mask", "sinks") and own[name].is_floating_point():
            options[name] = own[name].requires_grad_()
    tensors = {"q": q, "k": k, "v": v} | own
    with interpreted_tiles(16, 16):
        run = lambda: flash_attention(q, k, v, **options, backend="triton")  # noqa: E731
        forward = trace_triton(run, tensors)
        out = run()
        backward = trace_triton(lambda: out.backward(torch.ones_like(out)), tensors)
    for trace in (forward, backward):
        assert not any(event.outside for event in trace.events if event.name != "?")  # "?": a plan, a seed, a pattern's buffer
    assert set(own) <= set(forward.names), "a rule was never read"
