"""Working inside PyTorch: autocast, checkpointing, many processes, CUDA graphs. (Compiling: test_compile.py.)"""
import functools
import time

import pytest
import torch
from options import DIM, OPTIONS, ask, learned, packed, skip_if_slow, tensors
from this_machine import DEVICE, ON_GPU
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flash_edu import MultiHeadFlashAttention, flash_attention, flash_attention_varlen, flash_attention_with_lse
from flash_edu.models import TransformerBlock
from flash_edu.testing import differentiate, make_case

# autocast


def half_dtypes(backend):
    if ON_GPU:
        return torch.float16, torch.bfloat16
    return (torch.float16,) if backend == "triton" else (torch.bfloat16,)  # the interpreter cannot do bf16


def test_autocast_casts_as_sdpa_does(backend):
    for dtype in half_dtypes(backend):
        q, k, v = (torch.randn(1, 2, 20, 16, device=DEVICE, requires_grad=True) for _ in range(3))
        with torch.autocast(DEVICE, dtype=dtype):
            out = flash_attention(q, k, v, backend=backend)
            sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert out.dtype == dtype == sdpa.dtype
        out.float().sum().backward()
        assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("option", OPTIONS)
def test_autocast_does_not_reach_inside(option, backend):
    """The same bits as casting by hand: the accumulators stay fp32, and masks, slopes and sinks keep their own dtype."""
    skip_if_slow(option, backend)
    for dtype in half_dtypes(backend):
        options = {"causal": False} | ask(option, 40, 90)
        case = make_case(2, 2, 1, 40, 90, d=DIM, dtype=dtype, device=DEVICE, **options)
        by_hand = differentiate(flash_attention_with_lse, case, backend=backend)

        def under_autocast(q, k, v, dtype=dtype, **kwargs):
            with torch.autocast(DEVICE, dtype=dtype):
                return flash_attention_with_lse(q.float(), k.float(), v.float(), backend=backend, **kwargs)

        with torch.autocast(DEVICE, dtype=dtype):
            got = differentiate(under_autocast, case)
        assert all(torch.equal(by_hand[name], got[name]) for name in by_hand)
        assert all(got[f"d{name}"].dtype == torch.float32 for name in ("attn_mask", "sinks") if f"d{name}" in got)


def test_autocast_leaves_fp64_alone():
    q = torch.randn(1, 1, 8, 16, dtype=torch.float64, device=DEVICE)
    with torch.autocast(DEVICE):
        assert flash_attention(q, q, q, backend="torch").dtype == torch.float64


def test_autocast_of_packed_sequences(backend):
    for dtype in half_dtypes(backend):
        inputs, rest = packed(backend, (7, 13), (9, 20))
        inputs = [x.detach().float().requires_grad_() for x in inputs]
        with torch.autocast(DEVICE, dtype=dtype):
            out = flash_attention_varlen(*inputs, *rest, backend=backend)
        assert torch.equal(out, flash_attention_varlen(*(x.to(dtype) for x in inputs), *rest, backend=backend))
        out.float().sum().backward()
        assert all(x.grad.dtype == torch.float32 for x in inputs)


# checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("option", ["causal", "dropout", "many at once"])
def test_activation_checkpointing(option, reentrant, backend):
    """The second forward draws the first one's dropout: the same bits as without checkpointing."""
    asked = ask(option, 20, 30)
    inputs, more = tensors(backend), learned(asked)
    attend = lambda *x: flash_attention(*x, **asked, backend=backend)  # noqa: E731
    runs = []
    for run in (attend, functools.partial(checkpoint, attend, use_reentrant=reentrant)):
        torch.manual_seed(3)
        out = run(*inputs)
        torch.randn(5, device=DEVICE)  # the generator has gone on when the backward comes
        for x in (*inputs, *more):
            x.grad = None
        out.square().sum().backward()
        runs.append((out, *(x.grad for x in (*inputs, *more))))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_checkpointing_may_keep_attention_and_recompute_the_rest(backend):
    """Selective checkpointing knows the operator by name."""
    calls = []

    def policy(ctx, op, *args, **kwargs):
        ours = op is torch.ops.flash_edu.attention_forward.default
        calls.append(ours and not ctx.is_recompute)
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    inputs = tensors(backend)
    attend = lambda q, k, v: flash_attention(q * 2, k, v, dropout_p=0.3, backend=backend).sin()  # noqa: E731
    grads = []
    for run in (attend, functools.partial(
        checkpoint, attend, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, policy)
    )):  # fmt: skip
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(run(*inputs).sum(), inputs))
    assert sum(calls) == 1
    assert all(torch.equal(x, y) for x, y in zip(*grads))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_checkpointing_in_a_compiled_graph(dropout_p, backend):
    """Here the graph draws the seed again. out is linear in v, so <dv, v> = <dout, out> if both drop the same weights."""
    attend = lambda *x: flash_attention(*x, dropout_p=dropout_p, backend=backend)  # noqa: E731
    run = lambda *x: checkpoint(attend, *x, use_reentrant=False)  # noqa: E731
    inputs = tensors(backend, dtype=torch.float32)
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, inputs[2], dout)
    assert_linear_in_v(out, dout, inputs[2], dv)


