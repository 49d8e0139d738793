"""flash_edu: attention that never stores the N x N matrix, and the course that builds it.

    from flash_edu import flash_attention
    out = flash_attention(q, k, v, causal=True)        # (batch, heads, seq, head_dim), as in PyTorch's SDPA

`python -m flash_edu` says which backends this machine has, and why not the others.
"""
from flash_edu import _environment as _environment  # first: picks interpreter or GPU before triton is imported
from flash_edu.attention import available_backends, flash_attention, flash_attention_with_lse, merge_attention
from flash_edu.modules import FlashAttention, MultiHeadFlashAttention

__version__ = "0.1.0"

__all__ = [
    "FlashAttention",
    "MultiHeadFlashAttention",
    "available_backends",
    "flash_attention",
    "flash_attention_with_lse",
    "merge_attention",
]
