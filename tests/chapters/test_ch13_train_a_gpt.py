"""What an answer to chapter 13 must satisfy: the batch, the step, and the plug for one's own kernels."""

import copy
import importlib
import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from frames import left_alone
from torch import nn

from flash_edu.course import device
from flash_edu.models import GPTDecoder
from flash_edu.reference import naive_attention

SERVED = (16, 32, 64, 128, 256)  # the head dimensions of chapter 09's flash_attention
LEARNING_RATE = 0.5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are tiny: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def as_bytes(text):
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bytes_of(count, seed):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


# 13.1 next_byte_batch


def batch_of(answer, data, block, starts):
    with left_alone("next_byte_batch", data=data):
        got = answer.next_byte_batch(data, block, torch.tensor(starts))
    assert isinstance(got, tuple | list) and len(got) == 2, "Return two tensors: inputs, targets."
    for name, x in zip(("inputs", "targets"), got):
        assert tuple(x.shape) == (len(starts), block), (
            f"{name} has the shape {tuple(x.shape)}, expected {(len(starts), block)}: a row for each start,\n"
            f"a column for each of the {block} positions. A window holds one byte more than either of them."
        )
    return got


@pytest.mark.exercise("13.1")
def test_a_batch_by_hand(answer):
    """two windows that you can read"""
    inputs, targets = batch_of(answer, as_bytes(b"def area(w):"), 4, [0, 4])
    shown = [[bytes(row.tolist()) for row in x] for x in (inputs, targets)]
    assert shown[0] == [b"def ", b"area"], f"inputs are {shown[0]}, expected [b'def ', b'area']"
    assert shown[1] == [b"ef a", b"rea("], (
        f"targets are {shown[1]}, expected [b'ef a', b'rea(']: at each position the byte that comes NEXT.\n"
        "The last target lies behind the last input: a window reads block + 1 bytes of the text."
    )


@pytest.mark.exercise("13.1")
@pytest.mark.parametrize(
    "block, starts", [(5, [3, 90, 41]), (1, [0, 7]), (16, [11]), (2, [30, 30, 2, 97])], ids=str
)
def test_every_start_counts(answer, block, starts):
    """any length, any starts: in any order, twice the same, up to the last possible one"""
    data = bytes_of(100, seed=block)
    inputs, targets = batch_of(answer, data, block, starts)
    for b, start in enumerate(starts):
        for name, x, shift in (("inputs", inputs, 0), ("targets", targets, 1)):
            right = data[start + shift : start + shift + block].tolist()
            assert x[b].tolist() == right, (
                f"block {block}, starts {starts}: {name}[{b}] = {x[b].tolist()}, expected {right},\n"
                f"bytes {start + shift} to {start + shift + block - 1} of the text. Row b begins "
                "at starts[b]."
            )


@pytest.mark.exercise("13.1")
def test_token_ids_are_int64(answer):
    """ids are int64, and every byte from 0 to 255 keeps its number"""
    inputs, targets = batch_of(answer, torch.arange(256).to(torch.uint8), 255, [0])
    for name, x in (("inputs", inputs), ("targets", targets)):
        assert x.dtype == torch.int64, (
            f"{name} are {x.dtype}, expected torch.int64: an embedding and cross_entropy look rows up, and\n"
            "want integers of that size. `.long()` turns bytes into them."
        )
    assert inputs[0].tolist() == list(range(255)) and targets[0].tolist() == list(range(1, 256)), (
        "A byte changed its number on the way. int8 ends at 127, so a byte of 200 would become -56."
    )


# 13.2 training_step


