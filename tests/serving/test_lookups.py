"""Look-ups with many categories: the number of storage calls, and that no change of a registry or folder is missed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from s3_server import S3Server

from focus_ray.bundle import registry as registry_module
from focus_ray.bundle.bundle import FORMAT_VERSION, MANIFEST, compute_manifest_hash
from focus_ray.bundle.registry import CLAIM_LASTS, Registry, Version
from focus_ray.errors import BundleError, DataError, RegistryError
from focus_ray.serving import source as source_module
from focus_ray.serving.source import MAX_LOOKUP_AGE_S, FolderModelSource, ModelSource, StorageThreads, VersionCache
from focus_ray.storage.files import join_path, list_folder_entries, write_bytes, write_bytes_if_absent

TEAM, REFRESH_S = "press", 2.0
MANY = pytest.mark.parametrize("num_categories", [10, 50])


def category(number: int) -> str:
    return f"part{number:03}"


def add_version(registry: Registry, of: int, name: str) -> None:
    """Publishes a version as `publish` does, but without a bundle."""
    now = datetime.now(timezone.utc).isoformat()
    record = {"sha256": f"{of:03}{name}".encode().hex().ljust(64, "0"), "published_at": now, "num_bytes": 1}
    place = join_path(registry.root, TEAM, category(of), "_published", f"{name}.json")
    write_bytes(place, json.dumps(record).encode())
    registry._move_alias_to_version(TEAM, category(of), "latest", name, only_forward=True)


def make_registry(root: Path, num_categories: int, names: tuple[str, ...] = ("v0001",)) -> Registry:
    registry = Registry(root)
    for of in range(num_categories):
        for name in names:
            add_version(registry, of, name)
    return registry


def write_manifest(bundles: str | Path, of: int, note: int = 0) -> None:
    """Writes the manifest of a bundle, without tensors."""
    manifest = {"format": "focus_ray bundle", "format_version": FORMAT_VERSION, "category": category(of), "files": {}}
    manifest.update(created_at="2026-01-31T12:00:00+00:00", note=f"{note:04}")
    manifest.update({name: {} for name in ("config", "data", "calibration", "metrics")})
    manifest["moments"] = {"count": 2, "height": 8, "width": 8, "channels": 32}
    manifest["sha256"] = compute_manifest_hash(manifest)
    write_bytes(join_path(bundles, category(of), MANIFEST), json.dumps(manifest).encode())


def make_folder(root: Path, num_categories: int, age_s: float = 3600.0) -> Path:
    """Writes the manifests of a run, which are `age_s` old, and returns the folder of its bundles."""
    then = time.time() - age_s
    for of in range(num_categories):
        write_manifest(root / "bundles", of)
        os.utime(root / "bundles" / category(of) / MANIFEST, (then, then))
    return root / "bundles"


@dataclass
class Clock:
    now: float = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(source_module, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    return clock


@pytest.fixture
def storage_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of the storage: listings, and files read."""
    calls: Counter[str] = Counter()

    def count(module: Any, name: str, kind: str) -> None:
        function = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            calls[kind] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    count(registry_module, "list_folder_entries", "listings")
    count(registry_module, "read_bytes", "files")
    count(source_module, "read_bundle_stamps", "listings")
    count(source_module, "read_manifest", "files")
    return calls


class VersionCacheDriver:
    """A version directory of a source in its own event loop; records warmed versions."""

    def __init__(self, source: ModelSource) -> None:
        self.warmed: list[str] = []
        self.version_cache = VersionCache(source, REFRESH_S, self._warm, StorageThreads())
        self._loop = asyncio.new_event_loop()

    async def _warm(self, version: Version) -> None:
        self.warmed.append(f"{version.category}/{version.name}")

    def resolve(self, *numbers: int, ref: str = "latest") -> list[str]:
        """Returns the version of each category, after the checks in the background have ended."""

        async def resolve() -> list[str]:
            names = [(await self.version_cache.resolve_version(TEAM, category(number), ref)).name for number in numbers]
            await asyncio.gather(*(entry.task for entry in self.version_cache._entries.values() if entry.task))
            return names

        return self._loop.run_until_complete(resolve())

    def resolve_until_checked(self, clock: Clock, *numbers: int, ref: str = "latest") -> None:
        """Asks until all categories have been checked with their marks."""
        for _ in range(3):
            self.resolve(*numbers, ref=ref)
            clock.now += REFRESH_S


