"""The plant that all tests of the service share; a test that changes its registry makes a copy."""

from __future__ import annotations

import pytest
from serving_set import ServiceTestData, create_test_data


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory) -> ServiceTestData:
    return create_test_data(tmp_path_factory.mktemp("plant"))
