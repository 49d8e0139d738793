"""Which rows of which tensor were read and written, in order; `watch` records it of a PyTorch function.

`triton_trace.py` makes the same record of a Triton kernel.
"""

import itertools
import json
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Rows = tuple[int, int]  # start, stop


class Access(NamedTuple):
    """Rows start .. stop of tensor `name` were loaded or stored.

    `plane` is the (batch, head) pair they belong to, counted row by row, or None if there were several.
    `outside` counts bytes beyond the tensor's end: a mask was forgotten. `kernel` and `program` say who did
    it, in a Triton trace.
    """

    order: int
    kind: str  # "load" or "store"
    name: str
    start: int
    stop: int
    bytes: int
    plane: int | None = None
    kernel: str | None = None
    program: tuple[int, int, int] | None = None
    outside: int = 0


class Trace:
    """Accesses in the order they happened."""

    def __init__(self, events: Iterable[Access] = ()):
        self.events = list(events)

    def __repr__(self) -> str:
        return f"Trace({len(self.events)} accesses to {', '.join(self.names) or 'nothing'})"

    def record(self, kind: str, name: str, start: int, stop: int, nbytes: int, **where) -> None:
        self.events.append(Access(len(self.events), kind, name, start, stop, nbytes, **where))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(e.name for e in self.events))

    @property
    def kernels(self) -> list[str]:
        return list(dict.fromkeys(e.kernel for e in self.events if e.kernel))

    @property
    def programs(self) -> list[tuple[int, int, int]]:
        return list(dict.fromkeys(e.program for e in self.events if e.program))

    def only(self, **wanted) -> "Trace":
        """The accesses with this `kernel`, `program`, `plane`, `name` or `kind`; each keeps its `order`."""
        return Trace(
            e for e in self.events if all(getattr(e, field) == value for field, value in wanted.items())
        )

    def bytes_loaded(self, name: str | None = None) -> int:
        return self._bytes("load", name)

    def bytes_stored(self, name: str | None = None) -> int:
        return self._bytes("store", name)

    def bytes_by_tensor(self) -> dict[str, tuple[int, int]]:
        """{name: (bytes loaded, bytes stored)}"""
        return {name: (self.bytes_loaded(name), self.bytes_stored(name)) for name in self.names}

    def _bytes(self, kind: str, name: str | None) -> int:
        return sum(e.bytes for e in self.events if e.kind == kind and name in (None, e.name))

    def tiles(self, rows: str = "q", columns: str = "k", inner: str | None = None) -> list[tuple[Rows, Rows]]:
        """Tiles of the score matrix, ((q_start, q_stop), (k_start, k_stop)), in the order they were visited.

        A visit is derived from loads: of the two tensors, the one loaded first belongs to the outer loop and
        the other to the inner one, and each load of the inner one visits a tile, together with the rows of
        the outer one that were loaded last. (Give `inner` if your loop loads in another order.) Each program
        of a Triton kernel has its own loops, so the rule is applied to each by itself.
        """
        visits = itertools.chain.from_iterable(self._visits(rows, columns, inner).values())
        return [tile for _, tile in sorted(visits)]

    def walks(
        self, rows: str = "q", columns: str = "k", inner: str | None = None
    ) -> dict[tuple, list[tuple[Rows, Rows]]]:
        """As `tiles`, for each (kernel, program); a PyTorch function is one walk, under (None, None)."""
        walks = self._visits(rows, columns, inner)
        return {who: [tile for _, tile in visits] for who, visits in walks.items() if visits}

    def _visits(self, rows: str, columns: str, inner: str | None) -> dict[tuple, list]:
        if inner not in (None, rows, columns):
            raise ValueError(f"inner must be {rows!r} or {columns!r}, got {inner!r}")
        visits, current, first = {}, {}, {}
        for e in self.events:
            if e.kind != "load" or e.name not in (rows, columns):
                continue
            who = (e.kernel, e.program)
            current.setdefault(who, {})[e.name] = (e.start, e.stop)
            outer = first.setdefault(who, e.name) if inner is None else None
            is_inner = e.name == inner if inner else e.name != outer
            if is_inner and len(current[who]) == 2:
                visits.setdefault(who, []).append((e.order, (current[who][rows], current[who][columns])))
        return visits

    def to_json(self) -> str:
        return json.dumps(self.events)

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        events = (Access(*fields) for fields in json.loads(text))
        return cls(e._replace(program=tuple(e.program) if e.program else None) for e in events)


def row_axis(shape: tuple[int, ...]) -> int:
    """The axis that counts rows (tokens): -2 of (N, D) and (B, H, N, D), the last of (N,) and (B, H, N)."""
    return len(shape) - (1 if len(shape) in (1, 3) else 2)


