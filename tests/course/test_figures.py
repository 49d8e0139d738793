"""The traces record what running code did, by count and by place; the pictures show what was recorded."""

import io
import itertools
import math
import pathlib
import re

import matplotlib
import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import flash_edu
from flash_edu import figures, reference
from flash_edu._environment import interpreting
from flash_edu.figures import (
    Trace,
    bars,
    count_traffic,
    error_map,
    largest_allocation,
    loss_curves,
    masks,
    meetings,
    memory_curve,
    peak_memory,
    play_softmax,
    play_tile_walk,
    player,
    product_walk,
    readme,
    roofline,
    softmax_evolution,
    style,
    tile_walk,
    trace_backward,
    trace_file,
    trace_forward,
    trace_triton,
    triton_trace,
    watch,
    weights,
)

KERNELS = pathlib.Path(__file__).with_name("traced_kernels.py")
SHAPES = [(64, 64), (70, 100), (96, 32), (1, 80), (33, 17)]


def random_qkv(nq, nk, heads=1, d=16):
    torch.manual_seed(0)
    return [torch.randn(1, heads, n, d) for n in (nq, nk, nk)]


def live_tiles(nq, nk, block_q, block_k, causal):
    """Every tile with a score that counts, found by looking at each score."""
    keep = reference.causal_mask(nq, nk) if causal else torch.ones(nq, nk, dtype=torch.bool)
    rows = [(i, min(i + block_q, nq)) for i in range(0, nq, block_q)]
    columns = [(j, min(j + block_k, nk)) for j in range(0, nk, block_k)]
    return [(q, k) for q, k in itertools.product(rows, columns) if keep[slice(*q), slice(*k)].any()]


def record(function, tensors, **kwargs):
    """Trace a function of traced_kernels.py: here if kernels are interpreted here, else in a process that does."""
    if not interpreting():
        return trace_file(KERNELS, function, tensors, **kwargs)
    import traced_kernels

    return trace_triton(lambda: getattr(traced_kernels, function)(*tensors.values(), **kwargs), tensors)


# --- watch


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("nq, nk", SHAPES)
def test_tiled_reference_visits_each_live_tile_once(nq, nk, causal):
    q, k, v = random_qkv(nq, nk, heads=2)
    trace, watched = watch(q=q, k=k, v=v)
    out, _ = reference.tiled_forward(**watched, causal=causal, scale=0.25, block_q=16, block_k=32)
    live = live_tiles(nq, nk, 16, 32, causal)
    assert trace.tiles() == live
    row = 2 * 16 * 4  # two heads of 16 fp32 numbers
    assert trace.bytes_loaded("q") == nq * row
    key_rows = sum(stop - start for _, (start, stop) in live)
    assert trace.bytes_loaded("k") == trace.bytes_loaded("v") == key_rows * row
    assert trace.bytes_loaded() == sum(loaded for loaded, _ in trace.bytes_by_tensor().values())
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out, reference.tiled_forward(q, k, v, causal=causal, scale=0.25)[0])


@pytest.mark.parametrize("nq, nk", [(64, 64), (70, 100)])
def test_tiled_backward_walks_keys_outside_and_queries_inside(nq, nk):
    q, k, v = random_qkv(nq, nk)
    out, lse = reference.tiled_forward(q, k, v, causal=True, scale=0.25)
    trace, w = watch(q=q, k=k, v=v)
    options = {"causal": True, "scale": 0.25, "block_q": 16, "block_k": 32}
    reference.tiled_backward(torch.ones_like(out), None, *w.values(), out, lse, **options)
    visited = list(dict.fromkeys(trace.tiles()))
    assert visited == sorted(live_tiles(nq, nk, 16, 32, True), key=lambda tile: (tile[1], tile[0]))


def test_naive_attention_loads_everything_in_one_tile():
    q, k, v = random_qkv(40, 40)
    trace, w = watch(q=q[0, 0], k=k[0, 0], v=v[0, 0])
    torch.softmax(w["q"] @ w["k"].T, -1) @ w["v"]
    assert trace.tiles() == [((0, 40), (0, 40))]
    assert trace.bytes_by_tensor() == {name: (40 * 16 * 4, 0) for name in "qkv"}


@pytest.mark.parametrize(
    "pick, ranges",
    [
        (lambda x: x[:, :, 8:24], [(8, 24)]),
        (lambda x: x[..., 8:24, :4], [(8, 24)]),
        (lambda x: x[0, 1][4:6], [(4, 6)]),
        (lambda x: x[0, 1, 3], [(3, 4)]),
        (lambda x: x[:, :, -5:], [(35, 40)]),
        (lambda x: x[:, :, 0:40], [(0, 40)]),
        (lambda x: x[:, :, torch.tensor([3, 9])], [(3, 10)]),
        (lambda x: x[:, :, torch.arange(40) < 7], [(0, 7)]),
        (lambda x: x.mT[..., 8:24], [(8, 24)]),
        (lambda x: x.flatten(0, 1).unsqueeze(0)[..., 1:2, :], [(1, 2)]),
        (lambda x: x.split(16, dim=2), [(0, 16), (16, 32), (32, 40)]),
        (lambda x: torch.split(x, 16, -2), [(0, 16), (16, 32), (32, 40)]),
        (lambda x: x.chunk(2, dim=-2), [(0, 20), (20, 40)]),
        (lambda x: torch.tensor_split(x, 2, 2), [(0, 20), (20, 40)]),
        (lambda x: x.narrow(2, 5, 10), [(5, 15)]),
        (lambda x: x.select(2, 7), [(7, 8)]),
        (lambda x: x[0, 0].unbind()[:1], [(i, i + 1) for i in range(40)]),
        (lambda x: list(x[0, 0]), [(i, i + 1) for i in range(40)]),
        (lambda x: [plane[0, 0][:5] for plane in x.split(1, dim=1)], [(0, 5), (0, 5)]),
        (lambda x: [plane[:5] for plane in x[0]], [(0, 5), (0, 5)]),
        (lambda x: x.double()[:, :, 1:2], [(1, 2)]),
        (lambda x: x.sum(), [(0, 40)]),
        (lambda x: x + x, [(0, 40)]),
        (lambda x: torch.cat([x, x]), [(0, 40)]),
        (lambda x: (x.shape, len(x), x.dtype, x.device, torch.empty_like(x), x.new_zeros(3)), []),
        (lambda x: x[:, :, 5:5], []),
    ],
)
def test_each_way_to_pick_rows_is_recorded(pick, ranges):
    x = torch.randn(1, 2, 40, 16)
    trace, w = watch(x=x)
    got, want = pick(w["x"]), pick(x)
    assert [(e.kind, e.start, e.stop) for e in trace.events] == [("load", *rows) for rows in ranges]
    if isinstance(want, torch.Tensor):
        assert torch.equal(got, want) and type(got) is torch.Tensor


