"""The same record of a Triton kernel, made by the interpreter while the kernel runs.

Every load and store of an interpreted kernel, whichever way it is written (pointers, block pointers,
descriptors), ends in `create_masked_load` or `create_masked_store` of the interpreter's builder, which are
given all addresses and the mask.
"""

import contextlib
import inspect
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import flash_edu
from flash_edu._environment import interpreting
from flash_edu.figures.trace import Trace, row_axis

UNKNOWN = "?"  # the name of an access that hits no tensor of the launch


def trace_triton(fn, tensors: dict[str, Tensor], *, row_axes: dict[str, int] | None = None) -> Trace:
    """Call fn() and record each load and store of the Triton kernels it launches, interpreted, on CPU tensors.

    `tensors` names those you care about; any other tensor has the name of the kernel's argument (`o_ptr` is
    "o"). `row_axes` says which axis counts rows where it is not the usual one (see `watch`).
    """
    if not interpreting():
        raise RuntimeError(
            "trace_triton needs Triton's interpreter, and this process compiles kernels for a GPU. "
            "trace_file, trace_forward and trace_backward start an interpreted process by themselves."
        )
    recorder = _Recorder(tensors, row_axes or {})
    with recorder:
        fn()
    return recorder.trace


class _Layout(NamedTuple):
    """Where a tensor lies in memory, and how to tell a row from an address."""

    name: str
    base: int
    itemsize: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    rows: int  # the axis that counts rows

    @classmethod
    def of(cls, name: str, x: Tensor, axis: int | None) -> "_Layout":
        axis = row_axis(x.shape) if axis is None else axis % x.dim()
        return cls(name, x.data_ptr(), x.element_size(), tuple(x.shape), x.stride(), axis)

    def locate(self, addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inside, row, plane) of each address. Axes are peeled off one by one, the largest stride first."""
        rest, odd = np.divmod(addresses.astype(np.int64) - self.base, self.itemsize)
        index = [np.zeros_like(rest) for _ in self.shape]
        for axis in sorted(range(len(self.shape)), key=lambda a: -self.stride[a]):
            if self.shape[axis] > 1 and self.stride[axis]:
                index[axis], rest = np.divmod(rest, self.stride[axis])
        inside = (rest == 0) & (odd == 0)
        plane = np.zeros_like(rest)
        for axis, size in enumerate(self.shape):
            inside &= (index[axis] >= 0) & (index[axis] < size)
            plane = plane * size + index[axis] if axis < self.rows else plane
        return inside, index[self.rows], plane


class _Recorder(contextlib.ExitStack):
    """While open, watches launches (to learn where the tensors are) and every access to memory."""

    def __init__(self, tensors: dict[str, Tensor], row_axes: dict[str, int]):
        super().__init__()
        self.trace = Trace()
        self.row_axes = row_axes
        self.given = [self._layout(name, x) for name, x in tensors.items()]
        self.layouts: list[_Layout] = []
        self.kernel = ""

    def __enter__(self):
        from triton.runtime import interpreter

        self.builder = interpreter.interpreter_builder
        self._wrap(interpreter.GridExecutor, "__call__", self._on_launch)
        self._wrap(self.builder, "create_masked_load", self._on_load)
        self._wrap(self.builder, "create_masked_store", self._on_store)
        self._wrap(self.builder, "create_atomic_rmw", self._on_atomic)
        return super().__enter__()

    def _wrap(self, owner, name: str, before) -> None:
        """Until this closes, owner.name calls `before` with the same arguments first."""
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            before(*args, **kwargs)
            return original(*args, **kwargs)

        if name in vars(owner):
            self.callback(setattr, owner, name, original)
        else:
            self.callback(delattr, owner, name)
        setattr(owner, name, wrapped)

    def _layout(self, name: str, x: Tensor) -> _Layout:
        if x.device.type != "cpu":
            raise ValueError(f"trace_triton records tensors on the CPU; {name!r} is on {x.device}")
        return _Layout.of(name, x, self.row_axes.get(name))

    def _on_launch(self, executor, *args, **kwargs) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        self.kernel = executor.fn.__name__
        arguments = dict(zip(inspect.signature(executor.fn).parameters, args)) | kwargs
        self.layouts = list(self.given)
        known = {layout.base for layout in self.given}
        for name, x in arguments.items():
            if isinstance(x, TensorDescriptor):
                x = x.base
            if isinstance(x, Tensor) and x.numel() and x.data_ptr() not in known:
                name = name.removesuffix("_ptr").removesuffix("_desc").lower()
                self.layouts.append(self._layout(name, x))

    def _on_load(self, pointers, mask, *rest, **kwargs) -> None:
        self._record("load", pointers.data, mask.data)

    def _on_store(self, pointers, value, mask, *rest, **kwargs) -> None:
        self._record("store", pointers.data, mask.data)

    def _on_atomic(self, operation, pointers, value, mask, *rest, **kwargs) -> None:
        self._record("load", pointers.data, mask.data)
        self._record("store", pointers.data, mask.data)

    def _record(self, kind: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]
        if not addresses.size:
            return
        where = {"kernel": self.kernel, "program": tuple(int(i) for i in self.builder.grid_idx)}
        layout = self._owner(addresses)
        if layout is None:
            self.trace.record(kind, UNKNOWN, 0, 0, 0, outside=int(addresses.size), **where)
            return
        inside, rows, planes = layout.locate(addresses)
        rows, planes = rows[inside], planes[inside]
        self.trace.record(
            kind,
            layout.name,
            start=int(rows.min()),
            stop=int(rows.max()) + 1,
            nbytes=rows.size * layout.itemsize,
            plane=int(planes[0]) if (planes == planes[0]).all() else None,
            outside=int((~inside).sum()) * layout.itemsize,
            **where,
        )

    def _owner(self, addresses: np.ndarray) -> _Layout | None:
        """The tensor that these addresses belong to: that of the lowest, or the first that any is inside."""
        for some in (addresses[addresses.argmin()][None], addresses):
            for layout in self.layouts:
                if layout.locate(some)[0].any():
                    return layout
        return None


def trace_forward(
    nq: int,
    nk: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    heads: int = 1,
    kv_heads: int | None = None,
    d: int = 16,
    block_q: int = 16,
    block_k: int = 16,
) -> Trace:
    """flash_edu's own forward kernel on random input, with tiles of block_q queries and block_k keys."""
    q, k, v = _random_inputs(nq, nk, heads, kv_heads, d)
    job = {"run": "forward", "tensors": {"q": q, "k": k, "v": v}, "tile": (block_q, block_k)}
    return _run(job | {"rules": {"causal": causal, "window": window}})


