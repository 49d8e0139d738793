"""What an answer to chapter 09 must satisfy.

Numbers are judged against fp64, by the bound of flash_edu/testing.py. The rest is judged by PyTorch itself: opcheck,
torch.compile, autocast, checkpointing, and the hooks that see what autograd saves.
"""

import contextlib
import re
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from frames import left_alone
from torch.utils.checkpoint import checkpoint

from flash_edu import MultiHeadFlashAttention
from flash_edu.course import device, on_gpu
from flash_edu.models import GPTDecoder
from flash_edu.reference import naive_attention
from flash_edu.testing import assert_close, eager, make_case, truth

SCALE = 0.3  # not 1 / sqrt(D): a scale that is dropped on the way must show
COMPILER = "inductor" if on_gpu else "aot_eager"


def case_of(nq=20, nk=37, dtype=torch.float32, causal=True, batch=2, d=16):
    return make_case(
        batch, 3, nq=nq, nk=nk, d=d, dtype=dtype, device=device, causal=causal, scale=SCALE, hot=3.0
    )


def views_of(*tensors, grad=False):
    """The same numbers, lying in memory as (B, N, H, D): what a model hands over. No copy of them is contiguous."""
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    return [x.requires_grad_() for x in views] if grad else views


def same(name, got, want, look):
    assert torch.equal(got, want), (
        f"{name} differs, by {(got.double() - want.double()).abs().max():.3g} at most.\n{look}"
    )


def compare(names, got, case, look, asked=""):
    right, plain = truth(case), eager(case)
    for name, x in zip(names, got):
        try:
            assert_close(name, x, right[name], plain[name])
        except AssertionError as wrong:
            shapes = f"q {tuple(case.q.shape)}, Nk {case.k.shape[2]}, {str(case.q.dtype)[6:]}"
            raise AssertionError(f"{shapes}, causal={case.causal}{asked}\n{wrong}\n{look}") from None


# Whose lines an error passed through: those of the answer, beneath which are its kernels.
KERNELS = ("ch07_fused_forward", "ch08_fused_backward")