def test_bytes_count_the_elements_picked_in_the_dtype_of_memory():
    x = torch.zeros(2, 3, 40, 16, dtype=torch.float16)
    trace, w = watch(x=x, lse=torch.zeros(2, 3, 40), y=torch.zeros(9))
    w["x"].float()[:, 1, 8:24, :4], w["lse"][..., 8:24], w["y"][2:]
    assert [e.bytes for e in trace.events] == [2 * 16 * 4 * 2, 2 * 3 * 16 * 4, 7 * 4]
    assert [e.plane for e in trace.events] == [None, None, 0]
    w["x"][1, 2, :3]
    assert trace.events[-1].plane == 5


@pytest.mark.parametrize(
    "write, events",
    [
        (lambda x: x.__setitem__(slice(4, 8), 1.0), [("store", 4, 8)]),
        (lambda x: x[4:8].add_(1), [("load", 4, 8)]),  # a slice is plain: what happens to it is not seen
        (lambda x: x.zero_(), [("store", 0, 20)]),
        (lambda x: x.mul_(2), [("load", 0, 20), ("store", 0, 20)]),
        (lambda x: torch.add(torch.ones(20, 4), 1, out=x), [("store", 0, 20)]),
    ],
)
def test_writes_are_recorded(write, events):
    x = torch.randn(20, 4)
    plain = x.clone()
    trace, w = watch(x=x)
    write(w["x"])
    write(plain)
    assert [(e.kind, e.start, e.stop) for e in trace.events] == events
    assert torch.equal(x, plain)
    assert trace.bytes_stored() == sum((stop - start) * 16 for kind, start, stop in events if kind == "store")


def test_adding_to_rows_loads_and_stores_them():
    trace, w = watch(o=torch.zeros(20, 4))
    w["o"][4:8] += 1
    assert [(e.kind, e.start, e.stop) for e in trace.events] == [("load", 4, 8), ("store", 4, 8)]


def test_a_pick_that_cannot_be_followed_says_so():
    _, w = watch(k=torch.randn(20, 4))
    with pytest.raises(NotImplementedError, match=r"vsplit .* Slice instead: k\[start:stop\]"):
        w["k"].vsplit(2)
    with pytest.raises(TypeError, match="scale"):
        watch(scale=0.5)


def test_gradients_pass_through_a_watched_tensor():
    x = torch.randn(20, 4, requires_grad=True)
    _, w = watch(x=x)
    (w["x"][3:5] * 2).sum().backward()
    assert x.grad.sum() == 16


def test_inner_loop_can_be_named():
    trace, w = watch(q=torch.randn(4, 2), k=torch.randn(4, 2))
    for i, j in itertools.product((0, 2), (0, 2)):
        w["k"][j : j + 2], w["q"][i : i + 2]  # loaded in the order that the rule does not expect
    every = list(itertools.product([(0, 2), (2, 4)], repeat=2))
    assert trace.tiles() == trace.tiles(inner="q") == every
    assert len(trace.tiles(inner="k")) == 3
    with pytest.raises(ValueError, match="inner"):
        trace.tiles(inner="v")


def test_a_trace_survives_json():
    trace = trace_forward(20, 20)
    assert Trace.from_json(trace.to_json()).events == trace.events


# --- traffic


def test_traffic_of_naive_attention_is_the_hand_formula():
    n, d = 96, 16
    q, k, v = torch.randn(3, n, d).unbind()

    def naive(q, k, v):
        s = q @ k.T
        p = (s * 0.25).softmax(-1)
        return p @ v

    traffic = count_traffic(naive, q, k, v)
    small, big = 4 * n * d, 4 * n * n
    assert [(op.read, op.written) for op in traffic.ops] == [
        (2 * small, big), (big, big), (big, big), (big + small, small)
    ]  # fmt: skip
    assert traffic.bytes_read == 3 * small + 3 * big and traffic.bytes_written == 3 * big + small
    assert traffic.flops == 2 * 2 * n * n * d
    assert traffic.intensity == traffic.flops / traffic.bytes
    assert traffic.largest[:3] == (n * n, big, (n, n))
    assert torch.equal(traffic.result, naive(q, k, v))


def test_traffic_of_a_fused_operator_is_its_inputs_and_outputs():
    q, k, v = random_qkv(64, 64)
    traffic = count_traffic(flash_edu.flash_attention, q, k, v, backend="torch")
    assert traffic.bytes_read == 3 * 64 * 16 * 4
    assert traffic.bytes_written == 64 * 16 * 4 + 64 * 4  # out and lse


@pytest.mark.parametrize(
    "fn, read, written",
    [
        (lambda x: x.view(-1).T if x.dim() == 1 else x.mT[1:], 0, 0),
        (lambda x: x.add_(1), 400, 400),
        (lambda x: x.zero_(), 0, 400),
        (lambda x: x.copy_(torch.ones(10, 10)), 400, 800),
        (lambda x: torch.empty(5), 0, 0),
        (lambda x: torch.zeros(5), 0, 20),
        (lambda x: x[:1].expand(10, 10) + x, 440, 400),
        (lambda x: x * x, 400, 400),
        (lambda x: torch.add(x, 1, out=x), 400, 400),
    ],
)
def test_traffic_of_single_operations(fn, read, written):
    traffic = count_traffic(fn, torch.ones(10, 10))
    assert (traffic.bytes_read, traffic.bytes_written) == (read, written)


