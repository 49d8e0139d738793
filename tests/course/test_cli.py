"""flash-edu next, hint, progress, reset, solution, check --watch: what they print, keep and refuse."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from small_course import ROOT, SOLUTION, changed, make_course
from typer.testing import CliRunner

from flash_edu.course.cli import app
from flash_edu.course.judging import run_check
from flash_edu.course.progress import Record, current, load_progress
from flash_edu.course.skeletons import make_skeleton

FILE = "ch01_small.py"


@pytest.fixture
def course(tmp_path, monkeypatch):
    """Fresh for each test: these commands write."""
    course = make_course(tmp_path.resolve(), monkeypatch)
    monkeypatch.chdir(tmp_path)
    return course


def flash_edu(*arguments, code=0, typed=None):
    result = CliRunner().invoke(app, arguments, input=typed)
    assert result.exit_code == code, result.output
    return result.output


def write(course, text):
    (course.root / "exercises" / FILE).write_text(text)


def written(course):
    return (course.root / "exercises" / FILE).read_text()


# --- progress ----------------------------------------------------------------------------------------------


def test_checks_are_counted_and_the_first_pass_is_kept(course):
    run_check("1", course=course)
    assert load_progress(course).records == {}, "an untouched file is no attempt"
    write(course, changed(add="return a - b"))
    run_check("1.1", course=course)
    write(course, SOLUTION)
    run_check("1.1", course=course)
    first = load_progress(course)
    assert first.of(course.exercises[0]).checks == 2 and first.passed(course.exercises[0])
    assert current(course, first).id == "1.2"
    run_check("1.1", target="solutions", course=course)
    assert load_progress(course).of(course.exercises[0]) == first.of(course.exercises[0]), "only the learner's own files count"
    assert "1 of 5" in flash_edu("progress") and "1.1 ✓" in flash_edu("progress")
    assert "1.2 fraction, about 5 minutes" in flash_edu("next")


def test_progress_belongs_to_names_not_to_positions(course):
    progress = load_progress(course)
    progress.checked(course.exercises[1], passed=True)
    progress.save()
    manifest = course.root / "exercises" / "course.toml"
    manifest.write_text(manifest.read_text().replace('id = "1.2"', 'id = "1.9"'))
    assert "1.9 ✓" in flash_edu("progress")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"exercises": {"1.add": 3}}', '{"exercises": {"1.add": {"hints": "x"}}}'])
def test_a_progress_file_that_makes_no_sense_is_set_aside(course, text):
    path = course.root / ".flash_edu" / "progress.json"
    path.parent.mkdir()
    path.write_text(text)
    assert "could not be read. It is kept as .flash_edu/progress.unreadable-1.json" in flash_edu("next")
    assert path.with_name("progress.unreadable-1.json").read_text() == text
    path.write_text(text)
    assert "unreadable-2.json" in flash_edu("hint")
    assert json.loads(path.read_text()) == {"exercises": {"1.add": {"checks": 0, "hints": 1, "passed": ""}}}


def test_a_disk_that_cannot_be_written_to_withholds_no_report(course):
    (course.root / ".flash_edu").write_text("a file where the folder should be")
    write(course, SOLUTION)
    assert run_check("1.1", course=course).passed


def test_the_end_of_the_course(course):
    write(course, SOLUTION)
    run_check("1", course=course)
    for command in ("next", "hint", "solution", "check"):
        assert "Every exercise has passed" in flash_edu(command)


# --- hints and solutions -----------------------------------------------------------------------------------


def test_hints_come_one_at_a_time(course):
    assert flash_edu("hint") == "1.1 add, hint 1 of 2: One.\n"
    assert flash_edu("hint", "1.add").endswith("1.1 add, hint 2 of 2: Two.\n")
    assert "That is all. The solution: flash-edu solution 1.1 --anyway" in flash_edu("hint")
    assert flash_edu("hint", "1.3") == "1.3 double, hint 1 of 2: One.\n"
    assert load_progress(course).of(course.exercises[0]) == Record(hints=2)
    assert "several exercises: 1.1, 1.2" in flash_edu("hint", "1", code=1)
    assert 'There is no chapter or exercise "1.7"' in flash_edu("hint", "1.7", code=1)
    assert "Chapter 2 has no exercises" in flash_edu("hint", "2", code=1)


def test_help_comes_at_once():
    """A learner who asks for a hint does not wait for torch."""
    code = "import sys, flash_edu.course.cli as cli; cli.app(['hint', '4.1'], standalone_mode=False); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "4.1 tiled_attention, hint 1" in said and not {"torch", "triton", "numpy"} & set(said.split())


def test_a_solution_is_shown_after_passing_or_if_asked_for_twice(course):
    assert "has not passed yet. A hint: flash-edu hint 1.3" in flash_edu("solution", "1.3", code=1)
    shown = flash_edu("solution", "1.3", "--anyway")
    assert "# in double_kernel: load x and double it\ny = tl.load(X + i, mask=i < N) * 2\n" in shown
    assert "tl.store(Y + i, y, mask=i < N)" in shown and "NEGATE" not in shown
    write(course, SOLUTION)
    run_check("1.2", course=course)
    assert "return divmod(a, b)" in flash_edu("solution", "1.2")


# --- reset -------------------------------------------------------------------------------------------------


def test_reset_asks_and_keeps_a_backup(course):
    write(course, SOLUTION)
    assert "Nothing was changed" in flash_edu("reset", "1.3", code=1, typed="n\n")
    assert written(course) == SOLUTION
    said = flash_edu("reset", "1.3", typed="y\n")
    assert "1.3 double: not written any more. What you wrote is in .flash_edu/backups/ch01_small-" in said
    (backup,) = (course.root / ".flash_edu" / "backups").iterdir()
    assert backup.read_text() == SOLUTION
    report = run_check("1", course=course)
    assert [result.status for result in report.results] == ["pass", "pass", "unwritten", "unwritten", "pass"]
    flash_edu("reset", "1", "--yes")
    assert written(course) == make_skeleton(SOLUTION, course.chapters[0])


def test_reset_without_marks_or_file(course):
    write(course, SOLUTION.replace("# end of your code", "# the end", 1))
    assert "Reset the whole chapter: flash-edu reset 1" in flash_edu("reset", "1.3", "--yes", code=1)
    (course.root / "exercises" / FILE).unlink()
    flash_edu("reset", "1", "--yes")
    assert written(course) == make_skeleton(SOLUTION, course.chapters[0])


# --- check -------------------------------------------------------------------------------------------------


def test_check_without_a_name_judges_where_the_learner_is(course):
    write(course, SOLUTION)
    assert "1.1 add" in flash_edu("check") and "1.2 fraction" in flash_edu("check")


def test_watch_judges_again_when_the_file_is_saved(course):
    command = [sys.executable, "-m", "flash_edu.course.cli", "check", "1.2", "--watch"]
    log = course.root / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, cwd=course.root, env=os.environ | {"PYTHONUNBUFFERED": "1"})
        try:
            _until(log, "Watching ch01_small.py")
            assert "1.2 fraction: not written yet" in log.read_text()
            write(course, SOLUTION)
            _until(log, "All 1 claims hold", "1 of 1 claims hold")
            _until(log, "Watching", times=2)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        finally:
            process.kill()


def _until(log, *texts, times=1):
    for _ in range(400):
        if any(log.read_text().count(text) >= times for text in texts):
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())
