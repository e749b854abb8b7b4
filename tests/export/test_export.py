"""Exports score as the bundle does, verdict and all; what cannot be exported is refused in plain words and leaves nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from places import SHARED
from small_set import ingest_parts, make_bundle, small_config

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.cli.main import main
from focus_ray.data.framing import Frame
from focus_ray.data.images import encode_png
from focus_ray.errors import ConfigError, DataError, ExportError, MissingPackageError
from focus_ray.evaluation.calibration import CalibrationBuilder
from focus_ray.export.export import export_bundle
from focus_ray.export.formats import Run, check_format, open_model, write_onnx, write_openvino
from focus_ray.export.resize import ToFrame
from focus_ray.export.scorer import Scorer, Verdict
from focus_ray.samples.write import draw_sample

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
JOINT: dict[str, Any] = {
    "density": {"num_channels": 16, "coreset": 64, "coreset_channels": 16, "reduction": "semi_orthogonal"},
    "scoring": {"image_score": "profile"},
    "calibration": {"method": "leave_one_out"},
}
STILL = {"image_alignment": {"group": "none"}}
TURNING = {"image_alignment": {"group": "rotation_translation", "min_drop": 0.0, "max_images": 6}}
JOINT["model"] = STILL
GAUSSIAN = {"kind": "gaussian", "num_channels": 16}
CASES: dict[str, dict[str, Any]] = {
    "gaussian": {"density": GAUSSIAN, "model": STILL},
    "memory of places": {"density": {"kind": "nearest", "coreset": 0, "window": 1}, "model": STILL},
    "memory and coreset": JOINT,
    "aligned": {**JOINT, "model": TURNING},
    "localised": {"density": GAUSSIAN, "model": {"image_alignment": {"group": "affine", "method": "localisation"}}},
    "features aligned": {"density": GAUSSIAN, "model": {**STILL, "feature_alignment": {"layer2": "rotation_scale"}}},
    "tiles": {**JOINT, "model": {**STILL, "tiling": {"grid": [2, 2], "overlap": 0.25, "density": "shared"}}},
    "region": {**JOINT, "data": {"regions": {"gear": [[0.1, 0.1], [0.9, 0.1], [0.9, 0.6]]}}},
    "padded": {**JOINT, "model": {**STILL, "resize": "pad"}},
    "region, padded and aligned": {
        **JOINT,
        "data": {"regions": {"gear": [[0.1, 0.1], [0.9, 0.1], [0.9, 0.6]]}},
        "model": {**TURNING, "resize": "pad"},
    },
}
ALIGNED = ("aligned", "localised", "region, padded and aligned")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return ingest_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def bundle(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(small_config(data, tmp_path_factory.mktemp("run"), **JOINT))


@pytest.fixture(scope="module")
def onnx(bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(bundle, "onnx", tmp_path_factory.mktemp("exports") / "onnx").folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of another size and shape than the frame: good and bad, grey, and one that is partly transparent."""
    folder = tmp_path_factory.mktemp("photographs")
    drawn = [draw_sample("gear", 7, kind, 0)[0] for kind in ("good", "broken_tooth", "scratch")]
    images = [Image.fromarray(pixels).resize((90, 75)) for pixels in drawn]
    clear = images[0].convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    paths = []
    for number, image in enumerate([*images, images[1].convert("L"), clear]):
        paths.append(folder / f"{number}.png")
        image.save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def odd_photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One good and one bad part, in kinds of files that Pillow converts to RGB wrongly, or that are rare."""
    folder = tmp_path_factory.mktemp("odd")
    for kind in ("good", "scratch"):
        colour = Image.fromarray(draw_sample("gear", 7, kind, 0)[0])
        grey = np.asarray(colour.convert("L"))
        deep = grey.astype(np.uint16) * 257
        Image.fromarray(deep).save(folder / f"{kind}-grey16.png")
        Image.fromarray(deep).save(folder / f"{kind}-grey16.tif")
        Image.fromarray(grey).save(folder / f"{kind}-grey8.png")
        tifffile.imwrite(folder / f"{kind}-white-is-zero16.tif", 65535 - deep, photometric="miniswhite")
        tifffile.imwrite(folder / f"{kind}-white-is-zero8.tif", 255 - grey, photometric="miniswhite")
        colour.quantize(32).save(folder / f"{kind}-palette.png")
        colour.convert("1").save(folder / f"{kind}-bits.png")
        colour.convert("CMYK").save(folder / f"{kind}-cmyk.tif")
        colour.save(folder / f"{kind}-key.png", transparency=colour.getpixel((0, 0)))
        turned = Image.Exif()
        turned[0x0112] = 6
        colour.save(folder / f"{kind}-turned.png", exif=turned)
        colour.convert("L").save(folder / f"{kind}-turned.tif", exif=turned)
        clear = colour.convert("LA")
        clear.putalpha(Image.linear_gradient("L").resize(clear.size))
        clear.save(folder / f"{kind}-clear.png")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("resize", ["stretch", "pad"])
@pytest.mark.parametrize("with_region", [False, True])
def test_images_come_to_the_frame_as_pillow_brings_them(resize: Any, with_region: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = [(48, 64), (64, 48), (300, 40), (40, 300), (97, 201), (33, 50), (500, 500), (2, 3), (63, 190)]
    region = np.zeros((64, 48), bool)
    region[5:60, 3:30] = True
    frame = Frame(64, 48, resize, region if with_region else None)
    to_frame = ToFrame(frame)
    for height, width in sizes:
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = frame.place_image(Image.fromarray(pixels), width, height)
        found, shown, box = to_frame(torch.from_numpy(pixels)[None])
        np.testing.assert_array_equal((found[0] * 255).round().byte().permute(1, 2, 0).numpy(), expected[..., :3])
        if shown is not None:
            np.testing.assert_array_equal(shown.numpy(), expected[..., 3] > 0)
        if box is not None:
            assert tuple(box.tolist()) == tuple(frame.image_box(width, height))


class Pixels(torch.nn.Module):
    """`ToFrame` without what else it gives."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.to_frame = ToFrame(frame)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self.to_frame(images)[0]
        return pixels


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["stretch", "pad"])
def test_openvino_brings_images_to_the_frame_as_pillow_does(resize: Any, tmp_path: Path) -> None:
    """It sums and divides whole numbers as float32, which moved pixels by two grey levels."""
    pytest.importorskip("openvino")
    frame, dim = Frame(112, 128, resize), torch.export.Dim
    sizes = {1: dim("height", min=2, max=4000), 2: dim("width", min=2, max=4000)}
    example = torch.zeros(1, 120, 135, 3, dtype=torch.uint8)
    program = torch.export.export(Pixels(frame), (example,), dynamic_shapes=(sizes,))
    write_onnx(program, tmp_path / "frame.onnx", ["pixels"])
    write_openvino(tmp_path / "frame.onnx", tmp_path / "model.xml")
    to_frame = open_model(tmp_path, "openvino")
    rng = np.random.default_rng(0)
    for height, width in ((64, 64), (97, 201), (300, 500)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        (found,) = to_frame(pixels[None]).values()
        expected = frame.place_image(Image.fromarray(pixels), width, height)
        found = (found[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)
        np.testing.assert_array_equal(found, expected[..., :3])


@pytest.mark.parametrize("target", [0.05, 0.3])
@pytest.mark.parametrize("count", [3, 12, 200])
def test_verdicts_and_p_values_are_those_of_the_calibration(count: int, target: float) -> None:
    rng = np.random.default_rng(count)
    known = rng.gamma(4, 0.25, count).astype(np.float32)
    builder = CalibrationBuilder("leave_one_out", target, 0.001)
    builder.add(known, np.ones((count, 4, 4), np.float32))
    calibration = builder.finish()
    scores = np.concatenate([known, rng.gamma(4, 0.5, 500), [calibration.image_threshold, 0.0, 50.0]]).astype(
        np.float32
    )
    p_values, anomalous = (one.numpy() for one in Verdict(calibration)(torch.from_numpy(scores)))
    np.testing.assert_array_equal(anomalous, calibration.is_anomalous(scores))
    np.testing.assert_allclose(p_values, calibration.conformal_p_value(scores), rtol=1e-4)
    np.testing.assert_array_equal(p_values.astype(np.float64) <= calibration.effective_fpr, anomalous)


def test_a_score_that_is_no_number_is_called_anomalous() -> None:
    builder = CalibrationBuilder("split", 0.05, 0.001)
    builder.add(np.linspace(1, 2, 40), np.ones((40, 4, 4), np.float32))
    _, anomalous = Verdict(builder.finish())(torch.tensor([float("nan"), float("inf"), 1.0]))
    assert anomalous.tolist() == [True, True, False]


@pytest.mark.parametrize("case", CASES)
def test_the_traced_scorer_is_the_inspector(case: str, data: str, photographs: list[Path], tmp_path: Path) -> None:
    uri = make_bundle(small_config(data, tmp_path, **CASES[case]))
    inspector, read = Inspector(read_bundle(uri, precision="fp32")), read_bundle(uri, precision="fp32")
    scorer = Scorer(read)
    assert scorer.aligns == (case in ALIGNED)
    expected = inspector.inspect(photographs[:3])
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in photographs[:3]])
    score, p_value, anomalous, maps, *box = scorer(pixels)
    np.testing.assert_allclose(score, [one.score for one in expected], rtol=1e-4)
    np.testing.assert_allclose(p_value, [one.p_value for one in expected], rtol=1e-3)
    assert anomalous.tolist() == [one.anomalous for one in expected]
    top, left, height, width = box[0].tolist() if box else (0, 0, *maps.shape[1:])
    for mine, theirs in zip(maps[:, top : top + height, left : left + width], expected, strict=True):
        np.testing.assert_allclose(mine, theirs.anomaly_map, atol=1e-3 * float(theirs.anomaly_map.max()))


