"""The command `flash-edu`: what a learner types in a terminal."""
import sys
from importlib.util import find_spec

if find_spec("typer") is None:
    sys.exit('flash-edu needs what the course needs: pip install "flash_edu[course]"')

import typer

from flash_edu.course.check import run_check
from flash_edu.course.machine import machine, missing
from flash_edu.course.manifest import CourseError, load_course

app = typer.Typer(no_args_is_help=True, add_completion=False, help="The flash_edu course, from the terminal.")


@app.command()
def check(
    what: str = typer.Argument(metavar="CHAPTER", help="a chapter, as 4, or an exercise, as 4.1"),
    target: str = typer.Option(None, help="judge exercises (default), solutions, or the folder at this path"),
) -> None:
    """Judge your answers to a chapter or an exercise. The exit code is 0 only if every claim holds."""
    report = run_check(what, target=target)
    report.show()
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def doctor() -> None:
    """Say which chapters run on this machine, and why not the others."""
    print(machine())
    try:
        course = load_course()
    except CourseError as error:
        print(error)
        raise typer.Exit(1) from None
    for chapter in course.chapters:
        lacking = " and ".join(missing(chapter.needs))
        print(f"  {chapter.number:02d}  {'needs ' + lacking if lacking else 'runs':4}  {chapter.title}")


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def train(context: typer.Context) -> None:
    """Train a small GPT on the attention of this package; flash-edu train --help lists its options."""
    from flash_edu.training.__main__ import main

    raise typer.Exit(main(context.args))


if __name__ == "__main__":
    app()
