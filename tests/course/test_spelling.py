"""Spelling of everything that is read as English: documents, notebooks, docstrings, comments and messages.

codespell knows common misspellings, not every right word, so what it finds is nearly always wrong. What it must not
touch stands in pyproject.toml, below [tool.codespell].
"""
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import nbformat
import pytest
from links import NOT_PROSE

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"https?://\S+|\]\([^)]*\)")


def blanked(pattern, text):
    """Without what the pattern finds, and with the lines where they were."""
    return pattern.sub(lambda found: "\n" * found[0].count("\n") or " ", text)


def of_markdown(text):
    return blanked(ADDRESS, blanked(NOT_PROSE, text))


def of_python(source):
    """Comments and strings, on the lines where they stand; names are the code's business."""
    lines = [""] * (source.count("\n") + 2)
    english = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in english:
            for number, line in enumerate(token.string.splitlines(), start=token.start[0]):
                lines[number - 1] += " " + line
    return blanked(ADDRESS, "\n".join(lines))


def of_notebook(text):
    for cell in nbformat.v4.reads(text).cells:
        if cell.cell_type == "markdown":
            yield cell.id, of_markdown(cell.source)
        elif cell.cell_type == "code":
            magic_free = re.sub(r"^[ \t]*[%!].*$", "", cell.source, flags=re.MULTILINE)
            yield cell.id, of_python(magic_free)


def pages():
    """(where, its English) of everything that the project says."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    sources = [path for folder in ("flash_edu", "solutions", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]
    catalogues = [*ROOT.glob("solutions/mistakes/*.toml"), ROOT / "exercises" / "course.toml"]
    plain = [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "environment.yml", ROOT / "constraints.txt"]
    readers = [(documents, of_markdown), (sources, of_python), (catalogues + plain, str)]
    for paths, english in readers:
        for path in paths:
            if path != Path(__file__):
                yield str(path.relative_to(ROOT)), english(path.read_text(encoding="utf-8"))
    for path in ROOT.glob("notebooks/*.ipynb"):
        for cell, text in of_notebook(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(ROOT)}, cell {cell}", text


def misspelled(pages, folder):
    """A line for each word that codespell would write otherwise: the page, the line in it, the word."""
    where = {}
    for number, (name, text) in enumerate(sorted(pages)):
        where[page := f"{number:05d}.txt"] = name
        (folder / page).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "codespell_lib", "--toml", str(ROOT / "pyproject.toml"), "."]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert said.returncode in (0, 65) and not said.stderr, said.stderr
    found = [line.removeprefix("./").split(":", 1) for line in said.stdout.splitlines()]
    return [f"{where[page]}, line {rest}" for page, rest in found]


def test_nothing_is_misspelled(tmp_path):
    everything = list(pages())
    assert len(everything) > 400
    found = misspelled(everything, tmp_path)
    assert not found, "\n".join(found)


WRONG = "recieve"


@pytest.mark.parametrize(
    "read, text, noticed",
    [
        (of_markdown, f"We {WRONG} a tile.", True),
        (of_markdown, f"See `{WRONG}` and [a page](https://example.org/{WRONG}).\n```\n{WRONG}\n```", False),
        (of_python, f"x = 1  # we {WRONG} it", True),
        (of_python, f'def f():\n    """Numbers.\n\n    We {WRONG} them.\n    """', True),
        (of_python, f'raise ValueError(f"cannot {WRONG} {{x}}")', True),
        (of_python, f"{WRONG} = 1", False),
    ],
)
def test_a_misspelling_is_noticed_where_english_is_read(read, text, noticed, tmp_path):
    found = misspelled([("the page", read(text))], tmp_path)
    assert bool(found) is noticed
    assert all(f"{WRONG} ==> receive" in line and line.startswith("the page, line ") for line in found)


def test_a_notebook_is_read_cell_by_cell(tmp_path):
    cells = [nbformat.v4.new_markdown_cell(f"We {WRONG}.", id="a"), nbformat.v4.new_code_cell("%time\n# fine", id="b")]
    read = list(of_notebook(nbformat.v4.writes(nbformat.v4.new_notebook(cells=cells))))
    assert [cell for cell, _ in read] == ["a", "b"]
    assert len(misspelled(read, tmp_path)) == 1
