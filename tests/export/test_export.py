"""Exports give the same scores and verdicts as the bundle. A refused export leaves no files and names the reason."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from made_sources import save
from PIL import Image
from places import SHARED
from small_set import make_bundle, small_config

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.cli.main import main
from focus_ray.data.framing import InputFrame
from focus_ray.detect.calibration import CalibrationBuilder
from focus_ray.errors import ConfigError, DataError, ExportError, MissingPackageError
from focus_ray.export.export import export_bundle
from focus_ray.export.formats import RunModel, check_export_format, open_exported_model, write_onnx, write_openvino
from focus_ray.export.resize import ResizeToFrame
from focus_ray.export.scorer import ExportableScorer, VerdictModule
from focus_ray.samples.write import draw_sample

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
JOINT: dict[str, Any] = {
    "density": {"num_channels": 16, "coreset": 64, "coreset_channels": 16, "reduction": "semi_orthogonal"},
    "scoring": {"image_score": "profile"},
    "calibration": {"method": "leave_one_out"},
}
TURNING = {"image_alignment": {"group": "rotation_translation", "min_drop": 0.0}}
GAUSSIAN = {"kind": "gaussian", "num_channels": 16}
CASES: dict[str, dict[str, Any]] = {
    "gaussian": {"density": GAUSSIAN},
    "memory of places": {"density": {"kind": "nearest", "coreset": 0, "window": 1}},
    "memory and coreset": JOINT,
    "aligned": {**JOINT, "model": TURNING},
    "localised": {"density": GAUSSIAN, "model": {"image_alignment": {"group": "affine", "method": "localisation"}}},
    "features aligned": {"density": GAUSSIAN, "model": {"feature_alignment": {"layer2": "rotation_scale"}}},
    "tiles": {**JOINT, "model": {"tiling": {"grid": [2, 2], "overlap": 0.25, "density": "shared"}}},
    "region": {**JOINT, "data": {"regions": {"gear": [[0.1, 0.1], [0.9, 0.1], [0.9, 0.6]]}}},
    "padded": {**JOINT, "model": {"resize": "pad"}},
    "region, padded and aligned": {
        **JOINT,
        "data": {"regions": {"gear": [[0.1, 0.1], [0.9, 0.1], [0.9, 0.6]]}},
        "model": {**TURNING, "resize": "pad"},
    },
}
ALIGNED = ("aligned", "localised", "region, padded and aligned")


@pytest.fixture(scope="module")
def bundle(parts: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(small_config(parts, tmp_path_factory.mktemp("run"), **JOINT))


@pytest.fixture(scope="module")
def onnx(bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(bundle, "onnx", tmp_path_factory.mktemp("exports") / "onnx").folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images with another size and shape than the frame: good, bad, grey, and partly transparent."""
    folder = tmp_path_factory.mktemp("photographs")
    samples = [draw_sample("gear", 7, kind, 0)[0] for kind in ("good", "broken_tooth", "scratch")]
    images = [Image.fromarray(pixels).resize((90, 75)) for pixels in samples]
    transparent = images[0].convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    paths = []
    for number, image in enumerate([*images, images[1].convert("L"), transparent]):
        paths.append(folder / f"{number}.png")
        image.save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def odd_photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One good and one bad part, in rare file formats and in formats that Pillow converts to RGB wrongly."""
    folder = tmp_path_factory.mktemp("odd")
    for kind in ("good", "scratch"):
        colour = Image.fromarray(draw_sample("gear", 7, kind, 0)[0])
        grey = np.asarray(colour.convert("L"))
        grey16 = grey.astype(np.uint16) * 257
        Image.fromarray(grey16).save(folder / f"{kind}-grey16.png")
        Image.fromarray(grey16).save(folder / f"{kind}-grey16.tif")
        Image.fromarray(grey).save(folder / f"{kind}-grey8.png")
        tifffile.imwrite(folder / f"{kind}-white-is-zero16.tif", 65535 - grey16, photometric="miniswhite")
        tifffile.imwrite(folder / f"{kind}-white-is-zero8.tif", 255 - grey, photometric="miniswhite")
        colour.quantize(32).save(folder / f"{kind}-palette.png")
        colour.convert("1").save(folder / f"{kind}-bits.png")
        colour.convert("CMYK").save(folder / f"{kind}-cmyk.tif")
        colour.save(folder / f"{kind}-key.png", transparency=colour.getpixel((0, 0)))
        rotation_exif = Image.Exif()
        rotation_exif[0x0112] = 6
        colour.save(folder / f"{kind}-turned.png", exif=rotation_exif)
        colour.convert("L").save(folder / f"{kind}-turned.tif", exif=rotation_exif)
        transparent = colour.convert("LA")
        transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
        transparent.save(folder / f"{kind}-clear.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("resize", ["stretch", "pad"])
@pytest.mark.parametrize("with_region", [False, True])
def test_images_are_resized_to_the_frame_as_pillow_does(resize: Any, with_region: bool) -> None:
    rng = np.random.default_rng(0)
    region = np.zeros((64, 48), bool)
    region[5:60, 3:30] = True
    frame = InputFrame(64, 48, resize, region if with_region else None)
    to_frame = ResizeToFrame(frame)
    for height, width in ((48, 64), (64, 48), (300, 40), (40, 300), (97, 201), (33, 50), (500, 500), (2, 3), (63, 190)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = frame.resize_image(Image.fromarray(pixels), width, height)
        framed, scored, box = to_frame(torch.from_numpy(pixels)[None])
        np.testing.assert_array_equal((framed[0] * 255).round().byte().permute(1, 2, 0).numpy(), expected[..., :3])
        if scored is not None:
            np.testing.assert_array_equal(scored.numpy(), expected[..., 3] > 0)
        if box is not None:
            assert tuple(box.tolist()) == tuple(frame.compute_image_rectangle(width, height))


class FramePixels(torch.nn.Module):
    """Returns only the pixels of `ResizeToFrame`."""

    def __init__(self, frame: InputFrame) -> None:
        super().__init__()
        self.to_frame = ResizeToFrame(frame)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self.to_frame(images)[0]
        return pixels


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_openvino_resizes_images_to_the_frame_as_pillow_does(resize: Any, tmp_path: Path) -> None:
    """OpenVINO sums and divides integers as float32, which once changed pixels by two grey levels."""
    pytest.importorskip("openvino")
    frame, dim = InputFrame(112, 128, resize), torch.export.Dim
    sizes = {1: dim("height", min=2, max=4000), 2: dim("width", min=2, max=4000)}
    example = torch.zeros(1, 120, 135, 3, dtype=torch.uint8)
    program = torch.export.export(FramePixels(frame), (example,), dynamic_shapes=(sizes,))
    write_onnx(program, tmp_path / "frame.onnx", ["pixels"])
    write_openvino(tmp_path / "frame.onnx", tmp_path / "model.xml")
    to_frame = open_exported_model(tmp_path, "openvino")
    rng = np.random.default_rng(0)
    for height, width in ((64, 64), (97, 201), (300, 500)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        (framed,) = to_frame(pixels[None]).values()
        expected = frame.resize_image(Image.fromarray(pixels), width, height)
        framed = (framed[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(framed, expected[..., :3])


@pytest.mark.parametrize("target", [0.05, 0.3])
@pytest.mark.parametrize("count", [3, 12, 200])
def test_verdicts_and_p_values_equal_those_of_the_calibration(count: int, target: float) -> None:
    rng = np.random.default_rng(count)
    normal_scores = rng.gamma(4, 0.25, count).astype(np.float32)
    builder = CalibrationBuilder("leave_one_out", target, 0.001)
    builder.add(normal_scores, np.ones((count, 4, 4), np.float32))
    calibration = builder.build_calibration()
    scores = np.concatenate([normal_scores, rng.gamma(4, 0.5, 500), [calibration.image_threshold, 0.0, 50.0]]).astype(
        np.float32
    )
    p_values, anomalous = (output.numpy() for output in VerdictModule(calibration)(torch.from_numpy(scores)))
    np.testing.assert_array_equal(anomalous, calibration.is_anomalous(scores))
    np.testing.assert_allclose(p_values, calibration.compute_conformal_p_values(scores), rtol=1e-4)
    np.testing.assert_array_equal(p_values.astype(np.float64) <= calibration.effective_fpr, anomalous)


def test_a_nan_score_is_anomalous() -> None:
    builder = CalibrationBuilder("split", 0.05, 0.001)
    builder.add(np.linspace(1, 2, 40), np.ones((40, 4, 4), np.float32))
    _, anomalous = VerdictModule(builder.build_calibration())(torch.tensor([float("nan"), float("inf"), 1.0]))
    assert anomalous.tolist() == [True, True, False]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case == "aligned" else []) for case in CASES]
)
def test_the_exportable_scorer_agrees_with_the_inspector(
    case: str, parts: str, photographs: list[Path], tmp_path: Path
) -> None:
    uri = make_bundle(small_config(parts, tmp_path, **CASES[case]))
    inspector, bundle = Inspector(read_bundle(uri, precision="fp32")), read_bundle(uri, precision="fp32")
    scorer = ExportableScorer(bundle)
    assert scorer.is_aligned == (case in ALIGNED)
    inspections = inspector.inspect(photographs[:3])
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in photographs[:3]])
    score, p_value, anomalous, maps, *box = scorer(pixels)
    np.testing.assert_allclose(score, [inspection.score for inspection in inspections], rtol=1e-4)
    np.testing.assert_allclose(p_value, [inspection.p_value for inspection in inspections], rtol=1e-3)
    assert anomalous.tolist() == [inspection.anomalous for inspection in inspections]
    top, left, height, width = box[0].tolist() if box else (0, 0, *maps.shape[1:])
    for exported_map, inspection in zip(maps[:, top : top + height, left : left + width], inspections, strict=True):
        np.testing.assert_allclose(
            exported_map, inspection.anomaly_map, atol=1e-3 * float(inspection.anomaly_map.max())
        )


def test_the_sidecar_describes_the_model_and_its_check(onnx: Path, bundle: str) -> None:
    sidecar = json.loads((onnx / "model.json").read_text())
    loaded = read_bundle(bundle)
    assert (sidecar["category"], sidecar["bundle"]["version"], sidecar["precision"]) == ("gear", loaded.version, "fp32")
    assert sidecar["thresholds"]["image"] == loaded.calibration.image_threshold
    assert sidecar["calibration"]["caveats"] == loaded.calibration.describe_limits()
    check = sidecar["check"]
    assert (check["num_good"], check["num_bad"], check["verdict_changes"]) == (4, 4, 0)
    assert max(check["score_difference"], check["map_difference"]) < 1e-3
    assert check["auroc_export"] == pytest.approx(check["auroc_torch"])
    assert set(sidecar["files"]) == {"model.onnx"}
    assert str(Path.cwd()).encode() not in (onnx / "model.onnx").read_bytes()


def test_the_python_example_reads_files_as_inspect_does_and_continues_after_a_refused_image(
    onnx: Path, bundle: str, photographs: list[Path], odd_photographs: list[Path], tmp_path: Path
) -> None:
    Image.fromarray(np.full((60, 60), 70_000, np.int32)).save(tmp_path / "deep.tif")
    Image.fromarray(np.full((60, 60), 0.5, np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "damaged.png").write_bytes(photographs[0].read_bytes()[:500])
    refused = sorted(tmp_path.iterdir())
    shared = sorted(path for path in (SHARED / "cases").rglob("*") if path.suffix in (".png", ".tif"))
    images = [*refused, *photographs, *odd_photographs, *shared]
    lines = run_example_program("inspect_onnx.py", onnx, images, without=("torch", "focus_ray"), is_refused=True)
    refused += [path for path in shared if path.name == "05-rgb16-planar.tif"]
    assert [path for line, path in zip(lines, images, strict=True) if "error" in line] == refused
    lines = [line for line in lines if "error" not in line]
    assert_equals_inspect(lines, bundle, [path for path in images if path not in refused])
    scores = {Path(line["image"]).stem: line["score"] for line in lines}
    for kind in ("good", "scratch"):
        assert scores[f"{kind}-grey16"] == pytest.approx(scores[f"{kind}-grey8"], rel=1e-4)
        assert scores[f"{kind}-white-is-zero16"] == pytest.approx(scores[f"{kind}-grey8"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_the_python_examples_agree_with_inspect_and_give_no_verdict_on_an_image_that_is_too_thin(
    to: str, parts: str, photographs: list[Path], odd_photographs: list[Path], tmp_path: Path
) -> None:
    uri = make_bundle(small_config(parts, tmp_path, **CASES["padded"]))
    folder = export_bundle(uri, to, tmp_path / "export").folder
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 512, 3), dtype=np.uint8)).save(tmp_path / "thin.png")
    images = [tmp_path / "thin.png", *photographs, *odd_photographs]
    lines = run_example_program(f"inspect_{to}.py", folder, images, without=("focus_ray",), is_refused=True)
    assert "no verdict" in lines[0]["error"]
    assert_equals_inspect(lines[1:], uri, images[1:])


def test_the_node_example_agrees_with_inspect(
    onnx: Path, bundle: str, photographs: list[Path], odd_photographs: list[Path]
) -> None:
    """Needs NODE_PATH with onnxruntime-node and sharp, as the first lines of the example say."""
    node = shutil.which("node")
    script = "require('onnxruntime-node'); require('sharp')"
    if node is None or subprocess.run([node, "-e", script], capture_output=True).returncode:
        pytest.skip("no node, or NODE_PATH names no folder with onnxruntime-node and sharp")
    # sharp converts CMYK with a colour profile, focus_ray without one
    images = [*photographs, *(path for path in odd_photographs if "cmyk" not in path.name)]
    process = subprocess.run(
        [node, EXAMPLES / "inspect_onnx.mjs", onnx, *images], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    assert_equals_inspect([json.loads(line) for line in process.stdout.splitlines()], bundle, images)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_bundle_is_exported(case: str, parts: str, tmp_path: Path) -> None:
    uri = make_bundle(small_config(parts, tmp_path, **CASES[case]))
    for to in ("onnx", "torch", "openvino"):
        if to == "openvino":
            pytest.importorskip("openvino")
        assert export_bundle(uri, to, tmp_path / to).sidecar["check"]["verdict_changes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precisions_change_scores_within_limits(precision: str, bundle: str, tmp_path: Path) -> None:
    check = export_bundle(bundle, "onnx", tmp_path / "low", precision, accept_cost=True).sidecar["check"]
    assert 0 < check["score_difference"] < 0.3
    assert check["auroc_lost"] is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "tflite"}, ConfigError, "tflite: expected one of onnx, torch, openvino"),
        ({"precision": "int4"}, ConfigError, "int4: expected one of fp32, fp16, int8"),
        ({"to": "torch", "precision": "int8"}, ConfigError, "int8: .*--to onnx or openvino"),
        ({"output": "s3://plant/gear"}, DataError, "s3://plant/gear"),
        ({"output": "notes"}, DataError, "notes: .*--output"),
        ({"examples": 3}, ExportError, "3 of 3 examples .* needs 4"),
    ],
)
def test_a_wrong_argument_is_refused_and_nothing_is_written(
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    bundle: str,
    photographs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "notes/notes.txt", b"a folder that is no export")
    if "examples" in options:
        options = {"examples": [str(path) for path in photographs[: options["examples"]]]}
    with pytest.raises(error, match=message):
        export_bundle(bundle, **{"to": "onnx", "output": "new", **options})
    assert [path.name for path in tmp_path.rglob("*")] == ["notes", "notes.txt"]


def test_the_message_of_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingPackageError, match=r"focus-ray\[openvino\]"):
        check_export_format("openvino", "fp32")


@pytest.mark.parametrize(
    ("precision", "make_wrong", "message"),
    [
        ("fp32", lambda outputs: {"score": outputs["score"] * 1.1}, "run the bundle with focus_ray"),
        ("fp16", lambda outputs: {"score": outputs["score"] * 1.1}, "--accept-cost"),
        ("fp32", lambda outputs: {"anomalous": ~outputs["anomalous"]}, r"\d+ verdicts or p-values"),
        ("fp32", lambda outputs: {"p_value": outputs["p_value"] * 1.01}, r"\d+ verdicts or p-values"),
        ("fp32", lambda outputs: {"p_value": outputs["p_value"] * float("nan")}, r"\d+ verdicts or p-values"),
    ],
)
def test_an_export_with_other_outputs_is_refused_and_an_earlier_export_stays(
    precision: str,
    make_wrong: Callable[[dict[str, Any]], dict[str, Any]],
    message: str,
    bundle: str,
    onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def open_wrong_model(folder: Path, to: str, num_threads: int) -> RunModel:
        run = open_exported_model(folder, to, num_threads)
        return lambda images: {**(outputs := run(images)), **make_wrong(outputs)}

    module = "focus_ray.export.export"
    monkeypatch.setattr(f"{module}.write_model_files", lambda *words: shutil.copy(onnx / "model.onnx", words[3]))
    monkeypatch.setattr(f"{module}.open_exported_model", open_wrong_model)
    target = tmp_path / "out" / "gear"
    shutil.copytree(onnx, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(ExportError, match=message):
        export_bundle(bundle, "onnx", target, precision)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in target.parent.iterdir()] == ["gear"]


@pytest.mark.parametrize("to", ["torch", *(pytest.param(to, marks=pytest.mark.slow) for to in ("onnx", "openvino"))])
def test_a_full_disk_is_reported_and_leaves_no_files(bundle: str, tmp_path: Path, to: str) -> None:
    if to == "openvino":
        pytest.importorskip("openvino")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # behaves like a full disk
    try:
        with pytest.raises(DataError, match=f"{to}: cannot be written: "):
            export_bundle(bundle, to, tmp_path / to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil", ["corrupt", "thin"])
def test_an_example_that_cannot_be_used_is_named(
    spoil: str, parts: str, photographs: list[Path], tmp_path: Path
) -> None:
    uri = make_bundle(small_config(parts, tmp_path, density=GAUSSIAN, model={"resize": "pad"}))
    for path in photographs:
        shutil.copy(path, tmp_path)
    if spoil == "corrupt":
        (tmp_path / "3.png").write_bytes(photographs[3].read_bytes()[:300])
    else:
        Image.new("RGB", (512, 8)).save(tmp_path / "3.png")
    sources = [str(tmp_path / path.name) for path in photographs]
    with pytest.raises(DataError, match=rf"^{tmp_path}/3\.png: .*({'truncated' if spoil == 'corrupt' else '512 x 8'})"):
        export_bundle(uri, "torch", tmp_path / "new", examples=sources)


def test_a_missing_data_set_is_refused(bundle: str, parts: str, tmp_path: Path) -> None:
    away = Path(parts).rename(tmp_path / "away")
    try:
        with pytest.raises(ExportError, match="--examples"):
            export_bundle(bundle, "torch", tmp_path / "new")
    finally:
        away.rename(parts)


def test_a_density_that_branches_on_values_is_refused(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Branching:
        def score(self, embedding: torch.Tensor) -> torch.Tensor:
            distance = embedding.square().sum(dim=1)
            return distance if bool((distance.mean() > 1).item()) else -distance

    monkeypatch.setattr("focus_ray.export.scorer.build_exportable_density", lambda config, density, half: Branching())
    with pytest.raises(ExportError, match="branches on values"):
        export_bundle(bundle, "torch", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_takes_folders_of_good_and_bad_parts(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind in (("good", "good"), ("bad", "scratch")):
        for number in range(3):
            save(tmp_path / "parts" / name / f"{number}.png", draw_sample("gear", 7, kind, number)[0])
    target = tmp_path / "export"
    words = ["export", bundle, "--to", "torch", "--output", str(target), "--examples", str(tmp_path / "parts")]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(target)
    assert "of 6 examples" in printed.err
    assert "image AUROC: PyTorch" in printed.err


def run_example_program(
    name: str, folder: Path, images: list[Path], without: tuple[str, ...], is_refused: bool = False
) -> list[dict[str, Any]]:
    """Returns the lines that an example prints. is_refused: whether the example must refuse an image and end with status 1."""
    blocked = f"import runpy, sys; sys.modules.update(dict.fromkeys({without!r})); runpy.run_path(sys.argv.pop(1))"
    command = [sys.executable, "-c", blocked, str(EXAMPLES / name), str(folder), *map(str, images)]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (process.returncode, process.stderr.count("Traceback")) == (int(is_refused), 0), process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def assert_equals_inspect(lines: list[dict[str, Any]], bundle: str, images: list[Path]) -> None:
    """Asserts that the lines of an example equal the inspections of the bundle."""
    inspections = Inspector(read_bundle(bundle, precision="fp32")).inspect(images)
    assert [line["verdict"] for line in lines] == [inspection.verdict for inspection in inspections]
    np.testing.assert_allclose(
        [line["score"] for line in lines], [inspection.score for inspection in inspections], rtol=1e-4
    )
    np.testing.assert_allclose(
        [line["p_value"] for line in lines], [inspection.p_value for inspection in inspections], rtol=1e-3
    )
