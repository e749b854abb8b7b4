"""Damaged records, odd folders and oversized models: lists, publishing, the sink and other models go on."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from serving_set import MILL, PRESS, Plant, make_plant

from focus_ray.bundle.bundle import MANIFEST, manifest_hash, read_manifest
from focus_ray.bundle.published import resolve_bundles
from focus_ray.bundle.registry import Registry, Version
from focus_ray.detect.inspection import Inspection
from focus_ray.errors import DataError, RegistryError
from focus_ray.serving.api import create_api
from focus_ray.serving.measures import Measures
from focus_ray.serving.scorer import ImageScorer
from focus_ray.serving.service import Service
from focus_ray.serving.settings import ServiceSettings, Sink, parse_settings
from focus_ray.serving.sink import ImageSink, delete_old_images

TIME = "2026-01-31T12:00:00+00:00"
HASH = "ab" * 32


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Plant:
    return make_plant(tmp_path_factory.mktemp("plant"))


@pytest.fixture
def registry(plant: Plant, tmp_path: Path) -> Registry:
    """Three versions of press/gear; production went from v0001 to v0002."""
    registry = Registry(tmp_path / "registry")
    for _ in range(3):
        registry.publish(plant.bundles["gear"], PRESS)
    for ref in ("v0001", "v0002"):
        registry.promote(PRESS, "gear", ref, "production")
    return registry


def settings_of(plant: Plant, **changes: Any) -> ServiceSettings:
    return parse_settings({"registry": plant.registry, "tokens": plant.tokens, "refresh_s": 0.05, **changes})


def service_of(settings: ServiceSettings) -> Service:
    return Service(settings, ImageScorer(settings.pool, "cpu", Measures()), Measures())


def place(registry: Registry, *parts: str) -> Path:
    return Path(registry.root, PRESS, "gear", *parts)


DAMAGED_RECORDS = [
    b"{}",
    b"",
    b"[]",
    b"null",
    b"not JSON",
    b"\xff\xfe\x00",
    b"[" * 50_000,
    b" " * 100_000 + b"{}",
    json.dumps({"sha256": HASH, "published_at": "2026-13-45T00:00:00+00:00", "num_bytes": 1}).encode(),
    json.dumps({"sha256": HASH, "published_at": "2026-01-31T00:00:00", "num_bytes": 1}).encode(),
    json.dumps({"sha256": HASH, "published_at": 1e400, "num_bytes": 1}).encode(),
    json.dumps({"sha256": HASH, "published_at": TIME, "num_bytes": "many"}).encode(),
    json.dumps({"sha256": HASH, "published_at": TIME, "num_bytes": -1}).encode(),
    json.dumps({"sha256": HASH, "published_at": TIME, "num_bytes": 10**40}).encode(),
    json.dumps({"sha256": "../../mill", "published_at": TIME, "num_bytes": 1}).encode(),
    json.dumps({"sha256": None, "published_at": TIME, "num_bytes": 1}).encode(),
]

DAMAGED_TARGETS = [
    b"{}",
    b"",
    b"[]",
    b"not JSON",
    b"[" * 50_000,
    json.dumps({"version": "../../mill/gear/v0001", "before": []}).encode(),
    json.dumps({"version": "latest", "before": []}).encode(),
    json.dumps({"version": "v1", "before": []}).encode(),
    json.dumps({"version": "v" + "9" * 5000, "before": []}).encode(),
    json.dumps({"version": 3, "before": []}).encode(),
    json.dumps({"version": "v0001"}).encode(),
    json.dumps({"version": "v0001", "before": "v0001"}).encode(),
    json.dumps({"version": "v0001", "before": ["../x"]}).encode(),
    json.dumps({"version": "v0001\n", "before": []}).encode(),
]


# Published versions


@pytest.mark.parametrize("record", DAMAGED_RECORDS)
def test_a_damaged_version_is_missing_in_lists_and_its_look_up_names_it(
    registry: Registry, record: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = place(registry, "_published", "v0002.json")
    path.write_bytes(record)
    caplog.set_level(logging.WARNING)
    assert [version.name for version in registry.versions(PRESS, "gear")] == ["v0001", "v0003"]
    assert str(path) in caplog.text
    with pytest.raises(RegistryError, match=r"v0002\.json: .*damaged"):
        registry.resolve(PRESS, "gear", "v0002")
    with pytest.raises(RegistryError, match=r"v0002\.json: .*damaged"):
        registry.resolve(PRESS, "gear", "production")
    assert registry.resolve(PRESS, "gear").name == "v0003"
    assert registry.roll_back(PRESS, "gear", "production").name == "v0001"
    assert "v0002" not in registry.collect_garbage(PRESS, "gear", 0, min_age=timedelta(0))


def test_a_damaged_version_is_a_404_and_does_not_break_the_list(plant: Plant, registry: Registry) -> None:
    place(registry, "_published", "v0002.json").write_bytes(b"{}")
    headers = plant.headers(plant.press)
    with TestClient(create_api(service_of(settings_of(plant, registry=registry.root)))) as client:
        answer = client.get("/v1/press/gear/versions", headers=headers)
        assert (answer.status_code, [entry["version"] for entry in answer.json()["versions"]]) == (
            200,
            ["v0001", "v0003"],
        )
        answer = client.post("/v1/press/gear/inspect?version=v0002", content=plant.images[0], headers=headers)
        assert answer.status_code == 404
        assert client.post("/v1/press/gear/inspect", content=plant.images[0], headers=headers).status_code == 200


def test_files_and_folders_of_other_kinds_change_no_list(registry: Registry, plant: Plant) -> None:
    before = registry.versions(PRESS, "gear"), registry.aliases(PRESS, "gear"), registry.marks(PRESS)
    Path(registry.root, "notes.txt").write_text("a file where a team would be")
    Path(registry.root, PRESS, "readme").write_text("a file where a category would be")
    for folder in ("_published/v0009.json", "_published/v00x", "_aliases/gold/00000001.json", "_aliases/../_claims/x"):
        place(registry, folder).mkdir(parents=True)
    place(registry, "_aliases", "silver").write_text("a file where an alias would be")
    Path(registry.root, PRESS, "_changes", "gear@").mkdir()
    Path(registry.root, PRESS, "_changes", "@@@").write_text("?")
    Path(registry.root, PRESS, "_changes", "gear@").rmdir()
    assert (registry.versions(PRESS, "gear"), registry.aliases(PRESS, "gear"), registry.marks(PRESS)) == before
    assert registry.versions(PRESS, "readme") == []
    assert [registry.categories(team) for team in registry.teams()] == [[], ["gear", "readme"]]
    assert set(resolve_bundles(registry.root)) == {"gear"}
    assert registry.publish(plant.bundles["gear"], PRESS, aliases=["gold"]).name == "v0004"


# Aliases


@pytest.mark.parametrize("record", DAMAGED_TARGETS)
def test_an_alias_with_a_damaged_record_keeps_its_previous_version(
    registry: Registry, plant: Plant, record: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = place(registry, "_aliases", "production", "00000003.json")
    path.write_bytes(record)
    caplog.set_level(logging.WARNING)
    assert registry.aliases(PRESS, "gear") == {"latest": "v0003", "production": "v0002"}
    assert str(path) in caplog.text
    assert registry.resolve(PRESS, "gear", "production").name == "v0002"
    assert registry.collect_garbage(PRESS, "gear", 0, min_age=timedelta(0)) == []
    published = registry.publish(plant.bundles["gear"], PRESS, aliases=["production"])
    assert registry.resolve(PRESS, "gear", "production") == registry.resolve(PRESS, "gear") == published
    assert registry.roll_back(PRESS, "gear", "production").name == "v0002"


@pytest.mark.parametrize("record", DAMAGED_TARGETS)
def test_an_alias_without_a_readable_record_is_absent_and_can_be_set_again(
    registry: Registry, plant: Plant, record: bytes
) -> None:
    for path in place(registry, "_aliases", "latest").iterdir():
        path.write_bytes(record)
    assert registry.aliases(PRESS, "gear") == {"production": "v0002"}
    with pytest.raises(RegistryError, match=r"'latest'.*v0001, v0002, v0003, production"):
        registry.resolve(PRESS, "gear")
    assert registry.publish(plant.bundles["gear"], PRESS).name == "v0004"
    assert registry.resolve(PRESS, "gear").name == "v0004"


def test_promoting_the_same_version_repairs_a_damaged_alias(registry: Registry) -> None:
    place(registry, "_aliases", "production", "00000003.json").write_bytes(b"{}")
    registry.promote(PRESS, "gear", "v0002", "production")
    assert registry.collect_garbage(PRESS, "gear", 0, min_age=timedelta(0)) == []
    assert json.loads(place(registry, "_aliases", "production", "00000004.json").read_text())["version"] == "v0002"
    assert registry.roll_back(PRESS, "gear", "production").name == "v0001"


def test_an_alias_moves_after_the_record_with_the_largest_8_digit_number(registry: Registry) -> None:
    content = json.dumps({"version": "v0001", "before": []})
    place(registry, "_aliases", "production", "99999999.json").write_text(content)
    for ref in ("v0002", "v0003", "v0002"):
        registry.promote(PRESS, "gear", ref, "production")
        assert registry.resolve(PRESS, "gear", "production").name == ref


# Claims


@pytest.mark.parametrize("record", [b"{}", b"", b"[]", b'{"at": "2026-13-45"}', b'{"at": "2000-01-01T00:00:00"}', b"["])
def test_a_damaged_claim_fails_neither_publishing_nor_garbage_collection(
    registry: Registry, plant: Plant, record: bytes
) -> None:
    place(registry, "_claims", "v0007.json").write_bytes(record)
    place(registry, "v0007").mkdir()
    place(registry, "v0007", "part").write_text("unfinished")
    assert registry.collect_garbage(PRESS, "gear", 5) == []
    assert place(registry, "v0007").exists()
    assert registry.publish(plant.bundles["gear"], PRESS).name == "v0008"


@pytest.mark.parametrize("name", ["v" + "9" * 249, "v" + "1" * 30, "v٣٣٣٣", "vvvv"])
def test_a_claim_with_an_absurd_number_is_ignored(registry: Registry, plant: Plant, name: str) -> None:
    place(registry, "_claims", f"{name}.json").write_text("{}")
    place(registry, "_published", f"{name}.json").write_text("{}")
    assert registry.publish(plant.bundles["gear"], PRESS).name == "v0004"


# The sink

RESULT: dict[str, Any] = {"score": 1.0, "p_value": 0.1, "anomalous": True, "threshold": 0.5, "pixel_threshold": 0.5}


class Counted(Measures):
    def __init__(self) -> None:
        self.sunk: Counter[str] = Counter()

    def sink(self, outcome: str, count: int) -> None:
        self.sunk[outcome] += count


def sink_of(uri: Path, **settings: Any) -> tuple[ImageSink, Counter[str], list[str]]:
    measures, logged = Counted(), []  # type: ignore[var-annotated]

    def log(message: str, **facts: Any) -> None:
        logged.append(f"{message} {facts}")

    sink = Sink(uri=str(uri), share=1.0, share_anomalous=1.0, **settings)
    return ImageSink(sink, measures, log), measures.sunk, logged


def offer(sink: ImageSink, team: str = PRESS, width: int = 4) -> None:
    version = Version(team, "gear", "v0001", "uri", HASH, datetime.now(timezone.utc), 1)
    inspection = Inspection(anomaly_map=None, width=width, height=4, regions=(), **RESULT)  # type: ignore[arg-type]
    sink.offer(version, "request", [b"image"], [inspection])


@pytest.mark.parametrize(
    "name",
    ["date=2026-13-45", "date=0000-00-00", "date=9999-12-31", "date=2026-01-01T00", "date=", "date=１２３４-01-01"],
)
def test_a_folder_with_an_invalid_date_stops_neither_flush_nor_cleanup(tmp_path: Path, name: str) -> None:
    for folder in (name, "date=2020-01-01"):
        (tmp_path / f"team={PRESS}" / folder).mkdir(parents=True)
    (tmp_path / "team=file").write_text("a file where a team would be")
    sink, counts, _ = sink_of(tmp_path)
    for _ in range(2):
        offer(sink)
        sink.flush()
    sink.close()
    assert counts["written"] == 2
    assert not (tmp_path / f"team={PRESS}" / "date=2020-01-01").exists()
    assert (tmp_path / f"team={PRESS}" / name).exists()


def test_a_sink_folder_with_an_invalid_date_is_logged(tmp_path: Path) -> None:
    (tmp_path / "team=press" / "date=2026-13-45").mkdir(parents=True)
    sink, _, logged = sink_of(tmp_path)
    sink.flush()
    sink.close()
    assert "date=2026-13-45" in logged[0]


def test_rows_that_do_not_fit_the_schema_are_dropped_and_other_teams_are_written(tmp_path: Path) -> None:
    sink, counts, logged = sink_of(tmp_path)
    offer(sink, MILL, width=2**40)
    offer(sink, PRESS)
    sink.flush()
    sink.close()
    assert (counts["failed"], counts["written"], sink._num_bytes) == (1, 1, 0)
    assert "images do not fit" in logged[0]


@pytest.mark.parametrize("error", [DataError("away"), OSError("odd"), KeyError("key"), MemoryError(), RecursionError()])
def test_a_flush_never_raises_storage_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    import focus_ray.serving.sink as sink_module

    def fail(*_: Any) -> None:
        raise error

    sink, counts, logged = sink_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sink_module, "write_bytes", fail)
        patch.setattr(sink_module, "list_names", fail)
        offer(sink)
        sink.flush()
    assert len(logged) == 2
    sink.flush()
    assert counts == {"kept": 1, "delayed": 1, "written": 1}
    sink.close()
    sink.flush()


def test_a_retention_longer_than_the_calendar_is_allowed(tmp_path: Path) -> None:
    sink, _, logged = sink_of(tmp_path, retention_days=1e9)
    sink.flush()
    sink.close()
    assert logged == []


def test_a_day_that_cannot_be_deleted_does_not_stop_the_cleanup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import focus_ray.serving.sink as sink_module

    for number in (1, 2, 3):
        (tmp_path / "team=press" / f"date=2020-01-0{number}").mkdir(parents=True)
    remove = sink_module.remove_folder

    def remove_some(uri: str) -> None:
        if uri.endswith("02"):
            raise DataError(f"{uri}: denied")
        remove(uri)

    monkeypatch.setattr(sink_module, "remove_folder", remove_some)
    removed = delete_old_images(str(tmp_path), datetime(2021, 1, 1, tzinfo=timezone.utc))
    assert [name[-2:] for name in removed] == ["01", "03"]


# Models above the limit of a replica


def changed_bundle(source: str, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    copy = Path(shutil.copytree(source, folder))
    manifest = read_manifest(copy)
    change(manifest)
    manifest["sha256"] = manifest_hash(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


def test_a_model_above_memory_mb_is_a_503_with_a_log_line_and_the_other_models_stay(
    plant: Plant, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def enlarge(manifest: dict[str, Any]) -> None:
        manifest["files"]["density"]["num_bytes"] = 2**39

    registry = Registry(tmp_path / "registry")
    registry.publish(plant.bundles["gear"], PRESS)
    version = registry.publish(plant.bundles["board"], PRESS)
    shutil.rmtree(version.uri)
    changed_bundle(plant.bundles["board"], Path(version.uri), enlarge)
    path = Path(registry.root, PRESS, "board", "_published", "v0001.json")
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "sha256": read_manifest(version.uri)["sha256"]}))
    settings = settings_of(plant, registry=registry.root, pool={"memory_mb": 64})
    service = service_of(settings)
    headers = plant.headers(plant.press)
    logging.getLogger("focus_ray.serving").propagate = True
    caplog.set_level(logging.ERROR)
    with TestClient(create_api(service)) as client:
        assert client.post("/v1/press/gear/inspect", content=plant.images[0], headers=headers).status_code == 200
        answer = client.post("/v1/press/board/inspect", content=plant.images[0], headers=headers)
        assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
        assert "limit" not in answer.text
        assert [key.split("/")[1] for key in service.backend.models.loaded_keys] == ["gear"]  # type: ignore[attr-defined]
        assert client.post("/v1/press/gear/inspect", content=plant.images[0], headers=headers).status_code == 200
    assert "model cannot be loaded" in caplog.text
    assert "limit is 67108864" in caplog.text
