"""What the compiler makes of the decoding kernels, for GPUs this machine does not have."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_compiled import SHARED_MEMORY

REGISTERS = 65536  # of a multiprocessor
SHARED_MEMORY_OF_ALL = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}  # of a multiprocessor; a program also takes 1 KB unasked


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_default_tiles(gpu):
    compiled = compile_all(gpu)
    decoding = [x for x in compiled if x["kernel"] == "decode"]
    tiles = {json.dumps([x["tile"], x["dtype"], x["head_dim"]]) for x in decoding}
    assert len(tiles) == (9 if gpu == "sm_80" else 6)
    for kernel in compiled:
        assert kernel["spilled_bytes"] == 0, f"spills registers: {kernel}"
        assert kernel["shared_memory"] <= SHARED_MEMORY[gpu], f"does not fit in shared memory: {kernel}"
        assert not kernel["unset_registers"], f"reads a register that nothing was written to: {kernel}"
        assert not kernel["warnings"], f"ptxas warns (serialised wgmma?): {kernel}"
    for kernel in decoding:
        assert kernel["tensor_cores"], f"no tensor core instruction: {kernel}"
        # K and V are copied 16 bytes at a time, while earlier tiles are computed; the numbers of pages are
        # the only other copies
        assert kernel["copies"] == ([4, 16] if kernel["page_size"] else [16]), f"narrow or blocking loads: {kernel}"
        programs, threads = kernel["resident"], 32 * kernel["tile"]["num_warps"]
        registers = -(-kernel["registers"] // 8) * 8 * threads  # allocated by eights
        assert programs * registers <= REGISTERS, f"{programs} do not fit on a multiprocessor: {kernel}"
        if kernel["dtype"] == "bfloat16":
            memory = programs * (kernel["shared_memory"] + 1024)
            assert memory <= SHARED_MEMORY_OF_ALL[gpu], f"{programs} do not fit on a multiprocessor: {kernel}"


def compile_all(gpu):
    script = Path(__file__).with_name("compile_decode.py")
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, script, gpu], capture_output=True, text=True, env=env, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
