"""What a user may pass: each check names the argument, the rule and the value it got. Nothing here waits for a GPU."""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from flash_edu.patterns import Pattern
from flash_edu.rules import NO_LIMIT

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")  # torch.amp.is_autocast_available cannot be compiled in torch 2.11


def require(holds: bool, error: type[Exception], message: Callable[[], str]) -> None:
    """The message is made when it is needed: torch.compile cannot make text of sizes it does not know yet."""
    if not holds:
        raise error(message())


def require_tensor(name: str, x: object) -> None:
    require(isinstance(x, Tensor), TypeError, lambda: f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_probability(name: str, p: object) -> None:
    """Raise unless p is a number with 0 <= p < 1."""
    require(
        isinstance(p, (int, float)) and not isinstance(p, bool),
        TypeError,
        lambda: f"{name} must be a number, got {type(p).__name__}",
    )
    require(0.0 <= p < 1.0, ValueError, lambda: f"{name} must be at least 0 and less than 1, got {p!r}")


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A custom operator is not autocast by itself: cast here, as SDPA does."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x)
    device = q.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, q)
    _check_shapes(tuple(q.shape), tuple(k.shape), tuple(v.shape))
    return q, k, v


def check_tensor(name: str, x: object, q: Tensor, first: str = "batch") -> None:
    """Raise unless x is a dense tensor (`first`, heads, seq, head_dim) with a dtype we serve, and that and the device of q."""
    require_tensor(name, x)
    require(x.layout == torch.strided and not x.is_nested, TypeError, lambda: f"{name} must be a dense tensor, got {x.layout}")
    require(
        x.ndim == 4,
        ValueError,
        lambda: f"{name} must have 4 dimensions ({first}, heads, seq, head_dim), got {x.ndim}: {tuple(x.shape)}",
    )
    require(
        not (x.is_floating_point() and x.dtype.itemsize == 1),
        NotImplementedError,
        lambda: f"{name} must be float16, bfloat16, float32 or float64, got {str(x.dtype).removeprefix('torch.')}: on an H100 the "
        "same kernel in float8_e4m3fn was slower than in bfloat16, and its error 24 times as large (benchmarks/README.md); "
        "pass bfloat16",
    )
    require(
        x.dtype in DTYPES,
        TypeError,
        lambda: f"{name} must be float16, bfloat16, float32 or float64, got {str(x.dtype).removeprefix('torch.')}",
    )
    require(x.dtype == q.dtype, TypeError, lambda: f"{name} must have the dtype of q, got {x.dtype} and {q.dtype}")
    require(x.device == q.device, ValueError, lambda: f"{name} must be on the device of q, got {x.device} and {q.device}")
    require(
        1 <= x.shape[3] <= MAX_HEAD_DIM,
        NotImplementedError if x.shape[3] > MAX_HEAD_DIM else ValueError,
        lambda: f"{name}: head_dim must be between 1 and {MAX_HEAD_DIM}, got {x.shape[3]}",
    )


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    for name, shape in (("k", k), ("v", v)):
        require(
            shape[0] == q[0], ValueError, lambda: f"{name} must have the batch size of q, got {shape[0]} and {q[0]}"
        )
    require(k[3] == q[3], ValueError, lambda: f"k must have the head_dim of q, got {k[3]} and {q[3]}")
    require(
        v[1:3] == k[1:3],
        ValueError,
        lambda: f"v must have the heads and the length of k, got (heads, seq) = {v[1:3]} and {k[1:3]}",
    )
    require(
        q[1] == k[1] or (k[1] > 0 and q[1] % k[1] == 0),
        ValueError,
        lambda: f"the number of heads of q must be a multiple of that of k and v, got {q[1]} and {k[1]}",
    )


def check_scale(scale: object) -> float:
    require(
        isinstance(scale, (int, float)) and not isinstance(scale, bool),
        TypeError,
        lambda: f"scale must be a Python number (to learn a scale, multiply q by it), got {type(scale).__name__}",
    )
    require(0 < scale < math.inf, ValueError, lambda: f"scale must be positive and finite, got {scale!r}")
    return float(scale)


def check_flag(name: str, value: object) -> None:
    require(isinstance(value, bool), TypeError, lambda: f"{name} must be True or False, got {value!r}")


def check_window(window: object) -> None:
    """Raise unless window is None, or (left, right), each a number of keys, -1 or None."""
    if window is None:
        return
    require(
        isinstance(window, (tuple, list)) and len(window) == 2,
        TypeError,
        lambda: f"window must be a pair (left, right), got {window!r}",
    )
    for side in window:
        require(
            side is None or (isinstance(side, (int, torch.SymInt)) and not isinstance(side, bool)),
            TypeError,
            lambda: f"window must hold whole numbers or None, got {window!r}",
        )
        require(
            side is None or side >= NO_LIMIT, ValueError, lambda: f"window: a side must be -1 (no limit) or more, got {window!r}"
        )


