"""Tests of large photographs in tiles: one tile equals no tiling, maps have no seams, and calibration counts whole images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from small_set import fit_alone, ingest_parts, make_bundle, small_config
from torch import Tensor

from focus_ray.bundle.bundle import read_bundle, read_manifest, read_statistics
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.update import update_bundle
from focus_ray.data.images import decode_mask, encode_png
from focus_ray.data.read import iter_test_records, read_index
from focus_ray.density.bank import to_bank_rows
from focus_ray.density.base import Statistics, build_density
from focus_ray.density.moments import Moments
from focus_ray.density.settings import DensityConfig
from focus_ray.density.tiles import TiledDensity, Tiles, join_bank_of_tiles, split_bank_into_tiles, split_maps
from focus_ray.detect.anomaly_map import AnomalyMapGenerator
from focus_ray.detect.detector import can_share_backbone_pass, score_together
from focus_ray.detect.inspection import resize_map
from focus_ray.errors import ConfigError
from focus_ray.features.settings import ModelConfig
from focus_ray.fitting.fit import FitResult, check_prerequisites, fit
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import parse_config
from focus_ray.fitting.shards import MemoryShard, build_shard, fits_memory
from focus_ray.fitting.split import plan_category

NO_ALIGNMENT = {"group": "none"}
SIDE = 32  # of a tile, in pixels
DENSITIES = ("per_tile", "shared")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def model(density: str, grid: tuple[int, int] = (2, 3), overlap: float = 0.25, **settings: Any) -> dict[str, Any]:
    tiling = {"grid": grid, "overlap": overlap, "density": density}
    return {"image_size_px": SIDE, "image_alignment": NO_ALIGNMENT, "tiling": tiling, **settings}


@pytest.fixture(scope="module")
def bundles(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Makes a bundle of the gears, with a profile of good images, for each value of model.tiling.density."""
    folder = tmp_path_factory.mktemp("bundles")
    scoring = {"image_score": "profile"}
    return {
        kind: make_bundle(small_config(data, folder / kind, model=model(kind), scoring=scoring)) for kind in DENSITIES
    }


# Tiles


def test_tiles_are_cut_at_their_positions_and_joined_again() -> None:
    tiles = Tiles(2, 3, 8, 2)
    images = torch.rand(2, 3, 14, 20)
    cut = tiles.cut(images)
    assert cut.shape == (12, 3, 8, 8)
    torch.testing.assert_close(cut[6 + 4], images[1, :, 6:14, 6:14])  # second image, second row, second column
    batch = images.mul(255).byte().permute(0, 2, 3, 1)
    assert torch.equal(tiles.cut_batch(batch)[[4, 10]], tiles.cut_tile(batch, 4))
    assert torch.equal(split_maps(tiles.join(cut), tiles.rows, tiles.columns), cut)
    assert tiles.join(cut).shape == (2, 3, 16, 24)


def test_a_bank_of_images_is_folded_into_a_bank_of_tiles() -> None:
    embedding = torch.rand(5, 7, 2 * 4, 3 * 4)
    bank = to_bank_rows(embedding)
    folded = split_bank_into_tiles(bank, (2, 3), 4, 4)
    assert torch.equal(folded, to_bank_rows(split_maps(embedding, 2, 3)))
    assert torch.equal(join_bank_of_tiles(folded, (2, 3), 4, 4), bank)


@pytest.mark.parametrize(("grid", "size"), [((1, 1), (32, 32)), ((2, 3), (56, 80))])
def test_images_are_resized_to_the_size_that_their_tiles_cover(grid: tuple[int, int], size: tuple[int, int]) -> None:
    assert ModelConfig(**model("per_tile", grid)).frame_px == size


# Maps


@pytest.mark.parametrize("overlap_px", [0, 1, 8, 16])
def test_the_weights_of_overlapping_tiles_add_up_to_one(overlap_px: int) -> None:
    map_generator = AnomalyMapGenerator.for_tiles(Tiles(2, 3, 32, overlap_px), 4, 4.0)
    anomaly_map = map_generator(torch.ones(1, 8, 12))
    assert anomaly_map.shape == (1, 64 - overlap_px, 96 - 2 * overlap_px)
    torch.testing.assert_close(anomaly_map, torch.ones_like(anomaly_map))


