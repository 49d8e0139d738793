"""Dropout: the same weights in both directions, both backends and all tiles; at the right rate; and torch's own seeds."""
import itertools

import pytest
import torch
from this_machine import DEVICE, ON_GPU
from torch.utils.checkpoint import checkpoint

from flash_edu import flash_attention, philox
from flash_edu.rules import Rules

B, H, KV = 2, 2, 1
NQ, NK = (200, 250) if ON_GPU else (33, 35)


def with_tile(monkeypatch, block_m, block_n):
    from flash_edu.kernels import backward, forward
    from flash_edu.kernels.tiles import Tile

    for module in (forward, backward):
        monkeypatch.setattr(module, "choose_tile", lambda *_, **__: Tile(block_m, block_n, 4, 1))


def dropped_weights(backend, p, seed):
    """P after dropout, twice: as the forward has it, (B, H, Nq, Nk), and as the backward has it.

    Every score is 0 and V is the identity, so that row i of O is row i of P; with dO the identity, dV is P transposed.
    """
    q = torch.zeros(B, H, NQ, 16, device=DEVICE)
    k = torch.zeros(B, H, NK, 16, device=DEVICE)
    v = torch.eye(NK, device=DEVICE).expand(B, H, NK, NK).clone().requires_grad_()
    torch.manual_seed(seed)
    out = flash_attention(q, k, v, dropout_p=p, backend=backend)
    dout = torch.eye(NQ, NK, device=DEVICE).expand(B, H, NQ, NK)
    (dv,) = torch.autograd.grad(out, v, dout)
    return out.detach(), dv.mT[:, :, :NQ]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_forward_and_backward_drop_the_same(p, backend):
    forward, backward = dropped_weights(backend, p, seed=1)
    assert torch.equal(forward != 0, backward != 0)
    kept = forward != 0
    torch.testing.assert_close(forward[kept], torch.full_like(forward[kept], 1 / NK / (1 - p)))
    torch.manual_seed(1)
    seed = torch.randint(-(2**62), 2**62, (2,), device=DEVICE)
    heads, rows, cols = (torch.arange(n, device=DEVICE) for n in (B * H, NQ, NK))
    assert torch.equal(kept.flatten(0, 1), philox.kept(seed, p, heads, rows, cols))


@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (16, 32), (64, 32), (32, 64)], ids=str)
def test_tiles_do_not_matter(tile, monkeypatch):
    want = dropped_weights("torch", 0.3, seed=2)
    with_tile(monkeypatch, *tile)
    got = dropped_weights("triton", 0.3, seed=2)
    assert all(torch.equal(x != 0, y != 0) for x, y in zip(got, want))


def test_grouped_heads_drop_their_own():
    """With a key/value head each and with one for both, the query heads drop the same: each its own, and not the group's."""
    q, k = torch.zeros(B, H, NQ, 16, device=DEVICE), torch.zeros(B, H, NK, 16, device=DEVICE)
    v = torch.eye(NK, device=DEVICE).expand(B, H, NK, NK)
    for backend in ("torch", "triton"):
        results = []
        for kv_heads in (H, KV):
            torch.manual_seed(3)
            results.append(flash_attention(q, k[:, :kv_heads], v[:, :kv_heads], dropout_p=0.5, backend=backend))
        assert torch.equal(*results)
        kept = results[0].flatten(0, 1) != 0
        assert all((x != y).float().mean() > 0.4 for x, y in itertools.combinations(kept, 2))


# --- the bits


