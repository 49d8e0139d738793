"""What a check found, and how it is shown: a box in a notebook, colours in a terminal, text elsewhere."""
import html
import re
import sys
import textwrap
from dataclasses import dataclass

from flash_edu.course.manifest import Exercise
from flash_edu.course.mistakes import Mistake

PASS, FAIL, ERROR, UNWRITTEN, NOT_RUN = "pass", "fail", "error", "unwritten", "not run"
PRINTED = "Your code printed:"  # in a message, above what it printed
LABELS = {PASS: "pass", FAIL: "FAIL", ERROR: "FAIL", UNWRITTEN: "todo", NOT_RUN: "----"}

# Middle tones: at least 3 : 1 against both a white and a black page (tests/course computes it).
COLOURS = {"green": "#2a9d4a", "red": "#e0524d", "amber": "#b97a00"}
_COLOUR_OF = {PASS: "green", FAIL: "red", ERROR: "red", UNWRITTEN: "amber", NOT_RUN: "amber"}


@dataclass(frozen=True)
class Claim:
    """One thing that a right answer does, in the learner's language, and whether this answer does it."""

    text: str
    status: str
    message: str = ""


@dataclass(frozen=True)
class Result:
    """One exercise with its claims."""

    exercise: Exercise
    claims: tuple[Claim, ...]
    diagnosed: bool = False  # was the catalogue of mistakes tried on what failed?
    suspects: tuple[Mistake, ...] = ()  # those that fail in the same way

    @property
    def status(self) -> str:
        """The status that matters most: a failure before an unwritten line, that before a pass."""
        found = {claim.status for claim in self.claims}
        return next((status for status in (ERROR, FAIL, UNWRITTEN, NOT_RUN) if status in found), PASS)


@dataclass(frozen=True)
class Line:
    text: str
    label: str = ""  # shown in `colour`, before the text
    colour: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that one check says. `problem` is what kept claims from being judged at all."""

    results: tuple[Result, ...] = ()
    problem: str = ""
    advice: str = ""  # the last line: what to do next

    @property
    def passed(self) -> bool:
        return not self.problem and {result.status for result in self.results} == {PASS}

    @property
    def colour(self) -> str:
        statuses = {result.status for result in self.results}
        if self.problem or statuses & {FAIL, ERROR}:
            return "red"
        return "green" if self.passed else "amber"

    def lines(self) -> list[Line]:
        lines = [Line(text) for text in self.problem.splitlines()]
        named = {}  # function -> the exercise in which its mistake has a name
        for result in self.results:
            # A whole chapter is a long list, so there only the exercises that went wrong are opened.
            cause = named.get(result.exercise.function)
            brief = len(self.results) > 1 and result.status not in (FAIL, ERROR)
            if cause and not brief and not result.suspects:
                lines += _consequence(result, cause)
            else:
                lines += _summary(result) if brief else _details(result)
            if result.suspects:
                named.setdefault(result.exercise.function, result.exercise)
        return lines + [Line(text) for text in self.advice.splitlines()]

    def text(self) -> str:
        return "\n".join(line.label + line.text for line in self.lines())

    def html(self) -> str:
        """Reads as plain preformatted text where styles are stripped, as on GitHub."""
        body = "\n".join(_html_line(line) for line in self.lines())
        box = f"border-left: 4px solid {COLOURS[self.colour]}; padding: 2px 0 2px 12px"
        return f'<div style="{box}"><pre style="margin: 0; white-space: pre-wrap">{body}</pre></div>'

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, str]:
        return {"text/plain": self.text(), "text/html": self.html()}

    def show(self) -> None:
        """In a notebook a box, in a terminal colours, in a file or a pipe text."""
        if _in_notebook():
            from IPython.display import display

            display(self)
        elif sys.stdout.isatty():
            _print_coloured(self.lines())
        else:
            print(self.text())


def _summary(result: Result) -> list[Line]:
    messages = dict.fromkeys(claim.message for claim in result.claims if claim.message)  # each once
    lines = [Line(" " * 6 + text) for message in messages for text in message.splitlines()]
    return [Line(_title(result), f"{LABELS[result.status]}  ", _COLOUR_OF[result.status]), *lines]


def _consequence(result: Result, cause: Exercise) -> list[Line]:
    """The same function has a named mistake of an earlier step: this step's numbers would only lead away from it."""
    advice = f"      Mend {cause.label} first. It is the same function, so its mistake may be all that is wrong here."
    return [Line(_title(result), f"{LABELS[result.status]}  ", _COLOUR_OF[result.status]), Line(advice)]


def _title(result: Result) -> str:
    return result.exercise.label + (": not written yet" if result.status == UNWRITTEN else "")


def held(results: tuple[Result, ...]) -> str:
    claims = [claim for result in results for claim in result.claims]
    passed = sum(claim.status == PASS for claim in claims)
    many = "All" if passed == len(claims) > 1 else f"{passed} of"
    return f"{many} {len(claims)} claims hold"


def _details(result: Result) -> list[Line]:
    """Once a mistake is named, what the claims after the first would advise only leads away from it."""
    lines = [Line(_title(result)), *_diagnosis(result)]
    said = {}  # what a message says -> the first claim that says it
    for claim in result.claims:
        lines.append(Line(claim.text, f"  {LABELS[claim.status]}  ", _COLOUR_OF[claim.status]))
        if claim.message and not (said and result.suspects):
            first = said.setdefault(_essence(claim), claim)
            message = claim.message if first is claim else _the_same(claim, first, result)
            lines += [Line(" " * 8 + text) for text in message.splitlines()]
    return lines


def _the_same(claim: Claim, earlier: Claim, result: Result) -> str:
    """A long list may stand between the two, so it says where the message is, and not that it is above."""
    label = LABELS[claim.status]
    begins = next(other for other in result.claims if LABELS[other.status] == label)
    where = f"the first {label}" if earlier is begins else f'"{earlier.text}"'
    return f"{'stops at the same line' if ', line ' in claim.message else 'the same'} as {where}"


def _essence(claim: Claim) -> str:
    """Errors are the same if only their numbers differ: one line of code fails on inputs of several sizes."""
    said = claim.message.partition(f"\n{PRINTED}")[0]
    return re.sub(r"\d+", "#", said) if claim.status == ERROR else said


def _diagnosis(result: Result) -> list[Line]:
    """What the catalogue of mistakes knows about this failure."""
    if not result.diagnosed:
        return []
    if not result.suspects:
        first = next(claim for claim in result.claims if claim.status in (FAIL, ERROR))
        below = "The line below is where your code stopped" if first.status == ERROR else "The numbers below say where it begins"
        return [Line(f"  No mistake that we know gives exactly this. {below}.")]
    several = len(result.suspects) > 1
    lines = [Line("  Each of these mistakes gives exactly this:" if several else "  This is what you get when")]
    for mistake in result.suspects:
        lines.append(Line(f"    {mistake.name}."))
        lines += [Line(" " * 8 + text) for text in textwrap.wrap(mistake.explanation, 100)]
        lines.append(Line(f'        See "{mistake.see}" in the notebook.'))
    return lines


def _html_line(line: Line) -> str:
    text = html.escape(line.text)
    if not line.label:
        return text
    return f'<b style="color: {COLOURS[line.colour]}">{html.escape(line.label)}</b>{text}'


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


def _print_coloured(lines: list[Line]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in lines:
        styled = (line.label, f"bold {COLOURS[line.colour]}") if line.label else ""
        console.print(Text.assemble(styled, line.text), soft_wrap=True)
