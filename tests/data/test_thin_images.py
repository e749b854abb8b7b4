"""An image, or a region of interest, that is too thin to cover a cell of the anomaly map gives an error and never a verdict."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_sources import ingest_quietly, save_all
from small_set import ingest_parts, make_bundle, small_config

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.images import MAX_PIXELS, ImageError, decode_image, encode_png
from focus_ray.density.tiles import TileGrid
from focus_ray.detect.detector import compute_scored_locations, embed_images
from focus_ray.detect.inspection import Inspection
from focus_ray.errors import DataError
from focus_ray.evaluation.batch_inspection import inspect_records
from focus_ray.export.scorer import ExportableScorer
from focus_ray.features.network import convert_to_float_images
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import Config
from focus_ray.fitting.split import compute_split_rule
from focus_ray.serving.decoders import DecoderPool
from focus_ray.serving.scorer import RequestScores, _convert_scores_to_results

NO_ALIGNMENT = {"image_alignment": {"group": "none"}}
BAND = [[0, 0.4], [1, 0.4], [1, 0.6], [0, 0.6]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def bundle(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(padded_config(data, tmp_path_factory.mktemp("runs")))


def padded_config(data: str, folder: Path, region: Any = None, **model: Any) -> Config:
    regions = {} if region is None else {"gear": region}
    return small_config(data, folder, data={"regions": regions}, model={"resize": "pad", **NO_ALIGNMENT, **model})


def strip(width: int, height: int) -> np.ndarray[Any, Any]:
    """Returns an image of noise, which is very different from a good part."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("tiling", [None, {"grid": [2, 3], "overlap": 0.25}, {"grid": [3, 1], "overlap": 0.1}])
@pytest.mark.parametrize("region", [None, BAND])
def test_the_frame_refuses_exactly_the_sizes_without_an_inspected_cell(
    tiling: Any, region: Any, data: str, tmp_path: Path
) -> None:
    config = padded_config(data, tmp_path, region, tiling=tiling)
    frame, tiles = load_frame(config, "gear"), TileGrid(*config.model.tile_layout)
    side = config.model.image_size_px // config.model.location_side_px(config.density.map_layer)
    num_refused = 0
    for longer in (8, 16, 24, 32, 48, 64, 128):
        for width, height in ((longer * 8, 8), (8, longer * 8), (longer * 8, 17)):
            scored = torch.from_numpy(frame.make_scored_channel(frame.compute_image_rectangle(width, height)))[None] > 0
            is_inspected = compute_scored_locations(
                scored, None, tiles, (side * tiles.rows, side * tiles.columns)
            ).any()
            if is_inspected:
                frame.check_image_size(width, height)
            else:
                num_refused += 1
                with pytest.raises(DataError, match=f"{width} x {height} pixels"):
                    frame.check_image_size(width, height)
    assert num_refused


def test_the_error_states_whether_the_image_or_its_region_is_too_thin(data: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"too thin .*: cut the image .*model\.resize=stretch"):
        decode_image(encode_png(strip(512, 8)), load_frame(padded_config(data, tmp_path), "gear"))
    banded_frame = load_frame(padded_config(data, tmp_path, BAND), "gear")
    with pytest.raises(ImageError, match=r"region of interest .*data\.regions"):
        decode_image(encode_png(strip(512, 64)), banded_frame)
    assert decode_image(encode_png(strip(512, 512)), banded_frame).shape == (64, 64, 4)


def test_inspection_of_a_thin_image_gives_an_error_and_no_verdict(bundle: str, data: str, tmp_path: Path) -> None:
    inspector = Inspector.load(bundle, "cpu")
    thin, fine = tmp_path / "thin.png", tmp_path / "fine.png"
    thin.write_bytes(encode_png(strip(512, 8)))
    fine.write_bytes(encode_png(strip(512, 128)))
    with pytest.raises(DataError, match=rf"^{thin}: .*512 x 8 pixels"):
        inspector.inspect([fine, thin])
    error, finding = inspector.inspect_or_return_errors([thin.read_bytes(), fine.read_bytes()])
    assert isinstance(error, DataError)
    assert isinstance(finding, Inspection)
    assert finding.anomalous
    record = {"id": "gear/bad/thin", "label": 1, "defect_type": "bad", "site": "", "image": thin.read_bytes()}
    assert "512 x 8" in inspect_records(inspector, [record])["error"][0].as_py()
    labelled_record = {**record, "mask": None, "width": 512, "height": 8}
    with pytest.raises(DataError, match=r"^gear/bad/thin: .*512 x 8"):
        inspector.evaluate([labelled_record])


def test_the_service_gives_an_error_for_a_thin_image_and_no_verdict(bundle: str) -> None:
    inspector = Inspector.load(bundle, "cpu")
    images = [encode_png(strip(512, 8)), encode_png(strip(512, 128))]
    decoded = asyncio.run(DecoderPool(1).decode_images("press", images, inspector.frame, MAX_PIXELS))
    scored = inspector.score(np.stack([item[1] for item in decoded if isinstance(item, tuple)]))
    results, pictures, _ = _convert_scores_to_results(
        inspector, images, decoded, RequestScores(*scored, 0.0, 0.0), "overlay", False
    )
    assert isinstance(results[0], ImageError)
    assert pictures[0] is None
    assert isinstance(results[1], Inspection)
    nan_scores = RequestScores(np.array([np.nan, 1.0], np.float32), np.zeros((2, 64, 64), np.float32), 0.0, 0.0)
    fine_twice = [decoded[1], decoded[1]]
    results, _, _ = _convert_scores_to_results(inspector, images, fine_twice, nan_scores, "json", False)
    assert isinstance(results[0], ImageError)
    assert isinstance(results[1], Inspection)


def test_training_is_refused_with_the_names_of_thin_images(tmp_path: Path) -> None:
    images = {f"good/{number:02}.png": strip(512 - number, 8 if number in (2, 5) else 128) for number in range(8)}
    ingest_quietly(save_all(tmp_path / "belt", images), tmp_path / "data")
    config = padded_config(str(tmp_path / "data"), tmp_path)
    with pytest.raises(DataError, match=r"2 of 8 normal training images .*: belt/\S*02, belt/\S*05\."):
        compute_split_rule(config, "belt")
    assert (
        compute_split_rule(small_config(str(tmp_path / "data"), tmp_path, model=NO_ALIGNMENT), "belt").num_images == 8
    )


def test_an_image_without_a_cell_after_alignment_has_no_score(data: str, tmp_path: Path) -> None:
    """The strip covers half of a cell before alignment, and a quarter after alignment has halved its size."""
    uri = make_bundle(padded_config(data, tmp_path))
    inspector = Inspector.load(uri, "cpu")
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
