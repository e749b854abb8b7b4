"""Ingestion on a cluster gives the data of one process exactly once, even if workers die after a write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ingested import commit_of, ingest_quietly, rows_of
from made_sources import make_mvtec, pixels, save
from s3_faults import faulty
from s3_server import S3Server

from focus_ray.cli.main import main
from focus_ray.cluster.capacity import make_worker_options
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.data.commits import list_referenced_files
from focus_ray.data.read import read_index
from focus_ray.errors import DataError, TrainingError
from focus_ray.ingestion import chunks, cluster
from focus_ray.ingestion.cluster import ingest_on_cluster, map_in_ray_tasks
from focus_ray.storage.files import write_bytes

pytestmark = pytest.mark.ray
ONE_CPU = {"num_cpus": 1}
GROUPS = r"name:^(\d)"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Makes two categories with a duplicate, a broken file and equal file stems."""
    for number, name in enumerate(("bolt", "nut")):
        root = make_mvtec(tmp_path / "parts" / name, num_train=21, seed=1000 * number)
        save(root / "train/good/zz.png", pixels(1000 * number + 3))
        save(root / "train/good/broken.png", b"")
        save(root / "train/good/005.bmp", pixels(1000 * number + 500))
    return tmp_path / "parts"


def test_a_cluster_gives_the_data_of_one_process_even_if_each_worker_dies_once_after_a_write(
    ray_cluster: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MAX_CHUNK_IMAGES", 7)
    deaths, alone, out = tmp_path / "deaths", tmp_path / "alone", tmp_path / "out"
    deaths.mkdir()

    def map_deadly(
        function: Callable[[Any], Any],
        items: Sequence[Any],
        count_tasks: Callable[[int], int],
        task_options: Mapping[str, Any],
    ) -> Iterator[tuple[int, Any]]:
        def die_once(item: Any) -> Any:
            result = function(item)
            place = deaths / f"{function.__name__}-{zlib.crc32(repr(item).encode())}"
            if place.exists():
                return result
            place.touch()
            if len(list(deaths.iterdir())) <= 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return map_in_ray_tasks(die_once, items, count_tasks, task_options)

    expected = ingest_quietly(source, alone, group_by=GROUPS)
    monkeypatch.setattr(cluster, "map_in_ray_tasks", map_deadly)
    assert ingest_on_cluster(source, out, 3, group_by=GROUPS, progress=False) == expected
    assert len(list(deaths.iterdir())) > 3
    leftovers: set[str] = set()
    for category in ("bolt", "nut"):
        assert rows_of(out, category) == rows_of(alone, category)
        assert read_index(out, category).equals(read_index(alone, category))
        commit = commit_of(out, category)
        assert commit["source_fingerprint"] == commit_of(alone, category)["source_fingerprint"]
        assert len(commit["files"]) >= 3
        parts = {path.name for path in (out / f"category={category}").glob("part-*")}
        leftovers |= parts - list_referenced_files(commit)
    assert leftovers  # of the attempts that died: they go after a day
    (again, _) = ingest_on_cluster(source, out, 3, group_by=GROUPS, progress=False).categories
    assert again.status == "unchanged"


def test_an_error_of_a_worker_is_raised_unchanged(ray_cluster: None) -> None:
    def fail(item: int) -> int:
        if item:
            raise DataError(f"{item}: no such thing")
        return item

    assert sorted(map_in_ray_tasks(fail, [0, 0, 0], lambda num_tasks: 2, ONE_CPU)) == [(0, 0), (1, 0), (2, 0)]
    with pytest.raises(DataError, match=r"^7: no such thing$"):
        list(map_in_ray_tasks(fail, [0, 7], lambda num_tasks: 2, ONE_CPU))


def test_tasks_reserve_the_resources_of_the_cluster_settings(ray_cluster: None) -> None:
    def get_resources(item: int) -> dict[str, float]:
        import ray

        return ray.get_runtime_context().get_assigned_resources()

    options = make_worker_options(ClusterConfig(cpus_per_worker=2, memory_gib_per_worker=0.25), use_gpu=False)
    assert dict(map_in_ray_tasks(get_resources, [0], lambda num_tasks: 1, options)) == {
        0: {"CPU": 2.0, "memory": 2.0**28}
    }


def test_labels_that_no_node_has_are_refused(ray_cluster: None, source: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    with pytest.raises(TrainingError, match=r"{'site': 'x'}"):
        ingest_on_cluster(source, tmp_path / "out", 2, ClusterConfig(labels={"site": "x"}), messages.append)
    assert "no node for workers with the labels {'site': 'x'}" in messages[0]


def test_a_piece_whose_workers_always_die_is_reported(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "MAX_RETRIES", 1)

    def die(item: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(TrainingError, match=r"2 attempts.*--workers"):
        list(map_in_ray_tasks(die, [0], lambda num_tasks: 1, ONE_CPU))


def test_the_command_appends_with_workers(
    ray_cluster: None, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ingest_quietly(source, out)
    save(source / "nut/train/good/new.png", pixels(5000))
    assert main(["ingest", str(source), str(out), "--append", "--workers", "auto"]) == 3  # the broken files
    printed = capsys.readouterr().out
    assert "nut: appended, 23 train" in printed
    assert "bolt: unchanged, 22 train" in printed
    assert commit_of(out, "nut")["num_rows"] == 26


@pytest.mark.s3
def test_from_s3_to_s3_each_object_is_read_once_by_some_worker(s3: S3Server, source: Path, tmp_path: Path) -> None:
    root, objects = s3.new_uri(), [path for path in sorted(source.rglob("*")) if path.is_file()]
    for path in objects:
        write_bytes(f"{root}/parts/{path.relative_to(source).as_posix()}", path.read_bytes())
    expected = ingest_quietly(source, tmp_path / "alone")
    with faulty(s3.endpoint, share=0) as proxy:
        words = ["ingest", f"{root}/parts", f"{root}/data", "--workers", "2"]
        ended = subprocess.run(
            [sys.executable, "-m", "focus_ray.cli", *words],
            env={**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint},
            capture_output=True,
            text=True,
            timeout=200,
        )
        requested_paths = [path for method, path, _, _ in proxy.requests if "/parts/" in path and method == "GET"]
    assert (ended.returncode, ended.stdout) == (expected.exit_status, f"{expected}\n"), ended.stderr[-2000:]
    assert len(requested_paths) == len(set(requested_paths)) == len(objects)
    for category in ("bolt", "nut"):
        assert read_index(f"{root}/data", category).equals(read_index(tmp_path / "alone", category))
