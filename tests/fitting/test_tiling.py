"""Large photographs in tiles: one tile is no tile, maps have no seams, and everything after the fit counts whole images."""

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
from focus_ray.config import DensityConfig, ModelConfig, parse_config
from focus_ray.data.images import decode_mask, encode_png
from focus_ray.data.read import iter_test_records, read_index
from focus_ray.data.regions import frame_of
from focus_ray.data.shards import MemoryShard, build_shard, fits_memory
from focus_ray.data.split import plan_category
from focus_ray.density.base import Statistics, build_density
from focus_ray.density.moments import Moments
from focus_ray.density.nearest import to_bank_rows
from focus_ray.density.tiles import TiledDensity, Tiles, fold_bank, split_maps, unfold_bank
from focus_ray.errors import ConfigError
from focus_ray.evaluation.inspection import resize_map
from focus_ray.fitting.fit import FitResult, check_ingredients, fit
from focus_ray.fitting.scoring import score_together, share_a_pass
from focus_ray.fitting.spread import Spread

NONE = {"group": "none"}
SIDE = 32  # of a tile
DENSITIES = ("per_tile", "shared")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


def model(density: str, grid: tuple[int, int] = (2, 3), overlap: float = 0.25, **others: Any) -> dict[str, Any]:
    tiling = {"grid": grid, "overlap": overlap, "density": density}
    return {"image_size_px": SIDE, "image_alignment": NONE, "tiling": tiling, **others}


