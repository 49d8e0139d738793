"""Every branch of the kernels once, at small ragged sizes, right or AssertionError. For compute-sanitizer, which takes its time:

    make sanitize TOOL=memcheck      # or racecheck, initcheck, synccheck
"""
import test_kvcache as kvcache
import torch
from packed_cases import check as check_packed
from packed_cases import packed_case
from some_rules import EVERY, MAKERS, check, make_rules
from this_machine import DEVICE, ON_GPU

HALF = torch.bfloat16 if ON_GPU else torch.float16  # Triton's interpreter computes bf16 wrongly

# (batch, heads, key/value heads, Nq, Nk, D, Dv): more keys, more queries, none of them a multiple of a tile; a head dim for each
# row of the tile table, one that is no power of two, one of odd numbers, and two that differ.
SHAPES = [
    (2, 4, 2, 113, 203, 64, 64),
    (1, 3, 1, 203, 113, 128, 128),
    (2, 2, 2, 70, 150, 80, 48),
    (1, 2, 1, 65, 129, 59, 59),
    (1, 2, 2, 70, 70, 256, 256),
]


def attention():
    for number, shape in enumerate(SHAPES):
        for dtype in (HALF, torch.float32):
            check("triton", shape, dtype)
            check("triton", shape, dtype, causal=True)
            yield f"plain and causal {shape} {dtype}"
        names = [[name] for name in MAKERS] + [EVERY] if number < 2 else [EVERY]
        for asked in names:
            check("triton", shape, HALF, **make_rules(asked, *shape[:2], *shape[3:5]))
            yield f"{', '.join(asked)} {shape}"


def packed():
    lengths = ((70, 0, 1, 33), (50, 20, 0, 130))
    for options in ({}, {"causal": True}, {"window": (9, 4), "softcap": 3.0}, {"sinks": torch.randn(4, device=DEVICE)}):
        check_packed("triton", lengths, packed_case(lengths, 4, 2, 64, 64, dtype=torch.float16, seed=0, **options))
        yield f"packed {', '.join(options)}"


def decoding():
    for page_size in (None, 16, 64):
        for nq, new in ((1, 0), (1, 1), (4, 4), (20, 0)):
            for options in ({}, {"window": (40, 0)}, {"softcap": 5.0, "alibi_slopes": torch.rand(8, device=DEVICE)}):
                problem = kvcache.make_problem(
                    (300, 20, 65), 8, 2, nq, 64, dtype=torch.float16, page_size=page_size, new=new, **options
                )
                kvcache.check(problem, "triton")
        yield f"decoding, pages of {page_size}"


if __name__ == "__main__":
    for part in (attention, packed, decoding):
        for done in part():
            print(done, flush=True)
