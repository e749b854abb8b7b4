"""The plant that all tests of the service share; a test that changes its registry makes a copy."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from serving_set import TwoTeams, create_client, create_settings, create_test_data


@pytest.fixture(scope="session")
def plant(tmp_path_factory: pytest.TempPathFactory, parts: str, part_bundles: dict[str, str]) -> TwoTeams:
    return create_test_data(tmp_path_factory.mktemp("plant"), parts, part_bundles)


@pytest.fixture(scope="session")
def http(plant: TwoTeams) -> Iterator[TestClient]:
    """A client of a service with tokens and small limits, which no test changes."""
    limits = {"max_body_mb": 2, "max_images": 4, "max_pixels": 1_000_000}
    with create_client(create_settings(plant, limits=limits)) as client:
        yield client


@pytest.fixture
def service_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Captures the log events of the service; `facts` of a record has the fields of its JSON line."""
    monkeypatch.setattr(logging.getLogger("focus_ray.serving"), "propagate", True)
    caplog.set_level(logging.INFO, logger="focus_ray.serving")
    return caplog