def test_the_sidecar_says_what_the_model_takes_gives_and_costs(onnx: Path, bundle: str) -> None:
    about = json.loads((onnx / "model.json").read_text())
    read = read_bundle(bundle)
    assert (about["category"], about["bundle"]["version"], about["precision"]) == ("gear", read.version, "fp32")
    assert about["thresholds"]["image"] == read.calibration.image_threshold
    assert about["calibration"]["caveats"] == read.calibration.caveats()
    found = about["check"]
    assert (found["num_good"], found["num_bad"], found["verdict_changes"]) == (4, 4, 0)
    assert max(found["score_difference"], found["map_difference"]) < 1e-3
    assert found["auroc_export"] == pytest.approx(found["auroc_torch"])
    assert set(about["files"]) == {"model.onnx"}
    assert str(Path.cwd()).encode() not in (onnx / "model.onnx").read_bytes()


def test_the_python_example_says_what_inspect_says(onnx: Path, bundle: str, photographs: list[Path]) -> None:
    lines = run_example("inspect_onnx.py", onnx, photographs, without=("torch", "focus_ray"))
    compare(lines, bundle, photographs)


def test_the_python_example_reads_every_kind_of_file_as_inspect_does(
    onnx: Path, bundle: str, odd_photographs: list[Path]
) -> None:
    lines = run_example("inspect_onnx.py", onnx, odd_photographs, without=("torch", "focus_ray"))
    compare(lines, bundle, odd_photographs)
    scores = {Path(line["image"]).stem: line["score"] for line in lines}
    for kind in ("good", "scratch"):
        assert scores[f"{kind}-grey16"] == pytest.approx(scores[f"{kind}-grey8"], rel=1e-4)
        assert scores[f"{kind}-white-is-zero16"] == pytest.approx(scores[f"{kind}-grey8"], rel=1e-4)


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="../shared/cases is not there")
def test_the_python_example_reads_known_files_as_inspect_does_or_refuses_them(onnx: Path, bundle: str) -> None:
    files = sorted(path for path in (SHARED / "cases").rglob("*") if path.suffix in (".png", ".tif"))
    lines = run_example("inspect_onnx.py", onnx, files, without=("torch", "focus_ray"), refused=True)
    done = [(line, path) for line, path in zip(lines, files, strict=True) if "error" not in line]
    compare([line for line, _ in done], bundle, [path for _, path in done])
    assert {path.name for path in files} - {path.name for _, path in done} == {"05-rgb16-planar.tif"}