class Spy(nn.Module):
    """A small GPT that notes how it was called. Weights are large, so that no loss looks like another."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gpt = GPTDecoder(256, 16, 2, 1, max_seq_len=12, dropout=0.0, attention="naive")
        with torch.no_grad():
            for p in self.gpt.parameters():
                p.mul_(4.0 if p.dim() > 1 else 1.0)
        self.autocast, self.logits = [], None

    def forward(self, inputs):
        self.autocast.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        self.logits = self.gpt(inputs)
        return self.logits


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


def examples(seed=1, batch=3, n=7):
    text = bytes_of(batch * (n + 1), seed).long().view(batch, n + 1)
    return text[:, :-1], text[:, 1:]


def flat(tensors):
    return torch.cat([x.detach().double().flatten() for x in tensors])


def right_step(model, inputs, targets, max_norm):
    """(loss, norm, how far plain SGD moves the weights), by the formulas, in fp64."""
    model = copy.deepcopy(model).double()
    log_p = model(inputs).log_softmax(-1)  # (B, N, V)
    loss = -log_p.gather(-1, targets[..., None]).mean()
    gradient = flat(torch.autograd.grad(loss, list(model.parameters())))
    norm = gradient.norm()
    return loss.item(), norm.item(), -LEARNING_RATE * gradient * min(1.0, max_norm / norm.item())


def take_step(answer, model, optimizer, inputs, targets, **options):
    with left_alone("training_step", inputs=inputs, targets=targets):
        got = answer.training_step(model, optimizer, inputs, targets, **options)
    assert isinstance(got, tuple | list) and len(got) == 2, "Return two numbers: loss, grad_norm."
    for name, x in zip(("loss", "grad_norm"), got):
        assert isinstance(x, float), (
            f"{name} is a {type(x).__name__}, expected a Python float: `.item()`. A loss tensor "
            "that is kept in\n"
            "a list holds on to the graph of its step, and the memory fills up step by step."
        )
    return got


def assert_moved(got, right, look):
    """The weights' move is right, relative to its largest entry."""
    wrong = (got - right).abs().max() / right.abs().max()
    size = got.norm() / right.norm()
    assert wrong < 1e-3, f"The weights moved {size:.4g} times as far as they should, or another way.\n{look}"


@pytest.mark.exercise("13.2")
@pytest.mark.parametrize("batch, n", [(3, 7), (1, 12), (5, 1)], ids=["3x7", "1x12", "5x1"])
def test_the_loss(answer, batch, n):
    """the loss is the mean over all positions, at the weights before the step"""
    model, (inputs, targets) = Spy(), examples(batch=batch, n=n)
    right, _, _ = right_step(model, inputs, targets, 1.0)
    at_inputs, _, _ = right_step(model, inputs, inputs, 1.0)
    loss, _ = take_step(answer, model, sgd(model), inputs, targets)
    hint = (
        "cross_entropy wants logits (B*N, V) and targets (B*N,): flatten the first two dimensions "
        "of the logits.\n"
        "Every position counts, and the weights are those before the step."
    )
    if math.isclose(loss, right * targets.numel(), rel_tol=1e-4):
        hint = "That is the sum over positions. The mean does not depend on the size of the batch."
    elif math.isclose(loss, at_inputs, rel_tol=1e-4):
        hint = "That is the loss of predicting `inputs`; the model must predict `targets`."
    elif math.isclose(loss, right / math.log(2), rel_tol=1e-4):
        hint = "That is in bits. cross_entropy gives nats, and the gradient is that of nats."
    elif math.isclose(loss, right, rel_tol=1e-3):
        hint = "Close, and rounded to 16 bits somewhere. autocast_dtype is None here: all is float32."
    assert math.isclose(loss, right, rel_tol=1e-5), (
        f"{batch} windows of {n} bytes: loss = {loss:.6f}, expected {right:.6f}.\n{hint}"
    )


@pytest.mark.exercise("13.2")
@pytest.mark.parametrize("max_norm", [0.01, 1.0, 1e6])
def test_the_step(answer, max_norm):
    """the weights move by the clipped gradient, once"""
    model, (inputs, targets) = Spy(), examples()
    before = flat(model.parameters())
    _, norm, move = right_step(model, inputs, targets, max_norm)
    take_step(answer, model, sgd(model), inputs, targets, max_norm=max_norm)
    moved = flat(model.parameters()) - before
    assert moved.abs().max() > 0, (
        "The weights did not move. Either there was no optimizer.step(), or the gradients were "
        "gone by then:\n"
        "zero_grad() belongs before backward(). Or the loss was cut off from the weights "
        "(.detach(), .item())."
    )
    assert_moved(
        moved, move,
        f"max_norm = {max_norm:g}, and the gradient's norm is {norm:.3g}. Clip after backward() "
        "and before step(),\n"
        "by the norm of all gradients together (clip_grad_norm_), and step once.",
    )  # fmt: skip


