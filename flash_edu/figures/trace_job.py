"""`python -m flash_edu.figures.trace_job REQUEST ANSWER` records one run; the process must be interpreted."""

import importlib
import pathlib
import sys
from unittest import mock

import torch

import flash_edu
from flash_edu.figures.trace import Trace
from flash_edu.figures.triton_trace import trace_triton


def run(job: dict) -> Trace:
    return {"forward": _forward, "backward": _backward, "file": _file}[job["run"]](job)


def _forward(job: dict) -> Trace:
    q, k, v = job["tensors"].values()
    with interpreted_tiles(*job["tile"]):
        return trace_triton(
            lambda: flash_edu.flash_attention(q, k, v, **job["rules"], backend="triton"), job["tensors"]
        )


def _backward(job: dict) -> Trace:
    *qkv, dout = job["tensors"].values()
    q, k, v = (x.requires_grad_() for x in qkv)
    with interpreted_tiles(*job["tile"]):
        out = flash_edu.flash_attention(q, k, v, causal=job["causal"], backend="triton")
        return trace_triton(lambda: torch.autograd.grad(out, (q, k, v), dout), job["tensors"])


def interpreted_tiles(block_q: int, block_k: int):
    """A context in which the interpreter uses these tiles, so that a picture has as many as it wants."""
    from flash_edu.kernels import tiles

    tile = tiles.Tile(block_q, block_k, 4, 1)
    return mock.patch.dict(tiles.INTERPRETED, dict.fromkeys(tiles.INTERPRETED, tile))


def _file(job: dict) -> Trace:
    function = getattr(_load(pathlib.Path(job["path"])), job["function"])
    tensors = job["tensors"]
    return trace_triton(
        lambda: function(*tensors.values(), **job["kwargs"]), tensors, row_axes=job["row_axes"]
    )


def _load(path: pathlib.Path):
    """The module at `path`: as part of its package if it is in one, so that its relative imports work."""
    package = path.parent if (path.parent / "__init__.py").is_file() else None
    sys.path.insert(0, str(package.parent if package else path.parent))
    return importlib.import_module(f"{package.name}.{path.stem}" if package else path.stem)


if __name__ == "__main__":
    request, answer = sys.argv[1:]
    pathlib.Path(answer).write_text(run(torch.load(request, weights_only=False)).to_json())
