"""The claims that a test file makes about an exercise, read without running it: so that an exercise nobody has begun is
answered at once, where running the tests would take seconds to say the same."""
import ast
import inspect
from pathlib import Path


def claims_about(exercise_id: str, test_file: Path) -> list[str]:
    """First lines of the docstrings of tests marked `@pytest.mark.exercise(exercise_id)`, in order, each once."""
    tree = ast.parse(test_file.read_text(encoding="utf-8"))
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and _marked(node, exercise_id)]
    tests.sort(key=lambda test: test.lineno)
    return list(dict.fromkeys(claim_text(test.name, ast.get_docstring(test)) for test in tests))


def claim_text(name: str, docstring: str | None) -> str:
    """A test's claim in the learner's language."""
    if not docstring:
        return name.removeprefix("test_").replace("_", " ")
    return inspect.cleandoc(docstring).splitlines()[0].rstrip(".")


def _marked(test: ast.FunctionDef, exercise_id: str) -> bool:
    return any(ast.unparse(mark) == f"pytest.mark.exercise({exercise_id!r})" for mark in test.decorator_list)
