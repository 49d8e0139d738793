"""flash_edu: attention that never stores the N x N matrix, and the course that builds it.

    from flash_edu import flash_attention
    out = flash_attention(q, k, v, causal=True)        # (batch, heads, seq, head_dim), as in PyTorch's SDPA

`python -m flash_edu` says which backends this machine has, and why not the others.
"""
import importlib
import sys
from typing import TYPE_CHECKING

from flash_edu._before_triton import BeforeTriton

if TYPE_CHECKING:
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

sys.meta_path.insert(0, BeforeTriton())  # picks interpreter or GPU, whoever imports triton


def __getattr__(name: str):
    """The public names are imported on first use: the command flash-edu need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'flash_edu' has no attribute {name!r}")
    module = "flash_edu.modules" if name.endswith("FlashAttention") else "flash_edu.attention"
    globals()[name] = getattr(importlib.import_module(module), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
