"""Patterns: against the formula and FlexAttention; the plan of tiles by brute force; and what is said of a wrong function."""
import ast
import itertools

import pytest
import some_patterns as some
import torch
import triton.language as tl
from some_rules import check, make_rules
from this_machine import DEVICE, ON_GPU
from torch.nn.attention import flex_attention as flex

from flash_edu import Pattern, flash_attention, flash_attention_with_lse, patterns
from flash_edu.testing import assert_close, differentiate, eager, make_case, truth

B, H, KV = 2, 2, 1
NQ, NK = (150, 300) if ON_GPU else (40, 70)


@pytest.fixture
def small_plans(monkeypatch):
    """In the interpreter, where large lengths take long, plans of 32 x 32: every kernel's tile divides them too."""
    if not ON_GPU:
        from flash_edu.kernels import scores

        monkeypatch.setattr(patterns, "PLAN_BLOCK", 32)
        monkeypatch.setattr(scores, "PLAN_BLOCK", tl.constexpr(32))
    return patterns.PLAN_BLOCK


def tensor(*numbers):
    return torch.tensor(numbers, device=DEVICE)


def documents():
    """Which document each place belongs to: other ones in each sequence."""
    of = [torch.sort(torch.randint(4, (B, n), generator=torch.Generator().manual_seed(n)))[0].to(DEVICE) for n in (NQ, NK)]
    return *of, tensor(NQ, NK)


PATTERNS = {
    "prefix LM": lambda: Pattern(some.prefix_lm, buffers=(tensor(3, 20),)),
    "documents": lambda: Pattern(some.same_document, buffers=documents()),
    "dilated window": lambda: Pattern(some.dilated),
    "by head": lambda: Pattern(some.far_in_odd_heads),
    "division": lambda: Pattern(some.halves),
    "numbers": lambda: Pattern(some.a_number),
    "relative bias": lambda: Pattern(score_mod=some.relative_bias, score_grad=some.relative_bias_grad, buffers=(BIAS,)),
    "softcap": lambda: Pattern(score_mod=some.capped, score_grad=some.capped_grad),
    "a mask and a score": lambda: Pattern(some.dilated, some.capped, some.capped_grad),
}


