"""How answers are judged: against fp64, by a bound that scales with the inputs.

An answer is right if its error is at most twice the error that plain PyTorch makes at the same dtype, plus twice the
rounding of the truth itself. No flat tolerance: at N = 4096 an output of all zeros is within 1e-2 of the truth.
(The rule is that of the FlashAttention project's own tests: Dao et al., tests/test_flash_attn.py.)

"Plain PyTorch" means, for a gradient, the worst of three: autograd through the formula; the backward's formulas applied to O
and L as a flash forward stores them; and the same with every sum in S and dP one rounding off. The last two round where
autograd does not, in S - L and dP - D. How much a sum rounds depends on its order and on how the hardware multiplies:
tensor cores make an fp32 product of three TF32 products. On small cases plain PyTorch is exact by luck.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_edu.reference import causal_mask, naive_attention_with_lse


@dataclass(frozen=True)
class Case:
    """One attention problem: inputs, and gradients arriving at out and lse."""

    q: Tensor  # (B, Hq, Nq, D)
    k: Tensor  # (B, Hkv, Nk, D)
    v: Tensor  # (B, Hkv, Nk, Dv)
    dout: Tensor  # (B, Hq, Nq, Dv)
    dlse: Tensor  # (B, Hq, Nq)
    causal: bool
    scale: float | None


def make_case(
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    nq: int = 64,
    nk: int = 64,
    d: int = 32,
    dv: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    causal: bool = False,
    scale: float | None = None,
    hot: float = 1.0,
    seed: int = 0,
) -> Case:
    """Random normal inputs. q is multiplied by `hot`: a few keys then take most of each row's weight."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, dv = kv_heads or heads, dv or d

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return Case(
        q=draw(batch, heads, nq, d) * hot,
        k=draw(batch, kv_heads, nk, d),
        v=draw(batch, kv_heads, nk, dv),
        dout=draw(batch, heads, nq, dv),
        dlse=draw(batch, heads, nq).to(torch.float64 if dtype == torch.float64 else torch.float32),
        causal=causal,
        scale=scale,
    )


def differentiate(attention_with_lse, case: Case, dtype: torch.dtype | None = None, **options) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of a function like `flash_attention_with_lse`, on the case's inputs (cast to `dtype` if given)."""
    dtype = dtype or case.q.dtype
    inputs = [x.detach().to(dtype).requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = attention_with_lse(*inputs, causal=case.causal, scale=case.scale, **options)
    torch.autograd.backward([out, lse], [case.dout.to(out.dtype), _where_finite(case.dlse, lse).to(lse.dtype)])
    names = ("out", "lse", "dq", "dk", "dv")
    return dict(zip(names, (out.detach(), lse.detach(), *(x.grad for x in inputs))))


def truth(case: Case) -> dict[str, Tensor]:
    """The right answer: the formula, in fp64."""
    return differentiate(naive_attention_with_lse, case, torch.float64)


def eager(case: Case) -> dict[str, Tensor]:
    """What plain PyTorch computes at the case's own dtype: the error an answer is allowed to compare itself with."""
    right, answer = truth(case), differentiate(naive_attention_with_lse, case)
    saved = answer["out"], answer["lse"]
    for slack in (0.0, torch.finfo(saved[1].dtype).eps):
        others = gradients_from_saved(case, *saved, slack=slack)
        for name, other in others.items():
            if _largest(other.double() - right[name]) > _largest(answer[name].double() - right[name]):
                answer[name] = other
    return answer


def gradients_from_saved(case: Case, out: Tensor, lse: Tensor, *, slack: float = 0.0) -> dict[str, Tensor]:
    """dq, dk, dv by the backward's formulas, untiled, from saved out and lse (FlashAttention-2, section 2.3).

    slack: by how much each element of S and of dP is off, as a share of the sum of the sizes of its terms.
    """
    wide, group = lse.dtype, case.q.shape[1] // case.k.shape[1]
    q, dout, out = (x.to(wide) for x in (case.q, case.dout, out))
    k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (case.k, case.v))
    scale = case.q.shape[-1] ** -0.5 if case.scale is None else case.scale
    keep = causal_mask(q.shape[2], k.shape[2], q.device) if case.causal else torch.ones((), dtype=torch.bool, device=q.device)
    s = (q @ k.mT + slack * (q.abs() @ k.abs().mT)) * scale
    p = (s.masked_fill(~keep, float("-inf")) - _where_finite(lse, lse)[..., None]).exp()
    dp = dout @ v.mT + slack * (dout.abs() @ v.abs().mT)
    delta = (dout * out).sum(-1) - _where_finite(case.dlse.to(wide), lse)
    ds = p * (dp - delta[..., None]) * scale
    heads = {"dq": ds @ k, "dk": ds.mT @ q, "dv": p.mT @ dout}
    grouped = {name: x.unflatten(1, (-1, group)).sum(2) for name, x in heads.items() if name != "dq"}
    return {name: x.to(case.q.dtype) for name, x in (heads | grouped).items()}


