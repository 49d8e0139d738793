"""What this machine has, whether Triton computes rightly on it, and which chapters run."""
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from flash_edu._environment import HAS_TRITON, interpreting
from flash_edu.course.hardware import missing, on_gpu
from flash_edu.course.manifest import Chapter

DIFFERENT = 1e-2  # relative; a right product of 16 terms is far below, the interpreter's bf16 far above


def facts() -> list[tuple[str, str]]:
    """(what, how it is here), in the order in which one would ask."""
    return [
        ("system", f"{platform.system()} {platform.machine()}, Python {sys.version.split()[0]}"),
        ("torch", torch.__version__),
        ("triton", _version("triton") if HAS_TRITON else "not installed (Triton ships for Linux only)"),
        ("GPU", _gpu()),
        ("kernels", "run on the GPU" if on_gpu else "run in Triton's interpreter" if interpreting() else "do not run"),
        *known_answers(),
    ]


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch sees"
    major, minor = torch.cuda.get_device_capability()
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {memory:.0f} GiB, driver {_driver()}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown version"


def known_answers() -> list[tuple[str, str]]:
    """How kernels fare whose result is known: a loop, and tl.dot in each dtype that this machine's kernels take."""
    if not HAS_TRITON or not (on_gpu or interpreting()):
        return []
    from flash_edu.course.known_answer import dot_error, loops

    device = "cuda" if on_gpu else "cpu"
    said = [("  loop", "right" if loops(device) else "WRONG: in its interpreter, Triton 3.6 needs NumPy below 2.4. pip install 'numpy<2.4'")]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        wrong = "WRONG" if on_gpu or dtype != torch.bfloat16 else "wrong, as known: the interpreter cannot do bfloat16; flash_edu refuses it there"
        said.append((f"  {str(dtype)[6:]} dot", "right" if dot_error(dtype, device) < DIFFERENT else wrong))
    return said


def how_it_runs(chapter: Chapter) -> str:
    """"runs", "in the interpreter", or what the chapter needs and this machine lacks."""
    lacking = missing(chapter.needs)
    if lacking:
        return f"needs {' and '.join(lacking)}"
    return "runs" if on_gpu or chapter.needs == ("torch",) else "runs in the interpreter, small"