def lines_of_answer(error):
    """[(file, function), ...] of the answer's lines that the error passed through, the outermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    path = [(Path(frame.filename).stem, frame.name) for frame in frames]
    return [(file, function) for file, function in path if file in (*KERNELS, "ch09_module")]


def ran_kernels_in(error, function, operator=None):
    """Did it happen in a kernel that `function` ran, and not by way of the operator?"""
    files, functions = zip(*lines_of_answer(error) or [("", "")])
    return function in functions and operator not in functions and bool(set(files).intersection(KERNELS))


def deliberate(error):
    """Was it raised by a `raise` in the answer, or did Python stop at a slip, as a name that does not exist?"""
    if not isinstance(error, (NameError, AttributeError, TypeError)):
        return True  # what a wrong input leads to
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return line.startswith(f"raise {type(error).__name__}")


def in_tokens(wrong):
    """What assert_close said of (B, N, C), or of (B, N, vocabulary): it takes every three dimensions for (B, H, N)."""
    return str(wrong).replace("row", "column").replace("head", "token")


def said_by(error):
    lines = [line for line in str(error).splitlines() if line.strip()]
    if "incorrect number of gradients" in str(error):  # PyTorch counts one more than the learner writes
        return "attention_gradient returned too few gradients."
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


@contextlib.contextmanager
def explained(look, *errors):
    """An error of PyTorch's becomes a failure with `look` beneath. One from a line of the answer is told as it is, with that
    line; and what is not written yet stays that."""
    try:
        yield
    except Exception as error:
        known = not errors or isinstance(error, errors)
        if not known or isinstance(error, AssertionError) or lines_of_answer(error):
            raise
        raise AssertionError(f"{said_by(error)}\n{look}") from error


def spy(module, name):
    """Calls go through, and are recorded."""
    return mock.patch.object(module, name, wraps=getattr(module, name))


def referee(operator, arguments, look, look_at_gradient=""):
    operator(*arguments)  # an error that needs no referee is told as it is
    try:
        torch.library.opcheck(operator, arguments)
    except Exception as error:
        cause, said = error.__cause__ or error, str(error)
        test = re.search(r"test_\w+", said)
        test = test[0] if test else "opcheck"
        if ran_kernels_in(cause, "attention_gradient", "attention_backward"):
            look_at_gradient = KERNELS_IN_GRADIENT
        elif lines_of_answer(cause):
            raise cause from None
        why = said.split("failed with ")[-1].strip().splitlines()[0][:300]
        why = said_by(cause) if "number of gradients" in why else why.removesuffix(SCROLL)
        look = look_at_gradient or look if test == "test_aot_dispatch_dynamic" else look
        raise AssertionError(f"{test}: {why}\n{OPCHECK.get(test, '')}\n{look}".replace("\n\n", "\n")) from None


SCROLL = " (scroll up for stack trace)"
OPCHECK = {
    "test_schema": "The operator promised to write into none of its inputs, and to return new tensors.",
    "test_faketensor": "The real operator and its fake disagree about a shape, a dtype, a device or strides.",
    "test_aot_dispatch_dynamic": "This is the operator as torch.compile uses it, with and without gradient.",
}
FAKE = (
    "Chapter 07 makes `out` with torch.empty_like(q), and lse is (B, H, Nq), float32. The fake says the same."
)
BACKWARD_FAKE = (
    "backward_shapes: each gradient is torch.empty_like its input. attention_backward makes new tensors."
)
KERNELS_IN_GRADIENT = (
    "attention_gradient ran the kernels of chapter 08 itself. torch.compile calls it with tensors that hold no data,\n"
    "and kernels cannot run on those. Call the operator attention_backward: its fake knows the shapes."
)

# --- 9.1 the operator -----------------------------------------------------------------------------------


def forward(answer, case):
    """out and lse, from inputs that must stay what they are."""
    given = {name: getattr(case, name) for name in "qkv"}
    with left_alone("attention_forward (it promised not to: mutates_args=())", **given):
        with explained("attention_forward returns two tensors, out and lse.", TypeError, ValueError):
            out, lse = answer.attention_forward(*given.values(), case.causal, SCALE)
    return out, lse


@pytest.mark.exercise("9.1")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forward(answer, dtype, causal):
    """the operator computes O and L, with the causal and the scale it is given"""
    case = case_of(dtype=dtype, causal=causal)
    look = (
        "flash_forward alone is right if check(7) is green. Does the operator pass on causal and scale? Both are\n"
        "keyword-only there. It returns out first, then lse."
    )
    compare(("out", "lse"), forward(answer, case), case, look, f", scale={SCALE}")


@pytest.mark.exercise("9.1")
def test_forward_is_the_kernel(answer):
    """it runs the kernel of chapter 07, once, on the tensors it was given"""
    case = case_of(nq=17, nk=17, batch=1)
    q, k, v = views_of(case.q, case.k, case.v)
    with spy(answer.ch07_fused_forward, "flash_forward") as kernel:
        answer.attention_forward(q, k, v, True, SCALE)
    assert kernel.call_count == 1, (
        f"ch07_fused_forward.flash_forward was called {kernel.call_count} times; once is enough, and needed."
    )
    for name, x, given in zip("qkv", kernel.call_args.args, (q, k, v)):
        assert x.data_ptr() == given.data_ptr(), (
            f"{name} was copied before the kernel saw it: strides {given.stride()} became {x.stride()}, and its first number,\n"
            f"{given.flatten()[0]:.4g}, became {x.flatten()[0]:.4g}. The kernel reads any strides: hand {name} over as it is."
        )


@pytest.mark.exercise("9.1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fake(answer, dtype):
    """without data, it tells the shape, the dtype and the strides of what it would return"""
    q = torch.empty(2, 1 << 20, 3, 64, dtype=dtype, device="meta").transpose(1, 2)
    k = torch.empty(2, 3, 100, 64, dtype=dtype, device="meta")
    got = without_data("forward_shapes", "out, lse", lambda: answer.attention_forward(q, k, k, False, SCALE))
    want = {"out": torch.empty_like(q), "lse": q.new_empty(q.shape[:3], dtype=torch.float32)}
    for (name, x), y in zip(want.items(), got):
        assert_same_kind(name, y, x, "q", q, FAKE)


def without_data(fake, names, call):
    """What an operator says of tensors that have no data; it asks its fake."""
    try:
        with explained(f"{fake} gives back what the operator does: {names}."):
            return call()
    except Exception as error:
        if not ran_kernels_in(error, fake):
            raise
        raise AssertionError(
            f"{said_by(error)}\n{fake} ran a kernel. Its inputs have a shape here and no numbers to run it on: a fake makes empty\n"
            "tensors of the right kind."
        ) from error


def assert_same_kind(name, got, want, source, given, look):
    """The fake's answer, for an input `given` called `source`, has the shape, dtype, device and strides of the real one."""
    for what in ("shape", "dtype", "device"):
        assert getattr(got, what) == getattr(want, what), (
            f"the fake says that the {what} of {name} is {show(getattr(got, what))}; it is {show(getattr(want, what))} for\n"
            f"{source} {tuple(given.shape)}, {given.dtype}, on the device {given.device}.\n{look}"
        )
    assert got.stride() == want.stride(), (
        f"the fake says that {name} has strides {got.stride()}; the real one has {want.stride()}, for {source} with\n"
        f"strides {given.stride()}. The code that torch.compile makes would expect the fake's strides.\n{look}"
    )


