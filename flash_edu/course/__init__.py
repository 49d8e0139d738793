"""What a notebook of the course needs.

    from flash_edu.course import check, device, machine, on_gpu, size, toy
"""
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flash_edu.course import toy
    from flash_edu.course.hardware import device, machine, on_gpu, size
    from flash_edu.course.judging import check

__all__ = ["check", "device", "machine", "on_gpu", "size", "toy"]


def __getattr__(name: str):
    """Imported on first use: the command flash-edu need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'flash_edu.course' has no attribute {name!r}")
    if name == "toy":
        return importlib.import_module("flash_edu.course.toy")
    module = importlib.import_module("flash_edu.course." + ("judging" if name == "check" else "hardware"))
    globals()[name] = getattr(module, name)
    return globals()[name]
