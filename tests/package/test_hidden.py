"""What is hidden does not matter: K and V may hold anything there, NaN too, and get no gradient."""
import itertools

import pytest
import torch
import triton
import triton.language as tl
from this_machine import DEVICE, ON_GPU

from flash_edu import Pattern, flash_attention_varlen_with_lse, flash_attention_with_lse
from flash_edu.testing import differentiate, make_case

B, H, KV, D = 2, 2, 1, 16
NQ, NK = (150, 300) if ON_GPU else (18, 70)


@triton.jit
def reads_hidden(batch, head, i, j, buffers):
    return tl.load(buffers[0] + j) == 0


def hidden_columns():
    """A whole tile of them, the first and the last, and some in between."""
    hidden = torch.zeros(NK, dtype=torch.bool)
    hidden[[0, 5, NK - 1]] = True
    hidden[NK // 3 : 2 * NK // 3 + 10] = True
    return hidden.to(DEVICE)


def of_padding(hidden):
    return {"key_padding_mask": ~hidden.expand(B, NK)}


def of_mask(hidden):
    mask = torch.rand(B, H, NQ, NK, generator=torch.Generator().manual_seed(0)) < 0.7
    return {"attn_mask": mask.to(DEVICE) & ~hidden}


def of_pattern(hidden):
    return {"pattern": Pattern(reads_hidden, buffers=(hidden.int(),))}


def of_window(hidden):
    """Nobody sees the keys that lie further back than the first query's window."""
    hidden[:] = torch.arange(NK, device=DEVICE) < NK - NQ - 9
    return {"window": (9, 3)}


HIDERS = {"padding": of_padding, "bool mask": of_mask, "pattern": of_pattern, "window": of_window}
MORE = {
    "alone": {},
    "causal": {"causal": True},
    "softcap": {"softcap": 3.0},
    "alibi and sinks": {"alibi_slopes": torch.rand(H, device=DEVICE), "sinks": torch.randn(H, device=DEVICE)},
    "dropout": {"dropout_p": 0.3},
    "float mask": {"attn_mask": torch.randn(1, H, NQ, NK, device=DEVICE)},
}


REQUESTS = [pair for pair in itertools.product(HIDERS, MORE) if pair != ("bool mask", "float mask")]  # a call has one mask


@pytest.mark.parametrize("hider, more", REQUESTS)
def test_no_bit_changes(hider, more, backend):
    hidden = hidden_columns()
    options = HIDERS[hider](hidden) | MORE[more]
    for dtype in (torch.float32, torch.float16) if ON_GPU or backend == "torch" else (torch.float32,):
        case = make_case(B, H, KV, NQ, NK, D, dtype=dtype, device=DEVICE, **options)
        before = differentiate(flash_attention_with_lse, case, backend=backend)
        assert all(x.isfinite().all() for name, x in before.items() if name != "lse")
        for name in ("dk", "dv"):
            assert not before[name][:, :, hidden].any(), f"{name} of what is hidden is not 0"
        anything = torch.tensor([1e4, float("inf"), float("nan")], device=DEVICE)[torch.arange(NK) % 3, None]
        for x in (case.k, case.v):
            x[:, :, hidden] = anything[hidden].to(dtype)
        after = differentiate(flash_attention_with_lse, case, backend=backend)
        for name in before:
            assert torch.equal(before[name], after[name]), f"{name} changes with what is hidden"


def test_no_bit_changes_where_one_query_does_not_look(backend):
    """A key that others see may hold any finite number: the queries that do not see it keep their bits."""
    mask = torch.rand(NQ, NK, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    mask[NQ // 2] = True
    case = make_case(1, H, KV, NQ, NK, D, device=DEVICE, attn_mask=mask)
    before = differentiate(flash_attention_with_lse, case, backend=backend)
    case.k[:, :, 20] = 1e4
    case.v[:, :, 20] = -1e4
    after = differentiate(flash_attention_with_lse, case, backend=backend)
    for name in ("out", "lse", "dq"):
        same = (before[name] == after[name]).flatten(3).all(-1).all(1)[0] if name != "lse" else (before[name] == after[name]).all(1)[0]
        assert same[~mask[:, 20]].all() and not same[mask[:, 20]].any()


def test_other_sequences_do_not_matter(backend):
    """Packed: what the neighbours of a sequence hold changes none of its bits."""
    lengths_q, lengths_k = (20, 7, 33), (17, 40, 5)
    cu_q, cu_k = (torch.tensor([0, *x], device=DEVICE).cumsum(0).int() for x in (lengths_q, lengths_k))
    case = make_case(1, H, KV, sum(lengths_q), sum(lengths_k), D, device=DEVICE)

    def run():
        inputs = [x[0].transpose(0, 1).clone().requires_grad_() for x in (case.q, case.k, case.v)]
        out, lse = flash_attention_varlen_with_lse(*inputs, cu_q, cu_k, 33, 40, causal=True, backend=backend)
        grads = torch.autograd.grad([out, lse], inputs, [torch.ones_like(out), torch.ones_like(lse)])
        rows, cols = slice(20, 27), slice(17, 57)
        return [out[rows], lse[rows], grads[0][rows], grads[1][cols], grads[2][cols]]

    before = run()
    for x, (start, stop) in ((case.q, (20, 27)), (case.k, (17, 57)), (case.v, (17, 57))):
        x[:, :, :start] = float("nan")
        x[:, :, stop:] = float("inf")
    assert all(torch.equal(*pair) for pair in zip(before, run()))
