"""flash_edu.training: the text and its split, the baseline, the loop, resuming, and the command."""
import dataclasses
import json
import math
import subprocess
import sys

import pytest
import torch
from this_machine import DEVICE
from torch import nn

from flash_edu.training import (
    Corpus,
    TrainConfig,
    bigram_loss,
    bits,
    build_model,
    checkpoint,
    evaluate,
    even_windows,
    learning_rate,
    load_corpus,
    make_optimizer,
    preset,
    random_windows,
    read_log,
    train,
)
from flash_edu.training import __main__ as command
from flash_edu.training.data import in_validation
from flash_edu.training.loop import autocast_dtype, train_step

TINY = TrainConfig(
    d_model=16,
    num_heads=2,
    num_layers=2,
    seq_len=24,
    dropout=0.2,
    steps=12,
    batch_size=4,
    warmup_steps=3,
    eval_every=5,
    eval_windows=6,
    checkpoint_every=4,
)
LEARNS = dataclasses.replace(
    TINY, d_model=32, dropout=0.0, steps=120, batch_size=16, learning_rate=1e-2, eval_every=120
)


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


def as_bytes(text):
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@pytest.fixture(scope="module")
def corpus():
    line = b"def area(width, height):\n    return width * height  # %d\n"
    train_text, val_text = (b"".join(line % i for i in range(a, b)) for a, b in ((0, 80), (80, 100)))
    return Corpus(as_bytes(train_text), as_bytes(val_text), ("a.py",), ("b.py",), "made for tests")


def curve(history):
    """A history without what the clock decides."""
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in history]


def run(config, corpus, **options):
    """(history, model) of a run on the CPU."""
    model = build_model(config)
    return train(config, model=model, corpus=corpus, device="cpu", **options), model


# the text


def test_the_standard_library_is_split_by_file():
    corpus = load_corpus()
    assert not set(corpus.train_files) & set(corpus.val_files)
    assert len(corpus.train) > 1e6 and 0.02 < len(corpus.val) / len(corpus.train) < 0.5
    assert corpus.train.dtype == corpus.val.dtype == torch.uint8
    assert {"argparse.py", "json/__init__.py"} <= set(corpus.train_files + corpus.val_files)
    assert not [name for name in corpus.train_files + corpus.val_files if {"test", "site-packages"} & set(name.split("/"))]
    assert load_corpus().fingerprint == corpus.fingerprint


def test_the_split_of_a_name_never_changes():
    names = [f"folder/file{i}.py" for i in range(60)]
    assert [name for name in names if in_validation(name)] == ["folder/file6.py", "folder/file8.py", "folder/file15.py", "folder/file19.py", "folder/file30.py"]


def test_files_keep_their_side_when_others_come(tmp_path):
    names = [f"file{i}.py" for i in range(60)] + [f"folder/file{i}.py" for i in range(60)]
    (tmp_path / "folder").mkdir()
    for name in names[:100]:
        (tmp_path / name).write_text(f"# {name}")
    first = load_corpus(tmp_path)
    for name in names[100:]:
        (tmp_path / name).write_text(f"# {name}")
    second = load_corpus(tmp_path)
    assert set(first.train_files) < set(second.train_files)
    assert set(first.val_files) <= set(second.val_files)
    assert sorted(second.train_files + second.val_files) == sorted(names)
    assert first.fingerprint != second.fingerprint
    for text, files in ((second.train, second.train_files), (second.val, second.val_files)):
        assert bytes(text.tolist()).decode() == "\n".join(f"# {name}" for name in files)