def assert_close(name: str, got: Tensor, truth: Tensor, eager: Tensor, *, tile: int | None = None) -> None:
    """Raise AssertionError, in words, unless `got` is as near to `truth` as the module's rule asks.

    tile: rows are computed in tiles of so many, so the words may speak of tiles. Rows are axis -2 of (B, H, N, D), and the
    last axis of (B, H, N).
    """
    if got.shape != truth.shape:
        raise AssertionError(f"{name} has shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
    got, truth, eager = got.detach().double(), truth.detach().double(), eager.detach()
    bound = 2 * _largest(eager.double() - truth) + 2 * _rounding(truth, eager.dtype)
    error = (got - truth).abs()
    wrong = ~(error <= bound) & (got != truth)  # not <=: NaN is wrong, equal infinities are right
    if wrong.any():
        raise AssertionError(_describe(name, got, truth, wrong, bound, tile))


def _describe(name: str, got: Tensor, truth: Tensor, wrong: Tensor, bound: float, tile: int | None) -> str:
    """How much is wrong, what the wrong values have in common, and where the first ones are."""
    lines = [f"{name}: {int(wrong.sum())} of {wrong.numel()} values are wrong (allowed error {bound:.2g})"]
    for what, count in (("NaN", got.isnan().sum()), ("infinite", (got.isinf() & ~truth.isinf()).sum())):
        if count:
            lines.append(f"{int(count)} of them are {what}")
    lines += _common_factor(got, truth, bound) or [*_where(wrong), *_which_tiles(wrong, tile), *_only_hidden(truth, wrong)]
    for index in wrong.nonzero()[:3].tolist():
        at = tuple(index)
        lines.append(f"{name}[{', '.join(map(str, index))}] = {got[at].item():.6g}, expected {truth[at].item():.6g}")
    return "\n".join(lines)


def _common_factor(got: Tensor, truth: Tensor, bound: float) -> list[str]:
    """A line if all values are the same multiple of what they should be: a scale is missing, or there twice."""
    if not got.isfinite().all() or not truth.isfinite().all() or truth.numel() < 4 or not truth.any():
        return []
    factor = ((got * truth).sum() / (truth * truth).sum()).item()  # least squares
    if abs(factor - 1) < 0.01 or (got - factor * truth).abs().max() > 2 * max(1.0, abs(factor)) * bound:
        return []
    return [f"Every value is {factor:.4g} times what it should be" if abs(factor) > 1e-9 else "Every value is 0"]


def _where(wrong: Tensor) -> list[str]:
    """A line if the wrong values fill only a part of the tensor: some heads, the last rows, the first columns."""
    parts = []
    for axis, axis_name in enumerate(("batch", "head", "row", "column")[: wrong.ndim] if wrong.ndim > 2 else ()):
        hit = wrong.movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
        first, last, size = hit[0].item(), hit[-1].item(), wrong.shape[axis]
        if len(hit) == last - first + 1 < size:
            parts.append(f"{axis_name} {first}" if first == last else f"{axis_name}s {first} to {last}")
    return [f"Only in {', '.join(parts)}, of a tensor of shape {tuple(wrong.shape)}"] if parts else []


def _which_tiles(wrong: Tensor, tile: int | None) -> list[str]:
    """A line if the wrong rows fill only some of the tiles."""
    if tile is None or wrong.ndim not in (3, 4):
        return []
    rows = wrong.movedim(2, 0).flatten(1).any(1)
    tiles = [start // tile for start in range(0, len(rows), tile) if rows[start : start + tile].any()]
    count = -(-len(rows) // tile)
    if len(tiles) == count:
        return []
    if tiles == [count - 1]:
        ragged = f", which {len(rows) % tile} rows do not fill" if len(rows) % tile else ""
        return [f"Only in the last of the {count} tiles of {tile} rows{ragged}"]
    said = ", ".join(map(str, tiles[:8])) + ", ..." * (len(tiles) > 8)
    return [f"Only in tile{'s' * (len(tiles) > 1)} {said} of {count} (0 to {count - 1}, {tile} rows each)"]


def _only_hidden(truth: Tensor, wrong: Tensor) -> list[str]:
    """A line if just those values are wrong that should be 0 or -inf: something hidden is seen."""
    hidden = (truth == 0) | (truth == -torch.inf)
    if hidden.all() or (wrong & ~hidden).any():
        return []
    return [f"Only where nothing is to be seen, and the value should be {'0' if (truth == 0).any() else '-inf'}"]


def _rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """What storing the truth at `dtype` does to it. fp32 and fp64 are also what S, P, L and every sum are computed in, and
    on small cases plain PyTorch can be exact by luck: there the unit is four last places of the largest value. Halves are
    computed in fp32, and only the result is rounded."""
    if dtype in (torch.float32, torch.float64):
        return 4 * torch.finfo(dtype).eps * _largest(truth)
    return _largest(truth.to(dtype).double() - truth)


def _largest(x: Tensor) -> float:
    """max |x| over finite entries; 0 if there are none."""
    x = x[x.isfinite()].abs()
    return x.max().item() if x.numel() else 0.0


def _where_finite(dlse: Tensor, lse: Tensor) -> Tensor:
    """No gradient flows into a row's lse of -inf."""
    return dlse.masked_fill(lse.detach().isinf(), 0.0)
