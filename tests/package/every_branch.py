"""Every branch of the kernels once, at small ragged sizes, right or AssertionError. For compute-sanitizer, which takes its time:

    make sanitize TOOL=memcheck                     # or racecheck, initcheck, synccheck
    python tests/package/every_branch.py [0 8]      # the first of 8 shares
"""
import sys
from functools import partial
from itertools import chain, islice

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


# Each part yields (name, check) pairs.


def attention():
    for number, shape in enumerate(SHAPES):
        for dtype in (HALF, torch.float32):
            for causal in (False, True):
                yield f"causal={causal} {shape} {dtype}", partial(check, "triton", shape, dtype, causal=causal)
        names = [[name] for name in MAKERS] + [EVERY] if number < 2 else [EVERY]
        for asked in names:
            rules = make_rules(asked, *shape[:2], *shape[3:5])
            yield f"{', '.join(asked)} {shape}", partial(check, "triton", shape, HALF, **rules)


def packed():
    lengths = ((70, 0, 1, 33), (50, 20, 0, 130))
    for options in ({}, {"causal": True}, {"window": (9, 4), "softcap": 3.0}, {"sinks": torch.randn(4, device=DEVICE)}):
        case = packed_case(lengths, 4, 2, 64, 64, dtype=torch.float16, seed=0, **options)
        yield f"packed {', '.join(options)}", partial(check_packed, "triton", lengths, case)


def decoding():
    lengths, slopes = (300, 20, 65), torch.rand(8, device=DEVICE)
    for page_size in (None, 16, 64):
        for nq, new in ((1, 0), (1, 1), (4, 4), (20, 0)):
            for options in ({}, {"window": (40, 0)}, {"softcap": 5.0, "alibi_slopes": slopes}):
                sizes = {"page_size": page_size, "new": new}
                problem = kvcache.make_problem(lengths, 8, 2, nq, 64, dtype=torch.float16, **sizes, **options)
                name = f"decoding, Nq={nq}, {new} new, pages of {page_size}, {', '.join(options)}"
                yield name, partial(kvcache.check, problem, "triton")


if __name__ == "__main__":
    part, parts = map(int, sys.argv[1:] or (0, 1))
    for name, judge in islice(chain(attention(), packed(), decoding()), part, None, parts):
        judge()
        print(name, flush=True)
