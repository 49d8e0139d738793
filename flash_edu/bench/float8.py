"""What a forward in float8_e4m3fn would be worth: speed and error of the forward kernel, given float8 rows. Needs a Hopper GPU.

    python -m flash_edu.bench.float8

The package refuses float8, and this is the measurement behind it (benchmarks/README.md). Q, K and V are divided by one number for
each head, so that the largest value is e4m3's largest, 448; P is rounded to e4m3 between the two products.
"""
import sys
from unittest import mock

import torch
import triton
from torch import Tensor

from flash_edu import flash_attention
from flash_edu.kernels import forward
from flash_edu.kernels.tiles import Tile
from flash_edu.rules import Rules

FLOAT8, LARGEST, WIDTH = torch.float8_e4m3fn, 448.0, 2048
TILES = (Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3))


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """(float8 rows, what each head is to be multiplied with)"""
    factor = x.abs().amax((-1, -2), keepdim=True).float() / LARGEST
    return (x / factor).to(FLOAT8), factor


def speed(run, flops: float) -> float:
    return flops / triton.testing.do_bench(run, warmup=50, rep=200, return_mode="median") / 1e9


def float8_speed(q: Tensor, k: Tensor, v: Tensor, causal: bool, flops: float) -> tuple[float, Tile]:
    """TFLOP/s of the best tile."""
    rules = Rules(scale=q.shape[-1] ** -0.5 / 448, right=0 if causal else None)
    room = lambda q, v: (torch.empty(q.shape, dtype=torch.bfloat16, device="cuda"), torch.empty(q.shape[:3], device="cuda"))  # noqa: E731
    best = (0.0, TILES[0])
    for tile in TILES:
        with mock.patch.object(forward, "choose_tile", lambda *_, tile=tile, **__: tile), mock.patch.object(forward, "empty_outputs", room):
            best = max(best, (speed(lambda: forward.forward(q, k, v, rules), flops), tile))
    return best


def error(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[float, float]:
    """Of bf16's `out` and of float8's, in fp64 apart from the roundings to float8: |error| / |truth|."""
    exact = [x[:1, :2].double() for x in (q, k, v)]
    rounded = [(y.double() * factor)[:1, :2] for y, factor in map(quantise, (q, k, v))]
    (q, k, v), (q8, k8, v8) = exact, rounded
    truth = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    s = q8 @ k8.mT * q.shape[-1] ** -0.5
    p = (s - s.amax(-1, keepdim=True)).exp()
    in_float8 = p.to(FLOAT8).double() @ v8 / p.sum(-1, keepdim=True)
    return tuple(((x - truth).norm() / truth.norm()).item() for x in (out[:1, :2].double(), in_float8))


def main() -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        sys.exit("The measurement needs a Hopper GPU.")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    for d in (64, 128):
        for n, causal in ((4096, False), (16384, False), (16384, True)):
            q, k, v = (torch.randn(16384 // n, WIDTH // d, n, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            flops = 4 * 16384 * WIDTH * n * (0.5 if causal else 1.0)
            bf16 = speed(lambda: flash_attention(q, k, v, causal=causal, backend="triton"), flops)  # noqa: B023
            fp8, tile = float8_speed(*(quantise(x)[0] for x in (q, k, v)), causal, flops)
            print(f"d {d} N {n} {'causal' if causal else 'full':6} TFLOP/s: bf16 {bf16:.0f}, float8 {fp8:.0f} {tuple(tile)}", flush=True)
        ours, theirs = error(q, k, v, flash_attention(q, k, v, backend="triton"))
        print(f"d {d} |error| / |truth|: bf16 {ours:.2g}, float8 {theirs:.2g}", flush=True)


if __name__ == "__main__":
    main()
