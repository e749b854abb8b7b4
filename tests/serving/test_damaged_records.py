"""Damaged records, odd folders and oversized models: lists, publishing and other models go on."""

from __future__ import annotations

import json
import logging
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from serving_set import INSPECT, PRESS, TwoTeams, create_client, create_service, create_settings

from focus_ray.bundle.bundle import MANIFEST, compute_manifest_hash, read_manifest
from focus_ray.bundle.published import find_bundles_in_folder_or_registry
from focus_ray.bundle.registry import Registry
from focus_ray.errors import RegistryError

NO_AGE = timedelta(0)
NO_JSON = [b"{}", b"", b"[]", b"null", b"not JSON", b"\xff\xfe\x00", b"[" * 50_000, b" " * 100_000 + b"{}"]
PUBLICATION = {"sha256": "ab" * 32, "published_at": "2026-01-31T12:00:00+00:00", "num_bytes": 1}
DAMAGED_PUBLICATIONS = NO_JSON + [
    json.dumps({**PUBLICATION, **change}).encode()
    for change in (
        {"published_at": "2026-13-45T00:00:00+00:00"},
        {"published_at": "2026-01-31T00:00:00"},
        {"published_at": 1e400},
        {"num_bytes": "many"},
        {"num_bytes": -1},
        {"num_bytes": 10**40},
        {"sha256": "../../mill"},
        {"sha256": None},
    )
]
DAMAGED_TARGETS = NO_JSON + [
    json.dumps(record).encode()
    for record in (
        {"version": "../../mill/gear/v0001", "before": []},
        {"version": "latest", "before": []},
        {"version": "v1", "before": []},
        {"version": "v" + "9" * 5000, "before": []},
        {"version": 3, "before": []},
        {"version": "v0001"},
        {"version": "v0001", "before": "v0001"},
        {"version": "v0001", "before": ["../x"]},
        {"version": "v0001\n", "before": []},
    )
]


