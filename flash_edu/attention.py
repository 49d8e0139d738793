"""The functions a user calls: they check their arguments, pick a backend, and hand over to the operators in ops.py."""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from flash_edu import ops
from flash_edu._environment import interpreting, why_no_triton

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")  # torch.amp.is_autocast_available cannot be compiled in torch 2.11
BACKENDS = ("auto", "triton", "hopper", "torch")


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * Q K^T) V without ever storing the Nq x Nk matrix. Differentiable in q, k and v.

    Forward and backward follow FlashAttention-2, Algorithms 1 and 2 (Dao 2023, arXiv:2307.08691). Memory beyond inputs,
    outputs and gradients grows linearly with the sequence length. The same inputs give the same bits.

    Args:
        q: queries (B, Hq, Nq, D), fp16, bf16, fp32 or fp64. Any strides; a tensor whose head dim is
            not contiguous is copied, others are read in place.
        k: keys (B, Hkv, Nk, D), dtype and device of q. Hq must be a multiple of Hkv: query head h reads key/value
            head h // (Hq / Hkv), which is grouped-query attention, or multi-query attention if Hkv is 1.
        v: values (B, Hkv, Nk, Dv). D and Dv are any sizes from 1 to 256.
        causal: query i attends to keys 0 .. i + Nk - Nq, so the last query sees every key (aligned bottom-right, as in
            FlashAttention 2 and later; the `is_causal` of SDPA is aligned top-left, which differs when Nq != Nk):

                Nq = 2, Nk = 4:  1 1 1 0      Nq = 4, Nk = 2:  0 0
                                 1 1 1 1                       0 0
                                                               1 0
                                                               1 1
        scale: what the scores are multiplied with; 1 / sqrt(D) if None.
        backend: "triton" (CUDA, or a CPU under TRITON_INTERPRET=1), "torch" (any device), or "auto": the fastest that
            supports the request. `flash_edu.available_backends()` tells which there are.
        window, attn_mask, key_padding_mask, alibi_slopes, softcap, dropout_p: not implemented yet; they raise.

    Returns:
        out (B, Hq, Nq, Dv), dtype of q. A query with nothing to attend to gives 0, and gradients of 0.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and value.
        NotImplementedError: no backend, or not the named one, can serve the request.

    Under autocast, q, k and v are cast to the autocast dtype, as SDPA does. fp32 inputs are multiplied to fp32 accuracy
    (on a GPU as three TF32 products each), unless PyTorch's own fp32 products are allowed to be TF32.
    """
    return flash_attention_with_lse(
        q, k, v, causal=causal, scale=scale, window=window, attn_mask=attn_mask, key_padding_mask=key_padding_mask,
        alibi_slopes=alibi_slopes, softcap=softcap, dropout_p=dropout_p, backend=backend,
    )[0]  # fmt: skip


def flash_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `flash_attention`, and the log-sum-exp of each row of scores. Both are differentiable.

    Returns:
        out (B, Hq, Nq, Dv), and lse (B, Hq, Nq): natural logarithm, fp32 (fp64 for fp64 inputs), -inf for a query with
        nothing to attend to. With it, partial results over different keys can be merged: see `merge_attention`.
    """
    _reject_unwritten(window, attn_mask, key_padding_mask, alibi_slopes, softcap, dropout_p)
    q, k, v = _check_tensors(*_autocast(q, k, v))
    _require(isinstance(causal, bool), TypeError, lambda: f"causal must be True or False, got {causal!r}")
    scale = q.shape[-1] ** -0.5 if scale is None else _check_scale(scale)
    return ops.attention_forward(q, k, v, causal, scale, _pick_backend(backend, q))


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of a and b together, from attention over each. Differentiable.

    With L = log(exp(L_a) + exp(L_b)), out = exp(L_a - L) out_a + exp(L_b - L) out_b: each part weighs as much as its
    share of the softmax's denominator. Commutative, and associative up to rounding; a part without keys (lse = -inf)
    changes nothing. Ring attention and split-KV decoding are this function (Liu et al. 2023, arXiv:2310.01889).

    Args: out_a, out_b (..., N, Dv); lse_a, lse_b (..., N), natural logarithm.
    Returns: out (..., N, Dv) in the dtype of out_a, and lse (..., N) in that of lse_a.
    """
    for name, out, lse in (("a", out_a, lse_a), ("b", out_b, lse_b)):
        _require_tensor(f"out_{name}", out)
        _require_tensor(f"lse_{name}", lse)
        _require(
            out.shape[:-1] == lse.shape and out.ndim > 0,
            ValueError,
            lambda: f"lse_{name} must have the shape of out_{name} without its last dimension, "
            f"got {tuple(lse.shape)} for out_{name} {tuple(out.shape)}",
        )
    _require(
        out_a.shape == out_b.shape,
        ValueError,
        lambda: f"out_b must have the shape of out_a, got {tuple(out_b.shape)} and {tuple(out_a.shape)}",
    )
    peak = torch.maximum(lse_a, lse_b).detach()
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weight_a, weight_b = (lse_a - peak).exp(), (lse_b - peak).exp()
    total = weight_a + weight_b
    empty = total == 0  # neither part had a key
    total = total.masked_fill(empty, 1.0)
    out = (out_a * (weight_a / total)[..., None] + out_b * (weight_b / total)[..., None]).to(out_a.dtype)
    lse = (peak + total.log()).masked_fill(empty, float("-inf")).to(lse_a.dtype)
    return out, lse


def available_backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """For each backend: None if it can run on `device` (default: the GPU if there is one), else the reason it cannot."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "triton": why_no_triton(device),
        "hopper": "the Hopper kernels are not part of this version",
        "torch": None,
    }


