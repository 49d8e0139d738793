"""Measure, print, and with --out FILE keep as JSON with device, versions and date.

Grid: bf16, d = 64 and 128, full and causal, N = 4k and 16k, 16384 tokens, heads * d = 2048. FLOPs are counted as
4 B H N^2 d forward (half if causal) and 2.5 times that backward. A speed is only reported for a right answer.
"""
import argparse
import itertools
import sys
from pathlib import Path

import torch
import triton
from torch import Tensor

from flash_edu.bench import report
from flash_edu.bench.peers import Attention, all_peers, ours
from flash_edu.reference import naive_attention

TOKENS, WIDTH = 16384, 2048


def speeds() -> list[dict]:
    """One row for each cell of the grid and each peer: TFLOP/s forward and backward, and milliseconds."""
    rows, peers = [], all_peers()
    for d, n, causal in itertools.product((64, 128), (4096, 16384), (False, True)):
        shape = (TOKENS // n, WIDTH // d, n, d)
        q, k, v, dout = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
        for x in (q, k, v):
            x.requires_grad_()
        flops = 4 * shape[0] * shape[1] * n * n * d * (0.5 if causal else 1.0)
        for name, attention in peers.items():
            row = {"d": d, "n": n, "causal": causal, "peer": name}
            try:
                check(attention, d, causal)
                row |= measure(attention, q, k, v, dout, causal, flops)
            except Exception as error:  # a peer that cannot run here is a result too
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(row)
            print_row(row)
    return rows


def check(attention: Attention, d: int, causal: bool) -> None:
    """Raise unless the peer is right on a small input: within twice eager bf16's error of fp64."""
    q, k, v = (torch.randn(1, 2, 512, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    right = naive_attention(q.double(), k.double(), v.double(), causal=causal)
    allowed = 2 * (naive_attention(q, k, v, causal=causal) - right).abs().max()
    error = (attention(q, k, v, causal) - right).abs().max()
    if not error <= allowed:
        raise ValueError(f"wrong result: error {error:.3g}, allowed {allowed:.3g}")


def measure(attention: Attention, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, flops: float) -> dict:
    """Medians over 0.3 s of runs, with the L2 cache flushed between runs."""
    bench = lambda run: triton.testing.do_bench(run, warmup=50, rep=300, return_mode="median")  # noqa: E731
    forward = bench(lambda: attention(q, k, v, causal))
    out = attention(q, k, v, causal)
    backward = bench(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    return {
        "forward_ms": forward,
        "backward_ms": backward,
        "forward_tflops": flops / forward / 1e9,
        "backward_tflops": 2.5 * flops / backward / 1e9,
    }


def print_row(row: dict) -> None:
    cell = f"d{row['d']:<4} N {row['n']:<6} {'causal' if row['causal'] else 'full':7} {row['peer']:17}"
    if "failed" in row:
        print(cell, "-", row["failed"], flush=True)
    else:
        print(cell, f"{row['forward_tflops']:5.0f} {row['backward_tflops']:5.0f} TFLOP/s fwd bwd", flush=True)


def longest() -> dict:
    """The longest N (doubling, up to 512k) whose forward and backward run at B = 1, H = 16, d = 128, and the extra memory it takes."""
    best, n = {}, 65536
    while True:
        torch.cuda.empty_cache()
        try:
            q, k, v, dout = (torch.randn(1, 16, n, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
            for x in (q, k, v):
                x.requires_grad_()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = ours(q, k, v, True)
            out.backward(dout)
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            return best
        results = sum(x.numel() * x.element_size() for x in (out, q.grad, k.grad, v.grad))
        extra = torch.cuda.max_memory_allocated() - before - results
        best = {"n": n, "tensors_gib": (before + results) / 2**30, "extra_gib": extra / 2**30}
        print(f"trains at N = {n}: {best['tensors_gib']:.1f} GiB of tensors, {best['extra_gib']:.3f} GiB beside", flush=True)
        if n >= 2**19:  # longer still fits, and takes minutes: time grows as N^2
            return best
        del q, k, v, dout, out
        n *= 2


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and memory beside the peers.")
    parser.add_argument("--out", type=Path, help="write the results to this JSON file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("The benchmark needs a CUDA GPU, and torch sees none here.")
    about = report.about()
    print(about)
    report.write(arguments.out, about | {"speeds": speeds(), "longest": longest()})


if __name__ == "__main__":
    main()
