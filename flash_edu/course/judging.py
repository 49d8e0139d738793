"""Judges an answer: runs the chapter's tests on it in a fresh Python, in limited time, and reports.

    check("4")              a chapter
    check("4.1")            an exercise, also check("4.tiled_attention")
"""
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from flash_edu.course.answers import answer_folder
from flash_edu.course.claims import claims_about
from flash_edu.course.explain import Places
from flash_edu.course.hardware import missing
from flash_edu.course.manifest import Chapter, Course, CourseError, Exercise, load_course
from flash_edu.course.marks import Region, find_regions
from flash_edu.course.mistakes import Mistake, load_mistakes
from flash_edu.course.progress import load_progress
from flash_edu.course.report import ERROR, FAIL, NOT_RUN, PASS, UNWRITTEN, Claim, Report, Result, held

SECONDS = 120
STARTING_SECONDS = 60  # for Python, torch and triton to be loaded


class CheckFailed(Exception):
    """Raised by check() only under FLASH_EDU_STRICT=1, for runs that must stop when an answer is wrong."""


def check(what: str | int, *, target: str | None = None, seconds: float = SECONDS) -> None:
    """Judges the chapter or exercise `what` and shows the report. Never raises: a notebook runs on."""
    report = run_check(what, target=target, seconds=seconds)
    report.show()
    if os.environ.get("FLASH_EDU_STRICT") == "1" and not report.passed:
        raise CheckFailed(report.text())


def run_check(
    what: str | int, *, target: str | None = None, seconds: float = SECONDS, course: Course | None = None
) -> Report:
    """The report on chapter or exercise `what` of `target`: "exercises", "solutions" or the path of a folder.

    Without a target, the environment variable FLASH_EDU_TARGET decides; without that, exercises. `seconds` is how
    long the tests may take.
    """
    target = target or os.environ.get("FLASH_EDU_TARGET") or "exercises"
    try:
        course = course or load_course()
        chapter, exercises = course.find(what)
        folder = answer_folder(target, course.root)
        _must_be_there(course, chapter, folder)
    except CourseError as error:
        return Report(problem=str(error))
    lacking = sorted({thing for exercise in exercises for thing in missing(exercise.needs)})
    if lacking:
        return Report(problem=f"This check needs {' and '.join(lacking)}, which this machine does not have.")
    regions = _regions(folder / chapter.file, chapter)
    results = _not_begun(course, chapter, exercises, regions)
    if not results:
        events = run_tests(course, chapter, exercises, folder, seconds)
        problem, mistakes = obstacle(events, exercises), load_mistakes(chapter, course)
        if problem:
            return Report(problem=problem)
        results = tuple(judge(exercise, events, regions, mistakes) for exercise in exercises)
        if folder == course.root / "exercises":
            _remember(course, results)
    return Report(results, advice=_advice(results, regions, course, chapter, f"{folder.name}/{chapter.file}"))


def _not_begun(
    course: Course, chapter: Chapter, exercises: tuple[Exercise, ...], regions: list[Region]
) -> tuple[Result, ...]:
    """The results if nothing has been written for any of these exercises; () if the tests must be run to know."""
    begun = {region.exercise for region in regions if not region.unwritten}
    marked = {region.exercise for region in regions}
    if begun.intersection(exercises) or not marked.issuperset(exercises):
        return ()
    tests = course.root / "tests" / "chapters" / chapter.test_file
    claims = [claims_about(exercise.id, tests) for exercise in exercises]
    if not all(claims):
        return ()
    return tuple(
        Result(exercise, tuple(Claim(text, UNWRITTEN) for text in texts)) for exercise, texts in zip(exercises, claims)
    )


def _remember(course: Course, results: tuple[Result, ...]) -> None:
    """Into the learner's progress. A disk that cannot be written to is no reason to withhold the report."""
    progress = load_progress(course)
    for result in results:
        if result.status != UNWRITTEN:
            progress.checked(result.exercise, result.status == PASS)
    with contextlib.suppress(OSError):
        progress.save()