def test_largest_allocation_tells_naive_from_tiled():
    q, k, v = random_qkv(128, 128)
    assert largest_allocation(reference.naive_attention, q, k, v).shape[-2:] == (128, 128)
    options = {"causal": False, "scale": 1.0, "block_q": 16, "block_k": 16}
    tiled = largest_allocation(reference.tiled_forward, q, k, v, **options)
    assert tiled.elements == 128 * 16  # the output itself
    assert largest_allocation(lambda: q.mT).elements == 0


def test_peak_memory_is_the_hand_formula(capfd):
    q, k, v = torch.randn(3, 128, 16).unbind()

    def naive():
        s = q @ k.T
        p = s.softmax(-1)
        return p @ v

    device = 0 if not torch.cuda.is_available() else torch.cuda.memory_allocated()
    assert peak_memory(naive) == 2 * 4 * 128 * 128 + 4 * 128 * 16
    q.requires_grad_()
    loss = naive().sum()
    assert peak_memory(loss.backward) > 0  # frees memory that is older than the measurement
    assert capfd.readouterr().err == ""
    assert not device or torch.cuda.memory_allocated() == device


# --- Triton


def test_a_kernels_loads_and_stores_are_recorded():
    q, k = torch.randn(40, 16), torch.randn(70, 16)
    trace = record("scores", {"q": q, "k": k})
    assert trace.kernels == ["scores_kernel"] and trace.names == ["q", "k", "s"]
    assert trace.programs == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    assert trace.tiles() == live_tiles(40, 70, 16, 16, False)
    assert trace.bytes_loaded("q") == 40 * 16 * 4
    assert trace.bytes_loaded("k") == 3 * 70 * 16 * 4
    assert trace.bytes_stored("s") == trace.bytes_stored() == 40 * 70 * 4
    assert all(e.outside == 0 for e in trace.events)
    last = trace.only(program=(2, 0, 0))
    assert [(e.start, e.stop) for e in last.only(name="q").events] == [(32, 40)]
    assert set(trace.walks()) == {("scores_kernel", (i, 0, 0)) for i in range(3)}


def test_a_forgotten_mask_shows_as_bytes_outside():
    buffer = torch.randn(64, 16)
    trace = record("scores_of_a_short_view", {"buffer": buffer}, rows=20)
    assert sum(e.outside for e in trace.events) == 0  # it all lies in the buffer
    if interpreting():
        import traced_kernels

        views = {"q": buffer[32:48], "k": buffer[:20]}
        trace = trace_triton(lambda: traced_kernels.scores(*views.values(), masked=False), views)
        assert [e.outside for e in trace.only(name="k").events] == [0, 12 * 16 * 4]  # k has 20 rows
        assert trace.bytes_loaded("k") == 20 * 16 * 4


def test_rows_are_told_apart_in_any_layout():
    packed = torch.randn(1, 40, 3, 2, 16)  # (B, N, 3, H, D), as one linear layer gives Q, K and V
    q, k, v = (packed[:, :, i].transpose(1, 2) for i in range(3))
    trace = trace_triton(lambda: _sum_of_keys(q, k, v), {"q": q, "k": k, "v": v}) if interpreting() else None
    trace = trace or record("sum_of_keys", {"q": q, "k": k, "v": v})
    assert trace.names == ["k", "out"]
    assert [(e.start, e.stop, e.plane) for e in trace.only(name="k").events] == [
        (start, min(start + 16, 40), head) for start in (0, 16, 32) for head in (0, 1)
    ]
    assert trace.bytes_by_tensor()["k"] == (k.numel() * 4, 0)
    assert trace.bytes_by_tensor()["out"] == (6 * 4, 6 * 4)  # an atomic addition reads and writes


def _sum_of_keys(q, k, v):
    import traced_kernels

    return traced_kernels.sum_of_keys(q, k, v)


def test_tensor_descriptors_are_recorded():
    trace = record("copy_by_descriptors", {"src": torch.randn(40, 16)})
    assert [(e.kind, e.name, e.start, e.stop) for e in trace.events] == [
        (kind, name, start, min(start + 16, 40))
        for start in (0, 16, 32) for kind, name in (("load", "src"), ("store", "dst"))
    ]  # fmt: skip
    assert trace.bytes_loaded() == trace.bytes_stored() == 40 * 16 * 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("nq, nk", SHAPES)
def test_the_packages_forward_visits_each_live_tile_once(nq, nk, causal):
    trace = trace_forward(nq, nk, causal=causal, block_q=16, block_k=32)
    live = live_tiles(nq, nk, 16, 32, causal)
    assert sorted(trace.tiles()) == live
    row = 16 * 4
    assert trace.bytes_loaded("q") == trace.bytes_stored("o") == nq * row
    key_rows = sum(stop - start for _, (start, stop) in live)
    assert trace.bytes_loaded("k") == trace.bytes_loaded("v") == key_rows * row
    assert trace.bytes_stored("lse") == nq * 4
    assert trace.bytes_stored() == nq * (row + 4)  # nothing else is written
    for walk in trace.walks().values():
        assert len({q_rows for q_rows, _ in walk}) == 1  # a program has one tile of queries
        assert walk == sorted(walk)