def test_what_is_not_the_standard_library_is_left_out(tmp_path):
    for folder in ("", "site-packages/pkg", "test", "unittest/test", "encodings", "email"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for i in range(30):
            (tmp_path / folder / f"file{i}.py").write_text("x = 1")
    (tmp_path / "notes.txt").write_text("no")
    (tmp_path / "empty.py").write_text("")
    corpus = load_corpus(tmp_path)
    assert {name.rpartition("/")[0] for name in corpus.train_files + corpus.val_files} == {"", "email"}
    assert len(corpus.train_files + corpus.val_files) == 60


def test_a_folder_without_text_is_named(tmp_path):
    with pytest.raises(ValueError, match="0 files to train on"):
        load_corpus(tmp_path)


def test_random_windows_follow_their_generator():
    text = torch.arange(200, dtype=torch.uint8)
    first, again, other = (random_windows(text, 50, 9, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (50, 10) and (first.long().diff(dim=1) == 1).all()
    many = random_windows(text, 5000, 190, torch.Generator().manual_seed(0))
    assert set(many[:, 0].tolist()) == set(range(10)), "the first and the last possible start are drawn too"


def test_even_windows_reach_from_end_to_end():
    windows = even_windows(torch.arange(200, dtype=torch.uint8), 5, 9)
    assert windows.shape == (5, 10) and windows[0, 0] == 0 and windows[-1, -1] == 199
    assert windows[:, 0].long().diff().unique().numel() <= 2


@pytest.mark.parametrize("draw", [lambda text, n: even_windows(text, 2, n), lambda text, n: random_windows(text, 2, n, None)])
def test_a_text_shorter_than_a_window_is_named(draw):
    text = torch.zeros(10, dtype=torch.uint8)
    assert draw(text, 9).shape == (2, 10)
    with pytest.raises(ValueError, match="seq_len=10 needs 11 bytes; the text has 10"):
        draw(text, 10)


# the baseline


def test_bigram_loss_is_what_counting_by_hand_gives():
    train_text, val_text, smoothing = b"abracadabra, abracadabra", b"abba cad", 0.1
    counts = {}
    for pair in zip(train_text, train_text[1:]):
        counts[pair] = counts.get(pair, 0) + 1
    total = 0.0
    for this, following in zip(val_text, val_text[1:]):
        seen = sum(count for pair, count in counts.items() if pair[0] == this)
        p = (counts.get((this, following), 0) + smoothing) / (seen + 256 * smoothing)
        total -= math.log(p)
    want = total / (len(val_text) - 1)
    assert bigram_loss(as_bytes(train_text), as_bytes(val_text)) == pytest.approx(want, rel=1e-12)
    windows = torch.stack([as_bytes(val_text[:4]), as_bytes(val_text[4:])])  # the pair between them is in neither
    halves = [bigram_loss(as_bytes(train_text), window) for window in windows]
    assert bigram_loss(as_bytes(train_text), windows) == pytest.approx(sum(halves) / 2, rel=1e-12)
    assert bigram_loss(as_bytes(train_text), as_bytes(val_text), smoothing=1e9) == pytest.approx(math.log(256))
    assert bits(math.log(256)) == pytest.approx(8)


# the parts of the loop


def test_learning_rate_rises_then_falls():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=2.0, final_learning_rate=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[-1] == pytest.approx(0.2)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert sum(rates[10:]) / 90 == pytest.approx(1.1), "half of a cosine lies half way, on average"
    assert learning_rate(0, TrainConfig(steps=1, warmup_steps=0)) > 0


def test_only_matrices_decay():
    model = build_model(TINY)
    matrices, rest = make_optimizer(model, TINY).param_groups
    assert matrices["weight_decay"] == TINY.weight_decay and rest["weight_decay"] == 0
    assert all(p.dim() == 2 for p in matrices["params"]) and all(p.dim() == 1 for p in rest["params"])
    both = [id(p) for group in (matrices, rest) for p in group["params"]]
    assert sorted(both) == sorted(id(p) for p in model.parameters())


def test_the_weights_follow_the_seed_alone():
    torch.manual_seed(5)
    first = build_model(TINY)
    assert torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    for attention in ("sdpa", "naive"):
        other = build_model(changed(TINY, attention=attention))
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters()))
    assert not torch.equal(build_model(changed(TINY, seed=1)).head.weight, first.head.weight)


def test_evaluate_is_the_mean_over_all_bytes_without_dropout(corpus):
    model = build_model(TINY)
    windows = even_windows(corpus.val, 7, TINY.seq_len)
    model.train()
    got = evaluate(model, windows, batch_size=3)  # 3 + 3 + 1: a mean of means would be wrong
    assert model.training
    model.eval()
    log_p = model(windows[:, :-1].long()).log_softmax(dim=-1)
    assert got == pytest.approx(-log_p.gather(-1, windows[:, 1:, None].long()).mean().item(), rel=1e-5)


def step_parts(config, optimizer=None, **scaler):
    model = build_model(config)
    optimizer = make_optimizer(model, config) if optimizer is None else optimizer(model.parameters())
    return model, optimizer, torch.amp.GradScaler("cpu", **(scaler or {"enabled": False}))


def test_two_small_batches_are_one_large_one(corpus):
    config = changed(TINY, dropout=0.0)
    windows = even_windows(corpus.train, 8, config.seq_len)
    one, two = (train_step(*step_parts(config), part, 1e-3, config, None) for part in ([windows], list(windows.split(4))))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_clipping_shortens_long_gradients_only(clip, corpus):
    config = changed(TINY, gradient_clipping=clip)
    model, sgd, scaler = step_parts(config, lambda parameters: torch.optim.SGD(parameters, lr=123.0))
    before = nn.utils.parameters_to_vector(model.parameters()).double()
    found = train_step(model, sgd, scaler, [even_windows(corpus.train, 4, config.seq_len)], 1.0, config, None)
    moved = (nn.utils.parameters_to_vector(model.parameters()).double() - before).norm().item()
    assert found["grad_norm"] > 0.1
    assert moved == pytest.approx(min(clip, found["grad_norm"]), rel=1e-3)


def test_an_overflow_in_fp16_skips_the_step(corpus):
    windows = [even_windows(corpus.train, 4, TINY.seq_len)]
    model, optimizer, scaler = step_parts(TINY, init_scale=2.0**40)
    before = nn.utils.parameters_to_vector(model.parameters())
    record = train_step(model, optimizer, scaler, windows, 1e-3, TINY, torch.float16)
    assert record["grad_norm"] is None and json.dumps(record, allow_nan=False)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)
    assert scaler.get_scale() == 2.0**39
    scaler.update(1024.0)
    assert train_step(model, optimizer, scaler, windows, 1e-3, TINY, torch.float16)["grad_norm"] > 0
    assert not torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)