def check_softcap(softcap: object) -> float | None:
    if softcap is None:
        return None
    require(
        isinstance(softcap, (int, float)) and not isinstance(softcap, bool),
        TypeError,
        lambda: f"softcap must be a number, got {type(softcap).__name__}",
    )
    require(0 < softcap < math.inf, ValueError, lambda: f"softcap must be positive and finite, got {softcap!r}")
    return float(softcap)


def check_mask(mask: object, q: Tensor, k: Tensor) -> None:
    """Raise unless mask is None, or a bool or float tensor that broadcasts to (B, Hq, Nq, Nk)."""
    if mask is None:
        return
    _check_extra("attn_mask", mask, q)
    require(
        mask.dtype in (torch.bool, *DTYPES),
        TypeError,
        lambda: "attn_mask must be bool (True = attend), or float16, bfloat16, float32 or float64 (added to the scores), "
        f"got {mask.dtype}",
    )
    full = (*q.shape[:3], k.shape[2])
    fits = mask.ndim <= 4 and all(have in (1, want) for have, want in zip(mask.shape[::-1], full[::-1]))
    require(
        fits,
        ValueError,
        lambda: f"attn_mask must broadcast to (batch, heads, Nq, Nk) = {tuple(full)}, got {tuple(mask.shape)}",
    )


def check_padding(padding: object, q: Tensor, k: Tensor) -> None:
    if padding is None:
        return
    _check_extra("key_padding_mask", padding, q)
    require(
        padding.dtype == torch.bool,
        TypeError,
        lambda: f"key_padding_mask must be bool (True = a real token), got {padding.dtype}",
    )
    want = (k.shape[0], k.shape[2])
    require(
        padding.shape == want,
        ValueError,
        lambda: f"key_padding_mask must be (batch, Nk) = {tuple(want)}, got {tuple(padding.shape)}",
    )


def check_slopes(slopes: object, batch: int, heads: int, q: Tensor) -> None:
    if slopes is None:
        return
    _check_extra("alibi_slopes", slopes, q)
    _check_float("alibi_slopes", slopes)
    require(
        slopes.shape in ((heads,), (batch, heads)),
        ValueError,
        lambda: f"alibi_slopes must be (heads,) = ({heads},) or (batch, heads) = ({batch}, {heads}), got {tuple(slopes.shape)}",
    )
    require(
        not (slopes.requires_grad and torch.is_grad_enabled()),
        NotImplementedError,
        lambda: "alibi_slopes get no gradient, got a tensor that requires one: detach it, or pass -slope * distance as attn_mask",
    )


def check_sinks(sinks: object, q: Tensor) -> None:
    if sinks is None:
        return
    _check_extra("sinks", sinks, q)
    _check_float("sinks", sinks)
    require(
        sinks.shape == (q.shape[1],), ValueError, lambda: f"sinks must be (heads,) = ({q.shape[1]},), got {tuple(sinks.shape)}"
    )


def check_pattern(pattern: object, q: Tensor) -> None:
    if pattern is None:
        return
    require(
        isinstance(pattern, Pattern), TypeError, lambda: f"pattern must be a flash_edu.Pattern, got {type(pattern).__name__}"
    )
    for x in pattern.buffers:
        require(
            x.device == q.device, ValueError, lambda: f"pattern: its buffers must be on the device of q, got {x.device} and {q.device}"
        )
        require(
            not (x.requires_grad and torch.is_grad_enabled()),
            NotImplementedError,
            lambda: "pattern: its buffers get no gradient, got one that requires it: detach it, or pass what is added to the "
            "scores as attn_mask",
        )


def check_cu_seqlens(cu_q: object, cu_k: object, q: Tensor) -> None:
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        _check_extra(name, cu, q)
        require(cu.dtype == torch.int32, TypeError, lambda: f"{name} must be int32, got {cu.dtype}")
        require(
            cu.ndim == 1 and cu.shape[0] >= 1 and cu.is_contiguous(),
            ValueError,
            lambda: f"{name} must be contiguous, of shape (sequences + 1,), got {tuple(cu.shape)} with strides {cu.stride()}",
        )
    require(
        cu_k.shape == cu_q.shape,
        ValueError,
        lambda: f"cu_seqlens_k must have as many entries as cu_seqlens_q, got {cu_k.shape[0]} and {cu_q.shape[0]}",
    )


def check_length(name: str, n: object) -> None:
    require(
        isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool),
        TypeError,
        lambda: f"{name} must be a Python int (a tensor would have to wait for the GPU), got {type(n).__name__}",
    )
    require(n >= 0, ValueError, lambda: f"{name} must be at least 0, got {n!r}")


def _check_float(name: str, x: Tensor) -> None:
    require(x.dtype in DTYPES, TypeError, lambda: f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_extra(name: str, x: object, q: Tensor) -> None:
    require_tensor(name, x)
    require(x.layout == torch.strided and not x.is_nested, TypeError, lambda: f"{name} must be a dense tensor, got {x.layout}")
    require(x.device == q.device, ValueError, lambda: f"{name} must be on the device of q, got {x.device} and {q.device}")
