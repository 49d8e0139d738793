"""Every rule alone, in pairs, and all at once: out, lse and every gradient against fp64, by the relative bound."""
import itertools

import pytest
from some_rules import EVERY, MAKERS, check, dtypes_of, make_rules
from this_machine import ON_GPU

# batch, heads, key/value heads, Nq, Nk, D, Dv: fewer, as many and more queries than keys; MQA, MHA and GQA
SMALL = [(2, 2, 1, 17, 35, 16, 24), (1, 3, 3, 40, 40, 16, 16), (1, 2, 1, 49, 33, 24, 8)]
LARGE = [(4, 3, 1, 113, 203, 64, 64), (2, 2, 2, 256, 256, 64, 32), (2, 4, 2, 300, 139, 64, 64)]
SHAPES = dict(zip(("Nq < Nk", "Nq = Nk", "Nq > Nk"), LARGE if ON_GPU else SMALL))
PAIRS = [pair for pair in itertools.combinations(MAKERS, 2) if pair != ("bool mask", "float mask")]


def check_rules(backend, names, shape, dtype, seed=0):
    check(backend, shape, dtype, seed, **make_rules(names, *shape[:2], *shape[3:5], seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MAKERS)
def test_alone(name, shape, backend):
    dtypes = dtypes_of(backend)
    one = dtypes[(list(MAKERS).index(name) + list(SHAPES).index(shape)) % len(dtypes)]
    for dtype in dtypes if ON_GPU else [one]:
        check_rules(backend, [name], SHAPES[shape], dtype)


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_pairs(pair, backend):
    place, dtypes = PAIRS.index(pair), dtypes_of(backend)
    check_rules(backend, pair, list(SHAPES.values())[place % 3], dtypes[place // 3 % len(dtypes)], seed=place)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_at_once(shape, backend):
    for dtype in dtypes_of(backend):
        check_rules(backend, EVERY, SHAPES[shape], dtype)
        check_rules(backend, [name for name in EVERY if name not in ("causal", "window")], SHAPES[shape], dtype, seed=1)
