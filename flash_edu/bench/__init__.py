"""Speed and memory beside the peers, in one run on the same inputs: `python -m flash_edu.bench` (needs a CUDA GPU)."""
