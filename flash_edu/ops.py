"""The two operators PyTorch sees: `flash_edu::attention_forward` and `flash_edu::attention_backward`.

As `torch.library` custom operators they stay whole under torch.compile, and carry what PyTorch needs to know of them: the
shapes they return (fake), their gradient (autograd), and that autocast does not reach inside.
"""
import torch
from torch import Tensor

from flash_edu import reference
from flash_edu.layout import empty_like_rows, empty_outputs, in_rows


def _implementation(backend: str):
    """(forward, backward) of a backend. Triton is imported on first use."""
    if backend == "triton":
        from flash_edu.kernels.backward import backward
        from flash_edu.kernels.forward import forward

        return forward, backward
    return reference.tiled_forward, reference.tiled_backward


@torch.library.custom_op("flash_edu::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Nq, Dv) and lse (B, Hq, Nq). Arguments are those of `flash_edu.flash_attention`, already checked."""
    out, lse = empty_outputs(q, v)
    if out.numel() == 0 or k.numel() == 0:  # nothing to compute, or nothing to attend to
        return out.zero_(), lse.fill_(float("-inf"))
    forward, _ = _implementation(backend)
    with torch.autocast(q.device.type, enabled=False):  # the accumulators stay wide
        return forward(in_rows(q), in_rows(k), in_rows(v), causal=causal, scale=scale)


@attention_forward.register_fake
def _(q, k, v, causal, scale, backend):
    return empty_outputs(q, v)


@torch.library.custom_op("flash_edu::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, shaped and (see layout.py) laid out as q, k, v."""
    if out.numel() == 0 or k.numel() == 0:
        return tuple(empty_like_rows(x).zero_() for x in (q, k, v))
    _, backward = _implementation(backend)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, out, dout = (in_rows(x) for x in (q, k, v, out, dout))
        return backward(dout, dlse, q, k, v, out, lse, causal=causal, scale=scale)


@attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, causal, scale, backend):
    return tuple(empty_like_rows(x) for x in (q, k, v))


def _save(ctx, inputs, output):
    """Keep what the backward recomputes P from: O(N) numbers, and nothing N x N."""
    q, k, v, ctx.causal, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # an output nobody used has no gradient: None, not zeros


def _differentiate(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    grads = attention_backward(dout, dlse, q, k, v, out, lse, ctx.causal, ctx.scale, ctx.backend)
    return *grads, None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_save)
