"""What every notebook of the course promises, whatever it teaches.

A rule looks at one notebook and yields what is wrong with it. Each rule is also shown a notebook that breaks
it: a rule that cannot fail would promise nothing.
"""
import ast
import copy
import re
import sys
import tarfile
from pathlib import Path
from statistics import median

import links
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from flash_edu.course.judging import run_check
from flash_edu.course.manifest import load_course
from flash_edu.course.notebooks import METADATA, main, normalise, to_text
from flash_edu.course.skeletons import skeleton_of

ROOT = Path(__file__).resolve().parents[2]
COURSE = load_course(ROOT)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 2**20
CHECKED = "nbval-check-output"


class Notebook:
    """A notebook as the rules see it: its text on disk, and its cells by kind."""

    def __init__(self, path, text):
        self.path, self.text = path, text
        self.number = path.name[:2]
        self.node = nbformat.v4.reads(text)  # as it stands: nbformat.reads mends what it can
        self.cells = self.node.cells
        self.code = [c for c in self.cells if c.cell_type == "code" and c.source.strip()]
        self.prose = "\n\n".join(c.source for c in self.cells if c.cell_type == "markdown")
        self.words = links.prose(self.prose)

    def outputs(self):
        for cell in self.code:
            for output in cell.outputs:
                yield cell, output


def tags(cell):
    return cell.metadata.get("tags", [])


def shown(output):
    """The text of an output, whichever way it was written."""
    if output.output_type == "stream":
        return output.text
    return "\n".join(str(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/"))


def magic_free(source):
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


# --- the file ---------------------------------------------------------------------------------------------


def is_valid(notebook):
    try:
        nbformat.validate(notebook.node)
    except nbformat.ValidationError as error:
        yield f"not a valid notebook: {error.message}"


def is_normalised(notebook):
    if to_text(normalise(copy.deepcopy(notebook.node))) != notebook.text:
        yield "holds editor state, timings or another kernel: flash_edu.course.notebooks writes it otherwise"


def is_small(notebook):
    if len(notebook.text.encode()) >= MAX_BYTES:
        yield f"{len(notebook.text.encode()):,} bytes; a notebook stays under {MAX_BYTES:,}"


def has_stable_ids(notebook):
    ids = [cell.id for cell in notebook.cells]
    for cell_id in ids:
        if ids.count(cell_id) > 1:
            yield f"id {cell_id} names more than one cell"
        if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]{27})?", cell_id):
            yield f"id {cell_id} was drawn at random by an editor: give the cell a name that lasts"


def names_no_machine(notebook):
    path = re.compile(r"(?<![\w.~-])/(?:home|root|Users|work|tmp|opt|mnt|var|private)/\S*")
    for cell in notebook.cells:
        for found in path.findall(cell.source):
            yield f"cell {cell.id} holds {found}, a path of one machine"
    for cell, output in notebook.outputs():
        for found in path.findall(shown(output)):
            yield f"the output of cell {cell.id} holds {found}, a path of one machine"


# --- the stored run ---------------------------------------------------------------------------------------


def ran_cleanly(notebook):
    for cell, output in notebook.outputs():
        if output.output_type == "error":
            yield f"cell {cell.id} stores an error: {output.ename}"
        elif output.get("name") == "stderr":
            yield f"cell {cell.id} stores text written to stderr: {output.text[:80]!r}"


def ran_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in notebook.code]
    if counts != list(range(1, len(counts) + 1)):
        yield f"stored execution counts are {counts}: run the whole notebook in a fresh kernel"


def checks_outputs(notebook):
    checked = [cell for cell in notebook.code if CHECKED in tags(cell)]
    if len(checked) < 3:
        yield f"{len(checked)} cells are tagged {CHECKED}; each notebook has at least 3"
    for cell in checked:
        if not any(shown(output).strip() for output in cell.outputs):
            yield f"cell {cell.id} is tagged {CHECKED} and prints nothing that could be compared"


def names_the_gpu(notebook):
    """The stored outputs come from a GPU; chapter 00 says from which."""
    if notebook.number == "00" and not any(re.search(r"NVIDIA|AMD", shown(o)) for _, o in notebook.outputs()):
        yield "no output names a GPU: make notebooks-gpu"


def describes_its_pictures(notebook):
    """For readers who do not see. Pictures that were stored before they could say what they show pass until then."""
    before = re.compile(r"<(?:Picture|Figure) size .*>")
    for cell, output in notebook.outputs():
        data = output.get("data", {})
        if "image/png" not in data or before.fullmatch(data.get("text/plain", "")):
            continue
        if not output.metadata.get("image/png", {}).get("alt", "").strip():
            yield f"the picture of cell {cell.id} has no alt in its metadata: draw it with flash_edu.figures"


