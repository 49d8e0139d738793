"""The command `flash-edu`: what a learner types in a terminal. Nothing here imports torch before it must: help comes fast."""
import sys
import time
from importlib.util import find_spec
from pathlib import Path

if find_spec("typer") is None:
    sys.exit('flash-edu needs what the course needs: pip install "flash_edu[course]"')

import typer
from rich.console import Console
from rich.table import Table

from flash_edu.course.manifest import Chapter, Course, CourseError, Exercise, load_course
from flash_edu.course.progress import Progress, current, load_progress

EXAMPLES = """The flash_edu course, from the terminal.

    flash-edu next              what to do now\n
    flash-edu check 4.1         judge your answer to exercise 4.1\n
    flash-edu check 4 --watch   judge chapter 4 again whenever you save\n
    flash-edu hint              one hint more for the exercise you are at\n
    flash-edu progress          how far you are
"""
app = typer.Typer(no_args_is_help=True, add_completion=False, help=EXAMPLES, rich_markup_mode=None)
WHAT = typer.Argument(None, metavar="[EXERCISE]", help="as 4.1 or 4.tiled_attention; without it, the one you are at")


class Desk:
    """What every command needs: the course, the learner's progress, and a place to print."""

    def __init__(self):
        self.console = Console(highlight=False, soft_wrap=True)
        try:
            self.course: Course = load_course()
        except CourseError as error:
            self.stop(str(error))
        self.progress: Progress = load_progress(self.course)
        if self.progress.said:
            self.console.print(self.progress.said, markup=False)

    def find(self, what: str | None) -> tuple[Chapter, tuple[Exercise, ...]]:
        exercise = None if what else current(self.course, self.progress)
        if not what and exercise is None:
            self.stop("Every exercise has passed. Name the one you mean, as 4.1.", code=0)
        try:
            return self.course.find(what or exercise.id)
        except CourseError as error:
            self.stop(str(error))

    def find_one(self, what: str | None) -> tuple[Chapter, Exercise]:
        chapter, exercises = self.find(what)
        if len(exercises) != 1:
            ids = ", ".join(exercise.id for exercise in exercises)
            self.stop(f"Chapter {chapter.number} has several exercises: {ids}. Name one." if exercises else f"Chapter {chapter.number} has no exercises.")
        return chapter, exercises[0]

    def stop(self, said: str, code: int = 1):
        self.console.print(said, markup=False)
        raise typer.Exit(code)


@app.command()
def check(
    what: str = typer.Argument(None, metavar="[WHAT]", help="a chapter, as 4, or an exercise, as 4.1; without it, the one you are at"),
    target: str = typer.Option(None, help="judge exercises (default), solutions, or the folder at this path"),
    watch: bool = typer.Option(False, "--watch", help="judge again whenever the file is saved, until Ctrl-C"),
) -> None:
    """Judge your answers to a chapter or an exercise. The exit code is 0 only if every claim holds."""
    from flash_edu.course.answers import answer_folder
    from flash_edu.course.judging import run_check

    if what is None or watch:
        desk = Desk()
        chapter, exercises = desk.find(what)
        what = what or exercises[0].id
    report = run_check(what, target=target)
    report.show()
    while watch:
        file = answer_folder(target or "exercises", desk.course.root) / chapter.file
        desk.console.print(f"\nWatching {chapter.file}: save it to check again, Ctrl-C to stop.")
        try:
            _wait_for_change(file)
        except KeyboardInterrupt:
            break
        desk.console.clear()
        report = run_check(what, target=target)
        report.show()
    raise typer.Exit(0 if report.passed else 1)


def _wait_for_change(file: Path) -> None:
    before = _saved_at(file)
    while _saved_at(file) in (before, None):  # None: an editor that replaces the file is between two steps
        time.sleep(0.2)


