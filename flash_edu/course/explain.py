"""Turns an exception into what a learner can use: what is wrong, in which line of theirs, and the code there.

Nothing here depends on the machine: paths are relative, and addresses in memory are left out.
"""
import re
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from flash_edu.course.answers import PACKAGE
from flash_edu.course.marks import UNWRITTEN as UNWRITTEN_TEXT
from flash_edu.course.report import ERROR, FAIL, UNWRITTEN

MOST_LINES = 16
MOST_FRAMES = 3  # of the learner's own, the innermost ones
TESTING = Path(__file__).resolve().parents[1] / "testing.py"


@dataclass(frozen=True)
class Places:
    """Where things lie: the answers that are judged, and the course."""

    folder: Path
    root: Path

    def owns(self, path: str | None) -> bool:
        return path is not None and Path(path).is_relative_to(self.folder)

    def claims(self, path: str) -> bool:
        """True for the code that makes claims: an AssertionError raised there is about the answer."""
        return Path(path).is_relative_to(self.root / "tests") or Path(path) == TESTING

    def show(self, path: str) -> str:
        """exercises/ch04_tiled_attention.py, wherever the folder lies."""
        return f"{self.folder.name}/{Path(path).relative_to(self.folder)}"

    def line(self, path: str, number: int, function: str, code: str) -> str:
        inside = "" if function == "<module>" else f", in {function}"
        return f"{self.show(path)}, line {number}{inside}\n    {code}"

    def clean(self, text: str) -> str:
        """Without what only this machine, or only this run, has."""
        text = re.sub(rf"\b{PACKAGE}\.(?=ch\d\d_)| at 0x[0-9a-f]+", "", text)
        text = text.replace(f"{self.folder}/", f"{self.folder.name}/")
        text = text.replace(f"{self.root}/", "").replace(sysconfig.get_path("purelib") + "/", "")
        lines = [line.rstrip()[:200] for line in text.strip().splitlines()]
        return "\n".join(lines[:MOST_LINES] + ["..."] * (len(lines) > MOST_LINES))


def explain(error: BaseException, places: Places) -> tuple[str, str]:
    """(status, message) for an exception that ended a test."""
    chain = _chain(error)
    unwritten = [match[0] for match in (UNWRITTEN_TEXT.search(str(link)) for link in chain) if match]
    if unwritten:
        return UNWRITTEN, f"{unwritten[0]}."
    if isinstance(error, SyntaxError) and places.owns(error.filename):
        return ERROR, _syntax_error(error, places)
    if isinstance(error, AttributeError) and _is_answer(error.obj):
        return ERROR, f"{places.show(error.obj.__file__)} has no {error.name}. Was it renamed or deleted?"
    if called := _wrong_call(error, places):
        return ERROR, called
    if _is_claim(error, places):
        return FAIL, places.clean(str(error)) or _failed_line(error)
    return ERROR, _stopped(chain, places)


def _wrong_call(error: BaseException, places: Places) -> str:
    """If a test's call of the learner's function does not fit its parameters: that, in words; otherwise ""."""
    fits = re.match(r"(.+)\(\) (takes|got|missing) .+", str(error)) if isinstance(error, TypeError) else None
    if not fits or not places.claims(_frames(error)[-1].filename):
        return ""
    line = f"\n    {_frames(error)[-1].line}"
    return f"{error}.\nThe check calls it as the skeleton has it: keep the names and the order of the parameters.{line}"


def _chain(error: BaseException) -> list[BaseException]:
    """The exception and, where Triton wrapped one in another, what it wrapped, the first cause last."""
    chain = [error]
    while _is_triton(error) and error.__cause__ is not None:
        error = error.__cause__
        chain.append(error)
    return chain


def _is_triton(error: BaseException) -> bool:
    """InterpreterError and CompilationError: they say where, their cause says what."""
    return type(error).__name__ in ("InterpreterError", "CompilationError", "CompileTimeAssertionFailure")


def _is_answer(thing: object) -> bool:
    return isinstance(thing, ModuleType) and thing.__name__.split(".")[0] == PACKAGE


def _is_claim(error: BaseException, places: Places) -> bool:
    """Did a test say that the answer is wrong, or did something break on the way?"""
    if type(error).__name__ == "Failed":  # pytest.raises saw nothing raised
        return True
    frames = [frame.filename for frame in _frames(error)]
    from_learner = any(places.owns(path) for path in frames) and not places.claims(frames[-1])
    return isinstance(error, AssertionError) and not from_learner


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__), lookup_lines=False))


def _failed_line(error: BaseException) -> str:
    """For an assert without a message: the assert itself is all there is to say."""
    return f"not true: {_frames(error)[-1].line}"


def _syntax_error(error: SyntaxError, places: Places) -> str:
    code = f"\n    {error.text.strip()}" if error.text else ""
    return f"Python cannot read {places.show(error.filename)}, line {error.lineno}: {error.msg}{code}"


def _stopped(chain: list[BaseException], places: Places) -> str:
    """Something raised, in the learner's code if that can be found, otherwise in the test that used it."""
    what = places.clean(_what(chain)) + _memory_ran_out(chain[-1])
    frames = [frame for link in chain for frame in _frames(link) if places.owns(frame.filename)]
    where = [places.line(frame.filename, frame.lineno, frame.name, frame.line) for frame in frames]
    where += _kernel_place(chain, places)
    if where:
        return "\n".join([what, *where[-MOST_FRAMES:]])
    none = " A function that ends without `return` gives None." if "NoneType" in what else ""
    used = [frame for frame in _frames(chain[0]) if places.claims(frame.filename)]
    line = f"\n    {used[0].line}" if used else ""
    return f"The check could not use what your code gave back.{none}\n{what}{line}"


def _memory_ran_out(cause: BaseException) -> str:
    said = f"{type(cause).__name__} {cause}".lower()
    if "outofmemory" in said or "memoryerror" in said or "can't allocate memory" in said or "not enough memory" in said:
        return "\nThere is not enough memory for this. Is a tensor made that is much larger than the inputs, N x N or larger?"
    return ""


def _what(chain: list[BaseException]) -> str:
    """The first cause in one line, `IndexError: too many indices`."""
    cause = chain[-1]
    if _is_triton(cause):  # the compiler's own words, without its excerpt of the source
        return str(getattr(cause, "error_message", None) or cause)
    said = "".join(traceback.format_exception_only(cause)).strip()
    return re.sub(r"^[\w.]+\.(?=\w+: )", "", said)  # IndexError, not some.module.IndexError


def _kernel_place(chain: list[BaseException], places: Places) -> list[str]:
    """The lines of kernels that do not compile: the compiler knows a kernel's text, but not its file."""
    found = []
    for error in chain:
        source, node = getattr(error, "src", None), getattr(error, "node", None)
        if source and hasattr(node, "lineno"):
            kernel = source.splitlines()
            for path in sorted(places.folder.glob("ch*.py")):
                before = _lines_before(kernel, path.read_text(encoding="utf-8").splitlines())
                if before is not None:
                    name, code = kernel[0].removeprefix("def ").split("(")[0], kernel[node.lineno - 1].strip()
                    found.append(places.line(str(path), before + node.lineno, name, code))
    return found


def _lines_before(part: list[str], whole: list[str]) -> int | None:
    starts = range(len(whole) - len(part) + 1)
    return next((start for start in starts if whole[start : start + len(part)] == part), None)
