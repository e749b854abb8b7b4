"""Batch inspection on Ray scores every row once, like the inspector; damaged images; storage on S3."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from s3_server import S3Server
from small_set import NUM_TEST, NUM_TRAIN, corrupt_image, draw_parts, ingest_parts, small_config

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.data.read import read_index, read_rows
from focus_ray.errors import DataError
from focus_ray.evaluation.batch_inspection import (
    UNFINISHED,
    BatchInspection,
    inspect_dataset,
    inspect_records,
    inspect_work_item,
)
from focus_ray.ingestion.ingest import ingest
from focus_ray.storage.files import list_folder_entries, open_filesystem

DAMAGED = 5  # a row


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ingests a data set with one image that cannot be decoded."""
    uri = ingest_parts(tmp_path_factory.mktemp("damaged_parts"))
    corrupt_image(uri, "gear", DAMAGED)
    return uri


@pytest.fixture(scope="module")
def bundles(part_bundles: dict[str, str]) -> dict[str, str]:
    return {"gear": part_bundles["gear"]}


@pytest.fixture(scope="module")
def results(
    ray_cluster: None, data: str, bundles: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, int]]:
    """Returns the folder of the results, and their counts."""
    output = str(tmp_path_factory.mktemp("results"))
    return output, inspect_dataset(bundles, data, output, batch_size=5)["gear"]


def rows_of(folder: str | Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(f"{folder}/category=gear", partitioning=None).to_pylist()
    return rows


@pytest.mark.ray
def test_every_image_of_both_splits_is_scored_as_the_inspector_scores_it(
    results: tuple[str, dict[str, int]], data: str, bundles: dict[str, str]
) -> None:
    rows = rows_of(results[0])
    records = {r["id"]: r for r in read_rows(data, "gear", range(NUM_TRAIN + NUM_TEST), ("id", "image", "label"))}
    assert sorted(row["id"] for row in rows) == sorted(records)
    inspector = Inspector.load(bundles["gear"], "cpu")
    for row in rows:
        assert (row["label"], row["bundle"]) == (records[row["id"]]["label"], inspector.bundle.version)
        if row["error"]:
            continue
        (alone,) = inspector.inspect([records[row["id"]]["image"]])
        # compares squares, because the squared distance of a training image is only rounding error
        assert row["score"] ** 2 == pytest.approx(alone.score**2, rel=2e-4, abs=1e-3 * row["threshold"] ** 2)
        assert row["p_value"] == pytest.approx(alone.p_value, rel=1e-2)  # depends on the last digits of the score
        assert (row["anomalous"], len(json.loads(row["regions"]))) == (alone.anomalous, len(alone.regions))
    num_anomalous = sum(row["anomalous"] for row in rows)
    assert results[1] == {"num_images": NUM_TRAIN + NUM_TEST, "num_anomalous": num_anomalous, "num_errors": 1}


@pytest.mark.ray
def test_a_damaged_image_has_its_reason_and_no_score_and_does_not_stop_the_run(
    results: tuple[str, dict[str, int]], data: str
) -> None:
    (row,) = (row for row in rows_of(results[0]) if row["error"])
    assert row["id"] == read_index(data, "gear")["id"][DAMAGED].as_py()
    assert "image" in row["error"]
    assert np.isnan([row["score"], row["p_value"]]).all()
    assert (row["anomalous"], row["regions"]) == (False, "[]")


@pytest.mark.ray
def test_complete_results_of_another_job_are_refused(
    results: tuple[str, dict[str, int]], data: str, bundles: dict[str, str], part_bundles: dict[str, str]
) -> None:
    for changed_bundles, options in (
        (bundles, {"split": "test"}),
        (bundles, {"part_images": 8}),
        ({"gear": part_bundles["board"]}, {}),
    ):
        with pytest.raises(DataError, match=r"/category=gear holds complete results of another"):
            inspect_dataset(changed_bundles, data, results[0], **options)


def test_a_repeated_run_keeps_complete_categories_and_inspects_the_others(
    data: str, part_bundles: dict[str, str], tmp_path: Path
) -> None:
    """A job that is preempted after its first category runs again with all its categories."""
    in_this_process = ClusterConfig(local=True)
    first = inspect_dataset({"gear": part_bundles["gear"]}, data, str(tmp_path), cluster=in_this_process)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "category=gear").iterdir()}
    messages: list[str] = []
    counts = inspect_dataset(part_bundles, data, str(tmp_path), log=messages.append, cluster=in_this_process)
    assert counts["gear"] == first["gear"]
    assert counts["board"]["num_images"] == NUM_TRAIN + NUM_TEST
    assert [line for line in messages if line.startswith("gear: complete from an earlier run, num_images 32, ")]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "category=gear").iterdir()} == times
    assert inspect_dataset(part_bundles, data, str(tmp_path), cluster=in_this_process) == counts


