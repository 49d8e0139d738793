"""Attention in Triton. `forward.py` and `backward.py` hold the kernels and the functions that launch them, `tiles.py` the
tile sizes. Imported on first use: importing flash_edu needs no Triton."""
