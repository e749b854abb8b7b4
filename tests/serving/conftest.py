"""The plant that all tests of the service share; a test that changes its registry makes a copy."""

from __future__ import annotations

import pytest
from serving_set import Plant, make_plant


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return make_plant(tmp_path_factory.mktemp("plant"))