def watch(**tensors: Tensor) -> tuple[Trace, dict[str, Tensor]]:
    """The same tensors, and a trace of how their rows are used: `trace, w = watch(q=q, k=k)`, then use `w["q"]`.

    Slicing rows is what loading a tile is in a kernel, so it is what gets recorded; the slice is a plain
    tensor, whose use is free. Anything else done with a whole watched tensor loads all of its rows. Changes
    of shape (`.mT`, `.reshape`), choosing a head (`q[0, 0]`) and casts load nothing by themselves: their
    result is still watched. Casting is free, and bytes are counted in the dtype of the tensor given here, as
    when a kernel converts a tile it has loaded.
    """
    trace = Trace()
    return trace, {name: _Watched.of(x, _Source(trace, name, x)) for name, x in tensors.items()}


class _Source:
    """What a watched tensor's elements are: the row and the plane of each, as tensors of the same shape.

    Whatever picks or moves elements of the tensor does the same to these two, which tell what came out.
    """

    def __init__(self, trace: Trace, name: str, x: Tensor):
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise TypeError(
                f"watch({name}=...) needs a tensor with at least one axis, got {type(x).__name__}"
            )
        self.trace, self.name, self.itemsize = trace, name, x.element_size()
        axis = row_axis(x.shape)
        lead = x.shape[:axis]
        tail = (1,) * (x.dim() - axis - 1)
        self.rows = torch.arange(x.shape[axis], device=x.device).view(-1, *tail).expand(x.shape)
        self.planes = torch.arange(lead.numel(), device=x.device).view(*lead, 1, *tail).expand(x.shape)

    def apply(self, func, args, kwargs) -> list["_Source"]:
        """The sources of what `func` returns, one per tensor."""
        rows, planes = (tree_leaves(func(x, *args[1:], **kwargs)) for x in (self.rows, self.planes))
        return [self._replace(r, p) for r, p in zip(rows, planes)]

    def _replace(self, rows: Tensor, planes: Tensor) -> "_Source":
        new = object.__new__(_Source)
        new.trace, new.name, new.itemsize, new.rows, new.planes = (
            self.trace,
            self.name,
            self.itemsize,
            rows,
            planes,
        )
        return new

    def record(self, kind: str) -> None:
        if not self.rows.numel():
            return
        start, last = (x.item() for x in self.rows.aminmax())
        plane, last_plane = (x.item() for x in self.planes.aminmax())
        nbytes = self.rows.numel() * self.itemsize
        self.trace.record(
            kind, self.name, start, last + 1, nbytes, plane=plane if plane == last_plane else None
        )

    def counts_rows(self, axis: int) -> bool:
        """Does walking along this axis lead to other rows?"""
        if self.rows.numel() == 0 or self.rows.shape[axis] == 1:
            return self.rows.shape[axis] == 1 and axis % self.rows.dim() == row_axis(self.rows.shape)
        return bool((self.rows.select(axis, 0) != self.rows.select(axis, -1)).any())

    def picks_rows(self, index) -> bool:
        """Does x[index] choose along an axis that counts rows, even if it chooses all of them?"""
        axis = 0
        index = index if isinstance(index, tuple) else (index,)
        named = sum(_axes_used(part) for part in index)
        for part in index:
            if part is Ellipsis:
                axis += self.rows.dim() - named
                continue
            used = range(axis, axis + _axes_used(part))
            whole = isinstance(part, slice) and part == slice(None)
            if not whole and any(self.counts_rows(a) for a in used):
                return True
            axis = used.stop
        return False


def _axes_used(part) -> int:
    """How many axes of x one entry of x[..., entry, ...] speaks for."""
    if part is None or part is Ellipsis:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