BIAS = torch.randn(H, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
PREFIXES = torch.tensor([3, 20], device=DEVICE)
QUERY_DOCUMENTS, KEY_DOCUMENTS, _ = documents()


@pytest.mark.parametrize("name", PATTERNS)
def test_by_the_formula(name, small_plans, backend):
    check(backend, (B, H, KV, NQ, NK, 16, 16), pattern=PATTERNS[name]())


@pytest.mark.parametrize("batch, heads, kv_heads", [(1, 3, 1), (3, 1, 1), (1, 1, 1), (1, 4, 2)])
@pytest.mark.parametrize("name", ["by head", "prefix LM"])
def test_one_batch_or_one_head(name, batch, heads, kv_heads, small_plans, backend):
    pattern = Pattern(some.prefix_lm, buffers=(tensor(3, 20, 0),)) if name == "prefix LM" else PATTERNS[name]()
    check(backend, (batch, heads, kv_heads, 33, 40, 16, 16), pattern=pattern)


@pytest.mark.parametrize("rules", [["causal"], ["window"], ["padding"], ["bool mask"], ["float mask"], ["alibi", "sinks"]], ids=str)
def test_with_other_rules(rules, small_plans, backend):
    options = make_rules(rules, B, H, NQ, NK)
    check(backend, (B, H, KV, NQ, NK, 16, 16), pattern=PATTERNS["documents"](), **options)
    if rules != ["float mask"] and backend == "triton":
        from flash_edu.attention import dense_rules
        from flash_edu.kernels.scores import kernel_rules

        q, k = torch.empty(B, H, NQ, 16, device=DEVICE), torch.empty(B, KV, NK, 16, device=DEVICE)
        asked = kernel_rules(dense_rules(q, k, pattern=PATTERNS["documents"](), **options), q, k, walk=0)
        assert (asked.plan is None) == (rules != ["alibi", "sinks"]), "a plan knows the pattern alone"


def test_plans_of_their_real_size(backend):
    """Several blocks of 128 both ways, a ragged end, and blocks that are empty, full and neither."""
    check(backend, (1, 1, 1, 140, 290, 16, 16), pattern=Pattern(some.prefix_lm, buffers=(tensor(130),)))


def test_a_score_mod_is_softcap(backend):
    q, k, v = (torch.randn(1, h, 40, 16, device=DEVICE) for h in (2, 1, 1))
    for x, y in zip(*(flash_attention_with_lse(q, k, v, backend=backend, **o) for o in ({"softcap": 3.0}, {"pattern": PATTERNS["softcap"]()}))):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


FLEX = {  # the same, as FlexAttention takes them
    "prefix LM": {"mask": lambda b, h, i, j: (j <= i) | (j < PREFIXES[b])},
    "documents": {"mask": lambda b, h, i, j: QUERY_DOCUMENTS[b, i] == KEY_DOCUMENTS[b, j]},
    "dilated window": {"mask": lambda b, h, i, j: ((i - j) % 3 == 0) & (i - j < 40) & (i - j >= -3)},
    "by head": {"mask": lambda b, h, i, j: torch.where(h % 2 == 0, (i - j).abs() < 9, (i - j).abs() >= 9)},
    "relative bias": {"score": lambda s, b, h, i, j: s + BIAS[h, (i - j).abs().clamp(max=15)]},
    "softcap": {"score": lambda s, b, h, i, j: 3.0 * torch.tanh(s / 3.0)},
}


@pytest.mark.filterwarnings("ignore")  # that it is not compiled here
@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_gives_the_same(name, backend):
    """Its plain version on a CPU, and compiled on a GPU; both within the bound of the formula in fp64."""
    case = make_case(B, H, KV, NQ, NK, 16, device=DEVICE, pattern=PATTERNS[name]())
    mask, score = FLEX[name].get("mask"), FLEX[name].get("score")
    block_mask = mask and flex.create_block_mask(mask, B, H, NQ, NK, device=DEVICE)
    attention = torch.compile(flex.flex_attention) if ON_GPU else flex.flex_attention
    theirs = attention(case.q, case.k, case.v, score_mod=score, block_mask=block_mask, enable_gqa=True)
    ours = flash_attention(case.q, case.k, case.v, pattern=case.options["pattern"], backend=backend)
    right, plain = truth(case)["out"], eager(case)["out"]
    assert_close("ours", ours, right, plain)
    if not ON_GPU:  # on a GPU it multiplies fp32 as TF32
        assert_close("theirs", theirs, right, plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-2 if ON_GPU else 1e-5, atol=1e-2 if ON_GPU else 1e-5)


# --- the plan


def random_table(batch, heads, nq, nk, block):
    """Blocks that are empty, full, and neither."""
    generator = torch.Generator().manual_seed(0)
    tiles = -(-nq // block), -(-nk // block)
    kind = torch.randint(3, (batch, heads, *tiles), generator=generator)
    kind = kind.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :nq, :nk]
    return ((kind == 1) | ((kind == 2) & (torch.rand(kind.shape, generator=generator) < 0.5))).int().to(DEVICE)


def lists_of(plan, heads):
    """{(batch, head, tile): (full tiles, masked tiles)}."""
    most = (plan.shape[3] - 2) // 2
    found = {}
    for b, h, t in itertools.product(range(plan.shape[0]), range(heads), range(plan.shape[2])):
        full, masked, *rest = plan[b, h if plan.shape[1] > 1 else 0, t].tolist()
        found[b, h, t] = rest[:full], rest[most : most + masked]
    return found


@pytest.mark.parametrize("shape", [(2, 4, 2, 70, 100), (1, 2, 1, 64, 64), (2, 1, 1, 33, 31)], ids=str)
def test_plans_by_brute_force(shape, small_plans):
    batch, heads, kv_heads, nq, nk = shape
    block, group = small_plans, heads // kv_heads
    mask = random_table(batch, heads, nq, nk, block)
    pattern = Pattern(some.table, buffers=(mask, tensor(*mask.stride()[:3])))
    by_query, by_key = pattern.plan(batch, heads, kv_heads, nq, nk, mask.device)
    tiles = {
        (b, h, m, n): mask[b, h, m * block : (m + 1) * block, n * block : (n + 1) * block].bool()
        for b, h, m, n in itertools.product(range(batch), range(heads), range(-(-nq // block)), range(-(-nk // block)))
    }

    def expected(candidates, seen):
        """seen(n): the parts of tile n, of all heads that walk it together."""
        full = [n for n in candidates if all(part.all() for part in seen(n)) and reaches_no_end(n)]
        return full, [n for n in candidates if any(part.any() for part in seen(n)) and n not in full]

    for (b, h, m), found in lists_of(by_query, heads).items():
        reaches_no_end = lambda n: (n + 1) * block <= nk  # noqa: E731
        assert found == expected(range(-(-nk // block)), lambda n, b=b, h=h, m=m: [tiles[b, h, m, n]])
    for (b, h, n), found in lists_of(by_key, kv_heads).items():
        reaches_no_end = lambda m, n=n: (n + 1) * block <= nk  # noqa: E731
        own = range(h * group, (h + 1) * group)
        assert found == expected(range(-(-nq // block)), lambda m, b=b, n=n, own=own: [tiles[b, g, m, n] for g in own])
    check("triton", (*shape, 16, 16), pattern=pattern)


def test_one_plan_serves_all_batches_and_heads(small_plans):
    mask = random_table(1, 1, NQ, NK, small_plans)[0, 0]
    pattern = Pattern(some.shared_table, buffers=(mask, tensor(NK)))
    assert all(plan.shape[:2] == (1, 1) for plan in pattern.plan(B, H, KV, NQ, NK, mask.device))
    check("triton", (B, H, KV, NQ, NK, 16, 16), pattern=pattern)


def test_a_plan_is_kept_until_a_buffer_changes(small_plans):
    lengths = tensor(3, 20)
    pattern = Pattern(some.prefix_lm, buffers=(lengths,))
    plan = lambda nk=NK: pattern.plan(B, H, KV, NQ, nk, lengths.device)  # noqa: E731
    first = plan()
    assert plan() is first
    assert plan(NK + 1) is not first and plan() is first
    shape = (B, H, KV, NQ, NK, 16, 16)
    check("triton", shape, pattern=pattern)
    lengths.copy_(tensor(NK, 0))
    assert plan() is not first and not torch.equal(plan()[0], first[0])
    check("triton", shape, pattern=pattern)


def test_buffers_made_in_inference_mode(backend):
    with torch.inference_mode():
        pattern = Pattern(some.prefix_lm, buffers=(tensor(3, 20),))
    q = torch.randn(2, 1, 20, 16, device=DEVICE)
    other = Pattern(some.prefix_lm, buffers=(tensor(3, 20),))
    assert torch.equal(*(flash_attention(q, q, q, pattern=x, backend=backend) for x in (pattern, other)))


@pytest.mark.skipif(ON_GPU, reason="loads are traced in the interpreter: make test")
def test_only_planned_tiles_are_loaded_and_no_buffer_is_left(small_plans):
    from flash_edu.figures import trace_triton

    nq, nk = 70, 100
    mask = random_table(1, 1, nq, nk, small_plans)[0, 0]
    pattern = Pattern(some.shared_table, buffers=(mask, tensor(nk)))
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for n in (nq, nk, nk))
    tensors = {"q": q, "k": k, "v": v, "table": mask}
    run = lambda: flash_attention(q, k, v, pattern=pattern, backend="triton")  # noqa: E731
    forward = trace_triton(run, tensors)
    out = run()
    backward = trace_triton(lambda: out.backward(torch.ones_like(out)), tensors)
    shown = {(m, n) for m in range(3) for n in range(4) if mask[m * 32 : m * 32 + 32, n * 32 : n * 32 + 32].any()}
    assert 0 < len(shown) < 12
    for trace in (forward, backward.only(kernel="dk_dv_kernel"), backward.only(kernel="dq_kernel")):
        tiles = trace.tiles()
        assert len(tiles) == len(set(tiles)), "a tile was visited twice"
        assert {(q_rows[0] // 32, k_rows[0] // 32) for q_rows, k_rows in tiles} == shown
        assert not any(event.outside for event in trace.events if event.name == "table")


# --- wrong functions


WRONG = {
    "a name that is not there": (some.names_nothing, ["undefined_mask", "return keep & undefined_mask"]),
    "no function of tl": (some.is_not_in_triton, ["nonsense", "return tl.nonsense(i - j) > 0"]),
    "a branch on a block": (some.branches, ["if i > j:"]),
}


@pytest.mark.parametrize("options", [{}, {"causal": True}], ids=["planned", "not planned"])
@pytest.mark.parametrize("name", WRONG)
def test_a_function_that_does_not_compile(name, options, backend):
    function, words = WRONG[name]
    if (function, backend, options) == (some.branches, "triton", {"causal": True}) and not ON_GPU:
        pytest.skip("Triton's interpreter takes any branch")
    q = torch.randn(1, 1, 20, 16, device=DEVICE)
    with pytest.raises((ValueError, NotImplementedError)) as raised:
        flash_attention(q, q, q, pattern=Pattern(function), backend=backend, **options)
    message = str(raised.value)
    assert message.startswith(f"pattern: mask_mod {function.fn.__name__} does not compile: line ")
    assert all(word in message for word in words), message


def test_a_mistake_in_a_helper(backend):
    q = torch.randn(1, 1, 20, 16, device=DEVICE)
    pattern = Pattern(score_mod=some.mistaken_score, score_grad=some.capped_grad)
    with pytest.raises(ValueError, match="score_mod mistaken_score does not compile: .*`return helper_with.*undefined_helper"):
        flash_attention(q, q, q, pattern=pattern, backend=backend)


def test_a_mistake_in_the_backward(backend):
    q = torch.randn(1, 1, 20, 16, device=DEVICE, requires_grad=True)
    out = flash_attention(q, q, q, pattern=Pattern(score_mod=some.capped, score_grad=some.mistaken_score), backend=backend)
    with pytest.raises(ValueError, match="score_grad mistaken_score does not compile"):
        out.sum().backward()


def test_what_the_compiler_says_is_passed_on():
    """Its errors name a line of the source that it was given, one inside the other for calls in calls."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.jit import JITFunction

    pattern = Pattern(JITFunction(some.names_nothing.fn))
    node = ast.parse(pattern.mask_mod.src).body[0].body[1]
    with pytest.raises(ValueError, match="mask_mod names_nothing does not compile: line 3 of it, `return keep .*NameError") as raised:
        with patterns.explained(pattern.name):
            try:
                raise CompilationError(pattern.mask_mod.src, node, "NameError('undefined_mask')")
            except CompilationError as inner:
                raise CompilationError("def forward_kernel(): ...", node, None) from inner
    assert isinstance(raised.value.__cause__, CompilationError)
    with pytest.raises(KeyError, match="elsewhere"):  # not of the pattern
        with patterns.explained(pattern.name):
            raise KeyError("elsewhere")


def test_a_function_that_pytorch_does_not_know():
    q = torch.randn(1, 1, 20, 16, device=DEVICE)
    for backend in ("torch", "triton"):  # Triton for its plan
        with pytest.raises(NotImplementedError, match=r"only_triton_knows .*tl\.cdiv.*the plan do not know; they know"):
            flash_attention(q, q, q, pattern=Pattern(some.only_triton_knows), backend=backend)
    flash_attention(q, q, q, pattern=Pattern(some.only_triton_knows), causal=True, backend="triton")  # no plan is made


def test_gradients_without_score_grad():
    q = torch.randn(1, 1, 20, 16, device=DEVICE, requires_grad=True)
    pattern = Pattern(score_mod=some.capped)
    with pytest.raises(NotImplementedError, match=r"score_grad.*torch\.no_grad\(\).*backend='torch' can"):
        flash_attention(q, q, q, pattern=pattern, backend="triton")
    with torch.no_grad():
        without = flash_attention(q, q, q, pattern=pattern, backend="triton")
    given = flash_attention(q, q, q, pattern=PATTERNS["softcap"](), backend="triton")
    assert torch.equal(without, given)
    case = make_case(1, 1, 1, 20, 30, 16, device=DEVICE, pattern=pattern)
    got, right, plain = differentiate(flash_attention_with_lse, case, backend="torch"), truth(case), eager(case)
    for name in right:
        assert_close(name, got[name], right[name], plain[name])
