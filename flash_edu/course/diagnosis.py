"""Which known mistakes would fail a claim with the same words and the same numbers as the learner's answer did?"""
import contextlib
import io
import math
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flash_edu.course import bounds
from flash_edu.course.answers import load_answer
from flash_edu.course.explain import Places, explain
from flash_edu.course.manifest import Chapter, Course
from flash_edu.course.mistakes import Mistake, make
from flash_edu.course.report import ERROR, PASS

# Of the processor's time, so that a busy machine gives no other diagnosis.
SECONDS_FOR_ONE = 5  # to make one mistake on one input
SECONDS = 10  # for everything said about one exercise
MOST_INPUTS = 3  # failing claims that a mistake must explain to be named

NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|inf|nan)\b")


class TooLong(Exception):
    """A mistake did not finish in its time."""


class Trial(NamedTuple):
    """A test that pytest has set up."""

    test: Callable
    arguments: dict

    @classmethod
    def of(cls, item) -> "Trial":
        return cls(item.obj, {name: item.funcargs[name] for name in item._fixtureinfo.argnames})


class Suspects:
    """The mistakes of one exercise that explain every failure seen so far."""

    def __init__(self, mistakes: list[Mistake], workshop: "Workshop"):
        self.left = list(mistakes)
        self.inputs = 0
        self._workshop = workshop
        self._until = math.inf  # the clock starts with the first failure

    def face(self, trial: "Trial", status: str, message: str) -> bool:
        """Keep those that fail this test in the same way. False if there was no more time, or enough was seen."""
        if self.inputs == MOST_INPUTS or not self.left or time.process_time() > self._until:
            return False
        self._until = min(self._until, time.process_time() + SECONDS)
        kept = []
        for mistake in self.left:
            if time.process_time() > self._until:
                return False  # half a comparison would name whoever came first
            if same_failure((status, message), self._workshop.try_out(mistake, trial)):
                kept.append(mistake)
        self.left, self.inputs = kept, self.inputs + 1
        return True

    def acquit(self, trial: "Trial") -> None:
        """The answer passed this test: drop those that fail it. A false name is worse than none."""
        for mistake in list(self.left):
            if time.process_time() > self._until:
                return
            if self._workshop.try_out(mistake, trial)[0] != PASS:
                self.left.remove(mistake)


class Workshop:
    """Makes mistakes, and runs tests on them in place of the answer."""

    def __init__(self, chapter: Chapter, course: Course):
        self.chapter, self.course = chapter, course
        self._scratch = tempfile.TemporaryDirectory()
        self._folders: dict[Mistake, Path] = {}

    def try_out(self, mistake: Mistake, trial: "Trial") -> tuple[str, str]:
        """(status, message) of this test on the solution with this mistake."""
        places = Places(self._folder(mistake), self.course.root)
        try:
            with _limited(SECONDS_FOR_ONE), contextlib.redirect_stdout(io.StringIO()):
                answer = load_answer(places.folder, self.chapter.stem)
                with bounds.checked():
                    trial.test(**trial.arguments | {"answer": answer})
        except TooLong:
            return ERROR, "It did not finish."
        except BaseException as error:  # pytest's own outcomes are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            return explain(error, places)
        return PASS, ""

    def _folder(self, mistake: Mistake) -> Path:
        if mistake not in self._folders:
            folder = Path(self._scratch.name, str(len(self._folders)), "solutions").resolve()
            make(mistake, self.chapter, self.course, folder)
            self._folders[mistake] = folder
        return self._folders[mistake]


@contextlib.contextmanager
def _limited(seconds: float):
    """TooLong is raised inside once so much processor time was used. Only where signals work: the main thread, not Windows."""

    def stop(*_):
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def same_failure(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Two (status, message) that say the same. Of an error only its first line counts: the rest is the code around it."""
    if one[0] != other[0] or one[0] == PASS:
        return False
    texts = [message.split("\n")[0] if status == ERROR else message for status, message in (one, other)]
    words, numbers = zip(*((NUMBER.sub("#", text), NUMBER.findall(text)) for text in texts))
    return words[0] == words[1] and all(map(_close, *numbers))


def _close(one: str, other: str) -> bool:
    """As printed: whole numbers count things and must agree, others are results and may be rounded differently."""
    if one == other:
        return True
    if one.lstrip("+-").isdecimal() and other.lstrip("+-").isdecimal():
        return False
    return math.isclose(float(one), float(other), rel_tol=2e-3, abs_tol=1e-30)
