"""Every link in the project's documents leads somewhere; test_notebooks asks the same of the notebooks."""
from pathlib import Path

import pytest
from links import anchors, broken_links, github_slugs, jupyterlab_ids, targets

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])


def test_there_are_documents():
    assert {"README.md", "CONTRIBUTING.md", "docs/glossary.md", "benchmarks/README.md"} <= {
        str(path.relative_to(ROOT)) for path in DOCUMENTS
    }
    assert sum(len(targets(path.read_text(encoding="utf-8"))) for path in DOCUMENTS) > 100


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    problems = list(broken_links(path, path.read_text(encoding="utf-8"), ROOT))
    assert not problems, "\n".join(problems)


TEXT = """# Title
## two words
### two words
## `code`, and *more* [of it](x.md)
```bash
# no heading
```
## Step 2. Scale
"""


def test_headings_have_the_names_that_each_place_gives_them():
    assert github_slugs(TEXT) == ["title", "two-words", "two-words-1", "code-and-more-of-it", "step-2-scale"]
    assert jupyterlab_ids(TEXT) == ["Title", "two-words", "two-words", "code,-and-more-of-it", "Step-2.-Scale"]
    assert anchors(Path("x.md"), TEXT) == {"two-words"}
    assert anchors(Path("x.ipynb"), TEXT) == set(jupyterlab_ids(TEXT))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# Other\n\n## two words\n")
    (tmp_path / "file.txt").touch()
    return tmp_path


GOOD = [
    "[a](other.md)", "[a](../file.txt)", "[a](../docs)", "![a picture](../file.txt)", "[a](other.md#two-words)",
    "# top\n[a](#top)", "[a](https://example.org)", "[a](https://arxiv.org/abs/2205.14135 \"the paper\")",
    "<https://example.org/a_b>", "See https://example.org/a.", "`[a](nowhere.md)`", "```\n[a](nowhere.md)\n```",
    "[![a](../file.txt)](other.md)", "$[a](b)$",
]  # fmt: skip
BAD = [
    "[a](nowhere.md)", "![a picture](nowhere.png)", "[a](other.md#three-words)", "[a](other.md#Two-Words)",
    "[a](other.md#Other)", "# top\n[a](#bottom)", "[a](../file.txt#top)", "[a](../../outside)", "[a](/etc/hosts)",
    "[a]()", "[a](#)", "[a](http://example.org)", "[a](https://localhost/a)", "[a](https://me@example.org)",
    "[a](https://example.org:8000/)", "[a](https:/example.org)", "[a](ftp://example.org/a)", "[a](mailto:a@b.org)",
    "See http://example.org/a.", "<http://example.org>", "[![a](nowhere.png)](other.md)",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_a_good_link_passes(text, folder):
    assert list(broken_links(folder / "docs" / "page.md", text, folder)) == []


@pytest.mark.parametrize("text", BAD)
def test_a_broken_link_is_noticed(text, folder):
    assert list(broken_links(folder / "docs" / "page.md", text, folder))
