"""Attention in plain PyTorch: the definition of right, and the backend that runs on any device.

`naive_attention` is the formula. `tiled_forward` and `tiled_backward` are FlashAttention with tensors for tiles: they
never hold more than one tile of scores, so their memory is linear in the sequence length. What a request asks of its scores
(rules.py) is in `ScoreRules`, for both.

Shapes: q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv); Hq is a multiple of Hkv, and query head h reads
key/value head h // (Hq / Hkv).
"""
from collections.abc import Iterator

import torch
from torch import Tensor

from flash_edu import patterns, philox
from flash_edu.layout import empty_like_rows, empty_outputs
from flash_edu.rules import Rules

NEG_INF = float("-inf")


def causal_mask(nq: int, nk: int, device: torch.device | str | None = None) -> Tensor:
    """(Nq, Nk) bool, True = attend. Aligned bottom-right: the last query sees every key.

    Nq = 2, Nk = 4:  1 1 1 0      Nq = 4, Nk = 2:  0 0
                     1 1 1 1                       0 0
                                                   1 0
                                                   1 1
    """
    rows = torch.arange(nq, device=device)[:, None]
    cols = torch.arange(nk, device=device)[None, :]
    return cols <= rows + (nk - nq)


def naive_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """softmax(scale * Q K^T) V, (B, Hq, Nq, Dv), with the N x N matrix in memory. A row with no key gives 0."""
    rules = plain_rules(q, causal, scale)
    if dropout_p > 0:
        rules = rules._replace(dropout_p=dropout_p, seed=philox.draw_seed(q.device))
    return naive_attention_with_lse(q, k, v, rules=rules)[0]


def naive_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, rules: Rules | None = None
) -> tuple[Tensor, Tensor]:
    """As `naive_attention`, and the log-sum-exp of each row of scores, (B, Hq, Nq), natural log, fp32 or wider.

    rules: whatever else `flash_attention` can ask; they stand for causal and scale too. Every step is autograd's.
    """
    rules = rules or plain_rules(q, causal, scale)
    if rules.packed:
        parts = [naive_attention_with_lse(*x, rules=alone) for *x, alone in _sequences(q, k, v, rules)]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))  # (B, Hq, Nk, D)
    asked = ScoreRules(rules, q, k)
    rows, cols = slice(0, q.shape[2]), slice(0, k.shape[2])
    s = asked.scores(q @ k.mT * rules.scale, rows, cols)  # (B, Hq, Nq, Nk)
    keep = asked.visible(rows, cols)
    if keep is not None:
        s = s.masked_fill(~keep, NEG_INF)
    empty = (s == NEG_INF).all(dim=-1, keepdim=True)  # softmax of nothing is 0, not 0/0; and its gradients too
    s = s.masked_fill(empty, 0.0)
    lse = s.to(_accumulator(s.dtype)).logsumexp(dim=-1).masked_fill(empty[..., 0], NEG_INF)  # (B, Hq, Nq)
    p = s.softmax(dim=-1).masked_fill(empty, 0.0)
    if rules.sinks is not None:
        sinks = rules.sinks.to(lse.dtype)[:, None]
        nothing = (lse == NEG_INF) & (sinks == NEG_INF)
        both = torch.logaddexp(lse.masked_fill(nothing, 0.0), sinks.masked_fill(nothing, 0.0))
        p = p * (lse - both).exp()[..., None].to(p.dtype)
        lse = both.masked_fill(nothing, NEG_INF)
    if rules.seed is not None:
        p = p * asked.kept(rows, cols) / (1 - rules.dropout_p)
    return p @ v, lse


def plain_rules(q: Tensor, causal: bool, scale: float | None) -> Rules:
    return Rules(q.shape[-1] ** -0.5 if scale is None else scale, right=0 if causal else None)


def tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, rules: Rules | None = None, *,
    causal: bool = False, scale: float | None = None, block_q: int = 128, block_k: int = 128,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """FlashAttention-2, Algorithm 1 (Dao 2023). Returns out (B, Hq, Nq, Dv) and lse (B, Hq, Nq).

    rules: whatever `flash_attention` can ask; they stand for causal and scale too.
    """
    out, lse = empty_outputs(q, v)
    rules = rules or plain_rules(q, causal, scale)
    if rules.packed:
        for q_b, k_b, v_b, out_b, lse_b, alone in _sequences(q, k, v, rules, like_q=(out, lse)):
            for x, y in zip((out_b, lse_b), tiled_forward(q_b, k_b, v_b, alone, block_q=block_q, block_k=block_k)):
                x.copy_(y)
        return out, lse
    wide, asked = _accumulator(q.dtype), ScoreRules(rules, q, k)
    q_heads, out_heads, lse_heads = (_by_kv_head(x, k.shape[1]) for x in (q, out, lse[..., None]))
    for i in range(0, q.shape[2], block_q):
        q_i = q_heads[..., i : i + block_q, :]  # (B, Hkv, G, bq, D)
        rows = slice(i, i + q_i.shape[-2])
        q_i = q_i.to(wide).flatten(2, 3)  # (B, Hkv, G*bq, D): the group's heads read the same K tile
        m = q_i.new_full((*q_i.shape[:3], 1), NEG_INF)  # running maximum
        l = torch.zeros_like(m)  # running sum of exp(s - m)
        o = q_i.new_zeros(*q_i.shape[:3], v.shape[-1])  # running, unnormalised output
        for cols in asked.keys_seen(rows, block_k):
            k_j, v_j = (x[:, :, cols].to(wide) for x in (k, v))  # (B, Hkv, bk, D)
            s, keep = asked.masked(q_i @ k_j.mT, rows, cols)  # (B, Hkv, G*bq, bk)
            m_new = torch.maximum(m, s.amax(dim=-1, keepdim=True))
            anchor = m_new.masked_fill(m_new == NEG_INF, 0.0)  # -inf - -inf is not a number
            p = (s - anchor).exp()
            rescale = (m - anchor).exp()
            l = l * rescale + p.sum(dim=-1, keepdim=True)
            o = o * rescale + asked.dropped(p, rows, cols) @ asked.without_unseen(v_j, keep)
            m = m_new
        if rules.sinks is not None:
            o, l, m = _add_sinks(o, l, m, rules.sinks, len_rows=rows.stop - rows.start)
        o = o / l.masked_fill(l == 0, 1.0)
        out_heads[..., rows, :] = o.unflatten(2, (-1, rows.stop - i)).to(out.dtype)
        lse_heads[..., rows, :] = (m + l.log()).unflatten(2, (-1, rows.stop - i))
    return out, lse


def tiled_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    rules: Rules | None = None, *,
    causal: bool = False, scale: float | None = None, block_q: int = 128, block_k: int = 128,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """FlashAttention-2, Algorithm 2 (Dao 2023), with the gradient of lse. Returns dq, dk, dv like q, k, v.

    P is recomputed from lse, and dS = P * (dP - D) with D = rowsum(dO * O) - dlse: the derivative of lse with respect
    to the scores is P itself, so its gradient joins D with the opposite sign.
    """
    rules = rules or plain_rules(q, causal, scale)
    wide = _accumulator(q.dtype)
    dq = empty_like_rows(q, wide).zero_()
    dk, dv = empty_like_rows(k), empty_like_rows(v)
    delta = row_delta(dout, dlse, out)
    if rules.packed:
        for q_b, k_b, v_b, dout_b, lse_b, delta_b, dq_b, dk_b, dv_b, alone in _sequences(
            q, k, v, rules, like_q=(dout, lse, delta, dq), like_k=(dk, dv)
        ):
            _tiled_backward(dout_b, q_b, k_b, v_b, lse_b, delta_b, dq_b, dk_b, dv_b, alone, block_q, block_k)
    else:
        _tiled_backward(dout, q, k, v, lse, delta, dq, dk, dv, rules, block_q, block_k)
    return dq.to(q.dtype), dk, dv


def _tiled_backward(dout, q, k, v, lse, delta, dq, dk, dv, rules, block_q, block_k) -> None:
    """Add to dq, which is wide; write dk and dv."""
    wide, asked = dq.dtype, ScoreRules(rules, q, k)
    q_, dq_, dout_, lse_, delta_ = (_by_kv_head(x, k.shape[1]) for x in (q, dq, dout, lse[..., None], delta[..., None]))
    for j in range(0, k.shape[2], block_k):
        cols = slice(j, min(j + block_k, k.shape[2]))
        k_j, v_j = (x[:, :, cols].to(wide) for x in (k, v))
        dk_j, dv_j = torch.zeros_like(k_j), torch.zeros_like(v_j)
        for rows in asked.queries_seeing(cols, block_q):
            q_i, dout_i, lse_i, delta_i = (x[..., rows, :].to(wide).flatten(2, 3) for x in (q_, dout_, lse_, delta_))
            products = q_i @ k_j.mT
            s, keep = asked.masked(products, rows, cols)
            p = asked.weights(s, lse_i)  # (B, Hkv, G*bq, bk)
            dp = asked.dropped(dout_i @ asked.without_unseen(v_j, keep).mT, rows, cols)
            ds = asked.without_hidden(p * (dp - delta_i) * asked.slopes(products, rows, cols)[0], keep)
            dv_j += asked.dropped(p, rows, cols).mT @ dout_i
            dk_j += ds.mT @ q_i * rules.scale
            dq_[..., rows, :] += (ds @ asked.without_unseen(k_j, keep) * rules.scale).unflatten(2, (-1, rows.stop - rows.start))
        dk[:, :, cols] = dk_j.to(k.dtype)
        dv[:, :, cols] = dv_j.to(v.dtype)


