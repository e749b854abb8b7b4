"""Exports a bundle: written beside its place, checked against PyTorch, described, and only then put where it was asked for."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

from focus_ray.bundle.bundle import Bundle, library_versions, read_bundle
from focus_ray.errors import DataError, ExportError
from focus_ray.export.check import TOLERANCE, Check, check, decode_example, expected_of
from focus_ray.export.examples import gather_examples
from focus_ray.export.formats import INPUT, MODEL, OPENVINO_SETTINGS, check_format, open_model, write_model
from focus_ray.export.scorer import BOX, Scorer, longest_side
from focus_ray.extras import require_extra

FORMAT, FORMAT_VERSION = "focus_ray export", 1
SIDECAR = "model.json"
MOST_EXAMPLES = 200


class Exported(NamedTuple):
    """folder: with the model's files and `SIDECAR`.  sidecar: what that says.  check: what it costs."""

    folder: Path
    sidecar: dict[str, Any]
    check: Check


def export_bundle(
    uri: str | Path,
    to: str,
    output: str | Path | None = None,
    precision: str = "fp32",
    examples: Sequence[str] = (),
    accept_cost: bool = False,
    most_examples: int = MOST_EXAMPLES,
    log: Callable[[str], None] = lambda message: None,
) -> Exported:
    """Writes a bundle's whole scorer for another runtime.

    Args:
        to: onnx, torch or openvino.  precision: fp32, fp16 or int8.
        output: a folder that is not there, is empty or holds a former export; None: <category>-<to>-<precision> here.
        examples: as `gather_examples` takes them, by which it is checked.
        accept_cost: take fp16 or int8 whatever it costs; fp32 is never taken that scores otherwise.

    Raises: ConfigError: no such format or precision.  MissingPackageError: an extra is needed.  BundleError: as `read_bundle`.
        ExportError: it cannot be exported, or costs more than `TOLERANCE`; nothing is written then, and a former export stays.
        DataError: the output is no place for it, or examples cannot be read.
    """
    check_format(to, precision)
    bundle = read_bundle(uri, "cpu", precision="fp32")
    target = _target(output or f"{bundle.category}-{to}-{precision}")
    gathered = gather_examples(bundle, examples, most_examples)
    if len({one.label for one in gathered.checking} - {None}) == 2:
        require_extra("train", "the image AUROC of good and bad examples")
    log(f"export: scoring {len(gathered.checking)} examples with PyTorch in float32")
    expected = expected_of(bundle, gathered.checking)
    if precision == "int8" and not gathered.scaling:
        raise ExportError("--precision int8 is scaled by images of good parts, and no example is one: give some")
    log(f"export: tracing {bundle.category!r} for {to} in {precision}")
    scaling = [decode_example(one) for one in gathered.scaling] if precision == "int8" else []
    with _new_folder(target) as folder:
        scorer = Scorer(read_bundle(uri, "cpu", precision="fp32"), half=precision == "fp16")
        write_model(scorer, to, precision, folder, scaling)
        log(f"export: checking {len(expected.pixels)} examples")
        found = check(open_model(folder, to, torch.get_num_threads()), expected)
        failures = found.failures(TOLERANCE[precision])
        if failures and (precision == "fp32" or not accept_cost):
            raise ExportError(_refused(precision, failures, bundle))
        sidecar = _described(bundle, to, precision, folder, found, failures)
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return Exported(target, sidecar, found)


def _refused(precision: str, failures: Sequence[str], bundle: Bundle) -> str:
    what = f"the export of {bundle.category!r} in {precision} does not score as PyTorch does in float32: "
    if precision == "fp32":
        hint = "run the bundle with focus_ray, and report this with the bundle's model.json"
    else:
        hint = "give --precision fp32, or --accept-cost to take it as it is"
    return f"{what}{'; '.join(failures)}: {hint}"


def _target(output: str | Path) -> Path:
    """Raises: DataError: it is no place of this machine, or something other than an export is there."""
    if "://" in str(output):
        raise DataError(
            f"--output {output}: an export goes to a folder of this machine: give one, and copy it from there"
        )
    target = Path(output).expanduser()
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return target
    try:
        known = json.loads((target / SIDECAR).read_text(encoding="utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        known = False
    if not known:
        raise DataError(f"{target}: there, and no export of focus_ray: give --output a new or an empty folder")
    return target


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target, which takes its place at the end; gone where something is raised, and the target untouched."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    try:
        yield folder
        folder.chmod(0o755)
        former = folder.with_name(f"{folder.name}-former")
        if target.exists():
            target.rename(former)
        folder.rename(target)
        shutil.rmtree(former, ignore_errors=True)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise DataError(f"{target}: cannot be written: {error.strerror or error}{place}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _described(
    bundle: Bundle, to: str, precision: str, folder: Path, found: Check, failures: Sequence[str]
) -> dict[str, Any]:
    frame, calibration = bundle.frame, bundle.calibration
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
        "model": MODEL[to],
        "files": files,
        "input": {
            "name": INPUT,
            "type": "uint8",
            "shape": ["batch", "height", "width", 3],
            "colours": "RGB, 0 to 255; grey repeated three times, transparency composed over black, EXIF orientation applied",
            "sizes": f"2 to {longest_side(frame.height, frame.width)} pixels a side, one size a batch: the model resizes",
        },
        "frame": {
            "height": frame.height,
            "width": frame.width,
            "resize": frame.resize,
            "region_of_interest": frame.region is not None,
            "how": "done by the model, as Pillow's bilinear filter does it, the width first; pad: scaled to fit, in the middle, "
            "mirrored outwards",
        },
        "outputs": _outputs(bundle),
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
            "caveats": calibration.caveats(),
        },
        "check": {
            "against": "PyTorch in float32, the same decoded pixels",
            **found.to_dict(),
            "tolerance": TOLERANCE[precision]._asdict(),
            "accepted_beyond_tolerance": list(failures),
        },
        "settings": OPENVINO_SETTINGS if to == "openvino" else {},
        "versions": library_versions(),
    }


def _outputs(bundle: Bundle) -> dict[str, Any]:
    size = ["batch", bundle.frame.height, bundle.frame.width]
    outputs: dict[str, Any] = {
        "score": {
            "type": "float32",
            "shape": ["batch"],
            "meaning": "higher is more anomalous; held against thresholds.image; NaN where no place of the map shows the "
            "image, which is too thin: then there is no verdict",
        },
        "p_value": {
            "type": "float32",
            "shape": ["batch"],
            "meaning": "share of good parts that score as high; at most thresholds.level if and only if anomalous",
        },
        "anomalous": {
            "type": "bool",
            "shape": ["batch"],
            "meaning": "the verdict; true too where a score is no number",
        },
        "anomaly_map": {
            "type": "float32",
            "shape": size,
            "meaning": "distance a pixel, of the frame: resize it to the image's size; held against thresholds.pixel",
        },
    }
    if bundle.frame.resize == "pad":
        outputs[BOX] = {
            "type": "int32",
            "shape": [4],
            "meaning": "top, left, height, width: where the images lie in the map, in its pixels; cut that out first",
        }
    return outputs
