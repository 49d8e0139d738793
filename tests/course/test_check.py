"""The check: what it says about right, wrong, broken and unwritten answers, on a small course made for that."""
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from small_course import LINES, ROOT, SOLUTION, TESTS, changed, check
from typer.testing import CliRunner

from flash_edu.course import check as check_in_notebook
from flash_edu.course.answers import answer_folder
from flash_edu.course.judging import CheckFailed, run_check
from flash_edu.course.cli import app
from flash_edu.course.report import COLOURS, FAIL, UNWRITTEN, Claim, Report, Result


def statuses(report: Report) -> dict[str, list[str]]:
    return {result.exercise.id: [claim.status for claim in result.claims] for result in report.results}


@pytest.fixture(scope="module")
def wrong(course) -> Report:
    """One answer with a mistake of another kind in each exercise."""
    lines = {
        "add": 'print("a is", a, "<i>")\n    return a - b',
        "fraction": "divmod(a, b)",
        "load": "y = tl.load(X + j, mask=i < N) * 2",
        "rest": "return [1][5]",
    }
    return check(course, changed(**lines))


# What a single untouched exercise is told: its claims, and what is left to write.
UNTOUCHED_DOUBLE = """1.3 double: not written yet
  todo  every number is doubled
Write 1.3 double between its marks in exercises/ch01_small.py, save, and check again.
Still empty: load x and double it; store y."""


def only(report: Report, id: str) -> str:
    """What the report says about one exercise when it is asked for alone."""
    return Report(tuple(result for result in report.results if result.exercise.id == id)).text()


# --- right and unwritten -----------------------------------------------------------------------------------


def test_a_right_answer_passes_and_is_told_what_is_next(course):
    report = check(course, SOLUTION)
    assert report.passed and report.colour == "green"
    assert report.text() == (
        "pass  1.1 add\n"
        "pass  1.2 fraction\n"
        "pass  1.3 double\n"
        "pass  1.4 negate\n"
        "pass  1.5 rest\n"
        "All 9 claims hold. Next: chapter 2, Small & <odd>, in notebooks/02_small.ipynb."
    )


def test_an_untouched_skeleton_is_not_written_yet(course):
    untouched = run_check("1", course=course)
    assert not untouched.passed and untouched.colour == "amber"
    assert {status for claims in statuses(untouched).values() for status in claims} == {"unwritten"}
    assert untouched.text() == (
        "todo  1.1 add: not written yet\n"
        "todo  1.2 fraction: not written yet\n"
        "todo  1.3 double: not written yet\n"
        "todo  1.4 negate: not written yet\n"
        "todo  1.5 rest: not written yet\n"
        "Write 1.1 add between its marks in exercises/ch01_small.py, save, and check again."
    )


def test_a_later_step_is_open_while_the_first_passes(course):
    untouched = (course.root / "exercises" / "ch01_small.py").read_text()
    stop = '    tl.static_assert(False, "1.3 double is not written yet")\n'
    double = "    tl.store(Y + i, y, mask=i < N)\n"
    text = untouched.replace(stop, f"    {LINES['load']}\n", 1).replace(stop, double, 1)
    left = '    raise NotImplementedError("1.1 add is not written yet")\n'
    text = text.replace(left, f"{left}    {LINES['add']}\n")
    text = text.replace('    raise NotImplementedError("1.5 rest is not written yet")', f"    {LINES['rest']}")
    report = check(course, text)
    assert statuses(report) == {
        "1.1": ["unwritten"] * 3,
        "1.2": ["unwritten"],
        "1.3": ["pass"],
        "1.4": ["unwritten", "pass"],  # an empty region fails by value, and is still no answer
        "1.5": ["unwritten"] * 2,
    }
    assert 'The line "1.1 add is not written yet" still stands among yours' in only(report, "1.1")
    assert "1.2 fraction is not written yet." in only(report, "1.5")  # it is what 1.5 waits for
    assert report.colour == "amber"


# --- wrong -------------------------------------------------------------------------------------------------


def test_a_wrong_value_is_told_in_the_words_of_the_claim(wrong):
    assert only(wrong, "1.1") == (
        "1.1 add\n"
        "  FAIL  the sum is <b>right</b>\n"
        "        add(1, 2) gave -1, expected 3\n"
        "        Your code printed:\n"
        '            a is 1 <i>\n'
        '            a is 1 <i>\n'
        "  pass  adding 0 changes nothing\n"
        "  pass  a word and a number do not add up"
    )


def test_of_much_that_was_printed_the_first_and_the_last_lines_are_shown_once(course):
    told = check(course, changed(add='print(*range(50), sep="\\n")\n    return 99'), "1.1").text()
    assert told.count("  FAIL  ") == 3 and told.count("Your code printed:") == 1
    printed = [line.strip() for line in told.split("Your code printed:\n")[1].split("\n  FAIL")[0].splitlines()]
    assert printed == [*map(str, range(20)), "(70 lines are left out here)", *map(str, range(40, 50))]