def mask_gradient(
    dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, rules: Rules, block: int = 128
) -> Tensor:
    """The gradient of a float mask, in its shape: dS, summed over whatever the mask broadcasts over."""
    wide, asked = _accumulator(q.dtype), ScoreRules(rules, q, k)
    gradient = rules.mask.new_zeros(rules.mask.shape, dtype=wide)
    q_, dout_, lse_, delta_ = (_by_kv_head(x, k.shape[1]) for x in (q, dout, lse[..., None], delta[..., None]))
    for j in range(0, k.shape[2], block):
        cols = slice(j, min(j + block, k.shape[2]))
        k_j, v_j = (x[:, :, cols].to(wide) for x in (k, v))
        for rows in asked.queries_seeing(cols, block):
            q_i, dout_i, lse_i, delta_i = (x[..., rows, :].to(wide).flatten(2, 3) for x in (q_, dout_, lse_, delta_))
            products = q_i @ k_j.mT
            s, keep = asked.masked(products, rows, cols)
            p = asked.weights(s, lse_i)
            dp = asked.dropped(dout_i @ asked.without_unseen(v_j, keep).mT, rows, cols)
            ds = asked.without_hidden(p * (dp - delta_i) * asked.slopes(products, rows, cols)[1], keep)
            ds = asked.by_head(ds)  # (B, Hq, bq, bk)
            part = _part(gradient, rows, cols)
            part += ds.sum_to_size(part.shape)
    return gradient.to(rules.mask.dtype)


def row_delta(dout: Tensor, dlse: Tensor | None, out: Tensor) -> Tensor:
    """D = rowsum(dO * O) - dlse, (B, Hq, Nq), fp32 or wider: what every dS of a row subtracts."""
    wide = _accumulator(out.dtype)
    delta = (dout.to(wide) * out.to(wide)).sum(dim=-1)
    return delta if dlse is None else delta - dlse


def sinks_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """(..., Hq), of sinks (..., Hq), lse and delta (..., B, Hq, Nq). A sink's weight is P = exp(sink - lse) and its value is 0,
    so that dP = 0 and dS = -P D."""
    weight = (sinks.to(lse.dtype)[..., None, :, None] - lse).exp().masked_fill(lse == NEG_INF, 0.0)
    return -(weight * delta).sum((-3, -1)).to(sinks.dtype)


