"""An operator of PyTorch, made as `torch.library.custom_op` makes one (chapter 09), but for its gradient.

custom_op's register_autograd looks through the operator's whole schema for each argument of each call, which for our twenty
arguments takes three times as long as all the rest (torch 2.13), and raises under torch.func.grad. So the kernel for PyTorch's
"Autograd" key is written here. It does what register_autograd does: run what lies below in the dispatcher, and hang a node
with our gradient on the result.

The dispatcher hands twenty arguments from C++ to Python and back at each of its stages, which takes longer than all else that we do
before a launch. So a call goes past it if only autograd could tell: eager, on ordinary tensors, with no mode, transform or
profiler at work (_watched).
"""
import contextlib
import functools
from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

NAMESPACE = "flash_edu"


def _included() -> int:
    """Which keys the dispatcher adds, in this thread, to those of the tensors: modes, tracers and transforms have one."""
    return torch._C._dispatch_tls_local_include_set().raw_repr()


with torch.inference_mode(True):
    _INFERENCE = _included()
with torch.inference_mode(False):
    _NOTHING_SPECIAL = {_INFERENCE, _included()}
_NUMBERS = {type(None), int, float, bool, str}
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(name: str, schema: str) -> Callable[[Callable], "Operator"]:
    """A decorator: the function computes the operator, on every device. It changes none of its arguments and returns none."""

    def define(compute: Callable) -> Operator:
        return Operator(name, schema, compute)

    return define


class Operator:
    """What torch.library.custom_op gives: call it, and tell PyTorch more of it with its register_ methods."""

    def __init__(self, name: str, schema: str, compute: Callable):
        self.name, self.compute, self.__doc__ = name, compute, compute.__doc__
        self.node = None  # once it has a gradient
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, torch._disable_dynamo(compute), "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *inputs):
        if torch.compiler.is_compiling() or _watched(inputs):
            return self.overload(*inputs)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            with torch._C._AutoDispatchBelowAutograd():
                return self.compute(*inputs)
        return self.overload(*inputs) if self.node is None else self.node.apply(*inputs, None)

    def register_fake(self, fake: Callable) -> None:
        """fake(*inputs): results of the right shape, dtype and layout, whose values do not matter."""
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)

    def register_vmap(self, rule: Callable) -> None:
        """rule(info, in_dims, *inputs) -> (results, out_dims), as torch.library.register_vmap asks."""
        torch.library.register_vmap(f"{NAMESPACE}::{self.name}", rule, lib=_library)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """setup_context(ctx, inputs, output) saves, and backward(ctx, *gradients) gives a gradient, or None, for each input. Lists
        of tensors have none."""
        self.node = node = _node(self, backward, setup_context)

        def differentiable(keyset, *inputs):
            recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
            if not recorded and forward_ad._current_level < 0:
                return _below_autograd(self.overload, keyset, inputs)
            with _inside_torch_func(_one_level):
                return node.apply(*inputs, keyset)

        _library.impl(self.name, differentiable, "Autograd", with_keyset=True)


def _watched(inputs: tuple) -> bool:
    """Whether something besides autograd wants to see operators: modes, torch.func, forward-mode derivatives, tracers, the profiler;
    a tensor that is more than numbers in memory; or someone who has switched autograd itself off in the dispatcher."""
    return (
        _included() not in _NOTHING_SPECIAL
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
        or torch.is_grad_enabled()
        and torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradOther)
        or any(map(_extraordinary, inputs))
    )


def _extraordinary(x: object) -> bool:
    """Whether an input is more to the dispatcher than numbers, or than a tensor of numbers in memory."""
    kind = type(x)
    if kind in _NUMBERS:
        return False
    if kind in _TENSORS:
        return torch._C._dispatch_keys(x).raw_repr() not in _ordinary_keys(x.device.type)
    return kind is not list or any(map(_extraordinary, x))


@functools.cache
def _ordinary_keys(device: str) -> tuple[int, int]:
    """The dispatch keys of a tensor that is numbers in this device's memory, and nothing else; and of one made in inference mode."""
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.append(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return tuple(found)


def _node(operator: Operator, backward: Callable, setup_context: Callable) -> type[_SingleLevelFunction]:
    """The autograd node of an operator. Behind the inputs stands the dispatcher's set of keys, or None for a call that went past it.

    Users' nodes are torch.autograd.Functions, which see all transforms of torch.func at once. This one is for the dispatcher, which
    comes with one at a time.
    """

    def forward(ctx, *inputs):
        *inputs, keyset = inputs
        if keyset is None:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator.compute(*inputs)
        else:
            with _inside_torch_func(_other_levels):
                output = _below_autograd(operator.overload, keyset, inputs)
        setup_context(ctx, inputs, output)
        return output

    def gradients(ctx, *gradients):
        return *backward(ctx, *gradients), None

    def jvp(ctx, *tangents):
        raise NotImplementedError(
            "flash_edu has no forward-mode derivative (torch.func.jvp, jacfwd and hessian, torch.autograd.forward_ad): use reverse "
            "mode (torch.func.grad, vjp, jacrev), or flash_edu.reference.naive_attention, which is differentiable in any way"
        )

    def key(ctx):  # for compiled autograd, as a Function has it
        return (ctx._autograd_function_id,)

    methods = {"forward": forward, "backward": gradients, "jvp": jvp, "_compiled_autograd_key": key}
    return type(operator.overload._opname, (_SingleLevelFunction,), {name: staticmethod(method) for name, method in methods.items()})


def _below_autograd(overload: torch._ops.OpOverload, keyset, inputs: tuple):
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def _inside_torch_func(context: Callable) -> contextlib.AbstractContextManager:
    """The context if a transform of torch.func is at work, else none."""
    return contextlib.nullcontext() if torch._C._functorch.peek_interpreter_stack() is None else context()


@contextlib.contextmanager
def _one_level():
    """Each transform of torch.func comes to the operator by itself, the innermost first."""
    from torch._functorch.utils import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        yield


@contextlib.contextmanager
def _other_levels():
    """A node's forward is run without gradients; the transforms further out want theirs all the same."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield
