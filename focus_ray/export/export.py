"""Exports a bundle: writes the model to a temporary folder, compares it with PyTorch, and moves it to the output folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from focus_ray.bundle.bundle import Bundle, read_bundle, read_library_versions
from focus_ray.errors import DataError, ExportError, check_extra_is_installed
from focus_ray.export.check import (
    TOLERANCE,
    check_export,
    decode_example,
    find_check_failures,
    score_examples_with_pytorch,
)
from focus_ray.export.examples import read_export_examples
from focus_ray.export.formats import (
    INPUT,
    MODEL_FILES,
    OPENVINO_SETTINGS,
    check_export_format,
    open_exported_model,
    write_model_files,
)
from focus_ray.export.scorer import BOX, ExportableScorer, compute_max_image_side_px

FORMAT, FORMAT_VERSION = "focus_ray export", 1
SIDECAR = "model.json"
MAX_EXAMPLES = 200  # largest number of images to check


class ExportResult(NamedTuple):
    """A finished export.

    Attributes:
        folder: holds the files of the model and `SIDECAR`.
        sidecar: content of `SIDECAR`. Its entry "check" has the comparison with PyTorch.
    """

    folder: Path
    sidecar: dict[str, Any]


def export_bundle(
    uri: str | Path,
    to: str,
    output: str | Path | None = None,
    precision: str = "fp32",
    examples: Sequence[str] = (),
    accept_cost: bool = False,
    log: Callable[[str], None] = lambda message: None,
) -> ExportResult:
    """Writes the whole scorer of a bundle to a folder for another runtime, after a check against PyTorch in float32.

    Args:
        uri: location of the bundle.
        to: onnx, torch or openvino.
        precision: fp32, fp16 or int8.
        output: a new or empty folder, or the folder of an earlier export, which is replaced; None: the folder
            <category>-<to>-<precision> in the current folder.
        examples: sources of the images that check the export, as `read_export_examples` takes them.
        accept_cost: accept fp16 or int8 even if it exceeds `TOLERANCE`. fp32 is never accepted beyond it.
        log: receives a line for each step.

    Raises:
        ConfigError: the format or the precision is unknown.
        MissingPackageError: an extra is not installed.
        BundleError: the bundle is missing, damaged or changed, or has an unsupported format version.
        ExportError: the bundle cannot be exported, the examples do not suffice for the check or for int8, or the export exceeds
            `TOLERANCE`.
        DataError: the output is a URI, holds something other than an export, or cannot be written; or an example cannot be used.

        After an error nothing is written, and an earlier export stays.
    """
    check_export_format(to, precision)
    bundle = read_bundle(uri, "cpu", precision="fp32")
    target = _check_output_folder(output or f"{bundle.category}-{to}-{precision}")
    export_examples = read_export_examples(bundle, examples, MAX_EXAMPLES)
    to_check = [example for example in export_examples if not example.is_for_int8]
    if len({example.label for example in to_check} - {None}) == 2:
        check_extra_is_installed("train", "the image AUROC of good and bad examples")
    log(f"export: scoring {len(to_check)} examples with PyTorch in float32")
    reference = score_examples_with_pytorch(bundle, to_check)
    int8_images = []
    if precision == "int8":
        int8_images = [decode_example(example) for example in export_examples if example.is_for_int8]
        if not int8_images:
            raise ExportError(
                "--precision int8 needs images of good parts, but no example is good: give good images with --examples"
            )
    log(f"export: tracing {bundle.category!r} for {to} in {precision}")
    with _replace_folder_atomically(target) as folder:
        scorer = ExportableScorer(read_bundle(uri, "cpu", precision="fp32"), half=precision == "fp16")
        write_model_files(scorer, to, precision, folder, int8_images)
        log(f"export: checking {len(reference.pixels)} examples")
        comparison = check_export(open_exported_model(folder, to, torch.get_num_threads()), reference)
        failures = find_check_failures(comparison, TOLERANCE[precision])
        if failures and (precision == "fp32" or not accept_cost):
            hint = "give --precision fp32, or accept the deviation with --accept-cost"
            if precision == "fp32":
                hint = "run the bundle with focus_ray, and report this with the bundle's model.json"
            raise ExportError(
                f"the export of {bundle.category!r} in {precision} does not score as PyTorch in float32: {'; '.join(failures)}: "
                f"{hint}"
            )
        sidecar = _build_sidecar(bundle, to, precision, folder, comparison, failures)
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return ExportResult(target, sidecar)


def _check_output_folder(output: str | Path) -> Path:
    """Returns the path of the output folder, after a check that it is new, empty or holds an earlier export.

    Raises: DataError: the output is a URI, or exists and holds something other than an export.
    """
    if "://" in str(output):
        raise DataError(
            f"--output {output}: an export is written to a local folder: give a local folder, and copy the export from there"
        )
    target = Path(output).expanduser()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    try:
        is_export = json.loads((target / SIDECAR).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        is_export = False
    if not is_export:
        raise DataError(f"{target}: exists, but is no export of focus_ray: give --output a new or an empty folder")
    return target


@contextmanager
def _replace_folder_atomically(target: Path) -> Iterator[Path]:
    """Context manager: yields a temporary folder, which replaces the target folder at the end of the context.

    After an exception in the context the temporary folder is removed, and the target is unchanged.

    Raises: DataError: the temporary folder or the target cannot be written. It also replaces any `OSError` in the context.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    try:
        yield folder
        folder.chmod(0o755)
        earlier_export = folder.with_name(f"{folder.name}-former")
        if target.exists():
            target.rename(earlier_export)
        folder.rename(target)
        shutil.rmtree(earlier_export, ignore_errors=True)
    except OSError as error:
        file_hint = f" ({error.filename})" if error.filename else ""
        raise DataError(f"{target}: cannot be written: {error.strerror or error}{file_hint}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _build_sidecar(
    bundle: Bundle, to: str, precision: str, folder: Path, comparison: Mapping[str, Any], failures: Sequence[str]
) -> dict[str, Any]:
    """Returns the content of `SIDECAR`: everything that a user of the exported model needs to know.

    Args:
        folder: holds the files of the model; their sizes and hashes are stored.
        comparison: result of `check_export`.
        failures: sentences of `find_check_failures` that the user accepted.
    """
    frame, calibration = bundle.frame, bundle.calibration
    max_side_px = compute_max_image_side_px(frame.height, frame.width)
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "num_bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "category": bundle.category,
        "bundle": {"version": bundle.version, "created_at": bundle.manifest["created_at"]},
        "exported_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "to": to,
        "precision": precision,
        "model": MODEL_FILES[to],
        "files": files,
        "input": {
            "name": INPUT,
            "type": "uint8",
            "shape": ["batch", "height", "width", 3],
            "colours": "RGB, 0 to 255; grey repeated three times, transparency composed over black, EXIF orientation applied",
            "sizes": f"2 to {max_side_px} pixels a side, one size a batch: the model resizes",
        },
        "frame": {
            "height": frame.height,
            "width": frame.width,
            "resize": frame.resize,
            "region_of_interest": frame.region is not None,
            "how": "done by the model, as Pillow's bilinear filter does it, the width first; pad: scaled to fit, in the middle, "
            "mirrored outwards",
        },
        "outputs": _describe_model_outputs(bundle),
        "thresholds": {
            "image": calibration.image_threshold,
            "pixel": calibration.pixel_threshold,
            "target_fpr": calibration.target_fpr,
            "level": calibration.effective_fpr,
            "target_pixel_fpr": calibration.target_pixel_fpr,
        },
        "calibration": {
            "method": calibration.method,
            "num_images": calibration.num_images,
            "image_guaranteed": calibration.image_guaranteed,
            "pixel_guaranteed": calibration.pixel_guaranteed,
            "caveats": calibration.describe_limits(),
        },
        "check": {
            "against": "PyTorch in float32, the same decoded pixels",
            **comparison,
            "tolerance": TOLERANCE[precision],
            "accepted_beyond_tolerance": list(failures),
        },
        "settings": OPENVINO_SETTINGS if to == "openvino" else {},
        "versions": read_library_versions(),
    }


def _describe_model_outputs(bundle: Bundle) -> dict[str, Any]:
    """Returns a description of the model's outputs: name -> type, shape and meaning."""
    outputs: dict[str, tuple[str, list[str | int], str]] = {
        "score": (
            "float32",
            ["batch"],
            "higher is more anomalous; held against thresholds.image; NaN where no place of the map shows the image, which is "
            "too thin: then there is no verdict",
        ),
        "p_value": (
            "float32",
            ["batch"],
            "share of good parts that score as high; at most thresholds.level if and only if anomalous",
        ),
        "anomalous": ("bool", ["batch"], "the verdict; true too where a score is no number"),
        "anomaly_map": (
            "float32",
            ["batch", bundle.frame.height, bundle.frame.width],
            "distance a pixel, of the frame: resize it to the image's size; held against thresholds.pixel",
        ),
    }
    if bundle.frame.resize == "pad":
        box = "top, left, height, width: where the images lie in the map, in its pixels; cut that out first"
        outputs[BOX] = ("int32", [4], box)
    return {name: dict(zip(("type", "shape", "meaning"), facts, strict=True)) for name, facts in outputs.items()}