# ---- a registry


@MANY
def test_a_refresh_interval_costs_one_listing_for_any_number_of_categories(
    tmp_path: Path, clock: Clock, storage_calls: Counter[str], num_categories: int
) -> None:
    line, everything = VersionCacheDriver(make_registry(tmp_path, num_categories)), range(num_categories)
    storage_calls.clear()
    line.resolve(*everything)
    clock.now += REFRESH_S
    line.resolve(*everything)
    # each category is looked up for its first request, and once more with the first marks
    assert storage_calls == {"listings": 2 * num_categories + 1, "files": 4 * num_categories}
    storage_calls.clear()
    for _ in range(5):
        clock.now += REFRESH_S
        line.resolve(*everything)
        line.resolve(*everything)
    assert storage_calls == {"listings": 5}
    assert line.warmed == []


def test_a_moved_alias_is_seen_after_an_interval_and_only_it_is_looked_up(
    tmp_path: Path, clock: Clock, storage_calls: Counter[str]
) -> None:
    line, other = VersionCacheDriver(make_registry(tmp_path, 10)), Registry(tmp_path)
    line.resolve_until_checked(clock, *range(10))
    line.resolve(*range(10))
    for expected, change in (
        ("v0002", lambda: add_version(other, 3, "v0002")),
        ("v0001", lambda: other.roll_back(TEAM, category(3), "latest")),
        ("v0002", lambda: other.promote(TEAM, category(3), "v0002", "latest")),
    ):
        change()
        storage_calls.clear()
        clock.now += REFRESH_S - 0.1
        line.resolve(*range(10))
        assert storage_calls == {}
        clock.now += 0.1
        line.resolve(*range(10))
        assert storage_calls == {"listings": 2, "files": 2}
        assert line.resolve(3) == [expected]
    assert line.warmed == [f"part003/{name}" for name in ("v0002", "v0001", "v0002")]


@pytest.mark.parametrize("kind", ["registry", "folder"])
def test_an_answer_is_at_most_one_interval_old(tmp_path: Path, clock: Clock, kind: str) -> None:
    bundles = make_folder(tmp_path, 4)
    registry = make_registry(tmp_path / "registry", 4)
    line = VersionCacheDriver(registry if kind == "registry" else FolderModelSource(str(tmp_path), TEAM, REFRESH_S))

    def change(of: int) -> None:
        add_version(registry, of, "v0002")
        write_manifest(bundles, of, note=1)

    for _ in range(2):
        previous = {of: line.resolve(of) for of in (0, 1, 3)}  # with marks of the time 0
    clock.now += 1.9
    change(2)
    change(1)
    first_version_of_2 = line.resolve(2)  # its first look-up
    clock.now += 0.1
    assert line.resolve(0) == previous[0]  # marks of 2.0
    change(0)
    change(3)
    clock.now += 1.9
    assert {of: line.resolve(of) for of in (0, 1, 3)} == previous  # marks of 2.0 say that only 1 has changed
    assert line.resolve(1) != previous[1]
    line.resolve(2)
    assert (line.resolve(2) != first_version_of_2) == (kind == "folder")
    clock.now += 0.1
    for of in (0, 3):
        line.resolve(of)
        assert line.resolve(of) != previous[of]


