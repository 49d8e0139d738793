"""Starting an exercise again, and seeing its solution: the regions between the marks, replaced or shown."""
import datetime
import shutil
from pathlib import Path

from flash_edu.course.manifest import Chapter, Course, CourseError, Exercise
from flash_edu.course.marks import Region, find_regions
from flash_edu.course.skeletons import skeleton_of


def reset(chapter: Chapter, exercises: tuple[Exercise, ...], course: Course) -> Path | None:
    """Put the skeleton's lines back into these exercises of a chapter's file. Returns the backup, None if nothing changed."""
    path, skeleton = course.root / "exercises" / chapter.file, skeleton_of(chapter, course)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = not before or exercises == chapter.exercises
    after = skeleton if whole else _with_regions(before, skeleton, exercises, chapter)
    if after == before:
        return None
    backup = _backup(path, course) if before else None
    path.write_text(after, encoding="utf-8")
    return backup


def _with_regions(answer: str, skeleton: str, exercises: tuple[Exercise, ...], chapter: Chapter) -> str:
    try:
        old, new = find_regions(answer, chapter), find_regions(skeleton, chapter)
    except (CourseError, SyntaxError):
        old, new = [], [None]
    if [region.exercise for region in old] != [region and region.exercise for region in new]:
        number = chapter.number
        raise CourseError(
            f"The marks of exercises/{chapter.file} were changed, so one exercise cannot be told from the next. "
            f"Reset the whole chapter: flash-edu reset {number}"
        )
    lines = answer.splitlines()
    for mine, given in reversed(list(zip(old, new))):
        if mine.exercise in exercises:
            lines[mine.start : mine.end - 1] = given.lines
    return "\n".join(lines) + "\n"


def _backup(path: Path, course: Course) -> Path:
    folder = course.root / ".flash_edu" / "backups"
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S-%f")
    return Path(shutil.copyfile(path, folder / f"{path.stem}-{now}.py"))


def solution_of(exercise: Exercise, chapter: Chapter, course: Course) -> str:
    """The lines that solve an exercise, each region under the mark that it stands behind."""
    source = (course.root / "solutions" / chapter.file).read_text(encoding="utf-8")
    regions = [region for region in find_regions(source, chapter) if region.exercise == exercise]
    return "\n\n".join(_shown(region) for region in regions)


def _shown(region: Region) -> str:
    title = f"# in {region.function}" + (f": {region.part}" if region.part else "")
    return "\n".join([title, *(line.removeprefix(region.indent) for line in region.lines)])
