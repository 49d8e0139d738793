"""The kill matrix: every catalogued mistake fails a named claim, and its own diagnosis names it."""
import dataclasses
import re

import nbformat
import pytest
from small_course import ROOT, SOLUTION, make_course

from flash_edu.course.judging import run_check
from flash_edu.course.kill_matrix import kill_matrix, main
from flash_edu.course.manifest import CourseError, load_course
from flash_edu.course.mistakes import catalogue_path, load_mistakes

COURSE = load_course(ROOT)
CHAPTERS = [chapter for chapter in COURSE.chapters if chapter.exercises]
FEWEST, FEWEST_IN_ALL = 5, 60
MOST_ALIKE = 4  # mistakes that one failing claim cannot tell apart; the claims after it may


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_every_mistake_is_caught_and_named(chapter):
    fates = kill_matrix(chapter, COURSE)
    alive = [str(fate.mistake) for fate in fates if not fate.claim]
    assert not alive, "no claim catches these: sharpen the tests, or drop what is no mistake\n" + "\n".join(alive)
    unnamed = [str(fate.mistake) for fate in fates if fate.mistake.name not in fate.alike]
    assert not unnamed, "its failure changes from run to run, or between folders\n" + "\n".join(unnamed)
    crowded = [f"{fate.mistake}: {fate.alike}" for fate in fates if len(fate.alike) > MOST_ALIKE]
    assert not crowded, "too many fail with the same message: let it show numbers\n" + "\n".join(crowded)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_every_exercise_has_mistakes_with_names_and_explanations(chapter):
    mistakes = load_mistakes(chapter, COURSE)
    for exercise in chapter.exercises:
        own = [mistake.name for mistake in mistakes if mistake.exercise == exercise.id]
        assert len(own) >= FEWEST, f"{exercise.label} has {len(own)} mistakes"
        assert len(set(own)) == len(own), f"{exercise.label}: two mistakes have one name"
    headings = _headings(chapter)
    for mistake in mistakes:
        assert not mistake.name.endswith("."), mistake
        assert len(re.findall(r"[.?!](?: |$)", mistake.explanation)) >= 2, f"{mistake}: explain it in two or three sentences"
        assert mistake.see in headings, f'{mistake}: notebooks/{chapter.notebook} has no heading "{mistake.see}"'


NOISE = '''

def _noisy(function):
    def noisy(*args, **kwargs):
        got = function(*args, **kwargs)
        parts = got if isinstance(got, tuple) else (got,)
        parts = tuple(x * (1 + 0.1 * torch.rand(x.shape, generator=_noise)) if _is_float(x) else x for x in parts)
        return parts if isinstance(got, tuple) else parts[0]
    return noisy


def _is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


_noise = torch.Generator().manual_seed(0)
for _name in ({names}):
    globals()[_name] = _noisy(globals()[_name])
'''


NO_TENSORS = (0, 2)  # chapters whose answers are plain numbers


@pytest.mark.parametrize("chapter", [c for c in CHAPTERS if c.number not in NO_TENSORS], ids=lambda chapter: chapter.stem)
def test_what_is_no_known_mistake_is_not_named(chapter, tmp_path):
    """Every function returns its tensors with noise on them."""
    text = (ROOT / "solutions" / chapter.file).read_text()
    names = re.findall(r"^def (\w+)\(", text, re.MULTILINE)
    plain = [name for name in names if f"jit\ndef {name}(" not in text and "_shapes" not in name]
    report = _judged(chapter, text + NOISE.replace("{names}", repr(plain)[1:-1] + ","), tmp_path)
    failed = [result for result in report.results if result.diagnosed]
    assert failed and not any(result.suspects for result in failed), report.text()


OFF = '''

def _off(function):
    return lambda *args: _moved(function(*args))


def _moved(x):
    if isinstance(x, tuple):
        return tuple(map(_moved, x))
    if isinstance(x, dict):
        return {name: _moved(value) for name, value in x.items()}
    return type(x)(1.37 * x + 5) if isinstance(x, (int, float)) else x


for _name in ({names}):
    globals()[_name] = _off(globals()[_name])
'''


