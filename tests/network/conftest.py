"""All tests of networks run on one thread."""

import pytest


@pytest.fixture(autouse=True)
def one_thread(one_torch_thread):
    """Uses `one_torch_thread`."""
