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
from small_set import fit_alone, make_bundle, small_config
from torch import Tensor

from focus_ray.bundle.bundle import read_bundle, read_statistics
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.update import update_bundle
from focus_ray.data.images import decode_mask, encode_png
from focus_ray.data.read import read_index, read_test_rows
from focus_ray.density.bank import convert_to_bank_rows
from focus_ray.density.base import NormalStatistics, build_density
from focus_ray.density.moments import Moments
from focus_ray.density.settings import DensityConfig
from focus_ray.density.tiles import TiledDensity, TileGrid, join_bank_tiles, split_bank_into_tiles, split_into_tile_maps
from focus_ray.detect.anomaly_map import AnomalyMapGenerator
from focus_ray.detect.detector import ScoredImages, can_share_backbone_pass, score_with_shared_backbone
from focus_ray.detect.inspection import resize_anomaly_map
from focus_ray.errors import ConfigError
from focus_ray.fitting.fit import FitResult, check_fit_prerequisites, fit
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shards import MemoryShard, build_shard, fits_in_memory
from focus_ray.fitting.split import compute_split_plan

SIDE = 32  # of a tile, in pixels
DENSITIES = ("per_tile", "shared")


def make_tiled_config(
    uri: str, kind: str | None, grid: tuple[int, int] = (2, 3), overlap: float = 0.25, side: int = SIDE, **rest: Any
) -> Config:
    """Returns a configuration with a profile of good images, and with tiles whose model.tiling.density is `kind`, if any."""
    tiling = kind and {"grid": grid, "overlap": overlap, "density": kind}
    model = {"image_size_px": side, "tiling": tiling}
    return small_config(uri, "unused", model=model, **{"scoring": {"image_score": "profile"}, **rest})


def make_textures(count: int, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8))


def fit_textures(config: Config, num_holdout: int = 4, num_new: int = 18) -> tuple[FitResult, ScoredImages]:
    """Fits a detector to 16 textures, and scores new ones."""
    images = make_textures(16 + num_holdout + num_new, config.model.resized_image_px)
    shard = MemoryShard(images[:16], images[16 : 16 + num_holdout])
    result = fit(config, shard, 16, torch.device("cpu"))
    return result, result.detector(images[-num_new:])


@pytest.fixture(scope="module", params=DENSITIES)
def fitted(
    request: pytest.FixtureRequest, parts: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FitResult, str]:
    """Fits the gears with a value of model.tiling.density. Returns the result and the address of its bundle."""
    config = make_tiled_config(parts, request.param)
    result = fit_alone(config)
    return result, make_bundle(config, place=tmp_path_factory.mktemp("bundle") / request.param, result=result)


# Tiles and maps


def test_tiles_are_cut_at_their_positions_and_joined_again() -> None:
    tiles = TileGrid(2, 3, 8, 2)
    images = torch.rand(2, 3, 14, 20)
    cut = tiles.cut_images(images)
    assert cut.shape == (12, 3, 8, 8)
    torch.testing.assert_close(cut[6 + 4], images[1, :, 6:14, 6:14])  # second image, second row, second column
    batch = images.mul(255).byte().permute(0, 2, 3, 1)
    assert torch.equal(tiles.cut_channels_last_images(batch)[[4, 10]], tiles.cut_one_tile(batch, 4))
    assert torch.equal(split_into_tile_maps(tiles.join_tile_maps(cut), tiles.rows, tiles.columns), cut)
    assert tiles.join_tile_maps(cut).shape == (2, 3, 16, 24)
    assert tiles.join_tile_maps(cut[:, :0]).shape == (2, 0, 16, 24)


def test_a_bank_of_images_is_folded_into_a_bank_of_tiles() -> None:
    embedding = torch.rand(5, 7, 2 * 4, 3 * 4)
    bank = convert_to_bank_rows(embedding)
    folded = split_bank_into_tiles(bank, (2, 3), 4, 4)
    assert torch.equal(folded, convert_to_bank_rows(split_into_tile_maps(embedding, 2, 3)))
    assert torch.equal(join_bank_tiles(folded, (2, 3), 4, 4), bank)


@pytest.mark.parametrize("overlap_px", [0, 1, 8, 16])
def test_the_weights_of_overlapping_tiles_add_up_to_one(overlap_px: int) -> None:
    map_generator = AnomalyMapGenerator.build_for_tiles(TileGrid(2, 3, 32, overlap_px), 4, 4.0)
    anomaly_map = map_generator(torch.ones(1, 8, 12))
    assert anomaly_map.shape == (1, 64 - overlap_px, 96 - 2 * overlap_px)
    torch.testing.assert_close(anomaly_map, torch.ones_like(anomaly_map))


def test_values_of_two_tiles_blend_linearly_in_their_overlap() -> None:
    map_generator = AnomalyMapGenerator.build_for_tiles(TileGrid(1, 2, 32, 8), 4, 0.0)
    row = map_generator(torch.cat([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)], dim=2))[0, 0]
    expected = torch.cat([torch.zeros(24), (torch.arange(8) + 0.5) / 8, torch.ones(24)])
    torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("density", DENSITIES)
