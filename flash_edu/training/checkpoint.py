"""A run on disk: everything that decides what comes next, in one file that is always whole."""
import os
from dataclasses import asdict
from pathlib import Path

import torch

from flash_edu.training.config import TrainConfig
from flash_edu.training.data import Corpus

FILE_NAME = "checkpoint.pt"


def write(folder: Path, state: dict) -> None:
    """Write beside the old file, then move the new one over it: a kill at any moment leaves a whole one."""
    unfinished = folder / f"{FILE_NAME}.unfinished"
    with open(unfinished, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # on disk before the move, or a power cut could keep the move alone
    os.replace(unfinished, folder / FILE_NAME)


def read(folder: str | Path) -> dict:
    path = Path(folder) / FILE_NAME
    if not path.exists():
        raise FileNotFoundError(f"no run to resume: {path} does not exist")
    return torch.load(path, map_location="cpu", weights_only=True)


def saved_config(folder: str | Path) -> TrainConfig:
    """The config of the run in `folder`."""
    return TrainConfig(**read(folder)["config"])


def take(config: TrainConfig, corpus: Corpus, history: list[dict], batches, model, optimizer, scaler) -> dict:
    return {
        "config": asdict(config),
        "text": corpus.fingerprint,
        "history": history,
        "batches": batches.get_state(),  # which windows come next
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": torch.get_rng_state(),  # which numbers dropout drops next
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: dict, config: TrainConfig, corpus: Corpus, batches, model, optimizer, scaler) -> list:
    """Put everything back as it was when `state` was taken; return the history up to there."""
    old, new = state["config"], asdict(config)
    changes = [f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name]]
    if changes:
        raise ValueError(f"a run resumes with the config it began with; here {'; '.join(changes)}")
    if state["text"] != corpus.fingerprint:
        raise ValueError("a run resumes on the text it began with; this is another (another Python version?)")
    batches.set_state(state["batches"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and len(state["cuda_rng"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["history"]
