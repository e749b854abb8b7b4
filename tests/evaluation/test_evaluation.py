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
from small_set import CATEGORIES, NUM_TEST, NUM_TRAIN, ingest_parts, make_bundle, small_config

from focus_ray.bundle.inspector import Inspector
from focus_ray.data.read import iter_test_records, read_index
from focus_ray.evaluation import run as module
from focus_ray.evaluation.measuring import EvaluationPart, EvaluationProgress, plan_evaluation, split_rows
from focus_ray.evaluation.run import Evaluation, EvaluationReport, EvaluationSettings, evaluate_bundles, run_piece
from focus_ray.evaluation.scoring_pool import scoring_pool
from focus_ray.fitting.split import short_hash
from focus_ray.ingestion.ingest import ingest
from focus_ray.metrics.pixels import PixelBins
from focus_ray.samples.write import write_samples

PLAIN = {"image_alignment": {"group": "none"}}
SIDE = 64
ALL = 10**9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def bundles(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    config = small_config(data, tmp_path_factory.mktemp("runs"), model=PLAIN)
    return {category: make_bundle(config, category) for category in CATEGORIES}


def evaluate(bundles: dict[str, str], output: Path, exact_pixels: int = 0, **options: Any) -> EvaluationReport:
    return evaluate_bundles(bundles, str(output), max_side_px=SIDE, exact_pixels=exact_pixels, part_images=3, **options)


def assert_same(metrics: dict[str, Any], expected: dict[str, Any]) -> None:
    """Asserts equal metrics up to rounding, because the order of sums and the batches may differ."""
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(metrics[key], value)
        elif isinstance(value, float):
            assert metrics[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
        else:
            assert metrics[key] == value, key


@pytest.mark.parametrize("exact_pixels", [0, ALL])
def test_parts_give_the_metrics_of_the_whole(
    bundles: dict[str, str], data: str, tmp_path: Path, exact_pixels: int
) -> None:
    report = evaluate(bundles, tmp_path, exact_pixels)
    for category, bundle in bundles.items():
        records = iter_test_records(data, category)
        expected = Inspector.load(bundle, "cpu").evaluate(records, SIDE, exact_pixels=exact_pixels)
        assert report.results[category]["binned"] is (exact_pixels == 0)
        assert bool(report.results[category]["bounds"]) is (exact_pixels == 0)
        assert_same(report.results[category], expected)
    text = (tmp_path / "report.md").read_text()
    assert ("Pixels counted in bins (board, gear)" in text) is (exact_pixels == 0)
    assert json.loads((tmp_path / "report.json").read_text())["categories"] == report.results
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/svg+xml") == 8
    assert ("counted in bins, which moves no pixel metric by more than" in page) is (exact_pixels == 0)


def test_every_image_has_its_row(bundles: dict[str, str], data: str, tmp_path: Path) -> None:
    evaluate({"gear": bundles["gear"]}, tmp_path)
    table = pq.read_table(tmp_path / "images/category=gear", partitioning=None)
    assert table["id"].to_pylist() == read_index(data, "gear", split="test")["id"].to_pylist()
    inspector = Inspector.load(bundles["gear"], "cpu")
    for row, record in zip(table.to_pylist(), iter_test_records(data, "gear"), strict=True):
        (alone,) = inspector.inspect([record["image"]])
        assert row["score"] == pytest.approx(alone.score, rel=1e-4)
        assert row["p_value"] == pytest.approx(alone.p_value, rel=1e-2)
        assert (row["anomalous"], row["label"]) == (alone.anomalous, record["label"])
        assert row["bundle"] == inspector.bundle.version


def run_first_pieces(bundles: dict[str, str], output: Path, num_pieces: int) -> None:
    """Runs and saves the first pieces of an evaluation, as if it was interrupted."""
    run = Evaluation(bundles, EvaluationSettings(str(output), None, SIDE, 0, 3, False), print)
    for _ in range(num_pieces):
        piece = run.next_piece()
        assert piece is not None
        run.record_result(piece, run_piece(piece))
    run.save()


def test_an_interrupted_evaluation_continues(bundles: dict[str, str], tmp_path: Path) -> None:
    run_first_pieces(bundles, tmp_path / "died", 6)  # three parts and the figures of board, two of three parts of gear
    files = sorted((tmp_path / "died/images").glob("*/*.parquet"))
    before = [path.stat().st_mtime_ns for path in files]
    assert len(files) == 5
    said: list[str] = []
    report = evaluate(bundles, tmp_path / "died", resume=True, log=said.append)
    assert "board: measured already" in said
    assert "gear: continuing after 6 images" in said
    assert [path.stat().st_mtime_ns for path in files] == before
    assert_same(report.results, evaluate(bundles, tmp_path / "whole").results)
    assert (tmp_path / "died/report.html").read_bytes().count(b"data:image/svg+xml") == 8


def test_other_settings_or_no_resume_start_a_new_evaluation(bundles: dict[str, str], tmp_path: Path) -> None:
    run_first_pieces(bundles, tmp_path, 6)
    for options in ({"resume": True, "exact_pixels": ALL}, {}):
        said: list[str] = []
        evaluate(bundles, tmp_path, log=said.append, **options)  # type: ignore[arg-type]
        assert not [line for line in said if "already" in line or "continuing" in line]


def test_a_part_counts_once() -> None:
    mask = np.eye(4, dtype=bool)
    bins = {"": PixelBins.of_image(mask, np.ones((4, 4), np.float32))}
    part = EvaluationPart(np.zeros(1, np.int8), np.ones(1), ("good",), bins, False, np.zeros(1, bool))
    total = EvaluationProgress(job=None)  # type: ignore[arg-type]
    for _ in range(3):
        total.add(0, part)
    assert total.num_images == 1
    assert total.total().bins[""].normal.sum() == 12


def test_parts_follow_file_borders_and_contain_every_row_once(data: str) -> None:
    rows = read_index(data, "gear", split="test")["row"].to_numpy()
    for size in (1, 3, NUM_TEST, 100):
        parts = split_rows(data, "gear", rows, size)
        assert np.concatenate(list(parts.values())).tolist() == rows.tolist()
        assert list(parts) == np.cumsum([0, *map(len, parts.values())])[:-1].tolist()
    assert [len(part) for part in split_rows(data, "gear", rows, 3).values()] == [3, 3, 2]


def test_maps_that_exceed_the_budget_by_a_pixel_are_binned(bundles: dict[str, str], tmp_path: Path) -> None:
    pixels = NUM_TEST * SIDE * SIDE
    plans = [plan_evaluation("gear", bundles["gear"], str(tmp_path), exact_pixels=n) for n in (pixels, pixels - 1)]
    assert [plan.job.exact for plan in plans] == [True, False]


def test_each_of_many_categories_has_its_own_page(
    bundles: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CATEGORIES_ON_PAGE", 1)
    evaluate(bundles, tmp_path, ALL)
    page = (tmp_path / "report.html").read_text()
    assert "data:image/svg+xml" not in page
    for category in bundles:
        assert f'href="categories/{category}.html"' in page
        assert (tmp_path / f"categories/{category}.html").read_text().count("data:image/svg+xml") == 4


@pytest.mark.ray
def test_workers_give_the_metrics_of_one_process(ray_cluster: None, bundles: dict[str, str], tmp_path: Path) -> None:
    said: list[str] = []
    for exact_pixels in (0, ALL):
        report = evaluate(bundles, tmp_path / "ray", exact_pixels, num_workers=2, log=said.append)
        local = Evaluation(
            bundles, EvaluationSettings(str(tmp_path / "here"), None, SIDE, exact_pixels, 3, False), print
        )
        module._run_here(local)
        assert_same(report.results, local.ordered())
        assert list(report.results) == list(bundles)
    assert any("side by side: 2 as set" in line for line in said)
    assert sum("(2 of 2)" in line for line in said) == 2
    for category in bundles:
        tables = [pq.read_table(tmp_path / place / f"images/category={category}") for place in ("ray", "here")]
        assert tables[0]["id"].equals(tables[1]["id"])


@pytest.mark.ray
def test_a_killed_worker_changes_no_result_and_a_piece_that_always_kills_fails(
    ray_cluster: None, bundles: dict[str, str], tmp_path: Path
) -> None:
    marks, output = str(tmp_path / "marks"), str(tmp_path / "out")

    os.mkdir(marks)

    def deadly(piece: Any) -> Any:
        """Kills its worker once after a part of gear, and at every part of board."""
        result = run_piece(piece)
        mark = os.path.join(marks, "gear-died")
        if piece.job.category == "board" or (3 in piece.parts and not os.path.exists(mark)):
            if piece.job.category == "gear":
                open(mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    said: list[str] = []
    run = Evaluation(bundles, EvaluationSettings(output, None, SIDE, 0, 3, False), said.append)
    for piece, outcome in scoring_pool(2, True, said.append).run(deadly, run.next_piece):
        run.record_result(piece, outcome)
    assert any(line.startswith("retry 1 of 3: ActorDiedError") for line in said)
    assert os.listdir(marks) == ["gear-died"]
    assert re.search(r"ActorDiedError: .* \(4 attempts\)", run.results["board"]["error"])
    assert run.results["gear"]["num_normal"] + run.results["gear"]["num_anomalous"] == NUM_TEST
    records = iter_test_records(run.jobs["gear"].data, "gear")
    assert_same(run.results["gear"], Inspector.load(bundles["gear"], "cpu").evaluate(records, SIDE, exact_pixels=0))


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


@pytest.mark.parametrize("exact_pixels", [0, ALL])
def test_only_changed_light_is_reported_in_metrics_tables_and_page(
    usual_and_dark: dict[str, str], tmp_path: Path, exact_pixels: int
) -> None:
    usual, dark = usual_and_dark["usual"], usual_and_dark["dark"]
    config = small_config(usual, tmp_path, model=PLAIN, calibration={"method": "leave_one_out"})
    bundle = make_bundle(config)
    sentence = "The 14 good test images score higher than the 24 images that set the threshold"
    for data, direction in ((usual, None), (dark, "higher")):
        output = tmp_path / Path(data).parent.name
        report = evaluate({"gear": bundle}, output, exact_pixels, data=data)
        shift = report.results["gear"]["shift"]
        assert (shift["num_new"], shift["num_calibrating"], shift["direction"]) == (14, 24, direction)
        assert (shift["notice"] is None) is (direction is None)
        texts = [*(output / name for name in ("report.md", "report.html"))]
        for text in [*(path.read_text() for path in texts), " ".join(report.caveats["gear"])]:
            assert (sentence in text) is (direction is not None)
        assert json.loads((output / "report.json").read_text())["categories"]["gear"]["shift"] == shift


@pytest.mark.parametrize("exact_pixels", [0, ALL])
def test_training_images_among_test_images_are_left_out_and_reported_first(
    usual_and_dark: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], exact_pixels: int
) -> None:
    data = usual_and_dark["usual"]
    tests = read_index(data, "gear", split="test").to_pylist()
    good, bad = ([row for row in tests if row["label"] == label] for label in (0, 1))
    trained_on = [*good[:10], bad[0]]
    fit_hashes = [short_hash(row["content_hash"]) for row in trained_on]
    bundle = make_bundle(small_config(data, tmp_path / "runs", model=PLAIN), fit_hashes=fit_hashes)
    report = evaluate({"gear": bundle}, tmp_path / "report", exact_pixels)
    result = report.results["gear"]
    ids = {row["id"] for row in trained_on}
    inspector = Inspector.load(bundle, "cpu")
    new = [dict(record) for record in iter_test_records(data, "gear") if record["id"] not in ids]
    alone = inspector.evaluate(new, SIDE, exact_pixels=exact_pixels)
    assert result["trained_on"]["num_images"] == 11
    assert_same({**result, "trained_on": None}, {**alone, "trained_on": None})
    assert result["shift"] is None  # of 14 good images 4 are new
    sentence = f"The model was trained on 11 of {len(tests)} test images."
    assert report.caveats["gear"][0].startswith(sentence)
    assert (tmp_path / "report/report.md").read_text().startswith(f"- gear: {sentence}")
    assert sentence in (tmp_path / "report/report.html").read_text()
    categories = json.loads((tmp_path / "report/report.json").read_text())["categories"]
    assert next(iter(categories["gear"])) == "trained_on"
    assert categories["gear"]["trained_on"]["notice"].startswith(sentence)
    rows = pq.read_table(tmp_path / "report/images/category=gear", partitioning=None).to_pylist()
    assert {row["id"] for row in rows if row["trained_on"]} == ids
    again = evaluate({"gear": bundle}, tmp_path / "report", exact_pixels, resume=True)
    assert_same(again.results["gear"], result)


def test_an_evaluation_of_only_training_images_is_an_error(usual_and_dark: dict[str, str], tmp_path: Path) -> None:
    data = usual_and_dark["usual"]
    tests = read_index(data, "gear", split="test").to_pylist()
    fit_hashes = [short_hash(row["content_hash"]) for row in tests]
    bundle = make_bundle(small_config(data, tmp_path / "runs", model=PLAIN), fit_hashes=fit_hashes)
    for exact_pixels in (0, ALL):
        report = evaluate({"gear": bundle}, tmp_path / f"report{exact_pixels}", exact_pixels)
        assert f"the model was trained on all {len(tests)} test images" in report.results["gear"]["error"]
