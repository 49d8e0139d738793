"""Compile the decoding kernels for GPUs this machine does not have, as compile_tiles.py does for the others.

    python tests/package/compile_decode.py [sm_80 sm_90]      # one JSON line for each kernel
"""
import json
import re
import sys

import compile_tiles
import torch
from triton.runtime import driver

from flash_edu.kernels import decode, tiles

KERNELS = {"decode": decode.decode_kernel, "merge": decode.merge_kernel, "append": decode.append_kernel}
KV_HEADS, CAPACITY, NO_LIMIT = 8, 4096, 2**30


def compile_kernels(
    capability: int, tile: tiles.DecodeTile, dtype: torch.dtype, head_dim: int, page_size: int, rules: bool
) -> dict[str, object]:
    """{kernel name: compiled kernel}, called as flash_attention_kvcache calls them. rules: softcap, slopes
    and sinks.
    """
    driver.set_active(compile_tiles.PretendGPU(capability))
    compiled = {}
    originals = {name: kernel.run for name, kernel in KERNELS.items()}
    for name, kernel in KERNELS.items():
        kernel.run = compile_tiles._compile_only(name, originals[name], compiled)
    try:
        heads = KV_HEADS * tile.block_m // 4
        q = torch.empty(2, heads, 1, head_dim, dtype=dtype)
        new = torch.empty(2, KV_HEADS, 1, head_dim, dtype=dtype)
        cache = torch.empty(*((99, KV_HEADS, page_size) if page_size else (2, KV_HEADS, CAPACITY)), head_dim, dtype=dtype)
        table = torch.empty(2, CAPACITY // page_size, dtype=torch.int32) if page_size else None
        seqlens, per_head = torch.empty(2, dtype=torch.int32), torch.empty(heads)
        softcap, slopes, sinks = (30.0, per_head, per_head) if rules else (None, None, None)
        decode.append(cache, cache, new, new, seqlens, table)
        decode.decode(
            q, cache, cache, seqlens, table, 1, NO_LIMIT, 0, 0.1, softcap, slopes, sinks, num_splits=4, tile=tile
        )
    finally:
        for name, kernel in KERNELS.items():
            kernel.run = originals[name]
    return compiled


def copies(ptx: str) -> list[int]:
    """The widths in bytes of the asynchronous copies to shared memory."""
    return sorted({int(width, 0) for width in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)", ptx)})


def cases(gpu: str):
    """Every tile of the table: without pages, with pages smaller than a tile, and with everything that
    changes scores. Pages as big as a tile or bigger compile to nearly the same as none: once."""
    for (name, itemsize, _), row in tiles.DECODE_TILES.items():
        if name == gpu:
            dtype = torch.bfloat16 if itemsize == 2 else torch.float32
            for tile, head_dim in zip(row, tiles.HEAD_DIMS):
                yield tile, dtype, head_dim, 0, False
                yield tile, dtype, head_dim, 16, False
                yield tile, dtype, head_dim, 0, True
                if head_dim == 128:
                    yield tile, dtype, head_dim, 128, False


def main(gpus: list[str]) -> None:
    for gpu in gpus or ["sm_80", "sm_90"]:
        capability = int(gpu.removeprefix("sm_"))
        for tile, dtype, head_dim, page_size, rules in cases(gpu):
            compiled = compile_kernels(capability, tile, dtype, head_dim, page_size, rules)
            names = ["decode"] if page_size or rules else list(KERNELS)  # the others hardly change
            for name, kernel in ((name, compiled[name]) for name in names):
                what = {"gpu": gpu, "tile": tile._asdict(), "dtype": str(dtype)[6:], "head_dim": head_dim, "kernel": name}
                made = compile_tiles.report(kernel, capability) | {"copies": copies(kernel.asm["ptx"])}
                more = {"page_size": page_size, "rules": rules, "resident": tile.resident}
                print(json.dumps(what | more | made), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
