"""The sink of inspected images: one file for each team and flush, retries, a memory limit, and deletion of old days."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from serving_set import (
    INSPECT,
    MILL,
    PRESS,
    RecordedMetrics,
    TwoTeams,
    create_client,
    create_service,
    create_settings,
)

from focus_ray.bundle.registry import Version
from focus_ray.errors import DataError
from focus_ray.serving import sink as sink_module
from focus_ray.serving.settings import SinkSettings
from focus_ray.serving.sink import ImageSink, delete_old_images
from focus_ray.storage.files import write_bytes

MANY = pytest.mark.parametrize("num_categories", [10, 100])


class RecordedSink:
    """A sink that stores all images, with its counts."""

    def __init__(self, uri: Path, **settings: Any) -> None:
        self.recorder = RecordedMetrics()
        self.sink = ImageSink(SinkSettings(uri=str(uri), share=1.0, **settings), self.recorder)

    @property
    def counts(self) -> Counter[str]:
        return self.recorder.sum_by_tag("sink_images", "outcome")

    def sample_images(self, number: int = 0, num_categories: int = 1, team: str = PRESS) -> None:
        category, published_at = f"part{number % num_categories:03}", datetime.now(timezone.utc)
        version = Version(team, category, "v0001", "", "a" * 64, published_at, 1)
        result: Any = SimpleNamespace(width=8, height=8, score=1.0, p_value=0.5, anomalous=False)
        self.sink.sample_images(version, f"request{number:05}", [bytes([number % 256]) * 100], [result], "answer")


def read_rows_below(uri: Path) -> list[dict[str, Any]]:
    return [row for file in uri.rglob("*.parquet") for row in pq.read_table(file, partitioning=None).to_pylist()]


def make_writes_fail(monkeypatch: pytest.MonkeyPatch, error: Exception, before: Any = lambda uri, data: None) -> None:
    def fail(uri: str, data: bytes) -> None:
        before(uri, data)
        raise error

    monkeypatch.setattr(sink_module, "write_bytes", fail)


def test_the_sink_stores_the_images_of_requests_and_deletes_them_after_the_retention(
    plant: TwoTeams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = RecordedMetrics()
    num_stored = 3
    monkeypatch.setattr(sink_module, "MAX_BUFFER_BYTES", sum(map(len, plant.images[:num_stored])))
    settings = create_settings(plant, sink={"uri": str(tmp_path), "share": 1.0})
    with create_client(create_service(settings, recorder)) as client:
        for image in [*plant.images[:num_stored], max(plant.images, key=len)]:
            client.post(INSPECT, content=image, headers=plant.image_headers(plant.press))
    (file,) = tmp_path.glob("team=press/date=*/part-*.parquet")
    rows = read_rows_below(tmp_path)
    assert [row["image"] for row in rows] == plant.images[:num_stored]
    assert {(row["category"], row["version"], row["role"]) for row in rows} == {("gear", "v0001", "answer")}
    assert recorder.sum_by_tag("sink_images", "outcome") == {"kept": num_stored, "dropped": 1, "written": num_stored}
    now = datetime.now(timezone.utc)
    assert delete_old_images(str(tmp_path), now - timedelta(days=1)) == []
    assert len(delete_old_images(str(tmp_path), now + timedelta(days=2))) == 1
    assert not file.exists()


def test_a_sink_that_cannot_be_written_fails_no_request(plant: TwoTeams, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recorder = RecordedMetrics()
    settings = create_settings(plant, sink={"uri": str(tmp_path / "file"), "share": 1.0})
    with create_client(create_service(settings, recorder)) as client:
        answer = client.post(INSPECT, content=plant.images[0], headers=plant.image_headers(plant.press))
        assert answer.status_code == 200
    assert recorder.sum_by_tag("sink_images", "outcome") == {"kept": 1, "delayed": 1, "failed": 1}


@MANY
def test_a_flush_writes_one_file_with_the_rows_of_all_categories(
    tmp_path: Path, num_categories: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_module, "MAX_ROWS", 100_000)
    recorded = RecordedSink(tmp_path)
    for number in range(4 * num_categories):
        recorded.sample_images(number, num_categories)
        if number == 2 * num_categories - 1:
            recorded.sink.flush()
    recorded.sink.close()
    assert len(list(tmp_path.glob("team=press/date=*/part-*.parquet"))) == len(list(tmp_path.rglob("*.*"))) == 2
    rows = read_rows_below(tmp_path)
    assert sorted(row["id"] for row in rows) == [f"request{number:05}/0" for number in range(4 * num_categories)]
    assert all(row["category"] == f"part{int(row['id'][7:12]) % num_categories:03}" for row in rows)
    assert recorded.counts == {"kept": len(rows), "written": len(rows)}
    table = pq.read_table(tmp_path, filters=[("category", "=", "part001")])  # as docs/use/serving.md says
    assert (table.num_rows, set(table["team"].to_pylist())) == (4, {PRESS})


def test_each_team_has_its_own_files_and_a_full_file_is_written_without_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_module, "MAX_ROWS", 4)
    recorded = RecordedSink(tmp_path)
    for number, team in enumerate([PRESS] * 4 + [MILL]):
        recorded.sample_images(number, 4, team)
    recorded.sink._writer.submit(lambda: None).result()
    assert recorded.counts["written"] >= 4
    recorded.sink.close()
    assert recorded.counts == {"kept": 5, "written": 5}
    assert {path.parts[-3] for path in tmp_path.rglob("*.parquet")} == {f"team={PRESS}", f"team={MILL}"}


@pytest.mark.parametrize("before", [lambda uri, data: None, write_bytes], ids=["not written", "answer lost"])
@pytest.mark.parametrize("error", [DataError("the storage is away"), OSError("odd"), KeyError("key"), MemoryError()])
def test_files_that_failed_are_written_once_by_a_later_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: Callable[[str, bytes], None], error: Exception
) -> None:
    recorded = RecordedSink(tmp_path)
    with monkeypatch.context() as patch:
        make_writes_fail(patch, error, before)
        for number in range(6):
            recorded.sample_images(number, 3)
            if number % 2:
                recorded.sink.flush()
        recorded.sink.flush()
    assert recorded.counts == {"kept": 6, "delayed": 6}
    recorded.sample_images(6, 3)
    recorded.sink.close()
    assert recorded.counts == {"kept": 7, "delayed": 6, "written": 7}
    assert sorted(row["id"] for row in read_rows_below(tmp_path)) == [f"request{number:05}/0" for number in range(7)]
    assert recorded.sink._num_bytes == 0


def test_waiting_images_are_bounded_and_dropped_images_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_module, "MAX_BUFFER_BYTES", 1000)
    make_writes_fail(monkeypatch, DataError("the storage is away"))
    recorded = RecordedSink(tmp_path)
    for number in range(20):
        recorded.sample_images(number)
        recorded.sink.flush()
    assert recorded.counts == {"kept": 10, "delayed": 10, "dropped": 10}
    recorded.sink.close()
    assert recorded.counts == {"kept": 10, "delayed": 10, "dropped": 10, "failed": 10}


# ---- deletion


@pytest.mark.parametrize("name", ["2026-13-45", "0000-00-00", "9999-12-31", "2026-01-01T00", "", "１２３４-01-01"])
def test_a_folder_with_an_odd_date_stays_and_stops_neither_flush_nor_deletion(
    tmp_path: Path, name: str, service_log: pytest.LogCaptureFixture
) -> None:
    odd_folder, old_folder = (tmp_path / f"team={PRESS}" / f"date={date}" for date in (name, "2020-01-01"))
    for folder in (odd_folder, old_folder):
        folder.mkdir(parents=True)
    (tmp_path / "team=file").write_text("a file where a team would be")
    recorded = RecordedSink(tmp_path)
    recorded.sample_images()
    recorded.sink.close()
    assert recorded.counts["written"] == 1
    assert (odd_folder.exists(), old_folder.exists()) == (True, False)
    logged_folders = [getattr(record, "facts", {}).get("folder", "") for record in service_log.records]
    assert any("2026-13-45" in folder for folder in logged_folders) == (name == "2026-13-45")


def test_a_retention_longer_than_the_calendar_is_allowed(tmp_path: Path, service_log: pytest.LogCaptureFixture) -> None:
    RecordedSink(tmp_path, retention_days=1e9).sink.close()
    assert service_log.messages == []


def test_a_day_that_cannot_be_deleted_does_not_stop_the_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = sink_module.remove_folder

    def remove_some(uri: str) -> None:
        if uri.endswith("02"):
            raise DataError(f"{uri}: denied")
        remove(uri)

    for number in (1, 2, 3):
        (tmp_path / "team=press" / f"date=2020-01-0{number}").mkdir(parents=True)
    monkeypatch.setattr(sink_module, "remove_folder", remove_some)
    deleted = delete_old_images(str(tmp_path), datetime(2021, 1, 1, tzinfo=timezone.utc))
    assert [name[-2:] for name in deleted] == ["01", "03"]


def test_old_days_are_deleted_in_the_layout_of_old_releases_too(tmp_path: Path) -> None:
    old = [f"team={PRESS}/date=2020-01-01", f"team={PRESS}/category=gear/date=2020-01-01"]
    others = [place.replace("01-01", "01-03") for place in old] + ["else/date=2020-01-01"]
    for place in (*old, *others):
        write_bytes(tmp_path / place / "part-x.parquet", b"")
    deleted = delete_old_images(str(tmp_path), datetime(2020, 1, 3, tzinfo=timezone.utc))
    assert sorted(deleted) == sorted(str(tmp_path / place) for place in old)
    assert all((tmp_path / place).exists() for place in others)