@pytest.mark.exercise("13.2")
@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_the_norm(answer, max_norm):
    """grad_norm is the norm before clipping"""
    model, (inputs, targets) = Spy(), examples(seed=2)
    _, right, _ = right_step(model, inputs, targets, max_norm)
    _, norm = take_step(answer, model, sgd(model), inputs, targets, max_norm=max_norm)
    assert math.isclose(norm, right, rel_tol=1e-3), (
        f"max_norm = {max_norm:g}: grad_norm = {norm:.6g}, expected {right:.6g}. clip_grad_norm_ "
        "returns the norm\n"
        "that it found. In a log that number shows trouble before the loss does; the clipped one does not."
    )


@pytest.mark.exercise("13.2")
def test_all_parameters_are_clipped(answer):
    """an optimizer with two groups: the gradient of all parameters is clipped, as one vector"""
    model, (inputs, targets) = Spy(), examples(seed=4)
    _, right, _ = right_step(model, inputs, targets, 0.1)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    optimizer = torch.optim.SGD([{"params": matrices}, {"params": vectors}], lr=LEARNING_RATE)
    _, norm = take_step(answer, model, optimizer, inputs, targets, max_norm=0.1)
    assert math.isclose(norm, right, rel_tol=1e-3), (
        f"grad_norm = {norm:.6g}, expected {right:.6g}. Weight decay is often given to a group of parameters of its own.\n"
        "model.parameters() has all of them, a group of the optimizer only its own."
    )


