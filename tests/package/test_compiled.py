"""What the compiler makes of every tile in the table, for GPUs this machine does not have: no spills, no surprises."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sass import unset_registers

SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024}  # sm_80's tiles must also fit consumer cards, which have 99 KB


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_default_tiles(gpu):
    compiled = compile_all(gpu)
    assert len(compiled) == (3 + 3 + 4 * (gpu == "sm_90")) * 2 * 4, "head dims (bf16, fp32, ragged) x causal x kernels"
    for kernel in compiled:
        full = kernel["head_dim"] in (64, 128, 256)  # rows that are no multiple of 16 numbers are read one number at a time
        # In fp32 ptxas may trade a few bytes for a third program on a multiprocessor; that was faster (kernels/tiles.py).
        few = 64 if kernel["dtype"] == "float32" else 0
        assert kernel["spilled_bytes"] <= few or not full, f"spills registers: {kernel}"
        assert kernel["shared_memory"] <= SHARED_MEMORY[gpu], f"does not fit in shared memory: {kernel}"
        assert not kernel["unset_registers"], f"reads a register that nothing was written to: {kernel}"
        assert not kernel["warnings"], f"ptxas warns (serialised wgmma?): {kernel}"
        assert kernel["tensor_cores"] or kernel["kernel"] == "delta", f"no tensor core instruction: {kernel}"


def compile_all(gpu):
    script = Path(__file__).with_name("compile_tiles.py")
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, script, gpu], capture_output=True, text=True, env=env, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


class TestTheRegisterCheck:
    """On lines of machine code as ptxas 12.8 made them."""

    def test_a_write_on_one_path_only(self):
        skipped = "/*0020*/ @!P5 BRA `(.L_x_0) ;\n/*0030*/ UMOV UR22, 0x40 ;\n.L_x_0:\n"
        read = "/*0040*/ UIADD3 UR22, UP0, UR22, 0x40, URZ ;\n/*0050*/ EXIT ;\n"
        assert unset_registers(skipped + read) == ["UIADD3 UR22, UP0, UR22, 0x40, URZ"]
        assert not unset_registers("/*0010*/ UMOV UR22, URZ ;\n" + skipped + read)

    def test_pairs(self):
        pair = "/*0010*/ UIADD3.64 UR8, UR4, UR4, URZ ;\n/*0020*/ EXIT ;\n"
        assert unset_registers("/*0000*/ ULDC UR4, c[0x0][0x238] ;\n" + pair)
        assert not unset_registers("/*0000*/ ULDC.64 UR4, c[0x0][0x238] ;\n" + pair)

    @pytest.mark.parametrize("registers, unset", [("R56, R24", False), ("R56", True)])
    def test_wgmma_operands(self, registers, unset):
        """gdesc[UR20] with A in registers reads UR22 and UR23; with A in shared memory UR20 and UR21 too."""
        lines = "/*0000*/ UMOV UR22, 0x40 ;\n/*0010*/ UMOV UR23, URZ ;\n"
        wgmma = f"/*0020*/ HGMMA.64x32x16.F32.BF16 {registers}, gdesc[UR20].tnspB, R56 ;\n/*0030*/ EXIT ;\n"
        assert bool(unset_registers(lines + wgmma)) == unset

    def test_loops_end(self):
        loop = ".L_x_1:\n/*0010*/ UIADD3 UR4, UR4, 0x1, URZ ;\n/*0020*/ @P0 BRA `(.L_x_1) ;\n/*0030*/ EXIT ;\n"
        assert not unset_registers("/*0000*/ UMOV UR4, URZ ;\n" + loop)
        assert unset_registers(loop)
