"""For every test of the project."""


def pytest_collection_modifyitems(items):
    """Longest first, so that both workers of `make test` end together: browser, notebooks, the rest."""
    items.sort(key=lambda item: (item.path.name != "test_lab.py", item.path.suffix != ".ipynb"))
