"""Evaluation in parts agrees with the inspector, in this process and on workers, and continues after an interruption."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_set import NUM_TEST, NUM_TRAIN, make_bundle, small_config

from focus_ray.bundle.inspector import Inspector
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.data.read import read_index, read_test_rows
from focus_ray.evaluation import run as module
from focus_ray.evaluation.measuring import (
    EvaluationProgress,
    EvaluationSettings,
    WorkerScores,
    plan_evaluation,
    process_work_item,
)
from focus_ray.evaluation.run import EvaluationReport, EvaluationRun, evaluate_bundles
from focus_ray.evaluation.work_items import open_worker_pool
from focus_ray.fitting.split import shorten_hash
from focus_ray.ingestion.ingest import ingest
from focus_ray.metrics.pixels import PixelBins
from focus_ray.samples.write import write_samples

SIDE = 64
ALL = 10**9
both_ways = pytest.mark.parametrize("exact_pixels", [0, ALL])


def evaluate(bundles: dict[str, str], output: Path, exact_pixels: int = 0, **options: Any) -> EvaluationReport:
    return evaluate_bundles(bundles, str(output), max_side_px=SIDE, exact_pixels=exact_pixels, part_images=3, **options)


def start(bundles: dict[str, str], output: Path) -> EvaluationRun:
    return EvaluationRun(bundles, EvaluationSettings(str(output), None, SIDE, 0, 3, False), print)


def assert_same(metrics: dict[str, Any], expected: dict[str, Any]) -> None:
    """Asserts equal metrics up to rounding, because the order of sums and the batches may differ."""
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(metrics[key], value)
        else:
            assert metrics[key] == (pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value), (
                key
            )


@both_ways
def test_parts_give_the_metrics_of_the_whole(
    part_bundles: dict[str, str], parts: str, tmp_path: Path, exact_pixels: int
) -> None:
    report = evaluate(part_bundles, tmp_path, exact_pixels)
    for category, bundle in part_bundles.items():
        records = read_test_rows(parts, category)
        expected = Inspector.load(bundle, "cpu").evaluate(records, SIDE, exact_pixels=exact_pixels)
        assert_same(report.results[category], expected)
        assert bool(report.results[category]["bounds"]) is report.results[category]["binned"] is (exact_pixels == 0)
    text, page = ((tmp_path / name).read_text() for name in ("report.md", "report.html"))
    assert ("Pixels counted in bins (board, gear)" in text) is ("counted in bins" in page) is (exact_pixels == 0)
    assert json.loads((tmp_path / "report.json").read_text())["categories"] == report.results
    assert page.count("data:image/svg+xml") == 8


def test_every_image_has_its_row(part_bundles: dict[str, str], parts: str, tmp_path: Path) -> None:
    evaluate({"gear": part_bundles["gear"]}, tmp_path)
    rows = pq.read_table(tmp_path / "images/category=gear", partitioning=None).to_pylist()
    inspector = Inspector.load(part_bundles["gear"], "cpu")
    for row, record in zip(rows, read_test_rows(parts, "gear"), strict=True):
        (alone,) = inspector.inspect([record["image"]])
        assert row["score"] == pytest.approx(alone.score, rel=1e-4)
        assert row["p_value"] == pytest.approx(alone.p_value, rel=1e-2)
        expected = (record["id"], record["label"], alone.anomalous, inspector.bundle.version)
        assert (row["id"], row["label"], row["anomalous"], row["bundle"]) == expected


def process_first_items(bundles: dict[str, str], output: Path, num_items: int) -> None:
    """Runs and saves the first items of an evaluation, as if it was interrupted."""
    evaluation = start(bundles, output)
    for _ in range(num_items):
        item = evaluation.take_next_item()
        assert item is not None
        evaluation.store_outcome(item, process_work_item(item))
    evaluation.save_progress()


def test_an_interrupted_evaluation_continues(part_bundles: dict[str, str], tmp_path: Path) -> None:
    process_first_items(part_bundles, tmp_path / "died", 6)  # board with its metrics, two of three parts of gear
    files = sorted((tmp_path / "died/images").glob("*/*.parquet"))
    before = [path.stat().st_mtime_ns for path in files]
    messages: list[str] = []
    report = evaluate(part_bundles, tmp_path / "died", resume=True, log=messages.append)
    assert {"board: measured already", "gear: continuing after 6 images"} <= set(messages)
    assert [path.stat().st_mtime_ns for path in files] == before
    assert len(files) == 5
    assert_same(report.results, evaluate(part_bundles, tmp_path / "whole").results)
    assert (tmp_path / "died/report.html").read_bytes().count(b"data:image/svg+xml") == 8


@pytest.mark.parametrize("options", [{"resume": True, "exact_pixels": ALL}, {}])
def test_other_settings_or_no_resume_start_a_new_evaluation(
    part_bundles: dict[str, str], tmp_path: Path, options: dict[str, Any]
) -> None:
    process_first_items(part_bundles, tmp_path, 6)
    messages: list[str] = []
    evaluate(part_bundles, tmp_path, log=messages.append, **options)
    assert not [line for line in messages if "already" in line or "continuing" in line]


def test_a_damaged_record_is_measured_again(part_bundles: dict[str, str], tmp_path: Path) -> None:
    process_first_items(part_bundles, tmp_path, 4)
    path = tmp_path / "categories/board.json"
    path.write_text(path.read_text().replace('"views": {', '"views": {"x": 7, ', 1))
    messages: list[str] = []
    assert "error" not in evaluate(part_bundles, tmp_path, resume=True, log=messages.append).results["board"]
    assert "board: measured already" not in messages


def test_a_part_counts_once() -> None:
    bins = {"": PixelBins.from_image(np.eye(4, dtype=bool), np.ones((4, 4), np.float32))}
    part = WorkerScores(np.zeros(1, np.int8), np.ones(1), ("good",), bins, False, np.zeros(1, bool))
    measured = EvaluationProgress(job=None)  # type: ignore[arg-type]
    for _ in range(3):
        measured.add(0, part)
    assert measured.num_images == 1
    assert measured.merge_parts().bins[""].normal.sum() == 12


def test_parts_follow_file_borders_and_contain_every_row_once(
    part_bundles: dict[str, str], parts: str, tmp_path: Path
) -> None:
    rows = read_index(parts, "gear", split="test")["row"].to_pylist()
    for size, lengths in {1: [1] * NUM_TEST, 3: [3, 3, 2], 100: [NUM_TEST]}.items():
        _, row_parts = plan_evaluation(
            "gear", part_bundles["gear"], EvaluationSettings(str(tmp_path), part_images=size)
        )
        assert np.concatenate(list(row_parts.values())).tolist() == rows
        assert list(row_parts) == np.cumsum([0, *map(len, row_parts.values())])[:-1].tolist()
        assert [len(part) for part in row_parts.values()] == lengths


def test_maps_that_exceed_the_budget_by_a_pixel_are_binned(part_bundles: dict[str, str], tmp_path: Path) -> None:
    pixels = NUM_TEST * SIDE * SIDE
    for exact_pixels, is_exact in ((pixels, True), (pixels - 1, False)):
        settings = EvaluationSettings(str(tmp_path), exact_pixels=exact_pixels)
        job, _ = plan_evaluation("gear", part_bundles["gear"], settings)
        assert job.exact is is_exact


def test_each_of_many_categories_has_its_own_page(
    part_bundles: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CATEGORIES_ON_PAGE", 1)
    evaluate(part_bundles, tmp_path, ALL)
    page = (tmp_path / "report.html").read_text()
    assert "data:image/svg+xml" not in page
    for category in part_bundles:
        assert f'href="categories/{category}.html"' in page
        assert (tmp_path / f"categories/{category}.html").read_text().count("data:image/svg+xml") == 4


@pytest.fixture(scope="module")
def usual_and_dark(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Makes two data sets with the same training images; the good test images of `dark` have half the brightness."""
    sets = {}
    for name in ("usual", "dark"):
        folder = tmp_path_factory.mktemp(name)
        write_samples(folder / "images", size_px=64, num_train=NUM_TRAIN, num_test_good=14, num_bad_per_type=1)
        for path in (folder / "images/gear/test/good").iterdir() if name == "dark" else ():
            Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)
        ingest(folder / "images", folder / "data", categories=["gear"], progress=False)
        sets[name] = str(folder / "data")
    return sets


