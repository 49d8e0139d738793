"""Hugging Face models: logits, gradients and generated text under flash_edu's attention are those under any other."""
import copy
import functools
import importlib
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from this_machine import DEVICE, ON_GPU

from flash_edu.testing import assert_close

hf = pytest.importorskip(
    "transformers", minversion="5.17", reason="the models here are those of transformers 5.17 and newer"
)
integration = importlib.import_module("flash_edu.integrations.transformers")
masking = importlib.import_module("transformers.masking_utils")

OURS = integration.register()
LAYERS, VOCABULARY, LENGTH, WINDOW = 2, 61, 19, 7
hf.logging.set_verbosity_error()


# --- tiny models, of random weights that are large enough for attention to matter -------------------------


def sizes(**changes):
    common = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
    }
    return common | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes


def grouped(**changes):
    return sizes(num_key_value_heads=2, head_dim=16, **changes)


WHISPER = {
    "vocab_size": VOCABULARY, "num_mel_bins": 8, "d_model": 32, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "max_source_positions": 15, "max_target_positions": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**grouped()),
    "qwen3": lambda: hf.Qwen3Config(**grouped()),
    "mistral": lambda: hf.MistralConfig(**grouped(sliding_window=WINDOW)),
    "gemma2": lambda: hf.Gemma2Config(
        **grouped(sliding_window=WINDOW, query_pre_attn_scalar=16, attn_logit_softcapping=2.0)
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **grouped(sliding_window=WINDOW, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"])
    ),
    "gpt_oss": lambda: hf.GptOssConfig(**grouped(sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2)),
    "gpt2": lambda: hf.GPT2Config(
        n_embd=32, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, n_positions=64, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **grouped(attention_chunk_size=8, intermediate_size_mlp=64, num_local_experts=2),
        layer_types=["chunked_attention", "full_attention"],
    ),
    "bert": lambda: hf.BertConfig(**sizes(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
    "modernbert": lambda: hf.ModernBertConfig(
        **sizes(local_attention=8, cls_token_id=1, sep_token_id=2, layer_types=["sliding_attention", "full_attention"])
    ),
    "vit": lambda: hf.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        image_size=16, patch_size=4, num_labels=7,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    ),
    "whisper": lambda: hf.WhisperConfig(**WHISPER, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0),
    "t5": lambda: hf.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=LAYERS, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0,
    ),
}  # fmt: skip
CLASSES = {
    "bert": hf.AutoModelForMaskedLM, "modernbert": hf.AutoModelForMaskedLM, "vit": hf.AutoModelForImageClassification,
    "whisper": hf.AutoModelForSpeechSeq2Seq, "t5": hf.AutoModelForSeq2SeqLM,
}  # fmt: skip
OLD = tuple(map(int, hf.__version__.split(".")[:2])) < (5, 24)
if OLD:
    del CONFIGS["t5"]  # whose attention cannot be chosen there
DECODERS = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "gpt2", "llama4"]
PADDINGS = {name: ["none", "right", "left"] if name in DECODERS else ["none", "right"] for name in CONFIGS} | {
    "vit": ["none"]
}


def cases(*kinds):
    """(kind, padding) of models that this transformers has."""
    return [case for case in kinds if case[0] in CONFIGS]


@functools.cache
def original(kind):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config._experts_implementation = "eager"  # the others have no fp64
    model = CLASSES.get(kind, hf.AutoModelForCausalLM).from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2 if kind == "t5" else 8)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tiny(kind, attention=OURS, dtype=torch.float32):
    model = copy.deepcopy(original(kind)).to(DEVICE, dtype)
    model.set_attn_implementation(attention)
    return model


def padded(length=LENGTH, padding="none", batch=2):
    """(B, N) int64, 1 = a real token: the last sequence is shorter."""
    real = torch.ones(batch, length, dtype=torch.long)
    shorter = length * 2 // 3
    if padding == "right":
        real[-1, shorter:] = 0
    if padding == "left":
        real[-1, :-shorter] = 0
    return real.to(DEVICE)


def tokens(length=LENGTH, batch=2, seed=1):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def batch_for(kind, padding, dtype=torch.float32):
    """A model's arguments, and which of its logits belong to real tokens."""
    drawn = torch.Generator().manual_seed(2)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=drawn).to(DEVICE, dtype)}, torch.ones(
            2, dtype=torch.bool, device=DEVICE
        )
    real = padded(padding=padding)
    mask = {} if padding == "none" else {"attention_mask": real}
    if kind in DECODERS or kind in ("bert", "modernbert"):
        return {"input_ids": tokens()} | mask, real.bool()
    answer, real_answer = tokens(9, seed=3), padded(9, padding)
    mask |= {} if padding == "none" else {"decoder_attention_mask": real_answer}
    if kind == "t5":
        return {"input_ids": tokens(), "decoder_input_ids": answer} | mask, real_answer.bool()
    sound = torch.randn(2, 8, 30, generator=drawn).to(DEVICE, dtype)
    mask.pop("attention_mask", None)
    return {"input_features": sound, "decoder_input_ids": answer} | mask, real_answer.bool()