def test_the_python_example_goes_on_after_an_image_that_it_refuses(
    onnx: Path, bundle: str, photographs: list[Path], tmp_path: Path
) -> None:
    deep, real, damaged = tmp_path / "deep.tif", tmp_path / "float.tif", tmp_path / "damaged.png"
    Image.fromarray(np.full((60, 60), 70_000, np.int32)).save(deep)
    Image.fromarray(np.full((60, 60), 0.5, np.float32)).save(real)
    damaged.write_bytes(photographs[0].read_bytes()[:500])
    images = [deep, real, damaged, photographs[1]]
    lines = run_example("inspect_onnx.py", onnx, images, without=("torch", "focus_ray"), refused=True)
    assert ["error" in line for line in lines] == [True, True, True, False]
    compare(lines[3:], bundle, [photographs[1]])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inspect_onnx.py", "inspect_torch.py"])
def test_the_python_examples_give_no_verdict_on_an_image_that_is_too_thin(
    name: str, data: str, photographs: list[Path], tmp_path: Path
) -> None:
    uri = make_bundle(small_config(data, tmp_path, **CASES["padded"]))
    folder = export_bundle(uri, name.removesuffix(".py").removeprefix("inspect_"), tmp_path / "export").folder
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 512, 3), dtype=np.uint8)).save(tmp_path / "thin.png")
    images = [tmp_path / "thin.png", *photographs]
    lines = run_example(name, folder, images, without=("focus_ray",), refused=True)
    assert "no verdict" in lines[0]["error"]
    compare(lines[1:], uri, photographs)


