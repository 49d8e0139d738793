"""Compile the kernels for GPUs this machine does not have, and report what the compiler made of them.

    python tests/package/compile_tiles.py [sm_80 sm_90]      # one JSON line for each kernel

Triton's wheel carries the whole compiler, down to ptxas. A driver that answers "sm_90" stands in for the GPU, and every
launch is turned into a compilation. Runs in a process of its own, since Triton's interpreter must be off.
"""
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import sass  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from flash_edu.kernels import backward, forward, tiles  # noqa: E402

KERNELS = {
    "forward": forward.forward_kernel,
    "delta": backward.delta_kernel,
    "backward_kv": backward.dk_dv_kernel,
    "backward_q": backward.dq_kernel,
}
RAGGED = (24, 40, 96, 200)  # head dims that do not fill their tiles
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


class PretendGPU:
    """The part of Triton's driver interface that compiling needs."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # also keeps the compiled kernels of two GPUs apart

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_kernels(capability: int, dtype: torch.dtype, head_dim: int, causal: bool) -> dict[str, object]:
    """{kernel name: compiled kernel} for the tiles of the table, called as flash_attention calls them."""
    driver.set_active(PretendGPU(capability))
    compiled = {}
    originals = {name: kernel.run for name, kernel in KERNELS.items()}
    for name, kernel in KERNELS.items():
        kernel.run = _compile_only(name, originals[name], compiled)
    gpu = "sm_90" if capability == 90 and dtype.itemsize == 2 else "sm_80"
    row = next(i for i, limit in enumerate(tiles.HEAD_DIMS) if head_dim <= limit)
    pick = lambda kernel, *_: tiles.TILES[kernel, gpu, dtype.itemsize][row]  # noqa: E731
    forward.choose_tile = backward.choose_tile = pick
    try:
        q = torch.empty(2, 4, 1024, head_dim, dtype=dtype)
        k = torch.empty(2, 2, 1024, head_dim, dtype=dtype)
        lse = torch.empty(2, 4, 1024)
        forward.forward(q, k, k, causal=causal, scale=0.1)
        backward.backward(q, lse, q, k, k, q, lse, causal=causal, scale=0.1)
    finally:
        for name, kernel in KERNELS.items():
            kernel.run = originals[name]
    return compiled


def _compile_only(name, run, compiled):
    def launch(*args, **kwargs):
        compiled[name] = run(*args, **kwargs | {"warmup": True})

    return launch


def report(kernel, capability: int) -> dict[str, object]:
    """Registers, spilled bytes, shared memory and warnings, from ptxas itself: Triton hides its warnings; and what sass.py finds."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(kernel.asm["ptx"])
        arch = "sm_90a" if capability == 90 else f"sm_{capability}"
        command = [PTXAS, "-v", f"-arch={arch}", ptx, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        "shared_memory": kernel.metadata.shared,
        "warnings": re.findall(r"\(C\d+\)[^\n]*", said),
        "unset_registers": sass.unset_registers(sass.disassemble(kernel.asm["cubin"])),
        "tensor_cores": bool(re.search(r"wgmma\.mma_async|mma\.sync", kernel.asm["ptx"])),
    }


def main(names: list[str]) -> None:
    for name, dtype, head_dim, causal in itertools.product(
        names or ["sm_80", "sm_90"], (torch.bfloat16, torch.float32), (*tiles.HEAD_DIMS, *RAGGED), (True, False)
    ):
        if head_dim in RAGGED and (name, dtype) != ("sm_90", torch.bfloat16):
            continue  # slow to compile, and only wgmma has held surprises
        capability = int(name.removeprefix("sm_"))
        for kernel, compiled in compile_kernels(capability, dtype, head_dim, causal).items():
            what = {"gpu": name, "dtype": str(dtype)[6:], "head_dim": head_dim, "causal": causal, "kernel": kernel}
            print(json.dumps(what | report(compiled, capability)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
