"""The page of a training needs only the manifests of the bundles."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from small_set import make_bundle, small_config

from focus_ray.bundle.bundle import read_manifest
from focus_ray.errors import BundleError
from focus_ray.fitting.settings import parse_config
from focus_ray.training.report import build_report_section, render_training_report, write_training_report
from focus_ray.training.training import train


@pytest.fixture(scope="module")
def bundle(parts: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(small_config(parts, tmp_path_factory.mktemp("runs"), train={"steps": 2}), fingerprint="f1" * 32)


@pytest.fixture
def manifest(bundle: str) -> dict[str, Any]:
    return copy.deepcopy(read_manifest(bundle))


def test_a_training_writes_its_page_beside_the_bundles(bundle: str) -> None:
    """All categories of this run are finished, so that it needs no Ray."""
    config = parse_config(read_manifest(bundle)["config"], is_fitted=True)
    messages: list[str] = []
    assert train(config, resume=True, log=messages.append) == {"gear": bundle}
    place = f"{config.storage}/{config.name}/report.html"
    assert messages[-1] == f"report: {place}"
    page = Path(place).read_text()
    assert "Training: small" in page
    assert "Trained 1 category" in page
    assert page.index("What to know before relying on this") < page.index("<img")
    assert not re.search(r'(src|href)="(?!#|data:)|https?:', page)


def test_the_report_needs_no_tensors(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/manifest.json").write_bytes(Path(bundle, "manifest.json").read_bytes())
    assert write_training_report({"gear": str(tmp_path / "alone")}, str(tmp_path)) == f"{tmp_path}/report.html"
    with pytest.raises(BundleError, match="absent"):
        write_training_report({"gear": str(tmp_path / "absent")}, str(tmp_path))


def test_learning_curves_are_drawn_if_there_were_steps(manifest: dict[str, Any]) -> None:
    titles = [plot.title for plot in build_report_section("somewhere", manifest).plots]
    assert (titles[0], "loss" in titles) == ("Calibration scores", True)
    manifest["metrics"]["history"] = []
    assert [plot.title for plot in build_report_section("somewhere", manifest).plots] == ["Calibration scores"]


def test_the_page_shows_provenance_calibration_and_configuration(bundle: str, manifest: dict[str, Any]) -> None:
    page = render_training_report({"gear": build_report_section(bundle, manifest)}, "runs/small").decode()
    threshold = f"{manifest['calibration']['image_threshold']:.6g}"
    provenance = (manifest["sha256"], "f1" * 32, manifest["created_at"], manifest["versions"]["torch"])
    assert [text for text in (*provenance, threshold, "image_size_px: 64") if text not in page] == []


def test_the_page_shows_alignment_selection_seconds_and_warnings(manifest: dict[str, Any]) -> None:
    manifest["metrics"].update(
        alignment={
            "enabled": True, "drop": 0.5, "l2_identity": 0.8, "l2_aligned": 0.4, "restart_costs": [], "round_costs": [],
            "angle_bound_deg": 12.0, "shift_bound": [0.1, 0.2],
        },
        selection=[
            {"image_alignment": "rotation", "score": 0.9, "image_auroc": 0.8, "aupro": 1.0},
            {"step": 0.0, "score": 0.91, "image_auroc": 0.8, "aupro": 1.0},
            {"step": 1.0, "score": 0.92, "image_auroc": 0.8, "aupro": 1.0},
        ],
        seconds={"load": 1.0, "train": 2.5},
        warnings=["step 1: the features have collapsed"],
    )  # fmt: skip
    trained = build_report_section("somewhere", manifest)
    assert (trained.seconds, trained.plots[-1].title) == (3.5, "validation score")
    page = render_training_report({"gear": trained}, "run").decode()
    texts = ("50 % (pairwise L2 0.8, aligned 0.4", "image alignment rotation", "the features have collapsed")
    assert [text for text in texts if text not in page] == []


def test_a_bundle_without_training_figures_has_a_page(manifest: dict[str, Any]) -> None:
    manifest.update(metrics={}, git_commit=None)
    assert b"unknown" in render_training_report({"gear": build_report_section("somewhere", manifest)}, "run")
