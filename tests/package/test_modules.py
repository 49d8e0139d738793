"""FlashAttention and MultiHeadFlashAttention: what they compute, when they drop, what is saved of them; the promised names."""
import inspect

import pytest
import torch
from this_machine import DEVICE
from torch import nn

import flash_edu
from flash_edu import FlashAttention, MultiHeadFlashAttention, flash_attention, flash_attention_with_lse
from flash_edu.models import TransformerBlock
from flash_edu.reference import naive_attention
from flash_edu.testing import by_formula

BATCH, N, NK, WIDTH, HEADS = 2, 11, 13, 32, 4


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def draw(*shape):
    return torch.randn(shape, device=DEVICE)


def holes(*shape):
    return torch.rand(shape, device=DEVICE) < 0.7


def heads(n):
    return draw(BATCH, HEADS, n, 8)


class TestFlashAttention:
    def test_is_the_function(self):
        q, k, v = heads(N), heads(NK), heads(NK)
        for options in ({}, {"causal": True}, {"scale": 0.5}, {"window": (3, None)}, {"softcap": 2.0}):
            assert torch.equal(FlashAttention(**options)(q, k, v), flash_attention(q, k, v, **options))
        masks = {"attn_mask": draw(N, NK), "key_padding_mask": holes(BATCH, NK)}
        assert torch.equal(FlashAttention()(q, k, v, *masks.values()), flash_attention(q, k, v, **masks))

    def test_the_quick_start_of_the_guide(self):
        q, k, v = (draw(2, 8, 1024, 64) for _ in range(3))
        out = FlashAttention(causal=False)(q, k, v)
        torch.testing.assert_close(out, nn.functional.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)

    def test_drops_in_training_only(self):
        module, inputs = FlashAttention(dropout=0.5), [heads(N) for _ in range(3)]
        assert not torch.equal(module(*inputs), module(*inputs))
        torch.manual_seed(3)
        dropped = module(*inputs)
        torch.manual_seed(3)
        assert torch.equal(dropped, flash_attention(*inputs, dropout_p=0.5))
        assert torch.equal(module.eval()(*inputs), flash_attention(*inputs))

    def test_evaluation_draws_no_random_number(self):
        module, inputs = FlashAttention(dropout=0.5).eval(), [heads(N) for _ in range(3)]
        before = torch.get_rng_state()
        module(*inputs)
        assert torch.equal(torch.get_rng_state(), before)

    def test_no_state(self):
        assert not FlashAttention(dropout=0.1, window=(1, 1), softcap=1.0).state_dict()

    def test_says_what_is_set(self):
        assert repr(FlashAttention()) == "FlashAttention(causal=False)"
        options = {"causal": True, "dropout": 0.1, "scale": 0.5, "window": (4, 0), "softcap": 30.0}
        assert repr(FlashAttention(**options)) == (
            "FlashAttention(causal=True, dropout=0.1, scale=0.5, window=(4, 0), softcap=30.0)"
        )


def with_formula(module):
    """The same weights, attention by the formula."""
    options = {"causal": module.causal, "window": module.window, "softcap": module.softcap}
    plain = MultiHeadFlashAttention(
        WIDTH, HEADS, num_kv_heads=module.k_proj.out_features // module.head_dim, **options,
        attention=lambda *x, **options: by_formula(*x, **options)[0],
    ).to(DEVICE)  # fmt: skip
    plain.load_state_dict(module.state_dict())
    return plain