def _must_be_there(course: Course, chapter: Chapter, folder: Path) -> None:
    if not chapter.exercises:
        raise CourseError(f"Chapter {chapter.number} has no exercises.")
    if not (folder / chapter.file).is_file():
        in_course = folder.parent == course.root
        restore = f" Restore it with: git checkout -- {folder.name}/{chapter.file}" if in_course else ""
        raise CourseError(f"{folder.name}/{chapter.file} does not exist.{restore}")
    if not (course.root / "tests" / "chapters" / chapter.test_file).is_file():
        raise CourseError(f"tests/chapters/{chapter.test_file} does not exist: nothing to check with.")


# --- running: what happens is told as events ---------------------------------------------------------------
#
# found   a claim will be tried on one input        start   that trial begins
# broken  the tests themselves could not be run     end     that trial has this status
# suspects   the known mistakes that fail as this answer does; of an exercise, the last event counts


def run_tests(
    course: Course,
    chapter: Chapter,
    exercises: tuple[Exercise, ...],
    folder: Path,
    seconds: float,
    *,
    make_mistakes: bool = False,
) -> list[dict]:
    """The events that the plugin wrote, completed if Python did not live to write the last one.

    make_mistakes: where the answer passes, also make every known mistake, and tell which claim catches it ("killed").
    """
    with tempfile.TemporaryDirectory() as scratch:
        results, output = Path(scratch, "results"), Path(scratch, "output")
        results.touch()
        only = ",".join(exercise.id for exercise in exercises)
        command = [sys.executable, "-m", "pytest", "-p", "flash_edu.course.plugin"]
        command += ["-p", "no:cacheprovider", "-p", "no:faulthandler"]  # the plugin uses faulthandler itself
        command += ["-c", os.devnull, "--rootdir", course.root, "--confcutdir", course.root]
        command += ["--assert=plain", "--tb=native"]  # explain.py tells the rest
        command += ["--target", folder, "--results", results, "--only", only, "--seconds", seconds]
        command += ["--make-mistakes"] * make_mistakes + [f"tests/chapters/{chapter.test_file}"]
        with output.open("w") as file:
            ending = _run([str(part) for part in command], course.root, file, seconds + STARTING_SECONDS)
        events = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        if events and events[-1]["event"] == "start":
            ending = _hung(results.with_suffix(".stack"), Places(folder, course.root), seconds) or ending
            last = {"event": "end", "status": ERROR, "message": ending, "loading": False}
            return [*events, {**events[-1], **last}]
        if not events:
            said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return [{"event": "broken", "message": "\n".join([ending, *said[-8:]])}]
        return events


def _run(command: list[str], root: Path, output, seconds: float) -> str:
    """Runs it, for so long at most; what there is to say if it ended too early."""
    # No bytecode: Python would run yesterday's if a file were saved twice in a second at the same length.
    settings = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
    settings["OMP_NUM_THREADS"] = "1"  # tensors are tiny: a pool of threads costs more than it saves
    process = subprocess.Popen(
        command,
        cwd=root,
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that whatever the answer starts ends with it
    )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"Python did not even start to check within {seconds:g} seconds."
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code < 0:
        name = signal.Signals(-code).name
        return f"Python was ended by {name}. Was memory outside of a tensor touched, or did memory run out?"
    return f"Python ended with exit code {code} before the check did."


def _hung(path: Path, places: Places, seconds: float) -> str:
    """If time ran out, that, and the line of the learner's that was running; otherwise ""."""
    stack = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not stack:
        return ""
    message = f"It did not finish within {seconds:g} seconds. Is there a loop that never ends?"
    for file, line, function in re.findall(r'File "(.+)", line (\d+) in (.+)', stack):  # innermost first
        if places.owns(file):
            code = Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1].strip()
            return f"{message} It was still here:\n{places.line(file, int(line), function, code)}"
    return message


# --- reading the events ------------------------------------------------------------------------------------


