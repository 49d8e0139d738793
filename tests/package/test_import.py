"""Importing on machines that lack things: no GPU, no Triton, another system, Triton imported too early."""
import itertools
import os
import subprocess
import sys
import textwrap

import pytest

ATTEND = """
import torch
from flash_edu import flash_attention
q = torch.randn(1, 2, 20, 16, requires_grad=True)
flash_attention(q, q, q, causal=True).sum().backward()
assert q.grad.isfinite().all()
"""


def run(code: str, **env: str) -> str:
    """Run code in a fresh interpreter that sees no GPU; returns what it printed."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", textwrap.dedent(code)],
        env=clean | {"CUDA_VISIBLE_DEVICES": ""} | env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_a_gpu():
    run(ATTEND + "assert flash_attention(q, q, q, backend='triton').isfinite().all()")


def test_without_triton():
    hide = "import sys, importlib.machinery as m; find = m.PathFinder.find_spec\n" + textwrap.dedent("""
        def hidden(name, *args):
            return None if name.split('.')[0] == 'triton' else find(name, *args)
        m.PathFinder.find_spec = hidden
    """)
    said = run(hide + ATTEND + textwrap.dedent("""
        import flash_edu, runpy
        assert "triton" not in sys.modules
        assert "not installed" in flash_edu.available_backends()["triton"]
        try:
            flash_attention(q, q, q, backend="triton")
        except NotImplementedError as error:
            assert "not installed" in str(error) and "backend='torch'" in str(error)
        else:
            raise AssertionError("should have raised")
        runpy.run_module("flash_edu", run_name="__main__")
    """))
    assert "torch   yes" in said and "triton  no: the package triton is not installed" in said


def test_importing_does_not_import_triton():
    run("import sys, flash_edu; assert 'triton' not in sys.modules, 'slow import'")


def test_importing_the_functions_does_not_import_the_slow_parts_of_pytorch():
    run("""
        import sys
        from flash_edu import FlashAttention, flash_attention, flash_attention_varlen
        slow = {"triton", "torch._dynamo", "torch._inductor", "torch.utils.flop_counter"} & set(sys.modules)
        assert not slow, slow
    """)


@pytest.mark.parametrize("first, second", list(itertools.permutations((
    "from flash_edu import flash_attention", "from torch.utils.flop_counter import FlopCounterMode"
))))  # fmt: skip
def test_flops_are_counted_whichever_is_imported_first(first, second):
    run(f"import torch\n{first}\n{second}" + """
q = torch.randn(1, 2, 20, 16)
with FlopCounterMode(display=False) as counter:
    flash_attention(q, q, q)
assert counter.get_total_flops() == 2 * 2 * 2 * 20 * 20 * 16
""")


def test_triton_imported_too_early():
    """Everything but the named backend works, and the reason says what to do."""
    run("import triton" + ATTEND + textwrap.dedent("""
        try:
            flash_attention(q, q, q, backend="triton")
        except NotImplementedError as error:
            assert "TRITON_INTERPRET=1" in str(error) and "restart the kernel" in str(error)
        else:
            raise AssertionError("should have raised")
    """))


def test_the_users_own_setting_wins():
    run("import flash_edu, os; assert os.environ['TRITON_INTERPRET'] == '0'", TRITON_INTERPRET="0")


def test_says_which_backends_there_are():
    said = subprocess.run([sys.executable, "-m", "flash_edu"], capture_output=True, text=True, check=True).stdout
    assert "torch   yes" in said and "triton" in said and "hopper" in said