def show(x):
    return tuple(x) if isinstance(x, torch.Size) else x


@pytest.mark.exercise("9.1")
def test_forward_opcheck(answer):
    """PyTorch's own referee, torch.library.opcheck, finds nothing"""
    case = case_of(nq=5, nk=9, batch=1)
    referee(answer.attention_forward, (*views_of(case.q, case.k, case.v), True, SCALE), FAKE)


# --- 9.2 the gradient -----------------------------------------------------------------------------------

GRADIENT = (
    "attention_gradient returns dq, dk, dv, and None for causal and for scale: one for each input, in order.\n"
    "attention_backward takes dout, dlse, q, k, v, out, lse, causal and scale, in this order."
)


def differentiate(answer, case, use=("out", "lse")):
    """dq, dk, dv through the operator, from the gradients of the outputs in `use`."""
    inputs = views_of(case.q.detach().clone(), case.k.detach().clone(), case.v.detach().clone(), grad=True)
    outputs = dict(zip(("out", "lse"), answer.attention_forward(*inputs, case.causal, SCALE)))
    arriving = {"out": views_of(case.dout)[0], "lse": case.dlse.masked_fill(outputs["lse"].isinf(), 0.0)}
    with explained(GRADIENT, RuntimeError, TypeError, ValueError):
        torch.autograd.backward([outputs[name] for name in use], [arriving[name] for name in use])
    for name, x in zip("QKV", inputs):
        assert x.grad is not None, f"d{name} is None.\n{GRADIENT}"
    return [x.grad for x in inputs]


@pytest.mark.exercise("9.2")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients(answer, dtype, causal):
    """dQ, dK and dV are right, when gradients arrive at both O and L"""
    case = case_of(nq=41, nk=29, dtype=dtype, causal=causal, batch=1)
    look = (
        "flash_backward alone is right if check(8) is green. Is what it gets in the right order: dout, dlse, q, k, v,\n"
        "out, lse? Are causal and scale passed on, from ctx, and in the right places? Is dlse used?"
    )
    compare(("dq", "dk", "dv"), differentiate(answer, case), case, look, f", scale={SCALE}")


@pytest.mark.exercise("9.2")
@pytest.mark.parametrize("use", ["out", "lse"])
def test_one_output_used(answer, use):
    """a loss that uses only O, or only L, has a gradient too"""
    case = case_of(nq=9, nk=12, batch=1)
    unused = {"out": {"dlse": torch.zeros_like(case.dlse)}, "lse": {"dout": torch.zeros_like(case.dout)}}[use]
    case = type(case)(**{**vars(case), **unused})
    look = f"Only {use} was used, and PyTorch hands you zeros as the gradient of the other."
    compare(("dq", "dk", "dv"), differentiate(answer, case, (use,)), case, look)


@pytest.mark.exercise("9.2")
def test_stride_0_gradient(answer):
    """out.sum().backward() works: its dO is one number, seen from everywhere"""
    case = case_of(nq=18, nk=18, batch=1)
    case = type(case)(
        **{**vars(case), "dout": torch.ones_like(case.dout), "dlse": torch.zeros_like(case.dlse)}
    )
    inputs = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out, _ = answer.attention_forward(*inputs, True, SCALE)
    with explained(GRADIENT, RuntimeError, TypeError, ValueError):
        out.sum().backward()
    look = (
        "If the claims above hold, it is how dO lies in memory. sum() hands back a single number, seen as a whole tensor:\n"
        "all its strides are 0. Hand dO to the kernels as it is."
    )
    compare(("dq", "dk", "dv"), [x.grad for x in inputs], case, look)


