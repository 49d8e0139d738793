"""Hugging Face models with flash_edu's attention, from transformers 5.4 on.

    from transformers import AutoModelForCausalLM
    from flash_edu.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", attn_implementation="edu_attention")

transformers asks twice: once per forward for a mask (`make_mask`), which the model passes on unread, and in each layer for
attention under that mask (`attend`). A matrix (B, 1, Nq, Nk) is made only where the rules of `flash_attention` cannot say the
same: for masks of a model's own making, and for a static cache in a compiled graph.
"""
import functools
import importlib.metadata
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

from flash_edu.arguments import require
from flash_edu.attention import BACKENDS, flash_attention, flash_attention_varlen

OLDEST = (5, 4)  # since then masks are asked for by q_length and q_offset
# A name with one of these in it is transformers' own: kernels are looked for, or SDPA's needs are checked.
TAKEN = ("flash", "sdpa", "flex_attention", "eager", "paged", "|", "/", ":")
UNSERVED = ("sinks", "indices", "block_indices", "block_table")  # a few models pass these, and mean another result


def register(name: str = "edu_attention", *, backend: str = "auto") -> str:
    """Make `name` an attn_implementation of every model that lets its attention be chosen.

    Args:
        name: what to call it. It cannot be "flash_edu": a name with "flash" in it is taken for one of FlashAttention's own, whose
            kernels transformers then looks for, or replaces by those that a model (GPT-OSS, say) was tested with.
        backend: as in `flash_attention`. Calling again changes it.

    Returns:
        name, for `model.set_attn_implementation(register())`.

    Served: causal and windowed masks, padding, dynamic and static caches, grouped heads, softcap, sinks, position biases, dropout,
    and masks of a model's or a user's own, bool or float. Packed sequences are told apart by position_ids, which makes a matrix,
    or by cu_seq_lens_q and cu_seq_lens_k with an attention_mask of ones, which makes none. Weights are not returned:
    output_attentions=True warns, and gives None for each layer.

    Raises:
        ValueError: transformers gives the name a meaning, or another attention has it; or backend is none.
        ImportError: transformers is older than 5.4.
    """
    version = importlib.metadata.version("transformers")
    found = tuple(int(part) for part in version.split(".")[:2])
    require(found >= OLDEST, ImportError, lambda: f"transformers must be 5.4 or newer, got {version}")
    require(backend in BACKENDS, ValueError, lambda: f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    taken = [part for part in TAKEN if part in name]
    require(not taken, ValueError, lambda: f"name: transformers gives {taken[0]!r} in a name its own meaning, got {name!r}")
    known = AttentionInterface().get(name)
    ours = known is None or getattr(known, "func", None) is attend
    require(ours, ValueError, lambda: f"name must be free, got {name!r}, which is another attention's")
    AttentionInterface.register(name, functools.partial(attend, backend=backend))
    AttentionMaskInterface.register(name, make_mask)  # without one of the same name, models get no mask at all, in silence
    return name


class Band(NamedTuple):
    """A mask without a matrix, for `length` keys. The last query stands at the last of the first `keys` of them; behind it lies what
    a static cache has not filled. Each query sees the keys from `left` before its own place to `right` after it (None: no limit),
    and of these the real ones."""

    length: int
    keys: int
    left: int | None = None
    right: int | None = None
    padding: Tensor | None = None  # (B, keys) bool, True = a real token

    @property
    def ndim(self) -> int:
        """transformers asks: it takes a mask of 2 dimensions for one of padding, not yet read."""
        return 4


# --- a mask, once per forward -----------------------------------------------------------------------------


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | Band | None = None,
    *,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    config: object = None,
    **others,
) -> Tensor | Band | None:
    """A mask for queries at the places q_offset + i and keys at kv_offset + j. attention_mask: (B, places), True = a real token.

    Returns a Band, or bool (B, 1, Nq, Nk), True = attend, or None if every query sees every key. A causal mask is never None:
    not every layer says of itself that it is causal.
    """
    if isinstance(attention_mask, Band):  # generate() has asked before the model does
        return attention_mask
    sides = _sides(kv_offset + kv_length, mask_function, local_size, allow_is_causal_skip, allow_is_bidirectional_skip, config)
    keys = kv_length if sides == (None, None) else _keys_in_use(q_length, kv_length, q_offset, kv_offset)
    if sides is None or keys is None or (keys < kv_length and sides[1] != 0):  # the last: keys behind the last query are seen
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False, config=config, **others,
        )  # fmt: skip
    left, right = (side if side is not None and side < keys - 1 else None for side in sides)
    padding = _padding(attention_mask, keys, kv_offset)
    if sides == (None, None):
        return None if padding is None else padding[:, None, None, :].expand(batch_size, 1, q_length, keys)
    return Band(kv_length, keys, left, right, padding)


