"""Compiled engines: their scores agree with torch within the tolerance, and an unusable engine gets a clear error."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from small_set import make_bundle, small_config
from torch import nn

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.engine import TOLERANCE
from focus_ray.bundle.inspector import Inspector
from focus_ray.cli.main import main
from focus_ray.data.images import decode_image, hash_pixels
from focus_ray.data.read import read_test_rows
from focus_ray.drawing.png import encode_png
from focus_ray.errors import ConfigError, MissingPackageError
from focus_ray.fitting.split import shorten_hash
from focus_ray.samples.write import draw_sample

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def bundle(parts: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(small_config(parts, tmp_path_factory.mktemp("run"), scoring={"image_score": "profile"}))


@pytest.fixture(scope="module")
def examples() -> list[bytes]:
    """Images of good parts that are in no bundle."""
    return [encode_png(draw_sample("gear", 7, "good", index)[0]) for index in range(6)]


@pytest.mark.parametrize("engine", sorted(TOLERANCE))
def test_an_engine_scores_as_torch_does(engine: str, bundle: str, parts: str, examples: list[bytes]) -> None:
    records = list(read_test_rows(parts, "gear"))
    plain, compiled = Inspector.load(bundle, "cpu"), Inspector.load(bundle, "cpu", engine=engine, examples=examples)
    assert compiled.bundle.detector.net.compiled is not None
    expected, actual = (inspector.score_labelled_images(records).measured for inspector in (plain, compiled))
    np.testing.assert_allclose(actual.scores, expected.scores, rtol=4 * TOLERANCE[engine])
    # int8 on a CPU without VNNI instructions differs by up to 12 %
    largest_difference = (4 if engine == "onnxruntime-int8" else 2) * TOLERANCE[engine]
    for anomaly_map, expected_map in zip(actual.maps, expected.maps, strict=True):
        assert np.abs(anomaly_map - expected_map).mean() <= largest_difference * expected_map.mean()


def test_an_engine_accepts_batches_of_any_size(bundle: str, examples: list[bytes]) -> None:
    inspector = Inspector.load(bundle, "cpu", engine="onnxruntime", examples=examples)
    together = [result.score for result in inspector.inspect(examples)]
    alone = [inspector.inspect([image])[0].score for image in examples]
    np.testing.assert_allclose(together, alone, rtol=1e-3)


def test_an_engine_with_different_scores_is_refused(
    bundle: str, examples: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "focus_ray.bundle.inspector.compile_feature_extractor",
        lambda net, engine, images: lambda part: tuple(2 * level for level in net.backbone(part)),
    )
    with pytest.raises(ConfigError, match=r"of 6 examples .* is \d+"):
        Inspector.load(bundle, "cpu", engine="onnxruntime", examples=examples)


@pytest.mark.parametrize(
    ("engine", "count", "message"),
    [("tensorrt", 6, "torch, onnxruntime, onnxruntime-int8"), ("onnxruntime-int8", 3, "at least 4 .* got 3")],
)
def test_an_unusable_engine_is_refused_with_the_reason(
    engine: str, count: int, message: str, bundle: str, examples: list[bytes]
) -> None:
    with pytest.raises(ConfigError, match=message):
        Inspector.load(bundle, "cpu", engine=engine, examples=examples[:count])


def test_training_images_cannot_check_an_engine(bundle: str, examples: list[bytes]) -> None:
    fit_hashes = frozenset(shorten_hash(hash_pixels(decode_image(image, None))) for image in examples[:3])
    with pytest.raises(ConfigError, match=r"3 of 6 examples.* 4 "):
        Inspector(read_bundle(bundle)._replace(fit_hashes=fit_hashes), "cpu", engine="onnxruntime", examples=examples)


def test_a_missing_package_is_named(bundle: str, examples: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingPackageError, match=r"onnxscript, .*'focus-ray\[onnx\]'"):
        Inspector.load(bundle, "cpu", engine="onnxruntime", examples=examples)


def test_features_that_are_aligned_between_layers_are_refused(bundle: str, examples: list[bytes]) -> None:
    aligning = read_bundle(bundle)
    aligning.detector.net.feature_aligners["layer1"] = nn.Identity()
    with pytest.raises(ConfigError, match="cannot align features"):
        Inspector(aligning, "cpu", engine="onnxruntime", examples=examples)


def test_the_command_line_takes_an_engine(
    bundle: str, examples: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, image in enumerate(examples):
        (tmp_path / f"{number}.png").write_bytes(image)
    command = ["inspect", bundle, str(tmp_path / "0.png"), "--device", "cpu", "--engine", "onnxruntime"]
    assert main([*command, "--examples", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["score"] > 0
    assert main(command) != 0
    assert "got 0: give examples" in capsys.readouterr().err