def obstacle(events: list[dict], exercises: tuple[Exercise, ...]) -> str:
    """What kept claims from being judged at all, or "" if nothing did."""
    broken = [event["message"] for event in events if event["event"] == "broken"]
    if broken:
        return f"The tests of this chapter could not be run.\n{broken[0]}"
    loading = [event["message"] for event in events if event["event"] == "end" and event["loading"]]
    if loading:
        return f"{loading[0]}\nNothing can be checked before that is mended."
    found = {event["exercise"] for event in events if event["event"] == "found"}
    untested = [exercise.label for exercise in exercises if exercise.id not in found]
    if untested:
        return f"No test makes a claim about {' or '.join(untested)}, so nothing was checked."
    return ""


def judge(exercise: Exercise, events: list[dict], regions: list[Region], mistakes: list[Mistake]) -> Result:
    """What the events say about one exercise, given the marked regions of the answer and the known mistakes."""
    own = [region for region in regions if region.exercise == exercise]
    mine = [event for event in events if event.get("exercise") == exercise.id]
    names = dict.fromkeys(event["claim"] for event in mine if event["event"] == "found")  # each once, in order
    claims = [_claim(name, [event for event in mine if event.get("claim") == name], own) for name in names]
    named = [event["names"] for event in mine if event["event"] == "suspects"]
    known = [mistake for mistake in mistakes if mistake.exercise == exercise.id]
    if not named or not known or not {FAIL, ERROR}.intersection(claim.status for claim in claims):
        return Result(exercise, tuple(claims))
    suspects = tuple(mistake for mistake in known if mistake.name in named[-1])
    return Result(exercise, tuple(claims), diagnosed=True, suspects=suspects)


def _claim(name: str, events: list[dict], own: list[Region]) -> Claim:
    """A claim may be tried on several inputs: it holds if every trial was made and passed."""
    trials = [event for event in events if event["event"] == "found"]
    ends = [event for event in events if event["event"] == "end"]
    bad = next((event for event in ends if event["status"] != PASS), None)
    if bad is None:
        return Claim(name, PASS if len(ends) == len(trials) else NOT_RUN)
    # A later step of a function starts as an empty region: its claims fail by value, yet there is no answer.
    if any(region.unwritten for region in own):
        return Claim(name, UNWRITTEN)
    if bad["status"] == UNWRITTEN and any(region.stops for region in own):
        left = f'The line "{own[0].exercise.label} is not written yet" still stands among yours: delete it.'
        return Claim(name, UNWRITTEN, left)
    return Claim(name, bad["status"], bad["message"])


def _regions(path: Path, chapter: Chapter) -> list[Region]:
    """The marked regions of an answer; none if the learner changed the marks (claims do not need them)."""
    try:
        return find_regions(path.read_text(encoding="utf-8"), chapter)
    except (CourseError, SyntaxError):
        return []


# --- what to do next ---------------------------------------------------------------------------------------


def _advice(
    results: tuple[Result, ...], regions: list[Region], course: Course, chapter: Chapter, file: str
) -> str:
    statuses = {result.status for result in results}
    if statuses == {PASS}:
        return _reward(results, course, chapter)
    if statuses & {FAIL, ERROR}:
        return f"{held(results)}. Mend the first FAIL, save, and check again."
    todo = next(result.exercise for result in results if result.status != PASS)
    empty = [region for region in regions if region.exercise == todo and region.unwritten]
    if not empty:
        return f"{held(results)}. Write what is missing, save, and check again."
    parts = [region.part for region in empty if region.part]
    still = f"\nStill empty: {'; '.join(parts)}." if parts else ""
    return f"Write {todo.label} between its marks in {file}, save, and check again.{still}"


def _reward(results: tuple[Result, ...], course: Course, chapter: Chapter) -> str:
    following = course.after(results[-1].exercise)
    if following and following.chapter == chapter.number:
        return f"{held(results)}. Next: {following.label} ({following.minutes} minutes)."
    later = [other for other in course.chapters if other.number > chapter.number]
    if not later:
        return f"{held(results)}. That was the last exercise of the course; `flash-edu next` says if you left one out."
    following = f"chapter {later[0].number}, {later[0].title}, in notebooks/{later[0].notebook}"
    return f"{held(results)}. Next: {following}."