def trace_backward(
    nq: int,
    nk: int,
    *,
    causal: bool = False,
    heads: int = 1,
    kv_heads: int | None = None,
    d: int = 16,
    block_q: int = 16,
    block_k: int = 16,
) -> Trace:
    """flash_edu's own backward kernels on random input; `trace.only(kernel=...)` picks one."""
    q, k, v = _random_inputs(nq, nk, heads, kv_heads, d)
    tensors = {"q": q, "k": k, "v": v, "do": torch.randn_like(q)}
    return _run({"run": "backward", "tensors": tensors, "causal": causal, "tile": (block_q, block_k)})


def trace_file(
    path, function: str, tensors: dict[str, Tensor], *, row_axes: dict[str, int] | None = None, **kwargs
) -> Trace:
    """Record `function(*tensors.values(), **kwargs)` of the Python file `path`, as it is saved now.

    `row_axes` is that of `trace_triton`. Runs in a fresh interpreted process: it does the same on a GPU machine, and is stopped after two minutes.
    """
    path = pathlib.Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    tensors = {name: x.detach().cpu() for name, x in tensors.items()}
    job = {"path": str(path), "function": function, "tensors": tensors, "kwargs": kwargs, "row_axes": row_axes}
    return _in_subprocess({"run": "file", **job})


def _random_inputs(nq: int, nk: int, heads: int, kv_heads: int | None, d: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, nq, d), (kv_heads or heads, nk, d), (kv_heads or heads, nk, d)
    return [torch.randn(1, *shape, generator=generator) for shape in shapes]


def _run(job: dict) -> Trace:
    if interpreting():
        from flash_edu.figures import trace_job

        return trace_job.run(job)
    return _in_subprocess(job)


def _in_subprocess(job: dict, timeout: float = 120) -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        request, answer = pathlib.Path(folder, "job.pt"), pathlib.Path(folder, "trace.json")
        torch.save(job, request)
        command = [sys.executable, "-m", "flash_edu.figures.trace_job", str(request), str(answer)]
        home = str(pathlib.Path(flash_edu.__file__).parents[1])
        path = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            what = done.stderr.strip()
            raise RuntimeError(f"the traced code failed: {what.splitlines()[-1]}\n\n{what[-3000:]}")
        return Trace.from_json(answer.read_text())
