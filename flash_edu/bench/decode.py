"""Decoding beside its peers: how fast K and V are read. Needs a CUDA GPU.

    python -m flash_edu.bench.decode [--json FILE] [--d 128] [--tune]

One query a sequence, 32 query heads, 8 key/value heads, d = 128, bf16. Nothing else takes time as reading K
and V does, so a speed is their bytes over the time of a call; the device's own copy, which is the ceiling, is
measured too. Each call reads other buffers than the last ones, so that nothing is in the L2 cache, and calls
are replayed from a CUDA graph: what Python takes for one call is printed by itself. A speed is only reported
for a right answer.

--tune tries tiles and numbers of splits instead, and prints the best ones for flash_edu/kernels/tiles.py.
"""
import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flash_edu import flash_attention_kvcache
from flash_edu.bench import report
from flash_edu.kernels import decode as kernels
from flash_edu.kernels.tiles import DECODE_TILES, HEAD_DIMS, DecodeTile
from flash_edu.kvcache import LONGEST
from flash_edu.reference import naive_attention
from flash_edu.testing import assert_close

HEADS, KV_HEADS, PAGE_SIZE = 32, 8, 64
BATCHES, LENGTHS = (1, 4, 16, 64), (4096, 16384, 65536, 131072)
LARGEST = 30e9  # bytes of K and V
FLUSH = 400e6  # a round of calls reads at least this much, several times what the L2 cache holds


