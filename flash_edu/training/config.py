"""What a run computes, in one place, with a preset for a CPU and one for a GPU."""
from dataclasses import dataclass, replace

import torch

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
COUNTS = ("steps", "batch_size", "gradient_accumulation", "eval_every", "eval_windows", "checkpoint_every")


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are the CPU preset: under two minutes on two cores.

    The same config on the same text and machine gives the same curve, bit by bit. Configs that differ in
    `attention` alone start from the same weights and see the same batches.
    """

    # the model
    d_model: int = 128
    num_heads: int = 2
    num_layers: int = 4
    seq_len: int = 128
    dropout: float = 0.0  # the text is read twice at most: nothing is learnt by heart
    attention: str = "flash_edu"  # or "sdpa", "naive"

    # the steps
    steps: int = 600
    batch_size: int = 8
    gradient_accumulation: int = 1  # batches in a step: their sum is a batch too large for the memory
    gradient_clipping: float = 1.0
    learning_rate: float = 3e-3
    warmup_steps: int = 40
    final_learning_rate: float = 0.1  # at the last step, as a share of learning_rate
    weight_decay: float = 0.1
    precision: str = "auto"  # bf16 on a GPU that has it, fp16 on one that has not, fp32 on a CPU
    compile: bool = False
    seed: int = 0

    # the bookkeeping
    eval_every: int = 150  # steps
    eval_windows: int = 256
    checkpoint_every: int = 150  # steps

    def __post_init__(self):
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")


CPU = TrainConfig()
GPU = TrainConfig(
    d_model=512,
    num_heads=8,
    num_layers=8,
    seq_len=2048,
    steps=500,
    batch_size=16,
    learning_rate=1e-3,
    warmup_steps=50,
    eval_every=100,
    eval_windows=64,
    checkpoint_every=250,
)


def preset(device: torch.device | str, **changes) -> TrainConfig:
    """The config for this kind of device, with changes: preset("cuda", attention="sdpa", steps=100)."""
    return replace(GPU if torch.device(device).type == "cuda" else CPU, **changes)
