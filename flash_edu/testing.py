"""How answers are judged: against fp64, by a bound that scales with the inputs.

An answer is right if its error is at most twice the error that plain PyTorch makes at the same dtype, plus twice the
rounding of the truth itself. No flat tolerance: at N = 4096 an output of all zeros is within 1e-2 of the truth.
(The rule is that of the FlashAttention project's own tests: Dao et al., tests/test_flash_attn.py.)

"Plain PyTorch" means, for a gradient, the worst of four: autograd through the formula; the backward's formulas, from O and L as
a flash forward stores them; and the same with L and every sum in S, dP and D one rounding off, up or down. The last three round
where autograd does not, in S - L and dP - D. How much a sum rounds depends on its order and on how the hardware multiplies:
tensor cores make an fp32 product of three TF32 products. On small cases plain PyTorch is exact by luck. Where thousands of cases
are judged, as in a fuzz, `eager(case, draws=64)` adds as many draws of that luck.
"""
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flash_edu.attention import dense_rules
from flash_edu.reference import ScoreRules, naive_attention_with_lse, row_delta
from flash_edu.rules import Rules


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
    options: dict = field(default_factory=dict)  # what else flash_attention is asked; float masks and sinks get gradients
    seed: int = 0  # of the dropout


LEARNED = ("attn_mask", "sinks")  # options that may have a gradient


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
    **options,
) -> Case:
    """Random normal inputs; `options` are further arguments of `flash_attention`. q is multiplied by `hot`: a few keys then take most of each row's weight."""
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
        options=options,
        seed=seed,
    )


def differentiate(attention_with_lse, case: Case, dtype: torch.dtype | None = None, **options) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv of a function like `flash_attention_with_lse`, on the case's inputs (cast to `dtype` if given).

    And the gradients of what else may have one: dattn_mask, dsinks.
    """
    dtype = dtype or case.q.dtype
    inputs = {name: getattr(case, name) for name in ("q", "k", "v")}
    inputs |= {name: x for name, x in case.options.items() if name in LEARNED and x.is_floating_point()}
    inputs = {name: x.detach().to(dtype if name in "qkv" else _as_wide(x, dtype)).requires_grad_() for name, x in inputs.items()}
    asked = case.options | options | {name: x for name, x in inputs.items() if name in LEARNED}
    torch.manual_seed(case.seed)  # dropout draws its seed in the call
    out, lse = attention_with_lse(*(inputs[name] for name in "qkv"), causal=case.causal, scale=case.scale, **asked)
    torch.autograd.backward([out, lse], [case.dout.to(out.dtype), _where_finite(case.dlse, lse).to(lse.dtype)])
    return {"out": out.detach(), "lse": lse.detach()} | {f"d{name}": x.grad for name, x in inputs.items()}


def _as_wide(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Masks and sinks keep their own dtype, except in the truth."""
    return dtype if dtype == torch.float64 else x.dtype


def by_formula(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor]:
    """What `flash_attention_with_lse` computes, by the formula, N x N matrix and all."""
    return naive_attention_with_lse(q, k, v, rules=rules_of(q, k, **options))


def rules_of(q: Tensor, k: Tensor, *, scale: float | None = None, **options) -> Rules:
    """Those of `flash_attention`, for any scale: the formula has a value at 0 and below, which flash_attention refuses."""
    rules = dense_rules(q, k, **options)
    return rules if scale is None else rules._replace(scale=scale)


def truth(case: Case) -> dict[str, Tensor]:
    """The right answer: the formula, in fp64."""
    return differentiate(by_formula, case, torch.float64)


