"""A wrong answer is compared with the known mistakes: named if it fails as one of them does, and only then."""
import pytest
from small_course import changed, check, make_course

from flash_edu.course.diagnosis import same_failure
from flash_edu.course.mistakes import catalogue_path

TABLE = '''
[[mistake]]
exercise = "{exercise}"
name = "{name}"
old = """{old}"""
new = """{new}"""
explanation = "Why it is wrong. What to look at."
see = "Heading"
'''
LOAD = "y = tl.load(X + i, mask=i < N) * 2"
MISTAKES = [
    ("1.1", "b is subtracted", "return a + b", "return a - b"),
    ("1.1", "b is added twice", "return a + b", "return a + 2 * b"),
    ("1.1", "b is doubled", "return a + b", "b = b * 2\n    return a + b"),
    ("1.1", "it is 3 too many", "return a + b", "return a + b + 3"),
    ("1.2", "the results are swapped", "return divmod(a, b)", "return divmod(a, b)[::-1]"),
    ("1.2", "it never ends", "return divmod(a, b)", "while True:\n        pass"),
    ("1.2", "nothing is returned", "return divmod(a, b)", "divmod(a, b)"),
    ("1.3", "the numbers are not doubled", LOAD, LOAD.replace(" * 2", "")),
    ("1.3", "the numbers are tripled", LOAD, LOAD.replace("2", "3")),
]
NO_NUMBERS = ["the numbers are not doubled", "the numbers are tripled"]  # their claim says no more than "1 doubled is 2"


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        course = make_course(tmp_path_factory.mktemp("course").resolve(), patch)
        path = catalogue_path(course.chapters[0], course)
        path.parent.mkdir()
        path.write_text("".join(TABLE.format(exercise=e, name=n, old=o, new=w) for e, n, o, w in MISTAKES))
        yield course


def suspects(course, what, **lines):
    (result,) = check(course, changed(**lines), what).results
    assert result.diagnosed
    return [mistake.name for mistake in result.suspects]


@pytest.mark.parametrize(
    "what, lines, names",
    [
        ("1.1", {"add": "return a + -b"}, ["b is subtracted"]),
        ("1.1", {"add": "return b + a + b"}, ["b is added twice", "b is doubled"]),  # they are one mistake
        ("1.1", {"add": "return a + b + 0.001"}, []),
        ("1.1", {"add": "return a - 2 * b"}, []),  # two mistakes at once
        ("1.2", {"fraction": "return a % b, a // b"}, ["the results are swapped"]),
        ("1.2", {"fraction": "b = divmod(a, b)"}, ["nothing is returned"]),  # an error, told by its first line
        ("1.3", {"load": "y = tl.load(X + i, mask=i < N) * 1.0"}, NO_NUMBERS),
        ("1.1", {"add": "return a - b if b == 2 else a + b + (b == 0)"}, []),  # as b subtracted, but what that fails, it passes
    ],
)
def test_who_is_named(course, what, lines, names):
    assert suspects(course, what, **lines) == names


def test_what_the_report_says(course):
    named = check(course, changed(add="return a + -b"), "1.1").text()
    assert "  This is what you get when\n    b is subtracted.\n        Why it is wrong. What to look at.\n" in named
    assert 'See "Heading" in the notebook.' in named and named.index("b is subtracted") < named.index("FAIL")
    assert "b is subtracted." in check(course, changed(add="return a + -b"), "1.1").html()
    several = check(course, changed(add="return b + a + b"), "1.1").text()
    assert "Each of these mistakes gives exactly this:" in several and several.count("Why it is wrong") == 2
    unknown = check(course, changed(add="return a + b + 0.001"), "1.1").text()
    assert "No mistake that we know gives exactly this. The numbers below say where it begins." in unknown
    stopped = check(course, changed(add="return a + nothing"), "1.1").text()
    assert "No mistake that we know gives exactly this. The line below is where your code stopped." in stopped
    assert "mistake" not in check(course, changed(), "1.1").text()


def test_once_a_mistake_is_named_only_the_first_failure_is_explained(course):
    unknown = check(course, changed(add="return a + b + 4"), "1.1").text()
    assert "gave 7" in unknown and "not true: assert answer.add(7, 0) == 7" in unknown
    named = check(course, changed(add="return 3 + a + b"), "1.1").text()
    assert "3 too many" in named and "gave 6" in named and "not true" not in named and "FAIL  adding 0 changes nothing" in named


def test_an_exercise_without_mistakes_says_nothing_of_them(course):
    (result,) = check(course, changed(rest="return 7"), "1.5").results
    assert result.status == "fail" and not result.diagnosed and result.suspects == ()


@pytest.mark.parametrize(
    "one, other, same",
    [
        ("l = 2.18512, expected 1.20344", "l = 2.18513, expected 1.20344", True),
        ("l = 2.18512, expected 1.20344", "l = 2.28512, expected 1.20344", False),
        ("51 of 64 values are wrong", "52 of 64 values are wrong", False),
        ("O[0, 1] = nan", "O[0, 1] = nan", True),
        ("O[0, 1] = nan", "O[0, 1] = inf", False),
        ("dq is too large", "dk is too large", False),
        ("1e-07 off", "1.0000001e-07 off", True),
        ("-0.5", "0.5", False),
    ],
)
def test_the_same_failure(one, other, same):
    assert same_failure(("fail", one), ("fail", other)) == same
    assert not same_failure(("fail", one), ("error", one))
    assert not same_failure(("pass", ""), ("pass", ""))


def test_once_a_mistake_is_named_a_later_step_of_the_same_function_is_told_in_short(course):
    told = check(course, changed(load=LOAD.replace("2", "3"), add="return a + b + 0.5"), "1").text()
    assert "the numbers are tripled" in told
    assert "\nFAIL  1.4 negate\n      Mend 1.3 double first." in told
    assert "add(1, 2) gave" in told  # another function: it keeps its numbers