def test_a_function_that_returns_nothing_is_told_so(wrong):
    assert only(wrong, "1.2") == (
        "1.2 fraction\n"
        "  FAIL  quotient and rest of 7 and 2\n"
        "        The check could not use what your code gave back. A function that ends without `return` gives None.\n"
        "        TypeError: cannot unpack non-iterable NoneType object\n"
        "            quotient, rest = answer.fraction(7, 2)"
    )


def test_an_error_in_a_kernel_is_told_with_the_line_of_the_kernel(wrong):
    told = only(wrong, "1.3")
    assert "NameError: name 'j' is not defined" in told and "InterpreterError" not in told
    assert "in double_kernel\n            y = tl.load(X + j, mask=i < N) * 2" in told
    assert "mine/ch01_small.py, line 24, in double_kernel" in told


def test_an_exception_is_told_with_the_learners_line_once(wrong):
    assert only(wrong, "1.5") == (
        "1.5 rest\n"
        "  FAIL  the rest of 7 and 2 is 1\n"
        "        IndexError: list index out of range\n"
        "        mine/ch01_small.py, line 43, in rest\n"
        "            return [1][5]\n"
        "  FAIL  the rest of 9 and 2 is 1\n"
        "        stops at the same line as the first FAIL"
    )


@pytest.mark.parametrize(
    "load, said",
    [
        ("y = tl.load(X + 1000000 + i) * 2", r"loads 16 numbers, 16 of them outside of every tensor; .+ past the end of [XY]\. No mask"),
        ("y = tl.load(X - 9000000 + i, mask=i < N) * 2", r"loads 5 numbers, 5 of them outside of every tensor; .+ before the start of [XY]\. Its"),
        ("y = tl.load(X + i) * 2", r"loads 16 numbers, 11 of them outside of every tensor; the first is 0 bytes past the end of X\. No mask"),
    ],
)  # fmt: skip
def test_a_kernel_that_leaves_its_tensors_is_stopped(course, load, said):
    """Otherwise it reads whatever lies there, or ends Python."""
    told = only(check(course, changed(load=load)), "1.3")
    assert re.search(r"OutOfBounds: program \(0, 0, 0\) of double_kernel " + said, told)
    assert re.search(r"mine/ch01_small.py, line \d+, in double_kernel\n +y = tl.load", told)


def test_what_a_mask_leaves_out_of_a_load_is_not_zero(course):
    """On a GPU it is undefined without `other`; the interpreter's zeros would hide that."""
    mean = "y = 2 * (tl.sum(tl.load(X + i, mask=i < N{other})) / N + tl.zeros((BLOCK,), tl.float32))"
    assert check(course, changed(load=mean.format(other=", other=0.0")), "1.3").passed
    assert not check(course, changed(load=mean.format(other="")), "1.3").passed


def test_errors_that_differ_in_a_number_are_told_once(course):
    told = check(course, changed(rest="return [a, b][a]"), "1.5").text()
    assert told.count("list index out of range") == 1 and "stops at the same line as the first FAIL" in told
    told = check(course, changed(rest='raise ValueError(f"{a} is too large")'), "1.5").text()
    assert "7 is too large" in told and "9 is too large" not in told
    assert "stops at the same line as the first FAIL" in told


def test_what_was_told_before_says_where(course):
    told = [("a", FAIL, "x"), ("b", FAIL, "y"), ("c", FAIL, "y"), ("d", UNWRITTEN, "z"), ("e", UNWRITTEN, "z")]
    claims = tuple(Claim(*claim) for claim in told)
    text = Report((Result(course.find("1.1")[1][0], claims),)).text()
    assert '  FAIL  c\n        the same as "b"\n' in text and "  todo  e\n        the same as the first todo" in text


def test_a_changed_signature_is_told_in_words(course):
    told = only(check(course, changed(signature="def add(a):")), "1.1")
    assert "add() takes 1 positional argument but 2 were given.\n        The check calls it as the skeleton has it" in told


def test_memory_that_runs_out_is_told(course):
    told = only(check(course, changed(add="return torch.ones(10**9, 10**9)")), "1.1")
    assert "There is not enough memory for this. Is a tensor made that is much larger" in told and "mine/ch01_small.py" in told


def test_the_report_counts_and_says_what_to_do(wrong):
    assert not wrong.passed and wrong.colour == "red"
    assert wrong.advice == "2 of 9 claims hold. Mend the first FAIL, save, and check again."


def test_nothing_in_a_report_depends_on_the_machine(wrong, course):
    for text in (wrong.text(), wrong.html()):
        assert str(course.root) not in text and sys.prefix not in text and "site-packages" not in text


