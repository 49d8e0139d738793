"""Text to train on, and the baseline to beat.

The text is the source code of the Python that runs this: every reader has it, nothing is downloaded. A token
is a byte: the vocabulary has 256 entries, and no tokenizer is needed.
"""
import hashlib
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

VOCAB_SIZE = 256

# Folders left out: what is not the standard library; its tests, which would be half of the text, and which
# some Linux distributions ship apart; and two folders of tables that nobody wrote by hand.
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from and bytes to be judged by. No file has bytes in both."""

    train: Tensor = field(repr=False)  # (bytes,) uint8
    val: Tensor = field(repr=False)  # (bytes,) uint8
    train_files: tuple[str, ...] = field(repr=False)
    val_files: tuple[str, ...] = field(repr=False)
    fingerprint: str  # differs when the text does: losses on different texts cannot be compared

    def __str__(self) -> str:
        return (
            f"{len(self.train_files)} files, {len(self.train) / 1e6:.1f} MB to train on; "
            f"{len(self.val_files)} files, {len(self.val) / 1e6:.1f} MB to validate on"
        )


def load_corpus(root: str | Path | None = None) -> Corpus:
    """All *.py files under `root` (default: the standard library of the running Python), split by file."""
    root = Path(sysconfig.get_path("stdlib") if root is None else root)
    files = {path.relative_to(root).as_posix(): path for path in _python_files(root)}
    train_files = tuple(sorted(name for name in files if not in_validation(name)))
    val_files = tuple(sorted(name for name in files if in_validation(name)))
    if not train_files or not val_files:
        raise ValueError(
            f"{root} gives {len(train_files)} files to train on and {len(val_files)} to validate on; "
            "at least one of each is needed"
        )
    train, val = (b"\n".join(files[name].read_bytes() for name in part) for part in (train_files, val_files))
    fingerprint = hashlib.sha256(train + b"\0" + val).hexdigest()[:16]
    return Corpus(_as_tensor(train), _as_tensor(val), train_files, val_files, fingerprint)


def in_validation(name: str) -> bool:
    """One file in ten, by its name alone: another file, machine or version of Python does not move it."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def random_windows(data: Tensor, count: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """(count, seq_len + 1) uint8: stretches of text from anywhere, an input and its targets in each."""
    starts = torch.randint(_number_of_starts(data, seq_len), (count,), generator=generator)  # (count,)
    return _windows(data, starts, seq_len)


def even_windows(data: Tensor, count: int, seq_len: int) -> Tensor:
    """(count, seq_len + 1) uint8: the same stretches every time, spread evenly over the text."""
    last = _number_of_starts(data, seq_len) - 1
    starts = torch.linspace(0, last, count, dtype=torch.float64).long()  # (count,)
    return _windows(data, starts, seq_len)


def bigram_loss(train: Tensor, val: Tensor, smoothing: float = 0.1) -> float:
    """Nats per byte of a model that sees one byte back: it counts, in `train`, which byte follows which.

    `val` is a text (bytes,) or windows of one (count, seq_len + 1). `smoothing` is added to every count: a
    pair that `train` does not hold is then unlikely, not impossible.
    """
    pairs = VOCAB_SIZE * train[:-1].long() + train[1:].long()  # (bytes - 1,)
    counts = torch.bincount(pairs, minlength=VOCAB_SIZE**2).view(VOCAB_SIZE, VOCAB_SIZE)
    counts = counts.double() + smoothing  # (this byte, next byte)
    log_p = (counts / counts.sum(dim=1, keepdim=True)).log()
    return -log_p[val[..., :-1].long(), val[..., 1:].long()].mean().item()


def bits(nats: float) -> float:
    """A loss in bits: what each byte of the text would take, compressed with the model."""
    return nats / math.log(2)


def _python_files(root: Path) -> Iterator[Path]:
    for path in root.iterdir():  # not rglob: it would walk site-packages too, often larger than all the rest
        if path.is_dir() and not path.is_symlink() and path.name not in SKIPPED:
            yield from _python_files(path)
        elif path.suffix == ".py" and path.is_file() and path.stat().st_size > 0:
            yield path


def _number_of_starts(data: Tensor, seq_len: int) -> int:
    if len(data) <= seq_len:
        raise ValueError(f"a window of seq_len={seq_len} needs {seq_len + 1} bytes; the text has {len(data)}")
    return len(data) - seq_len


def _windows(data: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    return data[starts[:, None] + torch.arange(seq_len + 1)]  # (count, seq_len + 1)


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
