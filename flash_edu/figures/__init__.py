"""Traces of running code, and the pictures drawn from them.

Nothing in this package draws made-up data: first record, then draw.

Record what a function does to memory
-------------------------------------
watch(**tensors) -> (trace, watched)
    `watched` is a dict of the same tensors. Picking rows of one (`q[i:j]`, `q[:, :, i:j]`, `.split`, `.chunk`,
    `.narrow`, `.unbind`, `.select`, a for loop) records a load; `o[i:j] = x` records a store; any other use of
    a whole tensor (`q @ k.T`) records a load of all its rows. Rows are axis -2 of a 2-D or 4-D tensor, the last
    axis of a 1-D or 3-D one (like LSE). What comes out of a pick is a plain tensor: using it is not recorded.
        trace, w = watch(q=q, k=k, v=v)
        tiled_attention(w["q"], w["k"], w["v"])         # or tiled_attention(**w)
trace_triton(fn, tensors, *, row_axes=None) -> trace
    Calls fn() and records every load and store of every Triton kernel in it. Needs TRITON_INTERPRET=1.
    tensors: {"q": q, ...} names what you care about; others get the name of the kernel's argument ("o_ptr": "o").
    row_axes: {"x": 0} where rows are not on the usual axis.
trace_file(path, function, tensors, *, row_axes=None, **kwargs) -> trace
    The same for `function(*tensors.values(), **kwargs)` in the file `path` (an exercise or a solution), in a
    fresh interpreted process: works on a GPU machine too, and sees the file as it is saved now. Takes seconds.
    Raises RuntimeError if the code fails, so in a chapter trace solutions/, or something that is written.
trace_forward(nq, nk, *, causal=False, heads=1, kv_heads=None, d=16, block_q=16, block_k=16) -> trace
trace_backward(nq, nk, *, ... the same ...) -> trace
    flash_edu's own Triton kernels on random input; in a subprocess if this process compiles for a GPU.

A trace is a list of accesses with questions you can ask it:
    trace.events             [Access(order, kind, name, start, stop, bytes, plane, kernel, program, outside), ...]
    trace.bytes_loaded()     of all tensors; of one: trace.bytes_loaded("k"); and trace.bytes_stored(...)
    trace.bytes_by_tensor()  {"q": (loaded, stored), ...}
    trace.tiles(rows="q", columns="k", inner=None)
                             [((q_start, q_stop), (k_start, k_stop)), ...] in order of visit
    trace.walks(...)         the same per program of a Triton kernel: {(kernel, program): [...]}
    trace.only(kernel=..., program=..., plane=..., name=..., kind=...)
                             a smaller trace; give any of them
    trace.kernels, trace.programs, trace.names, trace.to_json(), Trace.from_json(text)

Count what eager PyTorch moves
------------------------------
count_traffic(fn, *args, **kwargs) -> Traffic
    .bytes_read .bytes_written .bytes .flops .intensity (flops per byte) .largest (Allocation) .result
    .ops = [Op(name, read, written, flops, shape), ...]
    Each operation reads its inputs and writes its outputs once; views are free; matrix products have flops.
largest_allocation(fn, *args, **kwargs) -> Allocation(elements, bytes, shape, op)
    The largest new tensor, views excluded.
peak_memory(fn, *args, **kwargs) -> int
    Most bytes alive at once, beyond what was there before; CPU and CUDA.

Draw (each returns a figure: last in a cell, it is displayed once; fig.savefig(...) works)
------------------------------------------------------------------------------------------
Each says in words what it shows: print(fig), or fig.description. The words are stored with the picture.
tile_walk(trace, nq, nk, *, causal=False, title=None)
    A trace, or a list of ((q0, q1), (k0, k1)). Numbers are the order of visit; hatched tiles were skipped. For
    a Triton trace, one colour per program, which counts its own tiles.
softmax_evolution(history, *, title=None)
    A dict per block: {"scores": block of scores, "m": m, "l": l} and, if you like, "o": the row of O so far.
memory_curve({name: (lengths, bytes)}, *, title=None, ylabel="memory")
    On logarithmic axes, with slopes N and N^2 to compare by.
bars({name: value}, unit, *, title=None, log=False)
    Unit "B" is shown as KiB, MiB, GiB.
weights(matrix, words=None, *, columns=None, title=None, decimals=2)
    A small matrix with its numbers; -inf is drawn as masked. columns: the keys' words, if not those of the rows.
roofline({name: (flops, bytes, seconds or None)}, *, peak, bandwidth, title=None)
    Flops per second against flops per byte, below min(peak, intensity * bandwidth). A point with seconds was
    measured: filled. One with None is modelled: hollow, on the roof, and called a model in the legend.
masks({name: (mask, trace)}, *, title=None)
    Bool matrices side by side, True filled, with the tiles of a trace, or of a list like tile_walk's, in their order.
loss_curves({name: losses}, *, baseline=None, title=None, ylabel="loss (nats)", xlabel="step")
    A loss per step, or (step, loss) pairs. baseline: a number, or (label, number).
product_walk(by_row, by_column, m, n, k, *, programs=None, title=None)
    A matrix product: which tiles of A, B and C its programs touch. Two traces of one call, with row_axes 0 and 1.
meetings(trace, name, *, title=None)
    Which rows of a tensor each program touches; framed where one stores what another touches: a race.
error_map(got, want, *, tile=None, title=None)
    |got - want| of the worst head, with tiles of `tile` rows and the tail marked.

Play (each returns a Player: last in a cell, it shows the finished figure; in JupyterLab, with buttons for each step)
-----------------------------------------------------------------------------------------------------------------
play_tile_walk(trace, nq, nk, *, causal=False, title=None)
    tile_walk, one visit after the other; the programs of a Triton kernel side by side.
play_softmax(history, *, title=None)
    softmax_evolution, one block after the other.
player(steps, picture, *, pause_ms=600) -> Player(.picture, .frames, .words, .html())
    Any other figure: `steps` is a generator that changes `picture` in place and yields a sentence for each frame.
"""

import importlib

_HOMES = {
    "trace": ("Access", "Trace", "watch"),
    "traffic": ("Allocation", "Op", "Traffic", "count_traffic", "largest_allocation", "peak_memory"),
    "triton_trace": ("trace_backward", "trace_file", "trace_forward", "trace_triton"),
    "matrices": ("error_map", "masks", "meetings", "play_tile_walk", "product_walk", "tile_walk", "weights"),
    "charts": ("bars", "loss_curves", "memory_curve", "play_softmax", "roofline", "softmax_evolution"),
    "playing": ("Player", "player"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    """Import on first use: recording needs no matplotlib, drawing needs no Triton."""
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return __all__