def test_incomplete_results_of_another_run_are_removed(data: str, bundles: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "category=gear"
    place.mkdir()
    (place / UNFINISHED).touch()
    (place / "half.parquet").write_bytes(b"PAR1")
    items = BatchInspection(bundles, data, str(tmp_path), None, 32, 8, print).plan_work_items("gear")
    assert sum(item.num_images for item in items) == NUM_TRAIN + NUM_TEST
    assert [path.name for path in place.iterdir()] == [UNFINISHED]


@pytest.mark.ray
def test_an_interrupted_run_continues_and_a_failed_category_stops_no_other(
    results: tuple[str, dict[str, int]], data: str, bundles: dict[str, str], tmp_path: Path
) -> None:
    items = BatchInspection(bundles, data, str(tmp_path), None, 32, 8, print).plan_work_items("gear")
    assert [item.num_images for item in items] == [8] * 4
    assert sum(inspect_work_item(item)["num_images"] for item in items[1:3]) == 16  # then the run is interrupted
    place = tmp_path / "category=gear"
    before = {path.name: path.stat().st_mtime_ns for path in place.glob("*.parquet")}
    messages: list[str] = []
    with pytest.raises(DataError, match=r"^1 of 2 categories failed; board: .*gone"):
        inspect_dataset(
            {"board": str(tmp_path / "gone"), **bundles}, data, str(tmp_path), log=messages.append, part_images=8
        )
    assert any("2 of 4 parts are complete" in line for line in messages)
    assert not (place / UNFINISHED).exists()
    assert {name: (place / name).stat().st_mtime_ns for name in before} == before
    assert sorted(row["id"] for row in rows_of(tmp_path)) == sorted(row["id"] for row in rows_of(results[0]))


def test_a_category_that_the_set_lacks_is_named_before_anything_starts(
    data: str, bundles: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no category nut; it has board, gear"):
        inspect_dataset({"nut": bundles["gear"]}, data, str(tmp_path))


def test_each_row_of_a_batch_of_damaged_images_has_an_error(bundles: dict[str, str]) -> None:
    records = [{"id": "x", "label": 0, "defect_type": "good", "site": "a", "image": image} for image in (b"", b"no")]
    errors = inspect_records(Inspector.load(bundles["gear"], "cpu"), records)["error"].to_pylist()
    assert len(errors) == 2
    assert all(errors)


ON_S3 = """
import json, sys
import ray
from focus_ray.evaluation.batch_inspection import inspect_dataset
from focus_ray.evaluation.run import evaluate_bundles
from focus_ray.fitting.settings import parse_config
from focus_ray.training.training import train
if __name__ == "__main__":
    config, output = parse_config(json.loads(sys.argv[1]), is_fitted=True), sys.argv[2]
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="error")
    bundles = train(config)
    counts = inspect_dataset(bundles, config.data.uri, output, split="test")
    report = evaluate_bundles(bundles, f"{output}-report", max_side_px=64, exact_pixels=0, part_images=3)
    print(json.dumps([counts, report.results]))
"""


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.s3
def test_data_checkpoints_bundle_and_results_can_all_lie_on_s3(s3: S3Server, tmp_path: Path) -> None:
    root = s3.new_uri()
    ingest(draw_parts(tmp_path / "images"), f"{root}/data", categories=["gear"], progress=False)
    sections: dict[str, Any] = {"train": {"steps": 1}, "cluster": {"num_workers": 2}}
    config = small_config(f"{root}/data", f"{root}/runs", **sections)
    # a process of its own: what runs in the cluster takes the server's address from the environment it was started in
    arguments = [sys.executable, "-c", ON_S3, json.dumps(config.model_dump(mode="json")), f"{root}/results"]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=250)
    assert ended.returncode == 0, ended.stderr[-3000:]
    counts, measured = json.loads(ended.stdout.strip().splitlines()[-1])
    assert (counts["gear"]["num_images"], counts["gear"]["num_errors"]) == (NUM_TEST, 0)
    bundle = read_bundle(f"{root}/runs/small/bundles/gear")
    assert len(bundle.manifest["metrics"]["history"]) == 1
    assert any(name.startswith("checkpoint_") for name in list_folder_entries(f"{root}/runs/small/train/gear"))
    filesystem, path = open_filesystem(f"{root}/results/category=gear")
    rows = pq.read_table(path, filesystem=filesystem, partitioning=None).to_pylist()
    assert {row["bundle"] for row in rows} == {bundle.version}
    assert measured["gear"]["pixel_auroc"] is not None
    assert len(list_folder_entries(f"{root}/results-report/images/category=gear")) == 3
    assert {"images", "categories", "report.html"} <= set(list_folder_entries(f"{root}/results-report"))