def logits_and_gradients(model, kind, padding):
    model.zero_grad()
    arguments, real = batch_for(kind, padding, model.dtype)
    logits = model(**arguments).logits[real]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4)).to(logits)
    (logits * weights).sum().backward()
    found = {f"d {name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach()} | found


# --- the truth: the formula, with the whole of transformers' own mask, in fp64 ----------------------------


def formula(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, position_bias=None, **others
):  # fmt: skip
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    s = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    s = s if softcap is None else softcap * (s / softcap).tanh()
    s = s if position_bias is None else s + position_bias
    s = s if attention_mask is None else s.masked_fill(~attention_mask, float("-inf"))
    if s_aux is not None:
        s = torch.cat([s, s_aux[None, :, None, None].expand(*s.shape[:3], 1)], dim=-1)
    empty = (s == float("-inf")).all(dim=-1, keepdim=True)
    p = s.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)[..., : key.shape[2]]
    return (p @ value).transpose(1, 2).contiguous(), None


def whole_mask(*sizes, **options):
    return masking.sdpa_mask(*sizes, **options | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


hf.AttentionInterface.register("formula", formula)
hf.AttentionMaskInterface.register("formula", whole_mask)


NUDGES = ["nudged 0", "nudged 1", "nudged 2"]


def nudged(seed):
    """The formula, of q, k and v that are each off by at most one rounding."""

    def attend(module, *tensors, **others):
        drawn = torch.Generator().manual_seed(seed)
        *qkv, attention_mask = tensors
        off = [torch.randint(-1, 2, x.shape, generator=drawn).to(x.device) for x in qkv]
        qkv = [x * (1 + torch.finfo(x.dtype).eps * steps) for x, steps in zip(qkv, off, strict=True)]
        return formula(module, *qkv, attention_mask, **others)

    return attend


for seed, name in enumerate(NUDGES):
    hf.AttentionInterface.register(name, nudged(seed))
    hf.AttentionMaskInterface.register(name, whole_mask)


@functools.cache
def right_and_plain(kind, padding):
    """The truth in fp64, and for each tensor the worst of four plain computations of it in fp32.

    Through a whole model the error of one plain computation is one draw of chance, and a lucky draw allows nothing
    (T5's scores are unscaled, and so large that one rounding of q moves a gradient further than eager may be off). So eager
    attention is drawn once, and the formula three times with every q, k and v off by at most one rounding.
    """
    right = logits_and_gradients(tiny(kind, "formula", torch.float64), kind, padding)
    plain = [logits_and_gradients(tiny(kind, attention), kind, padding) for attention in ("eager", *NUDGES)]
    return right, {
        name: max((each[name] for each in plain), key=lambda x: (x - right[name]).abs().max()) for name in right
    }


def check(kind, padding, attention=OURS):
    """At most twice as far from the formula in fp64 as plain computations in fp32 are."""
    right, plain = right_and_plain(kind, padding)
    got = logits_and_gradients(tiny(kind, attention), kind, padding)
    assert got.keys() == right.keys()
    largest = max(x.abs().max() for x in right.values())
    for name in right:
        if right[name].abs().max() < 1e-9 * largest:  # a key's bias moves no weight, and its gradient is rounding alone
            assert got[name].abs().max() < 1e-6 * largest, name
        else:
            assert_close(name, got[name], right[name], plain[name])


@pytest.mark.parametrize(("kind", "padding"), [(kind, padding) for kind in CONFIGS for padding in PADDINGS[kind]])
def test_logits_and_gradients(kind, padding):
    check(kind, padding)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_scale_one_part_in_a_thousand_off_is_found(kind):
    def slightly_wrong(module, query, *others, **options):
        return formula(module, query * 1.001, *others, **options)

    hf.AttentionInterface.register("slightly wrong", slightly_wrong)
    hf.AttentionMaskInterface.register("slightly wrong", whole_mask)
    with pytest.raises(AssertionError, match="values are wrong"):
        check(kind, "none", "slightly wrong")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "bert"])
def test_in_half_precision(kind):
    right, plain, got = (
        tiny(kind, attention, dtype)(**batch_for(kind, "right")[0]).logits[padded(padding="right").bool()]
        for attention, dtype in (("formula", torch.float64), ("eager", torch.bfloat16), (OURS, torch.bfloat16))
    )
    assert got.dtype == torch.bfloat16
    assert_close("logits", got, right, plain)


def test_the_truth_is_eager_attention_in_fp64():
    """The ruler itself: plain attention in fp32 is near it, and without a mask it is not."""
    for kind in CONFIGS:
        for padding in PADDINGS[kind]:
            right, plain = (x["logits"] for x in right_and_plain(kind, padding))
            assert (plain - right).abs().max() < 1e-5 * right.abs().max(), (kind, padding)
    hf.AttentionInterface.register("unmasked", lambda *args, **kwargs: formula(*args[:4], None, **kwargs))
    hf.AttentionMaskInterface.register("unmasked", whole_mask)
    for kind in set(CONFIGS) - {"vit"}:
        right, _ = right_and_plain(kind, "right")
        blind = logits_and_gradients(tiny(kind, "unmasked"), kind, "right")
        assert (blind["logits"] - right["logits"]).abs().max() > 1e-2 * right["logits"].abs().max(), kind


