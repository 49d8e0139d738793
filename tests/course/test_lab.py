"""Notebooks as a reader meets them: JupyterLab in a real browser, Run All, and a look at what is on the page.

The pictures are kept in build/screenshots/.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
CHAPTERS = ["01", "04", "07", "09"]
RUN_ALL_SECONDS = 240

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
BROWSER_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},  # every cell is on the page
}

READY = """() => {
    const panel = window.jupyterapp?.shell?.currentWidget;
    const kernel = panel?.sessionContext?.session?.kernel;
    return panel?.context?.isReady && kernel?.status === 'idle';
}"""
RUN_ALL = """() => {
    window.ranAll = null;
    window.jupyterapp.commands.execute('notebook:run-all-cells')
        .then(() => { window.ranAll = 'done'; }, error => { window.ranAll = String(error); });
}"""
READ_PAGE = """() => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    const count = selector => notebook.node.querySelectorAll(selector).length;
    const prose = [...notebook.node.querySelectorAll('.jp-MarkdownOutput')].map(cell => {
        const copy = cell.cloneNode(true);
        for (const part of copy.querySelectorAll('code, pre, mjx-container, svg')) part.remove();
        return copy.textContent;
    });
    const leftOver = prose.filter(text => text.includes('$')).length;
    const edges = [...notebook.node.querySelectorAll('.jp-Cell')].map(cell => cell.getBoundingClientRect());
    return {
        cells: notebook.widgets.map(widget => widget.model.sharedModel.toJSON()),
        brokenFormulas: count('mjx-merror, mjx-mtext[style*="color: red"]') + leftOver,
        brokenDiagrams: count('.jp-RenderedMermaid.jp-mod-warning'),
        brokenImages: [...notebook.node.querySelectorAll('img')].filter(image => !image.naturalWidth).length,
        height: Math.max(...edges.map(e => e.bottom)) - Math.min(...edges.map(e => e.top)),
    };
}"""
PREPARE_SCREENSHOT = """() => {
    window.jupyterapp.shell.collapseLeft();
    window.jupyterapp.shell.collapseRight();
    for (const panel of document.querySelectorAll('.jp-WindowedPanel-outer')) panel.scrollTop = 0;
}"""


def not_here(reason):
    """On a user's own machine a missing browser is no failure; where CI runs it is."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        not_here("the browser test needs playwright: pip install playwright")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        not_here("the browser test needs Chromium: sudo apt-get install chromium (or name yours in CHROMIUM)")
    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        context = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=found, args=BROWSER_ARGS, viewport={"width": 1280, "height": 900}
        )
        yield context
        context.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own on this machine's loopback address, over a copy of what a reader opens."""
    scratch = tmp_path_factory.mktemp("lab")
    root = scratch / "root"
    for folder in ("notebooks", "exercises", "solutions", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)  # chapter 09 reads it
    write_broken_notebook(root / "notebooks" / "broken.ipynb")
    write_notebook(root / "notebooks" / "players.ipynb", [new_code_cell(PLAYERS)])

    (scratch / "settings").mkdir()
    (scratch / "settings" / "overrides.json").write_text(json.dumps(SETTINGS))
    own = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "user-settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env |= {name: str(scratch / folder) for name, folder in own.items()}
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token="]
    command += [f"--ServerApp.root_dir={root}", f"--LabApp.app_settings_dir={scratch / 'settings'}"]
    command += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    log = scratch / "lab.log"
    with log.open("w") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        server = subprocess.Popen(command, env=env, start_new_session=True, **streams)
    try:
        wait_until_answering(address, server, log)
        yield address
    finally:
        stop(server)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_answering(address, server, log):
    for _ in range(300):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{address}/api/status", timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab does not answer at {address}:\n{log.read_text()}")


def stop(server):
    """SIGTERM ends the kernels too; what does not listen goes with the process group, which is ours alone."""
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def write_broken_notebook(path):
    """One of each thing that must not pass."""
    formulas = [r"Fine: $\frac{1}{2}$", r"Half: $\frac{1}$", r"Unknown: $\lost$", r"Open: $\frac{1$"]
    diagram = "```mermaid\ngraph TD; A --> ((\n```"
    sources = ["print('fine')", "raise ValueError('this cell is broken')"]
    cells = [*map(new_markdown_cell, [*formulas, diagram]), *map(new_code_cell, sources)]
    write_notebook(path, cells)


def write_notebook(path, cells):
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


