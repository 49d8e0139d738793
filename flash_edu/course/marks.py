"""The marks in a chapter's file: which lines belong to which exercise.

    # your code here (about 4 lines)
    <lines of the solution, or of the learner>
    # end of your code

The first mark may name its exercise, and its part of it:

    # your code here: 7.2 causal, hide what lies ahead (about 3 lines)
"""
import ast
import re
from dataclasses import dataclass

from flash_edu.course.manifest import Chapter, CourseError, Exercise

START = re.compile(
    r"^(?P<indent> *)# your code here"
    r"(?:: (?P<id>\d+\.\d+) (?P<name>\w+)(?:, (?P<part>.+))?)?"  # if not named: the one of this function
    r" \(about \d+ lines?\)$"
)
END = re.compile(r"^ *# end of your code$")
UNWRITTEN = re.compile(r"\d+\.\d+ \w+ is not written yet")


@dataclass(frozen=True)
class Region:
    """What stands between two marks. Lines count from 1."""

    exercise: Exercise
    start: int  # the line of the first mark
    end: int  # the line of the second
    indent: str
    function: str  # the outermost function around it; with its class, "Attention.forward"
    in_kernel: bool
    part: str  # what the mark says is to be done here, or ""
    lines: tuple[str, ...]  # between the marks

    @property
    def stops(self) -> bool:
        """True if the line that a skeleton puts there is still there."""
        return any(UNWRITTEN.search(line) for line in self.lines)

    @property
    def unwritten(self) -> bool:
        """True if no code stands there but that line."""
        code = [line.strip() for line in self.lines if line.strip() and not line.strip().startswith("#")]
        return all(UNWRITTEN.search(line) for line in code)


def find_regions(source: str, chapter: Chapter) -> list[Region]:
    """The marked regions of a chapter's file. CourseError, with the line, if a mark cannot be understood."""
    lines, scopes = source.splitlines(), _scopes(ast.parse(source))
    regions, start = [], None
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("# your code here"):
            if start is not None:
                raise CourseError(f"{chapter.file}, line {number}: the region of line {start} has not ended")
            start = number
        elif END.match(line):
            if start is None:
                raise CourseError(f'{chapter.file}, line {number}: an end without "# your code here"')
            regions.append(_region(lines, start, number, scopes, chapter))
            start = None
    if start is not None:
        raise CourseError(f'{chapter.file}, line {start}: "# end of your code" is missing')
    return regions


def _region(lines: list[str], start: int, end: int, scopes: list, chapter: Chapter) -> Region:
    where = f"{chapter.file}, line {start}"
    mark = START.match(lines[start - 1])
    if not mark:
        raise CourseError(
            f'{where}: a mark is "# your code here (about 4 lines)" or '
            '"# your code here: 7.2 name, part (about 4 lines)"'
        )
    around = [scope for scope in scopes if scope[1].lineno <= start and end <= _last_line(scope[1], lines)]
    functions = [(name, node) for name, node in around if not isinstance(node, ast.ClassDef)]
    if not functions:
        raise CourseError(f"{where}: the region is not inside a function")
    names = {part for name, _ in around for part in (name, name.split(".")[-1])}
    return Region(
        exercise=_exercise(mark, names, chapter, where),
        start=start,
        end=end,
        indent=mark["indent"],
        function=functions[0][0],
        in_kernel=any(_is_jit(decorator) for decorator in functions[-1][1].decorator_list),
        part=mark["part"] or "",
        lines=tuple(lines[start : end - 1]),
    )


def _exercise(mark: re.Match, names: set[str], chapter: Chapter, where: str) -> Exercise:
    """The exercise that the mark names; without a name, the one whose function this is."""
    if mark["id"]:
        label = f"{mark['id']} {mark['name']}"
        found = [exercise for exercise in chapter.exercises if exercise.label == label]
        if not found:
            raise CourseError(f"{where}: the manifest has no exercise {label}")
        return found[0]
    found = [exercise for exercise in chapter.exercises if exercise.function in names]
    if len(found) != 1:
        what = "no exercise" if not found else "several exercises"
        raise CourseError(f'{where}: {what} of the manifest has the function {" or ".join(sorted(names))}')
    return found[0]


def _scopes(tree: ast.AST, prefix: str = "") -> list[tuple[str, ast.AST]]:
    """Every class and function with its qualified name, outer before inner."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append((prefix + node.name, node))
            found += _scopes(node, f"{prefix}{node.name}.")
        else:
            found += _scopes(node, prefix)
    return found


def _last_line(node: ast.AST, lines: list[str]) -> int:
    """The last line of a function, with the comments after its last statement, which the parser drops."""
    last = node.end_lineno
    while last < len(lines) and (not lines[last].strip() or lines[last][: node.col_offset + 1].isspace()):
        last += 1
    return last


def _is_jit(decorator: ast.expr) -> bool:
    """triton.jit, triton.jit(...), jit: the function is a kernel, in which `raise` does not compile."""
    if isinstance(decorator, ast.Call):
        decorator = decorator.func
    return (decorator.attr if isinstance(decorator, ast.Attribute) else getattr(decorator, "id", "")) == "jit"
