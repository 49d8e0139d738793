"""Makes exercises/ from solutions/: everything but the lines between the marks (marks.py).

`python -m flash_edu.course.skeletons` writes exercises/; with --check it compares, and writes nothing.

A function may hold several exercises. Only the earliest one stops the function until it is written. The
regions of later ones are left empty: the first can be finished and checked before the second is read about.
"""
import argparse
import ast
import re
import sys

from flash_edu.course.manifest import Chapter, Course, CourseError, load_course
from flash_edu.course.marks import END, UNWRITTEN, Region, find_regions


def make_skeleton(solution: str, chapter: Chapter) -> str:
    """The text that a learner starts from."""
    regions = find_regions(solution, chapter)
    first = {}  # function -> the step of its earliest exercise
    for region in regions:
        step = chapter.exercises.index(region.exercise)
        first[region.function] = min(step, first.get(region.function, step))
    lines = solution.splitlines()
    for region in reversed(regions):
        stops = chapter.exercises.index(region.exercise) == first[region.function]
        lines[region.start : region.end - 1] = [_stop_line(region)] if stops else []
    try:
        ast.parse("\n".join(lines))
    except SyntaxError as error:
        where = f"{chapter.file}: line {error.lineno} of its skeleton"
        raise CourseError(f"{where} is not Python: {error.msg}. Is a region left empty there?") from None
    return "\n".join(lines) + "\n"


def _stop_line(region: Region) -> str:
    message = f'"{region.exercise.label} is not written yet"'
    if region.in_kernel:
        return f"{region.indent}tl.static_assert(False, {message})"
    return f"{region.indent}raise NotImplementedError({message})"


def missing_lines(skeleton: str, solution: str) -> list[str]:
    """Lines of the skeleton that the solution lacks, or has in another order: solving may only add lines."""
    kept = [line for line in skeleton.splitlines() if line.strip() and not UNWRITTEN.search(line)]
    if not any(END.match(line) for line in kept):
        raise CourseError("nothing to compare: the skeleton has no marked region")
    ahead = iter(solution.splitlines())
    missing = []
    for line in kept:
        rest = list(ahead)
        if line in rest:
            ahead = iter(rest[rest.index(line) + 1 :])
        else:
            missing.append(line)
            ahead = iter(rest)
    return missing


def skeleton_of(chapter: Chapter, course: Course) -> str:
    solution = course.root / "solutions" / chapter.file
    if not solution.is_file():
        raise CourseError(f"solutions/{chapter.file} does not exist, and the manifest has exercises in it")
    return make_skeleton(solution.read_text(encoding="utf-8"), chapter)


def holds_answer(text: str) -> bool:
    """True if somebody may have written into this file: code between marks, or marks that are gone."""
    begun = re.split(r"# your code here.*\n", text)[1:]
    regions = [part.split("# end of your code")[0] for part in begun if "# end of your code" in part]
    code = [line.strip() for region in regions for line in region.splitlines()]
    written = any(line and not line.startswith("#") and not UNWRITTEN.search(line) for line in code)
    return written or not begun or len(regions) < len(begun)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flash_edu.course.skeletons")
    parser.add_argument("--check", action="store_true", help="say which files differ; write nothing")
    only_check = parser.parse_args(arguments).check
    course, wrong = load_course(), 0
    for chapter in course.chapters:
        if chapter.exercises:
            try:
                wrong += _update(chapter, course, only_check)
            except CourseError as error:
                print(error)
                wrong += 1
    print("exercises/ does not match solutions/" if wrong else "exercises/ matches solutions/")
    return 1 if wrong else 0


def _update(chapter: Chapter, course: Course, only_check: bool) -> int:
    """Writes one skeleton, unless it is there or an answer is in its place; 1 if the file stays different."""
    skeleton, path = skeleton_of(chapter, course), course.root / "exercises" / chapter.file
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before == skeleton:
        return 0
    if only_check:
        print(f"exercises/{chapter.file} differs")
        return 1
    if before is not None and holds_answer(before):
        print(f"exercises/{chapter.file} holds an answer: move it away first")
        return 1
    path.write_text(skeleton, encoding="utf-8")
    print(f"wrote exercises/{chapter.file}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CourseError as error:
        sys.exit(str(error))
