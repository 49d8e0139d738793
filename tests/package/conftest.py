"""The package's tests run on whatever this machine has: a GPU in full, or Triton's interpreter at small sizes."""
import pytest
import torch

import flash_edu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    reason = flash_edu.available_backends(DEVICE)[request.param]
    assert reason is None, f"this machine should run {request.param}: {reason}"
    return request.param


def pytest_collection_modifyitems(items):
    if not ON_GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make test-gpu"))