def saved_by(function):
    """What autograd saves while function runs."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        outputs = function()
    return saved, outputs


@pytest.mark.exercise("9.2")
def test_saved(answer):
    """between forward and backward Q, K, V, O and L are kept, and nothing else"""
    case = case_of(nq=40, nk=50, batch=1)
    inputs = views_of(case.q, case.k, case.v, grad=True)
    saved, (out, lse) = saved_by(lambda: answer.attention_forward(*inputs, True, SCALE))
    wanted = dict(zip(("q", "k", "v", "out", "lse"), (*inputs, out, lse)))
    assert saved, (
        "Nothing went through ctx.save_for_backward. A tensor that is kept as an attribute of ctx is hidden from\n"
        "PyTorch: it is not freed after the backward, and checkpointing cannot leave it out."
    )
    found = [x.data_ptr() for x in saved]
    for name, x in wanted.items():
        assert x.data_ptr() in found, (
            f"{name} itself was not given to ctx.save_for_backward; a copy of it costs memory.\n"
            "Save q, k, v, out and lse, as they are."
        )
    extra = [tuple(x.shape) for x in saved if x.data_ptr() not in [x.data_ptr() for x in wanted.values()]]
    assert not extra and len(saved) == 5, (
        f"{len(saved)} tensors are saved, of shapes {[tuple(x.shape) for x in saved]}. q, k, v, out and lse are enough,\n"
        "and no copies of them; here Nq = 40 and Nk = 50."
    )
    left = (
        [x for x in vars(out.grad_fn).values() if isinstance(x, torch.Tensor)]
        if hasattr(out.grad_fn, "__dict__")
        else []
    )
    assert not left, (
        f"{len(left)} tensors are attributes of ctx. PyTorch cannot watch those; only causal and scale belong there."
    )


@pytest.mark.exercise("9.2")
def test_backward_is_the_kernels(answer):
    """the backward's operator runs the kernels of chapter 08, and the forward is not run again"""
    case, callers = case_of(nq=6, nk=6, batch=1), []

    def note_callers(*args, **kwargs):
        callers.append([frame.name for frame in traceback.extract_stack()])
        return mock.DEFAULT  # and go on to flash_backward

    with (
        spy(answer.ch07_fused_forward, "flash_forward") as ahead,
        spy(answer.ch08_fused_backward, "flash_backward") as back,
    ):
        back.side_effect = note_callers
        differentiate(answer, case)
    assert (ahead.call_count, back.call_count) == (1, 1), (
        f"In one forward and backward, ch07_fused_forward.flash_forward ran {ahead.call_count} times and\n"
        f"ch08_fused_backward.flash_backward {back.call_count} times. Each is needed once."
    )
    assert "attention_backward" in callers[0], KERNELS_IN_GRADIENT


@pytest.mark.exercise("9.2")
def test_backward_fake(answer):
    """without data, the backward's operator tells the shapes, dtypes and strides of dQ, dK and dV"""
    q = torch.empty(2, 40, 3, 64, dtype=torch.float16, device="meta").transpose(1, 2)
    k = torch.empty(2, 3, 100, 64, dtype=torch.float16, device="meta")  # each lies in memory in another way
    v = torch.empty(100, 2, 3, 64, dtype=torch.float16, device="meta").permute(1, 2, 0, 3)
    lse = torch.empty(2, 3, 40, device="meta")
    got = without_data(
        "backward_shapes",
        "dq, dk, dv",
        lambda: answer.attention_backward(q, lse, q, k, v, q, lse, False, SCALE),
    )
    for name, x, y in zip("qkv", (q, k, v), got):
        assert_same_kind(f"d{name}", y, torch.empty_like(x), name, x, BACKWARD_FAKE)


@pytest.mark.exercise("9.2")
def test_gradient_opcheck(answer):
    """opcheck finds nothing in the operator with its gradient, nor in the backward's operator"""
    case = case_of(nq=5, nk=9, batch=1)
    q, k, v = views_of(case.q, case.k, case.v)
    out, lse = answer.attention_forward(q, k, v, True, SCALE)
    dout = torch.ones((), device=device).expand_as(out)
    referee(answer.attention_backward, (dout, case.dlse, q, k, v, out, lse, True, SCALE), BACKWARD_FAKE)
    inputs = views_of(case.q, case.k, case.v, grad=True)
    referee(answer.attention_forward, (*inputs, True, SCALE), FAKE, GRADIENT)


# --- 9.3 the function -----------------------------------------------------------------------------------


def qkv(nq=10, nk=13, d=16, dtype=torch.float32, grad=False):
    case = case_of(nq=nq, nk=nk, d=d, dtype=dtype, batch=1)
    return views_of(case.q, case.k, case.v, grad=grad)


def attend(answer, *inputs, **options):
    with left_alone("flash_attention", **{name: x.detach() for name, x in zip("qkv", inputs)}):
        out = answer.flash_attention(*inputs, **options)
    assert isinstance(out, torch.Tensor), (
        f"flash_attention returned {type(out).__name__}. A model wants out alone; lse stays inside."
    )
    return out


