"""Skeletons: made from solutions by leaving lines out, unwritten until solved, and never over somebody's answer."""
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_edu.course import skeletons
from flash_edu.course.judging import judge, obstacle, run_tests
from flash_edu.course.manifest import Chapter, Course, CourseError, Exercise, load_course
from flash_edu.course.marks import find_regions
from flash_edu.course.skeletons import holds_answer, make_skeleton, missing_lines, skeleton_of

ROOT = Path(__file__).resolve().parents[2]


def exercise(id: str, name: str, function: str) -> Exercise:
    return Exercise(id, int(id.split(".")[0]), name, function, 5, 1, ("torch",), ("One.", "Two."))


def chapter(*exercises: Exercise) -> Chapter:
    return Chapter(7, "small", "Small", "I", "An idea.", 5, "07_small.ipynb", ("torch",), exercises)


SMALL = chapter(
    exercise("7.1", "forward", "forward_kernel"), exercise("7.2", "causal", "forward_kernel"),
    exercise("7.3", "launch", "launch"), exercise("7.4", "module", "forward"),
)  # fmt: skip

SOLUTION = '''"""Chapter 07."""
import triton
import triton.language as tl


@triton.autotune(configs=[], key=[])
@triton.jit(noinline=True)
def forward_kernel(X, BLOCK: tl.constexpr):
    """7.1  A kernel."""
    # your code here: 7.2 causal, where to stop (about 1 line)
    end = 3
    # end of your code
    for start in range(0, 9):
        # your code here: 7.1 forward, one tile (about 2 lines)
        # a comment of the solution
        x = tl.load(X)
        # end of your code
        pass

    # your code here: 7.1 forward, store (about 1 line)
    tl.store(X, x)
    # end of your code


def launch(x):
    # your code here (about 2 lines)
    forward_kernel[(1,)](x)
    return x
    # end of your code


class Attention:
    def forward(self, x):
        # your code here (about 1 line)
        return launch(x)
        # end of your code
'''

SKELETON = '''"""Chapter 07."""
import triton
import triton.language as tl


@triton.autotune(configs=[], key=[])
@triton.jit(noinline=True)
def forward_kernel(X, BLOCK: tl.constexpr):
    """7.1  A kernel."""
    # your code here: 7.2 causal, where to stop (about 1 line)
    # end of your code
    for start in range(0, 9):
        # your code here: 7.1 forward, one tile (about 2 lines)
        tl.static_assert(False, "7.1 forward is not written yet")
        # end of your code
        pass

    # your code here: 7.1 forward, store (about 1 line)
    tl.static_assert(False, "7.1 forward is not written yet")
    # end of your code


def launch(x):
    # your code here (about 2 lines)
    raise NotImplementedError("7.3 launch is not written yet")
    # end of your code


class Attention:
    def forward(self, x):
        # your code here (about 1 line)
        raise NotImplementedError("7.4 module is not written yet")
        # end of your code
'''


def test_a_skeleton_keeps_everything_but_the_answer():
    assert make_skeleton(SOLUTION, SMALL) == SKELETON


def test_marks_are_understood_in_a_skeleton_too():
    for text, unwritten in [(SOLUTION, False), (SKELETON, True)]:
        regions = find_regions(text, SMALL)
        assert [region.exercise.id for region in regions] == ["7.2", "7.1", "7.1", "7.3", "7.4"]
        assert [region.part for region in regions] == ["where to stop", "one tile", "store", "", ""]
        assert {region.unwritten for region in regions} == {unwritten}
    assert [region.stops for region in find_regions(SKELETON, SMALL)] == [False, True, True, True, True]


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("    # end of your code\n\n\ndef launch", "\n\ndef launch", "25: the region of line 20 has not ended"),
        ("        # end of your code\n        pass", "        pass", "line 19: the region of line 14 has not ended"),
        ("(x)\n        # end of your code\n", "(x)\n", 'line 34: "# end of your code" is missing'),
        ("class Attention:\n    def forward(self, x):\n", "if True:\n", "line 33: the region is not inside a"),
        ("    return x\n    # end", "    # end of your code\n    # end", "line 29: an end without"),
        ("def launch(x):", "def start(x):", "line 26: no exercise of the manifest has the function start"),
        ("7.2 causal", "7.2 casual", "line 10: the manifest has no exercise 7.2 casual"),
        ("here (about 2 lines)", "here (two lines)", 'line 26: a mark is "# your code here (about 4 lines)"'),
    ],
)
def test_marks_that_make_no_sense_are_refused_with_their_line(old, new, said):
    assert SOLUTION.count(old) == 1
    text = SOLUTION.replace(old, new)
    with pytest.raises(CourseError) as error:
        make_skeleton(text, SMALL)
    assert said in str(error.value)