# --- the code ---------------------------------------------------------------------------------------------


def imports_flash_edu_first(notebook):
    lines = [line.strip() for line in notebook.code[0].source.splitlines()]
    ours = [n for n, line in enumerate(lines) if re.match(r"(import|from) flash_edu\b", line)]
    triton = [n for n, line in enumerate(lines) if re.match(r"(import|from) triton\b", line)]
    if not ours or triton and triton[0] < ours[0]:
        yield "the first code cell imports flash_edu, before triton: it picks the GPU or the interpreter"


def has_short_cells(notebook):
    lengths = {cell.id: len(cell.source.splitlines()) for cell in notebook.code}
    if median(lengths.values()) > 8:
        yield f"the median code cell has {median(lengths.values())} lines; 8 at most"
    for cell in notebook.code:
        if lengths[cell.id] > 20 and "kernel" not in tags(cell):
            yield f"cell {cell.id} has {lengths[cell.id]} lines; 20 at most without the tag kernel"


def asserts_something(notebook):
    trees = [ast.parse(magic_free(cell.source)) for cell in notebook.code]
    if not any(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree)):
        yield "no cell asserts what the text claims"


def names_what_it_imports(notebook):
    for cell in notebook.code:
        if re.search(r"^\s*from .* import \*", cell.source, re.MULTILINE):
            yield f"cell {cell.id} imports *"


def defines_each_kernel_once(notebook):
    """A compiled kernel keeps the helper that it was first compiled with: a new version needs a new name."""
    seen = set()
    for cell in notebook.code:
        for node in ast.walk(ast.parse(magic_free(cell.source))):
            decorators = " ".join(map(ast.unparse, getattr(node, "decorator_list", [])))
            if "jit" not in decorators:
                continue
            if node.name in seen:
                yield f"cell {cell.id} redefines the kernel {node.name}"
            seen.add(node.name)


# --- the prose --------------------------------------------------------------------------------------------


def has_the_bones(notebook):
    wanted = [rf"\A# {notebook.number} · \S", r"\*\*After this chapter you can\*\*", r"\*\*You need\*\*"]
    wanted += [r"\*\*Time\*\*", r"^> \*\*Predict\.\*\*"]
    if notebook.number != "00":
        wanted += [r"^## What changed$", r"^## What comes next$"]
    for pattern in wanted:
        if not re.search(pattern, notebook.prose, re.MULTILINE):
            yield f"the text has no {pattern}"


def renders_everywhere(notebook):
    """The same on GitHub and in JupyterLab."""
    if re.search(r"^\s*>\s*\[!", notebook.prose, re.MULTILINE):
        yield "GitHub's alerts are plain text in JupyterLab: write > **Note.**"
    for image in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", notebook.words):
        yield f"the image {image} is not stored in the notebook"
    for tag in re.findall(r"</?([a-zA-Z][\w-]*)[^<>\n]*>", re.sub(r"<https?://[^>]*>", "", notebook.words)):
        if tag not in ("details", "summary"):
            yield f"<{tag}> is HTML; only <details> and <summary> show alike everywhere"


def links_lead_somewhere(notebook):
    yield from links.broken_links(notebook.path, notebook.prose, notebook.path.parent.parent)


def belittles_nobody(notebook):
    """What is easy for the writer need not be for the reader."""
    words = r"\b(?:simple|simply|obvious|obviously|trivial|trivially|easy|easily|just)\b"
    for word in re.findall(words, notebook.words, re.IGNORECASE):
        yield f"the text says {word!r}"


RULES = [
    is_valid,
    is_normalised,
    is_small,
    has_stable_ids,
    names_no_machine,
    ran_cleanly,
    ran_from_top_to_bottom,
    checks_outputs,
    names_the_gpu,
    describes_its_pictures,
    imports_flash_edu_first,
    has_short_cells,
    asserts_something,
    names_what_it_imports,
    defines_each_kernel_once,
    has_the_bones,
    renders_everywhere,
    links_lead_somewhere,
    belittles_nobody,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, rule):
    problems = list(rule(Notebook(path, path.read_text(encoding="utf-8"))))
    assert not problems, "\n".join(problems)


def test_the_manifest_lists_every_notebook():
    assert [path.name for path in NOTEBOOKS] == [chapter.notebook for chapter in load_course(ROOT).chapters]


