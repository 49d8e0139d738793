"""Every notebook as a learner who has solved everything sees it: each check is a green box. (nbval runs them untouched.)"""
import nbformat
import pytest
from nbclient import NotebookClient
from small_course import ROOT

from flash_edu.course.manifest import load_course
from flash_edu.course.report import COLOURS

CHAPTERS = [chapter for chapter in load_course(ROOT).chapters if chapter.exercises]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.stem)
def test_solved(chapter, monkeypatch):
    monkeypatch.setenv("FLASH_EDU_TARGET", "solutions")
    monkeypatch.setenv("FLASH_EDU_STRICT", "1")  # a check that is not green raises
    notebook = nbformat.read(ROOT / "notebooks" / chapter.notebook, as_version=4)
    NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    boxes = [
        output.data["text/html"]
        for cell in notebook.cells
        if cell.cell_type == "code" and "check(" in cell.source
        for output in cell.outputs
        if "text/html" in output.get("data", {})
    ]
    green = [box for box in boxes if f"solid {COLOURS['green']}" in box and "claims hold" in box]
    missing = [exercise.id for exercise in chapter.exercises if not any(exercise.label in box for box in green)]
    assert not missing, f"no green box for {', '.join(missing)}"