def test_the_node_example_says_what_inspect_says(
    onnx: Path, bundle: str, photographs: list[Path], odd_photographs: list[Path]
) -> None:
    """Runs where NODE_PATH names a node_modules with onnxruntime-node and sharp, as the example's first lines say."""
    node = shutil.which("node")
    needed = "require('onnxruntime-node'); require('sharp')"
    if node is None or subprocess.run([node, "-e", needed], capture_output=True).returncode:
        pytest.skip("no node, or NODE_PATH names no folder with onnxruntime-node and sharp")
    # sharp converts CMYK by a colour profile, and focus_ray does not
    images = [*photographs, *(path for path in odd_photographs if "cmyk" not in path.name)]
    done = subprocess.run(
        [node, EXAMPLES / "inspect_onnx.mjs", onnx, *images], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    compare([json.loads(line) for line in done.stdout.splitlines()], bundle, images)


@pytest.mark.slow
def test_the_torch_export_says_what_inspect_says(
    bundle: str, photographs: list[Path], odd_photographs: list[Path], tmp_path: Path
) -> None:
    folder = export_bundle(bundle, "torch", tmp_path / "torch").folder
    images = [*photographs, *odd_photographs]
    compare(run_example("inspect_torch.py", folder, images, without=("focus_ray",)), bundle, images)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_bundle_is_exported(case: str, data: str, tmp_path: Path) -> None:
    uri = make_bundle(small_config(data, tmp_path, **CASES[case]))
    for to in ("onnx", "torch", "openvino"):
        if to == "openvino":
            pytest.importorskip("openvino")
        assert export_bundle(uri, to, tmp_path / to).check.verdict_changes == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_lower_precisions_cost_what_they_say(precision: str, bundle: str, tmp_path: Path) -> None:
    done = export_bundle(bundle, "onnx", tmp_path / "low", precision, accept_cost=True)
    assert 0 < done.check.score_difference < 0.3
    assert done.sidecar["check"]["auroc_lost"] is not None


@pytest.mark.parametrize(
    ("to", "precision", "message"),
    [
        ("tflite", "fp32", "--to tflite: expected one of onnx, torch, openvino"),
        ("onnx", "int4", "expected one of fp32, fp16, int8"),
        ("torch", "int8", "for int8, give --to onnx or openvino"),
    ],
)
def test_what_cannot_be_asked_for_is_told(to: str, precision: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_format(to, precision)


def test_a_missing_package_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(
        MissingPackageError, match=r"needs openvino, not installed here: pip install 'focus-ray\[openvino\]'"
    ):
        check_format("openvino", "fp32")


def test_an_export_that_scores_otherwise_is_refused_and_a_former_one_stays(
    bundle: str, onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out" / "gear"
    shutil.copytree(onnx, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def written(scorer: object, to: str, precision: str, folder: Path, scaling: object) -> None:
        shutil.copy(onnx / "model.onnx", folder)

    def louder(folder: Path, to: str, num_threads: int) -> Run:
        run = open_model(folder, to, num_threads)
        return lambda images: {**(found := run(images)), "score": found["score"] * 1.1}

    monkeypatch.setattr("focus_ray.export.export.write_model", written)
    monkeypatch.setattr("focus_ray.export.export.open_model", louder)
    for precision, hint in (("fp32", "run the bundle with focus_ray"), ("fp16", "--accept-cost to take it")):
        with pytest.raises(ExportError, match=rf"scores differ by up to [\d.e+]+ of their spread, more than .*{hint}"):
            export_bundle(bundle, "onnx", target, precision)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in target.parent.iterdir()] == ["gear"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda found: {"anomalous": ~found["anomalous"]},
        lambda found: {"p_value": found["p_value"] * 1.01},
        lambda found: {"p_value": found["p_value"] * float("nan")},
    ],
)
def test_an_export_whose_verdicts_are_not_those_of_its_scores_is_refused(
    wrong: Any, bundle: str, onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(scorer: object, to: str, precision: str, folder: Path, scaling: object) -> None:
        shutil.copy(onnx / "model.onnx", folder)

    def otherwise(folder: Path, to: str, num_threads: int) -> Run:
        run = open_model(folder, to, num_threads)
        return lambda images: {**(found := run(images)), **wrong(found)}

    monkeypatch.setattr("focus_ray.export.export.write_model", written)
    monkeypatch.setattr("focus_ray.export.export.open_model", otherwise)
    with pytest.raises(ExportError, match=r"\d+ verdicts or p-values are not those of their scores: run the bundle"):
        export_bundle(bundle, "onnx", tmp_path / "gear")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_export_is_not_replaced(bundle: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="there, and no export of focus_ray: give --output a new or an empty folder"):
        export_bundle(bundle, "onnx", tmp_path)


def test_an_export_goes_to_no_uri(bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="s3://plant/gear: an export goes to a folder of this machine"):
        export_bundle(bundle, "torch", "s3://plant/gear")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["onnx", "torch", "openvino"])
def test_a_full_disk_is_told_as_such_and_leaves_nothing(bundle: str, tmp_path: Path, to: str) -> None:
    if to == "openvino":
        pytest.importorskip("openvino")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # as a full disk
    try:
        with pytest.raises(DataError, match=f"{to}: cannot be written: "):
            export_bundle(bundle, to, tmp_path / to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_too_few_examples_are_told(bundle: str, photographs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"3 of 3 examples are not among the images .* and 4 are needed"):
        export_bundle(bundle, "torch", tmp_path / "new", examples=[str(path) for path in photographs[:3]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spoil", ["corrupt", "thin"])
def test_an_example_that_cannot_be_used_is_named(
    spoil: str, data: str, photographs: list[Path], tmp_path: Path
) -> None:
    uri = make_bundle(small_config(data, tmp_path, density=GAUSSIAN, model={**STILL, "resize": "pad"}))
    for path in photographs:
        shutil.copy(path, tmp_path)
    if spoil == "corrupt":
        (tmp_path / "3.png").write_bytes(photographs[3].read_bytes()[:300])
    else:
        Image.new("RGB", (512, 8)).save(tmp_path / "3.png")
    places = [str(tmp_path / path.name) for path in photographs]
    with pytest.raises(DataError, match=rf"^{tmp_path}/3\.png: .*({'truncated' if spoil == 'corrupt' else '512 x 8'})"):
        export_bundle(uri, "torch", tmp_path / "new", examples=places)


def test_a_data_set_that_is_gone_is_told(data: str, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    uri = make_bundle(small_config(str(copy), tmp_path, density=GAUSSIAN, model=STILL))
    shutil.rmtree(copy)
    with pytest.raises(ExportError, match=r"was trained from cannot be read .* give --examples, a folder with good/"):
        export_bundle(uri, "torch", tmp_path / "new")


def test_a_density_that_branches_on_values_is_refused(
    bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Branching(torch.nn.Module):
        def forward(self, embedding: torch.Tensor) -> torch.Tensor:
            distance = embedding.square().sum(dim=1)
            return distance if bool((distance.mean() > 1).item()) else -distance

    monkeypatch.setattr("focus_ray.export.scorer.as_module", lambda density, half: Branching())
    with pytest.raises(ExportError, match=r"cannot be exported: it cannot be traced .* without branches on values"):
        export_bundle(bundle, "torch", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_takes_folders_of_good_and_bad_parts(
    bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kind in (("good", "good"), ("bad", "scratch")):
        (tmp_path / "parts" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "parts" / name / f"{number}.png").write_bytes(
                encode_png(draw_sample("gear", 7, kind, number)[0])
            )
    target = tmp_path / "export"
    assert (
        main(["export", bundle, "--to", "torch", "--output", str(target), "--examples", str(tmp_path / "parts")]) == 0
    )
    told = capsys.readouterr()
    assert told.out.strip() == str(target)
    assert "of 6 examples" in told.err
    assert "image AUROC: PyTorch" in told.err


def run_example(
    name: str, folder: Path, images: list[Path], without: tuple[str, ...], refused: bool = False
) -> list[dict[str, Any]]:
    """Returns the lines that an example prints. refused: whether it must end with status 1, having refused an image."""
    blocked = f"import runpy, sys; sys.modules.update(dict.fromkeys({without!r})); runpy.run_path(sys.argv.pop(1))"
    command = [sys.executable, "-c", blocked, str(EXAMPLES / name), str(folder), *map(str, images)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stderr.count("Traceback")) == (int(refused), 0), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def compare(lines: list[dict[str, Any]], bundle: str, images: list[Path]) -> None:
    expected = Inspector(read_bundle(bundle, precision="fp32")).inspect(images)
    assert [line["verdict"] for line in lines] == [one.verdict for one in expected]
    np.testing.assert_allclose([line["score"] for line in lines], [one.score for one in expected], rtol=1e-4)
    np.testing.assert_allclose([line["p_value"] for line in lines], [one.p_value for one in expected], rtol=1e-3)
