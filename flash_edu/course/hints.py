"""The hints of exercises/course.toml, folded, below each notebook's check cells: `python -m flash_edu.course.hints` writes
them anew."""
import re

import nbformat

from flash_edu.course.manifest import Chapter, Exercise, load_course
from flash_edu.course.notebooks import to_text

FOLDED = re.compile(r"<details><summary>Hint \d</summary>\n.*?\n</details>\s*", re.DOTALL)
CHECK = re.compile(r'^check\("([\d.]+)"\)', re.MULTILINE)


def with_hints(notebook, chapter: Chapter):
    """A copy of the notebook with one cell of hints behind each check, and no other hint anywhere."""
    exercises, cells = {exercise.id: exercise for exercise in chapter.exercises}, []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell = nbformat.from_dict({**cell, "source": FOLDED.sub("", cell.source).strip()})
        if cell.cell_type == "code" or cell.source:
            cells.append(cell)
        asked = CHECK.search(cell.source) if cell.cell_type == "code" else None
        if asked and asked[1] in exercises:
            cells.append(_hint_cell(exercises[asked[1]]))
    return nbformat.from_dict({**notebook, "cells": cells})


def _hint_cell(exercise: Exercise):
    folded = [f"<details><summary>Hint {i}</summary>\n\n{hint}\n\n</details>" for i, hint in enumerate(exercise.hints, 1)]
    return nbformat.v4.new_markdown_cell("\n\n".join(folded), id=f"hints-{exercise.id.replace('.', '-')}")


if __name__ == "__main__":
    course = load_course()
    for chapter in course.chapters:
        path = course.root / "notebooks" / chapter.notebook
        before = path.read_text(encoding="utf-8")
        after = to_text(with_hints(nbformat.reads(before, as_version=4), chapter))
        if after != before:
            path.write_text(after, encoding="utf-8")
            print(f"wrote {path.name}")