def test_an_ambiguous_function_must_be_named():
    both = chapter(*SMALL.exercises, exercise("7.5", "again", "launch"))
    with pytest.raises(CourseError, match="line 26: several exercises"):
        make_skeleton(SOLUTION, both)


def test_a_region_that_cannot_be_empty_is_refused():
    text = SOLUTION.replace("    end = 3\n", "    if BLOCK:\n        end = 3\n")
    make_skeleton(text, SMALL)
    text = SOLUTION.replace("    # your code here: 7.2", "    if BLOCK:\n    # your code here: 7.2")
    with pytest.raises(CourseError, match="line 1. of its skeleton is not Python.*left empty"):
        make_skeleton(text.replace("    end = 3\n", "        end = 3\n"), SMALL)


def test_solving_only_adds_lines():
    assert missing_lines(SKELETON, SOLUTION) == []
    assert missing_lines(SKELETON, SOLUTION.replace("        pass\n", "")) == ["        pass"]
    assert missing_lines(SKELETON, SOLUTION.replace("def launch(x)", "def launch(y)")) == ["def launch(x):"]
    with pytest.raises(CourseError, match="nothing to compare"):
        missing_lines("x = 1\n", "x = 1\n")


def test_what_holds_an_answer():
    assert not holds_answer(SKELETON)
    assert holds_answer(SOLUTION)
    assert holds_answer(SKELETON.replace("    # end of your code\n    for", "    end = 2\n    # end of your code\n    for"))
    assert holds_answer(SKELETON.replace("        # end of your code\n        pass", "        pass"))
    assert holds_answer("def launch(x):\n    return x\n")


def test_an_answer_is_never_overwritten(tmp_path, monkeypatch, capsys):
    (tmp_path / "solutions").mkdir()
    (tmp_path / "exercises").mkdir()
    (tmp_path / "solutions" / SMALL.file).write_text(SOLUTION)
    monkeypatch.setattr(skeletons, "load_course", lambda: Course(tmp_path, (SMALL,)))
    path = tmp_path / "exercises" / SMALL.file
    assert skeletons.main(["--check"]) == 1 and not path.exists()
    assert skeletons.main([]) == 0 and path.read_text() == SKELETON
    assert skeletons.main(["--check"]) == 0
    path.write_text(SKELETON.replace("Chapter 07", "Chapter 7"))
    assert skeletons.main([]) == 0 and path.read_text() == SKELETON  # out of date, and nobody's work
    answer = SKELETON.replace('raise NotImplementedError("7.3 launch is not written yet")', "return x")
    path.write_text(answer)
    capsys.readouterr()
    assert skeletons.main([]) == 1 and path.read_text() == answer
    assert "holds an answer: move it away first" in capsys.readouterr().out


# --- the real course ---------------------------------------------------------------------------------------

COURSE = load_course(ROOT)
WITH_EXERCISES = [chapter for chapter in COURSE.chapters if chapter.exercises]


