"""Bundles: a bundle is read as it was written, a changed file is refused, replacing is a single step, no file is a pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from focus_ray.bundle.bundle import (
    MANIFEST,
    compute_manifest_hash,
    read_bundle,
    read_manifest,
    read_statistics,
    write_bundle,
)
from focus_ray.errors import BundleError
from focus_ray.fitting.fit import FitResult, fit
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shards import MemoryShard

CPU = torch.device("cpu")
DATA = {"uri": "images", "fingerprint": "0", "num_fit": 10, "num_holdout": 4}


def config_of(kind: str = "gaussian", **density: Any) -> Config:
    return parse_config(
        {
            "data": {"uri": "images"},
            "model": {
                "backbone": "efficientnet_lite0",
                "padding": "zeros",
                "weights": "random",
                "image_size_px": 32,
                "predictor_width": 4,
                "image_alignment": {"group": "none"},
                "feature_alignment": {"layer2": "rotation"},
            },
            "density": {"kind": kind, "num_channels": 12, "reduction": "semi_orthogonal", **density},
        },
        is_fitted=True,
    )


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)


def trained(config: Config, *seeds: int) -> FitResult:
    """Trains on 10 images of each seed."""
    fit_images = torch.cat([images(10, seed) for seed in seeds])
    return fit(config, MemoryShard(fit_images, images(4, seeds[0] + 100), batch_size=4), len(fit_images), CPU)


def write(folder: Path | str, config: Config, result: FitResult) -> dict[str, Any]:
    return write_bundle(
        folder,
        config=config,
        category="bolt",
        detector=result.detector,
        statistics=result.statistics,
        calibration=result.calibration,
        data=DATA,
        metrics={},
    )


@pytest.fixture(scope="module")
def gaussian() -> FitResult:
    return trained(config_of(), 0)


@pytest.fixture
def bundle(tmp_path: Path, gaussian: FitResult) -> Path:
    write(tmp_path / "bundle", config_of(), gaussian)
    return tmp_path / "bundle"


def rewrite_manifest(bundle: Path, format_version: int, *missing_settings: str) -> None:
    """Gives a manifest another format version without some settings, and the hash of its content."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["format_version"] = format_version
    for setting in missing_settings:
        *sections, key = setting.split(".")
        section = functools.reduce(operator.getitem, sections, manifest["config"])
        del section[key]
    (bundle / MANIFEST).write_text(json.dumps({**manifest, "sha256": compute_manifest_hash(manifest)}))


# Writing and reading


@pytest.mark.parametrize("kind", ["gaussian", "nearest"])
def test_a_bundle_scores_as_the_fitted_model(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    result = trained(config, 0)
    manifest = write(tmp_path, config, result)
    bundle = read_bundle(tmp_path)
    expected, scored = (detector(images(3, 7)) for detector in (result.detector, bundle.detector))
    torch.testing.assert_close(scored.score, expected.score, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scored.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-5)
    assert bundle.calibration.precision is not None  # `write_bundle` records it
    as_written = dataclasses.replace(result.calibration, precision=bundle.calibration.precision)
    assert (bundle.config, bundle.calibration, bundle.category) == (config, as_written, "bolt")
    assert bundle.version == manifest["sha256"]
    assert bundle.manifest == manifest == json.loads((tmp_path / MANIFEST).read_text())
    assert (manifest["data"], manifest["versions"]["torch"]) == (DATA, torch.__version__)
    assert manifest["moments"]["count"] == 10


@pytest.mark.parametrize("kind", ["gaussian", "nearest"])
def test_stored_statistics_join_to_the_statistics_of_all_images(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    for number in range(2):
        write(tmp_path / str(number), config, trained(config, number))
    joined = read_statistics(tmp_path / "0").join(read_statistics(tmp_path / "1"))
    fresh = trained(config, 0, 1).statistics
    assert joined.moments.count == 20
    scale = float(fresh.moments.scatter.abs().max())
    torch.testing.assert_close(joined.moments.mean, fresh.moments.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joined.moments.scatter, fresh.moments.scatter, rtol=0, atol=1e-5 * scale)
    assert (joined.bank is None) == (fresh.bank is None) == (kind == "gaussian")
    if joined.bank is not None:
        torch.testing.assert_close(joined.bank, fresh.bank, rtol=0, atol=2e-3)


def test_the_density_file_has_the_subsampled_bank_and_the_moments_file_the_rest(tmp_path: Path) -> None:
    config = config_of("nearest", per_place=4, reduction="discriminant", coreset_channels=16)
    result = trained(config, 0)
    files = write(tmp_path, config, result)["files"]
    assert len(load_file(tmp_path / files["density"]["name"])["bank"]) == 4
    bank = read_statistics(tmp_path).bank
    assert bank is not None
    assert torch.equal(bank, result.statistics.bank)
    (tmp_path / files["moments"]["name"]).unlink()  # scoring does not need this file
    read, queries = read_bundle(tmp_path).detector, images(3, 7)
    torch.testing.assert_close(read(queries).score, result.detector(queries).score, rtol=1e-5, atol=1e-6)


def test_a_bundle_without_moments_scores_but_cannot_be_updated(tmp_path: Path, gaussian: FitResult) -> None:
    write(tmp_path, config_of(keep_moments=False), gaussian)
    assert read_bundle(tmp_path).detector(images(1, 0)).score.shape == (1,)
    with pytest.raises(BundleError, match="stores no moments"):
        read_statistics(tmp_path)


@pytest.mark.s3
def test_a_bundle_on_s3_scores_as_one_on_disk(s3: Any, bundle: Path, gaussian: FitResult) -> None:
    uri = s3.new_uri()
    write(uri, config_of(), gaussian)
    scores = [read_bundle(place).detector(images(2, 7)).score for place in (uri, bundle)]
    torch.testing.assert_close(*scores)


def test_a_bundle_has_a_manifest_and_three_tensor_files_without_pickles(bundle: Path) -> None:
    names = sorted(re.sub("-[0-9a-f]{16}", "", path.name) for path in bundle.iterdir())
    assert names == ["density.safetensors", MANIFEST, "moments.safetensors", "network.safetensors"]
    for path in bundle.glob("*.safetensors"):
        content = path.read_bytes()
        assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_the_projector_and_predictor_are_left_out(bundle: Path) -> None:
    (path,) = bundle.glob("network-*.safetensors")
    roots = {name.partition(".")[0] for name in load_file(path)}
    assert "feature_aligners" in roots
    assert not roots & {"projector", "predictor"}


# Refused bundles


@pytest.mark.parametrize("position", [0, 0.5, -1])
@pytest.mark.parametrize("part", ["network", "density", "moments"])
def test_a_changed_byte_in_a_tensor_file_is_refused(bundle: Path, part: str, position: float) -> None:
    (path,) = bundle.glob(f"{part}-*.safetensors")
    content = bytearray(path.read_bytes())
    content[int(position * len(content)) if position > 0 else int(position)] ^= 1
    path.write_bytes(content)
    read = read_statistics if part == "moments" else read_bundle
    with pytest.raises(BundleError, match=f"{path.name}: the SHA-256"):
        read(bundle)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-100]), Path.unlink])
