"""In Triton's interpreter a kernel reads and writes real memory. Here an access outside of every tensor is refused, with
the program, the tensor and the mask: otherwise it reads some other number, or ends Python.

"Outside" means outside of the memory that the tensors of the launch are views of. A read beside a view, in memory that
belongs to somebody, goes through: the tests fill such memory with NaN.

And what a mask leaves out of a load is NaN unless the kernel says `other`: it is undefined on a GPU, and the interpreter's
zeros would hide that.
"""
import contextlib
import inspect
import sys
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flash_edu._environment import interpreting


class OutOfBounds(IndexError):
    """A kernel touched memory that belongs to none of its tensors."""


FLOATS = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}


def _undefined(pointers):
    """NaN for each element, as the interpreter holds them; None, which it takes for zeros, if these are no floats."""
    from triton.runtime.interpreter import TensorHandle

    element = pointers.get_element_ty()
    dtype = FLOATS.get(element.name)
    return dtype and TensorHandle(np.full(pointers.data.shape, np.nan, dtype), element)


class _Memory(NamedTuple):
    name: str
    start: int
    end: int

    @classmethod
    def of(cls, name: str, x: Tensor) -> "_Memory":
        storage = x.untyped_storage()
        return cls(name, storage.data_ptr(), storage.data_ptr() + storage.nbytes())

    def holds(self, addresses: np.ndarray) -> int:
        return int(((addresses >= self.start) & (addresses < self.end)).sum())

    def distance(self, address: int) -> int:
        return max(self.start - address, address - self.end, 0)


@contextlib.contextmanager
def checked():
    """Inside, interpreted kernels on CPU tensors stay within their tensors, or raise OutOfBounds."""
    if "triton" not in sys.modules or not interpreting():  # asked first: most chapters never load triton
        yield
        return
    with _Guard():
        yield


class _Guard(contextlib.ExitStack):
    def __enter__(self):
        from triton.runtime import interpreter

        self.builder, self.memories, self.kernel = interpreter.interpreter_builder, [], ""
        self._before(interpreter.GridExecutor, "__call__", self._on_launch)
        self._before(self.builder, "create_masked_load", self._on_load)
        self._before(self.builder, "create_masked_store", self._on_store)
        return super().__enter__()

    def _before(self, owner, name, look) -> None:
        """Until this closes, owner.name calls `look` with the same arguments first; `look` may return others to go on with."""
        original, own = getattr(owner, name), name in vars(owner)

        def wrapped(*args, **kwargs):
            return original(*(look(*args, **kwargs) or args), **kwargs)

        self.callback(setattr, owner, name, original) if own else self.callback(delattr, owner, name)
        setattr(owner, name, wrapped)

    def _on_launch(self, executor, *args, **kwargs) -> None:
        self.kernel = executor.fn.__name__
        arguments = dict(zip(inspect.signature(executor.fn).parameters, args)) | kwargs
        self.memories = [_Memory.of(name, x) for name, x in arguments.items() if isinstance(x, Tensor) and x.numel()]

    def _on_load(self, pointers, mask, other, *rest, **kwargs) -> tuple:
        self._look("loads", pointers.data, mask.data)
        return pointers, mask, _undefined(pointers) if other is None else other, *rest

    def _on_store(self, pointers, value, mask, *rest, **kwargs) -> None:
        self._look("stores", pointers.data, mask.data)

    def _look(self, verb: str, pointers: np.ndarray, mask: np.ndarray) -> None:
        mask = np.broadcast_to(mask, pointers.shape).astype(bool)
        addresses = pointers[mask].astype(np.int64)
        if not addresses.size or any(m.start <= addresses.min() and addresses.max() < m.end for m in self.memories):
            return
        outside = np.ones(addresses.shape, dtype=bool)
        for memory in self.memories:
            outside &= (addresses < memory.start) | (addresses >= memory.end)
        if outside.any():
            program = tuple(int(i) for i in self.builder.grid_idx)
            raise OutOfBounds(self._said(verb, program, addresses, outside, bool(mask.all())))

    def _said(self, verb, program, addresses, outside, unmasked) -> str:
        first = int(addresses[outside][0])
        memory = max(self.memories, key=lambda m: (m.holds(addresses), -m.distance(first)), default=None)
        where = ""
        if memory is not None:
            side = "before the start" if first < memory.start else "past the end"
            where = f"; the first is {memory.distance(first):,} bytes {side} of {memory.name}"
        masked = "No mask holds it back" if unmasked else "Its mask lets them through"
        return (
            f"program {program} of {self.kernel} {verb} {addresses.size} numbers, {int(outside.sum())} of them outside of "
            f"every tensor{where}. {masked}."
        )
