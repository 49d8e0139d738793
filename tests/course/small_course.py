"""A small course made for the tests of the check: one chapter with five exercises, and a second one without."""
from pathlib import Path

import pytest

from flash_edu.course.judging import run_check
from flash_edu.course.manifest import load_course
from flash_edu.course.report import Report
from flash_edu.course.skeletons import make_skeleton

ROOT = Path(__file__).resolve().parents[2]

MANIFEST = """
[[chapter]]
number = {number}
slug = "small"
title = "Small & <odd>"
part = "I"
idea = "An idea."
minutes = 5
notebook = "{number:02d}_small.ipynb"
needs = ["torch"]
"""
EXERCISE = """
[[exercise]]
id = "{id}"
chapter = {chapter}
name = "{name}"
function = "{function}"
minutes = 5
difficulty = 1
needs = ["torch"]
hints = ["One.", "Two."]
"""

SOLUTION = '''
import torch
import triton
import triton.language as tl


def add(a, b):
    # your code here (about 1 line)
    return a + b
    # end of your code


def fraction(a, b):
    # your code here (about 1 line)
    return divmod(a, b)
    # end of your code


@triton.jit
def double_kernel(X, Y, N, BLOCK: tl.constexpr, NEGATE: tl.constexpr):
    i = tl.arange(0, BLOCK)
    # your code here: 1.3 double, load x and double it (about 1 line)
    y = tl.load(X + i, mask=i < N) * 2
    # end of your code
    # your code here: 1.4 negate (about 2 lines)
    if NEGATE:
        y = -y
    # end of your code
    # your code here: 1.3 double, store y (about 1 line)
    tl.store(Y + i, y, mask=i < N)
    # end of your code


def double(x, negate=False):
    y = torch.empty_like(x)
    double_kernel[(1,)](x, y, len(x), BLOCK=16, NEGATE=negate)
    return y


def rest(a, b):
    # your code here (about 1 line)
    return fraction(a, b)[1]
    # end of your code
'''

TESTS = '''
import os
import time

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.exercise("1.1")
@pytest.mark.parametrize("b", [2, 3, -4])
def test_add(answer, b):
    """the sum is <b>right</b>.

    Not part of the claim.
    """
    assert answer.add(1, b) == 1 + b, f"add(1, {b}) gave {answer.add(1, b)}, expected {1 + b}"


@pytest.mark.exercise("1.1")
def test_add_zero(answer):
    """adding 0 changes nothing"""
    assert answer.add(7, 0) == 7


@pytest.mark.exercise("1.1")
def test_only_numbers(answer):
    """a word and a number do not add up"""
    with pytest.raises(TypeError):
        answer.add(1, "2")


@pytest.mark.exercise("1.2")
def test_fraction(answer):
    """quotient and rest of 7 and 2"""
    quotient, rest = answer.fraction(7, 2)
    assert (quotient, rest) == (3, 1), "7 = 3 * 2 + 1"


@pytest.mark.exercise("1.3")
def test_double(answer):
    """every number is doubled"""
    assert answer.double(torch.ones(5)).tolist() == [2.0] * 5, "1 doubled is 2"


@pytest.mark.exercise("1.4")
def test_negate(answer):
    """the sign changes if asked for"""
    assert answer.double(torch.ones(5), negate=True).tolist() == [-2.0] * 5, "expected -2"


@pytest.mark.exercise("1.4")
def test_not_negated(answer):
    """the sign stays otherwise"""
    assert answer.double(torch.ones(5)).tolist() == [2.0] * 5, "expected 2"


@pytest.mark.exercise("1.5")
def test_rest(answer):
    """the rest of 7 and 2 is 1"""
    assert answer.rest(7, 2) == 1, "7 - 3 * 2 = 1"


@pytest.mark.exercise("1.5")
def test_rest_again(answer):
    """the rest of 9 and 2 is 1"""
    assert answer.rest(9, 2) == 1, "9 - 4 * 2 = 1"
'''


# What an answer may hold instead of the solution's lines.
LINES = {
    "add": "return a + b",
    "fraction": "return divmod(a, b)",
    "load": "y = tl.load(X + i, mask=i < N) * 2",
    "negate": "if NEGATE:\n        y = -y",
    "rest": "return fraction(a, b)[1]",
    "signature": "def add(a, b):",
}


def changed(**new: str) -> str:
    """The solution with other lines in the places named."""
    text = SOLUTION
    for place, lines in new.items():
        assert text.count(LINES[place]) == 1
        text = text.replace(LINES[place], lines)
    return text


def make_course(root: Path, patch: pytest.MonkeyPatch):
    """Its files in `root`, and an environment in which they are found; both last as long as `patch` does."""
    names = [("1.1", "add", "add"), ("1.2", "fraction", "fraction"), ("1.3", "double", "double_kernel")]
    names += [("1.4", "negate", "double_kernel"), ("1.5", "rest", "rest")]
    tables = [EXERCISE.format(id=id, chapter=1, name=name, function=function) for id, name, function in names]
    for folder in ("exercises", "solutions", "tests/chapters"):
        (root / folder).mkdir(parents=True)
    manifest = MANIFEST.format(number=1) + MANIFEST.format(number=2) + "".join(tables)
    (root / "exercises" / "course.toml").write_text(manifest)
    (root / "solutions" / "ch01_small.py").write_text(SOLUTION)
    (root / "tests" / "chapters" / "test_ch01_small.py").write_text(TESTS)
    conftest = (ROOT / "tests" / "chapters" / "conftest.py").read_text()
    (root / "tests" / "chapters" / "conftest.py").write_text(conftest)
    course = load_course(root)
    (root / "exercises" / "ch01_small.py").write_text(make_skeleton(SOLUTION, course.chapters[0]))
    patch.setenv("PYTHONPATH", str(ROOT))  # the course lies elsewhere, the package does not
    patch.delenv("FLASH_EDU_TARGET", raising=False)
    patch.delenv("FLASH_EDU_STRICT", raising=False)
    return course


def check(course, text: str, what: str = "1", **options) -> Report:
    """The report on an answer with this text, in a folder beside the course."""
    folder = course.root / "mine"
    folder.mkdir(exist_ok=True)
    (folder / "ch01_small.py").write_text(text)
    return run_check(what, target=str(folder), course=course, **options)
