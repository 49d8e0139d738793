"""What a notebook of the course needs.

    from flash_edu.course import check, device, machine, on_gpu, size, toy
"""
import flash_edu  # noqa: F401  first: picks Triton's interpreter or the GPU before triton is imported
from flash_edu.course import toy
from flash_edu.course.check import check
from flash_edu.course.machine import device, machine, on_gpu, size

__all__ = ["check", "device", "machine", "on_gpu", "size", "toy"]
