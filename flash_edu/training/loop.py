"""The training loop in the order in which it runs: `train`, one step of it, its parts."""
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flash_edu.models import GPTDecoder
from flash_edu.training import checkpoint
from flash_edu.training.config import TrainConfig
from flash_edu.training.data import VOCAB_SIZE, Corpus, even_windows, load_corpus, random_windows

LOG_NAME = "log.jsonl"


def train(
    config: TrainConfig,
    *,
    model: nn.Module | None = None,
    corpus: Corpus | None = None,
    device: torch.device | str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    on_record: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train `model` (default: `build_model(config)`) in place. Returns the history, a record for each step.

    A record holds step, loss, learning_rate, grad_norm and tokens_per_second; every eval_every steps val_loss;
    on a GPU peak_memory, in bytes, since the run began. Losses are nats per byte. With `out`, records go to
    out/log.jsonl as they come, and out/checkpoint.pt is renewed now and then; `resume` goes on from there, on
    the very curve the run was on. Sets torch's random seed.
    """
    device = pick_device(device)
    dtype = autocast_dtype(config.precision, device)
    corpus = load_corpus() if corpus is None else corpus
    model = (build_model(config) if model is None else model).to(device)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # or small gradients become 0
    batches = torch.Generator().manual_seed(config.seed)  # on the CPU: the same windows for every device
    torch.manual_seed(config.seed)  # dropout
    parts = (batches, model, optimizer, scaler)
    history = checkpoint.restore(checkpoint.read(out), config, corpus, *parts) if resume else []
    write_record = start_log(out, history)
    val_windows = even_windows(corpus.val, config.eval_windows, config.seq_len)  # (windows, N + 1)
    if config.compile:
        model.compile()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    model.train()
    steps = range(len(history), config.steps)
    for step in tqdm(steps, total=config.steps, initial=len(history), disable=not progress, unit="step"):
        started = time.perf_counter()
        windows = [
            random_windows(corpus.train, config.batch_size, config.seq_len, batches).to(device)  # (B, N + 1)
            for _ in range(config.gradient_accumulation)
        ]
        record = {"step": step + 1, "learning_rate": learning_rate(step, config)}
        record |= train_step(model, optimizer, scaler, windows, record["learning_rate"], config, dtype)
        tokens = config.gradient_accumulation * config.batch_size * config.seq_len
        record["tokens_per_second"] = tokens / (time.perf_counter() - started)
        if device.type == "cuda":
            record["peak_memory"] = torch.cuda.max_memory_allocated(device)
        if due(step, config.eval_every, config):
            record["val_loss"] = evaluate(model, val_windows, batch_size=config.batch_size, dtype=dtype)

        history.append(record)
        write_record(record)
        if on_record:
            on_record(record)
        if out is not None and due(step, config.checkpoint_every, config):
            checkpoint.write(Path(out), checkpoint.take(config, corpus, history, *parts))
    return history


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    windows: list[Tensor],
    learning_rate: float,
    config: TrainConfig,
    dtype: torch.dtype | None,
) -> dict:
    """One step, on one or more batches of windows (B, N + 1). Returns its loss and its gradient's norm."""
    device = windows[0].device
    loss = 0.0
    for batch in windows:
        with autocast(device, dtype):
            part = next_byte_loss(model, batch) / len(windows)
        scaler.scale(part).backward()
        loss += part.item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}; try a lower learning_rate or gradient_clipping")

    scaler.unscale_(optimizer)  # gradients at their true size, for clipping to look at
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clipping).item()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    scaler.step(optimizer)  # does nothing if a gradient overflowed in fp16
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "grad_norm": grad_norm if math.isfinite(grad_norm) else None}


def next_byte_loss(model: nn.Module, windows: Tensor, reduction: str = "mean") -> Tensor:
    """Each position predicts the byte after it, in nats. windows (B, N + 1) uint8."""
    inputs, targets = windows[:, :-1].long(), windows[:, 1:].long()  # (B, N), (B, N)
    logits = model(inputs)  # (B, N, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: Tensor, *, batch_size: int = 16, dtype: torch.dtype | None = None
) -> float:
    """Nats per byte over windows (count, N + 1), without dropout. `dtype` is for autocast."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in windows.split(batch_size):
        with autocast(device, dtype):
            total += next_byte_loss(model, batch.to(device), reduction="sum").item()
    model.train(was_training)
    return total / windows[:, 1:].numel()


def build_model(config: TrainConfig) -> GPTDecoder:
    """The seed alone decides the weights: not the attention, the device, or what was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GPTDecoder(
            vocab_size=VOCAB_SIZE,
            d_model=config.d_model,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            max_seq_len=config.seq_len,
            dropout=config.dropout,
            attention=config.attention,
        )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that shrinks matrices only: there is no use in pulling biases and scales of norms towards 0."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    # fused: one pass over all parameters, where the default makes a dozen over each
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Up in a line while AdamW's averages still rest on few steps (warmup), then down along half a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)  # 0 to 1
    final = config.final_learning_rate
    return config.learning_rate * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)


def pick_device(device: torch.device | str | None = None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes matrix products in; None means fp32 and no autocast."""
    if precision == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"auto": None, "fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def due(step: int, every: int, config: TrainConfig) -> bool:
    return (step + 1) % every == 0 or step + 1 == config.steps


def start_log(out: str | Path | None, history: list[dict]) -> Callable[[dict], None]:
    """Start out/log.jsonl with `history`, whatever it held; return a function that adds a record to it."""
    if out is None:
        return lambda record: None
    path = Path(out) / LOG_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in history))

    def write_record(record: dict) -> None:
        with path.open("a") as file:  # opened each time: a run that is killed leaves whole lines
            file.write(json.dumps(record) + "\n")

    return write_record


def read_log(out: str | Path) -> list[dict]:
    """The history of the run in `out`, finished or not."""
    return [json.loads(line) for line in (Path(out) / LOG_NAME).read_text().splitlines()]
