"""`python -m flash_edu.figures.readme [FILE]` draws the README's picture from what this machine does."""

import pathlib
import sys

import torch
from matplotlib.figure import Figure

import flash_edu
from flash_edu.figures import trace_job
from flash_edu.figures.charts import draw_memory
from flash_edu.figures.matrices import draw_walks, first_head_walks
from flash_edu.figures.style import QUIET, drawn, picture
from flash_edu.figures.traffic import peak_memory
from flash_edu.figures.triton_trace import trace_forward
from flash_edu.reference import naive_attention

_TOKENS, _TILE = 128, 16


@drawn
def readme_picture(lengths: list[int]) -> Figure:
    """Left: which tiles a causal forward visits. Right: memory against length, naive and flash."""
    trace = trace_forward(_TOKENS, _TOKENS, causal=True, block_q=_TILE, block_k=_TILE)
    fig = picture(9.6, 3.9, layout=None)
    tiles = fig.add_axes((0.065, 0.16, 0.275, 0.275 * 9.6 / 3.9), xlim=(0, _TOKENS), ylim=(_TOKENS, 0))
    visited, total = draw_walks(tiles, first_head_walks(trace), _TOKENS, _TOKENS, causal=True)
    tiles.set(xlabel="key", ylabel="query")
    subtitle = "recorded: one colour per program, counting its tiles"
    _head(fig, 0.02, f"The kernel loads {visited} of {total} tiles", subtitle)

    memory = fig.add_axes((0.5, 0.16, 0.4, 0.275 * 9.6 / 3.9))
    curves, where = measure_memory(lengths)
    draw_memory(memory, curves)
    memory.set_xlabel("N, sequence length (tokens)")
    _head(fig, 0.43, "and stores nothing that is N x N", f"measured: peak memory beyond Q, K and V, {where}")
    return fig


def _head(fig, x: float, title: str, subtitle: str) -> None:
    fig.text(x, 0.97, title, va="top", fontsize=12, fontweight="bold")
    fig.text(x, 0.905, subtitle, va="top", fontsize=9, color=QUIET)


def measure_memory(lengths: list[int]) -> tuple[dict, str]:
    """{name: (lengths, bytes)} of a causal forward, one head of 64 numbers, and the machine in words."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    curves = {"naive attention": (lengths, []), "flash_attention": (lengths, [])}
    for n in lengths:
        q, k, v = torch.randn(3, 1, 1, n, 64, device=device).unbind()
        curves["naive attention"][1].append(peak_memory(naive_attention, q, k, v, causal=True))
        with trace_job.interpreted_tiles(
            128, 128
        ):  # fewer steps for the interpreter; a GPU has its own tiles
            flash = peak_memory(flash_edu.flash_attention, q, k, v, causal=True, backend="triton")
        curves["flash_attention"][1].append(flash)
    machine = torch.cuda.get_device_name() if on_gpu else "Triton's interpreter"
    return curves, f"fp32, d = 64 ({machine})"


if __name__ == "__main__":
    file = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "docs/flash_edu.png")
    file.parent.mkdir(exist_ok=True)
    lengths = [512 << i for i in range(6)] if torch.cuda.is_available() else [128 << i for i in range(5)]
    file.write_bytes(readme_picture(lengths).png(dpi=150))
    print(f"wrote {file}, {file.stat().st_size // 1024} KiB")
