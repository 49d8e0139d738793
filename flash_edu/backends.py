"""Which backend serves a call, and why not the others."""
import torch
from torch import Tensor

from flash_edu import patterns
from flash_edu._environment import interpreting, why_no_triton
from flash_edu.arguments import require

BACKENDS = ("auto", "triton", "hopper", "torch")


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """For each backend: None if it can run on `device` (default: the GPU if there is one), else the reason it cannot."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "triton": why_no_triton(device),
        "hopper": "the Hopper kernels are not part of this version",
        "torch": None,
    }


def pick_backend(backend: object, q: Tensor, pattern: str | None = None) -> str:
    """The backend that serves a call with these queries, and the Pattern of this name."""
    require(isinstance(backend, str), TypeError, lambda: f"backend must be a string, got {type(backend).__name__}")
    require(backend in BACKENDS, ValueError, lambda: f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        # On a CPU Triton only interprets, which is for learning; before sm_80 the tiles do not fit.
        fast = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)
        return "triton" if fast and _why_not("triton", q, pattern) is None else "torch"
    reason = _why_not(backend, q, pattern)
    require(reason is None, NotImplementedError, lambda: f"backend={backend!r} cannot serve this: {reason}; backend='torch' can")
    return backend


def _why_not(backend: str, q: Tensor, pattern: str | None) -> str | None:
    """None if `backend` can serve this request, else the reason."""
    reason = available_backends(q.device)[backend]
    if backend != "triton" or reason is not None:
        return reason
    if q.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter computes bfloat16 wrongly (use float16 or float32)"
    if q.dtype == torch.float64 and not interpreting():
        return "the kernels accumulate in float32 on a GPU, which would waste float64 inputs"
    functions = patterns.get(pattern)
    if functions is not None and functions.score_mod is not None and functions.score_grad is None and torch.is_grad_enabled():
        return "a pattern with a score_mod needs its score_grad too where gradients may be asked for (or torch.no_grad())"
    return None
