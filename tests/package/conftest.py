"""The package's tests run on whatever this machine has: a GPU in full, or Triton's interpreter at small sizes."""
import pytest
from this_machine import DEVICE, ON_GPU

import flash_edu


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
