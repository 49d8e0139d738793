"""What PyTorch functions move and keep: bytes read and written, and the most memory in use at once."""

import contextlib
import itertools
import os
import sys
import tempfile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler_legacy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Allocation(NamedTuple):
    """A new tensor, and the operation that made it."""

    elements: int
    bytes: int
    shape: tuple[int, ...]
    op: str


class Op(NamedTuple):
    """One operation: bytes read and written, flops if it is a matrix product, shape of the result."""

    name: str
    read: int
    written: int
    flops: int
    shape: tuple[int, ...]


class Traffic:
    """What a call moved, if each operation reads its inputs from memory and writes its results back."""

    def __init__(self):
        self.ops: list[Op] = []
        self.allocations: list[Allocation] = []
        self.result: Any = None

    def __repr__(self) -> str:
        return f"Traffic({len(self.ops)} operations, {self.bytes:,} bytes, {self.flops:,} flops)"

    @property
    def bytes_read(self) -> int:
        return sum(op.read for op in self.ops)

    @property
    def bytes_written(self) -> int:
        return sum(op.written for op in self.ops)

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte moved."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def largest(self) -> Allocation:
        return max(self.allocations, key=lambda a: a.bytes, default=Allocation(0, 0, (), ""))


def count_traffic(fn, *args, **kwargs) -> Traffic:
    """Call fn(*args, **kwargs) and count the bytes that its operations read and write, and their flops.

    This is the model of eager PyTorch, where every operation is a kernel of its own: inputs come from memory,
    results go back. Views move nothing. A fused operator (SDPA, flash_edu's own) counts as one operation: its
    inputs and outputs. Matrix products and convolutions have flops; the rest counts none, as is usual for
    attention.
    """
    traffic = Traffic()
    with _Counter(traffic):
        traffic.result = fn(*args, **kwargs)
    return traffic


def largest_allocation(fn, *args, **kwargs) -> Allocation:
    """The largest tensor that fn(*args, **kwargs) makes, views excluded. Is anything N x N?"""
    return count_traffic(fn, *args, **kwargs).largest


class _Counter(TorchDispatchMode):
    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **kwargs)
        changed = list(_changed(func, args, kwargs))
        homes = {_home(x) for x in inputs}
        new = [x for x in tree_leaves(result) if isinstance(x, Tensor) and _home(x) not in homes]
        if not new and not changed:
            return result  # a view
        name = func._schema.name.split("::")[-1]
        self.traffic.allocations += [Allocation(x.numel(), _bytes(x), tuple(x.shape), name) for x in new]
        if not name.startswith(("empty", "new_empty")):  # these only ask for memory
            overwritten = [changed[0]] if name in ("copy_", "fill_", "zero_") else []
            read = {id(x): _bytes(x) for x in inputs if not any(x is y for y in overwritten)}
            if name.startswith(("new_", "zeros_like", "ones_like", "full_like", "rand")):
                read = {}
            written = [*new, *changed]
            shape = tuple(written[0].shape)
            flops = _flops(func, args, kwargs, result)
            self.traffic.ops.append(Op(name, sum(read.values()), sum(map(_bytes, written)), flops, shape))
        return result


def _changed(func, args, kwargs):
    """The tensors an in-place or out= operation writes to, by its schema."""
    for i, arg in enumerate(func._schema.arguments):
        if arg.alias_info is not None and arg.alias_info.is_write:
            value = kwargs.get(arg.name, args[i] if i < len(args) else None)
            yield from (x for x in tree_leaves(value) if isinstance(x, Tensor))


def _home(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """Bytes of memory behind x; an expanded axis repeats the same ones."""
    sizes = torch.Size(n for n, stride in zip(x.shape, x.stride()) if stride or n == 0)
    return x.element_size() * sizes.numel()


def _flops(func, args, kwargs, result) -> int:
    formula = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def peak_memory(fn, *args, **kwargs) -> int:
    """Most bytes that fn(*args, **kwargs) held at once, its result included, beyond what was there before.

    On a GPU by the allocator's own count, on a CPU by PyTorch's record of every allocation; so scratch memory
    inside an operator counts too. New gradients count: forget the old ones first (`x.grad = None`), or they
    are not new.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with _quiet(b"Memory block of unknown size"):  # PyTorch logs that when fn frees memory older than this
        # The new profiler gives the same numbers, but takes seconds to start, and logs more.
        profiler = profiler_legacy.profile(profile_memory=True)
        profiler._start_trace()
        try:
            result = fn(*args, **kwargs)
        finally:
            records = profiler_legacy._disable_profiler_legacy()
    del result  # not before: it belongs to the peak
    on_cpu = _peak([r.cpu_memory_usage() for thread in records for r in thread if r.kind() == "memory_alloc"])
    return max(on_cpu, torch.cuda.max_memory_allocated() - before) if on_gpu else on_cpu


def _peak(changes: list[int]) -> int:
    return max(itertools.accumulate(changes), default=0)


@contextlib.contextmanager
def _quiet(phrase: bytes):
    """Hold back stderr, C++ included, and write it afterwards without the lines that have `phrase`."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            os.write(2, b"".join(line for line in held if phrase not in line))