def _saved_at(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.is_file() else None


@app.command()
def hint(what: str = WHAT) -> None:
    """Show one hint more, the least revealing first."""
    desk = Desk()
    _, exercise = desk.find_one(what)
    record = desk.progress.of(exercise)
    shown = min(record.hints + 1, len(exercise.hints))
    for number, text in enumerate(exercise.hints[:shown], 1):
        desk.console.print(f"{exercise.label}, hint {number} of {len(exercise.hints)}: {text}", markup=False)
    if record.hints >= len(exercise.hints):
        desk.console.print(f"That is all. The solution: flash-edu solution {exercise.id} --anyway", markup=False)
    record.hints = shown
    desk.progress.save()


@app.command("next")
def next_exercise() -> None:
    """Say which exercise comes next, and where it is."""
    desk = Desk()
    exercise = current(desk.course, desk.progress)
    if exercise is None:
        desk.stop("Every exercise has passed.", code=0)
    chapter, _ = desk.course.find(exercise.id)
    desk.console.print(f"{exercise.label}, about {exercise.minutes} minutes, in chapter {chapter.number}: {chapter.title}")
    desk.console.print(f"  read   notebooks/{chapter.notebook}")
    desk.console.print(f"  write  {exercise.function} in exercises/{chapter.file}")
    desk.console.print(f"  check  flash-edu check {exercise.id}")


@app.command()
def progress() -> None:
    """Show what has passed, chapter by chapter."""
    desk = Desk()
    table = Table(box=None, pad_edge=False)
    for title in ("", "chapter", "", "passed", "exercises"):
        table.add_column(title)
    for chapter in desk.course.chapters:
        done = [desk.progress.passed(exercise) for exercise in chapter.exercises]
        bar = "█" * sum(done) + "░" * (len(done) - sum(done))
        marks = "  ".join(f"{exercise.id}{' ✓' if passed else ''}" for exercise, passed in zip(chapter.exercises, done))
        table.add_row(f"{chapter.number:02d}", chapter.title, bar, f"{sum(done)} of {len(done)}", marks)
    desk.console.print(table)
    exercises = desk.course.exercises
    desk.console.print(f"\n{sum(map(desk.progress.passed, exercises))} of {len(exercises)} exercises have passed.")


@app.command()
def reset(
    what: str = typer.Argument(metavar="WHAT", help="a chapter, as 4, or an exercise, as 4.1"),
    yes: bool = typer.Option(False, "--yes", help="do not ask"),
) -> None:
    """Start an exercise, or a whole chapter, again. What you wrote is kept as a backup."""
    from flash_edu.course.restore import reset as restore

    desk = Desk()
    chapter, exercises = desk.find(what)
    labels = ", ".join(exercise.label for exercise in exercises)
    if not yes and not typer.confirm(f"Take your answer to {labels} out of exercises/{chapter.file}? A backup is kept."):
        desk.stop("Nothing was changed.")
    try:
        backup = restore(chapter, exercises, desk.course)
    except CourseError as error:
        desk.stop(str(error))
    kept = f" What you wrote is in {backup.relative_to(desk.course.root)}." if backup else ""
    desk.console.print(f"exercises/{chapter.file} is as it came.{kept}" if exercises == chapter.exercises else f"{labels}: not written any more.{kept}")


@app.command()
def solution(what: str = WHAT, anyway: bool = typer.Option(False, "--anyway", help="even before your answer passes")) -> None:
    """Show how the course solves an exercise, once your answer has passed."""
    from rich.syntax import Syntax

    from flash_edu.course.restore import solution_of

    desk = Desk()
    chapter, exercise = desk.find_one(what)
    if not anyway and not desk.progress.passed(exercise):
        desk.stop(f"Your answer to {exercise.label} has not passed yet. A hint: flash-edu hint {exercise.id}. The solution now: --anyway.")
    code = solution_of(exercise, chapter, desk.course)
    desk.console.print(Syntax(code, "python", background_color="default") if desk.console.is_terminal else code, markup=False)


@app.command()
def doctor() -> None:
    """Say what this machine has, which chapters run on it, and why not the others."""
    from flash_edu.course.doctor import facts, how_it_runs

    desk = Desk()
    for what, how in facts():
        desk.console.print(f"{what:16}{how}", markup=False)
    desk.console.print()
    for chapter in desk.course.chapters:
        desk.console.print(f"  {chapter.number:02d}  {chapter.title:32}{how_it_runs(chapter)}", markup=False)


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def train(context: typer.Context) -> None:
    """Train a small GPT on the attention of this package; flash-edu train --help lists its options."""
    from flash_edu.training.__main__ import main

    raise typer.Exit(main(context.args))


if __name__ == "__main__":
    app()
