"""Images so thin, or with so thin a region of interest, that no place of the map shows them: an error, never a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_set import ingest_parts, make_bundle, small_config

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.cluster.batch import findings
from focus_ray.config import Config
from focus_ray.data.images import ImageError, decode_image, encode_png
from focus_ray.data.ingest import ingest
from focus_ray.data.regions import frame_of
from focus_ray.data.split import split_category
from focus_ray.density.tiles import Tiles
from focus_ray.errors import DataError
from focus_ray.evaluation.inspection import Inspection
from focus_ray.export.scorer import Scorer
from focus_ray.fitting.scoring import embed, shown_locations, to_images
from focus_ray.serving.scorer import Scores, _decode, _judge

STILL = {"image_alignment": {"group": "none"}}
BAND = [[0, 0.4], [1, 0.4], [1, 0.6], [0, 0.6]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def bundle(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(padded(data, tmp_path_factory.mktemp("runs")))


def padded(data: str, folder: Path, **model: Any) -> Config:
    return small_config(data, folder, model={"resize": "pad", **STILL, **model})


def strip(width: int, height: int) -> np.ndarray[Any, Any]:
    """Noise, as unlike a good part as can be."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("tiling", [None, {"grid": [2, 3], "overlap": 0.25}, {"grid": [3, 1], "overlap": 0.1}])
@pytest.mark.parametrize("region", [None, BAND])
def test_the_frame_refuses_exactly_the_sizes_of_which_the_detector_inspects_no_place(
    tiling: Any, region: Any, data: str, tmp_path: Path
) -> None:
    regions = {} if region is None else {"regions": {"gear": region}}
    config = small_config(data, tmp_path, data=regions, model={"resize": "pad", "tiling": tiling, **STILL})
    frame, tiles = frame_of(config, "gear"), Tiles.from_config(config.model)
    side = config.model.image_size_px // config.model.place_px(config.density)
    refused = 0
    for longer in (8, 16, 24, 32, 48, 64, 128):
        for width, height in ((longer * 8, 8), (8, longer * 8), (longer * 8, 17)):
            shown = torch.from_numpy(frame.shown(frame.box(width, height)))[None] > 0
            inspected = shown_locations(shown, None, tiles, (side * tiles.rows, side * tiles.columns)).any()
            if inspected:
                frame.check_size(width, height)
            else:
                refused += 1
                with pytest.raises(
                    DataError, match=f"the image of {width} x {height} pixels .* so nothing would be inspected"
                ):
                    frame.check_size(width, height)
    assert refused


def test_the_error_tells_whether_the_image_or_its_region_is_too_thin(data: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"too thin for any place .*: cut the image .* or with model\.resize=stretch"):
        decode_image(encode_png(strip(512, 8)), frame_of(padded(data, tmp_path), "gear"))
    banded = frame_of(
        small_config(data, tmp_path, data={"regions": {"gear": BAND}}, model={"resize": "pad", **STILL}), "gear"
    )
    with pytest.raises(ImageError, match=r"its region of interest is too thin .*: enlarge data\.regions, or train"):
        decode_image(encode_png(strip(512, 64)), banded)
    assert decode_image(encode_png(strip(512, 512)), banded).shape == (64, 64, 4)


def test_inspection_gives_an_error_in_place_of_a_verdict(bundle: str, data: str, tmp_path: Path) -> None:
    inspector = Inspector.load(bundle, "cpu")
    thin, fine = tmp_path / "thin.png", tmp_path / "fine.png"
    thin.write_bytes(encode_png(strip(512, 8)))
    fine.write_bytes(encode_png(strip(512, 128)))
    with pytest.raises(DataError, match=rf"^{thin}: the image of 512 x 8 pixels .* model\.resize=stretch"):
        inspector.inspect([fine, thin])
    error, finding = inspector.inspect_each([thin.read_bytes(), fine.read_bytes()])
    assert isinstance(error, DataError)
    assert isinstance(finding, Inspection)
    assert finding.anomalous
    record = {"id": "gear/bad/thin", "label": 1, "defect_type": "bad", "site": "", "image": thin.read_bytes()}
    assert "512 x 8" in findings(inspector, [record])["error"][0].as_py()
    measured = {**record, "mask": None, "width": 512, "height": 8}
    with pytest.raises(DataError, match=r"^gear/bad/thin: the image of 512 x 8"):
        inspector.evaluate([measured])


