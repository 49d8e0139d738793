"""GPTDecoder and TransformerBlock: the guide's signatures, causality, weights, text generation, and PyTorch's tools."""
import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from this_machine import DEVICE, ON_GPU

from flash_edu import flash_attention
from flash_edu.models import GPTDecoder, TransformerBlock
from flash_edu.models.gpt import ATTENTIONS, pick_attention, sdpa_attention
from flash_edu.reference import naive_attention

NAMES = list(ATTENTIONS)


def tiny(attention=None, **changes):
    """A decoder small enough for a test, with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "d_model": 24, "num_heads": 3, "num_layers": 2, "max_seq_len": 40, "dropout": 0.0}
    model = GPTDecoder(**(sizes | changes), attention=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return model.to(DEVICE)


def tokens(batch=2, seq=19, vocab_size=37, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, seq), generator=generator).to(DEVICE)


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())


def logits_and_gradients(model, ids):
    model.zero_grad()
    loss_of(model, ids).backward()
    found = {name: parameter.grad.double() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        return found | {"logits": model(ids).double()}


# the interface


def test_signatures_are_the_guides():
    guide = {
        TransformerBlock: {"d_model": 512, "num_heads": 8, "dropout": 0.1},
        GPTDecoder: {
            "vocab_size": 50000,
            "d_model": 768,
            "num_heads": 12,
            "num_layers": 12,
            "max_seq_len": 2048,
            "dropout": 0.1,
        },
    }
    for cls, promised in guide.items():
        parameters = inspect.signature(cls).parameters.values()
        positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
        assert list(positional.items()) == list(promised.items())
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters if p.name not in promised)


def test_submodules_have_the_guides_names():
    assert sorted(GPTDecoder(7, 8, 2, 1, 5).state_dict()) == sorted(
        ["token_embedding.weight", "position_embedding.weight", "ln_f.weight", "ln_f.bias", "head.weight"]
        + [
            f"layers.0.{part}.{kind}"
            for part in (
                "norm1",
                "norm2",
                "ffn.0",
                "ffn.3",
                "attention.q_proj",
                "attention.k_proj",
                "attention.v_proj",
                "attention.out_proj",
            )
            for kind in ("weight", "bias")
        ]
    )


@pytest.mark.parametrize("seq", [1, 19, 40])
def test_shape_of_the_logits(seq):
    assert tiny()(tokens(3, seq)).shape == (3, seq, 37)


def test_int32_ids_give_the_same_logits():
    model = tiny()
    assert torch.equal(model(tokens().int()), model(tokens()))


def test_a_block_runs_alone_in_both_modes():
    block = TransformerBlock(24, 3).to(DEVICE)
    x = torch.randn(2, 11, 24, device=DEVICE)
    assert block(x).shape == x.shape
    assert not torch.equal(block(x), block(x)), "in training, dropout differs from call to call"
    block.eval()
    assert torch.equal(block(x), block(x))


# what it computes


def test_a_block_adds_to_its_input():
    """Pre-norm: with both added parts at 0, x comes out as it went in, unnormalised."""
    block = TransformerBlock(24, 3, 0.0).to(DEVICE)
    for layer in (block.attention.out_proj, block.ffn[3]):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    x = 100 * torch.randn(2, 11, 24, device=DEVICE)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("attention", NAMES)
@pytest.mark.parametrize("changed", [0, 7, 18])
def test_a_token_does_not_change_what_stands_before_it(attention, changed):
    model, ids = tiny(attention), tokens()
    other = ids.clone()
    other[:, changed] = (other[:, changed] + 1) % 37
    before, after = model(ids), model(other)
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert (before[:, changed:] != after[:, changed:]).any(dim=-1).all(), "every later position sees the change"


def test_a_prefix_has_the_logits_it_has_within_the_whole():
    model, ids = tiny().double(), tokens()
    torch.testing.assert_close(model(ids[:, :8]), model(ids)[:, :8])


def test_a_block_looks_ahead_unless_it_is_causal():
    x = torch.randn(1, 6, 24, device=DEVICE)
    other = x.clone()
    other[:, -1] += 1
    for causal in (False, True):
        block = TransformerBlock(24, 3, 0.0, causal=causal).to(DEVICE)
        assert torch.equal(block(x)[:, 0], block(other)[:, 0]) is causal


def test_three_attentions_agree_in_logits_and_gradients():
    """The yardstick is fp64; nobody may be much further from it than the formula in fp32 is."""
    ids = tokens(3, 40)
    truth = logits_and_gradients(tiny("naive").double(), ids)
    naive = logits_and_gradients(tiny("naive"), ids)
    for attention in (None, "flash_edu", "sdpa"):
        got = logits_and_gradients(tiny(attention), ids)
        assert got.keys() == truth.keys()
        for name, want in truth.items():
            bound = 4 * (naive[name] - want).abs().max() + 4 * torch.finfo(torch.float32).eps * want.abs().max()
            assert (got[name] - want).abs().max() <= bound, f"{attention}: {name}"


def test_a_name_stands_for_its_attention():
    meant = {None: flash_attention, "flash_edu": flash_attention, "sdpa": sdpa_attention, "naive": naive_attention}
    assert set(meant) == {None, *ATTENTIONS}
    for name, function in meant.items():
        assert [layer.attention.attention for layer in tiny(name).layers] == [function, function], name


def test_your_own_attention_is_called_in_every_block():
    calls = []

    def mine(q, k, v, *, causal):
        calls.append((tuple(q.shape), causal))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    model, ids = tiny(mine), tokens()
    torch.testing.assert_close(model(ids), tiny("sdpa")(ids))
    assert calls == [((2, 3, 19, 8), True)] * 2
    assert pick_attention(mine) is mine


# weights


def test_weights_start_as_in_gpt2():
    torch.manual_seed(0)
    layers = 8
    model = GPTDecoder(500, 128, 4, layers, 300)
    added = 0
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name or "ln_f" in name:
            assert (parameter == 1).all(), name
        else:
            adds = name.endswith(("out_proj.weight", "ffn.3.weight"))
            std = 0.02 / math.sqrt(2 * layers) if adds else 0.02
            assert abs(parameter.std().item() / std - 1) < 0.05, f"{name}: {parameter.std().item():.4f}, not {std:.4f}"
            assert abs(parameter.mean().item()) < 0.05 * std, name
            added += adds
    assert added == 2 * layers


def test_an_untrained_model_finds_all_tokens_about_equally_likely():
    torch.manual_seed(0)
    model = GPTDecoder(256, 64, 4, 6, 64)
    ids = torch.randint(256, (4, 65))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert abs(loss - math.log(256)) < 0.1


def test_embedding_and_head_stay_one_parameter():
    model = tiny()
    ids = tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, ids).backward()
    optimizer.step()
    for variant in (model, copy.deepcopy(model), copy.deepcopy(model).double(), copy.deepcopy(model).to("cpu")):
        assert variant.head.weight is variant.token_embedding.weight
    assert sum(p is model.head.weight for p in model.parameters()) == 1


def test_state_dict_goes_into_another_model():
    model, other = tiny(), tiny(attention="sdpa")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert not torch.equal(other(tokens()), model(tokens()))
    other.load_state_dict(model.state_dict())
    assert other.head.weight is other.token_embedding.weight
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))


def test_num_parameters_counts_the_shared_matrix_once():
    vocab_size, width, seq, layers = 37, 24, 40, 2
    block = 4 * (width * width + width) + 2 * 2 * width + 2 * 4 * width * width + 5 * width
    assert tiny().num_parameters(embeddings=False) == layers * block + 2 * width
    assert tiny().num_parameters() == layers * block + 2 * width + (vocab_size + seq) * width


# writing


def test_greedy_text_is_the_likeliest_token_each_time():
    model, ids = tiny(), tokens(2, 5)
    want = ids
    for _ in range(12):
        want = torch.cat([want, model(want)[:, -1:].argmax(dim=-1)], dim=1)
    for options in ({"temperature": 0}, {"top_k": 1}, {"temperature": 0, "top_k": 5}):
        assert torch.equal(model.generate(ids, 12, **options), want), options
    assert torch.equal(model.generate(ids, 0), ids)


def test_text_longer_than_the_model_reads_its_last_part():
    model, ids = tiny(max_seq_len=8), tokens(1, 6)
    written = model.generate(ids, 10, temperature=0)
    assert written.shape == (1, 16)
    for end in range(8, 16):
        assert written[0, end] == model(written[:, end - 8 : end])[0, -1].argmax()
    assert model.generate(tokens(1, 20), 1).shape == (1, 21), "a prompt longer than the model is fine too"


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (1.0, 99)])
def test_tokens_are_drawn_as_often_as_the_logits_say(temperature, top_k):
    draws = 4000
    model = tiny(vocab_size=6)
    ids = torch.zeros(draws, 1, dtype=torch.long, device=DEVICE)
    logits = model(ids[:1])[0, -1].double() / temperature
    if top_k and top_k < 6:
        logits[logits.argsort(descending=True)[top_k:]] = -math.inf
    p = logits.softmax(dim=-1)
    drawn = model.generate(ids, 1, temperature, top_k, torch.Generator(DEVICE).manual_seed(0))[:, -1]
    share = torch.bincount(drawn, minlength=6) / draws
    assert (share[p == 0] == 0).all()
    assert ((share - p).abs() <= 5 * (p * (1 - p) / draws).sqrt()).all(), f"drew {share}, should be {p}"
    assert 0.02 < p.max() < 0.98, "the test needs a distribution that a mistake would change"


def test_a_generator_repeats_a_text():
    model, ids = tiny(), tokens(2, 5)
    first, again, other = (
        model.generate(ids, 20, generator=torch.Generator(DEVICE).manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert model.generate(ids.int(), 2).dtype == torch.int32


def test_generate_switches_dropout_off_and_on_again():
    model, ids = tiny(dropout=0.5), tokens(1, 5)
    model.train()
    texts = [model.generate(ids, 10, temperature=0) for _ in range(2)]
    assert torch.equal(*texts) and model.training and model.layers[0].training
    model.eval()
    model.generate(ids, 1)
    assert not model.training


# wrong input


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        (torch.zeros(1, 41, dtype=torch.long), ValueError, "41 tokens.*max_seq_len=40"),
        (torch.zeros(1, 5), TypeError, "input_ids must be int64 or int32, got torch.float32"),
        (torch.zeros(1, 5, dtype=torch.uint8), TypeError, r"got torch.uint8; call .long\(\)"),
        (torch.zeros(5, dtype=torch.long), ValueError, r"\(batch, seq\), got \(5,\)"),
        (torch.zeros(1, 5, 2, dtype=torch.long), ValueError, r"\(batch, seq\), got \(1, 5, 2\)"),
    ],
)
def test_wrong_ids_are_named(ids, error, words):
    with pytest.raises(error, match=words):
        tiny()(ids.to(DEVICE))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"temperature": -1}, "temperature.*-1"), ({"top_k": 0}, "top_k.*0")],
)
def test_wrong_options_of_generate_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        tiny().generate(tokens(), 1, **options)


def test_generate_needs_a_prompt():
    with pytest.raises(ValueError, match="at least one token"):
        tiny().generate(tokens()[:, :0], 1)
    with pytest.raises(TypeError, match="input_ids"):
        tiny().generate(tokens().float(), 1)
    with pytest.raises(ValueError, match=r"\(batch, seq\)"):
        tiny().generate(tokens()[0], 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention": "fast"}, "flash_edu, sdpa, naive, got 'fast'"),
        ({"vocab_size": 0}, "vocab_size.*0"),
        ({"num_layers": 0}, "num_layers.*0"),
        ({"max_seq_len": -1}, "max_seq_len.*-1"),
        ({"d_model": 25}, "d_model.*25"),
        ({"dropout": 1.5}, "dropout.*1.5"),
    ],
)
def test_wrong_sizes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        GPTDecoder(**({"vocab_size": 37, "d_model": 24, "num_heads": 3, "num_layers": 1} | options))


# PyTorch's tools


@pytest.mark.parametrize("attention", NAMES)
def test_compiles_to_one_graph(attention):
    model, ids = tiny(attention, num_layers=1), tokens()
    plain = logits_and_gradients(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    model.zero_grad()
    loss_of(compiled, ids).backward()
    largest = max(x.abs().max().item() for name, x in plain.items() if name != "logits")
    for name, parameter in model.named_parameters():  # atol: a key's bias moves no weight, its gradient is rounding alone
        torch.testing.assert_close(parameter.grad, plain[name].float(), rtol=1e-3, atol=1e-5 * largest)


def test_autocast_errs_no_more_than_the_formula_does():
    ids, dtype = tokens(), torch.bfloat16
    exact = tiny("naive").double()(ids)
    errors = {}
    for attention in NAMES:
        model = tiny(attention)
        with torch.autocast(DEVICE, dtype=dtype):
            logits = model(ids)
        assert logits.dtype == dtype and logits.isfinite().all()
        errors[attention] = (logits - exact).abs().max().item()
        with torch.autocast(DEVICE, dtype=dtype):
            loss_of(model, ids).backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    assert max(errors.values()) <= 2 * errors["naive"], errors
