"""Requests nobody thought of: random shapes, dtypes, layouts and rules, in both backends, each against fp64.

    make fuzz EXAMPLES=2000 SEED=7        # other requests with each seed; without one, others each time

Hypothesis draws a request as plain numbers and words, and shrinks one that fails to the smallest that still does. In
`make test` the requests are the same each time.
"""
import os
import random

import some_patterns as some
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_cases import check as check_packed
from packed_cases import packed_case
from pytest import mark
from some_rules import NEG_INF
from this_machine import DEVICE, ON_GPU

from flash_edu import Pattern, flash_attention_with_lse
from flash_edu.testing import Case, assert_close, differentiate, eager, make_case, truth

EXAMPLES = int(os.environ.get("EXAMPLES", 200))
FIXED = "EXAMPLES" not in os.environ  # the same requests in each run
RULES = ("causal", "window", "mask", "padding", "slopes", "softcap", "sinks", "pattern", "dropout")
PACKED_RULES = [rule for rule in RULES if rule not in ("mask", "padding", "pattern", "dropout")]

# On a GPU each set of rules, dtype and head dim is compiled, 1 to 3 s a kernel: 16 sets, in 8 parts that pytest-xdist spreads
# over processes. The interpreter takes any set, and small lengths.
PARTS = 8 if ON_GPU else 1
SETS = [random.Random(n).sample(RULES, n % 8 + 1) for n in range(2 * PARTS)]
LONGEST = 700 if ON_GPU else 40
HEAD_DIMS = [(64, 64), (64, 64), (128, 128), (80, 48)] if ON_GPU else [(16, 16), (8, 24), (24, 8), (1, 3), (40, 40)]
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
PATTERNS = {
    "dilated": Pattern(some.dilated),
    "by head": Pattern(some.far_in_odd_heads),
    "numbers": Pattern(some.a_number),
    "capped": Pattern(score_mod=some.capped, score_grad=some.capped_grad),
    "all": Pattern(some.dilated, some.capped, some.capped_grad),
}