def test_a_category_is_looked_up_again_while_its_alias_moves_and_after_the_mover_died(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_registry(tmp_path, 2)
    line = VersionCacheDriver(Registry(tmp_path))
    line.resolve(0, 1)
    died = threading.Event()

    def die(uri: str, data: bytes) -> bool:
        assert sorted(registry.read_change_marks(TEAM)) == [category(1)]
        assert write_bytes_if_absent(uri, data)
        for _ in range(2):  # marks were read before the alias moved, and are read again just after it
            clock.now += REFRESH_S
            line.resolve(0, 1)
        assert line.resolve(0, 1) == ["v0002", "v0001"]
        died.set()
        raise KeyboardInterrupt

    def write_unless_dead(uri: str, data: bytes) -> None:
        if not died.is_set():
            write_bytes(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "write_bytes_if_absent", die)
        patch.setattr(registry_module, "write_bytes", write_unless_dead)  # a process that dies marks no end either
        patch.setattr(registry_module, "remove_file", lambda uri: None)
        with pytest.raises(KeyboardInterrupt):
            add_version(registry, 0, "v0002")
    assert sorted(registry.read_change_marks(TEAM)) == [category(1)]
    add_version(registry, 0, "v0003")
    assert sorted(registry.read_change_marks(TEAM)) == [category(1)]  # the mover may still be at work
    long_ago = f"{datetime.now(timezone.utc) - 3 * CLAIM_LASTS:%Y%m%dT%H%M%S}"
    (begun,) = (tmp_path / TEAM / "_changes").glob(f"{category(0)}@begun-*")
    begun.rename(begun.with_name(f"{category(0)}@begun-{long_ago}-x.json"))
    add_version(registry, 0, "v0004")
    assert sorted(registry.read_change_marks(TEAM)) == [category(0), category(1)]
    assert len(list_folder_entries(join_path(registry.root, TEAM, "_changes"))) == 2


def test_an_unchanged_mark_means_an_unchanged_version_under_concurrent_moves(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, 1, ("v0001", "v0002", "v0003"))
    registry.promote(TEAM, category(0), "v0001", "production")
    stop, failures, versions_by_mark = threading.Event(), [], {}  # type: ignore[var-annotated]

    def move(names: tuple[str, str]) -> None:
        try:
            for turn in range(40):
                Registry(tmp_path).promote(TEAM, category(0), names[turn % 2], "production")
        except BaseException as error:
            failures.append(error)

    def read() -> None:
        own_registry = Registry(tmp_path)
        while not stop.is_set():
            before = own_registry.read_change_marks(TEAM).get(category(0))
            version = own_registry.resolve(TEAM, category(0), "production").name
            if before is not None and before == own_registry.read_change_marks(TEAM).get(category(0)):
                versions_by_mark.setdefault(before, set()).add(version)

    reader = threading.Thread(target=read)
    movers = [threading.Thread(target=move, args=(names,)) for names in (("v0001", "v0002"), ("v0003", "v0001"))]
    for thread in (reader, *movers):
        thread.start()
    for thread in movers:
        thread.join()
    time.sleep(0.1)
    stop.set()
    reader.join()
    assert not failures
    assert all(len(versions) == 1 for versions in versions_by_mark.values())
    last_mark = registry.read_change_marks(TEAM)[category(0)]
    assert versions_by_mark[last_mark] == {registry.resolve(TEAM, category(0), "production").name}


def test_a_registry_without_marks_is_looked_up_by_category(
    tmp_path: Path, clock: Clock, storage_calls: Counter[str]
) -> None:
    registry = make_registry(tmp_path, 10)
    changes = tmp_path / TEAM / "_changes"
    shutil.rmtree(changes)
    line = VersionCacheDriver(Registry(tmp_path))
    line.resolve_until_checked(clock, *range(10))
    storage_calls.clear()
    line.resolve(*range(10))
    assert storage_calls == {"listings": 11, "files": 20}
    add_version(registry, 3, "v0002")
    shutil.rmtree(changes)
    clock.now += REFRESH_S
    line.resolve(*range(10))
    assert line.resolve(3) == ["v0002"]
    for of in range(10):  # any change marks a category; so does a collection that finds nothing to delete
        registry.collect_garbage(TEAM, category(of), 5)
    for _ in range(2):
        clock.now += REFRESH_S
        storage_calls.clear()
        line.resolve(*range(10))
    assert storage_calls == {"listings": 1}


def test_an_alias_moved_without_marks_is_seen_later(tmp_path: Path, clock: Clock) -> None:
    registry, changes = make_registry(tmp_path, 1), tmp_path / TEAM / "_changes"
    line = VersionCacheDriver(Registry(tmp_path))
    line.resolve_until_checked(clock, 0)
    copy = shutil.copytree(changes, tmp_path / "copy")
    add_version(registry, 0, "v0002")
    shutil.rmtree(changes)
    copy.rename(changes)
    line.resolve(0)
    assert line.resolve(0) == ["v0001"]
    clock.now += MAX_LOOKUP_AGE_S
    line.resolve(0)
    assert line.resolve(0) == ["v0002"]


def test_a_deleted_version_is_noticed_and_an_own_move_is_seen_immediately(tmp_path: Path, clock: Clock) -> None:
    registry = make_registry(tmp_path, 1, ("v0001", "v0002", "v0003"))
    line = VersionCacheDriver(Registry(tmp_path))
    line.resolve_until_checked(clock, 0)
    line.resolve_until_checked(clock, 0, ref="v0001")
    line.resolve(0)
    registry.promote(TEAM, category(0), "v0002", "latest")
    line.version_cache.expire_category(TEAM, category(0))
    line.resolve(0)
    assert line.resolve(0) == ["v0002"]
    clock.now += REFRESH_S
    line.resolve(0, ref="v0001")
    assert registry.collect_garbage(TEAM, category(0), 1, min_age=timedelta(0)) == ["v0001"]
    assert line.resolve(0, ref="v0001") == ["v0001"]
    clock.now += REFRESH_S
    line.resolve(0, ref="v0001")
    with pytest.raises(RegistryError, match="'v0001'"):
        line.resolve(0, ref="v0001")


def test_marks_are_not_listed_as_a_category_and_failed_changes_add_no_team(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, 2)
    assert registry.list_categories(TEAM) == [category(0), category(1)]
    assert registry.collect_garbage("weld", "gear", 1) == []
    with pytest.raises(RegistryError):
        registry.roll_back("weld", "gear", "latest")
    assert (registry.list_teams(), registry.read_change_marks("weld")) == ([TEAM], {})


def test_moves_of_an_identity_without_delete_rights_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make_registry(tmp_path, 1)

    def refuse(uri: str) -> None:
        raise DataError("access denied")

    monkeypatch.setattr(registry_module, "remove_file", refuse)
    add_version(registry, 0, "v0002")
    assert registry.resolve(TEAM, category(0)).name == "v0002"
    assert registry.read_change_marks(TEAM) == {}  # the record of its beginning stays, so the category is looked up


def test_while_the_storage_fails_cached_versions_answer(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, service_log: pytest.LogCaptureFixture
) -> None:
    registry = make_registry(tmp_path, 3)
    line = VersionCacheDriver(registry)

    def fail(*arguments: str) -> Any:
        raise DataError("the storage is away")

    line.resolve(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(registry, "read_change_marks", fail)
        patch.setattr(registry, "resolve", fail)
        add_version(Registry(tmp_path), 0, "v0002")
        clock.now += REFRESH_S
        line.resolve(0, 1)
        assert line.resolve(0, 1) == ["v0001", "v0001"]
        with pytest.raises(DataError, match="the storage is away"):
            line.resolve(2)
    assert service_log.messages == ["version not refreshed"] * 2
    clock.now += REFRESH_S
    line.resolve(0, 1)
    assert line.resolve(0, 1) == ["v0002", "v0001"]


# ---- a folder


@MANY
def test_a_folder_is_listed_once_for_all_categories_and_manifests_are_read_once(
    tmp_path: Path, clock: Clock, storage_calls: Counter[str], num_categories: int
) -> None:
    make_folder(tmp_path, num_categories)
    source, everything = FolderModelSource(str(tmp_path), TEAM, REFRESH_S), range(num_categories)
    line = VersionCacheDriver(source)
    line.resolve(*everything)
    line.resolve(*everything)
    for name in source.list_categories(TEAM):
        assert source.list_aliases(TEAM, name) == {"latest": source.resolve(TEAM, name).name}
    assert storage_calls == {"listings": 2, "files": num_categories}
    storage_calls.clear()
    for _ in range(5):
        clock.now += REFRESH_S
        line.resolve(*everything)
    assert storage_calls == {"listings": 5}


@pytest.mark.parametrize("age_s", [3600.0, 0.0])
def test_new_replaced_and_removed_bundles_are_seen_after_an_interval(
    tmp_path: Path, clock: Clock, age_s: float
) -> None:
    bundles = make_folder(tmp_path, 3, age_s)
    source = FolderModelSource(str(tmp_path), TEAM, REFRESH_S)
    line = VersionCacheDriver(source)
    line.resolve(0, 1, 2)
    before = line.resolve(0, 1, 2)
    changed_file = bundles / category(1) / MANIFEST
    stamp = changed_file.stat()
    write_manifest(bundles, 1, note=1)
    if not age_s:  # as if a clock counts whole seconds: only the content differs
        os.utime(changed_file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    write_manifest(bundles, 3)
    shutil.rmtree(bundles / category(2))
    assert line.resolve(0, 1, 2) == before
    assert source.list_categories(TEAM) == [category(of) for of in range(3)]
    clock.now += REFRESH_S
    line.resolve(0, 1, 2)
    after = line.resolve(0, 1)
    assert (after[0] == before[0], after[1] == before[1]) == (True, False)
    assert source.list_categories(TEAM) == [category(of) for of in (0, 1, 3)]
    with pytest.raises(RegistryError, match=r"'latest'.*'part002'"):
        line.resolve(2)
    assert line.resolve(3)
    assert len(line.warmed) == 1


@pytest.mark.s3
def test_a_folder_on_s3_is_listed_once(
    s3: S3Server, clock: Clock, storage_calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = s3.new_uri()
    for of in range(3):
        write_manifest(join_path(place, "bundles"), of)
        write_bytes(join_path(place, "bundles", category(of), "network-0.safetensors"), b"x")
    source = FolderModelSource(place, TEAM, REFRESH_S)
    assert source.list_categories(TEAM) == [category(of) for of in range(3)]
    previous = source.resolve(TEAM, category(1))
    write_manifest(join_path(place, "bundles"), 1, note=1)  # in the same second, of the same size
    clock.now += REFRESH_S
    storage_calls.clear()
    assert source.resolve(TEAM, category(1)).name != previous.name
    assert storage_calls == {"listings": 1, "files": 3}
    monkeypatch.setattr(source_module, "_SETTLED_S", -3600.0)
    source.read_change_marks(TEAM)
    storage_calls.clear()
    source.read_change_marks(TEAM)
    assert storage_calls == {"listings": 1}


def test_a_folder_is_a_bundle_a_run_or_bundles_side_by_side(tmp_path: Path) -> None:
    bundles = make_folder(tmp_path, 2)
    (bundles / "notes.txt").write_text("")
    (bundles / "begun").mkdir()
    both = [category(0), category(1)]
    for place, expected in ((tmp_path, both), (bundles, both), (bundles / category(1), both[1:])):
        assert FolderModelSource(str(place), TEAM).list_categories(TEAM) == expected
    with pytest.raises(DataError, match="no bundle here"):
        FolderModelSource(str(bundles / "begun"), TEAM)
    source = FolderModelSource(str(bundles), TEAM)
    shutil.rmtree(bundles)
    with pytest.raises(DataError, match="no bundle here"):
        source.list_categories(TEAM)


def test_a_damaged_bundle_is_named_and_cached_versions_answer(tmp_path: Path, clock: Clock) -> None:
    bundles = make_folder(tmp_path, 2)
    source = FolderModelSource(str(tmp_path), TEAM, REFRESH_S)
    line = VersionCacheDriver(source)
    before = line.resolve(0, 1)
    (bundles / category(0) / MANIFEST).write_text("{")
    clock.now += REFRESH_S
    line.resolve(0, 1)
    assert line.resolve(0, 1) == before
    with pytest.raises(BundleError, match="not valid JSON"):
        source.list_categories(TEAM)