@pytest.mark.exercise("9.3")
@pytest.mark.parametrize("scale", [None, SCALE])
@pytest.mark.parametrize("causal", [False, True])
def test_function(answer, causal, scale):
    """it is attention, with 1 / sqrt(D) unless a scale is given, and with a gradient"""
    case = case_of(nq=21, nk=33, causal=causal, batch=1)
    case = type(case)(**{**vars(case), "scale": scale, "dlse": torch.zeros_like(case.dlse)})
    inputs = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out = attend(answer, *inputs, causal=causal, scale=scale)
    look = "Are causal and scale passed on? If scale is None it is q.shape[-1] ** -0.5: D belongs to q's last dimension."
    asked = f", scale={scale}"
    compare(("out",), (out,), case, look, asked)
    assert out.requires_grad, "out has no gradient. Call the operator attention_forward, and not the kernel."
    out.backward(case.dout)
    compare(("dq", "dk", "dv"), [x.grad for x in inputs], case, look, asked)


@pytest.mark.exercise("9.3")
def test_scale_0(answer):
    """a scale of 0 is a scale: every key counts the same"""
    q, k, v = qkv(nq=3, nk=5)
    out, mean = attend(answer, q, k, v, scale=0.0), v.mean(dim=2, keepdim=True)
    wrong = (out - mean).abs().max()
    assert wrong < 1e-5, (
        f"scale = 0.0: out[0, 0, 0, 0] = {out[0, 0, 0, 0]:.5g}, expected {mean[0, 0, 0, 0]:.5g}, the mean of v's column.\n"
        "Only None means 1 / sqrt(D). 0.0 is false for `or` and for `if`: compare with `is None`."
    )


@pytest.mark.exercise("9.3")
def test_no_copies(answer):
    """views are handed to the kernel as they are: nothing is copied"""
    inputs = qkv()
    with spy(answer.ch07_fused_forward, "flash_forward") as kernel:
        attend(answer, *inputs)
    assert kernel.call_count == 1, f"The kernel ran {kernel.call_count} times. Once is enough, and needed."
    for name, x, given in zip("qkv", kernel.call_args.args, inputs):
        assert x.data_ptr() == given.data_ptr() and x.stride() == given.stride(), (
            f"{name} was copied on its way: strides {given.stride()} became {x.stride()}. No .contiguous() is needed."
        )


def autocast(dtype=torch.float16, enabled=True):
    return torch.autocast(device, dtype=dtype, enabled=enabled)


@pytest.mark.exercise("9.3")
def test_autocast(answer):
    """under autocast it computes in autocast's dtype, and the gradients come back in float32"""
    inputs = qkv(grad=True)
    with autocast(), spy(torch, "is_autocast_enabled") as asked:
        out = attend(answer, *inputs)
    look = "See torch.is_autocast_enabled(q.device.type) and torch.get_autocast_dtype(q.device.type)."
    if mock.call() in asked.call_args_list:
        look = "torch.is_autocast_enabled() without an argument asks about cuda. Give it q.device.type."
    assert out.dtype == torch.float16, (
        f"q is float32, autocast asks for float16, and out is {str(out.dtype)[6:]}. An operator of your own is not\n"
        f"autocast by itself. {look}"
    )
    out.float().sum().backward()
    for name, x in zip("QKV", inputs):
        assert x.grad is not None, (
            f"d{name} is None. Cast with {name.lower()}.to(dtype), which autograd follows."
        )
        assert x.grad.dtype == torch.float32, f"d{name} is {x.grad.dtype}, and {name.lower()} was float32."
    by_hand = attend(answer, *(x.detach().half() for x in inputs))
    same(
        "out under autocast",
        out,
        by_hand,
        "It should be what you get by casting q, k and v to float16 yourself.",
    )


@pytest.mark.exercise("9.3")
def test_autocast_mixed(answer):
    """under autocast q, k and v may arrive in different dtypes"""
    q, k, v = qkv()
    with autocast():
        attend(answer, q.half(), k.half(), v.half())
        try:
            out = attend(answer, q.half(), k, v)
        except ValueError:  # in the answer's own words, which no known mistake could repeat
            raise AssertionError(
                "Autocast asks for float16. q is float16 already, k and v are float32, and flash_attention raised a ValueError;\n"
                "with k and v in float16 it does not. Cast first, then check: after the cast all three have one dtype."
            ) from None
    assert out.dtype == torch.float16, f"out is {str(out.dtype)[6:]}; autocast asks for float16."