@pytest.mark.ray
def test_workers_give_the_metrics_of_one_process(
    ray_cluster: None, part_bundles: dict[str, str], usual_and_dark: dict[str, str], tmp_path: Path
) -> None:
    """The category board has exact metrics; gear has more images, whose pixels are counted in bins by several workers."""
    gear = make_bundle(small_config(usual_and_dark["usual"], tmp_path / "runs"))
    bundles, exact_pixels = {"board": part_bundles["board"], "gear": gear}, NUM_TEST * SIDE * SIDE
    messages: list[str] = []
    report = evaluate(bundles, tmp_path / "ray", exact_pixels, num_workers=2, log=messages.append)
    assert_same(report.results, evaluate(bundles, tmp_path / "here", exact_pixels).results)
    assert [(name, result["binned"]) for name, result in report.results.items()] == [("board", False), ("gear", True)]
    assert any("side by side: up to 2" in line for line in messages)
    for category in bundles:
        tables = [pq.read_table(tmp_path / place / f"images/category={category}") for place in ("ray", "here")]
        assert tables[0]["id"].equals(tables[1]["id"])


@pytest.mark.cluster
@pytest.mark.ray
def test_a_killed_worker_changes_no_result_and_an_item_that_always_kills_fails(
    ray_cluster: None, part_bundles: dict[str, str], parts: str, tmp_path: Path
) -> None:
    mark = tmp_path / "gear-died"

    def deadly(item: Any) -> Any:
        """Kills its worker once after a part of gear, and at every part of board."""
        result = process_work_item(item)
        is_gear = item.job.category == "gear"
        if not is_gear or (3 in item.parts and not mark.exists()):
            if is_gear:
                mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    messages: list[str] = []
    evaluation = start(part_bundles, tmp_path / "out")
    evaluation.run(deadly, open_worker_pool(ClusterConfig(), 2, [], str(tmp_path), messages.append))
    assert any(line.startswith("retry 1 of 3: ActorDiedError") for line in messages)
    assert mark.exists()
    assert re.search(r"ActorDiedError: .* \(4 attempts\)", evaluation.results["board"]["error"])
    expected = Inspector.load(part_bundles["gear"], "cpu").evaluate(read_test_rows(parts, "gear"), SIDE, 0)
    assert_same(evaluation.results["gear"], expected)


