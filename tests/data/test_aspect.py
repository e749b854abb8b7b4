"""Images that keep their aspect ratio (model.resize=pad): padding is never scored, and results are in image coordinates."""

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

from focus_ray.bundle.inspector import Inspector
from focus_ray.data.framing import InputFrame
from focus_ray.data.images import MAX_PIXELS, decode_batch_with_info, decode_image, encode_png
from focus_ray.data.read import read_test_rows
from focus_ray.detect.inspection import Inspection
from focus_ray.detect.pictures import draw_inspection_overlay
from focus_ray.fitting.regions import load_frame
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
def inspector(data: str, tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    return Inspector.load(make_bundle(padded_config(data, tmp_path_factory.mktemp("runs")), "belt"), "cpu")


def padded_config(data: str, folder: Path, model: dict[str, Any] | None = None, **sections: Any) -> Any:
    settings = {"resize": "pad", "image_alignment": {"group": "none"}, **(model or {})}
    return small_config(data, folder, data={"categories": ["belt"]}, model=settings, **sections)


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


def test_the_service_gives_the_results_of_the_inspector(inspector: Inspector) -> None:
    images = [encode_png(photograph(np.random.default_rng(n), (20, 20))[0]) for n in range(2)]
    decoded = asyncio.run(DecoderPool(1).decode_images("press", images, inspector.frame, MAX_PIXELS))
    score, maps = inspector.score(np.stack([item[1] for item in decoded if isinstance(item, tuple)]))
    results, pictures, values = _convert_scores_to_results(
        inspector, images, decoded, RequestScores(score, maps, 0.0, 0.0), "overlay", True
    )
    for result, expected in zip(results, inspector.inspect(images), strict=True):
        assert isinstance(result, Inspection)
        assert result.to_dict() == expected.to_dict()
    assert decode_image(pictures[0] or b"", None).shape == (HEIGHT, WIDTH, 3)
    assert values[0] is not None
    assert decode_image(values[0].png, None).shape == (32, 64, 3)


def test_masks_of_padded_images_match_the_defects(inspector: Inspector, data: str) -> None:
    metrics = inspector.evaluate(read_test_rows(data, "belt"))
    assert (metrics["num_normal"], metrics["num_anomalous"], metrics["num_masks"]) == (4, 4, 4)
    assert metrics["image_auroc"] == 1.0
    assert metrics["pixel_auroc"] > 0.9


TILED = {
    "model": {"tiling": {"grid": [2, 2], "overlap": 0.25}, "image_size_px": 32},
    "scoring": {"image_score": "profile"},
}
ALIGNED = {"model": {"image_alignment": {"min_drop": 0.0}}, "selection": {"enabled": True, "fraction": 0.2}}


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