# --- which rules are asked of flash_attention -------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What flash_attention is called with, layer by layer."""
    calls = []

    def spy(q, k, v, **options):
        calls.append(SimpleNamespace(nq=q.shape[2], nk=k.shape[2], **{"window": (None, None)} | options))
        return real(q, k, v, **options)

    real = integration.flash_attention
    monkeypatch.setattr(integration, "flash_attention", spy)
    return calls


WINDOWS = {  # by layer
    "llama": [(None, 0)] * LAYERS, "mistral": [(WINDOW - 1, 0)] * LAYERS, "gemma2": [(WINDOW - 1, 0), (None, 0)],
    "gemma3": [(WINDOW - 1, 0), (None, 0)], "gpt_oss": [(WINDOW - 1, 0), (None, 0)], "gpt2": [(None, 0)] * LAYERS,
    "bert": [(None, None)] * LAYERS, "modernbert": [(4, 4), (None, None)],
}  # fmt: skip


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("kind", WINDOWS)
def test_plain_masks_make_no_matrix(kind, padding, asked):
    real = padded(padding=padding)
    with torch.no_grad():
        tiny(kind)(tokens(), attention_mask=real)
    assert [call.attn_mask for call in asked] == [None] * LAYERS
    assert [call.window for call in asked] == WINDOWS[kind]
    for call in asked:
        assert call.key_padding_mask is None if padding == "none" else torch.equal(call.key_padding_mask, real.bool())


def shown(mask, batch, nq, nk):
    """Any mask as a matrix (B, Nq, Nk)."""
    if mask is None:
        return torch.ones(batch, nq, nk, dtype=torch.bool)
    if isinstance(mask, torch.Tensor):
        return mask.expand(batch, 1, nq, nk)[:, 0]
    j, own = torch.arange(nk)[None, :], (torch.arange(nq) + mask.keys - nq)[:, None]
    seen = j < torch.tensor(mask.keys)
    seen = seen if mask.left is None else seen & (j >= own - mask.left)
    seen = seen if mask.right is None else seen & (j <= own + mask.right)
    real = torch.ones(batch, nk, dtype=torch.bool)
    if mask.padding is not None:
        real[:, : mask.keys] = mask.padding
    return (seen & real[:, None, :]).expand(batch, nq, nk)


NOT_CAUSAL = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
FUNCTIONS = {
    "causal": (masking.causal_mask_function, {}),
    "bidirectional": (masking.bidirectional_mask_function, NOT_CAUSAL),
    "window": (masking.sliding_window_causal_mask_function(WINDOW), {"local_size": WINDOW}),
    "both ways": (
        masking.sliding_window_bidirectional_mask_function(WINDOW),
        NOT_CAUSAL | {"local_size": WINDOW},
    ),
    "its own": (
        masking.or_masks(masking.causal_mask_function, lambda b, h, i, j: (i < 4) & (j < 4)), {"allow_is_causal_skip": False}
    ),
    "wide, but said to have a size": (
        masking.bidirectional_mask_function, NOT_CAUSAL | {"local_size": WINDOW}
    ),
}  # fmt: skip
CONFIG = hf.MistralConfig(sliding_window=WINDOW)
CHUNKED = {  # other than a window of that size
    "chunks": hf.Llama4TextConfig(attention_chunk_size=WINDOW),
    "chunks beside a window": hf.Llama4TextConfig(attention_chunk_size=WINDOW, sliding_window=WINDOW),
    "chunks of another size": hf.MistralConfig(sliding_window=WINDOW + 1),
}


WHERE = {  # queries, places before them, the first of these that is cached, and room behind them
    "whole": (19, 0, 0, 0), "a window": (WINDOW, 0, 0, 0), "just over a window": (WINDOW + 1, 0, 0, 0),
    "static cache": (12, 0, 0, 9),
    "more": (5, 8, 0, 0), "more, static cache": (5, 8, 0, 4), "more, past a window": (5, 9, 3, 0),
    "one": (1, 12, 0, 0), "one, static cache": (1, 12, 0, 8), "one, past a window": (1, 12, 6, 0),
    "first, static cache": (1, 0, 0, 9),
    "begins before its keys": (5, 0, 2, 0), "ends behind its keys": (5, 8, 0, -2),
}  # fmt: skip


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize(("nq", "past", "first", "empty"), WHERE.values(), ids=WHERE)
@pytest.mark.parametrize("what", [*FUNCTIONS, *CHUNKED])
def test_masks_show_what_transformers_own_masks_show(what, nq, past, first, empty, padding):
    real = None if padding == "none" else padded(past + nq, padding).cpu().bool()
    hidden = (
        torch.zeros(2, dtype=torch.long) if real is None else (real.cumsum(1) == 0).sum(1)
    )  # chunks begin behind the padding
    chunks = (masking.chunked_causal_mask_function(WINDOW, hidden), {"local_size": WINDOW})
    function, options = FUNCTIONS.get(what, chunks)
    nk = past + nq - first + empty
    asked = {"q_offset": past, "kv_offset": first, "mask_function": function, "attention_mask": real} | options
    asked["config"] = CHUNKED.get(what, CONFIG)
    mask = integration.make_mask(2, nq, nk, **asked)
    whole = masking.sdpa_mask(
        2, nq, nk, **asked | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )
    assert torch.equal(shown(mask, 2, nq, nk), whole[:, 0].expand(2, nq, nk))
    if what == "its own" or (what in CHUNKED and first + nk > WINDOW) or (what == "both ways" and empty):
        assert isinstance(mask, torch.Tensor)
    elif isinstance(mask, torch.Tensor) and first <= past and empty >= 0:
        assert nq == 1 or mask.stride(2) == 0, "a mask of padding takes no room"
    counted = integration.make_mask(2, nq, nk, **asked | {"q_offset": torch.tensor(past)})  # as static caches count
    assert torch.equal(shown(counted, 2, nq, nk), whole[:, 0].expand(2, nq, nk)) and type(counted) is type(mask)
    if isinstance(mask, integration.Band):
        assert mask.left is None or mask.left < nk - 1, "a window that holds all keys costs nothing"
        again = integration.make_mask(2, nq, nk, **asked | {"attention_mask": mask.contiguous()})
        assert again is mask and mask.ndim != 2, "generate() asks before the model does, and may have it laid out anew"


