"""Train a small GPT on text that every machine has, and compare attention implementations in it.

    from flash_edu.training import preset, train
    history = train(preset("cuda", attention="sdpa"))

`python -m flash_edu.training` does it from a shell. Needs tqdm, which `flash_edu[course]` installs.
"""
from flash_edu.training.config import TrainConfig, preset
from flash_edu.training.data import Corpus, bigram_loss, bits, even_windows, load_corpus, random_windows
from flash_edu.training.loop import build_model, evaluate, learning_rate, make_optimizer, read_log, train

__all__ = [
    "Corpus",
    "TrainConfig",
    "bigram_loss",
    "bits",
    "build_model",
    "evaluate",
    "even_windows",
    "learning_rate",
    "load_corpus",
    "make_optimizer",
    "preset",
    "random_windows",
    "read_log",
    "train",
]