PLAYERS = """from flash_edu.figures import play_tile_walk
play_tile_walk([((0, 4), (0, 4)), ((4, 8), (0, 4)), ((4, 8), (4, 8))], 8, 8, causal=True)"""
READ_PLAYER = """() => {
    const box = document.querySelector('.flash-edu-player'), still = document.querySelector('.jp-RenderedImage');
    const images = [...box.querySelectorAll('img')];
    return {
        words: box.querySelector('.words').textContent,
        shown: images.filter(image => image.style.visibility !== 'hidden' && image.naturalWidth).length,
        still: still.style.display,
        collapsed: document.querySelectorAll('.jp-MarkdownHeadingCollapsed').length,
    };
}"""


def run_all(browser, lab, name):
    """Open a notebook, run it, keep a picture; return what is wrong with the page, a line each."""
    page = browser.new_page()
    page_errors = []
    page.on("pageerror", lambda error: page_errors.append(f"the page raised {error}"))
    try:
        page.goto(f"{lab}/lab/tree/notebooks/{name}.ipynb?reset", wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=120_000)
        page.evaluate(RUN_ALL)
        page.wait_for_function("() => window.ranAll !== null", timeout=RUN_ALL_SECONDS * 1000)
        page.wait_for_function(READY, timeout=30_000)
        page.wait_for_timeout(1500)  # formulas, diagrams and pictures are drawn after the cells have run
        seen = page.evaluate(READ_PAGE)
        page.set_viewport_size({"width": 1100, "height": min(int(seen["height"]) + 300, 16_000)})
        page.evaluate(PREPARE_SCREENSHOT)
        page.wait_for_timeout(500)
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}.png")
    finally:
        page.close()
    return page_errors + problems(seen)


def problems(seen):
    found = []
    for number, cell in enumerate(seen["cells"], start=1):
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        if cell["execution_count"] is None:
            found.append(f"cell {number} was not run")
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"cell {number} raised {output['ename']}: {output['evalue']}")
            elif output.get("name") == "stderr":
                found.append(f"cell {number} wrote to stderr: {''.join(output['text'])[:500]}")
    for what in ("brokenFormulas", "brokenDiagrams", "brokenImages"):
        if seen[what]:
            found.append(f"{what}: {seen[what]}")
    return found


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_runs_in_jupyterlab(browser, lab, chapter):
    (path,) = (ROOT / "notebooks").glob(f"{chapter}_*.ipynb")
    assert run_all(browser, lab, path.stem) == []


def test_a_broken_notebook_is_noticed(browser, lab):
    found = "\n".join(run_all(browser, lab, "broken"))
    assert "cell 7 raised ValueError: this cell is broken" in found
    assert "brokenFormulas: 3" in found
    assert "brokenDiagrams: 1" in found


def test_a_cell_that_did_not_run_is_noticed():
    """Not in the browser: whether the cells behind an error still run depends on when their requests arrive."""
    cells = [new_code_cell("print('run')", execution_count=1), new_code_cell("print('never run')")]
    page = {"cells": cells, "brokenFormulas": 0, "brokenDiagrams": 0, "brokenImages": 0}
    assert problems(page) == ["cell 2 was not run"]


def test_a_player_takes_the_place_of_its_picture_and_obeys_mouse_and_keys(browser, lab):
    page = browser.new_page()
    try:
        page.goto(f"{lab}/lab/tree/notebooks/players.ipynb?reset", wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=120_000)
        page.evaluate(RUN_ALL)
        page.wait_for_selector(".flash-edu-player .words", timeout=60_000)
        seen = page.evaluate(READ_PLAYER)
        assert seen["words"].startswith("A causal score matrix") and seen["shown"] == 5 and seen["still"] == "none"

        page.get_by_role("button", name="one step back").click()
        assert page.evaluate(READ_PLAYER)["words"] == "Step 3: queries 4-7 with keys 4-7."
        page.get_by_role("slider", name="step").focus()
        page.keyboard.press("ArrowLeft")
        seen = page.evaluate(READ_PLAYER)
        assert seen["words"] == "Step 2: queries 4-7 with keys 0-3." and seen["shown"] == 3
        page.get_by_role("button", name="first step").focus()
        page.keyboard.press("Enter")
        assert page.evaluate(READ_PLAYER)["words"] == "Nothing is loaded yet."
        page.get_by_role("button", name="play", exact=True).click()
        ended = "() => document.querySelector('.flash-edu-player .words').textContent.startsWith('A causal')"
        page.wait_for_function(ended, timeout=20_000)
    finally:
        page.close()
