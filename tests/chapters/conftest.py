"""Which answers the chapter tests judge: `pytest tests/chapters --target exercises|solutions|FOLDER`."""
from pathlib import Path

import pytest

from flash_edu.course.answers import answer_folder, load_answer

ROOT = Path(__file__).resolve().parents[2]


def pytest_addoption(parser):
    parser.addoption("--target", default="solutions", help="exercises, solutions (default) or a folder")


def pytest_configure(config):
    config.addinivalue_line("markers", "exercise(id): the exercise that a claim belongs to")


@pytest.fixture
def answer(request):
    """The module that is judged: test_ch04_tiled_attention.py judges ch04_tiled_attention.py.

    Asked for anew by each test: between two, known mistakes may have been loaded in its place, and with them the operators
    that chapter 09 registers by name. Loading it again costs nothing if nobody did.
    """
    folder = answer_folder(request.config.getoption("--target", "solutions"), ROOT)
    return load_answer(folder, request.path.stem.removeprefix("test_"))
