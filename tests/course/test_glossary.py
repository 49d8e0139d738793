"""docs/glossary.md: what chapters link to for a symbol or a word."""
import re
from pathlib import Path

import pytest
from links import anchors, github_slugs, jupyterlab_ids
from test_notebooks import Notebook

from flash_edu.course.manifest import load_course

ROOT = Path(__file__).resolve().parents[2]
PATH = ROOT / "docs" / "glossary.md"
TEXT = PATH.read_text(encoding="utf-8")
TERMS = dict(re.findall(r"^### ([^\n]+)\n\n(.*?)\s*(?=^###|\Z)", TEXT, re.MULTILINE | re.DOTALL))
SHORT = Notebook(path := ROOT / "notebooks" / "00_start_here.ipynb", path.read_text(encoding="utf-8"))


def table(text, header):
    """The rows below a table's header, a list of cells each."""
    lines = text[text.index(header) :].splitlines()
    rows = [line for line in lines[2:] if line.startswith("|")][: lines[2:].index("")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


SYMBOLS = {row[0]: row[1:] for row in table(TEXT, "| symbol | in code | shape | meaning | chapter |")}
SHORT_SYMBOLS = {row[0]: row[1:] for row in table(SHORT.prose + "\n\n", "| symbol | in code | shape | meaning |")}


def words(text):
    """A meaning as words: without the chapter that it points to."""
    return re.sub(r"\s*\(?\[?chapter \d\d\]?(\([^)]*\))?\)?", "", text)


def names(text):
    return set(re.findall(r"`([^`]*)`", text))


def test_terms_are_sorted_and_each_stands_once():
    headings = re.findall(r"^### (.+)$", TEXT, re.MULTILINE)
    assert headings == sorted(set(headings)) == list(TERMS)
    assert len(TERMS) >= 80


def test_every_term_can_be_linked_to_on_github_and_in_jupyterlab():
    of_terms = [set(made(f"## {term}")) for term in TERMS for made in (github_slugs, jupyterlab_ids)]
    assert set().union(*of_terms) <= anchors(PATH)


@pytest.mark.parametrize("term", TERMS)
def test_a_term_has_one_to_three_sentences_and_its_chapter(term):
    assert re.search(r"chapter \d\d\b", TERMS[term]), "no chapter explains it"
    said = re.sub(r"\([^()]*\)|`[^`]*`|\$[^$]*\$|\d\.\d", "", TERMS[term])
    assert 1 <= len(re.findall(r"[.](?=\s|$)", said)) <= 4, "too little, or too much"


def test_the_chapter_of_a_term_is_a_link_once_it_exists():
    ready = {f"{chapter.number:02d}": chapter.notebook for chapter in load_course(ROOT).chapters}
    for number, before, after in re.findall(r"(?=(?:.)?chapter (\d\d)\b)(.)chapter \d\d(\S*)", TEXT):
        if number in ready:
            link = f"](../notebooks/{ready[number]}"
            assert before == "[" and after.startswith(link), f"chapter {number} is ready: {link}...)"
        else:
            assert before != "[", f"chapter {number} is not in the course"


def test_no_symbol_stands_twice():
    assert len(SYMBOLS) == len(table(TEXT, "| symbol | in code | shape | meaning | chapter |"))
    assert len(SYMBOLS) > len(SHORT_SYMBOLS) >= 12


@pytest.mark.parametrize("symbol", SHORT_SYMBOLS)
def test_a_symbol_means_what_chapter_00_says(symbol):
    code, shape, meaning = SHORT_SYMBOLS[symbol]
    here_code, here_shape, here_meaning, _ = SYMBOLS[symbol]
    assert names(code) <= names(here_code)
    assert shape == here_shape
    assert words(here_meaning).startswith(words(meaning)), f"chapter 00 says: {meaning}"


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_a_symbol_has_a_meaning_and_a_chapter(symbol):
    code, shape, meaning, chapter = SYMBOLS[symbol]
    assert meaning
    assert re.match(r"\[?chapter \d\d\b", chapter)


def test_the_short_forms_lead_to_terms():
    short = TEXT[TEXT.index("Short forms:") : TEXT.index("### ")]
    forms = dict(re.findall(r"\*\*([^*]+)\*\*\s+(?:is\s+)?\[([^\]]+)\]", short))
    assert list(forms) == sorted(forms) and set(forms.values()) <= set(TERMS)