class TestMultiHeadFlashAttention:
    @pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
    @pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (3, 2)}, {"softcap": 1.0}], ids=str)
    @pytest.mark.parametrize("masked", [False, True])
    def test_is_the_formula(self, masked, options, num_kv_heads):
        ours = MultiHeadFlashAttention(WIDTH, HEADS, num_kv_heads=num_kv_heads, **options).to(DEVICE)
        plain = with_formula(ours)
        masks = {"key_padding_mask": holes(BATCH, NK), "attn_mask": draw(HEADS, 1, NK)} if masked else {}
        x, context = draw(BATCH, N, WIDTH), draw(BATCH, NK, WIDTH)
        torch.testing.assert_close(ours(x, context, **masks), plain(x, context, **masks), rtol=1e-4, atol=1e-5)
        for module in (ours, plain):
            module(x, context, **masks).square().sum().backward()
        for a, b in zip(ours.parameters(), plain.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("masked", [False, True])
    def test_is_nn_multihead_attention(self, masked):
        """... whose boolean masks are the other way round."""
        ours, theirs = MultiHeadFlashAttention(WIDTH, HEADS), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        weights, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
        with torch.no_grad():
            for layer, w, b in zip((ours.q_proj, ours.k_proj, ours.v_proj), weights, biases):
                layer.weight.copy_(w)
                layer.bias.copy_(b)
        ours.out_proj = theirs.out_proj
        x, context = torch.randn(2, 9, WIDTH), torch.randn(2, NK, WIDTH)
        for memory in (x, context):
            padding, mask = (torch.rand(shape) < 0.7 for shape in ((2, memory.shape[1]), (9, memory.shape[1])))
            padding[:, 0] = mask[:, 0] = True  # nn.MultiheadAttention gives NaN where nothing is to be seen
            inverted = {"key_padding_mask": ~padding, "attn_mask": ~mask} if masked else {}
            want = theirs(x, memory, memory, need_weights=False, **inverted)[0]
            masks = {"key_padding_mask": padding, "attn_mask": mask} if masked else {}
            torch.testing.assert_close(ours(x, memory, **masks), want)

    def test_padding_does_not_reach_real_tokens(self):
        module, x = MultiHeadFlashAttention(WIDTH, HEADS).to(DEVICE), draw(BATCH, N, WIDTH)
        real = torch.arange(N, device=DEVICE) < torch.tensor([[N], [4]], device=DEVICE)
        before = module(x, key_padding_mask=real)
        x[1, 4:] = 1e4
        after = module(x, key_padding_mask=real)
        assert torch.equal(before[real], after[real])
        torch.testing.assert_close(after[1, :4], module(x[1:, :4])[0])

    def test_dropout_is_of_the_weights_and_in_training_only(self):
        module, x = MultiHeadFlashAttention(WIDTH, HEADS, dropout=0.5).to(DEVICE), draw(BATCH, N, WIDTH)
        assert not torch.equal(module(x), module(x))
        assert (module(x) != 0).all(), "what the projection gives is not dropped"
        torch.manual_seed(3)
        dropped = module(x)
        torch.manual_seed(3)
        q, k, v = (module._split(layer(x)) for layer in (module.q_proj, module.k_proj, module.v_proj))
        out = flash_attention(q, k, v, dropout_p=0.5)
        assert torch.equal(dropped, module.out_proj(out.transpose(1, 2).flatten(2)))
        module.eval()
        assert torch.equal(module(x), module(x))

    def test_dropout_keeps_the_mean(self):
        module, x = MultiHeadFlashAttention(WIDTH, HEADS, dropout=0.3).to(DEVICE), draw(1, N, WIDTH)
        draws = 2000
        runs = module(x.expand(draws, -1, -1))
        want, deviation = module.eval()(x)[0], runs.std(0) / draws**0.5
        assert ((runs.mean(0) - want).abs() <= 5 * deviation).all()

    def test_your_own_attention_is_told_only_what_is_asked(self):
        told = []

        def mine(q, k, v, *, causal, **asked):
            told.append((causal, sorted(asked)))
            return flash_attention(q, k, v, causal=causal)

        x, real = draw(BATCH, N, WIDTH), holes(BATCH, N)
        MultiHeadFlashAttention(WIDTH, HEADS, attention=mine).to(DEVICE)(x)
        module = MultiHeadFlashAttention(WIDTH, HEADS, True, 0.1, window=(2, 0), softcap=3.0, attention=mine).to(DEVICE)
        module(x, key_padding_mask=real, attn_mask=draw(N, N))
        module.eval()(x)
        assert told == [
            (False, []),
            (True, ["attn_mask", "dropout_p", "key_padding_mask", "softcap", "window"]),
            (True, ["softcap", "window"]),
        ]

    def test_without_bias(self):
        assert not [name for name in MultiHeadFlashAttention(32, 4, bias=False).state_dict() if "bias" in name]

    def test_state_dict_is_stable(self):
        keys = [f"{p}_proj.{w}" for p in ("q", "k", "v", "out") for w in ("weight", "bias")]
        for options in ({}, {"dropout": 0.1}, {"window": (4, 0), "softcap": 30.0}):
            module = MultiHeadFlashAttention(32, 4, num_kv_heads=2, **options)
            assert list(module.state_dict()) == keys
            MultiHeadFlashAttention(32, 4, num_kv_heads=2).load_state_dict(module.state_dict())
        shapes = {name: tuple(x.shape) for name, x in module.state_dict().items() if "weight" in name}
        assert shapes == {"q_proj.weight": (32, 32), "k_proj.weight": (16, 32), "v_proj.weight": (16, 32), "out_proj.weight": (32, 32)}

    def test_says_what_is_set(self):
        assert "(head_dim=8, causal=False" not in repr(MultiHeadFlashAttention(32, 4))
        assert "head_dim=8, causal=False\n" in repr(MultiHeadFlashAttention(32, 4))
        assert "head_dim=8, causal=True, dropout=0.1, window=(4, 0)\n" in repr(MultiHeadFlashAttention(32, 4, True, 0.1, window=(4, 0)))


class TestTransformerBlock:
    def test_drops_where_gpt2_does(self):
        """Of the attention weights, and of what each part adds to x; within the small network too."""
        block, x = TransformerBlock(WIDTH, HEADS, 0.5).to(DEVICE), draw(1, 50, WIDTH)
        assert block.attention.dropout == block.dropout.p == 0.5
        with torch.no_grad():
            for part in (block.attention.out_proj, block.ffn[3]):
                part.weight.zero_()
                part.bias.fill_(1.0)
        added = block(x) - x  # twice 1, or 2 that are kept
        share = [(added - value).abs().lt(1e-3).float().mean().item() for value in (0, 2, 4)]
        assert all(abs(got - want) < 0.1 for got, want in zip(share, (0.25, 0.5, 0.25)))

    @pytest.mark.parametrize("attention", ["flash_edu", "naive", "sdpa"])
    def test_every_attention_drops_weights(self, attention):
        block, x = TransformerBlock(WIDTH, HEADS, 0.5, attention=attention).to(DEVICE).attention, draw(1, N, WIDTH)
        assert not torch.equal(block(x), block(x))
        assert (block(x) != 0).all()

    def test_padding(self):
        block, x = TransformerBlock(WIDTH, HEADS, 0.0).to(DEVICE), draw(BATCH, N, WIDTH)
        real = torch.arange(N, device=DEVICE) < torch.tensor([[N], [4]], device=DEVICE)
        torch.testing.assert_close(block(x, key_padding_mask=real)[1, :4], block(x[1:, :4])[0])


def test_the_formula_drops_as_the_kernels_do():
    q, k, v = heads(N), heads(NK), heads(NK)
    runs = []
    for attend in (flash_attention, naive_attention):
        torch.manual_seed(3)
        runs.append(attend(q, k, v, causal=True, dropout_p=0.4))
    torch.testing.assert_close(*runs)


def test_signatures():
    """The interface users were promised: names, order, defaults, and keyword-only after q, k, v."""
    expected = (
        "(q, k, v, *, causal=False, scale=None, window=None, attn_mask=None, key_padding_mask=None, "
        "alibi_slopes=None, softcap=None, sinks=None, pattern=None, dropout_p=0.0, backend='auto')"
    )
    for function in (flash_attention, flash_attention_with_lse):
        assert bare(function) == expected
    assert bare(FlashAttention) == "(causal=False, dropout=0.0, scale=None, window=None, softcap=None)"
    assert bare(FlashAttention.forward) == "(self, q, k, v, attn_mask=None, key_padding_mask=None)"
    assert bare(MultiHeadFlashAttention) == (
        "(d_model, num_heads, causal=False, dropout=0.0, num_kv_heads=None, bias=True, *, "
        "window=None, softcap=None, attention=None)"
    )
    assert bare(MultiHeadFlashAttention.forward) == "(self, x, context=None, key_padding_mask=None, attn_mask=None)"


def bare(function) -> str:
    signature = inspect.signature(function)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))


def test_public_names_have_docstrings():
    for name in flash_edu.__all__:
        assert getattr(flash_edu, name).__doc__, name
