"""Shared by the tests of data."""

import pytest

from tests.data.tables import Reader


@pytest.fixture
def read(config) -> Reader:
    """`read(folder, "key=value", ...)`: the source of a folder; `read.refusal(...)`: why there is none."""
    return Reader(config)
