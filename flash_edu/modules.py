"""The same attention as `torch.nn` modules."""
from collections.abc import Callable

from torch import Tensor, nn

from flash_edu import arguments
from flash_edu.attention import flash_attention

Window = tuple[int | None, int | None]


class FlashAttention(nn.Module):
    """`flash_attention` with its options set once: FlashAttention(causal=True)(q, k, v). No parameters.

    Args: as in `flash_attention`. dropout is its dropout_p, in training mode only: `eval()` switches it off.
    """

    def __init__(
        self,
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
        window: Window | None = None,
        softcap: float | None = None,
    ):
        super().__init__()
        _check_options(causal, dropout, window, softcap)
        if scale is not None:
            arguments.check_scale(scale)
        self.causal, self.dropout, self.scale, self.window, self.softcap = causal, dropout, scale, window, softcap

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv) -> (B, Hq, Nq, Dv). Masks: True = attend, True = a real token."""
        return flash_attention(
            q, k, v, causal=self.causal, scale=self.scale, window=self.window, softcap=self.softcap,
            attn_mask=attn_mask, key_padding_mask=key_padding_mask, dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in ("dropout", "scale", "window", "softcap")}
        return _said(f"causal={self.causal}", options)


class MultiHeadFlashAttention(nn.Module):
    """Multi-head attention with its projections: (B, N, d_model) -> (B, N, d_model).

    Args:
        d_model: width of the input and the output.
        num_heads: query heads; d_model must be a multiple of it. head_dim = d_model / num_heads, at most 256.
        causal: each position attends to itself and those before it.
        dropout: the share of attention weights that is dropped, inside the kernel, in training mode only; as in
            nn.MultiheadAttention. What the last projection gives is not dropped: that is for the block around this module.
        num_kv_heads: key/value heads, a divisor of num_heads; fewer make the KV cache smaller (grouped-query attention,
            Ainslie et al. 2023, arXiv:2305.13245). Default: num_heads.
        bias: whether the projections have one.
        window, softcap: as in `flash_attention`.
        attention: what to call instead of `flash_attention`: any function (q, k, v, *, causal) -> out with its shapes. It is given
            attn_mask, key_padding_mask, window, softcap and dropout_p too, but only those that are asked for.

    A call may bring key_padding_mask (B, Nk), True = a real token, and attn_mask, which broadcasts to (B, H, N, Nk): True =
    attend, or floating point, added to the scores. In nn.MultiheadAttention both booleans are the other way round.
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
        window: Window | None = None,
        softcap: float | None = None,
        attention: Callable[..., Tensor] | None = None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_options(causal, dropout, window, softcap)
        if num_heads < 1 or d_model % num_heads:
            raise ValueError(f"d_model must be a multiple of num_heads, got {d_model} and {num_heads}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        self.head_dim = d_model // num_heads
        self.causal, self.dropout, self.window, self.softcap = causal, dropout, window, softcap
        self.attention = flash_attention if attention is None else attention
        self.q_proj = nn.Linear(d_model, d_model, bias=bias)
        self.k_proj = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """x (B, N, d_model) attends to itself, or to context (B, Nk, d_model): cross-attention."""
        context = x if context is None else context
        q = self._split(self.q_proj(x))  # (B, H, N, head_dim)
        k = self._split(self.k_proj(context))  # (B, Hkv, Nk, head_dim)
        v = self._split(self.v_proj(context))  # (B, Hkv, Nk, head_dim)
        asked = self._asked(key_padding_mask=key_padding_mask, attn_mask=attn_mask)
        out = self.attention(q, k, v, causal=self.causal, **asked)  # (B, H, N, head_dim)
        return self.out_proj(out.transpose(1, 2).flatten(2))  # (B, N, d_model)

    def _split(self, x: Tensor) -> Tensor:
        """(B, N, H * head_dim) -> (B, H, N, head_dim), a view: the kernels read any strides."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _asked(self, **masks: Tensor | None) -> dict[str, object]:
        """What `attention` is asked for besides. The rest is not named, so that any function of q, k, v and causal will do."""
        dropout_p = self.dropout if self.training and self.dropout > 0 else None
        options = {"window": self.window, "softcap": self.softcap, "dropout_p": dropout_p, **masks}
        return {name: value for name, value in options.items() if value is not None}

    def extra_repr(self) -> str:
        options = {name: getattr(self, name) for name in ("dropout", "window", "softcap")}
        return _said(f"head_dim={self.head_dim}, causal={self.causal}", options)


def _check_options(causal: object, dropout: object, window: object, softcap: object) -> None:
    arguments.check_flag("causal", causal)
    arguments.check_probability("dropout", dropout)
    arguments.check_window(window)
    arguments.check_softcap(softcap)


def _said(first: str, options: dict[str, object]) -> str:
    """For print(module): what is set."""
    return ", ".join([first] + [f"{name}={value}" for name, value in options.items() if value not in (None, 0.0)])