# --- masks that are not plain -----------------------------------------------------------------------------


HOW = (("formula", torch.float64), ("eager", torch.float32), (OURS, torch.float32))  # right, plain and ours


def logits_of(model, **arguments):
    with torch.no_grad():
        return model(**arguments).logits


PLACES = torch.cat([torch.arange(7), torch.arange(12)])[None].to(DEVICE)  # of two sequences in a row


def one_by_one(kind):
    """Two sequences of 7 and 12 tokens; and what each gives alone, (1, 19, vocabulary), rightly and plainly."""
    ids = tokens(batch=1)
    return ids, *(
        torch.cat([logits_of(tiny(kind, *how), input_ids=part) for part in (ids[:, :7], ids[:, 7:])], dim=1)
        for how in HOW[:2]
    )


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_packed_sequences_by_their_position_ids(kind, asked):
    ids, right, plain = one_by_one(kind)
    packed = logits_of(tiny(kind), input_ids=ids, position_ids=PLACES, use_cache=False)
    assert asked[0].attn_mask.shape == (1, 1, LENGTH, LENGTH)
    assert_close("logits", packed, right, plain)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_packed_sequences_by_cu_seq_lens(kind, asked):
    """With a mask of ones no matrix is made. Without one, transformers makes one of position_ids, which says the same."""
    ids, right, plain = one_by_one(kind)
    ends = torch.tensor([0, 7, LENGTH], device=DEVICE)
    packing = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 12, "max_length_k": 12}
    ones = torch.ones_like(ids)
    for more in ({"attention_mask": ones}, {"attention_mask": ones, "max_length_q": None, "cu_seq_lens_k": None}, {}):
        packed = logits_of(tiny(kind), input_ids=ids, position_ids=PLACES, use_cache=False, **packing | more)
        assert_close("logits", packed, right, plain)
        assert not more or not asked, "flash_attention_varlen serves it"


def test_cu_seq_lens_narrow_a_matrix():
    """Whatever else a mask says, no query looks into another sequence."""
    ids, right, plain = one_by_one("llama")
    causal = torch.ones(1, 1, LENGTH, LENGTH, device=DEVICE, dtype=torch.bool).tril()
    for mask in (causal, torch.zeros(causal.shape, device=DEVICE).masked_fill(~causal, float("-inf"))):
        ends = torch.tensor([0, 7, LENGTH], device=DEVICE)
        packed = logits_of(tiny("llama"), input_ids=ids, position_ids=PLACES, attention_mask=mask, cu_seq_lens_q=ends)
        assert_close("logits", packed, right, plain)


def test_masks_of_a_users_own(asked):
    keep = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(5)).to(DEVICE) < 0.5
    keep |= torch.eye(LENGTH, dtype=torch.bool, device=DEVICE)
    added = torch.zeros(keep.shape, device=DEVICE).masked_fill(~keep, torch.finfo(torch.float32).min)
    right = logits_of(tiny("llama", *HOW[0]), input_ids=tokens(), attention_mask=keep)
    plain = logits_of(tiny("llama", *HOW[1]), input_ids=tokens(), attention_mask=added)
    for mask in (keep, added):
        assert_close("logits", logits_of(tiny("llama"), input_ids=tokens(), attention_mask=mask), right, plain)
    assert all(call.attn_mask is not None and call.window == (None, None) for call in asked)


def test_a_row_for_all_queries_is_padding(asked):
    real = padded(padding="right").bool()
    row = real[:, None, None, :]
    right = logits_of(tiny("bert", *HOW[0]), input_ids=tokens(), attention_mask=row)
    plain = logits_of(tiny("bert", *HOW[1]), input_ids=tokens(), attention_mask=real)
    assert_close("logits", logits_of(tiny("bert"), input_ids=tokens(), attention_mask=row), right, plain)
    assert torch.equal(asked[0].key_padding_mask, real) and asked[0].attn_mask is None