def test_the_map_of_a_homogeneous_texture_has_no_jumps_at_seams(
    parts: str, density: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Maps change hardly more between pixels where tiles overlap than within tiles; without blending they jump."""

    def seam_ratio(overlap: float, sigma_px: float) -> float:
        """Returns the largest change between neighbouring pixels at a seam, divided by the largest change elsewhere."""
        monkeypatch.setattr("focus_ray.detect.detector.SMOOTHING_SIGMA_PX", sigma_px)
        config = make_tiled_config(parts, density, (2, 2), overlap, side=64, scoring={"image_score": "maximum"})
        maps = fit_textures(config)[1].anomaly_map
        is_seam = torch.zeros(maps.shape[1] - 1, dtype=torch.bool)
        is_seam[64 - config.model.overlap_px - 1 : 64] = True  # a seam lies after these pixels
        changes = [maps.diff(dim=2).abs().amax(dim=(0, 1)), maps.diff(dim=1).abs().amax(dim=(0, 2))]
        at_seam, elsewhere = (torch.cat([change[chosen] for change in changes]).max() for chosen in (is_seam, ~is_seam))
        return float(at_seam / elsewhere)

    assert seam_ratio(0.25, 4.0) <= 1.25
    assert seam_ratio(0.0, 0.0) > 5


@pytest.mark.parametrize("density", DENSITIES)
def test_one_tile_that_covers_the_image_equals_no_tiling(parts: str, density: str) -> None:
    learnt = {"reduction": "discriminant"}
    (untiled, expected), (tiled, scored) = (
        fit_textures(make_tiled_config(parts, kind, (1, 1), 0.0, density=learnt), num_new=3) for kind in (None, density)
    )
    assert torch.equal(scored.score, expected.score)
    assert torch.equal(scored.anomaly_map, expected.anomaly_map)
    assert untiled.calibration == tiled.calibration


def test_a_map_shows_a_defect_at_its_position_in_the_photograph(fitted: tuple[FitResult, str], parts: str) -> None:
    inspector = Inspector.load(fitted[1], "cpu")
    record = next(record for record in read_test_rows(parts, "gear") if not record["label"])
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


def build_shared(images: Tensor, **settings: Any) -> TiledDensity:
    """Builds a density that the 2 x 3 tiles of images (N, 5 + K, 8, 12) share."""
    moments = Moments(4, 4, 5)
    moments.add_embeddings(split_into_tile_maps(images[:, :5], 2, 3))
    config = DensityConfig(reduction="discriminant", precision="fp32", **settings)
    density = build_density(config, NormalStatistics(moments, convert_to_bank_rows(images), grid=(2, 3)))
    assert isinstance(density, TiledDensity)
    return density


def test_a_shared_density_excludes_all_tiles_of_an_excluded_image() -> None:
    values = torch.randn(6, 5 + 4, 8, 12, generator=torch.Generator().manual_seed(0))
    whole, others = build_shared(values, coreset=16), build_shared(torch.cat([values[:2], values[3:]]), coreset=16)
    tiles, numbers = split_into_tile_maps(values[2:3, :5], 2, 3), (2 * 6 + torch.arange(6)).expand(6, 6)
    distances = whole.tile_density.location_memory.score(tiles, numbers)
    torch.testing.assert_close(distances, others.tile_density.location_memory.score(tiles), atol=1e-3, rtol=1e-3)
    distance = whole.score(values[2:3], torch.tensor([2]))
    assert distance.shape == (1, 8, 12)
    assert float(distance.mean()) > 2 * float(whole.score(values[2:3]).mean())


def test_a_shared_location_keeps_as_many_embeddings_as_the_locations_it_replaces() -> None:
    values = torch.randn(9, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    density = build_shared(values, coreset=0, per_place=2)
    assert density.tile_density.bank.shape == (16, 2 * 6, 5)
    assert density.score(values, torch.arange(9)).isfinite().all()


def test_statistics_and_calibration_count_whole_images(fitted: tuple[FitResult, str]) -> None:
    result, place = fitted
    bundle, statistics = read_bundle(place), read_statistics(place)
    plan = compute_split_plan(bundle.config, "gear")
    assert statistics.num_images == len(statistics.bank) == len(plan.fit.rows)
    assert statistics.bank.shape[1] == (2 * SIDE // 8) * (3 * SIDE // 8)
    assert bundle.calibration.image_scores == result.calibration.image_scores
    assert bundle.calibration.num_images == len(plan.holdout.rows)
    num_shared = 6 if bundle.config.model.tiling.density == "shared" else 1
    assert statistics.moments.count == num_shared * statistics.num_images
    assert statistics.moments.mean.shape[0] * num_shared == statistics.bank.shape[1]


# From fit to verdict


def test_a_bundle_scores_like_the_fit_that_made_it_and_together_with_another_model(
    fitted: tuple[FitResult, str],
) -> None:
    result, place = fitted
    read, images = read_bundle(place).detector, make_textures(3, (56, 80))
    read.net.backbone = result.detector.net.backbone
    assert can_share_backbone_pass(result.detector, read)
    expected = result.detector(images)
    together = score_with_shared_backbone([(result.detector, images), (read, images[:2])])
    for scored, count in zip((read(images), *together), (3, 3, 2), strict=True):
        torch.testing.assert_close(scored.score, expected.score[:count], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(scored.anomaly_map, expected.anomaly_map[:count], rtol=1e-3, atol=1e-3)


def test_evaluation_of_a_tiled_category_equals_scikit_learn(fitted: tuple[FitResult, str], parts: str) -> None:
    inspector, records = Inspector.load(fitted[1], "cpu", batch_size=3), list(read_test_rows(parts, "gear"))
    figures = inspector.evaluate(records)
    assert (figures["num_normal"], figures["num_anomalous"], figures["num_masks"]) == (4, 4, 4)
    inspections = inspector.inspect([record["image"] for record in records])
    maps = np.stack([resize_anomaly_map(inspection.anomaly_map, 64, 64) for inspection in inspections])
    masks = [np.zeros((64, 64), bool) if r["mask"] is None else decode_mask(r["mask"], 64, 64) for r in records]
    assert figures["pixel_auroc"] == pytest.approx(roc_auc_score(np.stack(masks).ravel(), maps.ravel()), abs=1e-4)
    labels = [record["label"] for record in records]
    assert figures["image_auroc"] == roc_auc_score(labels, [inspection.score for inspection in inspections])


def test_added_images_can_be_removed_from_a_tiled_bundle(
    fitted: tuple[FitResult, str], parts: str, tmp_path: Path
) -> None:
    place, before = str(tmp_path / "more"), read_statistics(fitted[1]).num_images
    manifest = update_bundle(fitted[1], place, add=parts, calibrate=parts)
    added = sum(label == 0 for label in read_index(parts, "gear", "train")["label"].to_pylist())
    assert manifest["data"]["num_fit"] == read_statistics(place).num_images == before + added
    update_bundle(place, tmp_path / "less", remove=parts, calibrate=parts)
    assert read_statistics(tmp_path / "less").num_images == before


@pytest.mark.parametrize("density", DENSITIES)
def test_cross_calibration_selection_and_training_work_with_tiles(parts: str, density: str) -> None:
    selection = {"fraction": 0.1}
    learnt, method = {"reduction": "discriminant"}, {"method": "cross"}
    config = make_tiled_config(
        parts, density, (1, 2), train={"steps": 1}, selection=selection, calibration=method, density=learnt
    )
    result, plan = fit_alone(config), compute_split_plan(config, "gear")
    # validation images calibrate too, after the last selection
    assert result.calibration.num_images == len(plan.fit.rows) + len(plan.validation.rows)
    assert (len(result.notes.history), len(result.notes.selection)) == (1, 2)


@pytest.mark.parametrize("reduction", ["discriminant", "semi_orthogonal"])
@pytest.mark.parametrize("density", DENSITIES)
def test_leave_one_out_excludes_all_tiles_of_an_image(parts: str, density: str, reduction: str) -> None:
    """Left-out images score like new images, with and without folds of the projection."""
    settings = {"calibration": {"method": "leave_one_out"}, "density": {"reduction": reduction, "coreset": 256}}
    result, new = fit_textures(make_tiled_config(parts, density, (2, 2), **settings), num_holdout=0)
    assert (result.calibration.method, result.calibration.num_images) == ("leave_one_out", 16)
    assert float(np.median(result.calibration.image_scores)) == pytest.approx(float(new.score.median()), rel=0.05)


def test_leave_one_out_is_refused_for_moments_that_tiles_share(parts: str) -> None:
    config = make_tiled_config(parts, "shared", density={"kind": "gaussian"}, calibration={"method": "leave_one_out"})
    with pytest.raises(ConfigError, match=r"calibration\.method=leave_one_out: density\.kind=gaussian"):
        check_fit_prerequisites(config)
    automatic = make_tiled_config(parts, "shared", density={"kind": "gaussian"}, calibration={"method": "auto"})
    assert fit_alone(automatic).calibration.method == "cross"


def test_the_memory_budget_counts_images_at_the_size_of_all_tiles(parts: str) -> None:
    plain, limited = (
        make_tiled_config(parts, "shared", **settings) for settings in ({}, {"data": {"memory_budget_mb": 0.25}})
    )
    plan = compute_split_plan(limited, "gear")
    assert plan.num_images * SIDE**2 * 3 < 0.25 * 2**20 < plan.num_images * 56 * 80 * 3
    assert not fits_in_memory(limited, plan)
    streamed, in_memory = (build_shard(config, "gear", plan, 0, 1) for config in (limited, plain))
    assert torch.equal(torch.cat(list(streamed.read_batches("fit"))), torch.cat(list(in_memory.read_batches("fit"))))
    assert load_frame(limited, "gear").shape == (56, 80, 3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, r"model\.image_alignment\.group=none"),
        (
            {"image_alignment": {"group": "none"}, "feature_alignment": {"layer2": "rotation"}},
            r"model\.feature_alignment\.layer2=none",
        ),
    ],
)
def test_tiling_with_alignment_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_config({"data": {"uri": "images"}, "model": {"tiling": {"grid": [2, 2]}, **changes}})
