"""Who is measured: each peer is a function (q, k, v, causal) -> out, pinned to one implementation."""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flash_edu import flash_attention

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def sdpa(backend: SDPBackend) -> Attention:
    """PyTorch's scaled_dot_product_attention, by one backend. Unpinned, it picks one of several silently."""

    def attention(q, k, v, causal):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attention


def flex() -> Attention:
    """FlexAttention, compiled; the causal pattern as a block mask, made once for each length."""
    torch._dynamo.config.recompile_limit = 100  # one graph a shape; past the limit it silently runs unfused
    compiled = torch.compile(flex_attention, dynamic=False)
    masks = {}

    def attention(q, k, v, causal):
        if not causal:
            return compiled(q, k, v)
        n = q.shape[2]
        if n not in masks:
            masks[n] = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device=q.device)
        return compiled(q, k, v, block_mask=masks[n])

    return attention


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return flash_attention(q, k, v, causal=causal, backend="triton")


def all_peers() -> dict[str, Attention]:
    return {
        "flash_edu triton": ours,
        "SDPA flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
        "FlexAttention": flex(),
    }