@pytest.mark.exercise("9.3")
def test_autocast_off(answer):
    """without autocast, or with it switched off, nothing is cast"""
    inputs = qkv()
    with autocast(), autocast(enabled=False):
        inside = attend(answer, *inputs)
    for where, out in (
        ("outside autocast", attend(answer, *inputs)),
        ("under autocast(enabled=False)", inside),
    ):
        assert out.dtype == torch.float32, (
            f"{where}, q is float32 and out is {str(out.dtype)[6:]}. Cast only if torch.is_autocast_enabled says so."
        )


@pytest.mark.exercise("9.3")
def test_autocast_dtype(answer):
    """the dtype is autocast's, whichever that is"""
    inputs = qkv()
    with autocast(torch.bfloat16):
        if on_gpu:
            out = attend(answer, *inputs)
            assert out.dtype == torch.bfloat16, f"autocast asks for bfloat16, and out is {out.dtype}."
            return
        with pytest.raises(Exception) as caught:  # noqa: B017  which error it is, is judged below
            out = attend(answer, *inputs)
            look = "Take the dtype from torch.get_autocast_dtype(q.device.type)."
            if out.dtype == torch.bfloat16:
                look = (
                    "The cast is right. Look at check_inputs first: it has to refuse bfloat16 on a CPU,\n"
                    "and it has to see q, k and v after the cast."
                )
            pytest.fail(
                f"Autocast asks for bfloat16, on a CPU. No error came, and out is {str(out.dtype)[6:]}.\n{look}"
            )
    if not isinstance(caught.value, ValueError):
        raise caught.value


@pytest.mark.exercise("9.3")
def test_wrong_input(answer):
    """an input that the kernels cannot work on raises a ValueError that names it"""
    q, k, v = qkv(nq=10, nk=13)
    double = [x.double() for x in (q, k, v)]
    wrong = [
        ("q", "3 dimensions", (q[0], k, v)),
        ("k", "3 dimensions", (q, k[0], v)),
        ("v", "5 dimensions", (q, k, v[None])),
        ("k", "another dtype than q", (q, k.half(), v)),
        ("v", "another dtype than q", (q, k, v.half())),
        ("k", "another device than q", (q, k.to("meta"), v)),
        ("q", "float64", double),
        ("q", "int32", [x.int() for x in (q, k, v)]),
        *((("q", f"head_dim {d}", qkv(d=d))) for d in (8, 40, 48, 512)),
        ("k", "another batch size than q", (q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1))),
        ("k", "1 head, and q has 3", (q, k[:, :1], v[:, :1])),
        ("k", "another head_dim than q", (q, torch.cat([k, k], -1), v)),
        ("v", "another head_dim than q", (q, k, torch.cat([v, v], -1))),
        ("v", "another length than k", (q, k, v[:, :, :-1])),
        ("v", "more heads than k", (q, k, torch.cat([v, v], 1))),
        ("v", "another batch size than q", (q, k, v.expand(2, -1, -1, -1))),
    ]
    if not on_gpu:
        wrong.append(("q", "bfloat16 on a CPU", [x.bfloat16() for x in (q, k, v)]))
    for name, what, inputs in wrong:
        said = refusal(answer, inputs)
        case = f"{name} has {what}: q {describe(inputs[0])}, k {describe(inputs[1])}, v {describe(inputs[2])}"
        if "is not written yet" in str(said) or said and not deliberate(said):
            raise said
        assert said is not None, (
            f"{case}\nNo error was raised; the kernel would read past the end, or compute nonsense."
        )
        assert isinstance(said, ValueError), (
            f"{case}\nThis raised {type(said).__name__}: {str(said).splitlines()[0][:120]}\n"
            "Look at the input before anything uses it, and raise ValueError."
        )
        assert re.search(rf"\b{name}\b", str(said)), (
            f'{case}\nThe message is "{said}". It should name the argument: {name}.'
        )


def refusal(answer, inputs):
    with spy(answer.ch07_fused_forward, "flash_forward") as kernel:
        kernel.side_effect = lambda q, *args, **kwargs: (
            q.clone(),
            q.new_empty(q.shape[:3], dtype=torch.float32),
        )
        try:
            answer.flash_attention(*inputs)
        except Exception as error:  # whatever it is, it is judged
            return error
    return None


def describe(x):
    return f"{tuple(x.shape)} {str(x.dtype)[6:]}" + (f" on {x.device}" if x.device.type == "meta" else "")