def test_fp16_measures_and_clips_gradients_at_their_true_size(corpus):
    config = changed(TINY, dropout=0.0)
    windows = [even_windows(corpus.train, 4, config.seq_len)]
    wide = train_step(*step_parts(config), windows, 1e-3, config, None)
    half = train_step(*step_parts(config, init_scale=1024.0), windows, 1e-3, config, torch.float16)
    assert half == pytest.approx(wide, rel=0.02)


def test_a_loss_that_is_no_number_stops_the_run(corpus):
    model = build_model(TINY)
    with torch.no_grad():
        model.ln_f.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss is nan.*learning_rate"):
        train(TINY, model=model, corpus=corpus, device="cpu")


def test_precision_by_device():
    cpu = torch.device("cpu")
    assert autocast_dtype("auto", cpu) is None and autocast_dtype("fp32", cpu) is None
    assert autocast_dtype("fp16", cpu) is torch.float16 and autocast_dtype("bf16", cpu) is torch.bfloat16


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": -1}, {"precision": "fp8"}])
def test_wrong_configs_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        TrainConfig(**wrong)


def test_the_gpu_preset_is_a_real_model():
    config = preset("cuda", attention="sdpa")
    with torch.device("meta"):
        model = build_model(config)
    assert model.num_parameters() >= 25e6 and config.seq_len == 2048 and config.attention == "sdpa"


# runs


