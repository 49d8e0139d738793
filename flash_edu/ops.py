"""The two operators PyTorch sees: `flash_edu::attention_forward` and `flash_edu::attention_backward`.

As operators they stay whole under torch.compile, and carry what PyTorch needs to know of them: the shapes they return
(fake), their gradient (autograd), how they take one more dimension (vmap), how much they compute (flops), and that autocast does
not reach inside. Behind q, k, v and the backend stand the fields of rules.Rules, one by one: an operator takes tensors and numbers.
"""
import contextlib
from functools import partial

import torch
from torch import Tensor

from flash_edu import flops, patterns, reference, rules, vmap
from flash_edu.layout import empty_like_rows, empty_outputs, in_rows
from flash_edu.operators import operator
from flash_edu.rules import Rules

NUM_RULES = len(Rules._fields) - 1  # all but first_head


def _implementation(backend: str):
    """(forward, backward, mask_gradient) of a backend. Triton is imported on first use."""
    if backend == "triton":
        from flash_edu.kernels.backward import backward
        from flash_edu.kernels.forward import forward
        from flash_edu.kernels.mask_gradient import mask_gradient

        return forward, backward, mask_gradient
    return reference.tiled_forward, reference.tiled_backward, reference.mask_gradient


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Accumulators stay wide. (Asking first: switching off what is off takes longer than all that a backend does in Python.)"""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def arguments(asked: Rules) -> tuple:
    """The rules as an operator takes them."""
    return tuple(asked)[:NUM_RULES]


@operator("attention_forward", f"(Tensor q, Tensor k, Tensor v, str backend, {rules.SCHEMA}) -> (Tensor, Tensor)")
def attention_forward(q, k, v, backend, *asked):
    """out (B, Hq, Nq, Dv) and lse (B, Hq, Nq). Arguments are those of `flash_edu.flash_attention`, already checked."""
    asked = Rules(*asked)
    if q.numel() == 0 or k.numel() == 0:  # nothing to compute, or nothing to attend to
        out, lse = empty_outputs(q, v)
        out.zero_()
        return out, lse.fill_(float("-inf")) if asked.sinks is None else lse.copy_(asked.sinks[:, None].expand_as(lse))
    forward, _, _ = _implementation(backend)
    with _no_autocast(q), patterns.explained(asked.pattern):
        return forward(in_rows(q), in_rows(k), in_rows(v), asked)


@attention_forward.register_fake
def _(q, k, v, backend, *asked):
    return empty_outputs(q, v)


@operator(
    "attention_backward",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool mask_grad, bool sinks_grad, "
    f"str backend, {rules.SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def attention_backward(dout, dlse, q, k, v, out, lse, mask_grad, sinks_grad, backend, *asked):
    """dq, dk, dv, shaped and (see layout.py) laid out as q, k, v; and the gradients of a float mask and of the sinks, empty
    unless asked for."""
    asked = Rules(*asked)
    delta = reference.row_delta(dout, dlse, out) if mask_grad or sinks_grad else None
    dsinks = reference.sinks_gradient(asked.sinks, lse, delta) if sinks_grad else q.new_empty(0)
    if out.numel() == 0 or k.numel() == 0:
        dmask = asked.mask.new_zeros(asked.mask.shape) if mask_grad else q.new_empty(0)
        return *(empty_like_rows(x).zero_() for x in (q, k, v)), dmask, dsinks
    _, backward, mask_gradient = _implementation(backend)
    with _no_autocast(q), patterns.explained(asked.pattern):
        q, k, v, out, dout = (in_rows(x) for x in (q, k, v, out, dout))
        lse = lse.contiguous()  # it is, unless vmap or a user had it
        dmask = mask_gradient(dout, delta, q, k, v, lse, asked) if mask_grad else q.new_empty(0)
        return *backward(dout, dlse, q, k, v, out, lse, asked), dmask, dsinks


@attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, mask_grad, sinks_grad, backend, *asked):
    asked, nothing = Rules(*asked), q.new_empty(0)
    dmask = asked.mask.new_empty(asked.mask.shape) if mask_grad else nothing
    dsinks = asked.sinks.new_empty(asked.sinks.shape) if sinks_grad else nothing.clone()
    return *(empty_like_rows(x) for x in (q, k, v)), dmask, dsinks


def _save(ctx, inputs, output):
    """Keep what the backward recomputes P from: O(N) numbers, and nothing N x N that the caller did not bring."""
    q, k, v, ctx.backend, *asked = inputs
    asked = Rules(*asked)
    tensors = {name: x for name, x in asked._asdict().items() if isinstance(x, Tensor)}
    ctx.asked, ctx.names = asked._replace(buffers=[], **dict.fromkeys(tensors)), tuple(tensors)
    ctx.save_for_backward(q, k, v, *output, *tensors.values(), *asked.buffers)
    ctx.set_materialize_grads(False)  # an output nobody used has no gradient: None, not zeros


def _differentiate(ctx, dout, dlse):
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    buffers = tensors[len(ctx.names) :]
    asked = ctx.asked._replace(buffers=buffers, **dict(zip(ctx.names, tensors)))
    dout = torch.zeros_like(out) if dout is None else dout
    needs = dict(zip(Rules._fields, ctx.needs_input_grad[4:]))
    wanted = needs["mask"], needs["sinks"]
    dq, dk, dv, dmask, dsinks = attention_backward(dout, dlse, q, k, v, out, lse, *wanted, ctx.backend, *arguments(asked))
    gradients = dict.fromkeys(Rules._fields[:NUM_RULES])
    gradients |= {"mask": dmask if wanted[0] else None, "sinks": dsinks if wanted[1] else None}
    return dq, dk, dv, None, *gradients.values()


attention_forward.register_autograd(_differentiate, setup_context=_save)


def _refuse_twice(ctx, *gradients):
    raise NotImplementedError(
        "flash_edu's gradients are not differentiable themselves: no double backward (create_graph=True, gradient penalties, "
        "torch.autograd.functional.hessian). flash_edu.reference.naive_attention is differentiable any number of times"
    )


attention_backward.register_autograd(_refuse_twice, setup_context=lambda ctx, inputs, output: None)

attention_forward.register_vmap(partial(vmap.forward, attention_forward))
attention_backward.register_vmap(partial(vmap.backward, attention_backward))
flops.register({attention_forward: flops.forward_flops, attention_backward: flops.backward_flops})
