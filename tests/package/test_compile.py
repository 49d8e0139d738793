"""torch.compile and torch.export: one graph for each option, no new compilation when lengths change, the same numbers."""
import pytest
import torch
from options import BATCH, COMPILER, OPTIONS, ask, learned, packed, skip_if_slow, tensors
from this_machine import DEVICE, ON_GPU
from torch._dynamo.testing import CompileCounterWithBackend

from flash_edu import (
    FlashAttention,
    MultiHeadFlashAttention,
    flash_attention,
    flash_attention_varlen,
    flash_attention_with_lse,
    pack,
    unpack,
)
from flash_edu.models import TransformerBlock


@pytest.fixture(autouse=True)
def from_scratch():
    torch._dynamo.reset()


def results_and_gradients(function, inputs, more=()):
    """Outputs, and gradients of a sum that looks at each of them; dropout draws the same each time."""
    torch.manual_seed(5)
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(x.float().masked_fill(x.isinf(), 0.0).square().sum() for x in outputs)
    return *(x.detach() for x in outputs), *torch.autograd.grad(total, [*inputs, *more])


def assert_same(got, want):
    """Up to what a compiler changes in the operations around attention."""
    assert len(got) == len(want)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_is_one_graph(option, dynamic, backend):
    skip_if_slow(option, backend)
    asked = ask(option, 20, 30)

    def layer(q, k, v):
        out, lse = flash_attention_with_lse(q * 1.0, k, v, **asked, backend=backend)
        return out.sin(), lse

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    inputs, more = tensors(backend), learned(asked)
    assert_same(results_and_gradients(compiled, inputs, more), results_and_gradients(layer, inputs, more))


@pytest.mark.parametrize("option", ["plain", "causal", "window", "padding", "bool mask", "learned mask", "dropout", "sinks"])
def test_other_lengths_are_not_compiled_anew(option):
    """The second length makes sizes symbolic; from then on one graph serves all."""
    counter = CompileCounterWithBackend("aot_eager")
    made = {n: ask(option, n, n + 10) for n in (20, 33, 47, 64, 128, 20)}

    def layer(q, k, v, asked):
        return flash_attention(q, k, v, **asked, backend="torch")

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for n, asked in made.items():
        inputs = tensors("torch", n, n + 10)
        torch.manual_seed(5)
        got = compiled(*inputs, asked)
        torch.manual_seed(5)
        torch.testing.assert_close(got, layer(*inputs, asked))
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for {len(made)} lengths"


def test_lengths_of_packed_sequences_are_not_compiled_anew():
    counter = CompileCounterWithBackend("aot_eager")

    def layer(q, k, v, *rest):
        return flash_attention_varlen(q, k, v, *rest, causal=True, window=(5, None), dropout_p=0.2, backend="torch")

    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for lengths_q, lengths_k in (((7, 3), (9, 20)), ((1, 13, 4), (9, 21, 6)), ((8, 9, 10, 11), (4, 5, 6, 7)), ((30, 2), (2, 30))):
        inputs, rest = packed("torch", lengths_q, lengths_k)
        torch.manual_seed(5)
        got = compiled(*inputs, *rest)
        torch.manual_seed(5)
        torch.testing.assert_close(got, layer(*inputs, *rest))
    assert counter.frame_count <= 2


def test_varlen_is_one_graph(backend):
    def layer(q, k, v):
        return flash_attention_varlen(q, k, v, *rest, causal=True, softcap=3.0, dropout_p=0.2, backend=backend)

    inputs, rest = packed(backend, (7, 0, 13), (9, 20, 1))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(results_and_gradients(compiled, inputs), results_and_gradients(layer, inputs))


def test_dropout_draws_anew_in_each_call_of_a_graph(backend):
    """The seed is drawn in the graph, from torch's generator: as without compiling, and another one in each call."""
    layer = lambda q, k, v: flash_attention(q, k, v, dropout_p=0.4, backend=backend)  # noqa: E731
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = tensors(backend)
    runs = []
    for function in (layer, compiled, compiled):
        torch.manual_seed(7)
        runs.append([function(*inputs) for _ in range(2)])
    assert not torch.equal(runs[1][0], runs[1][1]), "two calls drop other weights"
    for plain, fast, again in zip(*runs):
        assert torch.equal(plain, fast) and torch.equal(fast, again)


def modules():
    return {
        "FlashAttention": FlashAttention(causal=True, dropout=0.2, window=(7, None), softcap=4.0),
        "MultiHeadFlashAttention": MultiHeadFlashAttention(32, 4, causal=True, num_kv_heads=2, dropout=0.2),
        "TransformerBlock": TransformerBlock(32, 4, 0.2, causal=True),
    }


