"""Ingestion on a cluster gives the data of one process exactly once, even if workers die after a write."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from made_sources import make_mvtec, pixels, save
from s3_faults import faulty
from s3_server import S3Server

from focus_ray.cli.main import main
from focus_ray.data import store
from focus_ray.data.commits import referenced_files
from focus_ray.data.read import data_fingerprint, read_index, read_rows
from focus_ray.data.schema import SCHEMA
from focus_ray.data.store import open_store
from focus_ray.errors import DataError, TrainingError
from focus_ray.ingestion import chunks
from focus_ray.ingestion import cluster as cluster_ingest
from focus_ray.ingestion.cluster import ClusterMapper, ingest_on_cluster
from focus_ray.ingestion.ingest import ingest
from focus_ray.storage.files import write_bytes

pytestmark = pytest.mark.ray


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Makes two categories with a duplicate, a broken file and equal file stems."""
    for number, name in enumerate(("bolt", "nut")):
        root = make_mvtec(tmp_path / "parts" / name, num_train=21, seed=1000 * number)
        save(root / "train/good/zz.png", pixels(1000 * number + 3))
        save(root / "train/good/broken.png", b"")
        save(root / "train/good/005.bmp", pixels(1000 * number + 500))
    return tmp_path / "parts"


def rows_of(root: Path, category: str) -> list[dict[str, Any]]:
    index = read_index(root, category)
    return list(read_rows(root, category, index["row"].to_numpy(), SCHEMA.names))


def test_a_cluster_gives_the_data_of_one_process_even_if_each_worker_dies_once_after_a_write(
    ray_cluster: None, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MAX_CHUNK_IMAGES", 7)
    deaths = tmp_path / "deaths"
    deaths.mkdir()

    class Deadly(ClusterMapper):
        def __call__(self, function: Callable[[Any], Any], items: Sequence[Any], /) -> Iterator[tuple[int, Any]]:
            def die_once(item: Any) -> Any:
                result = function(item)
                place = deaths / f"{function.__name__}-{zlib.crc32(repr(item).encode())}"
                if place.exists():
                    return result
                place.touch()
                if len(list(deaths.iterdir())) <= 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return super().__call__(die_once, items)

    expected = ingest(source, tmp_path / "alone", progress=False)
    monkeypatch.setattr(cluster_ingest, "ClusterMapper", Deadly)
    out = tmp_path / "out"
    assert ingest_on_cluster(source, out, 3, progress=False) == expected
    assert len(list(deaths.iterdir())) > 3
    leftovers = 0
    for category in ("bolt", "nut"):
        assert rows_of(out, category) == rows_of(tmp_path / "alone", category)
        assert read_index(out, category).equals(read_index(tmp_path / "alone", category))
        assert data_fingerprint(out, category) == data_fingerprint(tmp_path / "alone", category)
        commit = open_store(out).require_commit(category)
        assert (
            commit["source_fingerprint"]
            == open_store(tmp_path / "alone").require_commit(category)["source_fingerprint"]
        )
        assert len(commit["files"]) >= 3
        leftovers += len(
            {path.name for path in (out / f"category={category}").glob("part-*")} - referenced_files(commit)
        )
    assert leftovers >= 1  # of the attempts that died: they go after a day
    (again, _) = ingest_on_cluster(source, out, 3, progress=False).categories
    assert again.status == "unchanged"


def test_an_error_of_a_worker_is_raised_unchanged(ray_cluster: None, tmp_path: Path) -> None:
    def fail(item: int) -> int:
        if item:
            raise DataError(f"{item}: no such thing")
        return item

    mapper = ClusterMapper(2)
    assert sorted(mapper(fail, [0, 0, 0])) == [(0, 0), (1, 0), (2, 0)]
    with pytest.raises(DataError, match=r"^7: no such thing$"):
        list(mapper(fail, [0, 7]))


def test_a_piece_whose_workers_always_die_is_reported(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_ingest, "MAX_RETRIES", 1)

    def die(item: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(TrainingError, match=r"2 attempts.*lower --workers"):
        list(ClusterMapper(1)(die, [0]))


def test_the_command_appends_with_workers(
    ray_cluster: None, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    ingest(source, out, progress=False)
    save(source / "nut/train/good/new.png", pixels(5000))
    status = main(["ingest", str(source), str(out), "--append", "--workers", "auto"])
    printed = capsys.readouterr().out
    assert "nut: appended, 23 train" in printed
    assert "bolt: unchanged, 22 train" in printed
    assert status == 3  # the broken files
    assert store.open_store(out).require_commit("nut")["num_rows"] == 26


@pytest.mark.s3
def test_from_s3_to_s3_each_object_is_read_once_by_some_worker(s3: S3Server, source: Path, tmp_path: Path) -> None:
    root, objects = s3.new_uri(), [path for path in sorted(source.rglob("*")) if path.is_file()]
    for path in objects:
        write_bytes(f"{root}/parts/{path.relative_to(source).as_posix()}", path.read_bytes())
    expected = ingest(source, tmp_path / "alone", progress=False)
    with faulty(s3.endpoint, share=0) as proxy:
        words = ["ingest", f"{root}/parts", f"{root}/data", "--workers", "2"]
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy.endpoint}
        ended = subprocess.run(
            [sys.executable, "-m", "focus_ray.cli", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        requested_paths = [path for method, path, _, _ in proxy.requests if "/parts/" in path and method == "GET"]
    assert (ended.returncode, ended.stdout) == (expected.exit_status, f"{expected}\n"), ended.stderr[-2000:]
    assert len(requested_paths) == len(set(requested_paths)) == len(objects)
    for category in ("bolt", "nut"):
        assert read_index(f"{root}/data", category).equals(read_index(tmp_path / "alone", category))