def test_the_service_gives_an_error_in_place_of_a_verdict(bundle: str) -> None:
    inspector = Inspector.load(bundle, "cpu")
    images = [encode_png(strip(512, 8)), encode_png(strip(512, 128))]
    decoded = _decode(images, inspector.frame)
    scored = inspector.score(np.stack([one[1] for one in decoded if isinstance(one, tuple)]))
    results, pictures, _ = _judge(inspector, images, decoded, Scores(*scored, 0.0, 0.0), "overlay", False)
    assert isinstance(results[0], ImageError)
    assert pictures[0] is None
    assert isinstance(results[1], Inspection)
    nothing = Scores(np.array([np.nan, 1.0], np.float32), np.zeros((2, 64, 64), np.float32), 0.0, 0.0)
    both = [decoded[1], decoded[1]]
    results, _, _ = _judge(inspector, images, both, nothing, "json", False)
    assert isinstance(results[0], ImageError)
    assert isinstance(results[1], Inspection)


def test_training_names_the_images_that_are_too_thin(tmp_path: Path) -> None:
    (tmp_path / "images" / "belt" / "good").mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(
            0, 256, (8 if number in (2, 5) else 128, 512, 3), dtype=np.uint8
        )
        (tmp_path / "images" / "belt" / "good" / f"{number:02}.png").write_bytes(encode_png(pixels))
    ingest(tmp_path / "images", tmp_path / "data", progress=False)
    config = small_config(
        str(tmp_path / "data"), tmp_path, data={"categories": ["belt"]}, model={"resize": "pad", **STILL}
    )
    with pytest.raises(
        DataError, match=r"2 of 8 normal training images .*: belt/\S*02, belt/\S*05\. .* model\.resize=stretch"
    ):
        split_category(config, "belt")
    assert split_category(small_config(str(tmp_path / "data"), tmp_path, model=STILL), "belt").num_images == 8


def test_an_image_that_alignment_moves_out_of_every_place_has_no_score(data: str, tmp_path: Path) -> None:
    """The strip covers half of a place before it is aligned, and a quarter once it is shown at half its size."""
    uri = make_bundle(padded(data, tmp_path))
    inspector = Inspector.load(uri, "cpu")
    pixels = decode_image(encode_png(strip(64, 8)), inspector.frame)
    batch = torch.from_numpy(np.stack([pixels, decode_image(encode_png(strip(64, 64)), inspector.frame)]))
    theta = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]).expand(2, 2, 3)
    detector = inspector.bundle.detector
    embedding, _ = embed(detector.net, detector.reduction, to_images(batch, "cpu"))
    scored = detector.score_embedding(embedding, theta, batch[..., 3] > 0)
    assert torch.isnan(scored.score).tolist() == [True, False]
    with pytest.raises(ImageError, match="no place of the anomaly map shows a part of it"):
        inspector.judge(float(scored.score[0]), scored.anomaly_map[0].numpy(), 64, 8)


def test_an_export_calls_an_image_of_which_nothing_is_inspected_anomalous_without_a_score(bundle: str) -> None:
    scorer = Scorer(read_bundle(bundle, precision="fp32"))
    for size, inspected in (((512, 8), False), ((512, 128), True)):
        score, _, anomalous, _, _ = scorer(torch.from_numpy(strip(*size))[None])
        assert bool(torch.isfinite(score[0])) == inspected
        assert bool(anomalous[0])
