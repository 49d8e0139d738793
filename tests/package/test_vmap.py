"""torch.func.vmap: a batch of problems is what a loop over them gives; what does not fold says so."""
import pytest
import torch
from options import PATTERN, packed
from this_machine import DEVICE, ON_GPU
from torch.func import grad, jacrev, vmap

from flash_edu import MultiHeadFlashAttention, flash_attention, flash_attention_varlen, flash_attention_with_lse
from flash_edu.testing import assert_close, differentiate, eager, make_case, truth

PROBLEMS, BATCH, HEADS, KV_HEADS, NQ, NK, DIM = 3, 2, 2, 1, 9, 13, 8


def draw(*shape, **kwargs):
    return torch.randn(shape, device=DEVICE, **kwargs)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def problems(batch=BATCH):
    """q, k, v of each, mapped in front."""
    shapes = ((batch, HEADS, NQ, DIM), (batch, KV_HEADS, NK, DIM), (batch, KV_HEADS, NK, DIM))
    return [draw(PROBLEMS, *shape) for shape in shapes]


def holes(*shape):
    return torch.rand(shape, device=DEVICE) < 0.7


# One problem's argument, by name.
EXTRAS = {
    "attn_mask": lambda: draw(BATCH, HEADS, NQ, NK),
    "attn_mask of one batch": lambda: draw(HEADS, 1, NK),
    "attn_mask of a few dims": lambda: draw(NQ, 1),
    "boolean attn_mask": lambda: holes(BATCH, 1, NQ, NK),
    "boolean attn_mask of one batch": lambda: holes(NQ, NK),
    "key_padding_mask": lambda: holes(BATCH, NK),
    "alibi_slopes": lambda: draw(HEADS),
    "alibi_slopes of each batch": lambda: draw(BATCH, HEADS),
    "sinks": lambda: draw(HEADS),
}
MAPPED = [(name, mapped) for name in EXTRAS for mapped in (False, True)]
IN_DIMS = [(0, None, None), (None, 0, 0), (2, 1, 3), (4, None, 0), (-1, -2, -3)]


def skip_if_slow(backend, fits):
    """How a dimension is folded does not depend on the backend; the interpreter looks at a few."""
    if backend == "triton" and not ON_GPU and not fits:
        pytest.skip("tried with backend='torch', and on a GPU")


def argument(name):
    return next(word for word in name.split() if "_" in word or word == "sinks")


def loss(q, k, v, backend, **asked):
    out, lse = flash_attention_with_lse(q, k, v, **asked, causal=True, backend=backend)
    return (out * out).sum() + lse.masked_fill(lse.isinf(), 0.0).sum()


def assert_same(got, want):
    """As near as fp32 sums in another order are."""
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def in_a_loop(function, in_dims, *inputs):
    """What vmap stands for: the function on each problem, results stacked in front."""
    each = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, in_dims)))
        for i in range(PROBLEMS)
    ]
    return [torch.stack(parts) for parts in zip(*each)]


@pytest.mark.parametrize("name, mapped", MAPPED)
def test_extras_mapped_or_not(name, mapped, backend):
    """Forward, and the gradient of each problem, of what is not mapped too."""
    skip_if_slow(backend, name in ("attn_mask", "key_padding_mask", "sinks"))
    x = torch.stack([EXTRAS[name]() for _ in range(PROBLEMS)]) if mapped else EXTRAS[name]()
    inputs, in_dims = (*problems(), x), (0, 0, 0, 0 if mapped else None)

    def forward(q, k, v, x):
        return flash_attention_with_lse(q, k, v, **{argument(name): x}, causal=True, backend=backend)

    def gradients(q, k, v, x):
        learned = argument(name) in ("attn_mask", "sinks") and x.is_floating_point()
        of = lambda q, k, v, x: loss(q, k, v, backend, **{argument(name): x})  # noqa: E731
        return grad(of, argnums=(0, 1, 2, 3) if learned else (0, 1, 2))(q, k, v, x)

    for function in (forward, gradients):
        assert_same(vmap(function, in_dims)(*inputs), in_a_loop(function, in_dims, *inputs))


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_in_dims(batch, in_dims, backend):
    """Mapped anywhere, or not at all. The gradients are of each problem alone."""
    skip_if_slow(backend, (batch, in_dims) in ((1, IN_DIMS[0]), (2, IN_DIMS[2])))
    inputs = problems(batch)
    inputs = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip(inputs, in_dims)]
    gradients = grad(lambda q, k, v: loss(q, k, v, backend), argnums=(0, 1, 2))
    for function in (lambda *x: flash_attention_with_lse(*x, backend=backend), gradients):
        assert_same(vmap(function, in_dims)(*inputs), in_a_loop(function, in_dims, *inputs))


def test_out_dims(backend):
    inputs = problems()
    attend = lambda *x: flash_attention_with_lse(*x, backend=backend)  # noqa: E731
    for got, want, dim in zip(vmap(attend, out_dims=(2, -1))(*inputs), vmap(attend)(*inputs), (2, -1)):
        assert torch.equal(got, want.movedim(0, dim))


def test_within_the_bound(backend):
    """... that every answer has to keep: error against fp64, with sinks mapped, which do not fold."""
    case = make_case(PROBLEMS, HEADS, KV_HEADS, 20, 30, DIM, dtype=torch.float16, device=DEVICE, causal=True, sinks=draw(HEADS))

    def mapped(q, k, v, *, causal, scale, sinks):
        attend = lambda q, k, v, sinks: flash_attention_with_lse(  # noqa: E731
            q[None], k[None], v[None], causal=causal, scale=scale, sinks=sinks, backend=backend
        )
        out, lse = vmap(attend)(q, k, v, sinks.expand(PROBLEMS, -1))
        return out[:, 0], lse[:, 0]

    got, right, plain = differentiate(mapped, case), truth(case), eager(case)
    for name in right:
        assert_close(name, got[name], right[name], plain[name])


