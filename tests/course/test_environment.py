"""pyproject.toml, constraints.txt, environment.yml and the Makefile say the same, and what they say is so."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import flash_edu

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["flash_edu", "solutions", "tests"]  # exercises are the learner's
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CORE = [Requirement(line) for line in PROJECT["dependencies"]]
ALL = CORE + [Requirement(line) for lines in EXTRAS.values() for line in lines]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
]
# Where the name in an import statement is not the name of the package that brings it.
BROUGHT_BY = {"yaml": "pyyaml", "IPython": "ipykernel", "PIL": "matplotlib"}


def applies(requirement: Requirement, python: str) -> bool:
    where = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    return requirement.marker is None or requirement.marker.evaluate(where)


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def names(requirements) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in requirements}


def test_supported_pythons_are_the_same_everywhere():
    admitted = SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}" for minor in range(8, 20)]
    assert [version for version in minors if f"{version}.1" in admitted] == PYTHONS
    classifiers = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: Python ::" in line]
    assert classifiers == PYTHONS
    makefile = (ROOT / "Makefile").read_text()
    low, high = (tuple(map(int, version.split("."))) for version in (PYTHONS[0], PYTHONS[-1]))
    assert f"{low} <= sys.version_info[:2] <= {high}" in makefile
    assert f"needs Python {', '.join(PYTHONS[:-1])} or {PYTHONS[-1]}" in makefile


def test_versions_agree():
    assert PROJECT["version"] == flash_edu.__version__


def test_the_package_itself_needs_torch_and_triton_only():
    assert names(CORE) == {"torch", "triton"}


@pytest.mark.parametrize("python", PYTHONS)
def test_each_requirement_has_one_pin_that_satisfies_it(python):
    for requirement in ALL:
        if not applies(requirement, python):
            continue
        pins = [p for p in PINS if names([p]) == names([requirement]) and applies(p, python)]
        assert len(pins) == 1, f"Python {python}: {requirement.name} has {len(pins)} pins in constraints.txt"
        (pin,) = pins[0].specifier
        assert pin.operator == "==", f"constraints.txt does not pin {pins[0]}"
        assert pin.version in requirement.specifier, f"Python {python}: {pins[0]} breaks {requirement}"


def test_nothing_else_is_pinned():
    assert names(PINS) == names(ALL)


def test_conda_environment_equals_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "flash-edu"
    *conda, pip = environment["dependencies"]
    assert conda == [f"python{PROJECT['requires-python']}", "pip"]
    assert pip == {"pip": ["-c constraints.txt", f"-e .[{','.join(EXTRAS)}]"]}


def test_make_installs_the_same():
    makefile = (ROOT / "Makefile").read_text()
    assert f"-e '.[{','.join(EXTRAS)}]' -c constraints.txt" in makefile
    assert re.search(r"^\.venv/\.ready: pyproject\.toml constraints\.txt$", makefile, re.MULTILINE)


def test_make_help_lists_every_command():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    said = run("make", "--no-print-directory", "help")
    assert said.returncode == 0, said.stderr
    listed = re.findall(r"^  make ([a-z-]+) +\S", said.stdout, re.MULTILINE)
    assert sorted(listed) == sorted(set(targets) - {"gpu"})


def imports(path: Path) -> set[str]:
    """The top-level names that a source file imports from outside the project and the standard library."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    ours = {"flash_edu", "exercises", "solutions"} | {test.stem for test in (ROOT / "tests").rglob("*.py")}
    return found - ours - set(sys.stdlib_module_names) - {"__future__", "tomllib"}


@pytest.mark.parametrize("folder", SOURCES)
def test_every_import_is_declared(folder):
    declared = names(ALL)
    for path in sorted((ROOT / folder).rglob("*.py")):
        brought = {canonicalize_name(BROUGHT_BY.get(name, name)) for name in imports(path)}
        assert brought <= declared, f"{path.relative_to(ROOT)} imports {sorted(brought - declared)}"


def test_sources_pass_the_linter():
    said = run(sys.executable, "-m", "ruff", "check", "--quiet", ".")
    assert said.returncode == 0, said.stdout + said.stderr


def test_sources_parse_on_the_oldest_python():
    oldest = tuple(map(int, PYTHONS[0].split(".")))
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            ast.parse(path.read_text(), filename=str(path), feature_version=oldest)
