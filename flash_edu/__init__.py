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
    from flash_edu.attention import (
        available_backends,
        flash_attention,
        flash_attention_varlen,
        flash_attention_varlen_with_lse,
        flash_attention_with_lse,
        merge_attention,
    )
    from flash_edu.modules import FlashAttention, MultiHeadFlashAttention
    from flash_edu.packing import pack, unpack
    from flash_edu.patterns import Pattern

__version__ = "0.1.0"

_MODULES = {  # where each public name is
    "FlashAttention": "modules",
    "MultiHeadFlashAttention": "modules",
    "Pattern": "patterns",
    "available_backends": "attention",
    "flash_attention": "attention",
    "flash_attention_varlen": "attention",
    "flash_attention_varlen_with_lse": "attention",
    "flash_attention_with_lse": "attention",
    "merge_attention": "attention",
    "pack": "packing",
    "unpack": "packing",
}
__all__ = [
    "FlashAttention",
    "MultiHeadFlashAttention",
    "Pattern",
    "available_backends",
    "flash_attention",
    "flash_attention_varlen",
    "flash_attention_varlen_with_lse",
    "flash_attention_with_lse",
    "merge_attention",
    "pack",
    "unpack",
]

sys.meta_path.insert(0, BeforeTriton())  # picks interpreter or GPU, whoever imports triton


def __getattr__(name: str):
    """The public names are imported on first use: the command flash-edu need not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'flash_edu' has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"flash_edu.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