def test_a_window_of_the_packages_forward_loads_no_tile_outside():
    trace = trace_forward(100, 100, causal=True, window=(20, 0), block_q=16, block_k=16)
    live = {(i // 16, j // 16) for i in range(100) for j in range(max(0, i - 20), i + 1)}
    assert sorted((q // 16, k // 16) for (q, _), (k, _) in trace.tiles()) == sorted(live)


def test_numbers_below_narrow_masks_have_room():
    mask, tiles = torch.ones(512, 512, dtype=torch.bool), [((q, q + 64), (k, k + 64)) for q in range(0, 512, 64) for k in range(0, 512, 64)]
    for count, most in ((1, 9), (3, 5)):
        fig = masks({str(n): (mask, tiles) for n in range(count)})
        ticks = fig.axes[0].get_xticks()
        assert 3 <= len(ticks) <= most and ticks[0] == 0 and ticks[-1] == 512


@pytest.mark.parametrize("nq, nk", [(64, 64), (33, 50)])
def test_the_packages_backward_visits_each_live_tile_once_a_pass(nq, nk):
    trace = trace_backward(nq, nk, causal=True, heads=2, kv_heads=1)
    live = live_tiles(nq, nk, 16, 16, True)
    assert len(trace.kernels) == 3
    for kernel in trace.kernels[1:]:
        assert sorted(trace.only(kernel=kernel).tiles()) == sorted(2 * live)  # two query heads
    key_owners = trace.only(kernel=trace.kernels[1]).walks().values()
    assert all(len({k_rows for _, k_rows in walk}) == 1 for walk in key_owners)
    assert trace.bytes_stored("dq") == 2 * nq * 16 * 4
    assert trace.bytes_stored("dk") == trace.bytes_stored("dv") == nk * 16 * 4


def test_a_compiling_process_gets_the_same_trace(monkeypatch):
    here = trace_forward(40, 40, causal=True)
    monkeypatch.setattr(triton_trace, "interpreting", lambda: False)  # as on a GPU
    assert trace_forward(40, 40, causal=True).events == here.events
    with pytest.raises(RuntimeError, match="trace_file"):
        trace_triton(lambda: None, {})


def test_a_file_is_traced_as_it_is_saved(tmp_path):
    """Its relative imports work, and its errors come back."""
    package = tmp_path / "answers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "earlier.py").write_text(KERNELS.read_text())
    answer = package / "answer.py"
    answer.write_text("from . import earlier\n\ndef run(q, k, block):\n    earlier.scores(q, k, block)\n")
    tensors = {"q": torch.randn(20, 16), "k": torch.randn(20, 16)}
    trace = trace_file(answer, "run", tensors, block=16)
    assert trace.tiles() == live_tiles(20, 20, 16, 16, False)
    answer.write_text("def run(q, k):\n    raise NotImplementedError('7.1 is not written yet')\n")
    with pytest.raises(RuntimeError, match="failed: NotImplementedError: 7.1 is not written yet"):
        trace_file(answer, "run", tensors)
    with pytest.raises(FileNotFoundError):
        trace_file(package / "missing.py", "run", tensors)


def test_rows_of_a_traced_file_are_on_the_axis_that_is_named(tmp_path):
    """(total, heads, dim): a row is a token."""
    answer = tmp_path / "answer.py"
    answer.write_text(KERNELS.read_text() + "\n\ndef run(q, k):\n    scores(q[:, 0], k[:, 0], 16)\n")
    tensors = {"q": torch.randn(20, 1, 16), "k": torch.randn(40, 1, 16)}
    trace = trace_file(answer, "run", tensors, row_axes={"q": 0, "k": 0})
    assert trace.tiles() == live_tiles(20, 40, 16, 16, False)
    assert trace_file(answer, "run", tensors).tiles() != trace.tiles()


# --- pictures


def patches(ax, gid):
    return [p for p in ax.patches if p.get_gid() == gid]


def lines(ax, gid):
    return [line for line in ax.lines if line.get_gid() == gid]


def texts(ax):
    return [t.get_text() for t in ax.texts]


def softmax_history(scores, block):
    m, l, history = -math.inf, 0.0, []
    for piece in scores.split(block):
        m_new = max(m, piece.max().item())
        l = l * math.exp(m - m_new) + (piece - m_new).exp().sum().item()
        m = m_new
        history.append({"scores": piece, "m": m, "l": l, "o": torch.tensor([m, l])})
    return history


def test_tile_walk_shows_each_tile_once_in_order():
    q, k, v = random_qkv(64, 64)
    trace, w = watch(q=q, k=k, v=v)
    reference.tiled_forward(**w, causal=True, scale=1.0, block_q=16, block_k=16)
    fig = tile_walk(trace, 64, 64, causal=True)
    (ax,) = fig.axes
    assert len(patches(ax, "visited")) == 10 and len(patches(ax, "skipped")) == 6
    assert texts(ax) == [str(i) for i in range(1, 11)]
    assert [t.get_text() for t in fig.texts] == ["10 of 16 tiles visited"]
    (edge,) = lines(ax, "causal")
    assert edge.get_xydata().tolist() == [[0, 0], [64, 64]]
    assert ax.get_ylim() == (64, 0)


def test_tile_walk_of_a_kernel_counts_for_each_program():
    fig = tile_walk(trace_forward(32, 48, causal=True, heads=2), 32, 48, causal=True)
    (ax,) = fig.axes
    assert texts(ax) == ["1", "2", "3", "1", "2"]  # the first head, the lower tile of queries first
    assert len({p.get_facecolor() for p in patches(ax, "visited")}) == 2
    assert lines(ax, "causal")[0].get_xydata().tolist() == [[16, 0], [48, 32]]
    legend = [t.get_text() for t in ax.get_legend().get_texts()]
    assert legend == ["program 0: 3 tiles", "program 1: 2 tiles", "never loaded", "edge of the causal mask"]


def test_tile_walk_shows_a_tile_visited_twice_and_one_never_reached():
    first, other = ((0, 16), (0, 16)), ((16, 32), (16, 20))
    (ax,) = tile_walk([first, other, first], 32, 20).axes
    assert texts(ax) == ["1,3", "2"]
    assert len(patches(ax, "skipped")) == 2


def test_tile_walk_wants_one_kernel():
    trace = trace_backward(32, 32)
    with pytest.raises(ValueError, match=r"trace.only\(kernel='dk_dv_kernel'\)"):
        tile_walk(trace, 32, 32)
    assert tile_walk(trace.only(kernel="dk_dv_kernel"), 32, 32)


def test_softmax_evolution_ends_in_the_softmax():
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0])
    fig = softmax_evolution(softmax_history(scores, 2))
    axes = {ax.get_title("left").split(",")[0].split(":")[0]: ax for ax in fig.axes}
    m, l, w, o = (axes[name] for name in ("m", "l", "weights", "O"))
    assert list(m.patches[-1].get_data().values) == [3, 5]
    assert texts(l) == ["1.14", "1.2"]
    assert texts(w)[-4:] == [f"{x:.2f}" for x in scores.softmax(0)]
    assert len(patches(w, "unseen")) == 1
    assert len(o.get_lines()) == 4
    without_o = [{name: step[name] for name in ("scores", "m", "l")} for step in softmax_history(scores, 1)]
    assert len(softmax_evolution(without_o).axes) == 3


def test_memory_curve_draws_the_measured_points():
    lengths = [64, 128, 256]
    curves = {"naive": (lengths, [4 * n * n for n in lengths]), "flash": (lengths, [10 * n for n in lengths])}
    (ax,) = memory_curve(curves).axes
    assert ax.get_xscale() == ax.get_yscale() == "log"
    drawn = {line.get_label(): line.get_xydata().T.tolist() for line in ax.lines}
    assert all(drawn[name] == [list(ns), list(nbytes)] for name, (ns, nbytes) in curves.items())
    assert lines(ax, "slope 2")[0].get_ydata().tolist() == [4 * 64**2, 4 * 256**2]
    np.testing.assert_allclose(lines(ax, "slope 1")[0].get_ydata(), [640, 2560])
    assert any("KiB" in t.get_text() for t in ax.get_yticklabels())


def test_bars_have_their_numbers():
    (ax,) = bars({"naive": 3 * 2**20, "flash": 1536}, "B", title="bytes").axes
    assert texts(ax) == ["3 MiB", "1.5 KiB"]
    assert [p.get_width() for p in ax.patches] == [3 * 2**20, 1536]
    (ax,) = bars({"a": 1.234, "b": 12345}, "ms", log=True).axes
    assert texts(ax) == ["1.23 ms", "12,345 ms"] and ax.get_xlabel() == "ms"


def test_weights_writes_each_number_and_marks_masked_cells():
    s = torch.tensor([[1.0, -math.inf], [0.25, 0.75]])
    (ax,) = weights(s, ["a", "b"]).axes
    assert texts(ax) == ["1.00", "masked", "0.25", "0.75"]
    assert len(patches(ax, "masked")) == 1
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b"]
    with pytest.raises(ValueError, match="choose a head"):
        weights(torch.zeros(1, 1, 2, 2))


def test_masks_show_every_weight_and_the_tiles_in_order():
    keep = torch.tensor([[True, False, True, True], [False, False, True, False]])
    halves = [((0, 2), (0, 2)), ((0, 2), (2, 4))]
    fig = masks({"a": (keep, halves), "b": (~keep, halves[::-1])}, title="Kept")
    for ax, mask, order in zip(fig.axes, (keep, ~keep), (halves, halves[::-1])):
        assert ax.images[0].get_array().tolist() == mask.tolist()
        tiles = [(p.get_y(), p.get_x(), p.get_height(), p.get_width()) for p in patches(ax, "tile")]
        assert tiles == [(q0, k0, q1 - q0, k1 - k0) for (q0, q1), (k0, k1) in order]
        assert texts(ax) == ["1", "2"]
    trace, watched = watch(q=torch.ones(4, 8), k=torch.ones(6, 8))
    for i in (0, 2):
        rows, keys = watched["q"][i : i + 2], watched["k"][0:6]
        assert rows.shape == (2, 8) and keys.shape == (6, 8)
    (ax,) = masks({"a trace": (torch.ones(4, 6, dtype=torch.bool), trace)}).axes
    assert len(patches(ax, "tile")) == 2
    with pytest.raises(ValueError, match="bool matrices; a is float32 of shape"):
        masks({"a": (torch.ones(2, 2), halves)})
    with pytest.raises(ValueError, match="at least one"):
        masks({})


def test_loss_curves_have_a_baseline():
    histories = {"a": [3.0, 2.0], "b": [(10, 2.5), (20, 1.0)]}
    (ax,) = loss_curves(histories, baseline=("guessing", math.log(10))).axes
    assert ax.lines[0].get_xydata().tolist() == [[1, 3], [2, 2]]
    assert ax.lines[1].get_xydata().tolist() == [[10, 2.5], [20, 1]]
    assert lines(ax, "baseline")[0].get_ydata() == [math.log(10)] * 2
    assert texts(ax) == ["guessing: 2.3"]


def test_roofline_tells_measured_points_from_modelled_ones():
    points = {"scale": (2e9, 8e9, 4.0), "fused": (8e11, 2e9, None), "copy": (1e9, 8e9, None)}
    (ax,) = roofline(points, peak=1e12, bandwidth=1e10, title="A machine").axes
    (roof,), (measured,), modelled = (lines(ax, gid) for gid in ("roof", "measured", "modelled"))
    assert measured.get_xydata().tolist() == [[0.25, 0.5e9]]  # flops / bytes, flops / seconds
    assert [line.get_xydata().tolist() for line in modelled] == [[[400, 1e12]], [[0.125, 1.25e9]]]  # on the roof
    assert roof.get_xydata()[1].tolist() == [100, 1e12] and roof.get_ydata()[2] == 1e12
    assert roof.get_ydata()[0] == roof.get_xdata()[0] * 1e10
    assert lines(ax, "ridge")[0].get_xdata() == [100, 100] and texts(ax) == ["ridge: 100"]
    assert measured.get_markerfacecolor() == measured.get_color()
    assert all(line.get_markerfacecolor() == "white" for line in modelled)
    said = [text.get_text() for text in ax.get_legend().get_texts()]
    assert said == ["scale (measured)", "fused (model)", "copy (model)"]
    for inside in (*points.values(), (1e9, 1e9, 1e-6)):  # faster than the roof, as with a cache: still in the picture
        (ax,) = roofline({"x": inside}, peak=1e12, bandwidth=1e10).axes
        (point,) = lines(ax, "measured") + lines(ax, "modelled")
        for value, (low, high) in zip(point.get_xydata()[0], (ax.get_xlim(), ax.get_ylim())):
            assert low < value < high


@pytest.mark.parametrize("point", [(0, 8, 1.0), (8, 0, None), (8, 8, 0.0)])
def test_roofline_refuses_what_has_no_place_on_it(point):
    with pytest.raises(ValueError, match="copy: flops, bytes and seconds must be above 0"):
        roofline({"copy": point}, peak=1.0, bandwidth=1.0)


def test_error_map_finds_the_row_and_the_tail():
    want = torch.zeros(1, 2, 40, 8)
    got = want + 1e-6
    got[0, 1, 37, 3] = 0.5
    ax = error_map(got, want, tile=16).axes[0]
    assert ax.get_title("left") == "largest error 5.0e-01, row 37, column 3 (batch 0, head 1)"
    assert ax.images[0].get_array()[37, 3] == 0.5
    assert list(lines(ax, "tail")[0].get_ydata()) == [31.5, 39.5] and texts(ax) == ["tail:\nrows 32-39"]
    got[0, 0, 5, :2] = math.nan
    ax = error_map(got, want).axes[0]
    assert ax.get_title("left") == "2 of 320 numbers are not finite, first in row 5 (batch 0, head 0)"
    assert len(patches(ax, "not finite")) == 2
    assert error_map(want, want).axes[0].get_title("left") == "equal in every number"
    nothing = torch.full((2, 3, 40), -math.inf)  # as LSE of rows that attend to nothing
    assert error_map(nothing, nothing).axes[0].get_title("left") == "equal in every number"
    with pytest.raises(ValueError, match="one shape"):
        error_map(got, want[0])


def noisy_losses():
    return (4.2 * torch.exp(-torch.arange(300) / 90) + 0.05 * torch.randn(300)).tolist()


def product_traces(m=40, n=56, k=32):
    tensors = {"a": torch.randn(m, k), "b": torch.randn(k, n)}
    return [trace_file(KERNELS, "product", tensors, row_axes=dict.fromkeys("abc", axis)) for axis in (0, 1)]


def test_product_walk_shows_the_tiles_of_each_program():
    traces = product_traces()
    fig = product_walk(*traces, 40, 56, 32, programs=[(0, 3), (2, 3), (2, 0)])
    a, b, c = (next(ax for ax in fig.axes if ax.get_title("left").startswith(name)) for name in "ABC")
    touched = [[p for p in ax.patches if p.get_gid() == "touched"] for ax in (a, b, c)]
    assert [len(patches) for patches in touched] == [6, 6, 3]
    stored = {(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in touched[2]}
    assert stored == {(48, 0, 8, 16), (48, 32, 8, 8), (0, 32, 16, 8)}
    halves = {(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in touched[1] if p.get_x() >= 48}
    assert halves == {(48, 0, 4, 16), (52, 0, 4, 16), (48, 16, 4, 16), (52, 16, 4, 16)}
    assert sorted(text.get_text() for text in a.texts) == ["1"] * 3 + ["2"] * 3 and not c.texts
    every = product_walk(*traces, 40, 56, 32)
    assert sum(p.get_gid() == "touched" for ax in every.axes for p in ax.patches) == 12 * (2 + 2 + 1)


def test_product_walk_wants_two_traces_of_one_call():
    by_row, other = product_traces()[0], product_traces(m=32, n=40)[1]
    with pytest.raises(ValueError, match="same call|shorter|longer"):
        product_walk(by_row, other, 40, 56, 32)


@pytest.mark.parametrize("step, met", [(0, 8), (2, 4), (4, 0)])
def test_meetings_frames_what_two_programs_touch(step, met):
    trace = trace_file(KERNELS, "shared_sum", {"x": torch.ones(2, 4)}, step=step)
    fig = meetings(trace, "out")
    gids = [patch.get_gid() for patch in fig.axes[0].patches]
    assert gids.count("met") == met and gids.count("own") == 8 - gids.count("met")
    assert fig.axes[0].get_title("left").startswith("Programs meet in" if met else "No two programs meet")


def test_meetings_wants_a_tensor_that_was_touched():
    with pytest.raises(ValueError, match="no program touches 'y'"):
        meetings(trace_file(KERNELS, "shared_sum", {"x": torch.ones(2, 4)}, step=4), "y")


PICTURES = {
    "product_walk": lambda: product_walk(*product_traces(), 40, 56, 32, programs=[(0, 0), (1, 0)]),
    "meetings": lambda: meetings(trace_file(KERNELS, "shared_sum", {"x": torch.ones(4, 4)}, step=2), "out"),
    "tile_walk": lambda: tile_walk(trace_forward(112, 128, causal=True, block_k=32), 112, 128, causal=True),
    "softmax_evolution": lambda: softmax_evolution(softmax_history(torch.randn(64), 8), title="A row"),
    "memory_curve": lambda: memory_curve(
        {"naive": ([64, 128], [1e5, 4e5]), "flash": ([64, 128], [1e4, 2e4])}
    ),
    "bars": lambda: bars({"naive": 1e9, "flash": 1e6}, "B"),
    "weights": lambda: weights(torch.randn(24, 24).softmax(-1)),
    "masks": lambda: masks(
        {name: (torch.rand(32, 32) < 0.7, trace_forward(32, 32, block_q=32)) for name in "abc"}, title="Three masks"
    ),
    "loss_curves": lambda: loss_curves(
        {"a": noisy_losses(), "b": noisy_losses()}, baseline=("guessing", 4.2)
    ),
    "roofline": lambda: roofline(
        {"naive": (1e9, 1e8, 0.1), "fused": (1e9, 1e6, None)}, peak=1e11, bandwidth=1e10, title="A roof"
    ),
    "error_map": lambda: error_map(torch.randn(100, 64), torch.randn(100, 64), tile=32),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_small_and_white_whatever_the_readers_style(name):
    torch.manual_seed(0)
    with matplotlib.style.context("dark_background"):
        before = matplotlib.rcParams.copy()
        fig = PICTURES[name]()
        png, _ = fig._repr_png_()
        # All but the backend: asking for it chooses one.
        assert all(matplotlib.rcParams[key] == before[key] for key in before if key != "backend")
    assert len(png) < 40 * 1024
    saved = io.BytesIO()
    fig.savefig(saved, format="png")
    assert len(saved.getvalue()) < 60 * 1024
    image = np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float)
    assert 280 <= image.shape[1] <= 760 and 100 <= image.shape[0] <= 440
    frame = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (frame > 250).all(), "something is cut off at the edge"
    assert image.min() < 90, "no dark text"


SCORES = torch.tensor([1.0, 3.0, 2.0, 5.0])
WALK = [((0, 4), (0, 4)), ((4, 8), (0, 4)), ((4, 8), (4, 8))]


@pytest.mark.parametrize(
    "draw, said",
    [
        (
            lambda: tile_walk(WALK, 8, 8, causal=True, title="A walk"),
            "A walk. A causal score matrix of 8 queries and 8 keys: 3 of 4 tiles visited, 1 never loaded."
            " First queries 0-3 with keys 0-3, last queries 4-7 with keys 4-7.",
        ),
        (
            lambda: roofline({"naive": (1e9, 1e8, 0.1), "fused": (1e9, 1e6, None)}, peak=1e11, bandwidth=1e10),
            "A roofline of 100 G flops per second, with its ridge at 10 flops per byte:"
            " naive, measured, 10 G at 10 flops per byte; fused, a model, 100 G at 1e+03 flops per byte.",
        ),
        (
            lambda: product_walk(*product_traces(), 40, 56, 32, programs=[(2, 3)]),
            "A is 40 x 32, B 32 x 56, C 40 x 56. Program (2, 3) loads 2 tiles of A and 2 tiles of B and stores"
            " rows 32-39, columns 48-55 of C.",
        ),
        (
            lambda: meetings(trace_file(KERNELS, "shared_sum", {"x": torch.ones(2, 4)}, step=3), "out"),
            "Programs meet in 1 of 7 places of out. Program 0 touches places 0-3. Program 1 touches places 3-6.",
        ),
        (
            lambda: tile_walk([((0, 4), (0, 1))], 4, 1),
            "A score matrix of 4 queries and 1 key: 1 of 1 tile visited."
            " First queries 0-3 with key 0, last queries 0-3 with key 0.",
        ),
        (
            lambda: tile_walk(trace_forward(32, 32, causal=True), 32, 32, causal=True),
            "A causal score matrix of 32 queries and 32 keys: 3 of 4 tiles visited, 1 never loaded."
            " 2 programs visit 2 and 1 tiles.",
        ),
        (
            lambda: softmax_evolution(softmax_history(SCORES, 2)),
            "A softmax over 4 scores in 2 blocks: after block 2, m = 5, l = 1.2, weights [0.02, 0.11, 0.04, 0.83],"
            " O [5.00, 1.20]. m went 3, 5; l went 1.14, 1.2.",
        ),
        (
            lambda: memory_curve({"a": ([64, 128, 2048], [2**20, 2**21, 2**30]), "b": ([64], [10])}, ylabel="kept"),
            "Kept against sequence length: a, 1 MiB at 64 to 1 GiB at 2,048; b, 10 B at 64 to 10 B at 64.",
        ),
        (lambda: bars({"a": 2**20, "b": 512}, "B", title="Moved"), "Moved. Bars: a 1 MiB and b 512 B."),
        (lambda: bars({"a": 2.0}, "ms"), "Bars: a 2 ms."),
        (
            lambda: weights(torch.tensor([[1.0, -torch.inf], [0.25, 0.75]]), ["the", "cat"], title="P"),
            "P. A matrix of 2 rows (queries) and 2 columns (keys). Row 0 (the): 1.00, masked. Row 1 (cat): 0.25, 0.75.",
        ),
        (
            lambda: weights(torch.eye(9)[:2]),
            "A matrix of 2 rows (queries) and 9 columns (keys)."
            " Row 0: largest 1.00, at key 0. Row 1: largest 1.00, at key 1.",
        ),
        (
            lambda: masks({n: (torch.eye(4)[:2] > 0, [((0, 2), (0, 2)), ((0, 2), (2, 4))]) for n in ("one", "two")}, title="M"),
            "M. one: 2 queries and 4 keys, 2 of 8 are kept, in 2 tiles of 2 x 2, queries 0-1 with keys 0-1 first."
            " two: 2 queries and 4 keys, 2 of 8 are kept, in 2 tiles of 2 x 2, queries 0-1 with keys 0-1 first."
            " two and one are equal.",
        ),
        (
            lambda: masks({n: (torch.arange(4).view(2, 2) < i, [((0, 2), (0, 2))]) for i, n in enumerate(("a", "b"), 2)}),
            "a: 2 queries and 2 keys, 2 of 4 are kept, in 1 tile of 2 x 2, queries 0-1 with keys 0-1 first."
            " b: 2 queries and 2 keys, 3 of 4 are kept, in 1 tile of 2 x 2, queries 0-1 with keys 0-1 first."
            " b and a differ in 1 place.",
        ),
        (lambda: loss_curves({"a": [0.5, 0.7]}, ylabel="kept", xlabel="row"), "Kept against row: a, 0.5 at row 1 to 0.7 at row 2."),
        (
            lambda: loss_curves({"a": [4.0, 3.0], "b": [(10, 2.0), (20, 1.5)]}, baseline=("pairs", 2.5)),
            "Loss (nats) against step: a, 4 at step 1 to 3 at step 2; b, 2 at step 10 to 1.5 at step 20; pairs is 2.5.",
        ),
        (
            lambda: error_map(torch.eye(5), torch.zeros(5, 5), tile=2),
            "The error of 5 rows with 5 numbers each: largest error 1.0e+00, row 0, column 0. The tail has 1 row.",
        ),
    ],
)
def test_a_picture_says_what_it_shows(draw, said):
    fig = draw()
    assert fig.description == said
    _, metadata = fig._repr_png_()
    assert metadata == {"alt": said} and repr(fig) == said


def test_a_picture_of_another_kind_says_what_can_be_read_off_it():
    fig = style.picture()
    ax = fig.subplots()
    assert repr(fig) == "A picture without a title."
    ax.plot([1, 2], label="a line")
    ax.set_title("Speed?", loc="left")
    ax.set(xlabel="N", ylabel="ms")
    fig.suptitle("All of it")
    assert repr(fig) == "All of it. Speed?: ms, N: a line."


@pytest.mark.parametrize("name", PICTURES)
def test_the_words_for_a_picture_are_short(name):
    torch.manual_seed(0)
    fig = PICTURES[name]()
    assert fig.description and len(fig.description) < 1000 and "\n" not in fig.description


def test_a_notebook_shows_a_picture_once():
    """As a cell's result, before and after pyplot is used; and recording alone does not import matplotlib."""
    cells = [
        "import sys\nfrom flash_edu.figures import watch\nassert 'matplotlib' not in sys.modules",
        "from flash_edu.figures import bars\nbars({'a': 1.0}, 'ms')",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "fig = bars({'a': 1.0}, 'ms')\nfig",
        "fig = bars({'a': 1.0}, 'ms')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    images = [sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in notebook.cells]
    assert images == [0, 1, 1, 1, 0]
    assert all(len(cell.outputs) == shown for cell, shown in zip(notebook.cells, images))  # and no stderr
    before, after = (notebook.cells[number].outputs[0] for number in (1, 3))
    for output in (before, after):
        assert output.data["text/plain"] == "Bars: a 1 ms."
        assert output.metadata == {"image/png": {"alt": "Bars: a 1 ms."}}
    assert after.data == before.data  # pyplot's own way to show figures would be larger


def stacked(frames):
    """The pictures that a player shows: each frame laid over those before it."""
    seen = Image.open(io.BytesIO(frames[0])).convert("RGBA")
    yield np.asarray(seen.convert("RGB"), dtype=int)
    for frame in frames[1:]:
        seen.alpha_composite(Image.open(io.BytesIO(frame)).convert("RGBA"))
        yield np.asarray(seen.convert("RGB"), dtype=int)


def pixels(fig):
    return np.asarray(Image.open(io.BytesIO(fig.png(fig.dpi))).convert("RGB"), dtype=int)


PLAYERS = {
    "walk": (lambda: play_tile_walk(WALK, 8, 8, causal=True), 1 + 3 + 1),
    "programs": (lambda: play_tile_walk(trace_forward(64, 64, causal=True), 64, 64, causal=True), 1 + 4 + 1),
    "softmax": (lambda: play_softmax(softmax_history(SCORES, 1), title="A row"), 4),
    "long": (lambda: play_softmax(softmax_history(torch.arange(32.0).cos(), 4)), 8),
}


@pytest.mark.parametrize("name", PLAYERS)
def test_a_player_ends_in_its_picture_and_is_small(name):
    play, steps = PLAYERS[name]
    playing = play()
    seen = list(stacked(playing.frames))
    assert len(seen) == len(playing.words) == steps
    with matplotlib.style.context("dark_background"):
        end = pixels(playing.picture)
    assert abs(seen[-1] - end).max() <= 32  # 256 colours are shared by all frames
    assert all((before != now).any() for before, now in itertools.pairwise(seen))
    assert len(playing.html()) < 2**16 and all(len(frame) < 5 * 1024 for frame in playing.frames[1:])
    assert playing.html() == play().html()


def test_a_player_of_a_walk_adds_one_tile_after_the_other():
    picture = tile_walk([((0, 4), (0, 4)), ((0, 4), (4, 8)), ((0, 4), (0, 4))], 4, 8)
    playing = play_tile_walk([((0, 4), (0, 4)), ((0, 4), (4, 8)), ((0, 4), (0, 4))], 4, 8)
    assert playing.words == [
        "Nothing is loaded yet.",
        "Step 1: queries 0-3 with keys 0-3.",
        "Step 2: queries 0-3 with keys 4-7.",
        "Step 3: queries 0-3 with keys 0-3.",
        str(picture),
    ]
    assert [t.get_text() for t in playing.picture.axes[0].texts] == [t.get_text() for t in picture.axes[0].texts]
    end = pixels(picture)
    assert abs(end - pixels(playing.picture)).max() == 0
    ax = picture.axes[0]
    rows = [int(ax.transData.transform((x, 1))[0]) for x in (1, 5)]  # in a corner of each tile
    line = end.shape[0] - int(ax.transData.transform((1, 0.5))[1])
    coloured = [[bool((frame[line, x] != 255).any()) for x in rows] for frame in stacked(playing.frames)]
    assert coloured == [[False, False], [True, False], [True, True], [True, True], [True, True]]


def test_a_player_of_a_softmax_shows_the_blocks_so_far():
    playing = play_softmax(softmax_history(SCORES, 2))
    assert playing.words[0] == "After block 1, m = 3, l = 1.14, weights [0.12, 0.88], O [3.00, 1.14]."
    first, last = stacked(playing.frames)
    assert (first != last).any()
    same = play_softmax(softmax_history(SCORES, 2)).picture
    assert abs(pixels(same) - pixels(softmax_evolution(softmax_history(SCORES, 2)))).max() == 0


def test_a_player_of_any_figure():
    fig = style.picture()
    (line,) = fig.subplots().plot([0, 1, 2], [0, 1, 4])

    def steps():
        for n in (1, 2, 3):
            line.set_data([0, 1, 2][:n], [0, 1, 4][:n])
            yield f"</script> {n}"

    playing = player(steps(), fig)
    assert len(playing.frames) == 3
    assert playing.html().count("</script>") == 1 and "https" not in playing.html()
    with pytest.raises(ValueError, match="at least one step"):
        player(iter([]), fig)


def test_a_player_is_a_still_picture_and_a_script_and_nothing_else():
    """Where scripts are removed, as on GitHub, the second output is empty and the first one stays."""
    code = "from flash_edu.figures import play_tile_walk\nplay_tile_walk([((0, 4), (0, 4))], 4, 4)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    still, script = notebook.cells[0].outputs
    assert set(still.data) == {"image/png", "text/plain"} and still.metadata["image/png"]["alt"]
    assert set(script.data) == {"text/html", "text/plain"}
    html = script.data["text/html"]
    assert re.fullmatch(r"<script>.*</script>", html, re.DOTALL) and html.count("script>") == 2


def test_the_readmes_picture_is_measured():
    curves, _ = readme.measure_memory([64, 256])
    naive, flash = (nbytes for _, nbytes in curves.values())
    assert naive[0] >= 4 * 64**2 and naive[1] >= 4 * 256**2
    assert flash[1] == 4 * flash[0]  # grows as N
    tiles, memory = readme.readme_picture([64, 128]).axes
    assert len(patches(tiles, "visited")) == 36 and len(patches(tiles, "skipped")) == 28
    assert [line.get_label() for line in memory.lines[:2]] == ["naive attention", "flash_attention"]


def test_every_public_name_is_in_the_docstring():
    from flash_edu import figures

    documented = figures.__doc__
    assert all(f"{name}(" in documented for name in figures.__all__ if name.islower())
    everything = {}
    exec("from flash_edu.figures import *", everything)
    assert everything["tile_walk"] is tile_walk and everything["watch"] is watch


def test_no_module_has_the_name_of_what_the_package_offers():
    """Importing flash_edu.figures.x makes x the module, whatever x meant before."""
    modules = {path.stem for path in pathlib.Path(figures.__file__).parent.glob("*.py")}
    assert not modules & set(figures.__all__)