def test_values_of_two_tiles_blend_linearly_in_their_overlap() -> None:
    map_generator = AnomalyMapGenerator.for_tiles(Tiles(1, 2, 32, 8), 4, 0.0)
    distance = torch.cat([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)], dim=2)
    row = map_generator(distance)[0, 0]
    torch.testing.assert_close(row[24:32], (torch.arange(8) + 0.5) / 8)
    assert (row[:24] == 0).all()
    torch.testing.assert_close(row[32:], torch.ones(24))


@pytest.mark.parametrize("density", DENSITIES)
def test_the_map_of_a_homogeneous_texture_has_no_jumps_at_seams(
    data: str, tmp_path: Path, density: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps change hardly more between pixels where tiles overlap than within tiles; without blending they jump."""
    side = 64

    def steps(overlap: float, sigma_px: float) -> tuple[float, float]:
        """Returns the largest change between neighbouring pixels at a seam, and elsewhere."""
        monkeypatch.setattr("focus_ray.detect.detector.SMOOTHING_SIGMA_PX", sigma_px)
        config = small_config(data, tmp_path, model={**model(density, (2, 2), overlap), "image_size_px": side})
        images = textures(40, config.model.frame_px)
        detector = fit(config, MemoryShard(images[:16], images[16:20]), 16, torch.device("cpu")).detector
        maps = detector(images[20:]).anomaly_map
        first, last = side - config.model.overlap_px - 1, side - 1  # a seam lies after these pixels
        changes = [maps.diff(dim=2).abs().amax(dim=(0, 1)), maps.diff(dim=1).abs().amax(dim=(0, 2))]
        seams = torch.cat([change[first : last + 1] for change in changes])
        elsewhere = torch.cat([torch.cat([change[:first], change[last + 1 :]]) for change in changes])
        return float(seams.max()), float(elsewhere.max())

    seam, within = steps(0.25, 4.0)
    assert seam <= 1.25 * within
    seam, within = steps(0.0, 0.0)
    assert seam > 5 * within


def textures(count: int, size: tuple[int, int]) -> Tensor:
    noise = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return torch.from_numpy(noise)


@pytest.mark.parametrize("density", DENSITIES)
def test_one_tile_that_covers_the_image_equals_no_tiling(data: str, tmp_path: Path, density: str) -> None:
    def fit_with(tiling: dict[str, Any] | None) -> FitResult:
        sections: dict[str, Any] = {
            "model": {"image_size_px": 64, "image_alignment": NO_ALIGNMENT, "tiling": tiling},
            "density": {"reduction": "discriminant"},
            "scoring": {"image_score": "profile"},
        }
        return fit_alone(small_config(data, tmp_path, **sections))

    untiled = fit_with(None)
    tiled = fit_with({"grid": [1, 1], "overlap": 0.0, "density": density})
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8))
    expected, scored = untiled.detector(images), tiled.detector(images)
    assert torch.equal(scored.score, expected.score)
    assert torch.equal(scored.anomaly_map, expected.anomaly_map)
    assert untiled.calibration == tiled.calibration


@pytest.mark.parametrize("density", DENSITIES)
def test_a_map_shows_a_defect_at_its_position_in_the_photograph(
    bundles: dict[str, str], density: str, data: str
) -> None:
    inspector = Inspector.load(bundles[density], "cpu")
    record = next(record for record in iter_test_records(data, "gear") if not record["label"])
    wide = Image.open(io.BytesIO(record["image"])).convert("RGB").resize((160, 112))
    pixels = np.asarray(wide).copy()
    pixels[70:82, 100:112] = (255, 0, 255)
    clean, bad = inspector.inspect([encode_png(np.asarray(wide)), encode_png(pixels)])
    assert bad.anomaly_map.shape == (56, 80)
    rise = bad.anomaly_map - clean.anomaly_map
    near = rise[30:46, 45:61]  # the defect and 8 pixels around it, at half size
    assert near.max() >= 0.9 * rise.max()
    assert near.mean() > 3 * abs(rise.mean())
    assert bad.score > clean.score


# One density for all tiles


def test_a_shared_density_excludes_all_tiles_of_an_excluded_image() -> None:
    config = DensityConfig(coreset=16, reduction="discriminant", precision="fp32")
    values = torch.randn(6, 5 + 4, 8, 12, generator=torch.Generator().manual_seed(0))

    def build_shared(images: Tensor) -> TiledDensity:
        moments = Moments(4, 4, 5)
        moments.update(split_maps(images[:, :5], 2, 3))
        density = build_density(config, Statistics(moments, to_bank_rows(images), grid=(2, 3)))
        assert isinstance(density, TiledDensity)
        return density

    whole = build_shared(values)
    memory = whole.tile_density.location_memory  # type: ignore[attr-defined]
    other_memory = build_shared(torch.cat([values[:2], values[3:]])).tile_density.location_memory  # type: ignore[attr-defined]
    tiles = split_maps(values[2:3, :5], 2, 3)
    numbers = (2 * 6 + torch.arange(6)).expand(6, 6)
    torch.testing.assert_close(memory.score(tiles, numbers), other_memory.score(tiles), atol=1e-3, rtol=1e-3)
    distance = whole.score(values[2:3], torch.tensor([2]))
    assert distance.shape == (1, 8, 12)
    assert float(distance.mean()) > 2 * float(whole.score(values[2:3]).mean())


def test_a_shared_location_keeps_as_many_embeddings_as_the_locations_it_replaces() -> None:
    values = torch.randn(9, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    moments = Moments(4, 4, 5)
    moments.update(split_maps(values, 2, 3))
    config = DensityConfig(coreset=0, reduction="discriminant", precision="fp32", per_place=2)
    density = build_density(config, Statistics(moments, to_bank_rows(values), grid=(2, 3)))
    assert isinstance(density, TiledDensity)
    assert density.tile_density.bank.shape == (16, 2 * 6, 5)
    assert density.score(values, torch.arange(9)).isfinite().all()


def test_statistics_of_shared_locations_count_whole_images(bundles: dict[str, str]) -> None:
    for kind in DENSITIES:
        statistics = read_statistics(bundles[kind])
        assert statistics.bank is not None
        assert statistics.num_images == len(statistics.bank) == read_manifest(bundles[kind])["data"]["num_fit"]
        assert statistics.bank.shape[1] == (2 * SIDE // 8) * (3 * SIDE // 8)
    shared, per_tile = (read_statistics(bundles[kind]) for kind in ("shared", "per_tile"))
    assert shared.num_images == per_tile.num_images == shared.moments.count // 6
    assert shared.moments.mean.shape[0] * 6 == per_tile.moments.mean.shape[0]


# From fit to verdict


@pytest.mark.parametrize("density", DENSITIES)
def test_calibration_counts_images_and_not_tiles(data: str, bundles: dict[str, str], density: str) -> None:
    bundle = read_bundle(bundles[density])
    assert bundle.calibration.num_images == len(plan_category(bundle.config, "gear").holdout_rows)


@pytest.mark.parametrize("density", DENSITIES)
def test_a_bundle_scores_like_the_fit_that_made_it(data: str, tmp_path: Path, density: str) -> None:
    config = small_config(data, tmp_path, model=model(density), scoring={"image_score": "profile"})
    result = fit_alone(config)
    bundle = read_bundle(make_bundle(config))
    images = textures(3, config.model.frame_px)
    expected, scored = result.detector(images), bundle.detector(images)
    torch.testing.assert_close(scored.score, expected.score, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scored.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("density", DENSITIES)
def test_evaluation_of_a_tiled_category_equals_scikit_learn(data: str, bundles: dict[str, str], density: str) -> None:
    inspector, records = Inspector.load(bundles[density], "cpu", batch_size=3), list(iter_test_records(data, "gear"))
    figures = inspector.evaluate(records)
    assert (figures["num_normal"], figures["num_anomalous"], figures["num_masks"]) == (4, 4, 4)
    inspections = inspector.inspect([record["image"] for record in records])
    maps = np.stack([resize_map(inspection.anomaly_map, 64, 64) for inspection in inspections])
    masks = [np.zeros((64, 64), bool) if r["mask"] is None else decode_mask(r["mask"], 64, 64) for r in records]
    assert figures["pixel_auroc"] == pytest.approx(roc_auc_score(np.stack(masks).ravel(), maps.ravel()), abs=1e-4)
    labels = [record["label"] for record in records]
    assert figures["image_auroc"] == roc_auc_score(labels, [inspection.score for inspection in inspections])


@pytest.mark.parametrize("density", DENSITIES)
def test_added_images_can_be_removed_from_a_tiled_bundle(
    data: str, bundles: dict[str, str], tmp_path: Path, density: str
) -> None:
    place = str(tmp_path / "more")
    manifest = update_bundle(bundles[density], place, add=data, calibrate=data)
    before, after = read_statistics(bundles[density]), read_statistics(place)
    added = sum(label == 0 for label in read_index(data, "gear", "train")["label"].to_pylist())
    assert manifest["data"]["num_fit"] == after.num_images == before.num_images + added
    update_bundle(place, tmp_path / "less", remove=data, calibrate=data)
    assert read_statistics(tmp_path / "less").num_images == before.num_images


def test_cross_calibration_selection_and_training_work_with_tiles(data: str, tmp_path: Path) -> None:
    for kind in DENSITIES:
        sections: dict[str, Any] = {
            "model": model(kind, (1, 2)),
            "train": {"epochs": 1},
            "selection": {"enabled": True, "fraction": 0.1},
            "calibration": {"method": "cross"},
            "density": {"reduction": "discriminant"},
            "scoring": {"image_score": "profile"},
        }
        config = small_config(data, tmp_path, **sections)
        result = fit_alone(config)
        plan = plan_category(config, "gear")  # validation images calibrate too, after the last selection
        assert result.calibration.num_images == len(plan.fit_rows) + len(plan.validation_rows)
        assert len(result.notes.history) == 1
        assert len(result.notes.selection) == 2


@pytest.mark.parametrize("density", DENSITIES)
def test_leave_one_out_excludes_all_tiles_of_an_image(data: str, tmp_path: Path, density: str) -> None:
    """Left-out images score like new images, with and without folds of the projection."""
    for reduction in ("discriminant", "semi_orthogonal"):
        sections: dict[str, Any] = {
            "model": model(density, (2, 2)),
            "calibration": {"method": "leave_one_out"},
            "density": {"reduction": reduction, "coreset": 256},
            "scoring": {"image_score": "profile"},
        }
        config = small_config(data, tmp_path, **sections)
        images = textures(34, config.model.frame_px)
        result = fit(config, MemoryShard(images[:16]), 16, torch.device("cpu"))
        assert result.calibration.method == "leave_one_out"
        assert result.calibration.num_images == 16
        new = result.detector(images[16:]).score
        assert float(np.median(result.calibration.image_scores)) == pytest.approx(float(new.median()), rel=0.05)


def test_leave_one_out_is_refused_for_moments_that_tiles_share(data: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": model("shared"), "density": {"kind": "gaussian"}}
    leave_one_out = small_config(data, tmp_path, **sections, calibration={"method": "leave_one_out"})
    with pytest.raises(ConfigError, match=r"calibration\.method=leave_one_out: density\.kind=gaussian"):
        check_prerequisites(leave_one_out)
    calibration = {"method": "auto", "target_fpr": 0.05}
    result = fit_alone(small_config(data, tmp_path, **sections, calibration=calibration))
    assert result.calibration.method == "cross"


def test_tiled_models_with_one_backbone_can_be_scored_together(bundles: dict[str, str]) -> None:
    first, second = (read_bundle(bundles[kind]).detector for kind in DENSITIES)
    second.net.backbone = first.net.backbone
    assert can_share_backbone_pass(first, second)
    images = textures(3, first.net.config.frame_px)
    together = score_together([(first, images), (second, images[:2])])
    for scored, detector, count in zip(together, (first, second), (3, 2), strict=True):
        expected = detector(images[:count])
        torch.testing.assert_close(scored.score, expected.score, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(scored.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-3)


def test_the_memory_budget_counts_images_at_the_size_of_all_tiles(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, model=model("shared"), data={"memory_budget_mb": 0.25})
    plan = plan_category(config, "gear")
    assert plan.num_images * SIDE**2 * 3 < 0.25 * 2**20 < plan.num_images * 56 * 80 * 3
    assert not fits_memory(config, plan)
    streamed = build_shard(config, "gear", plan, 0, 1)
    in_memory = build_shard(small_config(data, tmp_path, model=model("shared")), "gear", plan, 0, 1)
    assert torch.equal(torch.cat(list(streamed.fit_batches())), torch.cat(list(in_memory.fit_batches())))
    assert load_frame(config, "gear").shape == (56, 80, 3)


def test_tiling_with_alignment_is_refused() -> None:
    tree = {"data": {"uri": "images"}, "model": {"tiling": {"grid": [2, 2]}}}
    with pytest.raises(ConfigError, match=r"model\.image_alignment\.group=none"):
        parse_config(tree)
    tree["model"].update(image_alignment=NO_ALIGNMENT, feature_alignment={"layer2": "rotation"})
    with pytest.raises(ConfigError, match=r"model\.feature_alignment\.layer2=none"):
        parse_config(tree)
