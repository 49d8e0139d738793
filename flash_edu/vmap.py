"""torch.func.vmap over our operators: the mapped dimension joins the batch, for which the kernels have a place.

What is not mapped is repeated where it has a batch, and stays one for all where it has none. What sees the number of a batch does
not fold, and says so.
"""
import torch
from torch import Tensor

from flash_edu.reference import row_delta, sinks_gradient
from flash_edu.rules import Rules


class Fold:
    """`size` problems, mapped, of `batch` batches each."""

    def __init__(self, size: int, q: Tensor, dim: int | None):
        self.size = size
        self.batch = self.apart(q, dim).shape[1]

    def apart(self, x: Tensor, dim: int | None) -> Tensor:
        """The mapped dimension first; all the same if x has none."""
        return x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)

    def together(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """(batch or 1, ...) and a mapped dimension -> (size * batch, ...); a view if strides allow."""
        if x is None:
            return None
        x = self.apart(x, dim)
        return x.expand(self.size, self.batch, *x.shape[2:]).flatten(0, 1)

    def broadcast(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """The same, but what all batches share stays one."""
        shared = x is not None and dim is None and x.shape[0] == 1
        return x if shared else self.together(x, dim)

    def unfold(self, x: Tensor) -> Tensor:
        """(size * batch, ...) -> (size, batch, ...)."""
        return x.unflatten(0, (self.size, self.batch))

    def rules(self, asked: Rules, dims: Rules) -> Rules:
        """What every problem asks, as one request. Sinks have no batch: they are left out if they are mapped."""
        _refuse(asked.packed, "packed sequences: lay the sequences of all problems behind one another, in one call")
        _refuse(asked.pattern is not None, "a pattern, which would see other numbers of batches: call flash_attention with a larger batch")
        _refuse(
            asked.seed is not None and dims.seed is None,
            "dropout with randomness='same': which weights drop depends on the place in the batch; randomness='different' works",
        )
        return asked._replace(
            mask=self.broadcast(asked.mask, dims.mask),
            padding=self.together(asked.padding, dims.padding),
            slopes=self.broadcast(asked.slopes, dims.slopes),
            sinks=asked.sinks if dims.sinks is None else None,
            seed=None if asked.seed is None else self.apart(asked.seed, dims.seed)[0].contiguous(),  # places differ: one will do
        )


def _refuse(unfit: bool, what: str) -> None:
    if unfit:
        raise NotImplementedError(f"flash_edu does not vmap over {what}")


def forward(operator, info, in_dims, q, k, v, backend, *asked):
    """The rule of attention_forward."""
    rules, dims, fold = Rules(*asked), Rules(*in_dims[4:]), Fold(info.batch_size, q, in_dims[0])
    inputs = (fold.together(x, dim) for x, dim in zip((q, k, v), in_dims))
    out, lse = (fold.unfold(x) for x in operator(*inputs, backend, *fold.rules(rules, dims)[: len(asked)]))
    if dims.sinks is not None:
        out, lse = _with_sinks(out, lse, rules.sinks.movedim(dims.sinks, 0))
    return (out, lse), (0, 0)


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out (size, B, Hq, Nq, Dv), lse (size, B, Hq, Nq) and sinks (size, Hq), whose values are 0."""
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None, :, None])
    share = (lse - total).exp().masked_fill(lse == float("-inf"), 0.0)
    return (out * share[..., None]).to(out.dtype), total


def backward(operator, info, in_dims, dout, dlse, q, k, v, out, lse, mask_grad, sinks_grad, backend, *asked):
    """The rule of attention_backward. Every problem has its own gradients, of what is not mapped too."""
    rules, dims, fold = Rules(*asked), Rules(*in_dims[10:]), Fold(info.batch_size, q, in_dims[2])
    folded = fold.rules(rules, dims)
    if mask_grad:
        folded = folded._replace(mask=fold.together(rules.mask, dims.mask))
    inputs = [fold.together(x, dim) for x, dim in zip((dout, dlse, q, k, v, out, lse), in_dims)]
    dq, dk, dv, dmask, dsinks = operator(*inputs, mask_grad, False, backend, *folded[: len(asked)])
    if mask_grad:
        shared = fold.apart(rules.mask, dims.mask).shape[1] == 1 < fold.batch
        dmask = fold.unfold(dmask).sum(1, keepdim=True) if shared else fold.unfold(dmask)
    if sinks_grad:
        dout, dlse, out, lse = (None if x is None else fold.unfold(x) for x in (*inputs[:2], *inputs[5:]))
        dsinks = sinks_gradient(fold.apart(rules.sinks, dims.sinks), lse, row_delta(dout, dlse, out))
    gradients = *(fold.unfold(x) for x in (dq, dk, dv)), dmask, dsinks
    return gradients, (0, 0, 0, 0 if mask_grad else None, 0 if sinks_grad else None)
