"""What the compiler makes of the Hopper kernels, without a Hopper GPU."""
import json
import os
import subprocess
import sys
from pathlib import Path

from test_compiled import SHARED_MEMORY


def test_forward():
    script, root = Path(__file__).with_name("compile_hopper.py"), Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) == 12, "head dims x causal x ragged"
    for kernel in compiled:
        assert kernel["spilled_bytes"] == 0, f"spills registers: {kernel}"
        assert kernel["shared_memory"] <= SHARED_MEMORY["sm_90"], f"does not fit in shared memory: {kernel}"
        assert not kernel["unset_registers"], f"reads a register that nothing was written to: {kernel}"
        assert not kernel["warnings"], f"ptxas warns (serialised wgmma?): {kernel}"
        assert kernel["tensor_cores"], f"no tensor core instruction: {kernel}"