def assert_linear_in_v(out, dout, v, dv):
    """<dv, v> = <dout, P v>, with the P that the forward had, dropped weights and all."""
    parts = [(x.double() * y.double()).flatten() for x, y in ((dv, v), (dout, out))]
    slack = 64 * torch.finfo(dv.dtype).eps * sum(x.norm() for x in parts)
    assert (parts[0].sum() - parts[1].sum()).abs() <= slack


def test_no_grad_and_inference_mode(backend):
    q, k, v = tensors(backend)
    with torch.no_grad():
        assert not flash_attention(q, k, v, backend=backend).requires_grad
    with torch.inference_mode():
        flash_attention(q, k, v, backend=backend)
        flash_attention(q * 1, k, v, dropout_p=0.1, backend=backend)


# processes


def test_ddp_gives_the_gradients_of_one_process(tmp_path):
    """Two processes, half a batch each, with padding; gradients are those of the whole batch in one."""
    context = torch.multiprocessing.spawn(train_one_step, (2, str(tmp_path)), nprocs=2, join=False)
    deadline = time.monotonic() + 240
    try:
        while not context.join(timeout=10):
            assert time.monotonic() < deadline, "the processes did not end in time"
    finally:
        for process in context.processes:
            process.kill()
    want = gradients(Model(), *padded_batch())
    for rank in range(2):
        got = torch.load(tmp_path / f"gradients_{rank}.pt")
        for name in want:
            torch.testing.assert_close(got[f"module.{name}"], want[name])


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.head = TransformerBlock(16, 2, 0.0, causal=True), torch.nn.Linear(16, 3)

    def forward(self, x, real):
        return self.head(self.block(x, key_padding_mask=real))


def padded_batch():
    torch.manual_seed(1)
    return torch.randn(4, 9, 16), torch.arange(9) < torch.tensor([9, 3, 5, 7])[:, None]


def gradients(model, x, real):
    (model(x, real)[real].square().sum() / len(x)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def train_one_step(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    model = torch.nn.parallel.DistributedDataParallel(Model())
    half = [x.chunk(world)[rank] for x in padded_batch()]
    torch.save(gradients(model, *half), f"{folder}/gradients_{rank}.pt")
    torch.distributed.barrier()  # who leaves first takes the other's connection down, and it may abort
    del model
    torch.distributed.destroy_process_group()


# CUDA graphs


def captured(function, inputs):
    """function(*inputs) as a CUDA graph, and its results, which a replay overwrites."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles the kernels
            function(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function(*inputs)
    return graph, results


def step(attend):
    """Forward and backward: out, lse, dq, dk, dv."""

    def run(q, k, v, *douts):
        out, lse = attend(q, k, v)
        return out, lse, *torch.autograd.grad([out, lse], [q, k, v], douts)

    return run


@pytest.mark.gpu
@pytest.mark.parametrize("option", [name for name in OPTIONS if name not in ("dropout", "many at once")])
def test_cuda_graph(option):
    asked = ask(option, 200, 300)
    run = step(lambda *x: flash_attention_with_lse(*x, **asked, backend="triton"))
    inputs = tensors("triton", 200, 300)
    douts = torch.randn(inputs[0].shape, device=DEVICE).half(), torch.zeros(inputs[0].shape[:3], device=DEVICE)
    graph, results = captured(run, (*inputs, *douts))
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            for x in (*inputs, douts[0]):
                x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(results, run(*inputs, *douts), strict=True))


@pytest.mark.gpu
def test_cuda_graph_draws_other_dropout_in_each_replay():
    """... and the backward of a replay drops what its forward dropped."""
    run = step(lambda *x: flash_attention_with_lse(*x, dropout_p=0.4, backend="triton"))
    inputs = tensors("triton", 200, 300, dtype=torch.float32)
    douts = torch.randn(inputs[0].shape, device=DEVICE), torch.zeros(inputs[0].shape[:3], device=DEVICE)
    graph, results = captured(run, (*inputs, *douts))
    outs = []
    for _ in range(2):
        graph.replay()
        assert_linear_in_v(results[0], douts[0], inputs[2].detach(), results[4])
        outs.append(results[0].clone())
    assert not torch.equal(*outs)
    torch.manual_seed(9)
    graph.replay()
    first = results[0].clone()
    torch.manual_seed(9)
    graph.replay()
    assert torch.equal(first, results[0])


@pytest.mark.gpu
def test_cuda_graph_of_packed_sequences():
    """Other lengths are other numbers in cu_seqlens: up to max_seqlen, one graph serves them all."""
    (q, k, v), (cu_q, cu_k, *_) = packed("triton", (70, 130), (90, 200))

    def run(q, k, v):
        out = flash_attention_varlen(q, k, v, cu_q, cu_k, 200, 290, causal=True, backend="triton")
        return out, *torch.autograd.grad(out.sum(), [q, k, v])

    graph, results = captured(run, (q, k, v))
    for lengths_q, lengths_k in ((70, 90), (1, 289), (200, 0)):
        cu_q[1], cu_k[1] = lengths_q, lengths_k
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(results, run(q, k, v), strict=True))


@pytest.mark.gpu
def test_graphed_module():
    module = MultiHeadFlashAttention(64, 4, causal=True, dropout=0.2).to(DEVICE)
    x = torch.randn(2, 100, 64, device=DEVICE, requires_grad=True)
    module(x).sum().backward()
    fast = torch.cuda.make_graphed_callables(module, (x,))
    runs = [fast(x).clone() for _ in range(2)]
    assert not torch.equal(*runs)
    fast(x).square().sum().backward()
    assert x.grad.isfinite().all()
