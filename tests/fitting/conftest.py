"""The data set that the tests of fits share."""

from __future__ import annotations

import pytest
from small_set import ingest_parts


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ingests images of synthetic parts and returns the root of the data set."""
    return ingest_parts(tmp_path_factory.mktemp("parts"))
