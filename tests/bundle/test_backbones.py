"""Every family of backbones is fitted, written, read and inspected with; trained, shared, used with tiles, and compiled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_set import fit_alone, make_bundle, small_config

from focus_ray.bundle.bundle import compute_manifest_hash
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.images import decode_batch
from focus_ray.data.read import read_test_rows
from focus_ray.detect.detector import score_with_shared_backbone
from focus_ray.features.batch_norm import prepare_backbone_for_inference
from focus_ray.fitting.settings import Config
from focus_ray.serving.models import SharedBackbones

SIZES = {
    "convnext_tiny": 64,
    "efficientnet_lite1": 64,
    "dinov2_vits14": 70,
    "dinov2_vits14_reg": 70,
    "dinov2_vits14_raw": 70,
    "dinov3_vits16": 64,
}


def config_of(name: str, uri: str, folder: Path, **sections: dict[str, Any]) -> Config:
    model = {"backbone": name, "image_size_px": SIZES[name]}
    return small_config(uri, folder, **{**sections, "model": {**model, **sections.get("model", {})}})


def photographs(data: str, name: str, category: str = "gear") -> NDArray[np.uint8]:
    return decode_batch([record["image"] for record in read_test_rows(data, category)], SIZES[name])


def check_the_whole_way(config: Config, images: NDArray[np.uint8]) -> None:
    result = fit_alone(config)
    expected = result.detector(torch.from_numpy(images))
    inspector = Inspector.load(make_bundle(config, result=result), "cpu")
    scores, maps = inspector.score(images)
    np.testing.assert_allclose(scores, expected.score.numpy(), rtol=1e-3)
    np.testing.assert_allclose(maps, expected.anomaly_map.numpy(), atol=1e-3 * float(maps.max()))
    assert maps.shape == images.shape[:3]
    prepare_backbone_for_inference(inspector.bundle.detector.net.backbone, torch.bfloat16)
    np.testing.assert_allclose(inspector.score(images)[0], scores, rtol=0.1)


@pytest.mark.parametrize("name", ["convnext_tiny", "dinov3_vits16"])
def test_a_bundle_scores_as_the_fitted_model_and_nearly_so_in_bfloat16(name: str, parts: str, tmp_path: Path) -> None:
    check_the_whole_way(config_of(name, parts, tmp_path), photographs(parts, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_a_bundle_with_a_metric_and_a_profile_scores_as_the_fitted_model(name: str, parts: str, tmp_path: Path) -> None:
    sections = {
        "model": {"image_alignment": {"min_drop": 0.0}},
        "density": {"reduction": "discriminant"},
        "scoring": {"image_score": "profile"},
    }
    check_the_whole_way(config_of(name, parts, tmp_path, **sections), photographs(parts, name))


def test_a_dinov2_bundle_of_an_earlier_format_keeps_its_features(parts: str, tmp_path: Path) -> None:
    place = make_bundle(config_of("dinov2_vits14_raw", parts, tmp_path))
    images = photographs(parts, "dinov2_vits14")
    expected, _ = Inspector.load(place, "cpu").score(images)
    path = Path(place, "manifest.json")
    manifest = json.loads(path.read_text())
    manifest["format_version"] = 6
    manifest["config"]["model"]["backbone"] = "dinov2_vits14"
    path.write_text(json.dumps({**manifest, "sha256": compute_manifest_hash(manifest)}))
    np.testing.assert_array_equal(Inspector.load(place, "cpu").score(images)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_tiny", "dinov2_vits14"])
def test_a_backbone_without_batch_norms_is_trained_by_both_losses(name: str, parts: str, tmp_path: Path) -> None:
    result = fit_alone(config_of(name, parts, tmp_path, train={"steps": 2, "batch_size": 12}))
    assert len(result.notes.history) == 2
    assert all(np.isfinite(step["loss"]) for step in result.notes.history)
    torch.manual_seed(0)
    untrained = fit_alone(config_of(name, parts, tmp_path)).detector.net.backbone.state_dict()
    trained = result.detector.net.backbone.state_dict()
    changed = {key.partition(".")[0] for key, value in trained.items() if not torch.equal(value, untrained[key])}
    assert changed == {"layer1", "layer2", "layer3"}


@pytest.mark.slow
def test_models_with_the_same_transformer_share_its_forward_pass(parts: str, tmp_path: Path) -> None:
    name = "dinov2_vits14"
    shared, detectors = SharedBackbones(), []
    for category in ("gear", "board"):
        config = config_of(name, parts, tmp_path, data={"categories": [category]}, density={"map_stride_px": 4})
        detectors.append(fit_alone(config, category).detector)
        shared.share_backbone(detectors[-1], torch.float32)
    assert detectors[0].net.backbone is detectors[1].net.backbone
    parts = [torch.from_numpy(photographs(parts, name, category)) for category in ("gear", "board")]
    together = score_with_shared_backbone(list(zip(detectors, parts, strict=True)))
    for detector, images, scored in zip(detectors, parts, together, strict=True):
        torch.testing.assert_close(scored.score, detector(images).score, rtol=1e-4, atol=1e-4)


def test_tiles_and_regions_work_with_patches_of_14_pixels(parts: str, tmp_path: Path) -> None:
    tiling = {"grid": [2, 2], "overlap": 0.125, "density": "shared"}
    config = config_of(
        "dinov2_vits14", parts, tmp_path,
        model={"image_size_px": 42, "tiling": tiling},
        data={"regions": {"gear": [[[0.0, 0.0], [0.5, 0.0], [0.5, 1.0], [0.0, 1.0]]]}},
    )  # fmt: skip
    inspector = Inspector.load(make_bundle(config), "cpu")
    assert (inspector.bundle.detector.density.height, inspector.bundle.detector.density.width) == (6, 6)
    height, width = config.model.resized_image_px
    images = [record["image"] for record in read_test_rows(parts, "gear")]
    _, maps = inspector.score(decode_batch(images, inspector.frame))
    assert maps.shape == (len(images), height, width)
    assert maps[:, :, : width // 4].max() > 0
    assert maps[:, :, width // 2 + 1 :].max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-int8"])
@pytest.mark.parametrize("name", ["convnext_tiny", "dinov2_vits14", "dinov2_vits14_reg", "dinov3_vits16"])
def test_an_engine_computes_the_backbone(name: str, engine: str, parts: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    place = make_bundle(config_of(name, parts, tmp_path))
    examples = [record["image"] for record in read_test_rows(parts, "gear") if record["label"] == 0]
    compiled = Inspector.load(place, "cpu", engine=engine, examples=examples)
    assert compiled.bundle.detector.net.compiled is not None
    expected, _ = Inspector.load(place, "cpu").score(photographs(parts, name))
    np.testing.assert_allclose(compiled.score(photographs(parts, name))[0], expected, rtol=0.1)
