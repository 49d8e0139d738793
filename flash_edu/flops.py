"""How much attention computes, for torch.utils.flop_counter.FlopCounterMode: as PyTorch counts its own.

Two products forward and five backward, each of all Nq x Nk scores: what causal masks and windows leave out is counted, and what
a backward without the N x N matrix computes a second time is not. Packed sequences count with their own lengths.
"""
import importlib.abc
import importlib.machinery
import sys

from torch import Tensor

from flash_edu.rules import Rules

COUNTER = "torch.utils.flop_counter"


def forward_flops(q: Tensor, k: Tensor, v: Tensor, backend: str, *asked, out_val=None) -> int:
    """S = Q K^T and O = P V. A multiplication and an addition are two."""
    return 2 * _scores(q, k, Rules(*asked)) * (q.shape[-1] + v.shape[-1])


def backward_flops(dout, dlse, q, k, v, out, lse, mask_grad, sinks_grad, backend, *asked, out_val=None) -> int:
    """S = Q K^T, dQ = dS K and dK = dS^T Q over D; dP = dO V^T and dV = P^T dO over Dv."""
    return 2 * _scores(q, k, Rules(*asked)) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _scores(q: Tensor, k: Tensor, rules: Rules) -> int:
    """How many there are, over all batches and query heads."""
    batch, heads, nq, _ = q.shape
    if not rules.packed:
        return batch * heads * nq * k.shape[2]
    lengths = zip(_lengths(rules.cu_q, rules.max_q), _lengths(rules.cu_k, rules.max_k))
    return heads * sum(nq * nk for nq, nk in lengths)


def _lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """Of each sequence; the longest for all, as PyTorch does, while the lengths are not known."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    if cu_seqlens.is_meta or isinstance(cu_seqlens, (FakeTensor, FunctionalTensor)):
        return [longest] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()


def register(formulas: dict) -> None:
    """{operator: formula}. Now if PyTorch's counter has been imported, else when it is: it imports Triton, which takes its time."""
    if COUNTER in sys.modules:
        _tell(sys.modules[COUNTER], formulas)
    else:
        sys.meta_path.insert(0, _WhenCounterIsImported(formulas))


def _tell(counter, formulas: dict) -> None:
    for operator, formula in formulas.items():
        counter.register_flop_formula(operator.overload.overloadpacket, get_raw=True)(formula)


class _WhenCounterIsImported(importlib.abc.MetaPathFinder):
    """Finds the counter where Python would, and has the formulas told to it once it is loaded."""

    def __init__(self, formulas: dict):
        self.formulas = formulas

    def find_spec(self, name, path=None, target=None):
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def load_and_tell(module) -> None:
            load(module)
            _tell(module, self.formulas)

        spec.loader.exec_module = load_and_tell
        return spec
