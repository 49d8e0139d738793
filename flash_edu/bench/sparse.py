"""Skipped tiles, measured: time against the window, and a document mask, beside FlexAttention. Needs a CUDA GPU.

    python -m flash_edu.bench.sparse [--json FILE]

bf16, 16 heads of d = 128, N = 16384, causal. A window of w lets each query see itself and the w keys before it. The document
mask divides the sequence into parts of equal length and hides all others; it is a Pattern here, a block mask there. Plans are
made beforehand for both. A time is only reported for a right answer.
"""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from flash_edu import Pattern, flash_attention
from flash_edu.bench import report

HEADS, N, D = 16, 16384, 128
WINDOWS = (None, 4096, 1024, 256)
DOCUMENTS = (1, 4, 16)  # in one sequence


@triton.jit
def same_document(batch, head, i, j, buffers):
    return (tl.load(buffers[0] + i) == tl.load(buffers[0] + j)) & (j <= i)


def cases() -> dict[str, tuple[dict, Callable]]:
    """{name: (our arguments, Flex's mask_mod)}"""
    made = {}
    for window in WINDOWS:
        width = N if window is None else window
        asked = {"causal": True, "window": None if window is None else (window, 0)}
        made[f"window {window}"] = asked, lambda b, h, i, j, width=width: (i >= j) & (i - j <= width)
    for count in DOCUMENTS:
        documents = torch.arange(N, device="cuda", dtype=torch.int32) // (N // count)
        asked = {"pattern": Pattern(same_document, buffers=(documents,))}
        made[f"{count} documents"] = asked, lambda b, h, i, j, ids=documents: (ids[i] == ids[j]) & (j <= i)
    return made


def milliseconds(attention: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor) -> dict[str, float]:
    out = attention(*inputs)
    bench = lambda run: triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median")  # noqa: E731
    backward = bench(lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True))
    return {"forward_ms": bench(lambda: attention(*inputs)), "backward_ms": backward}


def measure() -> list[dict]:
    torch._dynamo.config.recompile_limit = 100  # one graph a mask; past the limit it silently runs unfused
    flex = torch.compile(flex_attention, dynamic=False)
    inputs = [torch.randn(1, HEADS, N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    dout, rows = torch.randn_like(inputs[0]), []
    for name, (asked, mask) in cases().items():
        blocks = create_block_mask(mask, None, None, N, N, device="cuda")
        ours = lambda q, k, v, asked=asked: flash_attention(q, k, v, **asked, backend="triton")  # noqa: E731
        theirs = lambda q, k, v, blocks=blocks: flex(q, k, v, block_mask=blocks)  # noqa: E731
        apart = (ours(*inputs) - theirs(*inputs)).abs().max().item()
        row = {"case": name, "apart": apart}
        if apart > 0.02:  # two roundings of bf16 at the size of the largest outputs
            raise ValueError(f"{name}: flash_edu and FlexAttention differ by {apart:.3g}")
        for peer, attention in (("flash_edu", ours), ("FlexAttention", theirs)):
            row[peer] = milliseconds(attention, inputs, dout)
        rows.append(row)
        told = " | ".join(f"{peer} {row[peer]['forward_ms']:.3f} {row[peer]['backward_ms']:.3f}" for peer in ("flash_edu", "FlexAttention"))
        print(f"{name:14} ms forward, backward: {told}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Windows and patterns beside FlexAttention.")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("The benchmark needs a CUDA GPU, and torch sees none here.")
    torch.manual_seed(0)
    about = report.about()
    print(about, flush=True)
    report.write(arguments.json, about | {"times": measure()})


if __name__ == "__main__":
    main()
