"""An operator of PyTorch, made as `torch.library.custom_op` makes one (chapter 09), but for its gradient.

custom_op's register_autograd looks through the operator's whole schema for each argument of each call, which for our twenty
arguments takes three times as long as all the rest (torch 2.13), and raises under torch.func.grad. So the kernel for PyTorch's
"Autograd" key is written here. It does what register_autograd does: run what lies below in the dispatcher, and hang a node
with our gradient on the result.
"""
import contextlib
from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.autograd.function import Function

NAMESPACE = "flash_edu"
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
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, torch._disable_dynamo(compute), "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *inputs):
        return self.overload(*inputs)

    def register_fake(self, fake: Callable) -> None:
        """fake(*inputs): results of the right shape, dtype and layout, whose values do not matter."""
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake, lib=_library)

    def register_vmap(self, rule: Callable) -> None:
        """rule(info, in_dims, *inputs) -> (results, out_dims), as torch.library.register_vmap asks."""
        torch.library.register_vmap(f"{NAMESPACE}::{self.name}", rule, lib=_library)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """setup_context(ctx, inputs, output) saves, and backward(ctx, *gradients) gives a gradient, or None, for each input. Lists
        of tensors have none."""
        node = _node(self.overload, backward, setup_context)

        def differentiable(keyset, *inputs):
            recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
            if not recorded and forward_ad._current_level < 0:
                return _below_autograd(self.overload, keyset, inputs)
            with _inside_torch_func(_one_level):
                return super(Function, node).apply(*inputs, keyset)  # Function's own apply is for users: it refuses torch.func

        _library.impl(self.name, differentiable, "Autograd", with_keyset=True)


def _node(overload: torch._ops.OpOverload, backward: Callable, setup_context: Callable) -> type[Function]:
    """The autograd node of an operator. Behind the inputs stands the dispatcher's set of keys."""

    def forward(ctx, *inputs):
        *inputs, keyset = inputs
        with _inside_torch_func(_other_levels):
            output = _below_autograd(overload, keyset, inputs)
        setup_context(ctx, inputs, output)
        return output

    def gradients(ctx, *gradients):
        return *backward(ctx, *gradients), None

    def jvp(ctx, *tangents):
        raise NotImplementedError(
            "flash_edu has no forward-mode derivative (torch.func.jvp, jacfwd and hessian, torch.autograd.forward_ad): use reverse "
            "mode (torch.func.grad, vjp, jacrev), or flash_edu.reference.naive_attention, which is differentiable in any way"
        )

    methods = {"forward": forward, "backward": gradients, "jvp": jvp}
    return type(overload._opname, (Function,), {name: staticmethod(method) for name, method in methods.items()})


def _below_autograd(overload: torch._ops.OpOverload, keyset, inputs: tuple):
    with torch._C._AutoDispatchBelowAutograd():
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def _inside_torch_func(context: Callable) -> contextlib.AbstractContextManager:
    """The context if a transform of torch.func is at work, else none."""
    return contextlib.nullcontext() if torch._C._functorch.peek_interpreter_stack() is None else context()


@contextlib.contextmanager
def _one_level():
    """Each transform of torch.func comes to the operator by itself, the innermost first: a node is for one of them."""
    from torch._functorch.utils import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        yield


@contextlib.contextmanager
def _other_levels():
    """A node's forward is run without gradients; the transforms further out want theirs all the same."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield
