"""The functions a user calls: they check their arguments, pick a backend, and hand over to the operators in ops.py."""
import torch
from torch import Tensor

from flash_edu import arguments, ops
from flash_edu.arguments import require, require_tensor
from flash_edu.backends import pick_backend
from flash_edu.patterns import Pattern
from flash_edu.philox import draw_seed
from flash_edu.rules import Rules, four_dims, limits, two_dims


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    pattern: Pattern | None = None,
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
        scale: what the scores are multiplied by; 1 / sqrt(D) if None.
        window: (left, right): query i attends to keys i + Nk - Nq - left .. i + Nk - Nq + right; -1 or None: no limit on
            that side. Tiles outside are skipped. (Child et al. 2019; Beltagy et al. 2020)
        attn_mask: any shape that broadcasts to (B, Hq, Nq, Nk). bool: True = attend. Floating point: added to the scores;
            gets a gradient if it requires one.
        key_padding_mask: (B, Nk) bool, True = a real token. What the other tokens hold does not matter, NaN included.
        alibi_slopes: (Hq,) or (B, Hq): slope * |i + Nk - Nq - j| is subtracted from the score (Press et al. 2022).
        softcap: c * tanh(s / c) takes the place of each scaled score s (Gemma 2, section 2).
        sinks: (Hq,), one more score in every row's softmax, with a value of 0; gets a gradient (as in GPT-OSS).
        pattern: your own functions for scores and masks, see `flash_edu.Pattern`.
        dropout_p: the share of attention weights that is set to 0, in training; the others are divided by 1 - dropout_p.
            Which ones follows from torch's generator of the device (`torch.manual_seed`).
        backend: "triton" (CUDA, or a CPU under TRITON_INTERPRET=1), "torch" (any device), or "auto": the fastest that
            supports the request. `flash_edu.available_backends()` tells which there are.

    The order is: scale, softcap, ALiBi and float mask added, the pattern's score_mod; then everything that hides.

    Returns:
        out (B, Hq, Nq, Dv), dtype of q. A query with nothing to attend to gives 0, and gradients of 0.

    Raises:
        TypeError, ValueError: an argument breaks a rule; the message names argument, rule and value.
        NotImplementedError: no backend, or not the named one, can serve the request; also for a gradient of a gradient, and
            for forward-mode derivatives.

    Works under torch.compile(fullgraph=True), torch.export, autocast, activation checkpointing, CUDA graphs, DDP, and the
    transforms grad, vjp, jacrev and vmap of torch.func. (vmap makes one larger batch; not of a pattern, and of dropout only
    with randomness="different".)

    Under autocast, q, k and v are cast to the autocast dtype, as SDPA does; masks, slopes and sinks keep theirs. fp32 inputs are
    multiplied to fp32 accuracy (on a GPU as three TF32 products each), unless PyTorch's own fp32 products are allowed to be TF32.
    """
    return flash_attention_with_lse(
        q, k, v, causal=causal, scale=scale, window=window, attn_mask=attn_mask, key_padding_mask=key_padding_mask,
        alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, pattern=pattern, dropout_p=dropout_p, backend=backend,
    )[0]  # fmt: skip


def flash_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    attn_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    pattern: Pattern | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `flash_attention`, and the log-sum-exp of each row of scores. Both are differentiable.

    Returns:
        out (B, Hq, Nq, Dv), and lse (B, Hq, Nq): natural logarithm, fp32 (fp64 for fp64 inputs), -inf for a query with
        nothing to attend to. With it, partial results over different keys can be merged: see `merge_attention`. A sink is
        part of the sum; dropout is not.
    """
    q, k, v = arguments.check_tensors(*arguments.autocast(q, k, v))
    rules = dense_rules(
        q, k, causal=causal, scale=scale, window=window, attn_mask=attn_mask, key_padding_mask=key_padding_mask,
        alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, pattern=pattern, dropout_p=dropout_p,
    )  # fmt: skip
    return _attend(q, k, v, rules, backend)