@pytest.mark.exercise("13.2")
def test_old_gradients_are_forgotten(answer):
    """what an earlier step left in .grad does not count"""
    model, (inputs, targets) = Spy(), examples(seed=3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = flat(model.parameters())
    _, right, move = right_step(model, inputs, targets, 1e6)
    _, norm = take_step(answer, model, sgd(model), inputs, targets, max_norm=1e6)
    look = "backward() ADDS to .grad. Without zero_grad() before it, a step repeats all earlier ones."
    assert_moved(flat(model.parameters()) - before, move, look)
    assert math.isclose(norm, right, rel_tol=1e-3), f"grad_norm = {norm:.6g}, expected {right:.6g}.\n{look}"


@pytest.mark.exercise("13.2")
def test_it_learns(answer):
    """thirty steps on one batch, with Adam: the model learns it by heart"""
    model, (inputs, targets) = Spy(seed=1), examples(seed=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = [take_step(answer, model, optimizer, inputs, targets)[0] for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0], (
        f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f} on a batch that never changes; it "
        "should come\n"
        "close to 0. Is the gradient that of this loss, and does the step use it?"
    )


@pytest.mark.exercise("13.2")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_autocast(answer, dtype):
    """the forward runs under autocast if asked, and only then; weights stay float32"""
    model, (inputs, targets) = Spy(), examples(seed=5)
    take_step(answer, model, sgd(model), inputs, targets, autocast_dtype=dtype)
    assert model.autocast == [dtype], (
        f"autocast_dtype = {dtype}: the model was called {len(model.autocast)} times, under autocast to "
        f"{model.autocast},\nexpected once, with {[dtype]}. The model's call belongs inside `with "
        "torch.autocast(...)`."
    )
    assert not torch.is_autocast_enabled("cpu"), "Autocast is still on after the step: use `with`."
    kept = {x.dtype for p in model.parameters() for x in (p, p.grad)}
    assert kept == {torch.float32}, (
        f"Weights and gradients are {kept}, expected float32: autocast casts copies, operation by "
        "operation.\n"
        "A step of 0.001 on a weight of 1 would round away in bfloat16."
    )


@pytest.mark.exercise("13.2")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_is_float32_without_autocast(answer, dtype):
    """16-bit logits and no autocast: the loss is computed in float32 all the same"""
    model, (inputs, targets) = Spy(seed=2), examples(seed=7)
    model.register_forward_hook(lambda module, args, logits: logits.to(dtype))
    loss, _ = take_step(answer, model, sgd(model), inputs, targets)
    log_p = model.logits.detach().to(dtype).double().log_softmax(-1)
    right = -log_p.gather(-1, targets[..., None]).mean().item()
    assert math.isclose(loss, right, rel_tol=1e-5), (
        f"loss = {loss:.6f}; from the model's {dtype} logits it should be {right:.6f}. autocast_dtype is None here, so\n"
        "nobody converts for you: logits.float() first."
    )


@pytest.mark.exercise("13.2")
def test_the_loss_is_float32(answer):
    """under autocast the logits are bfloat16; the loss is computed from them in float32"""
    model, (inputs, targets) = Spy(), examples(seed=6)
    loss, _ = take_step(answer, model, sgd(model), inputs, targets, autocast_dtype=torch.bfloat16)
    log_p = model.logits.detach().double().log_softmax(-1)
    right = -log_p.gather(-1, targets[..., None]).mean().item()
    assert math.isclose(loss, right, rel_tol=1e-5), (
        f"loss = {loss:.6f}; from the model's {model.logits.dtype} logits it should be "
        f"{right:.6f}. A sum over 256\n"
        "exponentials needs more than bfloat16's 8 bits: logits.float() first."
    )


# 13.3 attention


@contextmanager
def kernels_replaced(answer):
    """The formula in place of chapter 09's flash_attention, and a list of the calls that it got."""
    calls = []

    def stand_in(q, k, v, *, causal=False, scale=None):
        calls.append({"q": q, "k": k, "v": v, "causal": causal, "scale": scale})
        widths = [x.shape[-1] for x in (q, k, v)]
        assert widths == widths[:1] * 3 and widths[0] in SERVED, (
            f"The kernels got q, k and v with head dimensions {widths}. They take one D for all "
            "three, and it is\n"
            f"one of {', '.join(map(str, SERVED))}. F.pad(x, (0, n)) adds n zeros at the end of every row."
        )
        assert q.shape[:2] == k.shape[:2] and k.shape[:3] == v.shape[:3], (
            f"The kernels got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}. In this "
            "order, k and v have\n"
            "the same length; padding touches the last dimension alone."
        )
        return naive_attention(q, k, v, causal=causal, scale=scale)

    module = importlib.import_module(f"{answer.__package__}.ch09_module")
    with mock.patch.object(module, "flash_attention", stand_in):
        yield calls


def heads(d, nq=9, nk=9, seed=0):
    """q, k, v as a model makes them: transposed views of a projection, fp64."""
    shapes = ((2, nq, 3 * d), (2, nk, 3 * d), (2, nk, 3 * d))
    flat = [2.0 * random(*shape, seed=seed + i).double() for i, shape in enumerate(shapes)]
    return [x.unflatten(-1, (3, d)).transpose(1, 2) for x in flat]  # (2, 3, N, D)


@pytest.mark.exercise("13.3")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [1, 8, 16, 17, 24, 40, 64, 80, 200])
def test_any_head_dimension(answer, d, causal):
    """any head dimension: attention as the model meant it, with or without the causal mask"""
    q, k, v = heads(d, nk=11, seed=d)
    with kernels_replaced(answer) as calls, left_alone("attention", q=q, k=k, v=v):
        got = answer.attention(q, k, v, causal=causal)
    assert len(calls) == 1, f"Chapter 09's flash_attention was called {len(calls)} times, expected once."
    wide, used = calls[0]["q"].shape[-1], calls[0]["scale"] or calls[0]["q"].shape[-1] ** -0.5
    assert tuple(got.shape) == tuple(q.shape), (
        f"D = {d}: the result is {tuple(got.shape)}, expected {tuple(q.shape)}. The kernel's rows "
        "end in the zeros\n"
        "that padding added; the model wants its D numbers back."
    )
    used_causal = calls[0]["causal"]
    assert used_causal == causal, f"attention(causal={causal}) called the kernels with causal={used_causal}."
    assert math.isclose(used, d**-0.5, rel_tol=1e-6), (
        f"D = {d}: the scores were scaled by {used:.4f}, expected 1/sqrt({d}) = {d**-0.5:.4f}. "
        "Left alone, the\n"
        f"kernels use the D that they see, which is {wide} after padding: pass scale."
    )
    error = (got - naive_attention(q, k, v, causal=causal)).abs().max()
    assert error < 1e-9, (
        f"D = {d}, causal {causal}: the result is off by {error:.3g}. Zeros go behind the D "
        "numbers of q, of k and\n"
        "of v, and the first D numbers of each row come back."
    )