class ScoreRules:
    """What rules.py says, for one tile of scores at a time: rows and cols are slices of the queries and of the keys."""

    def __init__(self, rules: Rules, q: Tensor, k: Tensor):
        self.rules, self.device = rules, q.device
        self.batch, self.heads, self.nq, self.nk = (*q.shape[:3], k.shape[2])
        self.offset = self.nk - self.nq
        self.pattern = patterns.get(rules.pattern)
        before_all = rules.left is not None and self.offset > rules.left  # keys further back than the first query's window
        masked = rules.padding is not None or self._boolean() or (self.pattern and self.pattern.mask_mod) is not None
        self.hides = before_all or masked  # some keys from every query, perhaps
        self.changes = rules.softcap is not None or rules.slopes is not None or self.pattern is not None or (
            rules.mask is not None and not self._boolean()
        )  # fmt: skip

    def masked(self, products: Tensor, rows: slice, cols: slice) -> tuple[Tensor, Tensor | None]:
        """Products of a tile, (B, Hkv, G*bq, bk) -> scores, -inf where hidden; and `visible`."""
        s = products * self.rules.scale
        if self.changes:
            s = self.scores(self.by_head(s), rows, cols).reshape(s.shape)
        keep = self.visible(rows, cols)
        if keep is not None:
            self.by_head(s).masked_fill_(~keep, NEG_INF)
        return s, keep

    def by_head(self, s: Tensor) -> Tensor:
        """(B, Hkv, G*bq, bk) as (B, Hq, bq, bk), a view."""
        return s.unflatten(2, (self.heads // s.shape[1], -1)).flatten(1, 2)

    def scores(self, s: Tensor, rows: slice, cols: slice) -> Tensor:
        """Scaled products (B, Hq, bq, bk) -> scores."""
        if self.rules.softcap is not None:
            s = self.rules.softcap * (s / self.rules.softcap).tanh()
        s = self._after_softcap(s, rows, cols)
        if self._modifies():
            hidden = s == NEG_INF  # what a float mask hides stays hidden, and has no gradient
            s = self.pattern.changed(s.masked_fill(hidden, 0.0), *self._places(rows, cols)).masked_fill(hidden, NEG_INF)
        return s

    def _after_softcap(self, s: Tensor, rows: slice, cols: slice) -> Tensor:
        if self.rules.slopes is not None:
            _, _, i, j = self._places(rows, cols)
            s = s - self.rules.slopes.to(s.dtype)[..., None, None] * (i + self.offset - j).abs()
        if self.rules.mask is not None and not self._boolean():
            s = s + _part(self.rules.mask, rows, cols).to(s.dtype)
        return s

    def slopes(self, products: Tensor, rows: slice, cols: slice) -> tuple[Tensor | float, Tensor | float]:
        """The derivatives of scores, (B, Hkv, G*bq, bk): by the scaled products, and by what a float mask adds."""
        slope = mask_slope = 1.0
        s = products * self.rules.scale
        if self.rules.softcap is not None:
            share = s / self.rules.softcap
            s, slope = self.rules.softcap * share.tanh(), share.cosh() ** -2  # 1 - tanh^2 is all rounding where tanh is nearly 1
        if self._modifies():
            before = self._after_softcap(self.by_head(s), rows, cols)
            hidden = before == NEG_INF
            mask_slope = self.pattern.slope(before.masked_fill(hidden, 0.0), *self._places(rows, cols))
            mask_slope = mask_slope.masked_fill(hidden, 0.0).reshape(s.shape)
        return slope * mask_slope, mask_slope

    def weights(self, s: Tensor, lse: Tensor) -> Tensor:
        """P again, from scores and lse. Never more than 1: a mask of -1e9 loses the difference to rounding."""
        exponent = s - lse.masked_fill(lse == NEG_INF, 0.0)
        return (exponent.clamp(max=0.0) if self.changes else exponent).exp()

    def visible(self, rows: slice, cols: slice) -> Tensor | None:
        """Which pairs attend, broadcastable to (B, Hq, bq, bk); None: all of them."""
        keep = []
        if not self._inside_window(rows, cols):
            _, _, i, j = self._places(rows, cols)
            keep += [j <= i + self.offset + self.rules.right] if self.rules.right is not None else []
            keep += [j >= i + self.offset - self.rules.left] if self.rules.left is not None else []
        if self._boolean():
            keep.append(_part(self.rules.mask, rows, cols))
        if self.rules.padding is not None:
            keep.append(self.rules.padding[:, None, None, cols])
        if self.pattern is not None and self.pattern.mask_mod is not None:
            keep.append(self.pattern.visible(*self._places(rows, cols)))
        result = keep[0] if keep else None
        for other in keep[1:]:
            result = result & other
        return result

    def _inside_window(self, rows: slice, cols: slice) -> bool:
        left, right = self.rules.left, self.rules.right
        return (right is None or cols.stop - 1 <= rows.start + self.offset + right) and (
            left is None or cols.start >= rows.stop - 1 + self.offset - left
        )

    def without_unseen(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """Rows (B, Hkv, bk, D) that no query of the tile sees may hold anything, NaN too, and 0 * NaN is NaN."""
        if keep is None or not self.hides:
            return x
        seen = keep.expand(*torch.broadcast_shapes(keep.shape, (1, 1, 1, x.shape[2]))).any(2)  # (B or 1, Hq or 1, bk)
        seen = seen.unflatten(1, (x.shape[1], -1)).any(2) if seen.shape[1] > 1 else seen
        return x.masked_fill(~seen[..., None], 0.0)

    def without_hidden(self, ds: Tensor, keep: Tensor | None) -> Tensor:
        """dS, (B, Hkv, G*bq, bk), in place: the derivative of a hidden score may be NaN, and so is 0 * NaN."""
        if keep is not None and self.hides:
            self.by_head(ds).masked_fill_(~keep, 0.0)
        return ds

    def kept(self, rows: slice, cols: slice) -> Tensor:
        """The weights that dropout keeps, (B, Hq, bq, bk) bool."""
        head = torch.arange(self.batch * self.heads, device=self.device) + self.rules.first_head
        rows, cols = (torch.arange(x.start, x.stop, device=self.device) for x in (rows, cols))
        return philox.kept(self.rules.seed, self.rules.dropout_p, head, rows, cols).unflatten(0, (self.batch, self.heads))

    def dropped(self, p: Tensor, rows: slice, cols: slice) -> Tensor:
        """Weights (B, Hkv, G*bq, bk) after dropout."""
        if self.rules.seed is None:
            return p
        return p.masked_fill(~self.kept(rows, cols).reshape(p.shape), 0.0) / (1 - self.rules.dropout_p)

    def keys_seen(self, rows: slice, block: int) -> Iterator[slice]:
        """The tiles of keys that some of these queries see."""
        lo, hi = 0, self.nk
        if self.rules.right is not None:
            hi = min(hi, rows.stop + self.offset + self.rules.right)
        if self.rules.left is not None:
            lo = max(lo, rows.start + self.offset - self.rules.left)
        for j in range(lo // block * block, max(hi, 0), block):
            yield slice(j, min(j + block, self.nk))

    def queries_seeing(self, cols: slice, block: int) -> Iterator[slice]:
        """The tiles of queries that see some of these keys."""
        lo, hi = 0, self.nq
        if self.rules.right is not None:
            lo = max(lo, cols.start - self.offset - self.rules.right)
        if self.rules.left is not None:
            hi = min(hi, cols.stop - self.offset + self.rules.left)
        for i in range(lo // block * block, max(hi, 0), block):
            yield slice(i, min(i + block, self.nq))

    def _modifies(self) -> bool:
        return self.pattern is not None and self.pattern.score_mod is not None

    def _boolean(self) -> bool:
        return self.rules.mask is not None and self.rules.mask.dtype == torch.bool

    def _places(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """batch, head, i, j: whole numbers that broadcast to (B, Hq, bq, bk)."""
        ranges = (slice(0, self.batch), slice(0, self.heads), rows, cols)
        numbers = [torch.arange(x.start, x.stop, device=self.device) for x in ranges]
        return tuple(x.view([-1 if axis == place else 1 for place in range(4)]) for axis, x in enumerate(numbers))


def _part(mask: Tensor, rows: slice, cols: slice) -> Tensor:
    """The part of a mask that a tile sees; a dimension of 1 stands for all."""
    every = slice(None)
    return mask[:, :, rows if mask.shape[2] > 1 else every, cols if mask.shape[3] > 1 else every]


def _add_sinks(o: Tensor, l: Tensor, m: Tensor, sinks: Tensor, len_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """One more score for each row, whose value is 0. o, l, m are (B, Hkv, G*bq, ...)."""
    sink = sinks.to(m.dtype).unflatten(0, (m.shape[1], -1)).repeat_interleave(len_rows, dim=1)[..., None]  # (Hkv, G*bq, 1)
    m_new = torch.maximum(m, sink)
    anchor = m_new.masked_fill(m_new == NEG_INF, 0.0)
    rescale = (m - anchor).exp()
    return o * rescale, l * rescale + (sink - anchor).exp(), m_new


def _sequences(q: Tensor, k: Tensor, v: Tensor, rules: Rules, like_q: tuple = (), like_k: tuple = ()) -> Iterator[list]:
    """Of packed sequences, one after the other: its q, k, v, what else is cut like q, like k, and its own rules."""
    starts_q, starts_k = (cu.tolist() for cu in (rules.cu_q, rules.cu_k))
    for b in range(len(starts_q) - 1):
        rows, cols = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        slopes = rules.slopes if rules.slopes is None or len(rules.slopes) == 1 else rules.slopes[b : b + 1]
        alone = rules._replace(cu_q=None, cu_k=None, slopes=slopes, first_head=b * q.shape[1])
        yield [q[:, :, rows], k[:, :, cols], v[:, :, cols], *(x[:, :, rows] for x in like_q), *(x[:, :, cols] for x in like_k), alone]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """(B, Hq, N, ...) -> (B, Hkv, G, N, ...), a view: the query heads that share a key/value head stand together."""
    return x.unflatten(1, (kv_heads, -1))