def _sides(
    places: int, mask_function: Callable, local_size: int | None, causal: bool, bidirectional: bool, config: object
) -> tuple[int | None, int | None] | None:
    """How many keys a query sees before and after its own; None: mask_function says more than that.

    causal, bidirectional: may a mask of that kind be left out? A model that adds to its mask allows neither. A local_size may be
    that of a window or that of chunks, and hides nothing if all places are within it.
    """
    if bidirectional and mask_function is bidirectional_mask_function:
        return None, None
    if causal and (mask_function is causal_mask_function or (local_size is not None and places <= local_size)):
        return None, 0
    window = local_size is not None and local_size == getattr(config, "sliding_window", None)
    if not window or getattr(config, "attention_chunk_size", None) is not None:
        return None
    if bidirectional:
        return local_size, local_size
    return (local_size - 1, 0) if causal else None


def _keys_in_use(q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int) -> int | None:
    """How many keys there are up to the last query's own place.

    None: its place is not among the keys, or it is a number that a traced graph cannot read.
    """
    if isinstance(q_offset, Tensor):
        if is_tracing(q_offset):
            return None
        q_offset = int(q_offset)  # waits for the GPU, once per forward
    keys = q_offset - kv_offset + q_length
    return keys if q_length <= keys <= kv_length else None


def _padding(attention_mask: Tensor | None, keys: int, kv_offset: int) -> Tensor | None:
    """(B, keys) bool: which are real tokens; None if all are."""
    if attention_mask is None:
        return None
    missing = kv_offset + keys - attention_mask.shape[1]
    padding = torch.nn.functional.pad(attention_mask.bool(), (-kv_offset, missing))  # a negative number cuts off
    if not is_tracing(padding) and padding.all():  # waits for the GPU, once per forward
        return None
    return padding


