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
    return ch07_fused_forward.flash_forward(q, k, v, causal=causal, scale=scale)
    # end of your code


@attention_forward.register_fake
def forward_shapes(q, k, v, causal, scale):
    """What attention_forward returns, with no number computed: shape, dtype, device and strides are the real ones.

    q, k and v have no data here. out lies in memory as `torch.empty_like(q)` does, in chapter 07 too.
    """
    # your code here: 9.1 attention_op, two empty tensors (about 3 lines)
    out = torch.empty_like(q)  # (B, H, Nq, D)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)  # (B, H, Nq)
    return out, lse
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
    return ch08_fused_backward.flash_backward(dout, dlse, q, k, v, out, lse, causal=causal, scale=scale)
    # end of your code


@attention_backward.register_fake
def backward_shapes(dout, dlse, q, k, v, out, lse, causal, scale):
    """What attention_backward returns, with no number computed."""
    # your code here: 9.2 attention_gradient, three empty tensors (about 1 line)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    # end of your code


def save_for_gradient(ctx, inputs, output):
    """After the forward: keep in ctx what the gradient needs.

    inputs are those of attention_forward, in order; output is the tuple it returned. Tensors go through
    `ctx.save_for_backward`, which PyTorch can watch and free; anything else is an attribute of ctx.
    """
    # your code here: 9.2 attention_gradient, keep five tensors and two numbers (about 3 lines)
    q, k, v, ctx.causal, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    # end of your code


def attention_gradient(ctx, dout, dlse):
    """In the backward: from the gradients of out and lse, one gradient for each input of attention_forward.

    There are five inputs, in order. causal and scale are no tensors, and their gradient is None. PyTorch gives
    zeros for the gradient of an output that nobody used.
    """
    # your code here: 9.2 attention_gradient, call the operator attention_backward (about 2 lines)
    dq, dk, dv = attention_backward(dout, dlse, *ctx.saved_tensors, ctx.causal, ctx.scale)
    return dq, dk, dv, None, None
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
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be (batch, heads, seq, head_dim), got {tuple(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device}, as q is, got {x.dtype} on {x.device}")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"q must be float16, bfloat16 or float32, got {q.dtype}")
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        raise ValueError("q must not be bfloat16 on a CPU: Triton's interpreter gets it wrong. Use float16")
    B, H, Nq, D = q.shape
    if D not in (16, 32, 64, 128, 256):
        raise ValueError(f"q must have a head_dim that is a power of two from 16 to 256, got {D}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != (B, H, k.shape[2], D):
            raise ValueError(f"{name} must be {(B, H, k.shape[2], D)}, got {tuple(x.shape)}")
    # end of your code


def flash_attention(q, k, v, *, causal=False, scale=None):
    """softmax(scale Q K^T) V, differentiable in q, k and v: out (B, H, Nq, D).

    q is (B, H, Nq, D), k and v are (B, H, Nk, D), with any strides; without a cast, nothing is copied. causal lets
    query i see key j when j <= i + Nk - Nq. scale is 1 / sqrt(D), which is D**-0.5, unless given.
    Under autocast, q, k and v are cast to autocast's dtype first. Then they must satisfy check_inputs. PyTorch
    says for each device type whether autocast is on. That is a word, "cuda" or "cpu": q.device.type.
    """
    # your code here: 9.3 flash_attention, cast, check, and call the operator (about 7 lines)
    device = q.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_inputs(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attention_forward(q, k, v, causal, scale)
    return out
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
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        # end of your code

    def forward(self, x):
        """x (B, N, d_model) attends to itself."""
        # your code here: 9.4 multi_head_attention, project, split, attend, join, project (about 6 lines)
        B, N, C = x.shape
        q = self.q_proj(x).view(B, N, self.num_heads, -1).transpose(1, 2)  # (B, H, N, D)
        k = self.k_proj(x).view(B, N, self.num_heads, -1).transpose(1, 2)  # (B, H, N, D)
        v = self.v_proj(x).view(B, N, self.num_heads, -1).transpose(1, 2)  # (B, H, N, D)
        out = flash_attention(q, k, v, causal=self.causal)  # (B, H, N, D)
        return self.out_proj(out.transpose(1, 2).reshape(B, N, C))  # (B, N, d_model)
        # end of your code
