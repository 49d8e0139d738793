"""The same attention as `torch.nn` modules."""
from collections.abc import Callable

from torch import Tensor, nn

from flash_edu.attention import check_probability, flash_attention


class FlashAttention(nn.Module):
    """`flash_attention` with its options set once: FlashAttention(causal=True)(q, k, v).

    q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv) -> (B, Hq, Nq, Dv). No parameters.
    Not implemented yet, and raising NotImplementedError by name: dropout, window, softcap, attn_mask, key_padding_mask.
    """

    def __init__(
        self,
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
    ):
        super().__init__()
        check_probability("dropout", dropout)
        for name, value, default in (("dropout", dropout, 0.0), ("window", window, None), ("softcap", softcap, None)):
            if value != default:
                raise NotImplementedError(f"{name} is not implemented yet; it must be {default}, got {value!r}")
        self.causal, self.scale = causal, scale

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        return flash_attention(
            q, k, v, causal=self.causal, scale=self.scale, attn_mask=attn_mask, key_padding_mask=key_padding_mask
        )

    def extra_repr(self) -> str:
        return f"causal={self.causal}" + ("" if self.scale is None else f", scale={self.scale}")


class MultiHeadFlashAttention(nn.Module):
    """Multi-head attention with its projections: (B, N, d_model) -> (B, N, d_model).

    Args:
        d_model: width of the input and the output.
        num_heads: query heads; d_model must be a multiple of it. head_dim = d_model / num_heads, at most 256.
        causal: each position attends to itself and those before it.
        dropout: applied to the output of the last projection, in training only. (Dropout of the attention weights, inside
            the kernel, is not implemented yet.)
        num_kv_heads: key/value heads, a divisor of num_heads; fewer make the KV cache smaller (grouped-query attention,
            Ainslie et al. 2023, arXiv:2305.13245). Default: num_heads.
        bias: whether the projections have one.
        attention: what to call instead of `flash_attention`: any function (q, k, v, *, causal) -> out with its shapes.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        causal: bool = False,
        dropout: float = 0.0,
        num_kv_heads: int | None = None,
        bias: bool = True,
        *,
        attention: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_probability("dropout", dropout)
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads, got {d_model} and {num_heads}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        self.head_dim = d_model // num_heads
        self.causal = causal
        self.attention = flash_attention if attention is None else attention
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor | None = None, key_padding_mask: Tensor | None = None) -> Tensor:
        """x (B, N, d_model) attends to itself, or to context (B, Nk, d_model): cross-attention."""
        if key_padding_mask is not None:
            raise NotImplementedError("key_padding_mask is not implemented yet; it must be None")
        context = x if context is None else context
        q = self._split(self.q_proj(x))  # (B, H, N, head_dim)
        k = self._split(self.k_proj(context))  # (B, Hkv, Nk, head_dim)
        v = self._split(self.v_proj(context))  # (B, Hkv, Nk, head_dim)
        out = self.attention(q, k, v, causal=self.causal)  # (B, H, N, head_dim)
        return self.dropout(self.out_proj(out.transpose(1, 2).flatten(2)))  # (B, N, d_model)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, H * head_dim) -> (B, H, N, head_dim), a view: the kernels read any strides."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, causal={self.causal}"
