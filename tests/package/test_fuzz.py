"""Requests nobody thought of: random shapes, dtypes, layouts and flags, each against fp64."""
import random

import pytest
import torch
from this_machine import DEVICE, ON_GPU

from flash_edu import flash_attention_with_lse
from flash_edu.testing import assert_close, differentiate, eager, make_case, truth

LONGEST = 700 if ON_GPU else 90
HEAD_DIMS = [8, 24, 64, 72, 128, 200, 256] if ON_GPU else [1, 8, 24, 40]  # few, since each one is compiled


def random_case(seed):
    """Each seed is one request, the same on every machine of its kind."""
    pick = random.Random(seed)
    kv_heads, group = pick.randint(1, 3), pick.choice([1, 1, 2, 3])
    length = lambda: pick.choice([pick.randint(1, 20), pick.randint(1, LONGEST), 16 * pick.randint(1, 5)])  # noqa: E731
    dtypes = [torch.float32, torch.float16] + [torch.bfloat16] * ON_GPU
    d = pick.choice(HEAD_DIMS)
    return make_case(
        pick.randint(1, 3), kv_heads * group, kv_heads, length(), length(), d, pick.choice([d, d, pick.choice(HEAD_DIMS)]),
        dtype=pick.choice(dtypes), device=DEVICE, causal=pick.random() < 0.5,
        scale=pick.choice([None, None, 0.05, 0.7]), hot=pick.choice([1.0, 1.0, 5.0]), seed=seed,
    )  # fmt: skip


def relaid(x, pick):
    """The same values, dimensions laid out in memory in a random order."""
    order = pick.sample(range(x.ndim), x.ndim)
    back = [order.index(i) for i in range(x.ndim)]
    return x.permute(order).contiguous().permute(back)


@pytest.mark.parametrize("seed", range(60 if ON_GPU else 20))
def test_random_requests(seed, backend):
    case, pick = random_case(seed), random.Random(seed)
    names = ("q", "k", "v", "dout", "dlse")
    case = type(case)(**vars(case) | {name: relaid(getattr(case, name), pick) for name in names})
    got, right, plain = differentiate(flash_attention_with_lse, case, backend=backend), truth(case), eager(case)
    for name in right:
        assert_close(name, got[name], right[name], plain[name])
