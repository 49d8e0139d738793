"""What the compiler makes of every tile in the table, for GPUs this machine does not have: no spills, no surprises."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024}  # sm_80's tiles must also fit consumer cards, which have 99 KB

# fp32 at head dims over 128: two operands of 256 fp32 columns do not fit in registers beside an accumulator of 256.
# The largest spill the compiler may make there, in bytes; every other tile may spill none.
FP32_256_SPILL = 1024


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_default_tiles(gpu):
    compiled = compile_all(gpu)
    assert len(compiled) == 2 * 3 * 2 * 4, "dtypes x head dims x causal x kernels"
    for kernel in compiled:
        fp32_256 = kernel["dtype"] == "float32" and kernel["head_dim"] == 256
        assert kernel["spilled_bytes"] <= (FP32_256_SPILL if fp32_256 else 0), f"spills registers: {kernel}"
        assert kernel["shared_memory"] <= SHARED_MEMORY[gpu], f"does not fit in shared memory: {kernel}"
        assert not kernel["warnings"], f"ptxas warns (serialised wgmma?): {kernel}"
        assert kernel["tensor_cores"] or kernel["kernel"] == "delta", f"no tensor core instruction: {kernel}"


def compile_all(gpu):
    script = Path(__file__).with_name("compile_tiles.py")
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, script, gpu], capture_output=True, text=True, env=env, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
