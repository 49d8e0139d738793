"""What every measurement says of itself, and where it is kept."""
import datetime
import json
from pathlib import Path

import torch
import triton

import flash_edu


def about() -> dict:
    """Device, date and versions."""
    versions = {"flash_edu": flash_edu.__version__, "torch": torch.__version__, "triton": triton.__version__}
    return {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": versions | {"cudnn": torch.backends.cudnn.version()},
    }


def write(path: Path | None, results: dict) -> None:
    """As JSON, if there is a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