class Cell:
    """Inputs of one batch size and length: `copies` of everything, drawn once and used in turn."""

    def __init__(self, batch: int, n: int, d: int, kind: str):
        self.batch, self.n, self.d, self.kind = batch, n, d, kind
        self.lengths = [n] * batch
        if kind == "ragged":
            generator = torch.Generator().manual_seed(batch + n)
            self.lengths = torch.randint(n // 2, n + 1, (batch,), generator=generator).tolist()
        self.bytes = sum(self.lengths) * KV_HEADS * 2 * d * 2
        self.copies = -(-int(FLUSH) // (batch * n * KV_HEADS * 2 * d * 2))
        self.inputs = [self._draw() for _ in range(self.copies)]

    def _draw(self) -> dict[str, Tensor | None]:
        make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        shape, table = (self.batch, KV_HEADS, self.n, self.d), None
        if self.kind == "paged":
            pages = self.batch * self.n // PAGE_SIZE
            shape = (pages, KV_HEADS, PAGE_SIZE, self.d)
            table = torch.randperm(pages, device="cuda").view(self.batch, -1).to(torch.int32)
        seqlens = torch.tensor(self.lengths, dtype=torch.int32, device="cuda")
        q = make(self.batch, HEADS, 1, self.d)
        return {"q": q, "k_cache": make(*shape), "v_cache": make(*shape), "cache_seqlens": seqlens, "block_table": table}

    def check(self, run: Callable[[dict], Tensor]) -> None:
        """Raise unless the first and the last sequence come out right, by the rule of flash_edu.testing."""
        out = run(self.inputs[-1])
        for b, (right, eager) in self.truth.items():
            assert_close("out", out[b : b + 1], right, eager)

    @functools.cached_property
    def truth(self) -> dict[int, tuple[Tensor, Tensor]]:
        """{sequence: (fp64's answer, plain PyTorch's at our dtype)}"""
        answers, x = {}, self.inputs[-1]
        for b in {0, self.batch - 1}:
            q, k, v = x["q"][b : b + 1], self._sequence(x, "k_cache", b), self._sequence(x, "v_cache", b)
            answers[b] = naive_attention(q.double(), k.double(), v.double()), naive_attention(q, k, v)
        return answers

    def _sequence(self, x: dict, name: str, b: int) -> Tensor:
        cache = x[name]
        rows = cache[b] if x["block_table"] is None else cache[x["block_table"][b].long()].transpose(0, 1).flatten(1, 2)
        return rows[None, :, : self.lengths[b]]


def ours(x: dict) -> Tensor:
    return flash_attention_kvcache(**x, backend="triton")


def sdpa(backend: SDPBackend) -> Callable[[dict], Tensor]:
    """All keys of the cache, causal or not: it is one query, the last."""

    def attention(x: dict) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(x["q"], x["k_cache"], x["v_cache"], enable_gqa=True)

    return attention


PEERS = {
    "flash_edu": ("plain", ours),
    "ragged": ("ragged", ours),
    "paged": ("paged", ours),
    "SDPA cuDNN": ("plain", sdpa(SDPBackend.CUDNN_ATTENTION)),
    "SDPA flash": ("plain", sdpa(SDPBackend.FLASH_ATTENTION)),
}


def microseconds(run: Callable[[dict], Tensor], cell: Cell, budget_ms: float) -> float:
    """Of one call on the GPU: median over replays of a graph that calls with each of the cell's inputs in
    turn.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and makes the libraries' handles
        for _ in range(2):
            run(cell.inputs[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in cell.inputs:
            run(x)
    once = _replay(graph)
    times = [_replay(graph) for _ in range(max(5, min(200, int(budget_ms / once))))]
    return statistics.median(times) / cell.copies * 1000


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def grid() -> list[tuple[int, int]]:
    return [(b, n) for b, n in itertools.product(BATCHES, LENGTHS) if b * n * KV_HEADS * 2 * 128 * 2 <= LARGEST]


def measure(d: int) -> list[dict]:
    rows = []
    for batch, n in grid():
        row = {"batch": batch, "n": n}
        for kind in ("plain", "ragged", "paged"):
            cell = Cell(batch, n, d, kind)
            for name, (wants, run) in PEERS.items():
                if wants == kind:
                    row[name] = _measure_one(run, cell)
            del cell
            torch.cuda.empty_cache()
        rows.append(row)
        print(f"B {batch:<3} N {n:<7}", " | ".join(f"{name} {_words(row[name])}" for name in PEERS), flush=True)
    return rows


def _measure_one(run: Callable[[dict], Tensor], cell: Cell, budget_ms: float = 150) -> dict:
    try:
        cell.check(run)
        us = microseconds(run, cell, budget_ms)
        return {"us": us, "tbps": cell.bytes / us / 1e6, "bytes": cell.bytes}
    except Exception as error:  # one that cannot run here, or is wrong, is a result too
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


def _words(result: dict) -> str:
    return f"failed: {result['failed']}" if "failed" in result else f"{result['us']:.1f} us {result['tbps']:.2f} TB/s"


def python_path() -> dict[str, float]:
    """Microseconds from calling to being called again, at B = 1, N = 4096, where the GPU would be done
    sooner.
    """
    x = Cell(1, 4096, 128, "plain").inputs[0]
    new = torch.randn(1, KV_HEADS, 1, 128, device="cuda", dtype=torch.bfloat16)
    x["cache_seqlens"] -= 1
    calls = {name: (lambda run=run: run(x)) for name, (kind, run) in PEERS.items() if kind == "plain"}
    calls["flash_edu, appending"] = lambda: flash_attention_kvcache(**x, k=new, v=new)
    return {name: _python_time(run) for name, run in calls.items()}


def _python_time(run: Callable[[], Tensor], calls: int = 300) -> float:
    try:
        for _ in range(20):
            run()
    except Exception:  # measure() says why
        return float("nan")
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def copy_rate() -> float:
    """TB/s of a copy on the device, bytes read and written: the ceiling."""
    x = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / triton.testing.do_bench(lambda: y.copy_(x), return_mode="median") / 1e9


def table(rows: list[dict]) -> str:
    """TB/s, and microseconds of ours; a star where ours is not behind the better of the SDPA backends."""
    lines = ["TB/s of K and V                 " + "".join(f"{name:>12}" for name in PEERS) + "   flash_edu us"]
    for row in rows:
        speed = {name: row[name].get("tbps", 0.0) for name in PEERS}
        best = max(speed["SDPA cuDNN"], speed["SDPA flash"])
        marks = {"flash_edu": best, "ragged": best, "paged": 0.95 * best}
        cells = [f"{speed[name]:.2f}{'*' if name in marks and speed[name] >= marks[name] else ' '}" for name in PEERS]
        us = row["flash_edu"].get("us", float("nan"))
        lines.append(f"B {row['batch']:<3} N {row['n']:<24}" + "".join(f"{cell:>12}" for cell in cells) + f"{us:15.1f}")
    return "\n".join([*lines, "* not behind SDPA (paged: at most 5 % behind)"])


# --- tuning -----------------------------------------------------------------------------------------------

TUNE = [  # (block_n, warps, stages) of tiles with 16 rows
    *itertools.product((32, 64, 128), (4,), (2, 3, 4)),
    *itertools.product((64, 128), (8,), (2, 3)),
]
SPLITS = (1.0, 2.0, 4.0)  # times what choose_splits says


def tune(d: int) -> list[dict]:
    rows = []
    default = DECODE_TILES["sm_90", 2, 16][next(i for i, limit in enumerate(HEAD_DIMS) if d <= limit)]
    tiles = list(dict.fromkeys([default, *(DecodeTile(16, *options) for options in TUNE)]))
    cells = [(b, n, kind) for b, n in grid() for kind in ("plain", "ragged", "paged") if kind == "plain" or n == 16384]
    for batch, n, kind in cells:
        cell, results = Cell(batch, n, d, kind), []
        for tile in tiles:
            chosen = kernels.choose_splits(batch * KV_HEADS, n, tile, torch.device("cuda"))
            for splits in sorted({max(1, min(round(chosen * factor), n // tile.block_n, kernels.MOST_SPLITS)) for factor in SPLITS}):
                result = _measure_one(functools.partial(_with, tile=tile, num_splits=splits), cell, budget_ms=12)
                results.append({"tile": tile, "splits": splits, "chosen": splits == chosen} | result)
        del cell
        torch.cuda.empty_cache()
        results.sort(key=lambda result: result.get("us", float("inf")))
        rows += [{"batch": batch, "n": n, "kind": kind} | result for result in results]
        _print_best(batch, n, kind, results, default)
    _print_overall(rows)
    return rows


def _with(x: dict, tile: DecodeTile, num_splits: int) -> Tensor:
    """The kernels alone, with this tile."""
    q, d = x["q"], x["q"].shape[-1]
    return kernels.decode(
        q, x["k_cache"], x["v_cache"], x["cache_seqlens"], x["block_table"], 0, LONGEST, 0, d**-0.5, None, None, None,
        num_splits=num_splits, tile=tile,
    )  # fmt: skip


def _print_best(batch: int, n: int, kind: str, results: list[dict], default: DecodeTile) -> None:
    now = next((r for r in results if r["tile"] == default and r["chosen"]), {"failed": "not run"})
    print(f"B {batch:<3} N {n:<7} {kind:7} now {default[1:4]} {_words(now)}", flush=True)
    for result in results[:3]:
        print(f"    {tuple(result['tile'])[1:4]} splits {result['splits']:<4} {_words(result)}", flush=True)
    for failed in {(tuple(r["tile"])[1:4], r["failed"]) for r in results if "failed" in r}:
        print("    failed:", *failed, flush=True)


def _print_overall(rows: list[dict]) -> None:
    """For each tile, with the splits that choose_splits gives: how near it comes to the best of each cell, on
    average and at worst.
    """
    cells = {}
    for row in rows:
        if "us" in row:
            cells.setdefault((row["batch"], row["n"], row["kind"]), []).append(row)
    share = {}
    for results in cells.values():
        best = min(row["us"] for row in results)
        for row in results:
            if row["chosen"]:
                share.setdefault(row["tile"], []).append(best / row["us"])
    print("\nblock_n, warps, stages: share of each cell's best, with the splits that are chosen (mean, worst, cells)")
    for tile, shares in sorted(share.items(), key=lambda item: -statistics.mean(item[1])):
        print(f"{tuple(tile)[1:4]!s:24} {statistics.mean(shares):.3f} {min(shares):.3f} {len(shares)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding beside its peers.")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--tune", action="store_true", help="try tiles and numbers of splits instead")
    parser.add_argument("--d", type=int, default=128, help="head dim")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("The benchmark needs a CUDA GPU, and torch sees none here.")
    torch.manual_seed(0)
    about = report.about() | {"d": arguments.d, "copy_tbps": copy_rate()}
    print(about, flush=True)
    if arguments.tune:
        results = about | {"tuning": tune(arguments.d)}
    else:
        results = about | {"python_us": python_path(), "speeds": measure(arguments.d)}
        print("\nmicroseconds of Python for one call:", {name: round(us, 1) for name, us in results["python_us"].items()})
        print(table(results["speeds"]))
    report.write(arguments.json, results)


if __name__ == "__main__":
    main()