@pytest.mark.parametrize("chapter", [c for c in CHAPTERS if c.number in NO_TENSORS], ids=lambda chapter: chapter.stem)
def test_numbers_of_no_known_mistake_are_not_named(chapter, tmp_path):
    """Every function returns its numbers moved."""
    text = (ROOT / "solutions" / chapter.file).read_text()
    names = [exercise.function for exercise in chapter.exercises]
    report = _judged(chapter, text + OFF.replace("{names}", repr(names)[1:-1] + ","), tmp_path)
    failed = [result for result in report.results if result.diagnosed]
    assert len(failed) == len(names) and not any(result.suspects for result in failed), report.text()


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_two_mistakes_at_once_are_reported(chapter, tmp_path):
    """Two in each exercise: they are caught, and nothing of the machinery's own shows."""
    text, mistakes = (ROOT / "solutions" / chapter.file).read_text(), load_mistakes(chapter, COURSE)
    for exercise in chapter.exercises:
        made = 0
        for mistake in (mistake for mistake in mistakes if mistake.exercise == exercise.id):
            if made < 2 and all(text.count(old) == 1 for old, _ in mistake.changes):
                text, made = mistake.made_in(text), made + 1
    report = _judged(chapter, text, tmp_path)
    assert not report.problem and {result.status for result in report.results} <= {"fail", "error"}, report.text()
    assert "flash_edu/course" not in report.text() and "tests/chapters" not in report.text()


def _judged(chapter, text, folder):
    for path in (ROOT / "solutions").glob("*.py"):
        (folder / path.name).write_text(text if path.name == chapter.file else path.read_text())
    return run_check(chapter.number, target=str(folder), course=COURSE)


def _headings(chapter):
    cells = nbformat.read(ROOT / "notebooks" / chapter.notebook, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)


def test_the_catalogue_is_large_and_nothing_in_it_is_left_over():
    assert sum(len(load_mistakes(chapter, COURSE)) for chapter in CHAPTERS) >= FEWEST_IN_ALL
    known = {catalogue_path(chapter, COURSE) for chapter in CHAPTERS}
    assert set((ROOT / "solutions" / "mistakes").iterdir()) == known


# --- the machinery, on a small course ----------------------------------------------------------------------

MISTAKE = """
[[mistake]]
exercise = "1.2"
name = "{name}"
old = "{old}"
new = "{new}"
explanation = "One reason. Another."
see = "Heading"
"""
SWAPPED = MISTAKE.format(name="they are swapped", old="return divmod(a, b)", new="return divmod(a, b)[::-1]")


@pytest.fixture
def small(tmp_path, monkeypatch):
    return make_course(tmp_path.resolve(), monkeypatch)


def catalogue(course, *tables):
    path = catalogue_path(course.chapters[0], course)
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(tables))
    return course.chapters[0], course


def test_what_is_equivalent_survives(small, monkeypatch, capsys):
    same = MISTAKE.format(name="another way", old="return divmod(a, b)", new="return a // b, a % b")
    swapped, same = kill_matrix(*catalogue(small, SWAPPED, same))
    assert (swapped.claim, swapped.alike) == ("quotient and rest of 7 and 2", ("they are swapped",))
    assert swapped.message == "7 = 3 * 2 + 1" and same.claim == ""
    monkeypatch.chdir(small.root)
    assert main(["01"]) == 1
    assert "1.2  another way\n      SURVIVES" in capsys.readouterr().out


@pytest.mark.parametrize(
    "table, said",
    [
        (SWAPPED.replace("return divmod(a, b)", "return nothing"), "its old text is there 0 times, not once"),
        (SWAPPED.replace('old = "return divmod(a, b)"', 'old = "return"'), "times, not once"),
        (SWAPPED.replace("[::-1]", ""), "old and new are the same"),
        (SWAPPED.replace('"1.2"', '"1.7"'), "chapter 1 has no exercise 1.7"),
        (SWAPPED.replace("see =", "look ="), "see is missing, unknown key look"),
        (SWAPPED.replace('new = "', 'new = ["", "'), "is not valid TOML"),
        (SWAPPED.replace('new = "return divmod(a, b)[::-1]"', 'new = ["", ""]'), "old has 1 texts and new has 2"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(small, table, said):
    with pytest.raises(CourseError, match=re.escape(said)):
        kill_matrix(*catalogue(small, table))


def test_a_chapter_that_does_not_exist_is_not_called_proven():
    with pytest.raises(CourseError, match='no chapter or exercise "77"'):
        main(["77"])


def test_solutions_that_fail_prove_nothing(small):
    chapter, course = catalogue(small, SWAPPED)
    (course.root / "solutions" / chapter.file).write_text(SOLUTION.replace("return a + b", "return a - b"))
    with pytest.raises(CourseError, match="The solutions of chapter 1 do not pass"):
        kill_matrix(chapter, course)


def test_a_mistake_in_two_places(small):
    chapter, course = catalogue(small, SWAPPED)
    (mistake,) = load_mistakes(chapter, course)
    both = dataclasses.replace(mistake, changes=(("return a + b", "return a"), ("[1]\n", "[0]\n")))
    assert "return a\n" in both.made_in(SOLUTION) and "return fraction(a, b)[0]\n" in both.made_in(SOLUTION)
