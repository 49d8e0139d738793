"""exercises/course.toml: what it says holds, wrong ones are refused with the reason, names are found."""
import ast
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from small_course import EXERCISE
import torch

from flash_edu.course import device, machine, on_gpu, size, toy
from flash_edu.course.hints import with_hints
from flash_edu.course.notebooks import to_text
from flash_edu.course.readme import with_table
from flash_edu.course.manifest import CourseError, course_root, load_course

ROOT = Path(__file__).resolve().parents[2]

CHAPTER = """
[[chapter]]
number = {number}
slug = "adding"
title = "Adding"
part = "I"
idea = "Two numbers make one."
minutes = 5
notebook = "{number:02d}_adding.ipynb"
needs = ["torch"]
"""


def write_course(root: Path, text: str) -> Path:
    (root / "exercises").mkdir(parents=True, exist_ok=True)
    (root / "exercises" / "course.toml").write_text(text)
    return root


def small_course(root: Path) -> Path:
    names = [("2.2", 2, "twice"), ("2.1", 2, "add"), ("2.10", 2, "many"), ("3.1", 3, "add")]
    exercises = [EXERCISE.format(id=id, chapter=chapter, name=name, function=name) for id, chapter, name in names]
    return write_course(root, CHAPTER.format(number=3) + CHAPTER.format(number=2) + "".join(exercises))


# --- the real one ------------------------------------------------------------------------------------------


def test_every_file_of_the_course_exists():
    course = load_course(ROOT)
    assert len(course.exercises) >= 20
    assert course.missing_files() == []


def test_every_exercise_has_a_size_hints_and_a_place_in_its_chapter():
    for chapter in load_course(ROOT).chapters:
        steps = [exercise.id for exercise in chapter.exercises]
        assert steps == [f"{chapter.number}.{n}" for n in range(1, len(steps) + 1)]
        for exercise in chapter.exercises:
            assert exercise.minutes > 0, exercise
            assert 2 <= len(exercise.hints) <= 4 and len(set(exercise.hints)) == len(exercise.hints), exercise


def test_every_exercise_is_a_documented_function_of_its_chapter():
    for chapter in load_course(ROOT).chapters:
        for exercise in chapter.exercises:
            tree = ast.parse((ROOT / "solutions" / chapter.file).read_text())
            named = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
            found = [node for node in named if node.name == exercise.function]
            assert found, f"{exercise.label}: solutions/{chapter.file} has no {exercise.function}"
            assert ast.get_docstring(found[0]), f"{exercise.label}: {exercise.function} has no docstring"


# --- finding -----------------------------------------------------------------------------------------------


def test_chapters_and_exercises_are_sorted_by_number(tmp_path):
    course = load_course(small_course(tmp_path))
    assert [exercise.id for exercise in course.exercises] == ["2.1", "2.2", "2.10", "3.1"]


@pytest.mark.parametrize(
    "what, ids",
    [("2", ["2.1", "2.2", "2.10"]), (2, ["2.1", "2.2", "2.10"]), ("02", ["2.1", "2.2", "2.10"])]
    + [("3", ["3.1"]), ("2.1", ["2.1"]), (" 2.10 ", ["2.10"]), ("2.twice", ["2.2"])]
    + [("twice", ["2.2"]), ("3.add", ["3.1"])],
)
def test_a_chapter_or_an_exercise_is_found_by_number_and_by_name(tmp_path, what, ids):
    chapter, exercises = load_course(small_course(tmp_path)).find(what)
    assert [exercise.id for exercise in exercises] == ids
    assert {exercise.chapter for exercise in exercises} == {chapter.number}


@pytest.mark.parametrize(
    "what, said",
    [("twise", 'Did you mean "twice"'), ("2.twise", '"2.twice"'), ("2.3", '"2.2"'), ("add", '"2.1" or "3.1"')]
    + [("nothing like it", "exercises/course.toml lists them"), ("7", 'no chapter or exercise "7"')],
)
def test_a_name_that_is_not_there_is_answered_with_near_ones(tmp_path, what, said):
    with pytest.raises(CourseError) as error:
        load_course(small_course(tmp_path)).find(what)
    assert said in str(error.value)


def test_what_follows_an_exercise(tmp_path):
    course = load_course(small_course(tmp_path))
    after = [course.after(exercise) for exercise in course.exercises]
    assert [exercise and exercise.id for exercise in after] == ["2.2", "2.10", "3.1", None]


