"""Chapter 09: the kernels of chapters 07 and 08 as an operation that PyTorch treats as its own.

    attention_forward    operator: O and L from Q, K and V
    attention_backward   operator: dQ, dK and dV from what the forward left
    flash_attention      the function that a model calls: it casts, checks, and calls the operator
    MultiHeadAttention   the module, with its projections

This file and the two that it imports are all that a model needs. Limits, on purpose, are those of the kernels:
as many key heads as query heads, and a head dimension that is a power of two. The package lifts both.
"""

import torch
from torch import Tensor, nn

from . import ch07_fused_forward, ch08_fused_backward

# All operators of a process live in one table, under "namespace::name"; registering a name again replaces what
# was there. The namespace is this file's folder, so an exercise and its solution can be loaded side by side.
NAMESPACE = __name__.split(".")[0]


@torch.library.custom_op(f"{NAMESPACE}::attention_forward", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """O = softmax(S) V and L = logsumexp(S), with S = scale Q K^T (FlashAttention-2, Algorithm 1).

    q is (B, H, Nq, D), k and v are (B, H, Nk, D), with any strides. Gives out (B, H, Nq, D), in q's dtype, and
    lse (B, H, Nq), natural log, float32. The kernel is that of chapter 07; its flash_forward takes causal and scale
    by keyword. The inputs are not written to.
    """
    # your code here: 9.1 attention_op, run chapter 07's flash_forward (about 1 line)
    raise NotImplementedError("9.1 attention_op is not written yet")
    # end of your code


@attention_forward.register_fake
def forward_shapes(q, k, v, causal, scale):
    """What attention_forward returns, with no number computed: shape, dtype, device and strides are the real ones.

    q, k and v have no data here. out lies in memory as `torch.empty_like(q)` does, in chapter 07 too.
    """
    # your code here: 9.1 attention_op, two empty tensors (about 3 lines)
    raise NotImplementedError("9.1 attention_op is not written yet")
    # end of your code


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV by the kernels of chapter 08, each with the shape, dtype and strides of `empty_like` its input.

    dout is (B, H, Nq, D), with any strides, and dlse (B, H, Nq): the gradients of out and lse. flash_backward takes
    causal and scale by keyword, too.
    """
    # your code here: 9.2 attention_gradient, run chapter 08's flash_backward (about 1 line)
    raise NotImplementedError("9.2 attention_gradient is not written yet")
    # end of your code


@attention_backward.register_fake
def backward_shapes(dout, dlse, q, k, v, out, lse, causal, scale):
    """What attention_backward returns, with no number computed."""
    # your code here: 9.2 attention_gradient, three empty tensors (about 1 line)
    raise NotImplementedError("9.2 attention_gradient is not written yet")
    # end of your code


def save_for_gradient(ctx, inputs, output):
    """After the forward: keep in ctx what the gradient needs.

    inputs are those of attention_forward, in order; output is the tuple it returned. Tensors go through
    `ctx.save_for_backward`, which PyTorch can watch and free; anything else is an attribute of ctx.
    """
    # your code here: 9.2 attention_gradient, keep five tensors and two numbers (about 3 lines)
    raise NotImplementedError("9.2 attention_gradient is not written yet")
    # end of your code


def attention_gradient(ctx, dout, dlse):
    """In the backward: from the gradients of out and lse, one gradient for each input of attention_forward.

    There are five inputs, in order. causal and scale are no tensors, and their gradient is None. PyTorch gives
    zeros for the gradient of an output that nobody used.
    """
    # your code here: 9.2 attention_gradient, call the operator attention_backward (about 2 lines)
    raise NotImplementedError("9.2 attention_gradient is not written yet")
    # end of your code


attention_forward.register_autograd(attention_gradient, setup_context=save_for_gradient)


def check_inputs(q, k, v):
    """Raise a ValueError that names the argument, unless the kernels can work on q, k and v.

    The rules:
        q, k and v each have 4 dimensions
        k and v have the dtype and the device of q
        q is float16, bfloat16 or float32, and not bfloat16 on a CPU: Triton's interpreter gets that wrong
        q's last dimension, D, is a power of two from 16 to 256
        q is (B, H, Nq, D), and k and v are (B, H, Nk, D), with the same B, H and D, and one Nk
    """
    # your code here: 9.3 flash_attention, the rules (about 14 lines)
    raise NotImplementedError("9.3 flash_attention is not written yet")
    # end of your code


def flash_attention(q, k, v, *, causal=False, scale=None):
    """softmax(scale Q K^T) V, differentiable in q, k and v: out (B, H, Nq, D).

    q is (B, H, Nq, D), k and v are (B, H, Nk, D), with any strides; without a cast, nothing is copied. causal lets
    query i see key j when j <= i + Nk - Nq. scale is 1 / sqrt(D), which is D**-0.5, unless given.
    Under autocast, q, k and v are cast to autocast's dtype first. Then they must satisfy check_inputs. PyTorch
    says for each device type whether autocast is on. That is a word, "cuda" or "cpu": q.device.type.
    """
    # your code here: 9.3 flash_attention, cast, check, and call the operator (about 7 lines)
    raise NotImplementedError("9.3 flash_attention is not written yet")
    # end of your code


class MultiHeadAttention(nn.Module):
    """Multi-head attention with its projections: (B, N, d_model) -> (B, N, d_model).

        Q, K, V = x W_q + b_q, x W_k + b_k, x W_v + b_v          each (B, N, H * D), with H * D = d_model
        head h takes the columns h * D to (h + 1) * D of each    (B, H, N, D)
        out = concat(attention of each head) W_o + b_o           (B, N, d_model)

    (Vaswani et al. 2017, section 3.2.2.) The projections are `nn.Linear(d_model, d_model)`, and are called
    q_proj, k_proj, v_proj and out_proj, as in flash_edu.MultiHeadFlashAttention: weights can be exchanged.
    Heads are views: without a cast, nothing is copied between a projection and the kernel.
    """

    def __init__(self, d_model, num_heads, *, causal=False):
        super().__init__()
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads, got {d_model} and {num_heads}")
        self.num_heads = num_heads
        self.causal = causal
        # your code here: 9.4 multi_head_attention, the four projections (about 4 lines)
        raise NotImplementedError("9.4 multi_head_attention is not written yet")
        # end of your code

    def forward(self, x):
        """x (B, N, d_model) attends to itself."""
        # your code here: 9.4 multi_head_attention, project, split, attend, join, project (about 6 lines)
        raise NotImplementedError("9.4 multi_head_attention is not written yet")
        # end of your code