@pytest.mark.parametrize("chapter", WITH_EXERCISES, ids=lambda chapter: chapter.stem)
def test_exercises_still_hold_every_line_of_their_skeleton(chapter):
    """True before and after somebody has solved them."""
    skeleton = skeleton_of(chapter, COURSE)
    assert missing_lines(skeleton, (ROOT / "solutions" / chapter.file).read_text()) == []
    text = (ROOT / "exercises" / chapter.file).read_text()
    assert missing_lines(skeleton, text) == [], "run: python -m flash_edu.course.skeletons"
    assert {region.exercise for region in find_regions(skeleton, chapter)} == set(chapter.exercises)
    if os.environ.get("CI"):  # there, nobody solves anything
        assert text == skeleton, "run: python -m flash_edu.course.skeletons"


@pytest.mark.parametrize("chapter", WITH_EXERCISES, ids=lambda chapter: chapter.stem)
def test_every_untouched_exercise_is_not_written_yet(chapter, tmp_path):
    for other in WITH_EXERCISES:
        (tmp_path / other.file).write_text(skeleton_of(other, COURSE))
    events = run_tests(COURSE, chapter, chapter.exercises, tmp_path, 300)
    assert not obstacle(events, chapter.exercises)
    regions = find_regions(skeleton_of(chapter, COURSE), chapter)
    for exercise in chapter.exercises:
        result = judge(exercise, events, regions, [])
        passing = [claim.text for claim in result.claims if claim.status == "pass"]
        assert result.status == "unwritten", result
        assert {claim.status for claim in result.claims} <= {"unwritten", "pass"}, result
        assert len(passing) <= len(result.claims) / 2, f"{exercise.label} is not needed for {passing}"


COLLECTOR = """
import inspect, json, sys

def pytest_collection_modifyitems(items):
    tests = []
    for item in items:
        ids = [mark.args[0] for mark in item.iter_markers("exercise")]
        tests.append([item.path.name, item.originalname, ids, inspect.getdoc(item.function) or ""])
    sys.stderr.write(json.dumps(tests))
"""


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> list:
    """Every test in tests/chapters: its file, its name, the exercises it is marked with, its docstring."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "collector.py").write_text(COLLECTOR)
    command = [sys.executable, "-m", "pytest", "-p", "collector", "--collect-only", "-q", "tests/chapters"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    return json.loads(run.stderr.splitlines()[-1])


def test_every_claim_names_its_exercise_and_every_exercise_has_three(collected):
    claims = {exercise.id: {} for exercise in COURSE.exercises}
    for file, name, ids, text in collected:
        assert len(ids) == 1 and ids[0] in claims, f"{file}, {name}: marked {ids}, not one exercise of the manifest"
        assert file == COURSE.find(ids[0])[0].test_file, f"{file}, {name}: {ids[0]} is of another chapter"
        assert text, f"{file}, {name}: a test without a claim"
        claims[ids[0]].setdefault(text.splitlines()[0], set()).add(name)
    for id, tests in claims.items():
        assert len(tests) >= 3, f"{id} has {len(tests)} claims"
        assert all(len(names) == 1 for names in tests.values()), f"{id}: two tests make one claim: {tests}"
        assert max(map(len, tests)) <= 100, f"{id}: a claim is longer than a line"


@pytest.mark.parametrize("chapter", WITH_EXERCISES, ids=lambda chapter: chapter.stem)
def test_every_failure_says_what_is_wrong(chapter):
    tree = ast.parse((ROOT / "tests" / "chapters" / chapter.test_file).read_text())
    silent = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert) and node.msg is None]
    assert silent == [], f"asserts without a message, in lines {silent}"


def test_there_are_no_tests_and_no_answers_that_the_manifest_does_not_know():
    known = {chapter.file for chapter in WITH_EXERCISES}
    for folder in ("exercises", "solutions"):
        assert {path.name for path in (ROOT / folder).glob("ch*.py")} == known
    tests = {path.name for path in (ROOT / "tests" / "chapters").glob("test_*.py")}
    assert tests == {chapter.test_file for chapter in WITH_EXERCISES}