def test_tokens_that_see_each_other_within_a_causal_mask(asked):
    """As those of an image do: the model adds to the mask."""
    config = hf.Gemma3TextConfig(
        **grouped(sliding_window=WINDOW, query_pre_attn_scalar=16, use_bidirectional_attention=True)
    )
    model = hf.AutoModelForCausalLM.from_config(config).to(DEVICE).eval()
    group = torch.tensor([[-1] * 5 + [0] * 6 + [-1] * 8] * 2, device=DEVICE)
    logits, masks = [], []
    for attention, dtype in HOW:
        model.set_attn_implementation(attention)
        logits.append(logits_of(model.to(dtype), input_ids=tokens()))
        config, embeds = hf.LlamaConfig(attn_implementation=attention), torch.empty(2, LENGTH, 0, device=DEVICE)
        masks.append(masking.create_causal_mask(config, embeds, None, None, block_sequence_ids=group))
    assert_close("logits", logits[2], logits[0], logits[1])
    assert torch.equal(masks[2], masks[0]) and masks[2][0, 0, 5, 10] and not masks[2][0, 0, 4, 5]
    assert all(call.attn_mask is not None for call in asked)


# --- caches -----------------------------------------------------------------------------------------------

CACHE = "past_key_values" if OLD else "cache"


def written(kind, attention, dtype, more=14, **options):
    """Tokens, of a prompt of 12 and some more, and the logits that each of these was chosen by."""
    inputs = {"input_ids": tokens(12), "attention_mask": padded(12, "left")}
    if kind == "whisper":
        inputs = {"input_features": batch_for(kind, "none", dtype)[0]["input_features"]}
    told = {
        "max_new_tokens": more,
        "min_new_tokens": more,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "disable_compile": True,  # which generate() does by itself on a GPU
    }
    text = tiny(kind, attention, dtype).generate(**inputs, **told, **options)
    return text.sequences, torch.stack(text.logits)


@pytest.mark.parametrize(
    "cache", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=["dynamic", "static", "beams"]
)
@pytest.mark.parametrize("kind", [*DECODERS, "whisper"])
def test_generated_text(kind, cache):
    """Of a prompt with left padding, and on past the windows of 7 and the chunks of 8."""
    if OLD and kind == "llama4" and cache.get("cache_implementation") == "static":
        pytest.skip("this transformers makes no chunked mask for a static cache")
    right, plain, got = (written(kind, *how, **cache) for how in HOW)
    assert torch.equal(right[0], plain[0]) and torch.equal(right[0], got[0])
    assert_close("logits", got[1], right[1], plain[1])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "gpt2"])
def test_text_read_in_pieces(kind, cache, asked):
    """A cache that holds some keys already, and one that has room for more; the last piece is a single token."""
    ids, real = tokens(26), padded(26, "left")

    def in_pieces(attention, dtype):
        model, found, start = tiny(kind, attention, dtype), [], 0
        keys = {"config": model.config} | ({"max_cache_len": 32} if cache == "static" else {})
        memory = (hf.StaticCache if cache == "static" else hf.DynamicCache)(**keys)
        for end in (12, 17, 25, 26):
            found.append(logits_of(model, input_ids=ids[:, start:end], attention_mask=real[:, :end], **{CACHE: memory}))
            start = end
        return torch.cat(found, dim=1)[real.bool()]

    whole = [logits_of(tiny(kind, *how), input_ids=ids, attention_mask=real)[real.bool()] for how in HOW[:2]]
    asked.clear()
    assert_close("logits", in_pieces(*HOW[2]), *whole)
    assert all(call.attn_mask is None for call in asked)


# --- training, and PyTorch's tools ------------------------------------------------------------------------

DROPOUT = {  # what each calls the dropout of attention weights
    "llama": "attention_dropout", "gemma2": "attention_dropout", "gpt_oss": "attention_dropout", "gpt2": "attn_pdrop",
    "bert": "attention_probs_dropout_prob", "vit": "attention_probs_dropout_prob", "whisper": "attention_dropout",
}  # fmt: skip


@pytest.mark.parametrize("kind", DROPOUT)
def test_dropout_in_training(kind):
    config = CONFIGS[kind]()
    setattr(config, DROPOUT[kind], 0.5)
    model = CLASSES.get(kind, hf.AutoModelForCausalLM).from_config(config, attn_implementation=OURS)
    model.load_state_dict(original(kind).state_dict())
    model.to(DEVICE)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(logits_and_gradients(model.train(), kind, "none"))
    still = logits_and_gradients(model.eval(), kind, "none")
    assert all(torch.equal(found[0][name], found[1][name]) for name in still), "torch.manual_seed repeats it"
    assert not torch.equal(found[0]["logits"], found[2]["logits"]) and not torch.equal(
        found[0]["logits"], still["logits"]
    )
    assert all(x.isfinite().all() for run in found for x in run.values())
    check_same(still, logits_and_gradients(tiny(kind), kind, "none"))


def check_same(got, wanted):
    largest = max(x.abs().max().item() for x in wanted.values())
    for name in wanted:
        said = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-5 * largest, msg=said)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("kind", "padding"), cases(("llama", "left"), ("gpt_oss", "right"), ("t5", "right")))
def test_gradient_checkpointing(kind, padding, reentrant):
    """With dropout, which is drawn again."""
    found = []
    for checkpointed in (False, True):
        model = tiny(kind).train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(0)
        found.append(logits_and_gradients(model, kind, padding))
    check_same(found[1], found[0])


