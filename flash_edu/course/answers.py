"""Loads the file that is being judged: a learner's, a solution, or any folder with the same file names."""
import importlib
import sys
from pathlib import Path
from types import ModuleType

import flash_edu  # noqa: F401  first: picks Triton's interpreter or the GPU before an answer imports triton

PACKAGE = "answers"  # the name that the folder gets, whatever it is called on disk


def answer_folder(target: str, root: Path) -> Path:
    """"exercises", "solutions", or the path of a folder."""
    return (root / target if target in ("exercises", "solutions") else Path(target)).resolve()


def load_answer(folder: Path, stem: str) -> ModuleType:
    """The module `stem` of `folder`, in a package, so that `from . import ch03_online_softmax` works."""
    if getattr(sys.modules.get(PACKAGE), "__path__", None) != [str(folder)]:
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]
        package = ModuleType(PACKAGE)
        package.__path__ = [str(folder)]
        sys.modules[PACKAGE] = package
        importlib.invalidate_caches()
    return importlib.import_module(f"{PACKAGE}.{stem}")
