"""Find what ptxas gets wrong: uniform registers that a kernel may read before anything was written to them.

ptxas 12.8 (in Triton 3.6 and 3.7) sometimes computes the shared-memory address of a wgmma operand from a register that
another path through the kernel sets. The result is then wrong, or the launch fails, at some lengths only. Seen with K's
head dim strided; the PTX was right. So the machine code itself is checked, by the rule compilers use: on every path to
a read there is a write.
"""
import re
import subprocess
import tempfile
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\d+):")
WRITES_TWO = ("UIADD3.64", "UIMAD.WIDE", "ULDC.64", "UMOV.64")  # a pair of 32-bit registers
WRITES_ONE = ("R2UR", "S2UR", "VOTEU", "REDUX")  # besides all that begin with U
WRITES_NONE = ("UISETP", "UTMA", "UBLKCP")


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout


def unset_registers(sass: str) -> list[str]:
    """The instructions that may read a uniform register (UR0 ... UR62) before it is written."""
    code, successors = _flow(sass)
    reads_writes = [_reads_and_writes(operation, arguments) for _, operation, arguments in code]
    written = {0: frozenset()}  # instruction -> the registers written on every path to it
    todo = [0]
    while todo:
        i = todo.pop()
        after = written[i] | reads_writes[i][1]
        for j in successors[i]:
            common = written.get(j, after) & after
            if j not in written or common != written[j]:
                written[j] = common
                todo.append(j)
    return [" ".join(code[i][1:]) for i in sorted(written) if reads_writes[i][0] - written[i]]


def _flow(sass):
    """The instructions (predicate, operation, arguments), and for each those that may come next."""
    code, labels = [], {}
    for line in sass.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line.strip()):
            code.append(instruction.groups(""))
    successors = []
    for i, (predicate, operation, arguments) in enumerate(code):
        name = operation.split(".")[0]
        target = re.search(r"\.L_x_\d+", arguments) if name == "BRA" else None
        conditional = predicate or re.search(r"\bU?P\d", arguments.split("`")[0])
        ends = name in ("BRA", "EXIT", "RET") and not conditional
        following = [labels[target[0]]] if target else []
        following += [] if ends else [i + 1]
        successors.append([j for j in following if j < len(code)])
    return code, successors


def _reads_and_writes(operation, arguments):
    """Two sets of uniform registers. Predicated writes count as writes: the compiler pairs them."""
    operands, written = [x.strip() for x in arguments.split(",")], set()
    if operation.startswith(WRITES_ONE) or (operation.startswith("U") and not operation.startswith(WRITES_NONE)):
        first = next((i for i, x in enumerate(operands) if not re.fullmatch(r"UP\w", x)), 0)
        if register := re.fullmatch(r"UR(\d+)", operands[first]):
            n = int(register[1])
            written = {n, n + 1} if operation.startswith(WRITES_TWO) else {n}
            operands = operands[first + 1 :]
    text, read = ", ".join(operands), set()
    for n in map(int, re.findall(r"gdesc\[UR(\d+)\]", text)):  # wgmma: A's address in UR n and n+1, unless A is in registers
        a_in_registers = re.match(r"R\d+, R\d+,", text)
        read |= {n + 2, n + 3} | (set() if a_in_registers else {n, n + 1})
    for n in map(int, re.findall(r"\bdesc\[UR(\d+)\]", text)):
        read |= {n, n + 1}
    for n in map(int, re.findall(r"\bUR(\d+)", re.sub(r"g?desc\[UR\d+\]", "", text))):
        read |= {n, n + 1} if operation.startswith("UIADD3.64") else {n}
    return read, written