# Functions that choose elements along one axis, and where that axis stands among the arguments.
_PICKS = {
    "split": 2, "split_with_sizes": 2, "unsafe_split": 2, "tensor_split": 2, "chunk": 2, "unsafe_chunk": 2,
    "narrow": 1, "select": 1, "unbind": 1, "index_select": 1,
}  # fmt: skip
# Functions that give the same elements another shape.
_VIEWS = {
    "T", "mT", "H", "mH", "t", "adjoint", "data", "transpose", "swapaxes", "swapdims", "permute", "movedim",
    "moveaxis", "view", "view_as", "reshape", "flatten", "unflatten", "expand", "expand_as", "broadcast_to",
    "unsqueeze", "squeeze",
}  # fmt: skip
_CASTS = {"to", "type", "float", "double", "half", "bfloat16", "contiguous", "detach", "cpu", "cuda", "alias"}
# Functions that could pick rows in ways that are not followed. Silence would be a wrong count.
_REFUSED = {
    "hsplit",
    "vsplit",
    "dsplit",
    "unfold",
    "as_strided",
    "gather",
    "take",
    "take_along_dim",
    "masked_select",
}
_READS_NOTHING = {
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "grad_fn", "is_leaf", "is_cuda",
    "is_cpu", "itemsize", "nbytes", "names", "size", "dim", "ndimension", "stride", "numel", "nelement",
    "element_size", "__len__", "storage_offset", "data_ptr", "untyped_storage", "get_device", "is_contiguous",
    "is_floating_point", "is_complex", "requires_grad_", "retain_grad", "register_hook", "backward", "__repr__",
    "__format__", "__hash__",
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_zeros",
    "new_ones", "new_full", "new_tensor", "new_empty_strided", "result_type", "is_grad_enabled",
    "is_nested", "is_sparse", "is_quantized", "is_meta", "is_mps", "is_conj", "is_neg", "is_inference",
    "is_signed",
}  # fmt: skip
_OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_", "random_"}
_IN_PLACE_OPERATORS = {
    "__iadd__",
    "__isub__",
    "__imul__",
    "__itruediv__",
    "__ipow__",
    "__iand__",
    "__ior__",
    "__ixor__",
}


class _Watched(Tensor):
    """A tensor that tells its source's trace what is done with it."""

    @classmethod
    def of(cls, x: Tensor, source: _Source) -> "_Watched":
        watched = x.as_subclass(cls)
        watched.source = source
        return watched

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = func.__self__.__name__ if name in ("__get__", "__set__") else name  # a property: x.shape
        with torch._C.DisableTorchFunctionSubclass():
            source = getattr(args[0], "source", None) if args else None
            handler = _handlers.get(name) if source else None
            return handler(source, func, name, args, kwargs) if handler else _use(func, name, args, kwargs)


def _index(source, func, name, args, kwargs):
    (piece,) = source.apply(func, args, kwargs)
    result = func(*args)
    if not source.picks_rows(args[1]):
        return _Watched.of(result, piece)
    piece.record("load")
    return result


def _assign(source, func, name, args, kwargs):
    _record_uses(args[2:], kwargs)
    (piece,) = source.apply(Tensor.__getitem__, args[:2], {})
    func(*args)
    piece.record("store")


def _pick(source, func, name, args, kwargs):
    place = _PICKS[name]
    axis = kwargs.get("dim", args[place] if len(args) > place else 0)
    pieces = source.apply(func, args, kwargs)
    results = func(*args, **kwargs)
    if source.counts_rows(axis):
        for piece in pieces:
            piece.record("load")
        return results
    if isinstance(results, Tensor):
        return _Watched.of(results, pieces[0])
    return tuple(_Watched.of(result, piece) for result, piece in zip(results, pieces))


def _iterate(source, func, name, args, kwargs):
    return iter(_pick(source, Tensor.unbind, "unbind", args, kwargs))


def _view(source, func, name, args, kwargs):
    if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
        return _use(func, name, args, kwargs)  # view(dtype) takes elements apart
    same = (
        Tensor.reshape if name == "view" else func
    )  # an index tensor is expanded, so it has fewer views than x
    (piece,) = source.apply(same, args, kwargs)
    return _Watched.of(func(*args, **kwargs), piece)


def _cast(source, func, name, args, kwargs):
    result = func(*args, **kwargs)
    return _Watched.of(result, source) if isinstance(result, Tensor) else result


def _refuse(source, func, name, args, kwargs):
    raise NotImplementedError(
        f"{name} on a watched tensor: which rows it picks is not recorded. "
        f"Slice instead: {source.name}[start:stop]"
    )


def _use(func, name, args, kwargs):
    """Any other function reads all rows of the watched tensors it is given, and writes those it changes."""
    if name in _READS_NOTHING:
        return func(*args, **kwargs)
    in_place = name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
    changed = [args[0]] if in_place else tree_leaves(kwargs.get("out"))
    skip = args[0] if name in _OVERWRITES else None
    _record_uses(
        [x for x in tree_leaves(args) if x is not skip], {k: x for k, x in kwargs.items() if k != "out"}
    )
    result = func(*args, **kwargs)
    for x in changed:
        if isinstance(x, _Watched):
            x.source.record("store")
    return result


def _record_uses(args, kwargs) -> None:
    seen = set()
    for x in tree_leaves((args, kwargs)):
        if isinstance(x, _Watched) and id(x) not in seen:
            seen.add(id(x))
            x.source.record("load")


_handlers = {"__getitem__": _index, "__setitem__": _assign, "__iter__": _iterate}
_handlers |= dict.fromkeys(_PICKS, _pick) | dict.fromkeys(_VIEWS, _view)
_handlers |= dict.fromkeys(_CASTS, _cast) | dict.fromkeys(_REFUSED, _refuse)