def inputs_of(name, n=17):
    torch.manual_seed(1)
    count, shape = (3, (BATCH, 4, n, 8)) if name == "FlashAttention" else (1, (BATCH, n, 32))
    return [torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", modules())
def test_modules_are_one_graph(name, training):
    module = modules()[name].to(DEVICE).train(training)
    padding = torch.rand(BATCH, 17, device=DEVICE) < 0.7
    call = lambda *x: module(*x, key_padding_mask=padding)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = inputs_of(name)
    more = list(module.parameters())
    assert_same(results_and_gradients(compiled, inputs, more), results_and_gradients(call, inputs, more))


def test_modules_are_not_compiled_anew_for_other_lengths():
    counter = CompileCounterWithBackend("aot_eager")
    module = MultiHeadFlashAttention(32, 4, causal=True, dropout=0.1).to(DEVICE)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for n in (9, 17, 33, 40, 64, 9):
        compiled(torch.randn(BATCH, n, 32, device=DEVICE)).sum().backward()
    assert counter.frame_count <= 2
    module.eval()
    for n in (9, 33):
        compiled(torch.randn(BATCH, n, 32, device=DEVICE))
    assert counter.frame_count <= 4, "without dropout the graph is another one"


@pytest.mark.parametrize("mode", ["default", "max-autotune"])
def test_a_module_with_inductor(mode):
    if mode == "max-autotune" and not ON_GPU:
        pytest.skip("tunes matrix products for minutes on a CPU: make test-gpu")
    torch.manual_seed(0)
    module = MultiHeadFlashAttention(32, 4, causal=True, num_kv_heads=2).to(DEVICE)
    inputs = inputs_of("MultiHeadFlashAttention")
    compiled = torch.compile(module, fullgraph=True, mode=mode)
    got, want = (results_and_gradients(f, inputs, list(module.parameters())) for f in (compiled, module))
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_with_inductor(option, dynamic):
    asked = ask(option, 200, 300)
    layer = lambda q, k, v: flash_attention(q * 1.0, k, v, **asked).sin()  # noqa: E731
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=COMPILER)
    inputs, more = tensors("triton", 200, 300), learned(asked)
    torch.manual_seed(5)
    got = compiled(*inputs)
    grads = torch.autograd.grad(got.sum(), [*inputs, *more])
    assert all(x.isfinite().all() for x in (got, *grads))
    if option in ("dropout", "many at once"):
        return  # inductor draws other numbers than eager
    plain = layer(*inputs)
    assert_same((got, *grads), (plain, *torch.autograd.grad(plain.sum(), [*inputs, *more])))


def test_packing_around_a_compiled_model():
    """pack and unpack wait for lengths; what is between them is one graph."""
    module = torch.nn.Linear(8, 3 * 32).to(DEVICE)
    x = torch.randn(3, 11, 8, device=DEVICE)
    real = torch.arange(11, device=DEVICE) < torch.tensor([[11], [3], [7]], device=DEVICE)

    def model(values, cu_seqlens, longest):
        q, k, v = module(values).unflatten(-1, (3, 4, 8)).unbind(1)
        return flash_attention_varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    batch = pack(x, real)
    got, want = (unpack(f(batch.values, batch.cu_seqlens, batch.max_seqlen), batch) for f in (compiled, model))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", modules())
def test_export(name, strict):
    """The exported program runs, for other lengths too."""
    module = modules()[name].to(DEVICE).eval()
    inputs = [x.detach() for x in inputs_of(name)]
    n = torch.export.Dim("n", min=2, max=512)
    axis = 2 if name == "FlashAttention" else 1
    exported = torch.export.export(module, tuple(inputs), dynamic_shapes=({axis: n},) * len(inputs), strict=strict)
    targets = {node.target for node in exported.graph.nodes}
    assert torch.ops.flash_edu.attention_forward.default in targets
    for length in (17, 40):
        inputs = [x.detach() for x in inputs_of(name, length)]
        torch.testing.assert_close(exported.module()(*inputs), module(*inputs))


def test_export_with_a_mask_and_dropout():
    module = MultiHeadFlashAttention(32, 4, dropout=0.5).to(DEVICE).train()
    x, padding = inputs_of("MultiHeadFlashAttention")[0].detach(), torch.rand(BATCH, 17, device=DEVICE) < 0.7
    exported = torch.export.export(module, (x,), {"key_padding_mask": padding}).module()
    runs = []
    for function in (module, exported):
        torch.manual_seed(5)
        runs.append(function(x, key_padding_mask=padding))
    torch.testing.assert_close(*runs)
    assert not torch.equal(exported(x, key_padding_mask=padding), runs[0]), "the seed was drawn once, while exporting"
