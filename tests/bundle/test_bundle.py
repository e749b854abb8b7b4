"""Bundles: a bundle is read as it was written, a changed file is refused, replacing is a single step, no file is a pickle."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from focus_ray.bundle.bundle import MANIFEST, manifest_hash, read_bundle, read_manifest, read_statistics, write_bundle
from focus_ray.errors import BundleError
from focus_ray.fitting.fit import FitResult, build_detector, fit
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
        }
    )


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 32, 32, 3), generator=generator, dtype=torch.uint8)


def trained(config: Config, seed: int = 0) -> FitResult:
    return fit(config, MemoryShard(images(10, seed), images(4, seed + 100), batch_size=4), 10, CPU)


def write(folder: Path, config: Config, result: FitResult) -> dict[str, Any]:
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
    return trained(config_of())


@pytest.fixture
def bundle(tmp_path: Path, gaussian: FitResult) -> Path:
    write(tmp_path / "bundle", config_of(), gaussian)
    return tmp_path / "bundle"


# Writing and reading


@pytest.mark.parametrize("kind", ["gaussian", "nearest"])
def test_a_bundle_scores_as_the_fitted_model(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    result = trained(config)
    manifest = write(tmp_path, config, result)
    bundle = read_bundle(tmp_path)
    queries = images(3, 7)
    expected = build_detector(config, result.net, result.reduction, result.statistics)(queries)
    scored = bundle.detector(queries)
    torch.testing.assert_close(scored.score, expected.score, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scored.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-5)
    assert bundle.calibration.precision is not None  # `write_bundle` records it
    as_written = dataclasses.replace(result.calibration, precision=bundle.calibration.precision)
    assert (bundle.config, bundle.calibration, bundle.category) == (config, as_written, "bolt")
    assert bundle.version == manifest["sha256"]
    assert bundle.manifest == manifest == json.loads((tmp_path / MANIFEST).read_text())


def test_the_manifest_contains_the_provenance(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert manifest["data"] == DATA
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["config"]["density"]["num_channels"] == 12
    assert manifest["moments"]["count"] == 10


@pytest.mark.parametrize("kind", ["gaussian", "nearest"])
def test_stored_statistics_join_to_the_statistics_of_all_images(kind: str, tmp_path: Path) -> None:
    config = config_of(kind)
    for number in range(2):
        write(tmp_path / str(number), config, trained(config, seed=number))
    joined = read_statistics(tmp_path / "0").join(read_statistics(tmp_path / "1"))
    all_images = MemoryShard(torch.cat([images(10, 0), images(10, 1)]), images(4, 100))
    fresh = fit(config, all_images, 20, CPU).statistics
    assert joined.moments.count == 20
    scale = float(fresh.moments.scatter.abs().max())
    torch.testing.assert_close(joined.moments.mean, fresh.moments.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(joined.moments.scatter, fresh.moments.scatter, rtol=0, atol=1e-5 * scale)
    assert (joined.bank is None) == (fresh.bank is None) == (kind == "gaussian")
    if joined.bank is not None:
        torch.testing.assert_close(joined.bank, fresh.bank, rtol=0, atol=2e-3)


def test_the_density_file_has_the_subsampled_bank_and_the_moments_file_the_rest(tmp_path: Path) -> None:
    part = config_of("nearest", per_place=4, reduction="discriminant", coreset_channels=16)
    result = trained(part)
    files = write(tmp_path, part, result)["files"]
    assert len(load_file(tmp_path / files["density"]["name"])["bank"]) == 4
    assert result.statistics.bank is not None
    bank = read_statistics(tmp_path).bank
    assert bank is not None
    assert torch.equal(bank, result.statistics.bank)
    (tmp_path / files["moments"]["name"]).unlink()  # scoring does not need this file
    read, queries = read_bundle(tmp_path).detector, images(3, 7)
    torch.testing.assert_close(read(queries).score, result.detector(queries).score, rtol=1e-5, atol=1e-6)


def test_a_bundle_without_moments_scores_but_cannot_be_updated(tmp_path: Path, gaussian: FitResult) -> None:
    write(tmp_path, config_of(keep_moments=False), gaussian)
    assert read_bundle(tmp_path).detector(images(1, 0)).score.shape == (1,)
    with pytest.raises(BundleError, match=r"density\.keep_moments=true"):
        read_statistics(tmp_path)


def test_a_bundle_can_be_read_without_ray(bundle: Path) -> None:
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
import torch
from focus_ray.bundle.bundle import read_bundle
print(float(read_bundle(sys.argv[1]).detector(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).score))
"""
    finished = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    expected = read_bundle(bundle).detector(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).score
    assert float(finished.stdout) == pytest.approx(float(expected), rel=1e-5)


def test_a_bundle_on_s3_scores_as_one_on_disk(s3, bundle: Path, gaussian: FitResult) -> None:
    uri = s3.new_uri()
    write(uri, config_of(), gaussian)  # type: ignore[arg-type]
    queries = images(2, 7)
    scored = read_bundle(uri).detector(queries).score
    torch.testing.assert_close(scored, read_bundle(bundle).detector(queries).score)


