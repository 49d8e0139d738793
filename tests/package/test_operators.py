"""The two operators, as PyTorch's own tools see them: schemas, fakes, gradients and their limits, the count of flops."""
import pytest
import torch
import triton
from options import BATCH, DIM, HEADS, KV_HEADS, OPTIONS, ask, learned, packed, skip_if_slow, tensors
from this_machine import DEVICE, ON_GPU
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from flash_edu import Pattern, flash_attention, flash_attention_varlen, flash_attention_with_lse, ops
from flash_edu.attention import dense_rules
from flash_edu.reference import naive_attention
from flash_edu.rules import Rules
from flash_edu.testing import assert_close, differentiate, eager, make_case, truth

PACKED = "packed"


def operands(option, backend, *, nq=20, nk=30, requires_grad=True):
    """What attention_forward is called with, for one option of flash_attention."""
    if option == PACKED:
        (q, k, v), (cu_q, cu_k, *longest) = packed(backend, (7, 0, 13), (9, 20, 1), requires_grad=False)
        inputs = [x.transpose(0, 1)[None].requires_grad_(requires_grad) for x in (q, k, v)]
        rules = Rules(0.25, right=0, cu_q=cu_q, cu_k=cu_k, max_q=longest[0], max_k=longest[1])
    else:
        inputs = tensors(backend, nq, nk, requires_grad=requires_grad)
        rules = dense_rules(*inputs[:2], **ask(option, nq, nk))
    return (*inputs, backend, *ops.arguments(rules))


@pytest.mark.parametrize("option", [*OPTIONS, PACKED])
def test_opcheck_forward(option, backend):
    skip_if_slow(option, backend)
    torch.library.opcheck(ops.attention_forward.overload, operands(option, backend))


@pytest.mark.parametrize("option", [*OPTIONS, PACKED])
def test_opcheck_backward(option, backend):
    skip_if_slow(option, backend)
    q, k, v, *asked = operands(option, backend, requires_grad=False)
    asked = [x.detach() if isinstance(x, torch.Tensor) else x for x in asked]
    out, lse = ops.attention_forward(q, k, v, *asked)
    rules = Rules(*asked[1:])
    wanted = rules.mask is not None and rules.mask.is_floating_point(), rules.sinks is not None
    dlse = None if option == "plain" else torch.randn_like(lse)
    inputs = (torch.randn_like(out), dlse, q, k, v, out, lse, *wanted, *asked)
    torch.library.opcheck(ops.attention_backward.overload, inputs)


@pytest.mark.parametrize("shape", [((1, 2, 0, 16), (1, 2, 5, 16)), ((1, 2, 5, 16), (1, 2, 0, 16)), ((0, 2, 5, 16), (0, 2, 7, 16))])
@pytest.mark.parametrize("option", ["plain", "sinks", "learned mask", "dropout"])
def test_opcheck_of_nothing(option, shape, backend):
    """No queries, no keys, no batch."""
    q, k = (torch.randn(s, device=DEVICE, requires_grad=True) for s in shape)
    asked = ask(option, q.shape[2], k.shape[2])
    asked = {name: x[:2].detach().requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in asked.items()}
    inputs = (q, k, k.detach(), backend, *ops.arguments(dense_rules(q, k, **asked)))
    torch.library.opcheck(ops.attention_forward.overload, inputs)


def test_schemas_name_what_they_take_and_change_nothing():
    for operator in (ops.attention_forward, ops.attention_backward):
        schema = operator.overload._schema
        assert not schema.is_mutable and all(x.alias_info is None for x in (*schema.arguments, *schema.returns))
        assert torch.Tag.pt2_compliant_tag in operator.overload.tags
        names = [argument.name for argument in schema.arguments]
        assert names[-len(Rules._fields) + 1 :] == list(Rules._fields[:-1]), "as in rules.py, without first_head"