def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention in each of many sequences of their own lengths, which lie one behind the other, without padding.

    Sequence b has the queries q[cu_seqlens_q[b] : cu_seqlens_q[b + 1]] and the keys k[cu_seqlens_k[b] : cu_seqlens_k[b + 1]];
    either may be none. Every rule of `flash_attention` holds within each sequence. See `flash_edu.pack` and `unpack`.

    Args:
        q: (total_q, Hq, D). k: (total_k, Hkv, D). v: (total_k, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 on q's device: 0, and where each sequence ends. They are not checked: that
            would wait for the GPU.
        max_seqlen_q, max_seqlen_k: at least the longest length; rows beyond it would not be computed.
        alibi_slopes: (Hq,) or (B, Hq). The other arguments are those of `flash_attention`.

    Returns:
        out (total_q, Hq, Dv).
    """
    return flash_attention_varlen_with_lse(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal, scale=scale, window=window,
        alibi_slopes=alibi_slopes, softcap=softcap, sinks=sinks, dropout_p=dropout_p, backend=backend,
    )[0]  # fmt: skip


def flash_attention_varlen_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `flash_attention_varlen`, and the log-sum-exp of each row of scores: out (total_q, Hq, Dv) and lse (total_q, Hq)."""
    q, k, v = arguments.autocast(q, k, v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.ndim == 3, ValueError, lambda: f"{name} must have 3 dimensions (total, heads, head_dim), got {x.ndim}: {tuple(x.shape)}")
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, H, total, D)
    arguments.check_tensors(q, k, v)
    arguments.check_cu_seqlens(cu_seqlens_q, cu_seqlens_k, q)
    arguments.check_length("max_seqlen_q", max_seqlen_q)
    arguments.check_length("max_seqlen_k", max_seqlen_k)
    arguments.check_slopes(alibi_slopes, cu_seqlens_q.shape[0] - 1, q.shape[1], q)
    rules = _rules(
        q, causal, scale, window, softcap, sinks, dropout_p,
        slopes=two_dims(alibi_slopes), cu_q=cu_seqlens_q, cu_k=cu_seqlens_k, max_q=max_seqlen_q, max_k=max_seqlen_k,
    )  # fmt: skip
    out, lse = _attend(q, k, v, rules, backend)
    return out.squeeze(0).transpose(0, 1), lse.squeeze(0).transpose(0, 1)  # not [0], whose gradient is a copy


def dense_rules(
    q, k, *, causal=False, scale=None, window=None, attn_mask=None, key_padding_mask=None, alibi_slopes=None, softcap=None,
    sinks=None, pattern=None, dropout_p=0.0,
) -> Rules:  # fmt: skip
    """The rules of `flash_attention`'s arguments, once these are checked."""
    arguments.check_mask(attn_mask, q, k)
    arguments.check_padding(key_padding_mask, q, k)
    arguments.check_slopes(alibi_slopes, q.shape[0], q.shape[1], q)
    arguments.check_pattern(pattern, q)
    return _rules(
        q, causal, scale, window, softcap, sinks, dropout_p, mask=four_dims(attn_mask), padding=key_padding_mask,
        slopes=two_dims(alibi_slopes), pattern=pattern and pattern.name, buffers=list(pattern.buffers) if pattern else [],
    )  # fmt: skip


def _rules(q, causal, scale, window, softcap, sinks, dropout_p, **others) -> Rules:
    """The rules that every kind of call has, and its others."""
    arguments.check_flag("causal", causal)
    arguments.check_window(window)
    arguments.check_sinks(sinks, q)
    arguments.check_probability("dropout_p", dropout_p)
    left, right = limits(causal, window)
    return Rules(
        scale=q.shape[-1] ** -0.5 if scale is None else arguments.check_scale(scale),
        left=left, right=right, softcap=arguments.check_softcap(softcap), sinks=sinks,
        dropout_p=float(dropout_p), seed=draw_seed(q.device) if dropout_p > 0 else None, **others,
    )  # fmt: skip


def _attend(q: Tensor, k: Tensor, v: Tensor, rules: Rules, backend: str) -> tuple[Tensor, Tensor]:
    backend = pick_backend(backend, q, rules.pattern)
    return ops.attention_forward(q, k, v, backend, *ops.arguments(rules))


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the keys of a and b together, from attention over each. Differentiable.

    With L = log(exp(L_a) + exp(L_b)), out = exp(L_a - L) out_a + exp(L_b - L) out_b: each part weighs as much as its
    share of the softmax's denominator. Commutative, and associative up to rounding; a part without keys (lse = -inf)
    changes nothing. Ring attention and split-KV decoding are this function (Liu et al. 2023, arXiv:2310.01889).

    Args: out_a, out_b (..., N, Dv); lse_a, lse_b (..., N), natural logarithm.
    Returns: out (..., N, Dv) in the dtype of out_a, and lse (..., N) in that of lse_a.
    """
    for name, out, lse in (("a", out_a, lse_a), ("b", out_b, lse_b)):
        require_tensor(f"out_{name}", out)
        require_tensor(f"lse_{name}", lse)
        require(
            out.shape[:-1] == lse.shape and out.ndim > 0,
            ValueError,
            lambda: f"lse_{name} must have the shape of out_{name} without its last dimension, "
            f"got {tuple(lse.shape)} for out_{name} {tuple(out.shape)}",
        )
    require(
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
