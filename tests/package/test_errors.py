"""Wrong calls: each message names the argument, the rule and the value it got."""
import pytest
import torch

from flash_edu import FlashAttention, MultiHeadFlashAttention, flash_attention, flash_attention_with_lse, merge_attention


def x(*shape, **kwargs):
    return torch.zeros(*(shape or (2, 4, 8, 16)), **kwargs)


def call(q=None, k=None, v=None, **kwargs):
    q = x() if q is None else q
    return flash_attention(q, x() if k is None else k, x() if v is None else v, **kwargs)


WRONG_CALLS = {
    "q is a list": (lambda: call(q=[1.0]), TypeError, ["q", "torch.Tensor", "list"]),
    "k is None-like": (lambda: call(k="keys"), TypeError, ["k", "torch.Tensor", "str"]),
    "v is an array": (lambda: flash_attention(x(), x(), 3.0), TypeError, ["v", "torch.Tensor", "float"]),
    "q has 3 dimensions": (lambda: call(q=x(2, 8, 16)), ValueError, ["q", "4 dimensions", "(2, 8, 16)"]),
    "k has 5 dimensions": (lambda: call(k=x(1, 2, 4, 8, 16)), ValueError, ["k", "4 dimensions", "5"]),
    "q is sparse": (lambda: call(q=x().to_sparse()), TypeError, ["q", "dense", "sparse"]),
    "q is int": (lambda: call(q=x(dtype=torch.int64)), TypeError, ["q", "float16", "int64"]),
    "v is complex": (lambda: call(v=x(dtype=torch.complex64)), TypeError, ["v", "float16", "complex64"]),
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
    "window": (lambda: call(window=(4, 0)), NotImplementedError, ["window", "(4, 0)"]),
    "attn_mask": (lambda: call(attn_mask=x(8, 8)), NotImplementedError, ["attn_mask", "(8, 8)"]),
    "key_padding_mask": (lambda: call(key_padding_mask=x(2, 8)), NotImplementedError, ["key_padding_mask", "(2, 8)"]),
    "alibi_slopes": (lambda: call(alibi_slopes=x(4)), NotImplementedError, ["alibi_slopes", "(4,)"]),
    "softcap": (lambda: call(softcap=30.0), NotImplementedError, ["softcap", "30.0"]),
    "dropout_p": (lambda: call(dropout_p=0.1), NotImplementedError, ["dropout_p", "0.1"]),
    "dropout_p of 1": (lambda: call(dropout_p=1.0), ValueError, ["dropout_p", "less than 1", "1.0"]),
    "dropout_p is negative": (lambda: call(dropout_p=-0.1), ValueError, ["dropout_p", "at least 0", "-0.1"]),
    "dropout_p is a string": (lambda: call(dropout_p="0.1"), TypeError, ["dropout_p", "number", "str"]),
    "a positional option": (lambda: flash_attention(x(), x(), x(), True), TypeError, ["positional"]),
    "a misspelt option": (lambda: call(is_causal=True), TypeError, ["is_causal"]),
    "with_lse checks too": (lambda: flash_attention_with_lse(x(), x(), x(2, 4, 9, 16)), ValueError, ["v", "9"]),
    "merge: not a tensor": (lambda: merge_attention(x(), None, x(), x(2, 4, 8)), TypeError, ["lse_a", "NoneType"]),
    "merge: lse shape": (lambda: merge_attention(x(), x(2, 4), x(), x(2, 4, 8)), ValueError, ["lse_a", "(2, 4)"]),
    "merge: out shapes": (
        lambda: merge_attention(x(), x(2, 4, 8), x(2, 4, 9, 16), x(2, 4, 9)), ValueError, ["out_b", "(2, 4, 9, 16)"]
    ),
    "module: dropout": (lambda: FlashAttention(dropout=0.1), NotImplementedError, ["dropout", "0.1"]),
    "module: window": (lambda: FlashAttention(window=(1, 1)), NotImplementedError, ["window", "(1, 1)"]),
    "module: softcap": (lambda: FlashAttention(softcap=1.0), NotImplementedError, ["softcap", "1.0"]),
    "module: dropout of 2": (lambda: MultiHeadFlashAttention(64, 4, dropout=2.0), ValueError, ["dropout", "2.0"]),
    "module: heads": (lambda: MultiHeadFlashAttention(100, 3), ValueError, ["d_model", "num_heads", "100", "3"]),
    "module: no heads": (lambda: MultiHeadFlashAttention(64, 0), ValueError, ["num_heads", "0"]),
    "module: kv heads": (lambda: MultiHeadFlashAttention(64, 4, num_kv_heads=3), ValueError, ["num_kv_heads", "4", "3"]),
    "module: padding": (
        lambda: MultiHeadFlashAttention(64, 4)(x(2, 8, 64), key_padding_mask=x(2, 8)),
        NotImplementedError,
        ["key_padding_mask"],
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
