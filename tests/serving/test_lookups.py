"""Look-ups and the sink with many categories: number of storage calls, and that no change is missed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from s3_server import S3Server

from focus_ray.bundle import registry as registry_module
from focus_ray.bundle.bundle import FORMAT_VERSION, MANIFEST, manifest_hash
from focus_ray.bundle.registry import CLAIM_LASTS, Registry, Version
from focus_ray.errors import BundleError, DataError, RegistryError
from focus_ray.serving import sink as sink_module
from focus_ray.serving import source as source_module
from focus_ray.serving.measures import Measures
from focus_ray.serving.settings import Sink
from focus_ray.serving.sink import ImageSink, delete_old_images
from focus_ray.serving.source import MAX_LOOKUP_AGE_S, FolderSource, ModelSource, VersionDirectory
from focus_ray.storage.files import create_bytes, join, list_names, write_bytes

TEAM, REFRESH_S = "press", 2.0
MANY = pytest.mark.parametrize("num_categories", [10, 300])


def category(number: int) -> str:
    return f"part{number:03}"


def add_version(registry: Registry, of: str, name: str) -> None:
    """Publishes a version as `publish` does, but without a bundle."""
    now = datetime.now(timezone.utc).isoformat()
    record = {"sha256": f"{of}{name}".encode().hex().ljust(64, "0"), "published_at": now, "num_bytes": 1}
    write_bytes(join(registry.root, TEAM, of, "_published", f"{name}.json"), json.dumps(record).encode())
    registry._move(TEAM, of, "latest", name, only_forward=True)


def make_registry(root: Path, num_categories: int) -> Registry:
    registry = Registry(root)
    for number in range(num_categories):
        add_version(registry, category(number), "v0001")
    return registry


def write_manifest(bundle: str | Path, of: str, note: int = 0) -> None:
    """Writes the manifest of a bundle, without tensors."""
    manifest = {"format": "focus_ray bundle", "format_version": FORMAT_VERSION, "category": of, "files": {}}
    manifest.update(created_at="2026-01-31T12:00:00+00:00", note=f"{note:04}")
    manifest.update({name: {} for name in ("config", "data", "calibration", "metrics")})
    manifest["moments"] = {"count": 2, "height": 8, "width": 8, "channels": 32}
    manifest["sha256"] = manifest_hash(manifest)
    write_bytes(join(bundle, MANIFEST), json.dumps(manifest).encode())


def make_folder(root: Path, num_categories: int, age_s: float = 3600.0) -> Path:
    for number in range(num_categories):
        write_manifest(root / "bundles" / category(number), category(number))
        grow_old(root / "bundles" / category(number), age_s)
    return root


def grow_old(bundle: Path, age_s: float) -> None:
    then = time.time() - age_s
    os.utime(bundle / MANIFEST, (then, then))


@dataclass
class Clock:
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(source_module, "time", SimpleNamespace(monotonic=clock.monotonic, time=time.time))
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

    count(registry_module, "list_names", "listings")
    count(registry_module, "read_bytes", "files")
    count(source_module, "stamp_bundles", "listings")
    count(source_module, "read_manifest", "files")
    return calls


@dataclass
class Line:
    """A version directory of a source; records the versions that it warmed and the messages that it logged."""

    source: ModelSource
    warmed: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory = VersionDirectory(
            self.source, REFRESH_S, self._warm, lambda message, **facts: self.messages.append(message)
        )

    async def _warm(self, version: Version) -> None:
        self.warmed.append(f"{version.category}/{version.name}")

    async def ask(self, num_categories: int, ref: str = "latest") -> list[str]:
        """Returns the version of each category, after the checks in the background have ended."""
        versions = [
            (await self.directory.resolve(TEAM, category(number), ref)).name for number in range(num_categories)
        ]
        tasks = [entry.task for entry in self.directory._entries.values() if entry.task]
        await asyncio.gather(*tasks)
        return versions


# ---- a registry


@MANY
def test_a_refresh_interval_costs_one_listing_for_any_number_of_categories(
    tmp_path: Path, clock: Clock, storage_calls: Counter[str], num_categories: int
) -> None:
    line = Line(make_registry(tmp_path, num_categories))
    storage_calls.clear()

    async def run() -> None:
        await line.ask(num_categories)
        clock.now += REFRESH_S
        await line.ask(num_categories)
        # each is looked up as the first of it comes, and once more with the marks that are asked for then
        assert storage_calls == {"listings": 2 * num_categories + 1, "files": 4 * num_categories}
        storage_calls.clear()
        for _ in range(5):
            clock.now += REFRESH_S
            await line.ask(num_categories)
            await line.ask(num_categories)
        assert storage_calls == {"listings": 5}

    asyncio.run(run())
    assert line.warmed == []


def test_a_moved_alias_is_seen_after_an_interval_and_only_it_is_looked_up(
    tmp_path: Path, clock: Clock, storage_calls: Counter[str]
) -> None:
    line, other = Line(make_registry(tmp_path, 10)), Registry(tmp_path)

    async def run() -> None:
        for _ in range(3):
            await line.ask(10)
            clock.now += REFRESH_S
        await line.ask(10)
        for expected, change in (
            ("v0002", lambda: add_version(other, category(3), "v0002")),
            ("v0001", lambda: other.roll_back(TEAM, category(3), "latest")),
            ("v0002", lambda: other.promote(TEAM, category(3), "v0002", "latest")),
        ):
            change()
            storage_calls.clear()
            clock.now += REFRESH_S - 0.1
            await line.ask(10)
            assert storage_calls == {}
            clock.now += 0.1
            await line.ask(10)
            assert storage_calls == {"listings": 2, "files": 2}
            assert (await line.ask(10))[3] == expected

    asyncio.run(run())
    assert line.warmed == [f"part003/{name}" for name in ("v0002", "v0001", "v0002")]


@pytest.mark.parametrize("kind", ["registry", "folder"])
def test_an_answer_is_at_most_one_interval_old(tmp_path: Path, clock: Clock, kind: str) -> None:
    def change(of: int) -> None:
        if kind == "registry":
            add_version(registry, category(of), "v0002")
        else:
            write_manifest(tmp_path / "bundles" / category(of), category(of), note=1)

    if kind == "registry":
        registry = make_registry(tmp_path, 4)
        line = Line(Registry(tmp_path))
    else:
        line = Line(FolderSource(str(make_folder(tmp_path, 4)), TEAM, REFRESH_S))

    async def ask(of: int) -> str:
        version = await line.directory.resolve(TEAM, category(of), "latest")
        await line.ask(0)  # waits for the checks in the background
        return version.name

    async def run() -> None:
        for _ in range(2):
            previous = {of: await ask(of) for of in (0, 1, 3)}  # with marks of the time 0
        clock.now += 1.9
        change(2)
        change(1)
        first_version_of_2 = await ask(2)  # its first look-up
        clock.now += 0.1
        assert await ask(0) == previous[0]  # marks of 2.0
        change(0)
        change(3)
        clock.now += 1.9
        assert {of: await ask(of) for of in (0, 1, 3)} == previous  # marks of 2.0 say that 1 has changed, and no other
        assert await ask(1) != previous[1]
        await ask(2)
        assert (await ask(2) != first_version_of_2) == (kind == "folder")
        clock.now += 0.1
        for of in (0, 3):
            await ask(of)
            assert await ask(of) != previous[of]

    asyncio.run(run())


def test_a_category_is_looked_up_again_while_its_alias_moves_and_after_the_mover_died(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_registry(tmp_path, 2)
    line = Line(Registry(tmp_path))
    assert sorted(registry.marks(TEAM)) == [category(0), category(1)]

    def die(uri: str, data: bytes) -> bool:
        assert sorted(registry.marks(TEAM)) == [category(1)]
        assert create_bytes(uri, data)
        asyncio.run(check())  # has asked for the marks before the alias moved, and does again just after it
        died.set()
        raise KeyboardInterrupt

    async def check() -> None:
        for _ in range(2):
            clock.now += REFRESH_S
            await line.ask(2)
        assert await line.ask(2) == ["v0002", "v0001"]

    died = threading.Event()
    asyncio.run(line.ask(2))
    monkeypatch.setattr(registry_module, "create_bytes", die)
    # a process that dies marks no end either
    monkeypatch.setattr(
        registry_module, "write_bytes", lambda uri, data: None if died.is_set() else write_bytes(uri, data)
    )
    monkeypatch.setattr(registry_module, "remove_file", lambda uri: None)
    with pytest.raises(KeyboardInterrupt):
        add_version(registry, category(0), "v0002")
    monkeypatch.undo()
    assert sorted(registry.marks(TEAM)) == [category(1)]
    add_version(registry, category(0), "v0003")
    assert sorted(registry.marks(TEAM)) == [category(1)]  # it may still be at it
    long_ago = f"{datetime.now(timezone.utc) - 3 * CLAIM_LASTS:%Y%m%dT%H%M%S}"
    (begun,) = (tmp_path / TEAM / "_changes").glob(f"{category(0)}@begun-*")
    begun.rename(begun.with_name(f"{category(0)}@begun-{long_ago}-x.json"))
    add_version(registry, category(0), "v0004")
    assert sorted(registry.marks(TEAM)) == [category(0), category(1)]
    assert len(list_names(join(registry.root, TEAM, "_changes"))) == 2


def test_an_unchanged_mark_means_an_unchanged_version_under_concurrent_moves(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, 1)
    for name in ("v0002", "v0003"):
        add_version(registry, category(0), name)
    stop, failed = threading.Event(), []

    def move(names: tuple[str, str]) -> None:
        own_registry = Registry(tmp_path)
        try:
            for turn in range(40):
                own_registry.promote(TEAM, category(0), names[turn % 2], "production")
        except BaseException as error:
            failed.append(error)

    registry.promote(TEAM, category(0), "v0001", "production")
    seen: dict[str, set[str]] = {}

    def read() -> None:
        own_registry = Registry(tmp_path)
        while not stop.is_set():
            before = own_registry.marks(TEAM).get(category(0))
            version = own_registry.resolve(TEAM, category(0), "production").name
            if before is not None and before == own_registry.marks(TEAM).get(category(0)):
                seen.setdefault(before, set()).add(version)

    reader = threading.Thread(target=read)
    movers = [threading.Thread(target=move, args=(names,)) for names in (("v0001", "v0002"), ("v0003", "v0001"))]
    for thread in (reader, *movers):
        thread.start()
    for thread in movers:
        thread.join()
    time.sleep(0.1)
    stop.set()
    reader.join()
    assert not failed
    assert all(len(versions) == 1 for versions in seen.values())
    last = registry.marks(TEAM)[category(0)]
    assert seen[last] == {registry.resolve(TEAM, category(0), "production").name}


def test_simultaneous_publications_are_all_seen_after_an_interval(tmp_path: Path, clock: Clock) -> None:
    line = Line(make_registry(tmp_path, 8))

    def publish(first: int) -> None:
        own_registry = Registry(tmp_path)
        for number in range(2, 6):
            for of in range(8):
                add_version(own_registry, category((of + first) % 8), f"v{10 * number + first:04}")

    async def run() -> None:
        publishers = [asyncio.create_task(asyncio.to_thread(publish, first)) for first in range(3)]
        while not all(publisher.done() for publisher in publishers):
            await line.ask(8)
            clock.now += REFRESH_S
        await asyncio.gather(*publishers)
        clock.now += REFRESH_S
        await line.ask(8)
        assert await line.ask(8) == [Registry(tmp_path).resolve(TEAM, category(of)).name for of in range(8)]
        assert set(await line.ask(8)) == {"v0052"}

    asyncio.run(run())


def test_a_registry_without_marks_is_looked_up_by_category(
    tmp_path: Path, clock: Clock, storage_calls: Counter[str]
) -> None:
    registry = make_registry(tmp_path, 10)
    changes = tmp_path / TEAM / "_changes"
    shutil.rmtree(changes)
    line = Line(Registry(tmp_path))

    async def run() -> None:
        for _ in range(3):
            storage_calls.clear()
            await line.ask(10)
            clock.now += REFRESH_S
        assert storage_calls == {"listings": 11, "files": 20}
        add_version(registry, category(3), "v0002")
        shutil.rmtree(changes)
        await line.ask(10)
        assert (await line.ask(10))[3] == "v0002"
        for of in range(10):  # any change marks a category; so does a collection that finds nothing to delete
            registry.collect_garbage(TEAM, category(of), 5)
        for _ in range(2):
            clock.now += REFRESH_S
            storage_calls.clear()
            await line.ask(10)
        assert storage_calls == {"listings": 1}

    asyncio.run(run())


def test_an_alias_moved_without_marks_is_seen_later(tmp_path: Path, clock: Clock) -> None:
    registry = make_registry(tmp_path, 1)
    line = Line(Registry(tmp_path))
    changes = tmp_path / TEAM / "_changes"

    async def run() -> None:
        for _ in range(3):
            await line.ask(1)
            clock.now += REFRESH_S
        records = {path.name: path.read_bytes() for path in changes.iterdir()}
        add_version(registry, category(0), "v0002")
        shutil.rmtree(changes)
        for name, content in records.items():
            write_bytes(changes / name, content)
        await line.ask(1)
        assert await line.ask(1) == ["v0001"]
        clock.now += MAX_LOOKUP_AGE_S
        await line.ask(1)
        assert await line.ask(1) == ["v0002"]

    asyncio.run(run())


def test_a_deleted_version_is_noticed_and_an_own_move_is_seen_immediately(tmp_path: Path, clock: Clock) -> None:
    registry = make_registry(tmp_path, 1)
    for name in ("v0002", "v0003"):
        add_version(registry, category(0), name)
    line = Line(Registry(tmp_path))

    async def run() -> None:
        for _ in range(3):
            await line.ask(1, "v0001")
            await line.ask(1)
            clock.now += REFRESH_S
        registry.promote(TEAM, category(0), "v0002", "latest")
        line.directory.forget(TEAM, category(0))
        await line.ask(1)
        assert await line.ask(1) == ["v0002"]
        clock.now += REFRESH_S
        await line.ask(1, "v0001")
        assert registry.collect_garbage(TEAM, category(0), 1, min_age=timedelta(0)) == ["v0001"]
        assert await line.ask(1, "v0001") == ["v0001"]
        clock.now += REFRESH_S
        await line.ask(1, "v0001")
        with pytest.raises(RegistryError, match="has no 'v0001'"):
            await line.ask(1, "v0001")

    asyncio.run(run())


def test_marks_are_not_listed_as_a_category_and_an_empty_collection_adds_none(tmp_path: Path) -> None:
    registry = make_registry(tmp_path, 2)
    assert registry.categories(TEAM) == [category(0), category(1)]
    assert registry.collect_garbage("weld", "gear", 1) == []
    with pytest.raises(RegistryError):
        registry.roll_back("weld", "gear", "latest")
    assert registry.teams() == [TEAM]
    assert registry.marks("weld") == {}


def test_moves_of_an_identity_without_delete_rights_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make_registry(tmp_path, 1)

    def refuse(uri: str) -> None:
        raise DataError("access denied")

    monkeypatch.setattr(registry_module, "remove_file", refuse)
    add_version(registry, category(0), "v0002")
    assert registry.resolve(TEAM, category(0)).name == "v0002"
    assert registry.marks(TEAM) == {}  # its beginning stays, so it is looked up


def test_while_marks_cannot_be_read_cached_versions_answer(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = make_registry(tmp_path, 2)
    line = Line(registry)

    def fail(team: str) -> dict[str, str]:
        raise DataError("the storage is away")

    async def run() -> None:
        await line.ask(2)
        with monkeypatch.context() as patch:
            patch.setattr(registry, "marks", fail)
            add_version(Registry(tmp_path), category(0), "v0002")
            clock.now += REFRESH_S
            await line.ask(2)
            assert await line.ask(2) == ["v0001", "v0001"]
        assert line.messages == ["version not refreshed"] * 2
        clock.now += REFRESH_S
        await line.ask(2)
        assert await line.ask(2) == ["v0002", "v0001"]

    asyncio.run(run())


# ---- a folder


@MANY
def test_a_folder_is_listed_once_for_all_categories_and_manifests_are_read_once(
    tmp_path: Path, clock: Clock, storage_calls: Counter[str], num_categories: int
) -> None:
    source = FolderSource(str(make_folder(tmp_path, num_categories)), TEAM, REFRESH_S)
    line = Line(source)

    async def run() -> None:
        await line.ask(num_categories)
        await line.ask(num_categories)
        assert len(source.categories(TEAM)) == num_categories
        for of in range(num_categories):
            assert source.aliases(TEAM, category(of)) == {"latest": source.resolve(TEAM, category(of)).name}
        assert storage_calls == {"listings": 2, "files": num_categories}
        storage_calls.clear()
        for _ in range(5):
            clock.now += REFRESH_S
            await line.ask(num_categories)
        assert storage_calls == {"listings": 5}

    asyncio.run(run())


@pytest.mark.parametrize("age_s", [3600.0, 0.0])
def test_new_replaced_and_removed_bundles_are_seen_after_an_interval(
    tmp_path: Path, clock: Clock, age_s: float
) -> None:
    bundles = make_folder(tmp_path, 3, age_s) / "bundles"
    source = FolderSource(str(tmp_path), TEAM, REFRESH_S)
    line = Line(source)

    async def run() -> None:
        await line.ask(3)
        before = await line.ask(3)
        stamp = (bundles / category(1) / MANIFEST).stat()
        write_manifest(bundles / category(1), category(1), note=1)
        if not age_s:  # as where a clock tells seconds: nothing but its content is another
            os.utime(bundles / category(1) / MANIFEST, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        write_manifest(bundles / category(3), category(3))
        shutil.rmtree(bundles / category(2))
        assert await line.ask(3) == before
        assert source.categories(TEAM) == [category(of) for of in range(3)]
        clock.now += REFRESH_S
        await line.ask(3)
        after = await line.ask(2)
        assert (after[0] == before[0], after[1] == before[1]) == (True, False)
        assert source.categories(TEAM) == [category(of) for of in (0, 1, 3)]
        with pytest.raises(RegistryError, match=r"'latest'.*'part002'"):
            await line.directory.resolve(TEAM, category(2), "latest")
        assert (await line.directory.resolve(TEAM, category(3), "latest")).category == category(3)

    asyncio.run(run())
    assert len(line.warmed) == 1


@pytest.mark.s3
def test_a_folder_on_s3_is_listed_once(
    s3: S3Server, clock: Clock, storage_calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = s3.new_uri()
    for number in range(3):
        write_manifest(join(place, "bundles", category(number)), category(number))
        write_bytes(join(place, "bundles", category(number), "network-0.safetensors"), b"x")
    source = FolderSource(place, TEAM, REFRESH_S)
    assert source.categories(TEAM) == [category(of) for of in range(3)]
    previous = source.resolve(TEAM, category(1))
    write_manifest(join(place, "bundles", category(1)), category(1), note=1)  # in the same second, of the same size
    clock.now += REFRESH_S
    storage_calls.clear()
    assert source.resolve(TEAM, category(1)).name != previous.name
    assert storage_calls == {"listings": 1, "files": 3}
    monkeypatch.setattr(source_module, "_SETTLED_S", -3600.0)
    source.marks(TEAM)
    storage_calls.clear()
    source.marks(TEAM)
    assert storage_calls == {"listings": 1}


def test_a_folder_is_a_bundle_a_run_or_bundles_side_by_side(tmp_path: Path) -> None:
    bundles = make_folder(tmp_path, 2) / "bundles"
    (bundles / "notes.txt").write_text("")
    (bundles / "begun").mkdir()
    for place, expected in (
        (tmp_path, [category(0), category(1)]),
        (bundles, [category(0), category(1)]),
        (bundles / category(1), [category(1)]),
    ):
        assert FolderSource(str(place), TEAM).categories(TEAM) == expected
    with pytest.raises(DataError, match="no bundle here"):
        FolderSource(str(bundles / "begun"), TEAM)
    source = FolderSource(str(bundles), TEAM)
    shutil.rmtree(bundles)
    with pytest.raises(DataError, match="no bundle here"):
        source.categories(TEAM)


def test_a_damaged_bundle_is_named_and_cached_versions_answer(tmp_path: Path, clock: Clock) -> None:
    bundles = make_folder(tmp_path, 2) / "bundles"
    source = FolderSource(str(tmp_path), TEAM, REFRESH_S)
    line = Line(source)

    async def run() -> None:
        before = await line.ask(2)
        (bundles / category(0) / MANIFEST).write_text("{")
        clock.now += REFRESH_S
        await line.ask(2)
        assert await line.ask(2) == before
        with pytest.raises(BundleError, match="not valid JSON"):
            source.categories(TEAM)

    asyncio.run(run())


# ---- the sink


class Sunk(Measures):
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def sink(self, outcome: str, count: int) -> None:
        assert count > 0
        self.counts[outcome] += count


def sink_of(uri: Path, **changes: Any) -> tuple[ImageSink, Counter[str]]:
    measures = Sunk()
    return ImageSink(Sink(uri=str(uri), share=1.0, **changes), measures), measures.counts


def offer(sink: ImageSink, number: int, num_categories: int, team: str = TEAM, num_bytes: int = 100) -> None:
    of = category(number % num_categories)
    version = Version(team, of, "v0001", "", "a" * 64, datetime.now(timezone.utc), 1)
    result: Any = SimpleNamespace(width=8, height=8, score=1.0, p_value=0.5, anomalous=False)
    sink.offer(version, f"request{number:05}", [bytes([number % 256]) * num_bytes], [result])


def rows_below(uri: Path) -> list[dict[str, Any]]:
    return [row for file in uri.rglob("*.parquet") for row in pq.read_table(file, partitioning=None).to_pylist()]


@MANY
def test_a_flush_writes_one_file_with_the_rows_of_all_categories(tmp_path: Path, num_categories: int) -> None:
    sink, counts = sink_of(tmp_path, max_rows=100_000)
    for turn in range(2):
        for number in range(2 * num_categories):
            offer(sink, turn * 2 * num_categories + number, num_categories)
        sink.flush()
    sink.flush()
    sink.close()
    assert len(list(tmp_path.glob(f"team={TEAM}/date=*/part-*.parquet"))) == len(list(tmp_path.rglob("*.*"))) == 2
    rows = rows_below(tmp_path)
    assert sorted(row["id"] for row in rows) == [f"request{number:05}/0" for number in range(4 * num_categories)]
    assert Counter(row["category"] for row in rows) == {category(of): 4 for of in range(num_categories)}
    assert all(row["category"] == category(int(row["id"][7:12]) % num_categories) for row in rows)
    assert counts == {"kept": len(rows), "written": len(rows)}
    table = pq.read_table(tmp_path, filters=[("category", "=", category(1))])  # as docs/use/serving.md says
    assert table.num_rows == 4
    assert set(table["team"].to_pylist()) == {TEAM}


def test_each_team_has_its_own_files_and_a_full_file_is_written_without_a_flush(tmp_path: Path) -> None:
    sink, counts = sink_of(tmp_path, max_rows=4)
    for number in range(4):
        offer(sink, number, 4)
    offer(sink, 4, 4, team="mill")
    sink._writer.submit(lambda: None).result()
    assert counts["written"] >= 4
    sink.close()
    assert counts == {"kept": 5, "written": 5}
    assert sorted(path.parts[-3] for path in tmp_path.rglob("*.parquet"))[-1] == f"team={TEAM}"
    assert {path.parts[-3] for path in tmp_path.rglob("*.parquet")} == {f"team={TEAM}", "team=mill"}


def failing(monkeypatch: pytest.MonkeyPatch, after: Callable[[str, bytes], None] = lambda uri, data: None) -> None:
    def fail(uri: str, data: bytes) -> None:
        after(uri, data)
        raise DataError("the storage is away")

    monkeypatch.setattr(sink_module, "write_bytes", fail)


@pytest.mark.parametrize("after", [lambda uri, data: None, write_bytes], ids=["not written", "answer lost"])
def test_files_that_failed_are_written_once_by_a_later_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: Callable[[str, bytes], None]
) -> None:
    sink, counts = sink_of(tmp_path)
    with monkeypatch.context() as patch:
        failing(patch, after)
        for number in range(6):
            offer(sink, number, 3)
            if number % 2:
                sink.flush()
        sink.flush()
    assert counts == {"kept": 6, "delayed": 6}
    offer(sink, 6, 3)
    sink.close()
    assert counts == {"kept": 7, "delayed": 6, "written": 7}
    assert sorted(row["id"] for row in rows_below(tmp_path)) == [f"request{number:05}/0" for number in range(7)]
    assert sink._num_bytes == 0


def test_waiting_images_are_bounded_and_dropped_images_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, counts = sink_of(tmp_path, max_buffer_mb=0.001)
    with monkeypatch.context() as patch:
        failing(patch)
        for number in range(20):
            offer(sink, number, 3)
            sink.flush()
        assert counts == {"kept": 10, "delayed": 10, "dropped": 10}
        sink.close()
    assert counts == {"kept": 10, "delayed": 10, "dropped": 10, "failed": 10}


def test_old_days_are_deleted_in_the_layout_of_old_releases_too(tmp_path: Path) -> None:
    old = [f"team={TEAM}/date=2020-01-01", f"team={TEAM}/category=gear/date=2020-01-01"]
    young = [f"team={TEAM}/date=2020-01-03", f"team={TEAM}/category=gear/date=2020-01-03", "team=mill/date=2020-01-03"]
    for place in (*old, *young, "else/date=2020-01-01"):
        write_bytes(tmp_path / place / "part-x.parquet", b"")
    removed = delete_old_images(str(tmp_path), datetime(2020, 1, 3, tzinfo=timezone.utc))
    assert sorted(removed) == sorted(str(tmp_path / place) for place in old)
    assert all((tmp_path / place).exists() for place in (*young, "else/date=2020-01-01"))