def test_the_course_is_found_from_below_and_from_elsewhere(tmp_path, monkeypatch):
    (small_course(tmp_path) / "notebooks" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notebooks" / "deep")
    assert course_root() == tmp_path
    monkeypatch.chdir("/")
    assert course_root() == ROOT


def test_without_a_course_the_error_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flash_edu.course.manifest.__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(CourseError, match="No exercises/course.toml in .*clone"):
        course_root()


def test_missing_files_are_named(tmp_path):
    missing = load_course(small_course(tmp_path)).missing_files()
    assert "solutions/ch02_adding.py" in missing and "notebooks/03_adding.ipynb" in missing
    assert "tests/chapters/test_ch02_adding.py" in missing and "exercises/ch03_adding.py" in missing


# --- refusing ----------------------------------------------------------------------------------------------


GOOD = CHAPTER.format(number=2) + EXERCISE.format(id="2.1", chapter=2, name="add", function="add")


@pytest.mark.parametrize(
    "text, said",
    [
        (GOOD + GOOD, "chapter 2 is there twice"),
        (GOOD + GOOD, "exercise 2.1 is there twice"),
        (GOOD.replace('"2.1"', '"3.1"'), 'the id should be "2.1"'),
        (GOOD.replace("chapter = 2", "chapter = 4"), "there is no chapter 4"),
        (GOOD.replace("minutes = 5", "", 1), "chapter 2: minutes is missing"),
        (GOOD + "hintz = []", "exercise 2.1: unknown key hintz"),
        (GOOD.replace("difficulty = 1", "difficulty = 7"), "difficulty is 7"),
        (GOOD.replace("difficulty = 1", 'difficulty = "1"'), "difficulty is '1', which is not a whole"),
        (GOOD.replace('hints = ["One.", "Two."]', 'hints = "One."'), "hints is 'One.', which is not a list"),
        (GOOD.replace('needs = ["torch"]', 'needs = ["quantum"]'), "needs 'quantum'"),
        (GOOD + "\n[[lesson]]\nid = 1", 'unknown table "lesson"'),
        (GOOD + "\n[[", "not valid TOML"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_reason(tmp_path, text, said):
    load_course(write_course(tmp_path, GOOD))
    with pytest.raises(CourseError) as error:
        load_course(write_course(tmp_path, text))
    assert said in str(error.value)


# --- the toy -----------------------------------------------------------------------------------------------


def test_the_toy_is_small_enough_to_check_by_hand():
    assert toy.words == ["the", "cat", "sat", "down"]
    assert toy.q.shape == toy.k.shape == toy.scores.shape == (4, 4) and toy.v.shape == (4, 2)
    for numbers in (toy.q, toy.k, toy.v, toy.scores):
        assert numbers.dtype == torch.float32 and numbers.device.type == "cpu"
        assert torch.equal(numbers, numbers.round())
    assert toy.scale == 4**-0.5
    assert toy.scores.tolist() == [[4, 1, 0, 2], [2, 2, 2, 2], [1, 3, 2, 5], [-3, -1, -4, -2]]
    assert torch.equal(toy.scores, toy.q @ toy.k.T * toy.scale)


def test_the_toys_rows_show_different_things():
    assert toy.scores[0].argmax() == 0 and toy.scores[2].argmax() == 3
    assert torch.equal(toy.scores[1].softmax(dim=0) @ toy.v, torch.tensor([1.0, 2.0]))
    assert toy.scores[3].max() < 0
    assert len({row.sum().item() for row in toy.v}) > 1  # otherwise out.sum() would not depend on q and k


@pytest.mark.parametrize("on_gpu, expected", [(True, 4096), (False, 256)])
def test_sizes_are_picked_by_the_machine(monkeypatch, on_gpu, expected):
    monkeypatch.setitem(size.__globals__, "on_gpu", on_gpu)
    assert size(gpu=4096, cpu=256) == expected


def test_the_machine_is_told_in_one_line():
    assert on_gpu == (device == "cuda") and torch.zeros(1, device=device).device.type == device
    assert f"torch {torch.__version__}" in machine() and "\n" not in machine()
    assert (torch.cuda.is_available() and torch.cuda.get_device_name() in machine()) or "CPU" in machine()


def test_importing_the_course_loads_no_more_than_it_must():
    code = "import sys, flash_edu; old = set(sys.modules)\nimport flash_edu.course; print(*set(sys.modules) - old)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    new = set(run.stdout.split())
    assert "flash_edu.course" in new
    assert not new & {"pytest", "matplotlib", "rich", "typer", "IPython", "torch.optim", "triton"}


def test_the_readme_shows_the_chapters_of_the_manifest():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(readme, load_course(ROOT)) == readme, "run: python -m flash_edu.course.readme"


def test_the_notebooks_show_the_hints_of_the_manifest():
    for chapter in load_course(ROOT).chapters:
        text = (ROOT / "notebooks" / chapter.notebook).read_text(encoding="utf-8")
        shown = to_text(with_hints(nbformat.reads(text, as_version=4), chapter))
        assert shown == text, f"{chapter.notebook}: run python -m flash_edu.course.hints"
        for exercise in chapter.exercises:
            assert f'"id": "hints-{exercise.id.replace(".", "-")}"' in text, f"{chapter.notebook} never checks {exercise.label}"