@pytest.mark.parametrize(
    ("kind", "padding"), cases(("llama", "left"), ("gemma2", "none"), ("modernbert", "right"), ("t5", "right"))
)
def test_compiles_to_one_graph(kind, padding):
    torch.compiler.reset()
    plain, compiled = tiny(kind), tiny(kind)
    compiled.compile(fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    check_same(logits_and_gradients(compiled, kind, padding), logits_and_gradients(plain, kind, padding))


def test_generates_when_compiled():
    """On a GPU generate() compiles for a static cache by itself."""
    torch.compiler.reset()
    options = {"max_new_tokens": 9, "do_sample": False, "cache_implementation": "static", "disable_compile": not ON_GPU}
    model = tiny("mistral")
    if not ON_GPU:
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    compiled = model.generate(tokens(12), attention_mask=padded(12, "left"), **options)
    plain = tiny("mistral").generate(tokens(12), attention_mask=padded(12, "left"), **options | {"disable_compile": True})
    assert torch.equal(compiled, plain)


def test_more_tokens_of_a_static_cache_when_compiled():
    """The model makes its mask within the graph, of a count that is a tensor, and does not wait for the GPU to read it."""
    torch.compiler.reset()
    found, graphs = [], []
    for compiled in (False, True):
        model = tiny("llama")
        memory = {CACHE: hf.StaticCache(config=model.config, max_cache_len=24)}
        logits_of(model, input_ids=tokens()[:, :12], **memory)
        if compiled:
            model.compile(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
        found.append(logits_of(model, input_ids=tokens()[:, 12:], **memory))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not [node for graph in graphs for node in graph.graph.nodes if node.target == "item"]


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_autocast(kind):
    arguments, real = batch_for(kind, "left")
    right = logits_of(tiny(kind, *HOW[0]), **arguments)[real]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        plain, got = (logits_of(tiny(kind, *how), **arguments)[real] for how in HOW[1:])
    assert got.dtype == plain.dtype
    assert_close("logits", got, right, plain)


@pytest.mark.parametrize(
    ("kind", "padding"),
    cases(("llama", "left"), ("gemma2", "right"), ("gpt_oss", "none"), ("t5", "right"), ("llama4", "none")),
)
def test_the_kernels(kind, padding):
    name = integration.register("edu_kernels", backend="triton")
    check(kind, padding, name)


def test_the_kernels_generate():
    name = integration.register("edu_kernels", backend="triton")
    for cache in ({}, {"cache_implementation": "static"}):
        plain, got = (written("mistral", attention, torch.float32, more=4, **cache)[0] for attention in ("eager", name))
        assert torch.equal(plain, got)


def test_the_kernels_take_packed_sequences():
    """One is longer than a tile, and nobody says how long."""
    ends, inputs = torch.tensor([0, 10, 150], device=DEVICE), [x[:1] for x in layer(150, 150, dtype=torch.float32)]
    got, plain = (
        integration.attend(CAUSAL, *inputs, None, cu_seq_lens_q=ends, backend=backend)[0]
        for backend in ("triton", "torch")
    )
    assert got.is_contiguous()
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)


# --- what a layer may pass --------------------------------------------------------------------------------

CAUSAL = SimpleNamespace(is_causal=True)
OPEN = SimpleNamespace(is_causal=False)
UNSAID = SimpleNamespace()


def layer(nq=6, nk=6, heads=4, dtype=torch.float64):
    """q, k and v as a layer passes them."""
    drawn = torch.Generator().manual_seed(6)
    return [
        torch.randn(2, h, n, 8, generator=drawn, dtype=torch.float64).to(DEVICE, dtype)
        for h, n in ((heads, nq), (2, nk), (2, nk))
    ]


def lower(nq, nk):
    """Causal, aligned at the first key, as SDPA's is."""
    return torch.ones(nq, nk, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("module", "said", "causal"),
    [
        (CAUSAL, None, True),
        (OPEN, None, False),
        (UNSAID, None, True),
        (CAUSAL, False, False),
        (OPEN, True, True),
        (UNSAID, False, False),
    ],
)
def test_a_layer_without_mask_is_causal_if_it_says_so(module, said, causal):
    """In the call, or of itself; a layer that says nothing is causal, as for SDPA."""
    inputs = layer()
    got, _ = integration.attend(module, *inputs, None, is_causal=said)
    torch.testing.assert_close(got, formula(module, *inputs, lower(6, 6).to(DEVICE) if causal else None)[0])


def test_without_a_mask_one_query_sees_all_keys_and_more_see_those_up_to_their_own():
    """One is the next token. More stand at the start of a static cache, which is empty behind them."""
    for nq, mask in ((1, None), (6, lower(6, 9))):
        inputs = layer(nq, 9)
        got, weights = integration.attend(CAUSAL, *inputs, None)
        assert weights is None and got.shape == (2, nq, 4, 8) and got.is_contiguous()
        torch.testing.assert_close(got, formula(CAUSAL, *inputs, mask if mask is None else mask.to(DEVICE))[0])


def test_a_window_without_a_mask_is_kept():
    """Models that make no mask may still name a window: its size counts a query's own key."""
    for nq, nk, seen in ((6, 6, lower(6, 6).triu(-2)), (1, 6, lower(6, 6).triu(-2)[5:]), (6, 9, lower(6, 9).triu(-2))):
        inputs = layer(nq, nk)
        got, _ = integration.attend(CAUSAL, *inputs, None, sliding_window=3)
        torch.testing.assert_close(got, formula(CAUSAL, *inputs, seen.to(DEVICE))[0])
    inputs = layer()
    for wide in (6, 7, None):
        assert torch.equal(
            integration.attend(OPEN, *inputs, None, sliding_window=wide)[0], integration.attend(OPEN, *inputs, None)[0]
        )


def test_rows_that_see_nothing_give_zero():
    inputs = [x.requires_grad_() for x in layer()]
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]], dtype=torch.bool, device=DEVICE)
    out, _ = integration.attend(CAUSAL, *inputs, integration.make_mask(2, 6, 6, attention_mask=real.long()))
    assert (out[1, :2] == 0).all() and (out[1, 2:] != 0).any()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs) and (inputs[1].grad[1, :, :2] == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {"scaling": 0.3},
        {"softcap": 1.5},
        {"s_aux": [0.3, -1.0, 2.0, 0.0]},
        {"position_bias": (1, 4, 6, 6)},
        {"position_bias": (2, 1, 6, 6)},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", ["none", "band", "matrix", "added"])
def test_arguments_are_served_under_every_mask(mask, options):
    inputs, real = layer(), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool, device=DEVICE)
    whole = lower(6, 6).to(DEVICE) & real[:, None, None, :]
    drawn = torch.Generator().manual_seed(7)
    make = {
        "s_aux": lambda value: torch.tensor(value, dtype=torch.float64, device=DEVICE),
        "position_bias": lambda shape: torch.randn(shape, generator=drawn, dtype=torch.float64).to(DEVICE),
    }
    options = {name: make.get(name, lambda x: x)(value) for name, value in options.items()}
    given = {
        "none": None,
        "band": integration.make_mask(2, 6, 6, attention_mask=real),
        "matrix": whole,
        "added": torch.zeros(whole.shape, dtype=torch.float64, device=DEVICE).masked_fill(~whole, float("-inf")),
    }[mask]
    module = OPEN if mask == "none" else CAUSAL
    wanted, _ = formula(module, *inputs, None if mask == "none" else whole, **options)
    torch.testing.assert_close(integration.attend(module, *inputs, given, **options)[0], wanted)


