"""What this machine is, and the sizes a notebook may use on it."""
import importlib.metadata
import importlib.util
import os
import warnings

import torch

# Somebody with a GPU may still ask for the interpreter; then CPU sizes are the right ones.
_interpreter_asked = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "y", "yes", "on", "true")

# torch 2.11 warns of this, harmlessly, when the first thing a backward runs on a GPU is a matrix product.
warnings.filterwarnings("ignore", message="Attempting to run cuBLAS, but there was no current CUDA context")

on_gpu = torch.cuda.is_available() and not _interpreter_asked
device = "cuda" if on_gpu else "cpu"


def size(*, gpu, cpu):
    """`gpu` where kernels are compiled, `cpu` where they are interpreted."""
    return gpu if on_gpu else cpu


def machine() -> str:
    """One line for the top of a notebook: what runs the kernels, and which versions."""
    has_triton = importlib.util.find_spec("triton") is not None
    if on_gpu:
        chip = torch.cuda.get_device_name()
    else:
        chip = "CPU, Triton's interpreter" if has_triton else "CPU, without Triton"
    triton = f"triton {importlib.metadata.version('triton')}" if has_triton else "no triton"
    return f"{chip} · torch {torch.__version__} · {triton}"


def missing(needs: tuple[str, ...]) -> list[str]:
    """What this machine lacks of an exercise's or a chapter's `needs`, in words."""
    has_triton = importlib.util.find_spec("triton") is not None
    lacks = {
        "torch": None,
        "interpreter": None if has_triton else "Triton (it ships for Linux only)",
        "gpu": None if on_gpu else "an NVIDIA GPU",
    }
    return [lacks[need] for need in needs if lacks[need]]