def test_a_run_learns(corpus):
    history, model = run(LEARNS, corpus)
    assert [record["step"] for record in history] == list(range(1, 121))
    assert abs(history[0]["loss"] - math.log(256)) < 0.2
    windows = even_windows(corpus.val, LEARNS.eval_windows, LEARNS.seq_len)
    assert history[-1]["val_loss"] < bigram_loss(corpus.train, windows)
    assert history[-1]["val_loss"] == evaluate(model, windows, batch_size=LEARNS.batch_size)


def test_a_record_says_what_happened(corpus, capsys):
    history, _ = run(TINY, corpus, progress=True)
    assert "12/12" in capsys.readouterr().err, "the progress bar reaches its end"
    assert [record["step"] for record in history if "val_loss" in record] == [5, 10, 12]
    assert [record["learning_rate"] for record in history] == [learning_rate(step, TINY) for step in range(12)]
    assert all(record["tokens_per_second"] > 0 and record["grad_norm"] > 0 for record in history)


def test_the_same_seed_gives_the_same_curve(corpus):
    first, model = run(TINY, corpus)
    again, same = run(TINY, corpus)
    assert curve(first) == curve(again)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters()))
    assert curve(run(changed(TINY, seed=1), corpus)[0]) != curve(first)


def test_a_model_last_used_for_evaluation_trains_with_dropout(corpus):
    history = train(TINY, model=build_model(TINY).eval(), corpus=corpus, device="cpu")
    assert curve(history) == curve(run(TINY, corpus)[0])


def test_three_attentions_have_one_curve(corpus):
    losses = {
        attention: [record["loss"] for record in run(changed(TINY, dropout=0.0, attention=attention), corpus)[0]]
        for attention in ("flash_edu", "sdpa", "naive")
    }
    for attention in ("flash_edu", "sdpa"):
        assert losses[attention] == pytest.approx(losses["naive"], rel=1e-4)


@pytest.mark.parametrize("changes", [{}, {"precision": "fp16", "gradient_accumulation": 2}])
def test_an_interrupted_run_resumes_on_the_same_curve(tmp_path, corpus, changes):
    config = changed(TINY, **changes)
    whole, model = run(config, corpus, out=tmp_path / "whole")

    def stop(record):
        if record["step"] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, corpus, out=tmp_path / "cut", on_record=stop)
    assert len(read_log(tmp_path / "cut")) == 10 and len(checkpoint.read(tmp_path / "cut")["history"]) == 8

    torch.manual_seed(99)
    steps = []
    rest, resumed = run(config, corpus, out=tmp_path / "cut", resume=True, on_record=lambda r: steps.append(r["step"]))
    assert steps == [9, 10, 11, 12]
    assert curve(rest) == curve(whole)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters()))
    assert read_log(tmp_path / "cut") == rest and curve(read_log(tmp_path / "whole")) == curve(whole)

    done, _ = run(config, corpus, out=tmp_path / "cut", resume=True)
    assert done == rest, "a finished run has nothing left to do"


def test_a_checkpoint_keeps_the_scale_of_fp16(corpus):
    batches = torch.Generator()
    model, optimizer, scaler = step_parts(TINY, init_scale=2.0**40)
    windows = [even_windows(corpus.train, 4, TINY.seq_len)]
    train_step(model, optimizer, scaler, windows, 1e-3, TINY, torch.float16)  # overflows: the scale is halved
    state = checkpoint.take(TINY, corpus, [], batches, model, optimizer, scaler)
    fresh = step_parts(TINY, init_scale=1.0)
    checkpoint.restore(state, TINY, corpus, batches, *fresh)
    assert fresh[2].get_scale() == scaler.get_scale() == 2.0**39


def test_a_compiled_run_has_the_same_curve(tmp_path, corpus, monkeypatch):
    config = changed(TINY, dropout=0.0, num_layers=1, steps=3, eval_windows=4)  # few shapes: each is compiled anew
    plain, _ = run(config, corpus)
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
    compiled, model = run(changed(config, compile=True), corpus, out=tmp_path)
    assert [r["loss"] for r in compiled] == pytest.approx([r["loss"] for r in plain], rel=1e-4)
    assert checkpoint.read(tmp_path)["model"].keys() == build_model(config).state_dict().keys()