# --- broken ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines, said",
    [
        ("return (a + b", "Python cannot read mine/ch01_small.py, line 9: '(' was never closed\n    return (a + b"),
        ("return a\n\n\nimport torhc", "No module named 'torhc'\nmine/ch01_small.py, line 12\n    import torhc"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_told_with_its_line(course, lines, said):
    report = check(course, changed(add=lines))
    assert not report.passed and said in report.problem and "Nothing can be checked" in report.problem


def test_a_missing_function_and_an_endless_loop(course):
    loop = "import time\n    while True:\n        time.sleep(0.1)"
    report = check(course, changed(signature="def addition(a, b):", fraction=loop), seconds=10)
    assert statuses(report) == {
        "1.1": ["error"] * 3,
        "1.2": ["error"],
        "1.3": ["not run"],
        "1.4": ["not run"] * 2,
        "1.5": ["not run"] * 2,
    }
    assert "mine/ch01_small.py has no add. Was it renamed or deleted?" in only(report, "1.1")
    assert "did not finish within 10 seconds" in only(report, "1.2")
    assert "mine/ch01_small.py, line 1" in only(report, "1.2") and ", in fraction" in only(report, "1.2")
    assert not report.passed


def test_an_answer_that_leaves_python_does_not_pass(course):
    report = check(course, changed(rest='__import__("os")._exit(0)'), "1.5")
    assert statuses(report) == {"1.5": ["error", "not run"]}
    assert "Python ended with exit code 0 before the check did." in report.text() and not report.passed


def test_a_check_of_nothing_is_an_error(course):
    tests = course.root / "tests" / "chapters" / "test_ch01_small.py"
    tests.write_text(TESTS.replace('"1.3"', '"1.9"'))
    assert "No test makes a claim about 1.3 double" in check(course, SOLUTION).problem
    tests.write_text("import nothing_of_this_name")
    broken = check(course, SOLUTION)
    tests.write_text(TESTS)
    assert "could not be run" in broken.problem and "nothing_of_this_name" in broken.problem
    assert not broken.passed and not Report().passed


def test_a_target_is_a_name_in_the_course_or_a_path_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert answer_folder("solutions", ROOT) == ROOT / "solutions"
    assert answer_folder("mine", ROOT) == tmp_path / "mine"
    assert answer_folder(str(tmp_path), ROOT) == tmp_path


def test_what_cannot_be_checked_is_told_and_never_raised(course, tmp_path, capsys, monkeypatch):
    assert 'Did you mean "1.1"' in run_check("1.11", course=course).problem
    assert "Chapter 2 has no exercises" in run_check("2", course=course).problem
    assert "does not exist" in run_check("1", target=str(tmp_path), course=course).problem
    monkeypatch.chdir(course.root)
    monkeypatch.setenv("FLASH_EDU_TARGET", str(tmp_path))
    check_in_notebook("1")
    assert "ch01_small.py does not exist" in capsys.readouterr().out
    monkeypatch.setenv("FLASH_EDU_STRICT", "1")
    with pytest.raises(CheckFailed, match="does not exist"):
        check_in_notebook("1")


# --- shown -------------------------------------------------------------------------------------------------


class Words(HTMLParser):
    """The text of some HTML, and its tags."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(html)

    def handle_data(self, data):
        self.text += data

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


def test_the_box_says_what_the_text_says_and_escapes_it(wrong):
    assert "<b>right</b>" in wrong.text() and "<i>" in wrong.text()
    words = Words(wrong.html())
    assert words.text == wrong.text()
    assert words.tags.count("i") == 0
    assert words.tags.count("b") == sum(len(result.claims) for result in wrong.results)  # one label each
    bundle = wrong._repr_mimebundle_()
    assert bundle == {"text/plain": wrong.text(), "text/html": wrong.html()}


@pytest.mark.parametrize("page", [(255, 255, 255), (17, 17, 17)])
def test_colours_can_be_read_on_white_and_on_black(page):
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for name, colour in COLOURS.items():
        rgb = [int(pair, 16) for pair in re.findall("[0-9a-f]{2}", colour)]
        dark, light = sorted([luminance(rgb), luminance(page)])
        assert (light + 0.05) / (dark + 0.05) >= 3, name


def test_a_terminal_gets_colours_and_a_pipe_gets_text(wrong, capsys, monkeypatch):
    wrong.show()
    assert capsys.readouterr().out == wrong.text() + "\n"

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    wrong.show()
    shown = sys.stdout.getvalue()
    assert "\x1b[" in shown
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == wrong.text() + "\n"


def test_a_notebook_gets_a_box_and_runs_on(course):
    cells = ["from flash_edu.course import check", 'check("1.3")', 'check("1.33")', "print('still here')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(course.root / "exercises")}}).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert [len(of_cell) for of_cell in outputs] == [0, 1, 1, 1]
    assert outputs[1][0].data["text/plain"] == UNTOUCHED_DOUBLE
    assert outputs[1][0].data["text/html"].startswith('<div style="border-left')
    assert 'Did you mean "1.3"' in outputs[2][0].data["text/plain"]
    assert outputs[3][0].text == "still here\n"


def test_the_command_exits_with_0_only_if_all_pass(course, monkeypatch):
    monkeypatch.chdir(course.root / "tests")
    solved = CliRunner().invoke(app, ["check", "1.5", "--target", "solutions"])
    assert solved.exit_code == 0 and "pass  the rest of 7 and 2 is 1" in solved.output
    untouched = CliRunner().invoke(app, ["check", "1.double"])
    assert untouched.exit_code == 1 and untouched.output == UNTOUCHED_DOUBLE + "\n"
    unknown = CliRunner().invoke(app, ["check", "nonsense"])
    assert unknown.exit_code == 1 and "exercises/course.toml lists them" in unknown.output


def test_the_doctor_says_what_runs_here_and_why_not_the_rest(course, monkeypatch):
    monkeypatch.chdir(course.root)
    assert re.search("01  Small & <odd> +runs$", CliRunner().invoke(app, ["doctor"]).output, re.MULTILINE)
    monkeypatch.setattr("flash_edu.course.doctor.missing", lambda needs: ["an NVIDIA GPU"] if needs else [])
    assert re.search("01  Small & <odd> +needs an NVIDIA GPU$", CliRunner().invoke(app, ["doctor"]).output, re.MULTILINE)


def test_the_doctor_asks_a_product_whose_answer_is_known(monkeypatch):
    said = CliRunner().invoke(app, ["doctor"]).output
    assert torch.__version__ in said and all(re.search(f"{what} +right", said) for what in ("loop", "float32 dot", "float16 dot"))
    assert torch.cuda.is_available() or re.search("bfloat16 dot +wrong, as known", said)
    monkeypatch.setattr("flash_edu.course.known_answer.loop_kernel", None)  # what cannot be called: as in Triton 3.6 beside NumPy 2.4
    assert re.search("loop +WRONG: .*numpy<2.4", CliRunner().invoke(app, ["doctor"]).output)
    monkeypatch.setattr("flash_edu.course.known_answer.loops", lambda device: True)
    monkeypatch.setattr("flash_edu.course.known_answer.dot_error", lambda dtype, device: 1.0)
    monkeypatch.setattr("flash_edu.course.doctor.on_gpu", True)
    assert re.search("bfloat16 dot +WRONG", CliRunner().invoke(app, ["doctor"]).output)


def test_train_passes_its_options_on(monkeypatch):
    seen = []
    monkeypatch.setattr("flash_edu.training.__main__.main", lambda arguments: seen.append(arguments) or 3)
    assert CliRunner().invoke(app, ["train", "--steps", "5", "--help"]).exit_code == 3
    assert seen == [["--steps", "5", "--help"]]


# --- kernels that a GPU would compile ------------------------------------------------------------------------

KERNELS = """import triton
import triton.language as tl


@triton.jit
def unwritten(X, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.static_assert(False, "7.1 flash_forward is not written yet")


@triton.jit
def misnamed(X, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + j)


@triton.jit
def misused(X, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK))
    x = tl.dot(x, x)
"""


COMPILE = """
import json, sys
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from flash_edu.course.answers import load_answer
from flash_edu.course.explain import Places, explain

folder, root, kernel = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
function = getattr(load_answer(folder, "ch07_x"), kernel)
source = triton.compiler.ASTSource(function, {"X": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 16})
try:
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
except triton.CompilationError as error:
    print(json.dumps(explain(error, Places(folder, root))))
"""


@pytest.mark.parametrize(
    "kernel, status, said",
    [
        ("unwritten", "unwritten", "7.1 flash_forward is not written yet."),
        ("misnamed", "error", "j is not defined.*\n.*ch07_x.py, line 14, in misnamed\n    x = tl.load"),
        ("misused", "error", "equal ranks >= 2\n.*ch07_x.py, line 20, in misused\n    x = tl.dot"),
    ],
)
def test_a_kernel_that_does_not_compile_is_explained_as_in_the_interpreter(tmp_path, kernel, status, said):
    (tmp_path / "ch07_x.py").write_text(KERNELS)
    command = [sys.executable, "-c", COMPILE, str(tmp_path), str(ROOT), kernel]
    env = os.environ | {"TRITON_INTERPRET": "0"}  # hence a process of its own: the interpreter changes triton for good
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    got, message = json.loads(done.stdout)
    assert got == status and re.search(said, message), message