@pytest.fixture(scope="module")
def bundles(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Density of the tiling -> a bundle of the gears, with a profile of good images."""
    folder = tmp_path_factory.mktemp("bundles")
    scoring = {"image_score": "profile"}
    return {
        kind: make_bundle(small_config(data, folder / kind, model=model(kind), scoring=scoring)) for kind in DENSITIES
    }


# Places


def test_tiles_are_cut_where_they_lie_and_joined_again() -> None:
    tiles = Tiles(2, 3, 8, 2)
    images = torch.rand(2, 3, 14, 20)
    cut = tiles.cut(images)
    assert cut.shape == (12, 3, 8, 8)
    torch.testing.assert_close(cut[6 + 4], images[1, :, 6:14, 6:14])  # of the second image, second row, second column
    batch = images.mul(255).byte().permute(0, 2, 3, 1)
    assert torch.equal(tiles.cut_batch(batch)[[4, 10]], tiles.cut_tile(batch, 4))
    assert torch.equal(tiles.split(tiles.join(cut)), cut)
    assert tiles.join(cut).shape == (2, 3, 16, 24)


def test_a_bank_of_images_is_folded_into_one_of_their_tiles() -> None:
    embedding = torch.rand(5, 7, 2 * 4, 3 * 4)
    bank = to_bank_rows(embedding)
    folded = fold_bank(bank, (2, 3), 4, 4)
    assert torch.equal(folded, to_bank_rows(split_maps(embedding, 2, 3)))
    assert torch.equal(unfold_bank(folded, (2, 3), 4, 4), bank)


@pytest.mark.parametrize(("grid", "size"), [((1, 1), (32, 32)), ((2, 3), (56, 80))])
def test_images_are_brought_to_the_size_that_their_tiles_cover(grid: tuple[int, int], size: tuple[int, int]) -> None:
    assert ModelConfig(**model("per_tile", grid)).frame_px == size


# Maps


@pytest.mark.parametrize("overlap_px", [0, 1, 8, 16])
def test_where_tiles_overlap_their_weights_add_up_to_one(overlap_px: int) -> None:
    spread = Spread.of(Tiles(2, 3, 32, overlap_px), 4, 4.0)
    found = spread(torch.ones(1, 8, 12))
    assert found.shape == (1, 64 - overlap_px, 96 - 2 * overlap_px)
    torch.testing.assert_close(found, torch.ones_like(found))


def test_in_an_overlap_the_values_of_two_tiles_blend_linearly() -> None:
    spread = Spread.of(Tiles(1, 2, 32, 8), 4, 0.0)
    distance = torch.cat([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)], dim=2)
    row = spread(distance)[0, 0]
    torch.testing.assert_close(row[24:32], (torch.arange(8) + 0.5) / 8)
    assert (row[:24] == 0).all()
    torch.testing.assert_close(row[32:], torch.ones(24))


@pytest.mark.parametrize("density", DENSITIES)
def test_of_a_homogeneous_texture_a_map_jumps_at_no_seam(data: str, tmp_path: Path, density: str) -> None:
    """From one pixel to the next, maps change hardly more where tiles overlap than within tiles; unblended they jump."""
    side = 64

    def steps(overlap: float, sigma_px: float) -> tuple[float, float]:
        """The largest change at a seam, and elsewhere."""
        scoring = {"smoothing_sigma_px": sigma_px}
        config = small_config(
            data, tmp_path, model={**model(density, (2, 2), overlap), "image_size_px": side}, scoring=scoring
        )
        images = textures(40, config.model.frame_px)
        detector = fit(config, MemoryShard(images[:16], images[16:20]), 16, torch.device("cpu")).detector
        maps = detector(images[20:]).anomaly_map
        first, last = side - config.model.overlap_px - 1, side - 1  # pixels that a seam parts from their next ones
        changes = [maps.diff(dim=2).abs().amax(dim=(0, 1)), maps.diff(dim=1).abs().amax(dim=(0, 2))]
        seams = torch.cat([change[first : last + 1] for change in changes])
        others = torch.cat([torch.cat([change[:first], change[last + 1 :]]) for change in changes])
        return float(seams.max()), float(others.max())

    seam, within = steps(0.25, 4.0)
    assert seam <= 1.25 * within
    seam, within = steps(0.0, 0.0)
    assert seam > 5 * within


def textures(count: int, size: tuple[int, int]) -> Tensor:
    noise = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return torch.from_numpy(noise)


@pytest.mark.parametrize("density", DENSITIES)
def test_one_tile_that_covers_the_image_gives_what_no_tiling_gives(data: str, tmp_path: Path, density: str) -> None:
    def fitted(tiling: dict[str, Any] | None) -> FitResult:
        sections: dict[str, Any] = {
            "model": {"image_size_px": 64, "image_alignment": NONE, "tiling": tiling},
            "density": {"reduction": "discriminant"},
            "scoring": {"image_score": "profile"},
        }
        return fit_alone(small_config(data, tmp_path, **sections))

    plain = fitted(None)
    tiled = fitted({"grid": [1, 1], "overlap": 0.0, "density": density})
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8))
    one, other = plain.detector(images), tiled.detector(images)
    assert torch.equal(one.score, other.score)
    assert torch.equal(one.anomaly_map, other.anomaly_map)
    assert plain.calibration == tiled.calibration


@pytest.mark.parametrize("density", DENSITIES)
def test_a_map_shows_a_defect_where_it_is_in_the_photograph(bundles: dict[str, str], density: str, data: str) -> None:
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


def test_a_shared_density_leaves_out_all_tiles_of_an_image_of_its_bank() -> None:
    config = DensityConfig(coreset=16, reduction="discriminant", precision="fp32")
    values = torch.randn(6, 5 + 4, 8, 12, generator=torch.Generator().manual_seed(0))

    def shared(images: Tensor) -> TiledDensity:
        moments = Moments(4, 4, 5)
        moments.update(split_maps(images[:, :5], 2, 3))
        density = build_density(config, Statistics(moments, to_bank_rows(images), grid=(2, 3)))
        assert isinstance(density, TiledDensity)
        return density

    whole = shared(values)
    places = whole.tile_density.location_memory  # type: ignore[attr-defined]
    others = shared(torch.cat([values[:2], values[3:]])).tile_density.location_memory  # type: ignore[attr-defined]
    tiles = split_maps(values[2:3, :5], 2, 3)
    numbers = (2 * 6 + torch.arange(6)).expand(6, 6)
    torch.testing.assert_close(places.score(tiles, numbers), others.score(tiles), atol=1e-3, rtol=1e-3)
    left_out = whole.score(values[2:3], torch.tensor([2]))
    assert left_out.shape == (1, 8, 12)
    assert float(left_out.mean()) > 2 * float(whole.score(values[2:3]).mean())


def test_a_place_that_tiles_share_keeps_as_much_as_those_it_stands_for() -> None:
    values = torch.randn(9, 5, 8, 12, generator=torch.Generator().manual_seed(0))
    moments = Moments(4, 4, 5)
    moments.update(split_maps(values, 2, 3))
    config = DensityConfig(coreset=0, reduction="discriminant", precision="fp32", per_place=2)
    density = build_density(config, Statistics(moments, to_bank_rows(values), grid=(2, 3)))
    assert isinstance(density, TiledDensity)
    assert density.tile_density.bank.shape == (16, 2 * 6, 5)
    assert density.score(values, torch.arange(9)).isfinite().all()


def test_statistics_of_shared_places_count_images(bundles: dict[str, str]) -> None:
    for kind in DENSITIES:
        statistics = read_statistics(bundles[kind])
        assert statistics.bank is not None
        assert statistics.num_images == len(statistics.bank) == read_manifest(bundles[kind])["data"]["num_fit"]
        assert statistics.bank.shape[1] == (2 * SIDE // 8) * (3 * SIDE // 8)
    shared, apart = (read_statistics(bundles[kind]) for kind in ("shared", "per_tile"))
    assert shared.num_images == apart.num_images == shared.moments.count // 6
    assert shared.moments.mean.shape[0] * 6 == apart.moments.mean.shape[0]


# From fit to verdict


@pytest.mark.parametrize("density", DENSITIES)
def test_calibration_counts_images_and_not_tiles(data: str, bundles: dict[str, str], density: str) -> None:
    bundle = read_bundle(bundles[density])
    assert bundle.calibration.num_images == len(plan_category(bundle.config, "gear").holdout_rows)


@pytest.mark.parametrize("density", DENSITIES)
def test_a_bundle_scores_as_the_fit_that_it_holds(data: str, tmp_path: Path, density: str) -> None:
    config = small_config(data, tmp_path, model=model(density), scoring={"image_score": "profile"})
    result = fit_alone(config)
    read = read_bundle(make_bundle(config))
    images = textures(3, config.model.frame_px)
    one, other = result.detector(images), read.detector(images)
    torch.testing.assert_close(other.score, one.score, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(other.anomaly_map, one.anomaly_map, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("density", DENSITIES)
def test_a_tiled_category_is_evaluated_like_any(data: str, bundles: dict[str, str], density: str) -> None:
    inspector, records = Inspector.load(bundles[density], "cpu", batch_size=3), list(iter_test_records(data, "gear"))
    found = inspector.evaluate(records)
    assert (found["num_normal"], found["num_anomalous"], found["num_masks"]) == (4, 4, 4)
    inspections = inspector.inspect([record["image"] for record in records])
    maps = np.stack([resize_map(one.anomaly_map, 64, 64) for one in inspections])
    masks = [np.zeros((64, 64), bool) if r["mask"] is None else decode_mask(r["mask"], 64, 64) for r in records]
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(np.stack(masks).ravel(), maps.ravel()), abs=1e-4)
    labels = [record["label"] for record in records]
    assert found["image_auroc"] == roc_auc_score(labels, [one.score for one in inspections])


@pytest.mark.parametrize("density", DENSITIES)
def test_images_are_taken_out_of_a_tiled_bundle_again(
    data: str, bundles: dict[str, str], tmp_path: Path, density: str
) -> None:
    place = str(tmp_path / "more")
    manifest = update_bundle(bundles[density], place, add=data, calibrate=data)
    before, after = read_statistics(bundles[density]), read_statistics(place)
    added = sum(label == 0 for label in read_index(data, "gear", "train")["label"].to_pylist())
    assert manifest["data"]["num_fit"] == after.num_images == before.num_images + added
    update_bundle(place, tmp_path / "less", remove=data, calibrate=data)
    assert read_statistics(tmp_path / "less").num_images == before.num_images


def test_cross_calibration_selection_and_training_know_tiles(data: str, tmp_path: Path) -> None:
    for kind in DENSITIES:
        sections: dict[str, Any] = {
            "model": model(kind, (1, 2)),
            "train": {"epochs": 1},
            "selection": {"enabled": True, "fraction": 0.1},
            "calibration": {"method": "cross", "num_folds": 2},
            "density": {"reduction": "discriminant"},
            "scoring": {"image_score": "profile"},
        }
        config = small_config(data, tmp_path, **sections)
        result = fit_alone(config)
        plan = plan_category(config, "gear")  # images that validated calibrate too, once nothing is left to be selected
        assert result.calibration.num_images == len(plan.fit_rows) + len(plan.validation_rows)
        assert len(result.notes.history) == 1
        assert len(result.notes.selection) == 2


@pytest.mark.parametrize("density", DENSITIES)
def test_a_few_images_in_tiles_are_each_left_out_whole(data: str, tmp_path: Path, density: str) -> None:
    """With folds of the metric and without: an image is left out with all of its tiles, so scores are like new images'."""
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


def test_images_cannot_be_left_out_of_moments_that_tiles_share(data: str, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": model("shared"), "density": {"kind": "gaussian"}}
    left_out = small_config(data, tmp_path, **sections, calibration={"method": "leave_one_out"})
    with pytest.raises(
        ConfigError, match=r"kind gaussian, shared by tiles, cannot leave an image out: set calibration\.method"
    ):
        check_ingredients(left_out)
    calibration = {"method": "auto", "target_fpr": 0.05}
    result = fit_alone(small_config(data, tmp_path, **sections, calibration=calibration))
    assert result.calibration.method == "cross"


def test_tiled_models_of_one_backbone_share_a_pass(bundles: dict[str, str]) -> None:
    first, second = (read_bundle(bundles[kind]).detector for kind in DENSITIES)
    second.net.backbone = first.net.backbone
    assert share_a_pass(first, second)
    images = textures(3, first.net.config.frame_px)
    together = score_together([(first, images), (second, images[:2])])
    for scored, detector, count in zip(together, (first, second), (3, 2), strict=True):
        alone = detector(images[:count])
        torch.testing.assert_close(scored.score, alone.score, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(scored.anomaly_map, alone.anomaly_map, rtol=1e-3, atol=1e-3)


def test_images_are_counted_at_the_size_of_all_tiles_against_the_memory(data: str, tmp_path: Path) -> None:
    config = small_config(data, tmp_path, model=model("shared"), data={"memory_budget_mb": 0.25})
    plan = plan_category(config, "gear")
    assert plan.num_images * SIDE**2 * 3 < 0.25 * 2**20 < plan.num_images * 56 * 80 * 3
    assert not fits_memory(config, plan)
    streamed = build_shard(config, "gear", plan, 0, 1)
    kept = build_shard(small_config(data, tmp_path, model=model("shared")), "gear", plan, 0, 1)
    assert torch.equal(torch.cat(list(streamed.fit_batches())), torch.cat(list(kept.fit_batches())))
    assert frame_of(config, "gear").shape == (56, 80, 3)


def test_tiling_with_alignment_is_refused() -> None:
    tree = {"data": {"uri": "images"}, "model": {"tiling": {"grid": [2, 2]}}}
    with pytest.raises(
        ConfigError, match=r"tiling does not go with alignment, .*: set model\.image_alignment\.group=none"
    ):
        parse_config(tree)
    tree["model"].update(image_alignment=NONE, feature_alignment={"layer2": "rotation"})
    with pytest.raises(ConfigError, match=r"set model\.feature_alignment\.layer2=none, or leave tiling out"):
        parse_config(tree)
