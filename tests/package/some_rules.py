"""A request's rules, random: each alone, for tests that ask for one, for two, or for all at once."""
import torch
import triton
import triton.language as tl
from this_machine import DEVICE, ON_GPU

from flash_edu import Pattern, flash_attention_with_lse
from flash_edu.testing import assert_close, differentiate, eager, make_case, truth

NEG_INF = float("-inf")


@triton.jit
def striped(batch, head, i, j, buffers):
    """Every third diagonal is hidden, another one in each head and batch."""
    return (i + 2 * j + head + batch) % 3 != 0


@triton.jit
def biased(score, batch, head, i, j, buffers):
    """Some bending, and a bias by the distance, from a buffer."""
    return score - 0.01 * score * score + tl.load(buffers[0] + tl.abs(i - j) % 8)


@triton.jit
def biased_grad(score, batch, head, i, j, buffers):
    return 1 - 0.02 * score


def bool_mask(shape, generator):
    """Two of three pairs attend; the fifth query sees nothing, and nobody sees the seventh key."""
    mask = torch.rand(shape, generator=generator) < 0.67
    if len(shape) > 1 and shape[-2] > 4:
        mask[..., 4, :] = False
    if shape and shape[-1] > 6:
        mask[..., 6] = False
    return mask.to(DEVICE)


def float_mask(shape, generator, dtype=torch.float32):
    """Normal, and -inf where such a bool mask hides."""
    mask = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return mask.masked_fill(~bool_mask(shape, generator), NEG_INF)


def padding(batch, nk, generator):
    """Left, right, with holes, and, in the fourth sequence, nothing but padding."""
    place, third = torch.arange(nk), nk // 3
    kinds = [place >= third, place < nk - third, torch.rand(nk, generator=generator) < 0.6, place < 0]
    return torch.stack([kinds[b % 4] for b in range(batch)]).to(DEVICE)


def make_pattern(generator):
    return Pattern(striped, biased, biased_grad, buffers=(torch.randn(8, generator=generator).to(DEVICE),))


MAKERS = {
    "causal": lambda b, h, nq, nk, g: {"causal": True},
    "window": lambda b, h, nq, nk, g: {"window": (19, 6)},
    "bool mask": lambda b, h, nq, nk, g: {"attn_mask": bool_mask((b, 1, nq, nk), g)},
    "float mask": lambda b, h, nq, nk, g: {"attn_mask": float_mask((1, h, nq, nk), g)},
    "padding": lambda b, h, nq, nk, g: {"key_padding_mask": padding(b, nk, g)},
    "alibi": lambda b, h, nq, nk, g: {"alibi_slopes": torch.rand(b, h, generator=g).to(DEVICE)},
    "softcap": lambda b, h, nq, nk, g: {"softcap": 2.5},
    "sinks": lambda b, h, nq, nk, g: {"sinks": torch.randn(h, generator=g).to(DEVICE)},
    "pattern": lambda b, h, nq, nk, g: {"pattern": make_pattern(g)},
    "dropout": lambda b, h, nq, nk, g: {"dropout_p": 0.3},
}
EVERY = [name for name in MAKERS if name != "bool mask"]  # two masks are not a request


def make_rules(names, batch, heads, nq, nk, seed=0) -> dict:
    """What `flash_attention` is asked, by name: arguments for make_case."""
    generator = torch.Generator().manual_seed(seed)
    return {k: x for name in names for k, x in MAKERS[name](batch, heads, nq, nk, generator).items()}


def dtypes_of(backend):
    if backend == "triton" and not ON_GPU:
        return [torch.float32, torch.float16]  # Triton's interpreter computes bf16 wrongly, and we refuse it
    return [torch.float32, torch.float16, torch.bfloat16]


def check(backend, shape, dtype=torch.float32, seed=0, **options):
    """out, lse and every gradient of one request, by the bound. shape: batch, heads, key/value heads, Nq, Nk, D, Dv."""
    case = make_case(*shape, dtype=dtype, device=DEVICE, hot=2.0, seed=seed, **options)
    got, right, plain = differentiate(flash_attention_with_lse, case, backend=backend), truth(case), eager(case)
    assert got.keys() == right.keys()
    for name in right:
        assert_close(name, got[name], right[name], plain[name])