def test_no_file_of_a_bundle_is_a_pickle(bundle: Path) -> None:
    names = sorted(path.name for path in bundle.iterdir())
    assert [re.sub("-[0-9a-f]{16}", "", name) for name in names] == [
        "density.safetensors",
        MANIFEST,
        "moments.safetensors",
        "network.safetensors",
    ]
    for path in bundle.glob("*.safetensors"):
        content = path.read_bytes()
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        assert header.startswith(b"{")
        assert json.loads(header)


def test_the_projector_and_predictor_are_left_out(bundle: Path) -> None:
    (path,) = bundle.glob("network-*.safetensors")
    names = load_file(path)
    assert not [name for name in names if name.startswith(("projector", "predictor"))]
    assert [name for name in names if name.startswith("feature_aligners.layer2")]


# Refused bundles


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("part", ["network", "density", "moments"])
def test_a_changed_byte_in_a_tensor_file_is_refused(bundle: Path, part: str, place: str) -> None:
    (path,) = bundle.glob(f"{part}-*.safetensors")
    content = bytearray(path.read_bytes())
    content[{"first": 0, "middle": len(content) // 2, "last": -1}[place]] ^= 1
    path.write_bytes(content)
    read = read_statistics if part == "moments" else read_bundle
    with pytest.raises(BundleError, match=rf"{path.name}: the SHA-256 is "):
        read(bundle)


def test_a_file_that_was_cut_short_is_refused(bundle: Path) -> None:
    (path,) = bundle.glob("density-*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleError, match="changed or cut short"):
        read_bundle(bundle)


def test_a_changed_manifest_is_refused(bundle: Path) -> None:
    path = bundle / MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"category": "bolt"', '"category": "nuts"'))
    with pytest.raises(BundleError, match=rf"{MANIFEST}: .*hash differs"):
        read_bundle(bundle)
    path.write_text(text[:-1])
    with pytest.raises(BundleError, match=r"not valid JSON"):
        read_bundle(bundle)
    for other in ("[]", "{}", '{"format": "another"}'):
        path.write_text(other)
        with pytest.raises(BundleError, match="not the manifest of a focus_ray bundle"):
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
    path = bundle / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(
        BundleError,
        match=r"format 99, .* formats 1, 2, 3, 4, 5 and 6",
    ):
        read_bundle(bundle)


def test_a_bundle_of_format_1_scores_as_before(bundle: Path) -> None:
    """Format 1 has no settings for padding and image score: they were zeros, and the maximum of the map."""
    path = bundle / MANIFEST
    manifest = json.loads(path.read_text())
    old_manifest = {**manifest, "format_version": 1, "config": json.loads(json.dumps(manifest["config"]))}
    del old_manifest["config"]["model"]["padding"], old_manifest["config"]["scoring"]["image_score"]
    del old_manifest["config"]["density"]["coreset"]
    del old_manifest["sha256"]
    text = json.dumps(old_manifest, sort_keys=True, separators=(",", ":"))
    path.write_text(json.dumps({**old_manifest, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    read = read_bundle(bundle)
    assert (read.config.model.padding, read.config.scoring.image_score) == ("zeros", "maximum")
    assert read.detector.profile is None


def test_locations_of_a_bundle_of_format_5_store_all_images(tmp_path: Path) -> None:
    config = config_of("nearest", per_place=None)
    write(tmp_path, config, trained(config))
    path = tmp_path / MANIFEST
    old_manifest = {**json.loads(path.read_text()), "format_version": 5}
    del old_manifest["config"]["density"]["per_place"], old_manifest["sha256"]
    path.write_text(json.dumps({**old_manifest, "sha256": manifest_hash(old_manifest)}))
    assert read_bundle(tmp_path).config == config


def test_a_missing_file_is_named(bundle: Path) -> None:
    (path,) = bundle.glob("density-*.safetensors")
    path.unlink()
    with pytest.raises(BundleError, match=rf"{path.name} is missing"):
        read_bundle(bundle)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        read_bundle(tmp_path)


# Replacing


def test_replacing_a_bundle_deletes_its_old_files(bundle: Path) -> None:
    before = read_manifest(bundle)
    after = write(bundle, config_of(), trained(config_of(), seed=5))
    assert read_manifest(bundle) == after
    assert after["sha256"] != before["sha256"]
    stored = {entry["name"] for entry in after["files"].values()}
    assert {path.name for path in bundle.iterdir()} == {MANIFEST, *stored}


def test_writing_the_same_bundle_again_changes_no_tensor_file(bundle: Path, gaussian: FitResult) -> None:
    before = read_manifest(bundle)
    assert write(bundle, config_of(), gaussian)["files"] == before["files"]
    read_bundle(bundle)


def test_a_failed_write_leaves_the_old_bundle_complete(
    bundle: Path, gaussian: FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_manifest(bundle)
    broken = trained(config_of(), seed=5)
    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: 1 / 0)  # fails after the tensors and before the manifest
    with pytest.raises(ZeroDivisionError):
        write(bundle, config_of(), broken)
    monkeypatch.undo()
    assert read_bundle(bundle).manifest == before
