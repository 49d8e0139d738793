"""The pytest plugin of a check: picks the claims asked for, and writes what becomes of each as JSON lines."""
import faulthandler
import inspect
import json
from pathlib import Path

import pytest

from flash_edu.course import bounds
from flash_edu.course.answers import answer_folder
from flash_edu.course.claims import claim_text
from flash_edu.course.diagnosis import Suspects, Trial, Workshop, same_failure
from flash_edu.course.explain import Places, explain
from flash_edu.course.manifest import load_course
from flash_edu.course.mistakes import load_mistakes
from flash_edu.course.report import ERROR, FAIL, NOT_RUN, PASS, PRINTED

FIRST_PRINTED_LINES, LAST_PRINTED_LINES = 20, 10  # a tile's first rows are the toy's: they come first


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="the file that events are appended to")
    parser.addoption("--only", help="exercises, as 4.1,4.2")
    parser.addoption("--seconds", type=float, help="end Python if the tests take longer")
    parser.addoption("--make-mistakes", action="store_true", help="make every known mistake where the answer passes")


def pytest_configure(config):
    config.pluginmanager.register(Recorder(config), "flash_edu_recorder")


def exercise_of(item) -> str | None:
    mark = item.get_closest_marker("exercise")
    return mark.args[0] if mark and mark.args else None


def claim_of(item) -> str:
    """A parametrised test is one claim."""
    return claim_text(item.originalname, inspect.getdoc(item.function))


class Recorder:
    def __init__(self, config):
        self.path = config.getoption("results")
        self.only = config.getoption("only").split(",")
        self.seconds = config.getoption("seconds")
        self.make_mistakes = config.getoption("make_mistakes")
        self.failed = set()
        self.printed = set()  # exercises whose prints were shown: once is enough, with the first failure
        self.passed = {}  # exercise -> the trials that its answer passed before it failed one
        self.catalogue = Catalogue(config.rootpath, self.only)
        self.stack = self.path.with_suffix(".stack").open("w")
        self.places = Places(answer_folder(config.getoption("--target"), config.rootpath), config.rootpath)

    def write(self, event, **data):
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **data}) + "\n")

    def pytest_collectreport(self, report):
        if report.failed:
            self.write("broken", message=self.places.clean(report.longreprtext))

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if exercise_of(item) in self.only]
        for item in items:
            self.write("found", exercise=exercise_of(item), claim=claim_of(item))

    def pytest_collection_finish(self):
        # A clock that runs in C: it also ends code that never returns to Python, and says where that was.
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=self.stack)

    def pytest_unconfigure(self):
        faulthandler.cancel_dump_traceback_later()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        self.write("start", exercise=exercise_of(item), claim=claim_of(item))

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        # One input that fails settles a claim, and only the first is shown: the others need not run.
        return True if (exercise_of(pyfuncitem), claim_of(pyfuncitem)) in self.failed else None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        with bounds.checked():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        claim = exercise_of(item), claim_of(item)
        if claim not in self.failed and (call.when == "call" or call.excinfo):
            status, message = self.outcome(call, report)
            told = {"status": status, "message": message, "loading": call.when == "setup"}
            if status in (FAIL, ERROR) and claim[0] not in self.printed and report.capstdout.strip():
                told["message"] += _printed(report.capstdout)
                self.printed.add(claim[0])
            self.write("end", exercise=claim[0], claim=claim[1], **told)
            if status != PASS:
                self.failed.add(claim)
            if status in (FAIL, ERROR) and call.when == "call":
                self.diagnose(item, status, message)
            elif status == PASS and self.make_mistakes:
                self.kill(item)
            elif status == PASS:
                self.acquit(item)
        return report

    def outcome(self, call, report):
        if call.excinfo is None:
            return PASS, ""
        if report.skipped:
            return NOT_RUN, str(call.excinfo.value)
        return explain(call.excinfo.value, self.places)

    def diagnose(self, item, status, message):
        """Which known mistakes explain this failure and those before it, and pass what passed before?"""
        suspects = self.catalogue.suspects(exercise_of(item))
        if suspects.face(Trial.of(item), status, message):
            for trial in self.passed.pop(exercise_of(item), []):
                suspects.acquit(trial)
            self.name(exercise_of(item), suspects)

    def acquit(self, item):
        """The answer passes here: a mistake that fails here is not the one that it makes."""
        suspects = self.catalogue.suspects(exercise_of(item))
        if not suspects.inputs:
            self.passed.setdefault(exercise_of(item), []).append(Trial.of(item))
        elif suspects.left:
            suspects.acquit(Trial.of(item))
            self.name(exercise_of(item), suspects)

    def name(self, id, suspects):
        self.write("suspects", exercise=id, names=[mistake.name for mistake in suspects.left])

    def kill(self, item):
        """Make each mistake that no claim has caught yet. Of one that is caught here: who else fails like this?"""
        id, trial = exercise_of(item), Trial.of(item)
        try_out = self.catalogue.workshop.try_out
        outcomes = {mistake: try_out(mistake, trial) for mistake in self.catalogue.alive[id]}
        caught = {mistake: outcome for mistake, outcome in outcomes.items() if outcome[0] in (FAIL, ERROR)}
        if caught:
            outcomes |= {mistake: try_out(mistake, trial) for mistake in self.catalogue.mistakes[id] if mistake not in outcomes}
        for mistake, outcome in caught.items():
            self.catalogue.alive[id].remove(mistake)
            again = outcomes | {mistake: try_out(mistake, trial)}  # would it be recognised?
            alike = [other.name for other in self.catalogue.mistakes[id] if same_failure(outcome, again[other])]
            said = {"status": outcome[0], "message": outcome[1], "alike": alike}
            self.write("killed", exercise=id, mistake=mistake.name, claim=claim_of(item), **said)


class Catalogue:
    """The known mistakes of the exercises that are judged."""

    def __init__(self, root, only):
        course = load_course(root)
        chapter, _ = course.find(only[0])
        known = load_mistakes(chapter, course)
        self.mistakes = {id: [mistake for mistake in known if mistake.exercise == id] for id in only}
        self.alive = {id: list(mistakes) for id, mistakes in self.mistakes.items()}
        self.workshop = Workshop(chapter, course)
        self._suspects = {}

    def suspects(self, id):
        if id not in self._suspects:
            self._suspects[id] = Suspects(self.mistakes[id], self.workshop)
        return self._suspects[id]


def _printed(text: str) -> str:
    lines = [f"    {line[:200]}" for line in text.strip("\n").splitlines()]
    left_out = len(lines) - FIRST_PRINTED_LINES - LAST_PRINTED_LINES
    if left_out > 1:
        lines[FIRST_PRINTED_LINES:-LAST_PRINTED_LINES] = [f"    ({left_out} lines are left out here)"]
    return "\n".join([f"\n{PRINTED}", *lines])
