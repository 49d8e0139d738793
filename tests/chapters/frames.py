"""What surrounds the tensors of an answer. Inputs are left as they were; and around a kernel's tensors, memory is full of NaN:
a read outside its inputs, and an output left unwritten, show."""

import contextlib
from unittest import mock

import torch

FENCE = 1 << 14  # elements on either side of an output: more than the largest tile of the tests


@contextlib.contextmanager
def left_alone(who, **inputs):
    """Inside, `who` is called; on leaving, its inputs must hold what they held."""
    before = {name: x.clone() for name, x in inputs.items()}
    yield
    for name, x in before.items():
        assert torch.allclose(x, inputs[name], rtol=0, atol=0, equal_nan=True), (
            f"{who} changed its input {name}. `x -= y`, and functions whose name ends in _, write into the caller's tensor,\n"
            "which it still needs; `x = x - y` makes a new one. A kernel may store into its outputs alone."
        )


def framed(x):
    """The same numbers as a view into a larger tensor, with NaN before and after the rows of every head.

    Rows are axis -2 of (B, H, N, D), and the last axis of (B, H, N).
    """
    axis = 2
    shape = list(x.shape)
    shape[axis] += 3 + 70
    memory = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
    view = memory.narrow(axis, 3, x.shape[axis])
    view.copy_(x)
    return view


@contextlib.contextmanager
def nan_outputs(look, *names):
    """Inside, torch.empty and torch.empty_like give memory full of NaN, with a fence of NaN on either side.

    On leaving, every fence must still be NaN; otherwise something was written outside, and `look` says what to look at.
    names: what the outputs are called, in the order in which they are made.
    """
    empty, empty_like, fences = torch.empty, torch.empty_like, []

    def fenced(like):
        if not like.is_floating_point() or not like.numel():
            return like
        size = like.untyped_storage().nbytes() // like.element_size()
        memory = torch.full((size + 2 * FENCE,), float("nan"), dtype=like.dtype, device=like.device)
        fences.append((tuple(like.shape), memory[:FENCE], memory[FENCE + size :]))
        return memory.as_strided(like.shape, like.stride(), FENCE)

    with (
        mock.patch.object(torch, "empty", lambda *args, **kwargs: fenced(empty(*args, **kwargs))),
        mock.patch.object(torch, "empty_like", lambda *args, **kwargs: fenced(empty_like(*args, **kwargs))),
    ):
        yield
    if len(names) != len(fences):  # the wrapper makes other outputs than it came with
        names = ["An output"] * len(fences)
    for name, (shape, before, after) in zip(names, fences):
        for where, fence in (("before its start", before), ("past its end", after)):
            written = int((~fence.isnan()).sum())
            assert not written, f"{name}, of shape {shape}, was written {where}: {written} number{'s' * (written > 1)}.\n{look}"


def assert_inside(trace, look):
    """No load and no store of a recorded run left its tensor."""
    for event in trace.events:
        assert not event.outside, (
            f"Program {event.program} of {event.kernel}: a {event.kind} of {event.name.upper()} leaves the tensor "
            f"by {event.outside} bytes.\n{look}"
        )