def test_a_run_resumes_only_as_what_it_was(tmp_path, corpus):
    run(TINY, corpus, out=tmp_path)
    with pytest.raises(ValueError, match="steps was 12, is 20"):
        run(changed(TINY, steps=20), corpus, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="on the text it began with"):
        run(TINY, dataclasses.replace(corpus, fingerprint="another"), out=tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        run(TINY, corpus, out=tmp_path / "elsewhere", resume=True)


def test_a_new_run_replaces_the_log_of_the_old(tmp_path, corpus):
    for _ in range(2):
        history, _ = run(TINY, corpus, out=tmp_path)
    assert read_log(tmp_path) == history and checkpoint.saved_config(tmp_path) == TINY


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from flash_edu.training import checkpoint

folder = Path(sys.argv[1])
checkpoint.write(folder, {"weights": torch.ones(1000)})

def save_half(state, file):
    torch.save(state, folder / "whole")
    content = (folder / "whole").read_bytes()
    file.write(content[: len(content) // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

class Torch:
    save = staticmethod(save_half)

checkpoint.torch = Torch
checkpoint.write(folder, {"weights": torch.zeros(1000)})
"""


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "checkpoint.pt.unfinished").stat().st_size > 0
    assert torch.equal(checkpoint.read(tmp_path)["weights"], torch.ones(1000))
    checkpoint.write(tmp_path, {"weights": torch.full((3,), 7.0)})
    assert checkpoint.read(tmp_path)["weights"].tolist() == [7, 7, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "whole"]


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash_edu", "sdpa"])
def test_a_gpu_run_records_its_memory(attention):
    config = preset("cuda", attention=attention, steps=40, batch_size=2, eval_windows=2, warmup_steps=10)
    history = train(config, device=DEVICE)
    assert autocast_dtype("auto", torch.device(DEVICE)) in (torch.bfloat16, torch.float16)
    assert history[-1]["loss"] < history[0]["loss"]
    naive = train(changed(config, attention="naive"), device=DEVICE)
    assert history[-1]["peak_memory"] < naive[-1]["peak_memory"] / 2
    assert history[0]["loss"] == pytest.approx(naive[0]["loss"], rel=1e-2)


# the command


@pytest.fixture
def small_command(monkeypatch, corpus):
    monkeypatch.setattr(command, "preset", lambda device, **changes: changed(LEARNS, **changes))
    monkeypatch.setattr(command, "load_corpus", lambda: corpus)
    monkeypatch.setattr(command, "SAMPLE_LENGTH", 20)


def test_the_command_reports_and_passes(small_command, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--device", "cpu"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "beats counting" in printed and "pairs of bytes, counted" in printed and "\ndef" in printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["val_loss"] == read_log(tmp_path)[-1]["val_loss"] < summary["bigram_loss"]
    assert f"{summary['val_loss']:.3f} nats = {bits(summary['val_loss']):.3f} bits" in printed

    assert command.main([*arguments, "--resume"]) == 0, "a finished run is reported again"
    with pytest.raises(SystemExit, match="has --steps 120: it cannot resume with 5"):
        command.main([*arguments, "--resume", "--steps", "5"])


def test_the_command_fails_when_counting_is_better(small_command, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--steps", "2", "--attention", "sdpa", "--seed", "3"]
    assert command.main(arguments) == 1
    assert "does NOT beat" in capsys.readouterr().out
    config = checkpoint.saved_config(tmp_path)
    assert (config.steps, config.attention, config.seed) == (2, "sdpa", 3)


def test_the_command_says_how_to_go_on(small_command, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupted)
    assert command.main(["--out", str(tmp_path), "--device", "cpu"]) == 130
    assert f"--resume --out {tmp_path}" in capsys.readouterr().out