# --- the rules themselves ---------------------------------------------------------------------------------

TEXT = """# 00 · Good

**After this chapter you can** run it. **You need** nothing. **Time** 1 minute.

> **Predict.** What does $a < b$ or `<tag>` print? See [the file](good.ipynb) and [above](#00-·-Good).

<details><summary>Hint</summary>Look.</details>"""
KERNEL = "@triton.jit\ndef a(): pass"
SOURCES = ["import flash_edu\nprint('NVIDIA')", "print('ok')", "assert 1\nprint(1)", KERNEL]


def good():
    cells = [new_markdown_cell(TEXT, id="00-text")]
    for count, source in enumerate(SOURCES, start=1):
        cell = new_code_cell(source, id=f"00-{count}", execution_count=count)
        if "print" in source:
            cell.outputs = [new_output("stream", name="stdout", text="NVIDIA\n")]
            cell.metadata["tags"] = [CHECKED]
        cells.append(cell)
    return new_notebook(cells=cells, metadata=METADATA)


def as_read(node, tmp_path, name="00_good.ipynb"):
    (tmp_path / "good.ipynb").touch()
    return Notebook(tmp_path / name, to_text(node))


def add_text(text):
    return lambda node: node.cells.append(new_markdown_cell(text, id="00-more"))


def add_code(source, **extra):
    extra = {"id": "00-more", "execution_count": len(SOURCES) + 1} | extra
    return lambda node: node.cells.append(new_code_cell(source, **extra))


def prints(name="stdout", text="x"):
    return [new_output("stream", name=name, text=text)]


def picture(metadata, text="A tile walk."):
    data = {"image/png": "iVBORw0KGgo=", "text/plain": text}
    return new_output("execute_result", data=data, metadata=metadata, execution_count=1)


def change(position, **values):
    return lambda node: node.cells[position].update(values)