# --- attention, in each layer -----------------------------------------------------------------------------


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Band | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    *,
    backend: str = "auto",
    **others,
) -> tuple[Tensor, None]:
    """Attention of a layer, (B, Nq, Hq, Dv), contiguous; and None, where eager attention has its weights.

    Args:
        query: (B, Hq, Nq, D). key, value: (B, Hkv, Nk, D), (B, Hkv, Nk, Dv).
        attention_mask: from make_mask, or a matrix that broadcasts to (B, Hq, Nq, Nk): bool, or added to the scores. Unless it is
            None it says everything, and is_causal and sliding_window only repeat it.
        s_aux: (Hq,), the sinks. position_bias: like a matrix, added to the scores. Both may get gradients.
        cu_seq_lens_q, cu_seq_lens_k: where each of the sequences begins that are packed into a batch of one, and where the last
            one ends. max_length_q, max_length_k: the longest.
    """
    _check_others(others)
    mask = attention_mask
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        mask = _default_band(query.shape[2], key.shape[2], causal, sliding_window)
    options = {"scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout, "backend": backend}
    if cu_seq_lens_q is not None:
        cu = [x.to(torch.int32) for x in (cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k)]
        if isinstance(mask, Band):
            require(position_bias is None, NotImplementedError, lambda: "flash_edu does not serve position_bias with cu_seq_lens_q")
            longest = (max_length_q or query.shape[2], max_length_k or key.shape[2])
            return _attend_packed(query, key, value, mask, cu, longest, options), None
        mask = _hide(mask, ~_same_sequence(cu, query.shape[2], key.shape[2]))
    if isinstance(mask, Band):
        masks = _of_band(mask, position_bias, key.shape[2])
        key, value = key[:, :, : mask.keys], value[:, :, : mask.keys]
    else:
        masks = _of_matrix(mask, position_bias, query.shape[0])
    out = flash_attention(query, key, value, **masks, **options)
    return out.transpose(1, 2).contiguous(), None


def _check_others(others: dict) -> None:
    unserved = [name for name in UNSERVED if others.get(name) is not None]
    require(not unserved, NotImplementedError, lambda: f"flash_edu does not serve {unserved[0]}, which this model passes")
    if others.get("output_attentions"):
        warnings.warn("flash_edu makes no attention weights: output_attentions=True gives None (try 'eager')", stacklevel=3)


def _default_band(nq: int, nk: int, causal: bool, sliding_window: int | None) -> Band:
    """What no mask means: a causal layer of more than one query starts at the first key, which is how SDPA aligns it, and what
    lies behind the last query is a static cache's empty room. One query sees all, for it is the last."""
    require(nk >= nq or not causal, ValueError, lambda: f"causal attention of {nq} queries over {nk} keys needs an attention_mask")
    keys = nq if causal and nq > 1 else nk
    if sliding_window is None or keys <= sliding_window:
        return Band(nk, keys, right=0 if causal else None)
    require(causal, NotImplementedError, lambda: f"sliding_window={sliding_window} of a layer that is not causal needs an attention_mask")
    return Band(nk, keys, left=sliding_window - 1, right=0)


def _of_band(band: Band, bias: Tensor | None, nk: int) -> dict:
    """The arguments of flash_attention that say the same as a Band, and add a bias."""
    require(
        band.length == nk,
        NotImplementedError,
        lambda: f"flash_edu does not serve a model that has {nk} keys under a mask that it made for {band.length}",
    )
    bias = bias if bias is None else bias[..., : band.keys]
    return {"window": (band.left, band.right), "key_padding_mask": band.padding, "attn_mask": bias}


def _of_matrix(mask: object, bias: Tensor | None, batch: int) -> dict[str, Tensor | None]:
    """The arguments of flash_attention that say the same as a matrix, and add a bias. A boolean matrix whose rows are one row, for
    all heads, is one of padding, and padding is skipped."""
    require(
        isinstance(mask, Tensor) and mask.ndim == 4,
        TypeError,
        lambda: f"attention_mask must be a tensor of 4 dimensions, got {tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}",
    )
    if mask.dtype == torch.bool and mask.shape[1] == 1 and (mask.shape[2] == 1 or mask.stride(2) == 0):
        return {"key_padding_mask": mask[:, 0, 0].expand(batch, -1), "attn_mask": bias}
    if bias is None:
        return {"attn_mask": mask}
    return {"attn_mask": _hide(bias, ~mask) if mask.dtype == torch.bool else bias + mask}


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, band: Band, cu: list[Tensor], longest: tuple[int, int], options: dict
) -> Tensor:
    """Attention within each of the sequences of a batch of one."""
    whole = query.shape[0] == 1 and band.padding is None and band.keys == key.shape[2]
    require(whole, ValueError, lambda: f"cu_seq_lens_q needs a batch of one without padding and cache, got a batch of {query.shape[0]}")
    rows = (x[0].transpose(0, 1) for x in (query, key, value))  # (total, heads, D)
    window = (band.left, band.right)
    return flash_attention_varlen(*rows, *cu, *map(int, longest), window=window, **options)[None].contiguous()


def _same_sequence(cu: list[Tensor], nq: int, nk: int) -> Tensor:
    """(1, 1, Nq, Nk) bool: is the key in the query's sequence?"""
    rows, cols = (torch.bucketize(torch.arange(n, device=x.device), x[1:], right=True) for n, x in zip((nq, nk), cu))
    return (rows[:, None] == cols[None, :])[None, None]


def _hide(mask: Tensor, hidden: Tensor) -> Tensor:
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, float("-inf"))
