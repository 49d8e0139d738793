"""Nothing to compute, nothing to attend to, memory that was never written, and the same bits twice."""
import pytest
import torch
from this_machine import DEVICE, ON_GPU

from flash_edu import flash_attention_with_lse
from flash_edu.testing import assert_close, differentiate, eager, make_case, truth


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "q_shape, kv_shape",
    [
        ((1, 2, 0, 16), (1, 2, 5, 16)),
        ((1, 2, 5, 16), (1, 2, 0, 16)),
        ((1, 2, 0, 16), (1, 2, 0, 16)),
        ((0, 2, 5, 16), (0, 2, 7, 16)),
        ((2, 0, 5, 16), (2, 0, 7, 16)),
    ],
    ids=["no queries", "no keys", "neither", "empty batch", "no heads"],
)
def test_empty(q_shape, kv_shape, causal, backend):
    q, k, v = (torch.randn(s, device=DEVICE, requires_grad=True) for s in (q_shape, kv_shape, kv_shape))
    out, lse = flash_attention_with_lse(q, k, v, causal=causal, backend=backend)
    assert torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full(q_shape[:3], float("-inf"), device=DEVICE))
    (out.sum() + lse.masked_fill(lse.isinf(), 0.0).sum()).backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (q, k, v))


@pytest.mark.parametrize("nq, nk", [(70, 1), (97, 33), (64, 31), (200, 129)])
def test_rows_with_nothing_to_attend_to(nq, nk, backend):
    """Causal with more queries than keys: the first Nq - Nk rows see no key."""
    case = make_case(1, 2, 1, nq, nk, d=16, device=DEVICE, causal=True)
    got = differentiate(flash_attention_with_lse, case, backend=backend)
    empty = slice(0, nq - nk)
    assert torch.equal(got["out"][:, :, empty], torch.zeros_like(got["out"][:, :, empty]))
    assert (got["lse"][:, :, empty] == float("-inf")).all()
    assert torch.equal(got["dq"][:, :, empty], torch.zeros_like(got["dq"][:, :, empty]))
    right, plain = truth(case), eager(case)
    for name in right:
        assert_close(name, got[name], right[name], plain[name])


@pytest.fixture
def poisoned(monkeypatch):
    """Memory fresh from torch.empty holds NaN: an element that is never written shows."""

    def poison(allocate):
        def allocate_nan(*args, **kwargs):
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.mark.parametrize("causal", [False, True])
def test_every_element_is_written(causal, backend, poisoned):
    case = make_case(1, 4, 2, 70, 50, d=24, dv=40, device=DEVICE, causal=causal)
    for name, x in differentiate(flash_attention_with_lse, case, backend=backend).items():
        assert not x.isnan().any(), f"{name} has elements that were never written"


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_outside_the_tensors_is_read(causal, backend):
    """Each tensor stands in a frame of NaN; one read of the frame spoils a result."""
    case = make_case(1, 2, 1, 45, 70, d=24, device=DEVICE, causal=causal)

    def framed(x):
        shape = [n + 2 * (n > 1) for n in x.shape]
        inside = [slice(1, -1) if n > 1 else slice(None) for n in x.shape]
        frame = torch.full(shape, float("nan"), dtype=x.dtype, device=x.device)
        frame[tuple(inside)] = x
        return frame[tuple(inside)]

    inputs = [framed(x).requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = flash_attention_with_lse(*inputs, causal=causal, backend=backend)
    grads = torch.autograd.grad([out, lse], inputs, [framed(case.dout), framed(case.dlse)])
    right, plain = truth(case), eager(case)
    for name, got in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads)):
        assert_close(name, got, right[name], plain[name])


@pytest.mark.parametrize("position", [0, 31, 40])
def test_the_future_does_not_reach_the_past(position, backend):
    """Causal: changing key and value `position` leaves every earlier row's bits as they were."""
    case = make_case(1, 2, 2, 64, 64, d=16, device=DEVICE)
    before, _ = flash_attention_with_lse(case.q, case.k, case.v, causal=True, backend=backend)
    case.k[:, :, position] = 1e4
    case.v[:, :, position] = -1e4
    after, _ = flash_attention_with_lse(case.q, case.k, case.v, causal=True, backend=backend)
    assert torch.equal(before[:, :, :position], after[:, :, :position])
    assert not torch.equal(before[:, :, position:], after[:, :, position:])


def test_same_inputs_same_bits(backend):
    repeats, lengths = (50, (500, 613)) if ON_GPU else (2, (60, 70))
    case = make_case(4 if ON_GPU else 1, 4, 2, *lengths, d=64, device=DEVICE, dtype=torch.float16, causal=True)
    first = differentiate(flash_attention_with_lse, case, backend=backend)
    for _ in range(repeats):
        again = differentiate(flash_attention_with_lse, case, backend=backend)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
def test_more_heads_than_a_grid_axis_holds():
    """batch * heads past 65535, the limit of a CUDA grid's second axis."""
    case = make_case(70_000, 1, 1, 3, 5, d=16, device=DEVICE)
    right, plain = truth(case), eager(case)
    got = differentiate(flash_attention_with_lse, case, backend="triton")
    for name in right:
        assert_close(name, got[name], right[name], plain[name])