def _require(holds: bool, error: type[Exception], message: Callable[[], str]) -> None:
    """The message is made when it is needed: torch.compile cannot make text of sizes it does not know yet."""
    if not holds:
        raise error(message())


def _require_tensor(name: str, x: object) -> None:
    _require(isinstance(x, Tensor), TypeError, lambda: f"{name} must be a torch.Tensor, got {type(x).__name__}")


def _reject_unwritten(window, attn_mask, key_padding_mask, alibi_slopes, softcap, dropout_p) -> None:
    """Arguments whose names are settled and whose kernels are not written yet."""
    for name, value in (
        ("window", window),
        ("attn_mask", attn_mask),
        ("key_padding_mask", key_padding_mask),
        ("alibi_slopes", alibi_slopes),
        ("softcap", softcap),
    ):
        _require(value is None, NotImplementedError, lambda: f"{name} is not implemented yet; it must be None, got {_show(value)}")
    check_probability("dropout_p", dropout_p)
    _require(
        dropout_p == 0.0,
        NotImplementedError,
        lambda: f"dropout_p: dropout of attention weights is not implemented yet; it must be 0.0, got {dropout_p!r}",
    )


def _show(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def check_probability(name: str, p: object) -> None:
    """Raise unless p is a number with 0 <= p < 1."""
    _require(
        isinstance(p, (int, float)) and not isinstance(p, bool),
        TypeError,
        lambda: f"{name} must be a number, got {type(p).__name__}",
    )
    _require(0.0 <= p < 1.0, ValueError, lambda: f"{name} must be at least 0 and less than 1, got {p!r}")


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A custom operator is not autocast by itself: cast here, as SDPA does."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require_tensor(name, x)
    device = q.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require(x.layout == torch.strided and not x.is_nested, TypeError, lambda: f"{name} must be a dense tensor, got {x.layout}")
        _require(
            x.ndim == 4,
            ValueError,
            lambda: f"{name} must have 4 dimensions (batch, heads, seq, head_dim), got {x.ndim}: {tuple(x.shape)}",
        )
        _require(
            x.dtype in DTYPES,
            TypeError,
            lambda: f"{name} must be float16, bfloat16, float32 or float64, got {str(x.dtype).removeprefix('torch.')}",
        )
        _require(x.dtype == q.dtype, TypeError, lambda: f"{name} must have the dtype of q, got {x.dtype} and {q.dtype}")
        _require(x.device == q.device, ValueError, lambda: f"{name} must be on the device of q, got {x.device} and {q.device}")
        _require(
            1 <= x.shape[3] <= MAX_HEAD_DIM,
            NotImplementedError if x.shape[3] > MAX_HEAD_DIM else ValueError,
            lambda: f"{name}: head_dim must be between 1 and {MAX_HEAD_DIM}, got {x.shape[3]}",
        )
    _check_shapes(tuple(q.shape), tuple(k.shape), tuple(v.shape))
    return q, k, v


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    for name, shape in (("k", k), ("v", v)):
        _require(
            shape[0] == q[0], ValueError, lambda: f"{name} must have the batch size of q, got {shape[0]} and {q[0]}"
        )
    _require(k[3] == q[3], ValueError, lambda: f"k must have the head_dim of q, got {k[3]} and {q[3]}")
    _require(
        v[1:3] == k[1:3],
        ValueError,
        lambda: f"v must have the heads and the length of k, got (heads, seq) = {v[1:3]} and {k[1:3]}",
    )
    _require(
        q[1] == k[1] or (k[1] > 0 and q[1] % k[1] == 0),
        ValueError,
        lambda: f"the number of heads of q must be a multiple of that of k and v, got {q[1]} and {k[1]}",
    )


def _check_scale(scale: object) -> float:
    _require(
        isinstance(scale, (int, float)) and not isinstance(scale, bool),
        TypeError,
        lambda: f"scale must be a Python number (to learn a scale, multiply q by it), got {type(scale).__name__}",
    )
    _require(math.isfinite(scale) and scale > 0, ValueError, lambda: f"scale must be positive and finite, got {scale!r}")
    return float(scale)


def _pick_backend(backend: object, q: Tensor) -> str:
    _require(isinstance(backend, str), TypeError, lambda: f"backend must be a string, got {type(backend).__name__}")
    _require(backend in BACKENDS, ValueError, lambda: f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        # On a CPU Triton only interprets, which is for learning; before sm_80 the tiles do not fit.
        fast = q.is_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)
        return "triton" if fast and _why_not("triton", q) is None else "torch"
    reason = _why_not(backend, q)
    _require(reason is None, NotImplementedError, lambda: f"backend={backend!r} cannot serve this: {reason}; backend='torch' can")
    return backend


def _why_not(backend: str, q: Tensor) -> str | None:
    """None if `backend` can serve tensors like q, else the reason."""
    reason = available_backends(q.device)[backend]
    if backend != "triton" or reason is not None:
        return reason
    if q.dtype == torch.bfloat16 and interpreting():
        return "Triton's interpreter computes bfloat16 wrongly (use float16 or float32)"
    if q.dtype == torch.float64 and not interpreting():
        return "the kernels accumulate in float32 on a GPU, which would waste float64 inputs"
    return None