@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ([0, 0, 0, 0], [0, 0], "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)  # fmt: skip
def test_known_answers(counter, key, answer):
    """Those that the authors of Philox publish for 7 rounds (Random123, kat_vectors)."""
    low, high = key
    seed = torch.tensor(low | (high - (high >> 31 << 32)) << 32)
    bits = philox._philox([torch.tensor(x) for x in counter], seed)
    assert [f"{x.item():08x}" for x in bits] == answer.split()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_rate_and_no_pattern(p):
    """Over all places, over each head, row and column: within 5 standard deviations of a fair draw. Neighbours know nothing of
    each other: columns (of one counter, and of two), rows, heads, and the next call."""
    heads, rows, cols = (torch.arange(n) for n in (8, 256, 256))
    torch.manual_seed(0)
    seeds = torch.randint(-(2**62), 2**62, (2, 2))
    kept, other = (philox.kept(seed, p, heads, rows, cols).double() for seed in seeds)
    for axes in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        rate = kept.mean(axes)
        deviation = (p * (1 - p) * rate.numel() / kept.numel()) ** 0.5
        assert (rate - (1 - p)).abs().max() < 5 * deviation, f"the rate, over axes {axes}"
    steps = [(axis, step) for axis in range(3) for step in (1, 2, 3, 4, 8, 64) if step < kept.shape[axis]]
    pairs = [(kept, kept.roll(step, axis), f"{step} further on axis {axis}") for axis, step in steps]
    pairs += [(kept, other, "of the next call"), (kept[:, :128, 128:], kept[:, 128:, :128].mT, "across the diagonal")]
    for x, y, what in pairs:
        correlation = torch.corrcoef(torch.stack((x.flatten(), y.flatten())))[0, 1]
        assert correlation.abs() < 5 / x.numel() ** 0.5, f"correlated with the one {what}"


def test_extreme_probabilities(backend):
    """Nearly none, and nearly all: 2^-32 is the step of the threshold, and 1 is out of reach."""
    for p, share in ((1e-12, 1.0), (1e-6, 1.0), (1 - 1e-6, 0.0)):
        forward, backward = dropped_weights(backend, p, seed=4)
        for weights in (forward, backward):
            assert weights.isfinite().all() and abs((weights != 0).float().mean() - share) < 1e-3


def test_the_mean_over_many_calls_is_attention_without_dropout():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 4, 16, device=DEVICE, dtype=torch.float64)
    many = torch.stack([flash_attention(q, k, v, dropout_p=0.4, backend="torch") for _ in range(1000)])
    error = (many.mean(0) - flash_attention(q, k, v, backend="torch")).abs()
    assert (error < 5 * many.std(0) / 1000**0.5).all()


# --- seeds


def random_inputs():
    torch.manual_seed(10)
    return [torch.randn(1, 2, n, 16, device=DEVICE, requires_grad=True) for n in (20, 30, 30)]


def results(backend, **options):
    inputs = random_inputs()
    out = flash_attention(*inputs, backend=backend, **options)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


def test_manual_seed_reproduces_and_the_next_call_differs(backend):
    q, k, v = random_inputs()

    def calls(seed):
        torch.manual_seed(seed)
        return [flash_attention(q, k, v, dropout_p=0.5, backend=backend) for _ in range(2)]

    first, again, other = calls(5), calls(5), calls(6)
    assert all(torch.equal(*pair) for pair in zip(first, again))
    assert not torch.equal(*first)
    assert not torch.equal(first[0], other[0])


def test_no_dropout_draws_no_number(backend):
    def states():
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if ON_GPU else [])]

    random_inputs()
    before = states()
    plain, zero = results(backend), results(backend, dropout_p=0.0)
    assert all(torch.equal(*pair) for pair in zip(before, states()))
    assert all(torch.equal(*pair) for pair in zip(plain, zero))
    assert Rules(0.1).seed is None


def test_dropout_does_not_depend_on_gradients(backend):
    """Dropout is what the caller says it is: `torch.no_grad()` and inference mode change nothing, as with F.dropout."""
    q, k, v = random_inputs()
    outs = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        torch.manual_seed(7)
        with context():
            outs.append(flash_attention(q, k, v, dropout_p=0.5, backend=backend))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_drops_the_same_again(reentrant, backend):
    def block(q, k, v):
        return flash_attention(q, k, v, dropout_p=0.5, backend=backend).square()

    answers = []
    for run in (block, lambda *x: checkpoint(block, *x, use_reentrant=reentrant)):
        inputs = random_inputs()
        torch.manual_seed(8)
        out = run(*inputs)
        answers.append([out, *torch.autograd.grad(out.sum(), inputs)] if not reentrant else _backward(out, inputs))
    assert all(torch.equal(*pair) for pair in zip(*answers))


def _backward(out, inputs):
    """torch.autograd.grad does not work with reentrant checkpoints."""
    out.sum().backward()
    return [out, *(x.grad for x in inputs)]


@pytest.mark.gpu
def test_a_cuda_graph_drops_others_at_each_replay():
    """... and its backward the same as its forward, as with torch's own dropout."""
    v = torch.eye(64, device=DEVICE).expand(1, 2, 64, 64).clone().requires_grad_()
    q = torch.zeros(1, 2, 64, 16, device=DEVICE)

    def step():
        out = flash_attention(q, q, v, dropout_p=0.5, backend="triton")
        return out, *torch.autograd.grad(out, v, torch.eye(64, device=DEVICE).expand_as(out))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dv = step()
    seen = []
    for _ in range(3):
        graph.replay()
        assert torch.equal(out != 0, dv.mT != 0)
        assert 0.4 < (out != 0).float().mean() < 0.6
        seen.append(out.detach().clone())
    assert not any(torch.equal(*pair) for pair in itertools.combinations(seen, 2))