def test_vmap_of_vmap(backend):
    q, k, v = problems()
    outer = q.unflatten(2, (HEADS, 1)).movedim(2, 0)  # (HEADS, PROBLEMS, BATCH, 1, NQ, DIM)
    attend = lambda q, k, v: flash_attention(q, k, v, backend=backend)  # noqa: E731
    got = vmap(vmap(attend), (0, None, None))(outer, k, v)
    want = torch.stack([torch.stack([attend(*x) for x in zip(q_head, k, v)]) for q_head in outer])
    torch.testing.assert_close(got, want)


def test_grad_of_vmap(backend):
    """The other way round: one gradient, of all problems together."""
    inputs = problems()
    attend = lambda *x: flash_attention(*x, causal=True, backend=backend)  # noqa: E731
    got = grad(lambda *x: vmap(attend)(*x).square().sum(), argnums=(0, 1, 2))(*inputs)
    want = grad(lambda *x: attend(*(y.flatten(0, 1) for y in x)).square().sum(), argnums=(0, 1, 2))(*inputs)
    assert_same(got, want)


def test_jacobian(backend):
    """jacrev maps the backward over all gradients that can arrive; q, k and v are not mapped."""
    q, k, v = (x[0, :1, :, :3, :2] for x in problems())
    attend = lambda q: flash_attention(q, k, v, backend=backend)  # noqa: E731
    got = jacrev(attend)(q)
    want = torch.autograd.functional.jacobian(attend, q)
    torch.testing.assert_close(got, want)


def test_gradients_of_each_sample(backend):
    """What vmap(grad) is for: the gradient of a model's weights by each sample, in one go."""
    model = MultiHeadFlashAttention(16, 2, causal=True, num_kv_heads=1).to(DEVICE)
    weights = {name: x.detach() for name, x in model.named_parameters()}
    samples = draw(PROBLEMS, 7, 16)

    def of_one(weights, x):
        attend = lambda q, k, v, causal: flash_attention(q, k, v, causal=causal, backend=backend)  # noqa: E731
        model.attention = attend
        return torch.func.functional_call(model, weights, (x[None],)).square().sum()

    got = vmap(grad(of_one), (None, 0))(weights, samples)
    for name in weights:
        want = torch.stack([grad(of_one)(weights, x)[name] for x in samples])
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-5)


def test_chunks(backend):
    inputs = problems()
    attend = lambda *x: flash_attention(*x, backend=backend)  # noqa: E731
    assert torch.equal(vmap(attend, chunk_size=2)(*inputs), vmap(attend)(*inputs))


# dropout


def test_dropout_differs_between_problems(backend):
    """randomness="different": every problem drops other weights, and its gradient knows which."""
    n = 30
    q, k = draw(1, HEADS, n, DIM), draw(1, KV_HEADS, n, DIM)
    v = torch.eye(n, device=DEVICE).expand(1, KV_HEADS, n, n).contiguous()  # out is P itself
    attend = lambda q, k, v: flash_attention(q, k, v, dropout_p=0.5, backend=backend)  # noqa: E731
    same = [x.expand(PROBLEMS, *x.shape) for x in (q, k, v)]
    p = vmap(attend, randomness="different")(*same)
    dropped = p == 0
    assert all(0.4 < x.float().mean() < 0.6 for x in dropped)
    assert not torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped[1], dropped[2])
    torch.manual_seed(0)
    p = vmap(attend, randomness="different")(*same)
    torch.manual_seed(0)
    dv = vmap(grad(lambda v, q, k: attend(q, k, v).sum()), randomness="different")(same[2], same[0], same[1])
    torch.testing.assert_close(dv[..., 0], p.sum((2, 3))[:, :, None])  # dV = P^T 1


def test_dropout_that_cannot_be_as_asked_says_so(backend):
    attend = lambda *x: flash_attention(*x, dropout_p=0.5, backend=backend)  # noqa: E731
    with pytest.raises(RuntimeError, match="randomness error mode"):  # PyTorch's word, for any dropout
        vmap(attend)(*problems())
    with pytest.raises(NotImplementedError, match="randomness='same'.*'different' works"):
        vmap(attend, randomness="same")(*problems())


# what does not fold


def test_packed_sequences_say_so(backend):
    (q, k, v), rest = packed(backend, (4, 5), (6, 7), requires_grad=False)
    attend = lambda q: flash_attention_varlen(q, k, v, *rest, backend=backend)  # noqa: E731
    with pytest.raises(NotImplementedError, match="vmap over packed sequences.*in one call"):
        vmap(attend)(q[None])


def test_patterns_say_so(backend):
    attend = lambda *x: flash_attention(*x, pattern=PATTERN, backend=backend)  # noqa: E731
    with pytest.raises(NotImplementedError, match="vmap over a pattern.*larger batch"):
        vmap(attend)(*problems())


def test_what_is_not_mapped_is_not_held_up(backend):
    """Inside of a vmap over something else, a call is a call: a pattern, packed or not."""
    q, k, v = (x[0] for x in problems())
    scaled = vmap(lambda c: c * flash_attention(q, k, v, pattern=PATTERN, backend=backend))(draw(PROBLEMS))
    assert scaled.shape == (PROBLEMS, *q.shape)


def test_compiled(backend):
    skip_if_slow(backend, False)
    gradients = vmap(grad(lambda q, k, v: loss(q, k, v, backend)))
    compiled = torch.compile(gradients, fullgraph=True, backend="aot_eager")
    inputs = problems()
    torch.testing.assert_close(compiled(*inputs), gradients(*inputs))
