"""bfloat16 on devices that support it natively: it halves memory and changes scores by less than thresholds allow for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_set import fit_alone, ingest_parts, make_bundle, small_config

from focus_ray.bundle.bundle import read_bundle, read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.read import read_test_rows
from focus_ray.density.bank import convert_to_bank_rows
from focus_ray.density.base import NormalStatistics, build_density
from focus_ray.density.coreset import Coreset
from focus_ray.density.moments import Moments
from focus_ray.density.settings import DensityConfig
from focus_ray.detect.calibration import PRECISION_SHIFT, Calibration
from focus_ray.ingestion.ingest import ingest
from focus_ray.precision import choose_compute_dtype

CPU = torch.device("cpu")


def test_auto_is_bfloat16_only_on_devices_with_native_support(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("focus_ray.precision.has_native_bfloat16", lambda device, is_native=is_native: is_native)
        assert choose_compute_dtype("auto", CPU) == dtype
        assert choose_compute_dtype("fp32", "cpu") == torch.float32
        assert choose_compute_dtype("bf16", "cpu") == torch.bfloat16


@pytest.mark.parametrize("window", [1, 3])
def test_a_bank_in_bfloat16_takes_half_the_memory_and_gives_nearly_the_same_distances(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    # as large as the means of real features: they must not make rounding errors larger
    means = 30 * torch.randn(16, 6, 5, generator=generator)
    images, queries = (means + torch.randn(count, 16, 6, 5, generator=generator) for count in (12, 4))
    moments = Moments(6, 5, 16)
    moments.add_embeddings(images)
    statistics = NormalStatistics(moments, convert_to_bank_rows(images))
    exact, rounded = (
        build_density(DensityConfig(coreset=0, window=window, precision=precision), statistics)
        for precision in ("fp32", "bf16")
    )
    assert rounded.bank.nbytes * 2 == exact.bank.nbytes
    excluded = torch.tensor([2, 7])
    for arguments in ((queries,), (images[excluded], excluded)):
        torch.testing.assert_close(rounded.score(*arguments), exact.score(*arguments), rtol=0.02, atol=0)


def test_a_coreset_in_bfloat16_gives_nearly_the_same_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = (5 + torch.randn(200, 24, generator=generator)).half().float()
    images, queries = torch.arange(200) % 10, 5 + torch.randn(3, 24, 4, 4, generator=generator)
    exact, rounded = Coreset(patches, images), Coreset(patches, images, torch.bfloat16)
    for excluded in (None, torch.tensor([1, 4, 9])):
        torch.testing.assert_close(rounded.score(queries, excluded), exact.score(queries, excluded), rtol=0.02, atol=0)


def test_a_bundle_in_bfloat16_scores_as_its_fit_and_nearly_as_in_float32(tmp_path: Path) -> None:
    uri, scores = ingest_parts(tmp_path), {}
    for precision in ("fp32", "bf16"):
        settings = {"precision": precision}
        config = small_config(
            uri,
            tmp_path / precision,
            model={**settings, "image_alignment": {}},
            density={**settings, "reduction": "discriminant"},
            scoring={"image_score": "profile"},
        )
        result = fit_alone(config)
        inspector = Inspector.load(make_bundle(config, result=result), "cpu")
        assert next(inspector.bundle.detector.net.backbone.parameters()).dtype == choose_compute_dtype(precision, CPU)
        embedding = torch.randn(2, 32 + config.density.coreset_channels, 8, 8)
        read, fitted = inspector.bundle.detector.density, result.detector.density
        torch.testing.assert_close(read.score(embedding), fitted.score(embedding), rtol=0, atol=0)
        scores[precision] = inspector.score_labelled_images(read_test_rows(uri, "gear")).measured.scores
    np.testing.assert_allclose(scores["bf16"], scores["fp32"], rtol=0.05)
    assert np.corrcoef(scores["bf16"], scores["fp32"])[0, 1] > 0.99


@pytest.mark.parametrize(("category", "precision"), [("real/circuit_board", "fp32"), ("mvtec/bottle", "bf16")])
def test_another_precision_changes_scores_of_real_images_by_less_than_thresholds_allow_for(
    category: str, precision: str, shared: Path, resnet18_weights: Path, tmp_path: Path
) -> None:
    """With another precision than in its calibration, a bundle calls no further good image bad."""
    if not (shared / "data" / category).is_dir():
        pytest.skip(f"there are no images at {shared / 'data' / category}")
    uri, name = str(tmp_path / "data"), category.rpartition("/")[2]
    for part, count in (("train", 10), ("test", 12)):
        target = tmp_path / name / part / "good"
        target.mkdir(parents=True)
        for path in sorted((shared / "data" / category / part / "good").iterdir())[:count]:
            (target / path.name).symlink_to(path)
    ingest(tmp_path / name, uri, progress=False)
    config = small_config(
        uri,
        tmp_path,
        data={"categories": [name]},
        model={"weights": str(resnet18_weights), "image_size_px": 128, "precision": precision},
        density={"precision": precision, "reduction": "discriminant"},
        scoring={"image_score": "profile"},
        calibration={"method": "leave_one_out"},
    )
    place = make_bundle(config, name)
    native, other = (
        read_bundle(place, precision=name) for name in (precision, {"fp32": "bf16", "bf16": "fp32"}[precision])
    )
    assert native.calibration == Calibration.from_dict(read_manifest(place)["calibration"])
    assert native.calibration.precision == {"fp32": "float32", "bf16": "bfloat16"}[precision]
    assert other.calibration.converted_from == native.calibration.precision
    assert other.calibration.image_threshold == native.calibration.image_threshold * (1 + PRECISION_SHIFT)
    scores = [
        Inspector(bundle).score_labelled_images(read_test_rows(uri, name)).measured.scores for bundle in (native, other)
    ]
    assert 1e-5 < np.abs(scores[1] / scores[0] - 1).max() < PRECISION_SHIFT
    verdicts = [bundle.calibration.is_anomalous(each) for bundle, each in zip((native, other), scores, strict=True)]
    assert not (verdicts[1] & ~verdicts[0]).any()