def lengths(least=0):
    return st.integers(least, 20) | st.integers(1, LONGEST) | st.integers(1, LONGEST // 16).map(lambda n: 16 * n)


def sides():
    return st.none() | st.just(-1) | st.integers(0, 20) | st.integers(0, 2 * LONGEST)


def orders(axes):
    return st.permutations(range(axes))


# What is drawn for a rule; `tensors` makes of it what flash_attention takes.
DRAWN = {
    "causal": st.just(True),
    "window": st.tuples(sides(), sides()),
    "mask": st.tuples(
        st.sampled_from(["bool", "float16", "float32"]), st.tuples(*(st.sampled_from(["1", x]) for x in "bhqk")), st.integers(0, 4), orders(4)
    ),
    "padding": st.sampled_from(["right", "left", "holes", "none", "all"]),
    "slopes": st.sampled_from(["h", "bh"]),
    "softcap": st.sampled_from([0.3, 3.0, 50.0, 1e4]),
    "sinks": st.sampled_from(["random", "large", "small"]),
    "pattern": st.sampled_from(sorted(PATTERNS)),
    "dropout": st.sampled_from([0.1, 0.5, 0.95]),
}  # fmt: skip


def rules(names):
    return st.fixed_dictionaries({name: DRAWN[name] for name in sorted(names)})


def some_rules(part, among=RULES):
    if ON_GPU:
        return st.sampled_from([[x for x in names if x in among] for names in SETS[part::PARTS]]).flatmap(rules)
    return st.fixed_dictionaries({}, optional={name: DRAWN[name] for name in among})


def requests(part):
    return st.fixed_dictionaries(
        {
            "batch": st.integers(1, 2 + ON_GPU),
            "kv_heads": st.integers(1, 2),
            "group": st.sampled_from([1, 2, 3] if ON_GPU else [1, 1, 2]),
            "nq": lengths(),
            "nk": lengths(),
            "dims": st.sampled_from(HEAD_DIMS),
            "dtype": st.sampled_from(DTYPES),
            "scale": st.sampled_from([None, None, 0.05, 0.7]),
            "hot": st.sampled_from([1.0, 1.0, 5.0]),
            "orders": st.tuples(*(orders(4) for _ in range(4))),
            "rules": some_rules(part),
            "seed": st.integers(0, 2**16),
        }
    )


def relaid(x, order):
    """The same values, dimensions laid out in memory in this order."""
    return x.permute(*order).contiguous().permute(*(order.index(axis) for axis in range(x.ndim)))


def mask(drawn, batch, heads, nq, nk, generator):
    kind, form, dropped, order = drawn
    sizes = dict(zip("1bhqk", (1, batch, heads, nq, nk)))
    values = torch.randn(*(sizes[axis] for axis in form), generator=generator)
    hidden = torch.rand(values.shape, generator=generator) < 0.3
    values = ~hidden if kind == "bool" else values.masked_fill(hidden, NEG_INF).to(getattr(torch, kind))
    values = relaid(values, order)
    while dropped and values.ndim and values.shape[0] == 1:  # leading dimensions may be missing
        values, dropped = values[0], dropped - 1
    return values.to(DEVICE)


def padding(drawn, batch, nk, generator):
    place, first = torch.arange(nk), torch.randint(nk + 1, (batch, 1), generator=generator)
    real = {
        "right": place < first, "left": place >= first, "holes": torch.rand(batch, nk, generator=generator) < 0.5,
        "none": torch.ones(batch, nk, dtype=torch.bool), "all": torch.zeros(batch, nk, dtype=torch.bool),
    }  # fmt: skip
    return real[drawn].to(DEVICE)


def tensors(drawn, batch, heads, nq, nk, seed) -> dict:
    """What was drawn, as arguments of flash_attention."""
    generator = torch.Generator().manual_seed(seed)
    makers = {
        "causal": lambda x: {"causal": x},
        "window": lambda x: {"window": x},
        "mask": lambda x: {"attn_mask": mask(x, batch, heads, nq, nk, generator)},
        "padding": lambda x: {"key_padding_mask": padding(x, batch, nk, generator)},
        "slopes": lambda x: {"alibi_slopes": torch.rand((batch, heads)[-len(x) :], generator=generator).to(DEVICE)},
        "softcap": lambda x: {"softcap": x},
        "sinks": lambda x: {
            "sinks": (torch.randn(heads, generator=generator) + {"random": 0, "large": 60, "small": -60}[x]).to(DEVICE)
        },
        "pattern": lambda x: {"pattern": PATTERNS[x]},
        "dropout": lambda x: {"dropout_p": x},
    }
    return {name: x for rule in drawn for name, x in makers[rule](drawn[rule]).items()}


def made(request) -> Case:
    batch, heads = request["batch"], request["kv_heads"] * request["group"]
    nq, nk = request["nq"], request["nk"]
    asked = tensors(request["rules"], batch, heads, nq, nk, request["seed"])
    common = {name: request[name] for name in ("dtype", "scale", "hot", "seed")}
    case = make_case(batch, heads, request["kv_heads"], nq, nk, *request["dims"], device=DEVICE, **common, **asked)
    moved = {name: relaid(getattr(case, name), order) for name, order in zip(("q", "k", "v", "dout"), request["orders"])}
    return Case(**vars(case) | moved)


def tried(share):
    """So many of the examples, of each part."""
    return settings(
        max_examples=max(1, round(EXAMPLES * share / PARTS)), derandomize=FIXED, database=None, deadline=None, print_blob=not FIXED,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def beyond_luck(judge):
    """Call judge(draws). What fails by the usual ruler is judged again by one that chance does not shorten."""
    try:
        judge(0)
    except AssertionError:
        judge(64)


def judge_request(case, draws):
    right, plain = truth(case), eager(case, draws)
    for backend in ("torch", "triton"):
        got = differentiate(flash_attention_with_lse, case, backend=backend)
        for name in right:
            assert_close(f"{backend}: {name}", got[name], right[name], plain[name])


@mark.parametrize("part", range(PARTS))
def test_requests(part):
    @tried(0.8)
    @given(requests(part))
    def judge(request):
        case = made(request)
        beyond_luck(lambda draws: judge_request(case, draws))

    judge()


def packed_requests(part):
    pairs = st.lists(st.tuples(lengths(), lengths()), min_size=1, max_size=5)
    return st.fixed_dictionaries(
        {
            "lengths": pairs.map(lambda x: tuple(zip(*x))),
            "heads": st.sampled_from([(1, 1), (2, 1), (3, 3)]),
            "dims": st.sampled_from(HEAD_DIMS),
            "dtype": st.sampled_from(DTYPES),
            "rules": some_rules(part, PACKED_RULES),
            "seed": st.integers(0, 2**16),
        }
    )


@mark.parametrize("part", range(PARTS))
def test_packed_requests(part):
    @tried(0.2)
    @given(packed_requests(part))
    def judge(request):
        sequences, (heads, kv_heads) = request["lengths"], request["heads"]
        asked = tensors(request["rules"], len(sequences[0]), heads, 0, 0, request["seed"])
        case = packed_case(sequences, heads, kv_heads, *request["dims"], dtype=request["dtype"], seed=request["seed"], **asked)
        for backend in ("torch", "triton"):
            beyond_luck(lambda draws, backend=backend: check_packed(backend, sequences, case, draws))

    judge()