@pytest.fixture(scope="module")
def intact_registry(plant: TwoTeams, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Three versions of press/gear; production went from v0001 to v0002."""
    registry = Registry(tmp_path_factory.mktemp("intact"))
    for _ in range(3):
        registry.publish(plant.bundles["gear"], PRESS)
    for ref in ("v0001", "v0002"):
        registry.promote(PRESS, "gear", ref, "production")
    return registry


@pytest.fixture
def registry(intact_registry: Registry, tmp_path: Path) -> Registry:
    """A copy of the registry, which the test damages."""
    return Registry(shutil.copytree(intact_registry.root, tmp_path / "registry"))


def find_registry_path(registry: Registry, *parts: str) -> Path:
    return Path(registry.root, PRESS, "gear", *parts)


@pytest.mark.parametrize("record", DAMAGED_PUBLICATIONS)
def test_a_damaged_version_is_missing_in_lists_and_its_look_up_names_it(
    registry: Registry, record: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = find_registry_path(registry, "_published", "v0002.json")
    path.write_bytes(record)
    caplog.set_level(logging.WARNING)
    assert [version.name for version in registry.list_versions(PRESS, "gear")] == ["v0001", "v0003"]
    assert str(path) in caplog.text
    for ref in ("v0002", "production"):
        with pytest.raises(RegistryError, match=r"v0002\.json: .*damaged"):
            registry.resolve(PRESS, "gear", ref)
    assert registry.resolve(PRESS, "gear").name == "v0003"
    assert registry.roll_back(PRESS, "gear", "production").name == "v0001"
    assert "v0002" not in registry.collect_garbage(PRESS, "gear", 0, min_age=NO_AGE)


def test_a_damaged_version_is_a_404_and_does_not_break_the_list(plant: TwoTeams, registry: Registry) -> None:
    find_registry_path(registry, "_published", "v0002.json").write_bytes(b"{}")
    headers = plant.image_headers(plant.press)
    with create_client(create_settings(plant, registry=registry.root)) as client:
        versions = client.get("/v1/press/gear/versions", headers=headers).json()["versions"]
        assert [entry["version"] for entry in versions] == ["v0001", "v0003"]
        for query, status in (("?version=v0002", 404), ("", 200)):
            answer = client.post(f"{INSPECT}{query}", content=plant.images[0], headers=headers)
            assert answer.status_code == status


def test_files_and_folders_of_other_kinds_change_no_list(registry: Registry, plant: TwoTeams) -> None:
    before = (
        registry.list_versions(PRESS, "gear"),
        registry.list_aliases(PRESS, "gear"),
        registry.read_change_marks(PRESS),
    )
    root = Path(registry.root)
    for file in ("notes.txt", f"{PRESS}/readme", f"{PRESS}/gear/_aliases/silver", f"{PRESS}/_changes/@@@"):
        (root / file).write_text("a file where a team, category, alias or mark would be")
    for folder in ("_published/v0009.json", "_published/v00x", "_aliases/gold/00000001.json", "_claims/x"):
        find_registry_path(registry, folder).mkdir(parents=True)
    assert (
        registry.list_versions(PRESS, "gear"),
        registry.list_aliases(PRESS, "gear"),
        registry.read_change_marks(PRESS),
    ) == before
    assert registry.list_versions(PRESS, "readme") == []
    assert [registry.list_categories(team) for team in registry.list_teams()] == [[], ["gear", "readme"]]
    assert set(find_bundles_in_folder_or_registry(registry.root)) == {"gear"}
    assert registry.publish(plant.bundles["gear"], PRESS, aliases=["gold"]).name == "v0004"


@pytest.mark.parametrize("record", DAMAGED_TARGETS)
def test_an_alias_with_a_damaged_record_keeps_its_previous_version(
    registry: Registry, plant: TwoTeams, record: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = find_registry_path(registry, "_aliases", "production", "00000003.json")
    path.write_bytes(record)
    caplog.set_level(logging.WARNING)
    assert registry.list_aliases(PRESS, "gear") == {"latest": "v0003", "production": "v0002"}
    assert str(path) in caplog.text
    assert registry.resolve(PRESS, "gear", "production").name == "v0002"
    assert registry.collect_garbage(PRESS, "gear", 0, min_age=NO_AGE) == []
    published = registry.publish(plant.bundles["gear"], PRESS, aliases=["production"])
    assert registry.resolve(PRESS, "gear", "production") == registry.resolve(PRESS, "gear") == published
    assert registry.roll_back(PRESS, "gear", "production").name == "v0002"


def test_an_alias_without_a_readable_record_is_absent_and_can_be_set_again(registry: Registry, plant: TwoTeams) -> None:
    for path, record in zip(
        find_registry_path(registry, "_aliases", "latest").iterdir(), DAMAGED_TARGETS, strict=False
    ):
        path.write_bytes(record)
    assert registry.list_aliases(PRESS, "gear") == {"production": "v0002"}
    with pytest.raises(RegistryError, match=r"'latest'.*v0001, v0002, v0003, production"):
        registry.resolve(PRESS, "gear")
    assert registry.publish(plant.bundles["gear"], PRESS).name == "v0004"
    assert registry.resolve(PRESS, "gear").name == "v0004"


def test_promoting_the_same_version_repairs_a_damaged_alias(registry: Registry) -> None:
    find_registry_path(registry, "_aliases", "production", "00000003.json").write_bytes(b"{}")
    registry.promote(PRESS, "gear", "v0002", "production")
    assert registry.collect_garbage(PRESS, "gear", 0, min_age=NO_AGE) == []
    assert (
        json.loads(find_registry_path(registry, "_aliases", "production", "00000004.json").read_text())["version"]
        == "v0002"
    )
    assert registry.roll_back(PRESS, "gear", "production").name == "v0001"


def test_an_alias_moves_after_the_record_with_the_largest_8_digit_number(registry: Registry) -> None:
    content = json.dumps({"version": "v0001", "before": []})
    find_registry_path(registry, "_aliases", "production", "99999999.json").write_text(content)
    for ref in ("v0002", "v0003", "v0002"):
        registry.promote(PRESS, "gear", ref, "production")
        assert registry.resolve(PRESS, "gear", "production").name == ref


@pytest.mark.parametrize("record", [b"{}", b"", b"[]", b'{"at": "2026-13-45"}', b'{"at": "2000-01-01T00:00:00"}', b"["])
def test_a_damaged_claim_fails_neither_publishing_nor_garbage_collection(
    registry: Registry, plant: TwoTeams, record: bytes
) -> None:
    find_registry_path(registry, "_claims", "v0007.json").write_bytes(record)
    find_registry_path(registry, "v0007").mkdir()
    find_registry_path(registry, "v0007", "part").write_text("unfinished")
    assert registry.collect_garbage(PRESS, "gear", 5) == []
    assert find_registry_path(registry, "v0007").exists()
    assert registry.publish(plant.bundles["gear"], PRESS).name == "v0008"


@pytest.mark.parametrize("name", ["v" + "9" * 249, "v" + "1" * 30, "v٣٣٣٣", "vvvv"])
def test_a_claim_with_an_absurd_number_is_ignored(registry: Registry, plant: TwoTeams, name: str) -> None:
    for folder in ("_claims", "_published"):
        find_registry_path(registry, folder, f"{name}.json").write_text("{}")
    assert registry.publish(plant.bundles["gear"], PRESS).name == "v0004"


def test_a_model_above_memory_mb_is_a_503_with_a_log_line_and_the_other_models_stay(
    plant: TwoTeams, tmp_path: Path, service_log: pytest.LogCaptureFixture
) -> None:
    own_plant = plant.copy_registry(tmp_path / "registry")
    version = Registry(own_plant.registry).resolve(PRESS, "board")
    manifest = read_manifest(version.uri)
    manifest["files"]["density"]["num_bytes"] = 2**39
    manifest["sha256"] = compute_manifest_hash(manifest)
    Path(version.uri, MANIFEST).write_text(json.dumps(manifest))
    record_file = Path(own_plant.registry, PRESS, "board", "_published", "v0001.json")
    record_file.write_text(json.dumps({**json.loads(record_file.read_text()), "sha256": manifest["sha256"]}))
    service: Any = create_service(create_settings(own_plant, pool={"memory_mb": 64}))
    with create_client(service) as client:
        for category, status in (("gear", 200), ("board", 503), ("gear", 200)):
            path, headers = f"/v1/press/{category}/inspect", plant.image_headers(plant.press)
            answer = client.post(path, content=plant.images[0], headers=headers)
            assert answer.status_code == status
            assert "limit" not in answer.text
            assert answer.headers.get("retry-after") == ("5" if status == 503 else None)
        assert [key.split("/")[1] for key in service.backend.models.loaded_keys] == ["gear"]
    assert "limit is 67108864" in service_log.text
