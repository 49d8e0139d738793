"""Packed sequences as cases of flash_edu.testing, each judged as if it were alone."""
from dataclasses import replace

import torch
from this_machine import DEVICE

from flash_edu import flash_attention_varlen_with_lse
from flash_edu.testing import assert_close, differentiate, eager, make_case, truth


def cumulative(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)


def packed_attention(lengths, longest=None):
    """flash_attention_varlen_with_lse on tensors (1, heads, total, dim), as make_case makes them."""
    cu_q, cu_k = map(cumulative, lengths)
    max_q, max_k = (longest or max(x) for x in lengths)

    def attention(q, k, v, **options):
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        out, lse = flash_attention_varlen_with_lse(q, k, v, cu_q, cu_k, max_q, max_k, **options)
        return out.transpose(0, 1)[None], lse.transpose(0, 1)[None]

    return attention


def packed_case(lengths, heads=2, kv_heads=1, d=16, dv=24, **options):
    return make_case(1, heads, kv_heads, sum(lengths[0]), sum(lengths[1]), d, dv, device=DEVICE, hot=2.0, **options)


def alone(case, lengths, b):
    """Sequence b as a case of its own, and where it lies: a slice for each name."""
    rows, cols = (slice(sum(x[:b]), sum(x[: b + 1])) for x in lengths)
    slopes = case.options.get("alibi_slopes")
    own = {"alibi_slopes": slopes[b]} if slopes is not None and slopes.ndim == 2 else {}
    parts = {name: getattr(case, name)[:, :, cols if name in "kv" else rows] for name in ("q", "k", "v", "dout", "dlse")}
    return replace(case, **parts, options=case.options | own), {"out": rows, "lse": rows, "dq": rows, "dk": cols, "dv": cols}


def check(backend, lengths, case, draws=0, **more):
    got = differentiate(packed_attention(lengths, **more), case, backend=backend)
    sinks = []
    for b in range(len(lengths[0])):
        own, places = alone(case, lengths, b)
        right, plain = truth(own), eager(own, draws)
        for name, place in places.items():
            assert_close(f"{name} of sequence {b}", got[name][:, :, place], right[name], plain[name])
        sinks.append((right.get("dsinks"), plain.get("dsinks")))
    if "sinks" in case.options:  # a sum over the sequences, and so is the error that each may have
        total = sum(right for right, _ in sinks)
        assert_close("dsinks", got["dsinks"], total, (total + sum((plain - right).abs() for right, plain in sinks)).to(sinks[0][1].dtype))