BREAK = [
    (is_valid, change(1, execution_count="one")),
    (is_normalised, lambda node: node.metadata.update(widgets={})),
    (is_normalised, lambda node: node.metadata.kernelspec.update(name="mine")),
    (is_normalised, lambda node: node.cells[1].metadata.update(execution={"started": "now"})),
    (is_normalised, change(1, outputs=prints() + prints())),
    (is_small, add_text("word " * 250_000)),
    (has_stable_ids, change(1, id="00-2")),
    (has_stable_ids, change(1, id="3f9a01bc")),
    (has_stable_ids, change(1, id="6f6a1b0e-7a35-4b7e-9d6c-0c1f5a7d2e44")),
    (names_no_machine, add_code("open('/home/me/data')")),
    (names_no_machine, add_code("1", outputs=prints(text='File "/Users/me/x.py"'))),
    (ran_cleanly, add_code("1", outputs=[new_output("error", ename="E", evalue="", traceback=[])])),
    (ran_cleanly, add_code("1", outputs=prints(name="stderr"))),
    (ran_from_top_to_bottom, change(1, execution_count=None)),
    (ran_from_top_to_bottom, change(1, execution_count=7)),
    (checks_outputs, lambda node: node.cells[1].metadata.clear()),
    (checks_outputs, change(1, outputs=[])),
    (names_the_gpu, lambda node: [cell.update(outputs=[]) for cell in node.cells[1:]]),
    (describes_its_pictures, add_code("1", outputs=[picture({})])),
    (describes_its_pictures, add_code("1", outputs=[picture({"image/png": {"alt": " "}})])),
    (imports_flash_edu_first, change(1, source="import torch")),
    (imports_flash_edu_first, change(1, source="import triton\nimport flash_edu")),
    (has_short_cells, add_code("x = 1\n" * 21)),
    (has_short_cells, lambda node: [cell.update(source="x = 1\n" * 9) for cell in node.cells[1:]]),
    (asserts_something, change(3, source="print(1)")),
    (names_what_it_imports, add_code("from math import *")),
    (defines_each_kernel_once, add_code(KERNEL)),
    (has_the_bones, change(0, source=TEXT.replace("# 00 ·", "#"))),
    (has_the_bones, change(0, source=TEXT.replace("Predict", "Guess"))),
    (renders_everywhere, add_text("> [!NOTE]\n> Look.")),
    (renders_everywhere, add_text("![a picture](https://example.org/a.png)")),
    (renders_everywhere, add_text('<img src="https://example.org/a.png">')),
    (links_lead_somewhere, add_text("[next](01_missing.ipynb)")),
    (links_lead_somewhere, add_text("[above](#Bad)")),
    (links_lead_somewhere, add_text("[the paper](http://example.org)")),
    (belittles_nobody, add_text("It is just a sum.")),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_keeps_the_rule(rule, tmp_path):
    assert list(rule(as_read(good(), tmp_path))) == []
    assert rule in {broken for broken, _ in BREAK}


@pytest.mark.parametrize("rule, spoil", BREAK, ids=[rule.__name__ for rule, _ in BREAK])
def test_a_bad_notebook_breaks_the_rule(rule, spoil, tmp_path):
    node = good()
    spoil(node)
    assert list(rule(as_read(node, tmp_path)))


def test_a_picture_passes_with_its_description_or_from_before_there_was_one(tmp_path):
    node = good()
    old = picture({}, text="<Picture size 600x350 with 1 Axes>")
    add_code("1", outputs=[picture({"image/png": {"alt": "A tile walk."}}), old])(node)
    assert list(describes_its_pictures(as_read(node, tmp_path))) == []


@pytest.mark.parametrize("section", ["What changed", "What comes next"])
def test_a_later_chapter_closes_with_its_sections(section, tmp_path):
    node = good()
    node.cells[0].source = TEXT.replace("00 ·", "04 ·") + "\n\n## What changed\n\n## What comes next"
    assert list(has_the_bones(as_read(node, tmp_path, "04_good.ipynb"))) == []
    node.cells[0].source = node.cells[0].source.replace(f"## {section}", "")
    assert list(has_the_bones(as_read(node, tmp_path, "04_good.ipynb")))


# --- the command that stores outputs ----------------------------------------------------------------------


def write(path, *sources):
    cells = [new_code_cell(source, id=f"00-{number}") for number, source in enumerate(sources)]
    path.write_text(to_text(new_notebook(cells=cells, metadata=METADATA)))


def test_outputs_are_stored_the_same_way_every_time(tmp_path):
    path, tar = tmp_path / "00_good.ipynb", tmp_path / "results.tar"
    counting = "for n in range(3):\n    print(n, flush=True)"
    write(path, counting, "{'a', 'b', 'c'}", "import sys; sys.executable")
    before = path.read_text()
    main([str(path), "--out", str(tmp_path / "elsewhere")])
    assert path.read_text() == before
    main([str(path), "--tar", str(tar)])
    after = path.read_text()
    assert (tmp_path / "elsewhere" / path.name).read_text() == after
    with tarfile.open(tar) as packed:
        assert packed.extractfile(f"notebooks/{path.name}").read().decode() == after
    stored = Notebook(path, after)
    assert [shown(output) for _, output in stored.outputs()][0] == "0\n1\n2\n"
    assert sys.executable in shown(stored.code[2].outputs[0])
    assert list(is_normalised(stored)) == list(ran_from_top_to_bottom(stored)) == []


@pytest.mark.parametrize(
    "source, said",
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings; warnings.warn('think again')", "wrote to stderr"),
        ("import os; os._exit(1)", "Kernel died"),
        ("import time; time.sleep(60)", "timed out"),
    ],
)
def test_a_run_that_is_not_clean_is_not_stored(source, said, tmp_path, capsys):
    path = tmp_path / "00_bad.ipynb"
    write(path, "print('fine')", source)
    before = path.read_text()
    with pytest.raises(SystemExit) as stop:
        main([str(path), "--timeout", "3"])
    assert stop.value.code and path.read_text() == before
    printed = capsys.readouterr().out
    assert said in printed and "cell 2 (00-1)" in printed


def untouched_exercises(tmp_path):
    """As they come, whatever this machine's reader has written into theirs."""
    folder = tmp_path / "exercises"
    folder.mkdir()
    for chapter in COURSE.chapters:
        if chapter.exercises:
            (folder / chapter.file).write_text(skeleton_of(chapter, COURSE), encoding="utf-8")
    return folder


def test_the_stored_boxes_are_what_an_untouched_check_says(tmp_path):
    """A new claim, or other words, must reach the notebooks: they are read where nothing runs."""
    folder, compared = untouched_exercises(tmp_path), 0
    for chapter in COURSE.chapters:
        for cell in nbformat.read(ROOT / "notebooks" / chapter.notebook, as_version=4).cells:
            asked = re.fullmatch(r'check\("([\d.]+)"\)', cell.source.strip())
            if asked:
                (box,) = [output for output in cell.outputs if "data" in output]
                said = run_check(asked[1], target=str(folder)).text()
                assert box.data["text/plain"] == said, f"{chapter.notebook}, {cell.source}: store its output again"
                compared += 1
    assert compared >= len(COURSE.exercises)