@pytest.mark.exercise("13.3")
@pytest.mark.parametrize("d, wide", [(3, 16), (24, 32), (33, 64), (65, 128), (129, 256)])
def test_the_next_one_is_enough(answer, d, wide):
    """padding goes to the next head dimension that the kernels take, no further"""
    with kernels_replaced(answer) as calls:
        answer.attention(*heads(d))
    assert [call["q"].shape[-1] for call in calls] == [wide], (
        f"D = {d} was padded to {calls[0]['q'].shape[-1]}; {wide} is enough. Twice the D is twice the work."
    )


@pytest.mark.exercise("13.3")
@pytest.mark.parametrize("d", SERVED)
def test_nothing_is_copied(answer, d):
    """where the kernels take D as it is, they get the model's own q, k and v"""
    given = heads(d, nq=2, nk=2)
    with kernels_replaced(answer) as calls:
        answer.attention(*given)
    for name, x in zip("qkv", given):
        assert calls[0][name].data_ptr() == x.data_ptr(), (
            f"D = {d} needs no padding, and yet the kernels got a copy of {name}, with D = {calls[0][name].shape[-1]}. F.pad copies\n"
            "even when it adds nothing, and so does .contiguous() here: the kernels read any strides."
        )


@pytest.mark.exercise("13.3")
@pytest.mark.parametrize("d", [16, 24])
def test_gradients_come_back(answer, d):
    """gradients go back through the padding, to q, k and v"""
    leaves = [x.detach().requires_grad_() for x in heads(d)]
    dout = random(2, 3, 9, d, seed=9).double()
    right = torch.autograd.grad(naive_attention(*leaves, causal=True), leaves, dout)
    with kernels_replaced(answer):
        out = answer.attention(*leaves, causal=True)
    assert out.requires_grad, "No gradient can go back: the result is detached (.detach(), .data, no_grad)."
    got = torch.autograd.grad(out, leaves, dout, allow_unused=True)
    for name, x, y in zip("qkv", got, right):
        assert x is not None and (x - y).abs().max() < 1e-9, (
            f"D = {d}: d{name.upper()} is missing or wrong. Pad with F.pad or torch.cat, which "
            "autograd knows."
        )


@pytest.mark.exercise("13.3")
@pytest.mark.parametrize("d_model", [32, 48], ids=["D16", "D24"])
def test_your_kernels_in_a_gpt(answer, d_model):
    """your kernels in a GPT: loss and gradients are those of the formula"""
    losses, gradients = [], []
    text = bytes_of(2 * 21, seed=7).long().view(2, 21).to(device)
    for attention in (naive_attention, answer.attention):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = GPTDecoder(256, d_model, 2, 1, max_seq_len=20, dropout=0.0, attention=attention)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4.0 if p.dim() > 1 else 1.0)  # or every softmax is nearly flat
        model.to(device)
        loss = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        gradients.append(flat(p.grad for p in model.parameters()))
    assert math.isclose(*losses, rel_tol=1e-4), (
        f"D = {d_model // 2}: the loss is {losses[1]:.6f} with your kernels and {losses[0]:.6f} by "
        "the formula.\n"
        "If the claims above pass, look at chapters 07 and 09: check(\"7\") and check(\"9\")."
    )
    error = (gradients[1] - gradients[0]).abs().max() / gradients[0].abs().max()
    assert error < 1e-3, (
        f"D = {d_model // 2}: the loss is right, the gradients are off by {error:.2g} of the largest one.\n"
        "If the claims above pass, look at chapters 08 and 09: check(\"8\") and check(\"9\")."
    )