@pytest.mark.parametrize("layout", ["(batch, heads, seq, dim)", "(batch, seq, heads, dim)", "expanded"])
def test_fakes_with_symbolic_sizes(layout, backend):
    """Shapes, strides, dtypes and devices as the real operators give them, for sizes that are only names."""
    real = operands("many at once", backend, nq=24, nk=24, requires_grad=False)
    change = {
        "(batch, heads, seq, dim)": lambda x: x,
        "(batch, seq, heads, dim)": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda x: x[:1].expand(BATCH, -1, -1, -1),
    }[layout]
    real = (*map(change, real[:3]), *[x.detach() if isinstance(x, torch.Tensor) else x for x in real[3:]])
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)

    def as_fake(x):
        if isinstance(x, list):
            return [as_fake(y) for y in x]
        if not isinstance(x, torch.Tensor):
            return x
        return mode.from_tensor(x, symbolic_context=symbolic(x))

    fake = [as_fake(x) for x in real]
    assert any(isinstance(n, torch.SymInt) for n in fake[0].shape), "sizes are not symbolic: this test sees nothing"
    out, lse = ops.attention_forward(*real)
    with mode:
        fake_out, fake_lse = ops.attention_forward(*fake)
    same_on_the_outside((fake_out, fake_lse), (out, lse), environment)
    dout = torch.randn_like(out)
    grads = ops.attention_backward(dout, None, *real[:3], out, lse, True, True, *real[3:])
    with mode:
        fake_grads = ops.attention_backward(as_fake(dout), None, *fake[:3], fake_out, fake_lse, True, True, *fake[3:])
    same_on_the_outside(fake_grads, grads, environment)


def symbolic(x):
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    return StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * x.ndim)


def same_on_the_outside(fake, real, environment):
    hint = lambda numbers: tuple(int(n) for n in numbers)  # noqa: E731
    for x, y in zip(fake, real, strict=True):
        assert (hint(x.shape), hint(x.stride())) == (y.shape, y.stride())
        assert (x.dtype, x.device) == (y.dtype, y.device)


# what has no gradient


def test_double_backward_says_so(backend):
    q, k, v = tensors(backend, dtype=torch.float32)
    out, lse = flash_attention_with_lse(q, k, v, backend=backend)
    for result in (out, lse):
        (dq,) = torch.autograd.grad(result.sum(), q, create_graph=True)
        with pytest.raises(NotImplementedError, match="no double backward.*naive_attention"):
            dq.square().sum().backward()


def test_gradgradcheck_and_hessian_say_so(backend):
    if backend == "triton" and ON_GPU:
        pytest.skip("fp64 kernels run in the interpreter only: make test")
    q, k, v = (x.detach()[:1, :1, :2, :2].double().requires_grad_() for x in tensors(backend))
    attend = lambda q: flash_attention(q, k.detach(), v.detach(), backend=backend)  # noqa: E731
    with pytest.raises(NotImplementedError, match="no double backward"):
        torch.autograd.gradgradcheck(attend, q)
    with pytest.raises(NotImplementedError, match="no double backward"):
        torch.autograd.functional.hessian(lambda q: attend(q).square().sum(), q)
    with pytest.raises(NotImplementedError, match="no double backward"):
        torch.func.grad(lambda q: torch.func.grad(lambda q: attend(q).square().sum())(q).sum())(q.detach())
    assert torch.autograd.gradgradcheck(lambda q: naive_attention(q, k.detach(), v.detach()), q), "the way out works"