def texts_of(report: EvaluationReport, output: Path) -> list[str]:
    """Returns the texts that name findings: both reports and the caveats."""
    return [(output / "report.md").read_text(), (output / "report.html").read_text(), " ".join(report.caveats["gear"])]


@both_ways
def test_only_changed_light_is_reported_in_metrics_tables_and_page(
    usual_and_dark: dict[str, str], tmp_path: Path, exact_pixels: int
) -> None:
    config = small_config(usual_and_dark["usual"], tmp_path, calibration={"method": "leave_one_out"})
    bundle = make_bundle(config)
    for name, direction in (("usual", None), ("dark", "higher")):
        report = evaluate({"gear": bundle}, tmp_path / name, exact_pixels, data=usual_and_dark[name])
        shift = report.results["gear"]["shift"]
        assert (shift["num_new"], shift["num_calibrating"], shift["direction"]) == (14, 24, direction)
        for text in [*texts_of(report, tmp_path / name), str(shift["notice"])]:
            assert ("The 14 good test images score higher than the 24 images" in text) is (direction is not None)


@both_ways
def test_training_images_among_test_images_are_left_out_and_reported_first(
    usual_and_dark: dict[str, str], tmp_path: Path, exact_pixels: int
) -> None:
    data = usual_and_dark["usual"]
    tests = read_index(data, "gear", split="test").to_pylist()
    good, bad = ([row for row in tests if row["label"] == label] for label in (0, 1))
    trained_on = [*good[:10], bad[0]]
    hashes = [shorten_hash(row["content_hash"]) for row in trained_on]
    bundle = make_bundle(small_config(data, tmp_path / "runs"), fit_hashes=hashes)
    output = tmp_path / "report"
    report = evaluate({"gear": bundle}, output, exact_pixels)
    result = report.results["gear"]
    ids = {row["id"] for row in trained_on}
    new = [dict(record) for record in read_test_rows(data, "gear") if record["id"] not in ids]
    alone = Inspector.load(bundle, "cpu").evaluate(new, SIDE, exact_pixels=exact_pixels)
    assert_same({**result, "trained_on": None}, {**alone, "trained_on": None})
    assert (next(iter(result)), result["trained_on"]["num_images"]) == ("trained_on", 11)
    assert result["shift"] is None  # of 14 good images 4 are new
    sentence = f"The model was trained on 11 of {len(tests)} test images."
    assert all(sentence in text for text in texts_of(report, output))
    assert (output / "report.md").read_text().startswith(f"- gear: {sentence}")
    assert report.caveats["gear"][0].startswith(sentence)
    rows = pq.read_table(output / "images/category=gear", partitioning=None).to_pylist()
    assert {row["id"] for row in rows if row["trained_on"]} == ids
    assert_same(evaluate({"gear": bundle}, output, exact_pixels, resume=True).results["gear"], result)


@both_ways
def test_an_evaluation_of_only_training_images_is_an_error(parts: str, tmp_path: Path, exact_pixels: int) -> None:
    hashes = [shorten_hash(text) for text in read_index(parts, "gear", split="test")["content_hash"].to_pylist()]
    bundle = make_bundle(small_config(parts, tmp_path / "runs"), fit_hashes=hashes)
    report = evaluate({"gear": bundle}, tmp_path / "report", exact_pixels)
    assert f"all {NUM_TEST} test images" in report.results["gear"]["error"]
