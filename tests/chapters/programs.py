"""Who touches which memory, program by program, in Triton's interpreter; and the programs in another order.

The interpreter runs programs one after the other, so what two of them do to one address at the same time never
happens there. But it can be seen that they could: one stores where another loads or stores.
"""

import collections
import contextlib
from unittest import mock

import numpy as np

ATOMIC = "adds to"


class Touched:
    """What each program of the launches did: {program: {"loads": addresses, "stores": ..., "adds to": ...}}"""

    def __init__(self):
        self.programs = {}
        self.started = []  # in order
        self.times = {}  # {verb: {address: how often}}

    def note(self, program, verb, pointers, mask):
        mask = np.broadcast_to(mask, pointers.shape).astype(bool)
        addresses = pointers[mask].astype(np.int64).tolist()
        self.programs.setdefault(program, {}).setdefault(verb, set()).update(addresses)
        self.times.setdefault(verb, collections.Counter()).update(addresses)

    def conflicts(self):
        """(one program, another, what the other does, address) where one stores and another touches the same."""
        writers = {}
        for program, did in self.programs.items():
            for address in did.get("stores", ()):
                writers.setdefault(address, program)
        for program, did in self.programs.items():
            for verb in ("stores", "loads"):
                for address in sorted(did.get(verb, ())):
                    if writers.get(address, program) != program:
                        yield writers[address], program, verb, address


@contextlib.contextmanager
def touching():
    """Inside, interpreted kernels are recorded in the Touched that this gives."""
    from triton.runtime import interpreter

    builder, touched = interpreter.interpreter_builder, Touched()
    who = lambda: tuple(int(i) for i in builder.grid_idx)  # noqa: E731
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    move = builder.set_grid_idx

    def on_load(pointers, mask, *rest):
        touched.note(who(), "loads", pointers.data, mask.data)
        return load(pointers, mask, *rest)

    def on_store(pointers, value, mask, *rest):
        touched.note(who(), "stores", pointers.data, mask.data)
        return store(pointers, value, mask, *rest)

    def on_atomic(operation, pointers, value, mask, *rest):
        touched.note(who(), ATOMIC, pointers.data, mask.data)
        return atomic(operation, pointers, value, mask, *rest)

    def on_start(*program):
        touched.started.append(program)
        return move(*program)

    with (
        mock.patch.object(builder, "create_masked_load", on_load),
        mock.patch.object(builder, "create_masked_store", on_store),
        mock.patch.object(builder, "create_atomic_rmw", on_atomic),
        mock.patch.object(builder, "set_grid_idx", on_start),
    ):
        yield touched


@contextlib.contextmanager
def in_order(choose):
    """Inside, the programs of a launch run in the order choose(how many) says: a list of their numbers."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    move = builder.set_grid_idx

    def other(*program):
        shape = builder.grid_dim
        count = int(np.prod(shape))
        number = choose(count)[int(np.ravel_multi_index(program, shape))]
        return move(*(int(i) for i in np.unravel_index(number, shape)))

    with mock.patch.object(builder, "set_grid_idx", other):
        yield
