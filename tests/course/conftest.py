"""The small course, for every test module that asks for it."""
import pytest
from small_course import make_course


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        yield make_course(tmp_path_factory.mktemp("course").resolve(), patch)