def test_a_matrix_for_each_head_keeps_its_heads():
    inputs, keep = layer(), lower(4, 6).to(DEVICE)[None, :, None, :]  # one row for all queries, another for each head
    torch.testing.assert_close(integration.attend(CAUSAL, *inputs, keep)[0], formula(CAUSAL, *inputs, keep)[0])


def test_a_row_may_serve_the_whole_batch():
    inputs, keep = layer(), (torch.arange(6, device=DEVICE) != 2)[None, None, None, :]
    torch.testing.assert_close(integration.attend(CAUSAL, *inputs, keep)[0], formula(CAUSAL, *inputs, keep)[0])


def test_a_bias_is_cropped_with_the_keys():
    """Of a static cache: T5's bias is as long as the cache."""
    inputs, bias = layer(4, 9), torch.randn(1, 4, 4, 9, dtype=torch.float64, device=DEVICE)
    mask = integration.make_mask(2, 4, 9, q_offset=2)
    wanted, _ = formula(CAUSAL, *inputs, lower(6, 9)[2:].to(DEVICE), position_bias=bias)
    torch.testing.assert_close(integration.attend(CAUSAL, *inputs, mask, position_bias=bias)[0], wanted)


WRONG_CALLS = {
    "sparse indices": ({"indices": torch.zeros(1)}, NotImplementedError, ["indices"]),
    "sinks for each token": ({"sinks": torch.zeros(2, 4, 6, 1)}, NotImplementedError, ["sinks"]),
    "paged": ({"block_table": torch.zeros(1)}, NotImplementedError, ["block_table"]),
    "a mask of 2 dimensions": ({"attention_mask": torch.ones(2, 6) > 0}, TypeError, ["4 dimensions", "[2, 6]"]),
    "a mask that is none": ({"attention_mask": "causal"}, TypeError, ["attention_mask", "str"]),
    "a mask of whole numbers": ({"attention_mask": torch.ones(2, 1, 6, 6, dtype=torch.long)}, TypeError, ["bool", "int64"]),
    "a mask for fewer keys": ({"attention_mask": torch.ones(2, 1, 6, 5)}, ValueError, ["attn_mask", "(2, 1, 6, 5)"]),
    "keys added after the mask": ({"attention_mask": integration.Band(5, 5, right=0)}, NotImplementedError, ["6 keys", "5"]),
    "a window of no direction": (
        {"sliding_window": 3, "is_causal": False}, NotImplementedError, ["sliding_window=3", "attention_mask"]
    ),
    "packed, and a batch of 2": ({"cu_seq_lens_q": torch.tensor([0, 6])}, ValueError, ["cu_seq_lens_q", "2"]),
    "packed, with a bias": (
        {"cu_seq_lens_q": torch.tensor([0, 6]), "position_bias": torch.zeros(1, 1, 6, 6)},
        NotImplementedError,
        ["position_bias", "cu_seq_lens_q"],
    ),
    "a scale that is learned": ({"scaling": torch.ones(1)}, TypeError, ["scale"]),
    "sinks of another number": ({"s_aux": torch.zeros(3)}, ValueError, ["sinks", "(3,)"]),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_CALLS)
