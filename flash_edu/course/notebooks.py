"""Run notebooks from top to bottom and store what they print, the same way every time.

    python -m flash_edu.course.notebooks notebooks/*.ipynb              # store the outputs in place
    python -m flash_edu.course.notebooks notebooks/04_*.ipynb --out DIR # leave the originals alone
    python -m flash_edu.course.notebooks notebooks/*.ipynb --tar FILE   # copies of the results in one file

A notebook that raises, or writes to stderr, is not stored: the command says which cell it was, and fails.
"""

import argparse
import os
import sys
import tarfile
import time
from pathlib import Path

import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT_CELL_METADATA = {"tags", "jupyter"}


class NotebookFailed(Exception):
    """A notebook did not run cleanly; the message names the cell and shows what it printed."""


def normalise(notebook):
    """Keep what a reader sees: drop timings, editor state and the version of whatever ran it. In place."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        kept = {name: value for name, value in cell.metadata.items() if name in KEPT_CELL_METADATA}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            cell.outputs = _join_streams(cell.outputs)
    return notebook


def _join_streams(outputs):
    """One output for text printed in a row: how often the kernel flushed must not show."""
    joined = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            joined.append(output)
    return joined


def to_text(notebook):
    """The notebook as it stands on disk."""
    return nbformat.v4.writes(notebook).rstrip("\n") + "\n"


def execute(path, *, timeout=300):
    """Run the notebook at `path` in a fresh kernel of this interpreter; return it with its new outputs."""
    notebook = nbformat.read(path, as_version=4)
    started = []
    client = NotebookClient(
        notebook,
        kernel_manager_class=_Kernel,
        timeout=timeout,
        record_timing=False,
        on_cell_start=lambda cell, cell_index: started.append(f"cell {cell_index + 1} ({cell.id})"),
        resources={"metadata": {"path": str(path.parent)}},
    )
    # MPLBACKEND would silence inline figures; a fixed hash seed keeps printed sets in one order.
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {"PYTHONHASHSEED": "0"}
    try:
        client.execute(env=env)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise NotebookFailed(f"{started[-1]} stopped the run.\n{error}") from None
    for number, cell in enumerate(notebook.cells, start=1):
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                raise NotebookFailed(f"cell {number} ({cell.id}) wrote to stderr:\n{output.text}")
    return normalise(notebook)


class _Kernel(AsyncKernelManager):
    """A kernel of the interpreter that runs this file, whatever kernels the user has installed."""

    @property
    def kernel_spec(self):
        return KernelSpec(resource_dir="", **get_kernel_dict())


def main(arguments=None):
    parser = argparse.ArgumentParser(
        "python -m flash_edu.course.notebooks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the results there instead of in place")
    parser.add_argument("--tar", type=Path, metavar="FILE", help="pack the results too, as notebooks/NAME")
    parser.add_argument("--timeout", type=int, default=300, metavar="S", help="for one cell (300 seconds)")
    options = parser.parse_args(arguments)

    written, failed = [], 0
    for path in options.notebooks:
        start = time.perf_counter()
        try:
            notebook = execute(path, timeout=options.timeout)
        except NotebookFailed as failure:
            failed += 1
            print(f"FAILED  {path}: {failure}\n", flush=True)
            continue
        target = options.out / path.name if options.out else path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(to_text(notebook), encoding="utf-8")
        written.append(target)
        print(f"stored  {target} ({time.perf_counter() - start:.1f} s)", flush=True)
    if options.tar:
        with tarfile.open(options.tar, "w") as tar:
            for target in written:
                tar.add(target, arcname=f"notebooks/{target.name}")
    if failed:
        sys.exit(f"{failed} of {len(options.notebooks)} notebooks did not run cleanly; they were not stored.")


if __name__ == "__main__":
    main()
