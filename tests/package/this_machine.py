"""What this machine is: the package's tests run on a GPU in full, or in Triton's interpreter at small sizes."""
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
