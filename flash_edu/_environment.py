"""What this process can run: a GPU, Triton's interpreter, or plain PyTorch.

Triton decides at *import* whether kernels are compiled or interpreted, so the choice is made here, before anything
in flash_edu imports it. Without a GPU, kernels run in the interpreter: slow, exact, and good for learning.
"""
import importlib.util
import os
import sys

import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

HAS_TRITON = importlib.util.find_spec("triton") is not None


# A constant: torch.compile cannot look into triton's settings, and kernels are one or the other once they are imported.
_INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")


def interpreting() -> bool:
    """True if Triton kernels run in the interpreter in this process."""
    return _INTERPRETING


def why_no_triton(device: torch.device) -> str | None:
    """None if Triton kernels can run on tensors of `device`; otherwise the reason, as half a sentence."""
    if not HAS_TRITON:
        return "the package triton is not installed (Triton ships for Linux only)"
    if device.type == "cuda":
        return "this PyTorch drives an AMD GPU, which is not supported" if torch.version.hip else None
    if device.type != "cpu":
        return f"Triton has no backend for device type {device.type!r}"
    if not interpreting():
        return (
            "on a CPU, Triton needs its interpreter: set TRITON_INTERPRET=1 before triton is first imported "
            "(importing flash_edu first does that; in a notebook, restart the kernel)"
        )
    return None
