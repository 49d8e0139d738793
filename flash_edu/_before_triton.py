"""Triton decides when it is imported whether kernels are compiled or interpreted. This makes the choice just before."""
import importlib.abc
import sys


class BeforeTriton(importlib.abc.MetaPathFinder):
    """Finds nothing, but is asked first; when triton is looked for, _environment.py chooses."""

    def find_spec(self, name, path=None, target=None):
        if name == "triton":
            sys.meta_path.remove(self)
            import flash_edu._environment  # noqa: F401
