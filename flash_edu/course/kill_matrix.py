"""Makes every catalogued mistake and says which claim catches it: `python -m flash_edu.course.kill_matrix [4 ...]`."""
import sys
from dataclasses import dataclass

from flash_edu.course.judging import obstacle, run_tests
from flash_edu.course.manifest import Chapter, Course, CourseError, load_course
from flash_edu.course.mistakes import Mistake, load_mistakes
from flash_edu.course.report import PASS

SECONDS = 900


@dataclass(frozen=True)
class Fate:
    """What became of one mistake."""

    mistake: Mistake
    claim: str = ""  # the first claim that catches it; "" if none does
    message: str = ""
    alike: tuple[str, ...] = ()  # the mistakes whose failure there cannot be told from this one's


def kill_matrix(chapter: Chapter, course: Course) -> list[Fate]:
    """The fates of the chapter's mistakes. CourseError if one does not apply, or the solutions themselves fail."""
    mistakes = load_mistakes(chapter, course)
    solution = (course.root / "solutions" / chapter.file).read_text(encoding="utf-8")
    for mistake in mistakes:
        mistake.made_in(solution)
    events = run_tests(course, chapter, chapter.exercises, course.root / "solutions", SECONDS, make_mistakes=True)
    wrong = [event["message"] for event in events if event["event"] == "end" and event["status"] != PASS]
    if problem := obstacle(events, chapter.exercises) or "\n".join(wrong):
        raise CourseError(f"The solutions of chapter {chapter.number} do not pass:\n{problem}")
    caught = {(event["exercise"], event["mistake"]): event for event in events if event["event"] == "killed"}
    return [_fate(mistake, caught.get((mistake.exercise, mistake.name))) for mistake in mistakes]


def _fate(mistake: Mistake, event: dict | None) -> Fate:
    if event is None:
        return Fate(mistake)
    return Fate(mistake, event["claim"], event["message"], tuple(event["alike"]))


def main(numbers: list[str]) -> int:
    course, survivors = load_course(), 0
    chapters = [course.find(number)[0] for number in numbers] or course.chapters
    for chapter in chapters:
        for fate in kill_matrix(chapter, course) if chapter.exercises else ():
            survivors += not fate.claim
            others = [name for name in fate.alike if name != fate.mistake.name]
            print(f"{fate.mistake.exercise}  {fate.mistake.name}")
            print(f"      {'caught by: ' + fate.claim if fate.claim else 'SURVIVES: no claim catches it'}")
            print("".join(f"      cannot be told from: {name}\n" for name in others), end="", flush=True)
    print(f"{survivors} mistakes survive" if survivors else "every mistake is caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CourseError as error:
        sys.exit(str(error))