def test_forward_mode_says_so(backend):
    """Nothing is silently taken for a constant, whether gradients are recorded or not."""
    q, k, v = tensors(backend, requires_grad=False)
    attend = lambda q: flash_attention(q, k, v, backend=backend)  # noqa: E731
    for derivative in (torch.func.jacfwd(attend), torch.func.hessian(lambda q: attend(q).sum())):
        with pytest.raises(NotImplementedError, match="no forward-mode derivative.*naive_attention"):
            derivative(q)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(attend, (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        for recording in (False, True):
            with torch.set_grad_enabled(recording), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                attend(dual)
        assert attend(q).shape == q.shape, "who has no tangent is left in peace"


def test_forward_mode_over_the_backward_says_so(backend):
    q, k, v = tensors(backend)
    out = flash_attention(q, k, v, backend=backend)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.autograd.grad(out, q, dual)


@pytest.mark.parametrize("option", OPTIONS)
def test_torch_func_grad(option, backend):
    """The gradients of torch.autograd, bit by bit, of everything that has one."""
    skip_if_slow(option, backend)
    inputs, asked = tensors(backend), ask(option, 20, 30)
    names = [name for name, x in asked.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    arguments = (*inputs, *(asked[name] for name in names))

    def loss(q, k, v, *extra):
        torch.manual_seed(3)
        out, lse = flash_attention_with_lse(q, k, v, **(asked | dict(zip(names, extra))), backend=backend)
        return (out * out).sum() + lse.masked_fill(lse.isinf(), 0.0).sum()

    want = torch.autograd.grad(loss(*arguments), arguments)
    got = torch.func.grad(loss, argnums=tuple(range(len(arguments))))(*(x.detach() for x in arguments))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert len(want) == 3 + len(learned(asked))


def test_buffers_of_a_pattern_have_no_gradient_and_say_so():
    pattern = Pattern(score_mod=bent, buffers=(torch.ones(3, device=DEVICE, requires_grad=True),))
    inputs = tensors("torch")
    with pytest.raises(NotImplementedError, match="pattern: its buffers get no gradient.*attn_mask"):
        flash_attention(*inputs, pattern=pattern, backend="torch")


@triton.jit
def bent(score, batch, head, i, j, buffers):
    return score - 0.05 * score * score


def test_a_score_mod_is_differentiated_by_autograd():
    """... inside an operator, where autograd is off; compiled, and under torch.func."""
    pattern = Pattern(score_mod=bent)
    case = make_case(1, 2, 1, 20, 30, 16, device=DEVICE, pattern=pattern)
    right, plain = truth(case), eager(case)
    for attend in (flash_attention_with_lse, torch.compile(flash_attention_with_lse, fullgraph=True, backend="aot_eager")):
        got = differentiate(attend, case, backend="torch")
        for name in right:
            assert_close(name, got[name], right[name], plain[name])
    attend = lambda q: (flash_attention(q, case.k, case.v, pattern=pattern, backend="torch") * case.dout).sum()  # noqa: E731
    q = case.q.requires_grad_()
    assert torch.equal(torch.func.grad(attend)(case.q.detach()), torch.autograd.grad(attend(q), q)[0])


# flops


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dv", [16, 24])
def test_flops_are_counted_as_sdpas(dv, causal, backend):
    q, k, v = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((2, 4, 20, 16), (2, 2, 30, 16), (2, 2, 30, dv)))
    with FlopCounterMode(display=False) as forward:
        out = flash_attention(q, k, v, causal=causal, backend=backend)
    with FlopCounterMode(display=False) as backward:
        out.backward(torch.randn_like(out))
    same_heads = (2, 4, 30, 16), (2, 4, 30, dv)  # older versions of PyTorch know no groups
    assert forward.get_total_flops() == sdpa_flop_count(q.shape, *same_heads)
    assert backward.get_total_flops() == sdpa_backward_flop_count(out.shape, q.shape, *same_heads)


@pytest.mark.gpu
def test_flops_are_those_of_sdpa_on_the_same_problem():
    counts = []
    for attend in (flash_attention, torch.nn.functional.scaled_dot_product_attention):
        q, k, v = (torch.randn(2, 4, 256, 64, device=DEVICE, dtype=torch.float16, requires_grad=True) for _ in range(3))
        with FlopCounterMode(display=False) as counter:
            attend(q, k, v).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_flops_of_packed_sequences_are_those_of_their_lengths(backend):
    lengths_q, lengths_k = (7, 0, 13), (9, 20, 1)
    inputs, rest = packed(backend, lengths_q, lengths_k)
    with FlopCounterMode(display=False) as counter:
        flash_attention_varlen(*inputs, *rest, backend=backend).sum().backward()
    products = 2 + 5
    assert counter.get_total_flops() == 2 * products * HEADS * DIM * sum(n * m for n, m in zip(lengths_q, lengths_k))


def test_flops_on_meta_tensors_take_the_longest():
    q, k = (torch.empty(20, heads, DIM, device="meta") for heads in (HEADS, KV_HEADS))
    cu = torch.empty(4, dtype=torch.int32, device="meta")
    with FlopCounterMode(display=False) as counter:
        flash_attention_varlen(q, k, k, cu, cu, 13, 9, backend="torch")
    assert counter.get_total_flops() == 2 * 2 * HEADS * DIM * 3 * 13 * 9


# the way past the dispatcher


@pytest.mark.parametrize("option", [*OPTIONS, PACKED])
def test_past_the_dispatcher_and_through_it(option):
    """The same bits, forward and backward."""
    inputs = operands(option, "torch")
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    results = []
    for call in (ops.attention_forward, ops.attention_forward.overload):
        out, lse = call(*inputs)
        weights = torch.linspace(-1, 1, lse.numel(), device=lse.device).view_as(lse)
        loss = (out * weights[..., None]).sum() + (lse.where(lse.isfinite(), 0.0) * weights).sum()
        results.append([out, lse, *torch.autograd.grad(loss, wanted)])
    assert len(wanted) >= 3 and all(map(torch.equal, *results))


class Counted:
    """An overload that writes down its calls."""

    def __init__(self, overload):
        self.overload, self.calls = overload, []

    def __call__(self, *inputs):
        self.calls.append(inputs)
        return self.overload(*inputs)

    def __getattr__(self, name):
        return getattr(self.overload, name)


@pytest.fixture
def dispatched(monkeypatch):
    """The calls that the dispatcher is given, as a list that grows."""
    counted = Counted(ops.attention_forward.overload)
    monkeypatch.setattr(ops.attention_forward, "overload", counted)
    return counted.calls


def test_the_dispatcher_is_not_asked_where_nobody_watches(dispatched):
    q, k, v = tensors("torch", dtype=torch.float32)
    flash_attention(q, k, v).sum().backward()
    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert not flash_attention(q, k, v).requires_grad
    with torch.inference_mode():
        flash_attention(q.clone(), k.clone(), v)
    assert not dispatched


class Watched(torch.Tensor):
    pass


@pytest.mark.parametrize("how", ["flop counter", "function mode", "profiler", "vmap", "grad", "jvp", "subclass", "negative view", "list"])
def test_whoever_watches_sees_the_operator(how, dispatched):
    q, k, v = (x.detach() for x in tensors("torch", dtype=torch.float32))
    attend = lambda q: flash_attention(q, k, v, backend="torch")  # noqa: E731
    right = attend(q)
    del dispatched[:]
    if how == "flop counter":
        with FlopCounterMode(display=False) as counter:
            attend(q)
        assert counter.get_total_flops() > 0
    elif how == "function mode":
        with torch.device(DEVICE):
            attend(q)
    elif how == "profiler":
        with torch.profiler.profile() as profile:
            attend(q)
        assert "flash_edu::attention_forward" in [event.key for event in profile.key_averages()]
    elif how == "vmap":
        torch.vmap(attend)(q[None])
    elif how == "grad":
        torch.func.grad(lambda q: attend(q).sum())(q)
    elif how == "jvp":
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(attend, (q,), (q,))
    elif how == "subclass":
        attend(q.as_subclass(Watched))
    elif how == "negative view":
        negative = torch.complex(q, -q).conj().imag
        assert negative.is_neg() and torch.equal(attend(negative), right)
    elif how == "list":
        ops.attention_forward(q, k, v, "torch", *ops.arguments(Rules(0.25, buffers=[torch.complex(q, q).conj().imag])))
    assert dispatched


def test_a_caller_below_autograd_stays_there():
    """An operator of somebody else's that calls attention has a gradient of its own, or none."""
    q, k, v = tensors("torch", dtype=torch.float32)
    with torch._C._AutoDispatchBelowAutograd():
        assert not flash_attention(q, k, v).requires_grad