def test_a_short_or_missing_tensor_file_is_refused(bundle: Path, damage: Callable[[Path], Any]) -> None:
    (path,) = bundle.glob("density-*.safetensors")
    damage(path)
    with pytest.raises(BundleError, match=path.name):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "no manifest"), ("{", "not valid JSON"), *((other, "not the manifest") for other in ("[]", "{}"))],
)
def test_a_folder_with_another_manifest_is_no_bundle(bundle: Path, text: str | None, message: str) -> None:
    (bundle / MANIFEST).unlink()
    if text is not None:
        (bundle / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=message):
        read_bundle(bundle)


def test_no_changed_byte_of_a_manifest_goes_unnoticed(bundle: Path) -> None:
    path = bundle / MANIFEST
    original = path.read_bytes()
    manifest = read_manifest(bundle)
    for position in np.random.default_rng(0).choice(len(original), 200, replace=False):
        changed = bytearray(original)
        changed[position] ^= 1
        path.write_bytes(changed)
        with contextlib.suppress(BundleError):
            assert read_manifest(bundle) == manifest  # the byte was white space


def test_another_format_version_is_refused(bundle: Path) -> None:
    rewrite_manifest(bundle, 99)
    with pytest.raises(BundleError, match=r"format 99, .* 1, 2, 3, 4, 5, 6 and 7"):
        read_bundle(bundle)


def test_a_bundle_of_format_1_scores_as_before(bundle: Path) -> None:
    """Format 1 has no settings for padding and image score: they were zeros, and the maximum of the map."""
    rewrite_manifest(
        bundle, 1, "model.padding", "model.feature_alignment.padding", "scoring.image_score", "density.coreset"
    )
    read = read_bundle(bundle)
    assert (read.config.model.padding, read.config.scoring.image_score) == ("zeros", "maximum")
    assert read.detector.profile is None
    assert read.config.model.feature_alignment.padding == "border"


def test_locations_of_a_bundle_of_format_5_store_all_images(tmp_path: Path) -> None:
    config = config_of("nearest", per_place=None)
    write(tmp_path, config, trained(config, 0))
    rewrite_manifest(tmp_path, 5, "density.per_place")
    assert read_bundle(tmp_path).config == config


# Replacing


def test_replacing_a_bundle_deletes_its_old_files(bundle: Path, gaussian: FitResult) -> None:
    before = read_manifest(bundle)
    assert write(bundle, config_of(), gaussian)["files"] == before["files"]  # the same tensors have the same names
    after = write(bundle, config_of(), trained(config_of(), 5))
    assert read_manifest(bundle) == after
    assert after["sha256"] != before["sha256"]
    stored = {entry["name"] for entry in after["files"].values()}
    assert {path.name for path in bundle.iterdir()} == {MANIFEST, *stored}


def test_a_failed_write_leaves_the_old_bundle_complete(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_manifest(bundle)
    other = trained(config_of(), 5)
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: 1 / 0)  # fails after the tensors and before the manifest
    with pytest.raises(ZeroDivisionError):
        write(bundle, config_of(), other)
    monkeypatch.undo()
    assert read_bundle(bundle).manifest == before