@pytest.mark.exercise("9.3")
def test_right_input(answer):
    """and what they can work on is not refused"""
    right = [(1, 1, 16), (1, 300, 32), (300, 1, 64), (7, 7, 128), (5, 9, 256)]
    for nq, nk, d in right:
        for dtype in (torch.float32, torch.float16) + (torch.bfloat16,) * on_gpu:
            inputs = qkv(nq, nk, d, dtype)
            try:
                answer.check_inputs(*inputs)
            except ValueError as error:
                raise AssertionError(
                    f"ValueError: {error}\nThat came for Nq = {nq}, Nk = {nk}, D = {d}, {dtype}, which is fine."
                ) from None


@pytest.mark.exercise("9.3")
def test_compile(answer):
    """torch.compile(fullgraph=True) takes it whole, forward and backward"""
    torch.compiler.reset()

    def layer(q, k, v):
        return answer.flash_attention(2 * q, k, v, causal=True).sin()

    inputs = qkv(grad=True)
    look = (
        "Uncompiled, the same function runs. If check(\"9.2\") is green, look inside flash_attention: no print, no .item(),\n"
        "no value of a tensor that decides; only shapes and dtypes."
    )
    want = torch.autograd.grad(layer(*inputs).sum(), inputs)
    with explained(look):
        fast = torch.compile(layer, fullgraph=True, backend=COMPILER)(*inputs)
        got = torch.autograd.grad(fast.sum(), inputs)
    for name, x, y in zip(("dQ", "dK", "dV"), got, want):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max())), (
            f"{name} of the compiled function differs from {name} of the same function, uncompiled.\n"
            "If check(\"9.2\") is green, look inside flash_attention: does a value of a tensor decide there?"
        )


@pytest.mark.exercise("9.3")
def test_checkpoint(answer):
    """activation checkpointing gives the same gradients, bit for bit"""
    inputs = qkv(grad=True)

    def layer(q, k, v):
        return answer.flash_attention(q * 1, k, v, causal=True)

    want = torch.autograd.grad(layer(*inputs).sum(), inputs)
    got = torch.autograd.grad(checkpoint(layer, *inputs, use_reentrant=False).sum(), inputs)
    for name, x, y in zip(("dQ", "dK", "dV"), got, want):
        same(name, x, y, "The forward runs twice under checkpointing. Does anything change between the two?")


@pytest.mark.exercise("9.3")
def test_in_a_gpt(answer):
    """a GPT takes it as its attention"""
    tokens = torch.arange(26, device=device).reshape(2, 13) % 7
    models = {"naive": naive_attention, "yours": answer.flash_attention}
    logits = {name: gpt(attention)(tokens) for name, attention in models.items()}
    right = gpt(naive_attention).double()(tokens)
    try:
        assert_close("the logits", logits["yours"], right, logits["naive"])
    except AssertionError as wrong:
        raise AssertionError(
            f"{in_tokens(wrong)}\nThe model calls flash_attention(q, k, v, causal=True) on views."
        ) from None


def gpt(attention):
    torch.manual_seed(0)
    return GPTDecoder(7, 32, 2, 1, 16, dropout=0.0, attention=attention).to(device)


# --- 9.4 the module -------------------------------------------------------------------------------------

D_MODEL, HEADS, N = 48, 3, 11


def modules(answer, causal):
    """The answer's module, and flash_edu's with the formula inside, with the same weights."""
    torch.manual_seed(1)
    reference = MultiHeadFlashAttention(D_MODEL, HEADS, causal=causal, attention=naive_attention).to(device)
    module = answer.MultiHeadAttention(D_MODEL, HEADS, causal=causal).to(device)
    with explained(
        "The projections are nn.Linear(d_model, d_model), called q_proj, k_proj, v_proj and out_proj."
    ):
        module.load_state_dict(reference.state_dict())
    return module, reference


def step(module, x):
    """out, dx and the gradients of the weights, of one forward and backward."""
    x = x.detach().clone().requires_grad_()
    with left_alone("MultiHeadAttention", x=x.detach()):
        out = module(x)
    out.square().sum().backward()
    named = {f"the gradient of {name}": p.grad for name, p in module.named_parameters()}
    return {"out": out, "the gradient of x": x.grad, **named}


