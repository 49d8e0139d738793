"""What the learner has done, kept beside the course in .flash_edu/ (ignored by git, so a pull leaves it alone)."""
import datetime
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flash_edu.course.manifest import Course, Exercise


@dataclass
class Record:
    """One exercise: how often it was checked, how many hints were shown, when it passed."""

    checks: int = 0
    hints: int = 0
    passed: str = ""  # ISO date and time of the first pass; "" before


@dataclass
class Progress:
    """Exercises by chapter and name, "4.tiled_attention": numbers within a chapter may shift, names stay."""

    path: Path
    records: dict[str, Record] = field(default_factory=dict)
    said: str = ""  # what the learner should know about the file

    def of(self, exercise: Exercise) -> Record:
        return self.records.setdefault(_key(exercise), Record())

    def passed(self, exercise: Exercise) -> bool:
        return bool(self.of(exercise).passed)

    def checked(self, exercise: Exercise, passed: bool) -> None:
        record = self.of(exercise)
        record.checks += 1
        if passed and not record.passed:
            record.passed = datetime.datetime.now().isoformat(timespec="seconds")

    def save(self) -> None:
        """All or nothing: a file half written would be lost work."""
        self.path.parent.mkdir(exist_ok=True)
        kept = {key: asdict(record) for key, record in self.records.items() if record != Record()}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps({"exercises": kept}, indent=1) + "\n", encoding="utf-8")
        os.replace(new, self.path)


def load_progress(course: Course) -> Progress:
    """What is stored; nothing if there is no file. A file that makes no sense is set aside, and `said` says so."""
    path = course.root / ".flash_edu" / "progress.json"
    if not path.is_file():
        return Progress(path)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["exercises"]
        return Progress(path, {key: _record(values) for key, values in stored.items()})
    except (ValueError, KeyError, TypeError, AttributeError):
        aside = next(p for i in range(1, 1000) if not (p := path.with_name(f"progress.unreadable-{i}.json")).exists())
        path.rename(aside)
        return Progress(path, said=f"Your progress could not be read. It is kept as .flash_edu/{aside.name}; counting starts anew.")


def current(course: Course, progress: Progress) -> Exercise | None:
    """The first exercise that has not passed; None after the last."""
    return next((exercise for exercise in course.exercises if not progress.passed(exercise)), None)


def _key(exercise: Exercise) -> str:
    return f"{exercise.chapter}.{exercise.name}"


def _record(values: dict) -> Record:
    record = Record(**values)
    if [type(value) for value in asdict(record).values()] != [int, int, str]:
        raise TypeError(values)
    return record
