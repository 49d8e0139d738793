"""`python -m flash_edu`: which backends this machine has, and why not the others."""
import torch

import flash_edu

print(f"flash_edu {flash_edu.__version__} with torch {torch.__version__}")
for device in ["cuda"] * torch.cuda.is_available() + ["cpu"]:
    for name, reason in flash_edu.available_backends(device).items():
        print(f"  {device:4}  {name:6}  {'yes' if reason is None else 'no: ' + reason}")
