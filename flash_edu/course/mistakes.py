"""The catalogue: mistakes that people make, each as a change of the solution that makes it.

It serves twice. CI makes every mistake and requires a claim to fail. And when a learner's answer fails, the mistakes are
made on the same input: the one that fails with the same words and numbers is named (diagnosis.py).

solutions/mistakes/<chapter's stem>.toml holds a [[mistake]] table each:

    exercise = "4.1"
    name = "acc is not repaired when the maximum moves"          what the answer does wrong, as half a sentence
    old = "acc = acc * repair[..., None] + p @ v_tile"           stands once in the solution
    new = "acc = acc + p @ v_tile"
    explanation = "..."                                          two or three sentences: why it is wrong, what to do
    see = "One row, two blocks of keys"                          a heading of the chapter's notebook

`old` and `new` may span lines. A mistake in several places has lists of texts, of the same length.
"""
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from flash_edu.course.manifest import Chapter, Course, CourseError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = ("exercise", "name", "old", "new", "explanation", "see")


@dataclass(frozen=True)
class Mistake:
    exercise: str  # "4.1"
    name: str
    changes: tuple[tuple[str, str], ...]  # (old text, new text)
    explanation: str
    see: str

    def made_in(self, solution: str) -> str:
        """The solution with this mistake. CourseError if it does not apply, or changes nothing."""
        for old, new in self.changes:
            if solution.count(old) != 1:
                raise CourseError(f'{self}: its old text is there {solution.count(old)} times, not once: "{old}"')
            if old == new:
                raise CourseError(f"{self}: old and new are the same")
            solution = solution.replace(old, new)
        return solution

    def __str__(self) -> str:
        return f"mistake of {self.exercise}, {self.name}"


def catalogue_path(chapter: Chapter, course: Course) -> Path:
    return course.root / "solutions" / "mistakes" / f"{chapter.stem}.toml"


def load_mistakes(chapter: Chapter, course: Course) -> list[Mistake]:
    """The chapter's mistakes, in the order of the file; none if there is no file."""
    path = catalogue_path(chapter, course)
    if not path.is_file():
        return []
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8")).get("mistake", [])
    except tomllib.TOMLDecodeError as error:
        raise CourseError(f"{path.name} is not valid TOML: {error}") from None
    return [_read(table, path, chapter) for table in tables]


def _read(table: dict, path: Path, chapter: Chapter) -> Mistake:
    title = f"{path.name}, {table.get('exercise', '?')} {table.get('name', '?')}"
    if set(table) != set(KEYS):
        wrong = [f"{key} is missing" for key in KEYS if key not in table] + [f"unknown key {k}" for k in table if k not in KEYS]
        raise CourseError(f"{title}: {', '.join(wrong)}")
    if table["exercise"] not in [exercise.id for exercise in chapter.exercises]:
        raise CourseError(f"{title}: chapter {chapter.number} has no exercise {table['exercise']}")
    old, new = ([x] if isinstance(x, str) else x for x in (table["old"], table["new"]))
    if not old or len(old) != len(new):
        raise CourseError(f"{title}: old has {len(old)} texts and new has {len(new)}")
    texts = {key: " ".join(table[key].split()) for key in ("name", "explanation", "see")}
    return Mistake(table["exercise"], changes=tuple(zip(old, new)), **texts)


def make(mistake: Mistake, chapter: Chapter, course: Course, folder: Path) -> None:
    """Fill `folder` with the solutions, this mistake in one of them."""
    folder.mkdir(parents=True)
    for path in (course.root / "solutions").glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    file = folder / chapter.file
    file.write_text(mistake.made_in(file.read_text(encoding="utf-8")), encoding="utf-8")
