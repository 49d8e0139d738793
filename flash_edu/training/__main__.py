"""Train a GPT on Python's own source code; it must predict unseen code better than counted pairs of bytes do.

Exits with 0 if it does, with 1 if it does not.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from flash_edu.models import GPTDecoder
from flash_edu.models.gpt import ATTENTIONS
from flash_edu.training.checkpoint import saved_config
from flash_edu.training.config import CPU, GPU, TrainConfig, preset
from flash_edu.training.data import bigram_loss, bits, even_windows, load_corpus
from flash_edu.training.loop import autocast_dtype, build_model, pick_device, train

PROMPT = "\n\ndef "
SAMPLE_LENGTH = 300


def main(arguments: list[str] | None = None) -> int:
    started = time.perf_counter()
    options = parse(arguments)
    device = pick_device(options.device)
    out = Path(options.out or f"runs/{options.attention or 'flash_edu'}")
    config = choose_config(options, device, out)
    corpus = load_corpus()
    model = build_model(config)
    print(describe(config, device, model))
    print(f"Text: {corpus}")
    try:
        history = train(
            config, model=model, corpus=corpus, device=device, out=out, resume=options.resume,
            progress=sys.stderr.isatty(), on_record=print_validation,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\nStopped. From its last checkpoint on: python -m flash_edu.training --resume --out {out}")
        return 130

    print(f"\nA sample that begins with {PROMPT.strip()!r}:\n{sample(model, config, device)}\n")
    gpt = history[-1]["val_loss"]  # both predict the very same bytes, of files that neither has seen
    bigram = bigram_loss(corpus.train, even_windows(corpus.val, config.eval_windows, config.seq_len))
    print("Loss on files that were not trained on; lower is better:")
    print(f"  pairs of bytes, counted  {bigram:.3f} nats = {bits(bigram):.3f} bits per byte")
    print(f"  this GPT                 {gpt:.3f} nats = {bits(gpt):.3f} bits per byte")
    seconds = time.perf_counter() - started
    summary = {
        "attention": config.attention, "device": str(device), "val_loss": gpt, "bigram_loss": bigram,
        "peak_memory": history[-1].get("peak_memory"), "seconds": seconds,
    }  # fmt: skip
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    verdict = "beats" if gpt < bigram else "does NOT beat"
    print(f"The GPT {verdict} counting. It took {seconds:.0f} s; log and checkpoint are in {out}/")
    return 0 if gpt < bigram else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m flash_edu.training", description=__doc__)
    parser.add_argument("--attention", choices=list(ATTENTIONS), help="default: flash_edu")
    parser.add_argument("--steps", type=int, help=f"default: {CPU.steps} on a CPU, {GPU.steps} on a GPU")
    parser.add_argument("--seed", type=int, help="of weights and batches; default: 0")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--out", metavar="DIR", help="for log and checkpoint; default: runs/ATTENTION")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    return parser.parse_args(arguments)


def choose_config(options: argparse.Namespace, device: torch.device, out: Path) -> TrainConfig:
    asked = {name: getattr(options, name) for name in ("attention", "steps", "seed")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not options.resume:
        return preset(device, **asked)
    config = saved_config(out)
    for name, value in asked.items():
        if getattr(config, name) != value:
            sys.exit(f"The run in {out}/ has --{name} {getattr(config, name)}: it cannot resume with {value}")
    return config


def describe(config: TrainConfig, device: torch.device, model: GPTDecoder) -> str:
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"a CPU, {torch.get_num_threads()} threads"
    dtype = str(autocast_dtype(config.precision, device) or torch.float32).removeprefix("torch.")
    windows = config.gradient_accumulation * config.batch_size
    return (
        f"GPT: {model.num_parameters() / 1e6:.1f} M parameters, attention {config.attention}, {dtype}\n"
        f"On {where}: {config.steps} steps of {windows} x {config.seq_len} bytes"
    )


def print_validation(record: dict) -> None:
    if "val_loss" in record:
        memory = f"  {record['peak_memory'] / 2**30:6.2f} GiB" if "peak_memory" in record else ""
        tqdm.write(
            f"step {record['step']:5}  loss {record['loss']:.3f}  validation {record['val_loss']:.3f} nats "
            f"per byte  {record['tokens_per_second']:9,.0f} bytes/s{memory}"
        )


def sample(model: GPTDecoder, config: TrainConfig, device: torch.device) -> str:
    prompt = torch.tensor([list(PROMPT.encode())], device=device)  # (1, bytes)
    generator = torch.Generator(device).manual_seed(config.seed)
    written = model.generate(prompt, SAMPLE_LENGTH, temperature=0.8, top_k=40, generator=generator)  # (1, bytes)
    return bytes(written[0].tolist()).decode("utf-8", errors="replace").strip("\n")


if __name__ == "__main__":
    sys.exit(main())
