"""Images that keep their aspect ratio (model.resize=pad).

Padding is never scored, results are in image coordinates, and an image or a region of interest that is too thin to cover a cell
of the anomaly map gives an error and never a verdict.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_sources import encode, ingest_quietly, save_all
from numpy.typing import NDArray
from PIL import Image
from small_set import fit_alone, make_bundle, small_config

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.framing import InputFrame
from focus_ray.data.images import MAX_PIXELS, ImageError, decode_batch_with_info, decode_image, encode_png
from focus_ray.data.read import read_test_rows
from focus_ray.density.tiles import TileGrid
from focus_ray.detect.detector import compute_scored_locations, embed_images
from focus_ray.detect.inspection import Inspection
from focus_ray.detect.pictures import draw_inspection_overlay
from focus_ray.errors import DataError
from focus_ray.evaluation.batch_inspection import inspect_records
from focus_ray.export.scorer import ExportableScorer
from focus_ray.features.network import convert_to_float_images
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import Config
from focus_ray.fitting.split import compute_split_rule
from focus_ray.serving.decoders import DecoderPool
from focus_ray.serving.scorer import RequestScores, _convert_scores_to_results

WIDTH, HEIGHT = 120, 60  # size of the photographs in pixels


def photograph(
    rng: np.random.Generator, spot: tuple[int, int] | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Returns a photograph of stripes with noise, and the mask of its spot of 10 px. spot: its left top corner (x, y)."""
    stripes = 128 + 60 * np.sin(np.arange(WIDTH) / 6)
    pixels = np.clip(stripes[None, :, None] + rng.normal(0, 4, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    if spot is not None:
        x, y = spot
        pixels[y : y + 10, x : x + 10] = (255, 0, 255)
        mask[y : y + 10, x : x + 10] = True
    return pixels, mask


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    images = {f"train/good/{number:02d}.png": photograph(rng)[0] for number in range(14)}
    for number in range(4):
        images[f"test/good/{number:02d}.png"] = photograph(rng)[0]
        pixels, mask = photograph(rng, (10 + 25 * number, 10 + 10 * number))
        images |= {f"test/spot/{number:02d}.png": pixels, f"ground_truth/spot/{number:02d}_mask.png": mask}
    ingest_quietly(save_all(folder / "belt", images), folder / "data")
    return str(folder / "data")


@pytest.fixture(scope="module")
def bundle(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(padded_config(data, tmp_path_factory.mktemp("runs")), "belt")


@pytest.fixture(scope="module")
def inspector(bundle: str) -> Inspector:
    return Inspector.load(bundle, "cpu")


def padded_config(data: str, folder: Path, region: Any = None, **sections: Any) -> Config:
    """Returns a configuration with padding and without alignment. region: region of interest; sections: further settings."""
    images = {"categories": ["belt"], "regions": {} if region is None else {"belt": region}}
    model = {"resize": "pad", **sections.pop("model", {})}
    return small_config(data, folder, data=images, model=model, **sections)


# Decoding


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_a_padded_image_keeps_its_aspect_ratio_touches_two_sides_and_is_centred(width: int, height: int) -> None:
    box = InputFrame(64, 96, "pad").compute_image_rectangle(width, height)
    assert box.height == 64 or box.width == 96
    assert abs(box.width - box.height * width / height) <= 1 + width / height
    assert abs(box.top - (64 - box.top - box.height)) <= 1
    assert abs(box.left - (96 - box.left - box.width)) <= 1


def test_a_padded_image_is_surrounded_by_mirrored_padding_that_is_marked_as_not_scored() -> None:
    pixels = photograph(np.random.default_rng(1))[0]
    framed = decode_image(encode_png(pixels), InputFrame(64, 64, "pad"))
    assert framed.shape == (64, 64, 4)
    resized = np.asarray(Image.fromarray(pixels).resize((64, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(framed[16:48, :, :3], resized)
    np.testing.assert_array_equal(framed[:16, :, :3], resized[:16][::-1])
    np.testing.assert_array_equal(framed[48:, :, :3], resized[-16:][::-1])
    assert (framed[16:48, :, 3] == 255).all()
    assert not framed[:16, :, 3].any()
    assert not framed[48:, :, 3].any()


def test_a_photograph_is_rotated_by_its_exif_tag_before_it_is_padded() -> None:
    image, exif = Image.fromarray(photograph(np.random.default_rng(1))[0]), Image.Exif()
    exif[0x0112] = 6
    framed = decode_image(encode(image, "JPEG", exif=exif), InputFrame(64, 64, "pad"))
    assert (framed[:, 16:48, 3] == 255).all()
    assert not framed[:, :16, 3].any()


def test_stretched_images_have_three_channels() -> None:
    data = encode_png(photograph(np.random.default_rng(1))[0])
    np.testing.assert_array_equal(decode_image(data, InputFrame(64, 64)), decode_image(data, 64))
    assert decode_image(data, InputFrame(32, 64)).shape == (32, 64, 3)
    assert decode_batch_with_info([], InputFrame(32, 64, "pad"))[1].shape == (0, 32, 64, 4)


# Scoring


def test_the_padding_is_not_scored(inspector: Inspector) -> None:
    batch = decode_image(encode_png(photograph(np.random.default_rng(2))[0]), inspector.frame)[None]
    changed = batch.copy()
    changed[:, :8, :, :3] = 255  # far enough from the image not to change the scores of its patches
    (score, _), maps = zip(*map(inspector.score, (batch, changed)), strict=True)
    for anomaly_map in maps:
        assert (anomaly_map[0, :16] == 0).all()
        assert (anomaly_map[0, 48:] == 0).all()
        assert (anomaly_map[0, 16:48] > 0).all()
    assert float(score[0]) > 0


def test_the_box_of_a_defect_is_in_pixels_of_the_photograph(inspector: Inspector) -> None:
    pixels, _ = photograph(np.random.default_rng(3), (80, 40))
    (inspection,) = inspector.inspect([encode_png(pixels)])
    assert (inspection.width, inspection.height, inspection.anomaly_map.shape) == (WIDTH, HEIGHT, (32, 64))
    assert inspection.anomalous
    region = inspection.regions[0]
    assert region.x <= 85 < region.x + region.width
    assert region.y <= 45 < region.y + region.height
    assert draw_inspection_overlay(pixels, inspection).shape == pixels.shape


def test_the_service_gives_the_results_of_the_inspector_and_an_error_for_a_thin_image(inspector: Inspector) -> None:
    images = [encode_png(photograph(np.random.default_rng(n), (20, 20))[0]) for n in range(2)]
    images.insert(1, encode_png(strip(512, 8)))
    decoded = asyncio.run(DecoderPool(1).decode_images("press", images, inspector.frame, MAX_PIXELS))
    score, maps = inspector.score(np.stack([item[1] for item in decoded if isinstance(item, tuple)]))
    results, pictures, values = _convert_scores_to_results(
        inspector, images, decoded, RequestScores(score, maps, 0.0, 0.0), "overlay", True
    )
    expected = inspector.inspect(images[::2])
    assert [result.to_dict() for result in results[::2]] == [inspection.to_dict() for inspection in expected]
    assert isinstance(results[1], ImageError)
    assert decode_image(pictures[0], None).shape == (HEIGHT, WIDTH, 3)
    assert decode_image(values[0].png, None).shape == (32, 64, 3)
    assert pictures[1] is None
    nan_scores = RequestScores(np.array([np.nan, 1.0], np.float32), np.zeros((2, 64, 64), np.float32), 0.0, 0.0)
    results, _, _ = _convert_scores_to_results(inspector, images[::2], decoded[::2], nan_scores, "json", False)
    assert list(map(type, results)) == [ImageError, Inspection]


def test_masks_of_padded_images_match_the_defects(inspector: Inspector, data: str) -> None:
    metrics = inspector.evaluate(read_test_rows(data, "belt"))
    assert (metrics["num_normal"], metrics["num_anomalous"], metrics["num_masks"]) == (4, 4, 4)
    assert metrics["image_auroc"] == 1.0
    assert metrics["pixel_auroc"] > 0.9


TILED = {
    "model": {"tiling": {"grid": [2, 2], "overlap": 0.25}, "image_size_px": 32},
    "scoring": {"image_score": "profile"},
}
ALIGNED = {
    "model": {"image_alignment": {"group": "rotation", "min_drop": 0.0}},
    "selection": {"fraction": 0.2},
}


@pytest.mark.parametrize("sections", [{**TILED, "density": {"reduction": "discriminant"}}, ALIGNED])
def test_padding_works_with_tiles_metric_and_profile_and_with_alignment_and_selection(
    data: str, tmp_path: Path, sections: dict[str, Any]
) -> None:
    config = padded_config(data, tmp_path, **sections)
    result = fit_alone(config, "belt")
    assert result.statistics.shown is not None
    assert 0 < float(result.statistics.shown.float().mean()) < 1
    frame = load_frame(config, "belt")
    image = decode_image(encode_png(photograph(np.random.default_rng(4))[0]), frame)
    anomaly_map = result.detector(torch.from_numpy(image)[None]).anomaly_map[0]
    assert (anomaly_map[torch.from_numpy(image[..., 3] == 0)] == 0).all()
    assert anomaly_map.shape == frame.shape[:2]


# Thin images

BAND = [[0, 0.4], [1, 0.4], [1, 0.6], [0, 0.6]]


def strip(width: int, height: int) -> NDArray[np.uint8]:
    """Returns an image of noise, which is very different from a good part."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("tiling", [None, {"grid": [2, 3], "overlap": 0.25}, {"grid": [3, 1], "overlap": 0.1}])
@pytest.mark.parametrize("region", [None, BAND])
def test_the_frame_refuses_exactly_the_sizes_without_an_inspected_cell(
    tiling: Any, region: Any, data: str, tmp_path: Path
) -> None:
    config = padded_config(data, tmp_path, region, model={"tiling": tiling})
    frame, tiles = load_frame(config, "belt"), TileGrid(*config.model.tile_layout)
    side = config.model.image_size_px // config.model.location_side_px(config.density.map_layer)
    num_refused = 0
    for longer in (8, 16, 24, 32, 48, 64, 128):
        for width, height in ((longer * 8, 8), (8, longer * 8), (longer * 8, 17)):
            scored = torch.from_numpy(frame.make_scored_channel(frame.compute_image_rectangle(width, height)))[None] > 0
            is_inspected = compute_scored_locations(
                scored, None, tiles, (side * tiles.rows, side * tiles.columns)
            ).any()
            if is_inspected:
                frame.require_scored_pixels(width, height)
            else:
                num_refused += 1
                with pytest.raises(DataError, match=f"{width} x {height} pixels"):
                    frame.require_scored_pixels(width, height)
    assert num_refused


def test_the_error_states_whether_the_image_or_its_region_is_too_thin(data: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"too thin .*: cut the image .*model\.resize=stretch"):
        decode_image(encode_png(strip(512, 8)), load_frame(padded_config(data, tmp_path), "belt"))
    banded_frame = load_frame(padded_config(data, tmp_path, BAND), "belt")
    with pytest.raises(ImageError, match=r"region of interest .*data\.regions"):
        decode_image(encode_png(strip(512, 64)), banded_frame)
    assert decode_image(encode_png(strip(512, 512)), banded_frame).shape == (64, 64, 4)


def test_inspection_of_a_thin_image_gives_an_error_and_no_verdict(inspector: Inspector, tmp_path: Path) -> None:
    thin, fine = tmp_path / "thin.png", tmp_path / "fine.png"
    thin.write_bytes(encode_png(strip(512, 8)))
    fine.write_bytes(encode_png(strip(512, 128)))
    with pytest.raises(DataError, match=rf"^{thin}: .*512 x 8 pixels"):
        inspector.inspect([fine, thin])
    error, finding = inspector.inspect_or_return_errors([thin.read_bytes(), fine.read_bytes()])
    assert isinstance(error, DataError)
    assert isinstance(finding, Inspection)
    assert finding.anomalous
    record = {"id": "belt/bad/thin", "label": 1, "defect_type": "bad", "site": "", "image": thin.read_bytes()}
    assert "512 x 8" in inspect_records(inspector, [record])["error"][0].as_py()
    labelled_record = {**record, "mask": None, "width": 512, "height": 8}
    with pytest.raises(DataError, match=r"^belt/bad/thin: .*512 x 8"):
        inspector.evaluate([labelled_record])


def test_training_is_refused_with_the_names_of_thin_images(tmp_path: Path) -> None:
    images = {f"good/{number:02}.png": strip(512 - number, 8 if number in (2, 5) else 128) for number in range(8)}
    ingest_quietly(save_all(tmp_path / "belt", images), tmp_path / "data")
    config = padded_config(str(tmp_path / "data"), tmp_path)
    with pytest.raises(DataError, match=r"2 of 8 normal training images .*: belt/\S*02, belt/\S*05\."):
        compute_split_rule(config, "belt")
    assert compute_split_rule(small_config(str(tmp_path / "data"), tmp_path), "belt").num_images == 8


def test_an_image_without_a_cell_after_alignment_has_no_score(inspector: Inspector) -> None:
    """The strip covers half of a cell before alignment, and a quarter after alignment has halved its size."""
    pixels = decode_image(encode_png(strip(64, 8)), inspector.frame)
    batch = torch.from_numpy(np.stack([pixels, decode_image(encode_png(strip(64, 64)), inspector.frame)]))
    theta = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]).expand(2, 2, 3)
    detector = inspector.bundle.detector
    embedding, _ = embed_images(detector.net, detector.reduction, convert_to_float_images(batch, "cpu"))
    scored = detector.score_embeddings(embedding, theta, batch[..., 3] > 0)
    assert torch.isnan(scored.score).tolist() == [True, False]
    with pytest.raises(ImageError, match="no location of the anomaly map"):
        inspector.compare_with_thresholds(float(scored.score[0]), scored.anomaly_map[0].numpy(), 64, 8)


def test_an_export_calls_an_image_without_inspected_cells_anomalous_and_gives_no_score(bundle: str) -> None:
    scorer = ExportableScorer(read_bundle(bundle, precision="fp32"))
    for size, is_inspected in (((512, 8), False), ((512, 128), True)):
        score, _, anomalous, _, _ = scorer(torch.from_numpy(strip(*size))[None])
        assert bool(torch.isfinite(score[0])) == is_inspected
        assert bool(anomalous[0])
