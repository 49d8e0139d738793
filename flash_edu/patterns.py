"""Attention patterns of your own: which keys a query sees, and what becomes of a score, as small functions.

    @triton.jit
    def prefix_lm(batch, head, i, j, buffers):
        return (j <= i) | (j < tl.load(buffers[0] + batch))

    pattern = Pattern(mask_mod=prefix_lm, buffers=(prefix_lengths,))
    out = flash_attention(q, k, v, pattern=pattern)

The kernels compile the functions into their loops (as FlexAttention does: Dong et al. 2024, arXiv:2412.05496). The same functions
also run on tensors, for the PyTorch backend and for the plan that says which tiles hold anything at all.
"""
import itertools
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PLAN_BLOCK = 128  # queries and keys to a tile of a plan; every kernel's tile divides it
_patterns: dict[str, "Pattern"] = {}
_numbers = itertools.count()


class Pattern:
    """Functions for the scores of one call of `flash_attention(..., pattern=...)`. Make it once and use it again.

    Args:
        mask_mod: a `@triton.jit` function (batch, head, i, j, buffers) -> bool, True = attend. batch and head are numbers,
            i and j whole-number blocks that broadcast against each other: the query's and the key's place, from 0, not
            aligned. Use operators, `tl.where`, `tl.abs`, `tl.minimum`, `tl.maximum`, `tl.exp`, `tl.log`, `tl.sqrt`, and
            `tl.load(buffers[0] + offset)`.
        score_mod: likewise (score, batch, head, i, j, buffers) -> score, after scale, softcap, ALiBi and a float mask. What
            a float mask hides, by -inf, stays hidden.
        score_grad: likewise (score, batch, head, i, j, buffers) -> the derivative of score_mod by its score. The Triton
            backend asks for it when gradients are needed.
        buffers: contiguous tensors that the functions read, on the device of q. They get no gradient.

    With a mask_mod as the only mask of a call, tiles that it empties are skipped, and those that it fills are not masked.
    The plan of tiles is made at the first call of each shape, by running mask_mod on all pairs of places, and kept as long as
    the buffers are not changed.
    """

    def __init__(
        self,
        mask_mod: Callable | None = None,
        score_mod: Callable | None = None,
        score_grad: Callable | None = None,
        buffers: Sequence[Tensor] = (),
    ):
        if mask_mod is None and score_mod is None:
            raise ValueError("mask_mod and score_mod: give at least one of them, got None for both")
        for name, function in (("mask_mod", mask_mod), ("score_mod", score_mod), ("score_grad", score_grad)):
            if function is not None and not hasattr(function, "fn"):
                raise TypeError(f"{name} must be a @triton.jit function, got {type(function).__name__}")
        if score_grad is not None and score_mod is None:
            raise ValueError("score_grad is the derivative of score_mod, and score_mod is None")
        for x in buffers:
            if not isinstance(x, Tensor):
                raise TypeError(f"buffers must be tensors, got {type(x).__name__}")
            if not x.is_contiguous():
                raise ValueError(f"buffers must be contiguous, got strides {x.stride()} for shape {tuple(x.shape)}")
        self.mask_mod, self.score_mod, self.score_grad = mask_mod, score_mod, score_grad
        self.buffers = tuple(buffers)
        self.name = f"pattern_{next(_numbers)}"
        self._plans: dict[tuple, tuple[Tensor, Tensor]] = {}
        _patterns[self.name] = self

    def visible(self, batch, head, i, j) -> Tensor:
        """mask_mod on tensors of places, which broadcast."""
        return self._call(self.mask_mod, batch, head, i, j) != 0

    def changed(self, s: Tensor, batch, head, i, j) -> Tensor:
        """score_mod on tensors; differentiable."""
        return self._call(self.score_mod, batch, head, i, j, s).to(s.dtype)

    def slope(self, s: Tensor, batch, head, i, j) -> Tensor:
        """The derivative of score_mod: score_grad if there is one, otherwise autograd's."""
        if self.score_grad is not None:
            return self._call(self.score_grad, batch, head, i, j, s).to(s.dtype).expand_as(s)
        with torch.enable_grad():
            s = s.detach().requires_grad_()
            return torch.autograd.grad(self.changed(s, batch, head, i, j).sum(), s)[0]

    def _call(self, function: Callable, batch: Tensor, head: Tensor, i: Tensor, j: Tensor, *scores: Tensor) -> Tensor:
        """One of the functions, on tensors that broadcast."""
        numbers = (x.as_subclass(_Numbers) for x in (*scores, batch, head, i, j))
        result = on_tensors(function)(*numbers, tuple(_Pointer(x.flatten()) for x in self.buffers))
        return torch.as_tensor(result, device=i.device).as_subclass(Tensor)

    def plan(self, batch: int, heads: int, kv_heads: int, nq: int, nk: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two plans, (B or 1, heads or 1, tiles, 2 + 2 * other tiles) int32: for each tile of queries the tiles of keys, and for
        each tile of keys, and key head, the tiles of queries. A row holds the number of tiles without a hidden pair, that
        of the others that show something, then both lists, each as long as there are tiles."""
        state = tuple((x.data_ptr(), x._version) for x in self.buffers)
        key = (batch, heads, kv_heads, nq, nk, device)
        if self._plans.get(key, (None,))[0] != state:
            shown, filled = self._tiles(batch, heads, nq, nk, device)
            if shown.shape[1] > 1:  # a key tile is walked for all heads of its group
                groups = [x.unflatten(1, (kv_heads, -1)) for x in (shown, filled)]
                shown_kv, filled_kv = groups[0].any(2), groups[1].all(2)
            else:
                shown_kv, filled_kv = shown, filled
            self._plans[key] = (state, (_lists(shown, filled), _lists(shown_kv.mT, filled_kv.mT)))
        return self._plans[key][1]

    def _tiles(self, batch: int, heads: int, nq: int, nk: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B or 1, Hq or 1, query tiles, key tiles) bool: does the tile show any pair; does it show all, and reach no end?"""
        b = torch.arange(batch, device=device)[:, None, None, None]
        h = torch.arange(heads, device=device)[None, :, None, None]
        j = torch.arange(nk, device=device)[None, None, None, :]
        rows = []
        for start in range(0, nq, PLAN_BLOCK):
            i = torch.arange(start, min(start + PLAN_BLOCK, nq), device=device)[None, None, :, None]
            seen = self.visible(b, h, i, j)
            seen = seen.expand(torch.broadcast_shapes(seen.shape, (1, 1, i.shape[2], nk)))
            any_row, all_rows = seen.any(2), seen.all(2)  # (B or 1, Hq or 1, Nk)
            missing = -nk % PLAN_BLOCK
            pad = torch.nn.functional.pad
            rows.append([pad(x, (0, missing)).unflatten(-1, (-1, PLAN_BLOCK)) for x in (any_row, all_rows)])
        shown = torch.stack([row[0].any(-1) for row in rows], 2)
        filled = torch.stack([row[1].all(-1) for row in rows], 2)
        return shown, filled


def get(name: str | None) -> Pattern | None:
    return None if name is None else _patterns[name]


def _lists(shown: Tensor, filled: Tensor) -> Tensor:
    masked = shown & ~filled
    order = [x.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int() for x in (filled, masked)]
    counts = [x.sum(-1, keepdim=True, dtype=torch.int32) for x in (filled, masked)]
    return torch.cat((*counts, *order), dim=-1).contiguous()


# --- a Triton function on tensors -------------------------------------------------------------------------


def on_tensors(function: Callable) -> Callable:
    """The Python function behind a `@triton.jit` function, with `tl` meaning PyTorch, and helpers likewise."""
    python = function.fn
    named = python.__code__.co_names
    names = {name: _in_pytorch(x) if name in named else x for name, x in python.__globals__.items()}
    cells = tuple(types.CellType(_in_pytorch(cell.cell_contents)) for cell in python.__closure__ or ())
    return types.FunctionType(python.__code__, names, python.__name__, python.__defaults__, cells)


def _in_pytorch(x):
    """What a name that a Triton function uses stands for on tensors."""
    if getattr(x, "__name__", "") == "triton.language":
        return _Language()
    if hasattr(x, "fn"):  # a helper, jitted too
        return on_tensors(x)
    return x.value if type(x).__name__ == "constexpr" else x


class _Numbers(Tensor):
    """Numbers that divide as Triton's do: whole ones towards zero, where PyTorch's go down."""

    def __floordiv__(self, other):
        return torch.div(self, other, rounding_mode="trunc")

    def __mod__(self, other):
        return torch.fmod(self, other)


class _Pointer:
    """A buffer, and an offset into it."""

    def __init__(self, x: Tensor, offset=0):
        self.x, self.offset = x, offset

    def __add__(self, offset):
        return _Pointer(self.x, self.offset + offset)


class _Language:
    """The part of triton.language that patterns may use, on tensors."""

    where, exp, exp2, log, log2, sqrt, sin, cos = (
        staticmethod(getattr(torch, name)) for name in ("where", "exp", "exp2", "log", "log2", "sqrt", "sin", "cos")
    )
    int32, int64, float32, float64, int1 = torch.int32, torch.int64, torch.float32, torch.float64, torch.bool

    @staticmethod
    def load(pointer, mask=None, other=None):
        offset = torch.as_tensor(pointer.offset, device=pointer.x.device)
        if mask is None:
            return pointer.x[offset]
        return torch.where(mask, pointer.x[torch.where(mask, offset, 0)], 0 if other is None else other)

    @staticmethod
    def abs(x):
        return abs(x)

    @staticmethod
    def minimum(x, y):
        return torch.minimum(*torch.broadcast_tensors(*map(torch.as_tensor, (x, y))))

    @staticmethod
    def maximum(x, y):
        return torch.maximum(*torch.broadcast_tensors(*map(torch.as_tensor, (x, y))))

    def __getattr__(self, name: str):
        raise NotImplementedError(
            f"a pattern's function uses tl.{name}, which the PyTorch backend and the plan do not know; they know "
            "operators, load, where, abs, minimum, maximum, exp, exp2, log, log2, sqrt, sin and cos"
        )