def eager(case: Case, draws: int = 0) -> dict[str, Tensor]:
    """What plain PyTorch computes at the case's own dtype: the error an answer is allowed to compare itself with.

    draws: so many more computations, each with O, P and dS rounded otherwise. The gradient of one sink is one number, and that
    of a row that sees two keys hangs on two: in thousands of such cases, four computations of it are all lucky in some.
    """
    right, answer = truth(case), differentiate(by_formula, case)
    saved = answer["out"], answer["lse"]
    eps = torch.finfo(saved[1].dtype).eps
    others = [results_from_saved(case, *saved, slack=slack) for slack in (0.0, eps, -eps)]
    others += [results_from_saved(case, right["out"], saved[1], dice=_dice(case, seed)) for seed in range(draws)]
    for name, other in ((name, x) for found in others for name, x in found.items()):
        if _largest(other.double() - right[name]) > _largest(answer[name].double() - right[name]):
            answer[name] = other
    wide = saved[1].dtype  # a fp64 mask or sink does not make its gradient more exact than what it is computed in
    return {name: x.to(wide) if x.dtype == torch.float64 else x for name, x in answer.items()}


def _dice(case: Case, seed: int) -> torch.Generator:
    return torch.Generator(case.q.device).manual_seed(seed)


def _rounded(x: Tensor, dtype: torch.dtype, dice: torch.Generator) -> Tensor:
    """x, each element rounded to `dtype` up or down by chance, as a tensor of its old dtype."""
    off = torch.rand(x.shape, generator=dice, device=x.device, dtype=x.dtype) - 0.5
    return (x + x * off * torch.finfo(dtype).eps).to(dtype).to(x.dtype)


def results_from_saved(
    case: Case, out: Tensor, lse: Tensor, *, slack: float = 0.0, dice: torch.Generator | None = None
) -> dict[str, Tensor]:
    """dq, dk, dv by the backward's formulas, untiled, from saved out and lse (FlashAttention-2, section 2.3).

    With sinks also out = P V: only a sink makes L much larger than all scores of its row, and every P small, with the error of
    a large exponent.

    slack: by how much each element of S, dP and D is off, as a share of the sum of the sizes of its terms, and each of L, as a
    share of its own. dice: O, P and dS are rounded to the case's dtype, up or down by chance.
    """
    wide, group = lse.dtype, case.q.shape[1] // case.k.shape[1]
    rounded = (lambda x: x) if dice is None else (lambda x: _rounded(x, case.q.dtype, dice))
    out = rounded(out.to(wide))
    lse = torch.where(lse.isinf(), lse, lse - slack * lse.abs())  # the other way than S: in S - L the two add up
    torch.manual_seed(case.seed)
    rules = rules_of(case.q, case.k, causal=case.causal, scale=case.scale, **case.options)
    delta = row_delta(case.dout.to(wide), _where_finite(case.dlse.to(wide), lse), out)
    delta = delta - slack * (case.dout.to(wide) * out).abs().sum(-1)  # the other way than dP
    q, dout = (x.to(wide) for x in (case.q, case.dout))
    k, v = (x.to(wide).repeat_interleave(group, dim=1) for x in (case.k, case.v))
    asked, rows, cols = ScoreRules(rules, q, k), slice(0, q.shape[2]), slice(0, k.shape[2])
    products = q @ k.mT + slack * (q.abs() @ k.abs().mT)
    s, _ = asked.masked(products, rows, cols)
    p = asked.weights(s, lse[..., None])
    dp = asked.dropped(dout @ v.mT + slack * (dout.abs() @ v.abs().mT), rows, cols)
    slope, mask_slope = asked.slopes(products, rows, cols)
    ds = p * (dp - delta[..., None])
    scaled = rounded(ds * slope) * rules.scale
    kept = rounded(asked.dropped(p, rows, cols))
    of_keys = {"dk": scaled.mT @ q, "dv": kept.mT @ dout}
    found = {"dq": scaled @ k} | {name: x.unflatten(1, (-1, group)).sum(2) for name, x in of_keys.items()}
    mask, sinks = case.options.get("attn_mask"), case.options.get("sinks")
    if sinks is not None or dice is not None:
        found["out"] = kept @ v
    found = {name: x.to(case.q.dtype) for name, x in found.items()}
    if mask is not None and mask.is_floating_point():
        found["dattn_mask"] = (ds * mask_slope).sum_to_size(mask.shape).to(mask.dtype)
    if sinks is not None:
        weight = (sinks.to(wide)[:, None] - lse).exp().masked_fill(lse.isinf(), 0.0)
        found["dsinks"] = -(weight * delta).sum((0, 2)).to(sinks.dtype)
    return found


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
