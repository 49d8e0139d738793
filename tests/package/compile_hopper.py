"""Compile the Hopper kernels without a GPU, and report what the compiler made of them: see compile_tiles.py.

    python tests/package/compile_hopper.py      # one JSON line for each kernel
"""
import itertools
import json

import compile_tiles  # switches Triton's interpreter off
import torch
from triton.runtime import driver

from flash_edu.kernels.hopper import forward
from flash_edu.rules import Rules


def compile_forward(head_dim: int, causal: bool, nk: int) -> object:
    compiled = {}
    launch = forward.forward_kernel.run
    forward.forward_kernel.run = compile_tiles._compile_only("forward", launch, compiled)
    try:
        q, k = (torch.empty(2, heads, n, head_dim, dtype=torch.bfloat16) for heads, n in ((4, 1000), (2, nk)))
        forward.forward(q, k, k, Rules(0.1, right=0 if causal else None))
    finally:
        forward.forward_kernel.run = launch
    return compiled["forward"]


def main() -> None:
    driver.set_active(compile_tiles.PretendGPU(90))
    for head_dim, causal, nk in itertools.product((64, 128, 256), (False, True), (1000, 1024)):
        what = {"kernel": "forward", "head_dim": head_dim, "causal": causal, "nk": nk}
        print(json.dumps(what | compile_tiles.report(compile_forward(head_dim, causal, nk), 90)), flush=True)


if __name__ == "__main__":
    main()
