"""The course as data: reads exercises/course.toml, the one list of chapters and exercises."""
import difflib
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NEEDS = ("torch", "interpreter", "gpu")


class CourseError(Exception):
    """The course, or something in it, cannot be found or makes no sense. The text says what to do."""


@dataclass(frozen=True)
class Exercise:
    id: str  # "4.1"
    chapter: int
    name: str
    function: str  # what the learner writes, in the chapter's file
    minutes: int
    difficulty: int  # 1 to 3
    needs: tuple[str, ...]
    hints: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.id} {self.name}"


@dataclass(frozen=True)
class Chapter:
    number: int
    slug: str
    title: str
    part: str
    idea: str
    minutes: int
    notebook: str
    needs: tuple[str, ...]
    exercises: tuple[Exercise, ...] = ()

    @property
    def stem(self) -> str:
        return f"ch{self.number:02d}_{self.slug}"

    @property
    def file(self) -> str:
        return f"{self.stem}.py"

    @property
    def test_file(self) -> str:
        return f"test_{self.stem}.py"


@dataclass(frozen=True)
class Course:
    root: Path
    chapters: tuple[Chapter, ...]

    @property
    def exercises(self) -> tuple[Exercise, ...]:
        return tuple(exercise for chapter in self.chapters for exercise in chapter.exercises)

    def find(self, what: str | int) -> tuple[Chapter, tuple[Exercise, ...]]:
        """"4" is a chapter; "4.1", "4.tiled_attention" and "tiled_attention" are one exercise."""
        wanted = str(what).strip()
        for chapter in self.chapters:
            if wanted.isdecimal() and int(wanted) == chapter.number:
                return chapter, chapter.exercises
        names = {name: [] for exercise in self.exercises for name in _names(exercise)}
        for exercise in self.exercises:
            for name in _names(exercise):
                names[name].append(exercise)
        found = names.get(wanted, [])
        if len(found) == 1:
            chapter = next(chapter for chapter in self.chapters if chapter.number == found[0].chapter)
            return chapter, (found[0],)
        if found:
            ids = " or ".join(f'"{exercise.id}"' for exercise in found)
            raise CourseError(f'Several exercises are named "{wanted}": ask for {ids}.')
        known = [str(chapter.number) for chapter in self.chapters] + list(names)
        raise CourseError(f'There is no chapter or exercise "{wanted}". {_suggestion(wanted, known)}')

    def after(self, exercise: Exercise) -> Exercise | None:
        """The exercise that follows in the course, or None after the last."""
        following = self.exercises[self.exercises.index(exercise) + 1 :]
        return following[0] if following else None

    def missing_files(self) -> list[str]:
        """Paths that the manifest speaks of and that do not exist, relative to the course."""
        paths = []
        for chapter in self.chapters:
            paths.append(f"notebooks/{chapter.notebook}")
            if chapter.exercises:
                paths += [f"exercises/{chapter.file}", f"solutions/{chapter.file}"]
                paths.append(f"tests/chapters/{chapter.test_file}")
        return [path for path in paths if not (self.root / path).is_file()]


def _names(exercise: Exercise) -> tuple[str, ...]:
    return exercise.id, f"{exercise.chapter}.{exercise.name}", exercise.name


def _suggestion(wanted: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    if near:
        return "Did you mean " + " or ".join(f'"{name}"' for name in near) + "?"
    return 'Ask for a chapter, as "4", or an exercise, as "4.1"; exercises/course.toml lists them.'


def course_root() -> Path:
    """The folder that holds exercises/course.toml: here, above here, or where this package lies."""
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / "exercises" / "course.toml").is_file():
            return folder
    raise CourseError(
        f"No exercises/course.toml in {here} or above it. The exercises are in the repository, not in the "
        "installed package: clone it and work from its folder."
    )


def load_course(root: Path | None = None) -> Course:
    """Reads and validates the manifest. CourseError lists everything that is wrong with it at once."""
    root = root or course_root()
    path = root / "exercises" / "course.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise CourseError(f"exercises/course.toml is not valid TOML: {error}") from None
    problems = [f'unknown table "{name}"' for name in data if name not in ("chapter", "exercise")]
    exercises = _read(Exercise, data.get("exercise", []), problems)
    chapters = _read(Chapter, data.get("chapter", []), problems)
    problems += _problems(chapters, exercises)
    if problems:
        raise CourseError("exercises/course.toml:\n" + "\n".join(f"  {problem}" for problem in problems))
    exercises.sort(key=lambda exercise: int(exercise.id.split(".")[1]))
    chapters.sort(key=lambda chapter: chapter.number)
    return Course(root, tuple(_with_exercises(chapter, exercises) for chapter in chapters))


def _with_exercises(chapter: Chapter, exercises: list[Exercise]) -> Chapter:
    return replace(chapter, exercises=tuple(e for e in exercises if e.chapter == chapter.number))


def _read(kind: type, tables: list[dict], problems: list[str]) -> list:
    """Each table as a `kind`, if its keys are the fields and their types fit; otherwise notes the problem."""
    types = {field.name: field.type for field in fields(kind) if field.name != "exercises"}
    read = []
    for table in tables:
        title = f"{kind.__name__.lower()} {table.get('id', table.get('number', '?'))}"
        wrong = [f"{title}: unknown key {key}" for key in table if key not in types]
        wrong += [f"{title}: {key} is missing" for key in types if key not in table]
        wrong += [
            f"{title}: {key} is {table[key]!r}, which is not {_TYPE_WORDS[want]}"
            for key, want in types.items()
            if key in table and not _fits(table[key], want)
        ]
        problems += wrong
        if not wrong:
            read.append(kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}))
    return read


_TYPE_WORDS = {int: "a whole number", str: "a text", tuple[str, ...]: "a list of texts"}


def _fits(value: object, want: type) -> bool:
    if want == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return type(value) is want


def _problems(chapters: list[Chapter], exercises: list[Exercise]) -> list[str]:
    """What is wrong between tables that are each well formed."""
    numbers = [chapter.number for chapter in chapters]
    ids = [exercise.id for exercise in exercises]
    found = [f"chapter {number} is there twice" for number in set(numbers) if numbers.count(number) > 1]
    found += [f"exercise {id} is there twice" for id in set(ids) if ids.count(id) > 1]
    for exercise in exercises:
        chapter, _, step = exercise.id.partition(".")
        if chapter != str(exercise.chapter) or not step.isdecimal():
            found.append(f'exercise {exercise.id}: the id should be "{exercise.chapter}.1" or the like')
        if exercise.chapter not in numbers:
            found.append(f"exercise {exercise.id}: there is no chapter {exercise.chapter}")
        if exercise.difficulty not in (1, 2, 3):
            found.append(f"exercise {exercise.id}: difficulty is {exercise.difficulty}, not 1, 2 or 3")
    for item in [*chapters, *exercises]:
        title = f"exercise {item.id}" if isinstance(item, Exercise) else f"chapter {item.number}"
        unknown = [need for need in item.needs if need not in NEEDS]
        found += [f"{title}: needs {need!r}, which is none of {', '.join(NEEDS)}" for need in unknown]
    return sorted(found)
