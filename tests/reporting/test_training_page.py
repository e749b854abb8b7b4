"""The page of a training needs only the manifests of the bundles."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from small_set import ingest_parts, make_bundle, small_config

from focus_ray.bundle.bundle import read_manifest
from focus_ray.errors import BundleError
from focus_ray.training.report import build_training_section, training_page, write_training_report


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("parts")
    return make_bundle(small_config(ingest_parts(folder), folder, train={"epochs": 2}), fingerprint="f1" * 32)


@pytest.fixture
def manifest(bundle: str) -> dict[str, Any]:
    return copy.deepcopy(read_manifest(bundle))


def test_the_report_is_written_to_the_returned_address(bundle: str, tmp_path: Path) -> None:
    place = write_training_report({"gear": bundle}, str(tmp_path / "run"))
    assert place == f"{tmp_path}/run/report.html"
    page = Path(place).read_text()
    assert "Trained 1 category" in page
    assert page.index("What to know before relying on this") < page.index("<img")
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert not re.search("https?:", page)


def test_training_writes_the_report_to_the_folder_of_the_run(bundle: str) -> None:
    """All categories of this run are finished, so that it needs no Ray."""
    from focus_ray.fitting.settings import parse_config
    from focus_ray.training.training import train

    config = parse_config(read_manifest(bundle)["config"])
    messages: list[str] = []
    assert train(config, resume=True, log=messages.append) == {"gear": bundle}
    place = f"{config.storage}/{config.name}/report.html"
    assert messages[-1] == f"report: {place}"
    assert "Training: small" in Path(place).read_text()


def test_the_report_needs_no_tensors(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/manifest.json").write_bytes(Path(bundle, "manifest.json").read_bytes())
    write_training_report({"gear": str(tmp_path / "alone")}, str(tmp_path))


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"absent: .*no manifest\.json"):
        write_training_report({"gear": str(tmp_path / "absent")}, str(tmp_path))


def test_learning_curves_are_drawn_if_there_were_epochs(manifest: dict[str, Any]) -> None:
    trained = build_training_section("somewhere", manifest)
    titles = [plot.title for plot in trained.plots]
    assert titles[0] == "Calibration scores"
    assert "loss" in titles
    manifest["metrics"]["history"] = []
    assert [plot.title for plot in build_training_section("somewhere", manifest).plots] == ["Calibration scores"]


def test_the_page_shows_provenance_calibration_and_configuration(bundle: str, manifest: dict[str, Any]) -> None:
    page = training_page({"gear": build_training_section(bundle, manifest)}, "runs/small").decode()
    for text in (manifest["sha256"], "f1" * 32, manifest["created_at"], manifest["versions"]["torch"]):
        assert text in page
    assert f"{manifest['calibration']['image_threshold']:.6g}" in page
    assert "<details><summary>Configuration</summary>" in page
    assert "image_size_px: 64" in page
    assert "Training: small" in page


def test_the_page_shows_alignment_selection_seconds_and_warnings(manifest: dict[str, Any]) -> None:
    manifest["metrics"].update(
        alignment={
            "enabled": True, "drop": 0.5, "l2_identity": 0.8, "l2_aligned": 0.4, "restart_costs": [], "round_costs": [],
            "angle_bound_deg": 12.0, "shift_bound": [0.1, 0.2],
        },
        selection=[
            {"image_alignment": "rotation", "score": 0.9, "image_auroc": 0.8, "aupro": 1.0},
            {"epoch": 0.0, "score": 0.91, "image_auroc": 0.8, "aupro": 1.0},
            {"epoch": 1.0, "score": 0.92, "image_auroc": 0.8, "aupro": 1.0},
        ],
        seconds={"load": 1.0, "train": 2.5},
        warnings=["epoch 1: the features have collapsed <soon>"],
    )  # fmt: skip
    trained = build_training_section("somewhere", manifest)
    assert trained.seconds == 3.5
    assert trained.plots[-1].title == "validation score"
    page = training_page({"gear": trained}, "run").decode()
    assert "50 % (pairwise L2 0.8, aligned 0.4" in page
    assert "image alignment rotation" in page
    assert "collapsed &lt;soon&gt;" in page


def test_a_bundle_without_training_figures_has_a_page(manifest: dict[str, Any]) -> None:
    manifest["metrics"] = {}
    manifest["git_commit"] = None
    assert b"unknown" in training_page({"gear": build_training_section("somewhere", manifest)}, "run")
