"""Wrong calls: each message names the argument, the rule and the value it got."""
import pytest
import torch
from some_patterns import a_number, capped, prefix_lm

from flash_edu import (
    FlashAttention,
    MultiHeadFlashAttention,
    Pattern,
    flash_attention,
    flash_attention_varlen,
    flash_attention_with_lse,
    merge_attention,
    pack,
    unpack,
)


def x(*shape, **kwargs):
    return torch.zeros(*(shape or (2, 4, 8, 16)), **kwargs)


def call(q=None, k=None, v=None, **kwargs):
    q = x() if q is None else q
    return flash_attention(q, x() if k is None else k, x() if v is None else v, **kwargs)


def starts(*numbers, dtype=torch.int32):
    return torch.tensor(numbers or (0, 3, 8), dtype=dtype)


def packed(q=None, k=None, v=None, cu_q=None, cu_k=None, max_q=8, max_k=8, **kwargs):
    q, k, v = (x(8, 4, 16) if y is None else y for y in (q, k, v))
    cu_q, cu_k = (starts() if y is None else y for y in (cu_q, cu_k))
    return flash_attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, **kwargs)


def true(*shape, **kwargs):
    return torch.ones(*shape, dtype=torch.bool, **kwargs)


WRONG_CALLS = {
    "q is a list": (lambda: call(q=[1.0]), TypeError, ["q", "torch.Tensor", "list"]),
    "k is None-like": (lambda: call(k="keys"), TypeError, ["k", "torch.Tensor", "str"]),
    "v is an array": (lambda: flash_attention(x(), x(), 3.0), TypeError, ["v", "torch.Tensor", "float"]),
    "q has 3 dimensions": (lambda: call(q=x(2, 8, 16)), ValueError, ["q", "4 dimensions", "(2, 8, 16)"]),
    "k has 5 dimensions": (lambda: call(k=x(1, 2, 4, 8, 16)), ValueError, ["k", "4 dimensions", "5"]),
    "q is sparse": (lambda: call(q=x().to_sparse()), TypeError, ["q", "dense", "sparse"]),
    "q is int": (lambda: call(q=x(dtype=torch.int64)), TypeError, ["q", "float16", "int64"]),
    "v is complex": (lambda: call(v=x(dtype=torch.complex64)), TypeError, ["v", "float16", "complex64"]),
    "q is float8": (
        lambda: call(q=x().to(torch.float8_e4m3fn)), NotImplementedError, ["q", "float8_e4m3fn", "24 times", "pass bfloat16"]
    ),
    "v is float8": (lambda: call(v=x().to(torch.float8_e5m2)), NotImplementedError, ["v", "float8_e5m2", "pass bfloat16"]),
    "dtypes differ": (lambda: call(k=x(dtype=torch.float16)), TypeError, ["k", "dtype of q", "float16", "float32"]),
    "devices differ": (lambda: call(v=x(device="meta")), ValueError, ["v", "device of q", "meta", "cpu"]),
    "head_dim too large": (lambda: call(*3 * [x(1, 1, 8, 257)]), NotImplementedError, ["q", "256", "257"]),
    "head_dim of v too large": (lambda: call(v=x(2, 4, 8, 300)), NotImplementedError, ["v", "256", "300"]),
    "head_dim 0": (lambda: call(q=x(2, 4, 8, 0)), ValueError, ["q", "head_dim", "0"]),
    "head_dims differ": (lambda: call(k=x(2, 4, 8, 32)), ValueError, ["k", "head_dim of q", "32", "16"]),
    "batches differ": (lambda: call(k=x(3, 4, 8, 16)), ValueError, ["k", "batch", "3", "2"]),
    "batch of v differs": (lambda: call(v=x(1, 4, 8, 16)), ValueError, ["v", "batch", "1", "2"]),
    "lengths of k and v differ": (lambda: call(v=x(2, 4, 9, 16)), ValueError, ["v", "length of k", "9", "8"]),
    "heads of k and v differ": (lambda: call(v=x(2, 2, 8, 16)), ValueError, ["v", "heads", "2", "4"]),
    "heads do not divide": (lambda: call(k=x(2, 3, 8, 16), v=x(2, 3, 8, 16)), ValueError, ["multiple", "4", "3"]),
    "more kv heads than heads": (lambda: call(k=x(2, 8, 8, 16), v=x(2, 8, 8, 16)), ValueError, ["multiple", "4", "8"]),
    "causal is a tensor": (lambda: call(causal=x(8, 8)), TypeError, ["causal", "True or False"]),
    "causal is 1": (lambda: call(causal=1), TypeError, ["causal", "True or False", "1"]),
    "scale is a tensor": (lambda: call(scale=x(1)), TypeError, ["scale", "number", "Tensor"]),
    "scale is a string": (lambda: call(scale="auto"), TypeError, ["scale", "number", "str"]),
    "scale is 0": (lambda: call(scale=0.0), ValueError, ["scale", "positive", "0.0"]),
    "scale is NaN": (lambda: call(scale=float("nan")), ValueError, ["scale", "finite", "nan"]),
    "scale is negative": (lambda: call(scale=-1), ValueError, ["scale", "positive", "-1"]),
    "backend unknown": (lambda: call(backend="cuda"), ValueError, ["backend", "triton", "'cuda'"]),
    "backend is None": (lambda: call(backend=None), TypeError, ["backend", "string", "NoneType"]),
    "backend hopper": (lambda: call(backend="hopper"), NotImplementedError, ["hopper", "backend='torch'"]),
    "dropout_p of 1": (lambda: call(dropout_p=1.0), ValueError, ["dropout_p", "less than 1", "1.0"]),
    "dropout_p is negative": (lambda: call(dropout_p=-0.1), ValueError, ["dropout_p", "at least 0", "-0.1"]),
    "dropout_p is a string": (lambda: call(dropout_p="0.1"), TypeError, ["dropout_p", "number", "str"]),
    "dropout_p is True": (lambda: call(dropout_p=True), TypeError, ["dropout_p", "number", "bool"]),
    "dropout_p is NaN": (lambda: call(dropout_p=float("nan")), ValueError, ["dropout_p", "at least 0", "nan"]),
    "window is a number": (lambda: call(window=4), TypeError, ["window", "pair (left, right)", "4"]),
    "window of three": (lambda: call(window=(1, 2, 3)), TypeError, ["window", "pair (left, right)", "(1, 2, 3)"]),
    "window is a tensor": (lambda: call(window=x(2)), TypeError, ["window", "pair (left, right)", "tensor"]),
    "window of floats": (lambda: call(window=(4.0, 0)), TypeError, ["window", "whole numbers or None", "(4.0, 0)"]),
    "window of True": (lambda: call(window=(True, 0)), TypeError, ["window", "whole numbers", "(True, 0)"]),
    "window of -2": (lambda: call(window=(0, -2)), ValueError, ["window", "-1 (no limit) or more", "(0, -2)"]),
    "softcap of 0": (lambda: call(softcap=0.0), ValueError, ["softcap", "positive", "0.0"]),
    "softcap is infinite": (lambda: call(softcap=float("inf")), ValueError, ["softcap", "finite", "inf"]),
    "softcap is a tensor": (lambda: call(softcap=x(1)), TypeError, ["softcap", "number", "Tensor"]),
    "softcap is True": (lambda: call(softcap=True), TypeError, ["softcap", "number", "bool"]),
    "attn_mask is a list": (lambda: call(attn_mask=[[True]]), TypeError, ["attn_mask", "torch.Tensor", "list"]),
    "attn_mask of ints": (lambda: call(attn_mask=x(8, 8, dtype=torch.int64)), TypeError, ["attn_mask", "bool", "int64"]),
    "attn_mask of bytes": (lambda: call(attn_mask=x(8, 8, dtype=torch.uint8)), TypeError, ["attn_mask", "bool", "uint8"]),
    "attn_mask is complex": (lambda: call(attn_mask=x(8, 8, dtype=torch.complex64)), TypeError, ["attn_mask", "complex64"]),
    "attn_mask of float8": (
        lambda: call(attn_mask=x(8, 8).to(torch.float8_e4m3fn)), TypeError, ["attn_mask", "float16", "float8_e4m3fn"]
    ),
    "attn_mask does not broadcast": (
        lambda: call(attn_mask=x(8, 9)), ValueError, ["attn_mask", "broadcast", "(2, 4, 8, 8)", "(8, 9)"]
    ),
    "attn_mask like a padding mask": (lambda: call(attn_mask=true(2, 8)), ValueError, ["attn_mask", "(2, 4, 8, 8)", "(2, 8)"]),
    "attn_mask of the key/value heads": (
        lambda: call(k=x(2, 2, 8, 16), v=x(2, 2, 8, 16), attn_mask=x(2, 2, 8, 8)), ValueError, ["(2, 4, 8, 8)", "(2, 2, 8, 8)"]
    ),
    "attn_mask of 5 dimensions": (lambda: call(attn_mask=x(1, 1, 1, 8, 8)), ValueError, ["attn_mask", "(1, 1, 1, 8, 8)"]),
    "attn_mask is elsewhere": (lambda: call(attn_mask=x(8, 8, device="meta")), ValueError, ["attn_mask", "device", "meta", "cpu"]),
    "attn_mask is sparse": (lambda: call(attn_mask=x(8, 8).to_sparse()), TypeError, ["attn_mask", "dense", "sparse"]),
    "key_padding_mask of ints": (
        lambda: call(key_padding_mask=x(2, 8, dtype=torch.int64)), TypeError, ["key_padding_mask", "bool", "real token", "int64"]
    ),
    "key_padding_mask of floats": (lambda: call(key_padding_mask=x(2, 8)), TypeError, ["key_padding_mask", "bool", "float32"]),
    "key_padding_mask of one batch": (
        lambda: call(key_padding_mask=true(1, 8)), ValueError, ["key_padding_mask", "(batch, Nk) = (2, 8)", "(1, 8)"]
    ),
    "key_padding_mask of the queries": (
        lambda: call(q=x(2, 4, 5, 16), key_padding_mask=true(2, 5)), ValueError, ["key_padding_mask", "(2, 8)", "(2, 5)"]
    ),
    "key_padding_mask of 4 dimensions": (
        lambda: call(key_padding_mask=true(2, 1, 1, 8)), ValueError, ["key_padding_mask", "(2, 8)", "(2, 1, 1, 8)"]
    ),
    "key_padding_mask is elsewhere": (
        lambda: call(key_padding_mask=true(2, 8, device="meta")), ValueError, ["key_padding_mask", "device of q", "meta"]
    ),
    "key_padding_mask is a list": (lambda: call(key_padding_mask=[8, 5]), TypeError, ["key_padding_mask", "torch.Tensor", "list"]),
    "alibi_slopes is a number": (lambda: call(alibi_slopes=0.5), TypeError, ["alibi_slopes", "torch.Tensor", "float"]),
    "alibi_slopes of ints": (lambda: call(alibi_slopes=torch.arange(4)), TypeError, ["alibi_slopes", "float", "int64"]),
    "alibi_slopes of too few heads": (
        lambda: call(alibi_slopes=x(3)), ValueError, ["alibi_slopes", "(heads,) = (4,)", "(2, 4)", "(3,)"]
    ),
    "alibi_slopes transposed": (lambda: call(alibi_slopes=x(4, 2)), ValueError, ["alibi_slopes", "(batch, heads) = (2, 4)", "(4, 2)"]),
    "alibi_slopes that learn": (
        lambda: call(alibi_slopes=x(4, requires_grad=True)), NotImplementedError, ["alibi_slopes", "gradient", "attn_mask"]
    ),
    "alibi_slopes are elsewhere": (lambda: call(alibi_slopes=x(4, device="meta")), ValueError, ["alibi_slopes", "device", "meta"]),
    "sinks is a number": (lambda: call(sinks=1.0), TypeError, ["sinks", "torch.Tensor", "float"]),
    "sinks of ints": (lambda: call(sinks=torch.arange(4)), TypeError, ["sinks", "float", "int64"]),
    "sinks of another shape": (lambda: call(sinks=x(1, 4)), ValueError, ["sinks", "(heads,) = (4,)", "(1, 4)"]),
    "sinks of the key/value heads": (
        lambda: call(k=x(2, 2, 8, 16), v=x(2, 2, 8, 16), sinks=x(2)), ValueError, ["sinks", "(4,)", "(2,)"]
    ),
    "sinks are elsewhere": (lambda: call(sinks=x(4, device="meta")), ValueError, ["sinks", "device of q", "meta", "cpu"]),
    "sinks are sparse": (lambda: call(sinks=x(4).to_sparse()), TypeError, ["sinks", "dense", "sparse"]),
    "pattern is a function": (lambda: call(pattern=prefix_lm), TypeError, ["pattern", "flash_edu.Pattern", "Function"]),
    "pattern is a mask": (lambda: call(pattern=x(8, 8)), TypeError, ["pattern", "flash_edu.Pattern", "Tensor"]),
    "pattern: its buffers are elsewhere": (
        lambda: call(pattern=Pattern(prefix_lm, buffers=(x(2, device="meta"),))), ValueError, ["pattern", "buffers", "meta", "cpu"]
    ),
    "pattern: its buffers learn": (
        lambda: call(pattern=Pattern(prefix_lm, buffers=(x(2, requires_grad=True),))),
        NotImplementedError,
        ["pattern", "buffers", "gradient", "attn_mask"],
    ),
    "Pattern: nothing": (lambda: Pattern(), ValueError, ["mask_mod", "score_mod", "None"]),
    "Pattern: a plain function": (lambda: Pattern(lambda b, h, i, j, buffers: i > j), TypeError, ["mask_mod", "@triton.jit", "function"]),
    "Pattern: a mask_mod as score_mod": (
        lambda: Pattern(score_mod=a_number), ValueError, ["score_mod", "(score, batch, head, i, j, buffers)", "(batch, head, i, j, buffers)"]
    ),
    "Pattern: a score_mod as mask_mod": (lambda: Pattern(capped), ValueError, ["mask_mod", "(batch, head, i, j, buffers)", "score"]),
    "Pattern: score_grad alone": (lambda: Pattern(a_number, score_grad=capped), ValueError, ["score_grad", "score_mod", "None"]),
    "Pattern: buffers are lists": (lambda: Pattern(a_number, buffers=([1, 2],)), TypeError, ["buffers", "tensors", "list"]),
    "Pattern: a single buffer": (lambda: Pattern(a_number, buffers=x(2)), TypeError, ["buffers", "tuple of tensors", "Tensor"]),
    "Pattern: buffers are strided": (lambda: Pattern(a_number, buffers=(x(4, 4).t(),)), ValueError, ["buffers", "contiguous", "(1, 4)"]),
    "Pattern: buffers are sparse": (lambda: Pattern(a_number, buffers=(x(4).to_sparse(),)), TypeError, ["buffers", "dense", "sparse"]),
    "varlen: q is a list": (lambda: packed(q=[1.0]), TypeError, ["q", "torch.Tensor", "list"]),
    "varlen: q has 4 dimensions": (lambda: packed(q=x()), ValueError, ["q", "3 dimensions (total, heads, head_dim)", "(2, 4, 8, 16)"]),
    "varlen: v has 2 dimensions": (lambda: packed(v=x(8, 64)), ValueError, ["v", "3 dimensions", "(8, 64)"]),
    "varlen: k and v of other lengths": (lambda: packed(v=x(9, 4, 16)), ValueError, ["v", "length of k", "9", "8"]),
    "varlen: heads do not divide": (lambda: packed(k=x(8, 3, 16), v=x(8, 3, 16)), ValueError, ["multiple", "4", "3"]),
    "varlen: dtypes differ": (lambda: packed(k=x(8, 4, 16, dtype=torch.float16)), TypeError, ["k", "dtype of q", "float16"]),
    "varlen: q is sparse": (lambda: packed(q=x(8, 4, 16).to_sparse()), TypeError, ["q", "dense", "sparse"]),
    "varlen: head_dim too large": (lambda: packed(*3 * [x(8, 4, 300)]), NotImplementedError, ["q", "256", "300"]),
    "varlen: cu_seqlens_q is a list": (lambda: packed(cu_q=[0, 8]), TypeError, ["cu_seqlens_q", "torch.Tensor", "list"]),
    "varlen: cu_seqlens_q is int64": (
        lambda: packed(cu_q=starts(0, 8, dtype=torch.int64)), TypeError, ["cu_seqlens_q", "int32", "int64"]
    ),
    "varlen: cu_seqlens_k of floats": (
        lambda: packed(cu_k=starts(0, 8, dtype=torch.float32)), TypeError, ["cu_seqlens_k", "int32", "float32"]
    ),
    "varlen: cu_seqlens_k of 2 dimensions": (
        lambda: packed(cu_k=starts(0, 8)[None]), ValueError, ["cu_seqlens_k", "(sequences + 1,)", "(1, 2)"]
    ),
    "varlen: cu_seqlens_q is strided": (
        lambda: packed(cu_q=starts(0, 1, 2, 3, 8, 9)[::2]), ValueError, ["cu_seqlens_q", "contiguous", "strides (2,)"]
    ),
    "varlen: cu_seqlens_q is empty": (
        lambda: packed(cu_q=torch.zeros(0, dtype=torch.int32)), ValueError, ["cu_seqlens_q", "(sequences + 1,)", "(0,)"]
    ),
    "varlen: other numbers of sequences": (
        lambda: packed(cu_k=starts(0, 8)), ValueError, ["cu_seqlens_k", "as many entries as cu_seqlens_q", "2", "3"]
    ),
    "varlen: cu_seqlens_k is elsewhere": (
        lambda: packed(cu_k=starts().to("meta")), ValueError, ["cu_seqlens_k", "device of q", "meta", "cpu"]
    ),
    "varlen: max_seqlen_q is a tensor": (
        lambda: packed(max_q=torch.tensor(8)), TypeError, ["max_seqlen_q", "Python int", "Tensor"]
    ),
    "varlen: max_seqlen_k is a float": (lambda: packed(max_k=8.0), TypeError, ["max_seqlen_k", "Python int", "float"]),
    "varlen: max_seqlen_k is True": (lambda: packed(max_k=True), TypeError, ["max_seqlen_k", "Python int", "bool"]),
    "varlen: max_seqlen_q is negative": (lambda: packed(max_q=-1), ValueError, ["max_seqlen_q", "at least 0", "-1"]),
    "varlen: slopes of other sequences": (
        lambda: packed(alibi_slopes=x(3, 4)), ValueError, ["alibi_slopes", "(batch, heads) = (2, 4)", "(3, 4)"]
    ),
    "varlen: a mask": (lambda: packed(attn_mask=true(8, 8)), TypeError, ["attn_mask"]),
    "varlen: window": (lambda: packed(window=3), TypeError, ["window", "pair", "3"]),
    "varlen: sinks": (lambda: packed(sinks=x(2)), ValueError, ["sinks", "(4,)", "(2,)"]),
    "varlen: dropout_p": (lambda: packed(dropout_p=1.0), ValueError, ["dropout_p", "less than 1", "1.0"]),
    "pack: x is a list": (lambda: pack([1.0], true(1, 1)), TypeError, ["x", "torch.Tensor", "list"]),
    "pack: real is a list": (lambda: pack(x(2, 8, 16), [8, 5]), TypeError, ["real", "torch.Tensor", "list"]),
    "pack: real of ints": (lambda: pack(x(2, 8, 16), x(2, 8, dtype=torch.int64)), TypeError, ["real", "bool", "int64"]),
    "pack: real of another shape": (lambda: pack(x(2, 8, 16), true(8, 2)), ValueError, ["real", "(batch, seq)", "(8, 2)", "(2, 8, 16)"]),
    "pack: x has one dimension": (lambda: pack(x(8), true(2, 8)), ValueError, ["real", "first two dimensions of x", "(8,)"]),
    "pack: real is elsewhere": (lambda: pack(x(2, 8), true(2, 8, device="meta")), ValueError, ["real", "device of x", "meta", "cpu"]),
    "unpack: values is a list": (lambda: unpack([1.0], pack(x(2, 8), true(2, 8))), TypeError, ["values", "torch.Tensor", "list"]),
    "unpack: too few values": (lambda: unpack(x(15, 4), pack(x(2, 8), true(2, 8))), ValueError, ["values", "16", "(15, 4)"]),
    "unpack: a number": (lambda: unpack(x(()), pack(x(2, 8), true(2, 8))), ValueError, ["values", "16", "()"]),
    "unpack: not what pack gave": (lambda: unpack(x(16), starts()), TypeError, ["packed", "pack", "Tensor"]),
    "unpack: values are elsewhere": (
        lambda: unpack(x(16, device="meta"), pack(x(2, 8), true(2, 8))), ValueError, ["values", "device", "meta", "cpu"]
    ),
    "a positional option": (lambda: flash_attention(x(), x(), x(), True), TypeError, ["positional"]),
    "a misspelt option": (lambda: call(is_causal=True), TypeError, ["is_causal"]),
    "with_lse checks too": (lambda: flash_attention_with_lse(x(), x(), x(2, 4, 9, 16)), ValueError, ["v", "9"]),
    "merge: not a tensor": (lambda: merge_attention(x(), None, x(), x(2, 4, 8)), TypeError, ["lse_a", "NoneType"]),
    "merge: lse shape": (lambda: merge_attention(x(), x(2, 4), x(), x(2, 4, 8)), ValueError, ["lse_a", "(2, 4)"]),
    "merge: out shapes": (
        lambda: merge_attention(x(), x(2, 4, 8), x(2, 4, 9, 16), x(2, 4, 9)), ValueError, ["out_b", "(2, 4, 9, 16)"]
    ),
    "module: causal": (lambda: FlashAttention(causal=1), TypeError, ["causal", "True or False", "1"]),
    "module: dropout of 1": (lambda: FlashAttention(dropout=1), ValueError, ["dropout", "less than 1", "got 1"]),
    "module: scale": (lambda: FlashAttention(scale=-1.0), ValueError, ["scale", "positive", "-1.0"]),
    "module: window": (lambda: FlashAttention(window=3), TypeError, ["window", "pair", "3"]),
    "module: softcap": (lambda: FlashAttention(softcap=-1.0), ValueError, ["softcap", "positive", "-1.0"]),
    "module: its window": (lambda: MultiHeadFlashAttention(64, 4, window=(-2, 0)), ValueError, ["window", "-1", "(-2, 0)"]),
    "module: its softcap": (lambda: MultiHeadFlashAttention(64, 4, softcap="30"), TypeError, ["softcap", "number", "str"]),
    "module: dropout of 2": (lambda: MultiHeadFlashAttention(64, 4, dropout=2.0), ValueError, ["dropout", "2.0"]),
    "module: heads": (lambda: MultiHeadFlashAttention(100, 3), ValueError, ["d_model", "num_heads", "100", "3"]),
    "module: no heads": (lambda: MultiHeadFlashAttention(64, 0), ValueError, ["num_heads", "0"]),
    "module: kv heads": (lambda: MultiHeadFlashAttention(64, 4, num_kv_heads=3), ValueError, ["num_kv_heads", "4", "3"]),
    "module: padding": (
        lambda: MultiHeadFlashAttention(64, 4)(x(2, 8, 64), key_padding_mask=x(2, 8)),
        TypeError,
        ["key_padding_mask", "bool", "real token", "float32"],
    ),
    "module: a mask of one head too many": (
        lambda: MultiHeadFlashAttention(64, 4)(x(2, 8, 64), attn_mask=x(5, 8, 8)),
        ValueError,
        ["attn_mask", "(2, 4, 8, 8)", "(5, 8, 8)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call(name):
    wrong, error, words = WRONG_CALLS[name]
    with pytest.raises(error) as raised:
        wrong()
    message = str(raised.value)
    assert all(word in message for word in words), message


def test_bf16_under_the_interpreter_is_refused():
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled on a GPU: make test covers the interpreter")
    with pytest.raises(NotImplementedError, match="bfloat16 wrongly.*backend='torch' can"):
        call(*3 * [x(dtype=torch.bfloat16)], backend="triton")


@pytest.mark.gpu
def test_fp64_kernels_are_refused_and_auto_serves_them():
    q = torch.randn(1, 1, 8, 16, dtype=torch.float64, device="cuda")
    with pytest.raises(NotImplementedError, match="float64.*backend='torch' can"):
        flash_attention(q, q, q, backend="triton")
    assert flash_attention(q, q, q).dtype == torch.float64