def test_what_is_not_served_is_said(what):
    """Nothing is dropped in silence."""
    options, error, words = WRONG_CALLS[what]
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with pytest.raises(error) as raised:
        integration.attend(CAUSAL, *layer(), **{"attention_mask": None} | options)
    assert all(word in str(raised.value) for word in words), raised.value


def test_more_queries_than_keys_need_a_mask():
    with pytest.raises(ValueError, match="6 queries over 4 keys needs an attention_mask"):
        integration.attend(CAUSAL, *layer(6, 4), None)
    assert integration.attend(OPEN, *layer(6, 4), None)[0].shape == (2, 6, 4, 8)


def test_weights_are_not_made_and_that_is_said():
    with pytest.warns(UserWarning, match="no attention weights.*'eager'"):
        found = tiny("qwen3")(tokens(), output_attentions=True)
    assert not found.attentions
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny("qwen3")(tokens())


def test_a_model_whose_layers_do_not_say_that_they_are_causal():
    """Its mask does: it is never left out."""
    model = tiny("llama")
    for block in model.model.layers:
        block.self_attn.is_causal = False
    torch.testing.assert_close(logits_of(model, input_ids=tokens()), logits_of(tiny("llama"), input_ids=tokens()))


# --- the name ---------------------------------------------------------------------------------------------


def test_a_name_serves_masks_too_and_only_once():
    """A name without a mask function would get no mask at all, in silence."""
    before = hf.AttentionInterface().valid_keys()
    assert integration.register() == OURS and hf.AttentionInterface().valid_keys() == before
    for name in (OURS, integration.register("edu_other")):
        assert hf.AttentionMaskInterface()[name] is integration.make_mask
        assert hf.AttentionInterface()[name].func is integration.attend
    with pytest.raises(ValueError, match="edu_attentoin"):
        tiny("llama", "edu_attentoin")


def test_registering_again_changes_the_backend(monkeypatch, asked):
    model = tiny("llama", integration.register("edu_other", backend="torch"))
    logits_of(model, input_ids=tokens())
    integration.register("edu_other")
    logits_of(model, input_ids=tokens())
    assert [call.backend for call in asked] == ["torch"] * LAYERS + ["auto"] * LAYERS


@pytest.mark.parametrize(
    "name", ["flash_edu", "my_sdpa", "flex_attention", "eager", "paged|edu", "edu/attention", "edu:attention"]
)
def test_names_that_transformers_would_misread(name):
    with pytest.raises(ValueError, match=f"its own meaning, got '{re.escape(name)}'"):
        integration.register(name)


def test_the_name_of_another_attention_is_not_taken():
    with pytest.raises(ValueError, match="must be free, got 'formula'"):
        integration.register("formula")
    with pytest.raises(ValueError, match="backend must be one of"):
        integration.register(backend="cuda")


def test_a_transformers_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(integration.importlib.metadata, "version", lambda package: "5.3.1")
    with pytest.raises(ImportError, match="5.4 or newer, got 5.3.1"):
        integration.register()


def test_why_flash_edu_cannot_be_the_name():
    """If this fails, transformers has changed, and the name may."""
    hf.AttentionInterface.register("flash_edu", integration.attend)
    hf.AttentionMaskInterface.register("flash_edu", integration.make_mask)
    with pytest.raises((ValueError, ImportError)):
        tiny("llama", "flash_edu")


# --- as users meet it -------------------------------------------------------------------------------------


def test_a_model_is_made_with_it_and_changed_to_it():
    config = CONFIGS["llama"]()
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=OURS).to(DEVICE).eval()
    assert model.config._attn_implementation == OURS
    ours = logits_of(model, input_ids=tokens())
    model.set_attn_implementation("eager")
    eager = logits_of(model, input_ids=tokens())
    model.set_attn_implementation(integration.register())
    assert torch.equal(logits_of(model, input_ids=tokens()), ours) and not torch.equal(ours, eager)


def examples():
    """The README's, and the module's own."""
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    told = re.search(r"```python\n((?:(?!```).)*integrations\.transformers.*?)```", readme, re.DOTALL)[1]
    return {"README": told, "docstring": inspect.cleandoc(re.search(r"\n\n((?:    .*\n|\n)+)", integration.__doc__)[1])}


@pytest.mark.parametrize("where", ["README", "docstring"])
def test_the_example_runs(where, tmp_path):
    original("qwen3").save_pretrained(tmp_path)
    code = examples()[where]
    assert "Qwen/Qwen3-0.6B" in code and len([line for line in code.splitlines() if line.strip()]) <= 5
    space = {}
    exec(code.replace("Qwen/Qwen3-0.6B", str(tmp_path)), space)
    assert space["model"].config._attn_implementation == OURS
    torch.testing.assert_close(
        logits_of(space["model"].to(DEVICE), input_ids=tokens()), logits_of(tiny("qwen3"), input_ids=tokens())
    )


def test_the_package_itself_does_not_import_transformers():
    code = "import sys, flash_edu.integrations; from flash_edu import flash_attention; "
    code += "assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