@pytest.mark.exercise("9.4")
@pytest.mark.parametrize("causal", [False, True])
def test_module(answer, causal):
    """with the same weights it gives what flash_edu's module gives, and the same gradients"""
    module, reference = modules(answer, causal)
    x = torch.randn(2, N, D_MODEL, device=device, generator=torch.Generator(device).manual_seed(2))
    got, plain = step(module, x), step(reference, x)
    reference.zero_grad()
    right = step(reference.double(), x.double())
    look = (
        "Head h takes the columns h * D to (h + 1) * D of each token: split the last dimension into (H, D) first, and\n"
        "then exchange N and H. At the end, the other way round, and then out_proj. Is self.causal passed on?"
    )
    for name, x in got.items():
        assert x is not None, f"{name} is None: it takes no part in out."
        if name == "the gradient of k_proj.bias":
            continue  # 0, and rounding: what is added to every key alike changes no softmax
        try:
            assert_close(name, x, right[name], plain[name])
        except AssertionError as wrong:
            raise AssertionError(
                f"d_model {D_MODEL}, {HEADS} heads, causal={causal}\n{in_tokens(wrong)}\n{look}"
            ) from None


@pytest.mark.exercise("9.4")
def test_module_causal(answer):
    """with causal, a later token changes nothing before it; without, it does"""
    x = torch.randn(1, N, D_MODEL, device=device)
    changed = x.clone()
    changed[:, 7] += 1
    for causal in (True, False):
        module, _ = modules(answer, causal)
        moved = (module(x) - module(changed))[0, :7].abs().amax(-1) > 0
        assert moved.any().item() is (not causal), (
            f"MultiHeadAttention(causal={causal}): token 7 was changed, and the outputs of tokens 0 to 6 "
            + ("changed with it." if causal else "did not notice.")
            + "\nIs self.causal passed on to flash_attention?"
        )


@pytest.mark.exercise("9.4")
def test_module_views(answer):
    """heads are views of the projections, handed to your flash_attention without a copy"""
    module, _ = modules(answer, True)
    with spy(answer, "flash_attention") as function:
        module(torch.randn(2, N, D_MODEL, device=device))
    assert function.call_count == 1, (
        f"flash_attention of this file was called {function.call_count} times. All heads go into one call."
    )
    inputs = [*function.call_args.args, *(function.call_args.kwargs.get(name) for name in "qkv")]
    want = (2, HEADS, N, D_MODEL // HEADS)
    for name, x in zip("qkv", (x for x in inputs if x is not None)):
        assert tuple(x.shape) == want, f"{name} has shape {tuple(x.shape)}; (B, H, N, D) is {want}."
        strides = (N * D_MODEL, D_MODEL // HEADS, D_MODEL, 1)
        assert x.stride() == strides, (
            f"{name} is a {'copy' if x._base is None else 'view'}, with strides {x.stride()}. A view of the projection, cut into\n"
            f"(B, N, H, D) and with N and H exchanged, has {strides}:\n"
            "the next token is d_model numbers away, the next head D. .view and .transpose copy nothing."
        )


@pytest.mark.exercise("9.4")
def test_module_compiled(answer):
    """a compiled training step under autocast gives the gradients of the plain one"""
    torch.compiler.reset()
    module, reference = modules(answer, True)
    x = torch.randn(1, N, D_MODEL, device=device, generator=torch.Generator(device).manual_seed(3))
    with autocast():
        plain = {name: value.float() for name, value in step(reference, x).items()}
        module(x)  # what stops it uncompiled is told as it is
        with explained("Uncompiled, the same module runs. Only shapes may decide what forward does."):
            got = step(torch.compile(module, fullgraph=True, backend=COMPILER), x)
    assert got["out"].dtype == torch.float16, f"out is {got['out'].dtype}; autocast asks for float16."
    for name, value in plain.items():
        x = got[name if name in got else name.replace("gradient of ", "gradient of _orig_mod.")].float()
        error, largest = (x - value).abs().max().item(), value.abs().max().item()
        assert "k_proj.bias" in name or error <= 2e-2 * largest, (
            f"{name}: differs by {error:.3g} from eager attention under autocast, where the largest is {largest:.3g}."
        )


@pytest.mark.exercise("9.4")
def test_module_state(answer):
    """its weights are the four projections, and nothing else"""
    module = answer.MultiHeadAttention(D_MODEL, HEADS)
    found = {name: tuple(p.shape) for name, p in module.state_dict().items()}
    layers = ("q_proj", "k_proj", "v_proj", "out_proj")
    want = {f"{n}.weight": (D_MODEL, D_MODEL) for n in layers} | {f"{n}.bias": (D_MODEL,) for n in layers}
    assert found == want, f"the state_dict holds {found}\nExpected: {want}"
