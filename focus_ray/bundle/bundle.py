"""Writes and reads bundles: a trained model as a folder of manifest.json and safetensors files, local or on S3.

Every byte is verified by its hash, and nothing is pickled. The manifest is the commit point. Tensor files carry their hash in
their name and are written first. The manifest lists them and carries a hash of itself. It replaces the previous manifest in a
single step. A reader therefore sees the complete old bundle or the complete new bundle, on a disk and on S3. If a file
disappears because the bundle is replaced during reading, the reader starts again with the new bundle.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from focus_ray.bundle.contents import (
    MAX_MANIFEST_BYTES,
    check_manifest_entries,
    check_memory_limit,
    check_moments_shapes,
    check_tensor_shapes,
    read_header,
)
from focus_ray.data.framing import InputFrame
from focus_ray.density.base import (
    NormalStatistics,
    collect_density_tensors,
    restore_bank,
    restore_density,
    restore_moments,
)
from focus_ray.density.reduction import ChannelReduction
from focus_ray.density.relations import ImageRelations
from focus_ray.detect.calibration import Calibration
from focus_ray.detect.detector import Detector
from focus_ray.detect.profile import ImageScoreProfile
from focus_ray.errors import BundleError, ConfigError, DataError
from focus_ray.features.backbones.base import build_meta_backbone
from focus_ray.features.network import FocusNet
from focus_ray.features.settings import ModelConfig
from focus_ray.fitting.regions import load_frame, make_frame
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.precision import choose_compute_dtype
from focus_ray.storage.files import (
    FileStat,
    file_exists,
    join_path,
    list_folder_entries,
    read_bytes,
    read_file_stat,
    read_stats_in_subfolders,
    remove_file,
    write_bytes,
)
from focus_ray.version import __version__

T = TypeVar("T")

FORMAT_VERSION = 7
# Format version -> settings that this format did not have yet, with the values that its bundles were trained with.
# A setting that is missing here too had its current default value.
_FP32 = {"precision": "fp32"}
_NO_PER_PLACE = {"per_place": None}
_MISSING_SETTINGS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "model": {"padding": "zeros", **_FP32},
        "scoring": {"image_score": "maximum"},
        "density": {"coreset": 0, **_NO_PER_PLACE, **_FP32},
    },
    2: {"model": _FP32, "density": {"coreset": 0, **_NO_PER_PLACE, **_FP32}},
    3: {"model": _FP32, "density": {**_NO_PER_PLACE, **_FP32}},  # without tiling, padding and regions
    4: {"model": _FP32, "density": {**_NO_PER_PLACE, **_FP32}},
    5: {"density": _NO_PER_PLACE},
    6: {},
    FORMAT_VERSION: {},
}
MANIFEST = "manifest.json"
_FIT_HASHES = "known_images"  # name of a tensor


class Bundle(NamedTuple):
    """The content of a bundle after it was read: the manifest, and the model as objects in RAM or GPU memory.

    Attributes:
        manifest: content of manifest.json, which docs/reference/bundle.md describes.
        config: the configuration that the model was trained with.
        detector: network and density that score images, on the device that the caller of `read_bundle` chose.
        calibration: thresholds and scores of the calibration images, for the number format in which the detector computes
            (`Calibration.convert_to_precision`).
        frame: the size to which every image is brought before it is scored, the method (stretch or pad), and the region of
            interest.
        fit_hashes: hash of the pixels (`shorten_hash`) of every training image in the density; empty if the bundle does not
            store hashes.
        descriptors: coarse features of the stored training images (see `NormalStatistics`); None if they are not stored.
        same_part_distance: distance between descriptors up to which two images may show the same physical part; None if it is
            not stored.
    """

    manifest: dict[str, Any]
    config: Config
    detector: Detector
    calibration: Calibration
    frame: InputFrame
    fit_hashes: frozenset[int] = frozenset()
    descriptors: Tensor | None = None
    same_part_distance: float | None = None

    @property
    def category(self) -> str:
        """Name of the category that the model inspects."""
        return str(self.manifest["category"])

    @property
    def version(self) -> str:
        """SHA-256 of the manifest, which identifies this bundle."""
        return str(self.manifest["sha256"])


def write_bundle(
    uri: str | Path,
    *,
    config: Config,
    category: str,
    detector: Detector,
    statistics: NormalStatistics,
    calibration: Calibration,
    data: dict[str, Any],
    metrics: dict[str, Any],
    fit_hashes: Sequence[int] | NDArray[np.int64] = (),
    frame: InputFrame | None = None,
) -> dict[str, Any]:
    """Writes a bundle and returns its manifest. Replaces an existing bundle at this address in one step.

    Args:
        uri: folder of the bundle, a local path or an s3:// URI.
        detector: built from `statistics` with `build_detector`.
        statistics: statistics of the training images. They are stored for later updates.
        calibration: if its `precision` is None, the stored copy gets the number format in which `detector` computes.
        data: provenance of the images, the manifest's entry "data": uri, fingerprint, num_fit, num_holdout.
        metrics: the manifest's entry "metrics": losses, indicators of a collapsed network, seconds of each stage.
        fit_hashes: `shorten_hash` of every training image from which the density was fitted. With these hashes an inspection
            recognises training images, and joining two bundles counts a shared image once.
        frame: its region of interest is stored. None: the region of interest is read as `config` defines it.

    Raises:
        DataError: the region of interest cannot be read, or a file cannot be written. Also if the new bundle is complete, but
            a file of the previous bundle cannot be deleted.
    """
    moments = statistics.moments
    if calibration.precision is None:
        calibration = replace(calibration, precision=describe_precision(config, detector.density.device))
    network = detector.net.state_dict()
    network.update({f"reduction.{name}": value for name, value in detector.reduction.state_dict().items()})
    density = collect_density_tensors(config.density, statistics, detector.density)
    if statistics.thetas is not None:
        density["thetas"] = statistics.thetas
    if statistics.shown is not None:
        density["shown"] = statistics.shown
    density.update(_pack_image_relation_tensors(statistics))
    region = (frame or load_frame(config, category)).region
    if region is not None:
        density["region"] = torch.from_numpy(region)
    if detector.profile is not None:
        density.update({f"profile.{name}": value for name, value in detector.profile._asdict().items()})
    if len(fit_hashes):
        density[_FIT_HASHES] = torch.tensor(sorted(fit_hashes), dtype=torch.int64)
    parts: dict[str, dict[str, Tensor]] = {"network": network, "density": density}
    if config.density.keep_moments:
        parts["moments"] = statistics.collect_tensors(density)
        if statistics.residual_scatter is not None:
            parts["moments"]["metric_scatter"] = statistics.residual_scatter
    files = {}
    for part, tensors in parts.items():
        content = save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        digest = hashlib.sha256(content).hexdigest()
        name = f"{part}-{digest[:16]}.safetensors"
        write_bytes(join_path(uri, name), content)
        files[part] = {"name": name, "sha256": digest, "num_bytes": len(content)}
    manifest: dict[str, Any] = {
        "format": "focus_ray bundle",
        "format_version": FORMAT_VERSION,
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "category": category,
        "config": config.model_dump(mode="json"),
        "data": data,
        "moments": {name: getattr(moments, name) for name in ("count", "height", "width", "channels")},
        "calibration": calibration.to_dict(),
        "metrics": metrics,
        "git_commit": read_git_commit(),
        "versions": read_library_versions(),
        "files": files,
    }
    manifest["sha256"] = compute_manifest_hash(manifest)
    write_bytes(join_path(uri, MANIFEST), json.dumps(manifest, indent=1).encode())
    # the manifest is committed: now the tensor files of the previous bundle can go
    listed_names = {entry["name"] for entry in files.values()}
    for name in list_folder_entries(uri):
        if name.endswith(".safetensors") and name not in listed_names:
            remove_file(join_path(uri, name))
    return manifest


def read_manifest(uri: str | Path) -> dict[str, Any]:
    """Reads a bundle's manifest and checks its format version, hash and entries.

    Raises: BundleError: the manifest is missing, unreadable, damaged or changed, has an entry that cannot be used, or has an
    unsupported format version.
    """
    try:
        text = read_bytes(join_path(uri, MANIFEST), max_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise BundleError(
            f"{uri}: this folder has no {MANIFEST}, so it is no bundle: give the bundle folder that `focus-ray train` printed"
        ) from None
    except DataError as error:
        raise BundleError(str(error)) from error
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{uri}/{MANIFEST}: not valid JSON ({error}): the bundle is damaged; fetch it again"
        ) from None
    if not isinstance(manifest, dict) or manifest.get("format") != "focus_ray bundle":
        raise BundleError(f"{uri}/{MANIFEST}: this file is not the manifest of a focus_ray bundle")
    if manifest.get("format_version") not in _MISSING_SETTINGS:
        raise BundleError(
            f"{uri}: the bundle has format {manifest.get('format_version')!r}, but this focus_ray ({__version__}) reads formats "
            f"{', '.join(map(str, sorted(_MISSING_SETTINGS)[:-1]))} and {FORMAT_VERSION}: install the focus_ray version that "
            "wrote the bundle, or train again"
        )
    if manifest.get("sha256") != compute_manifest_hash(manifest):
        raise BundleError(
            f"{uri}/{MANIFEST}: the file was changed after it was written (its hash differs): fetch the bundle again"
        )
    check_manifest_entries(manifest, str(uri))
    return manifest


def find_bundles_in_folder(place: str) -> dict[str, str]:
    """Returns category -> URI of its bundle, for a bundle, the folder of a run, or a folder of bundles.

    Args:
        place: address of the bundle or folder. If two bundles in a folder have the same category, the bundle whose folder name
            is last in alphabetical order is returned.

    Raises:
        DataError: `place` contains no bundle, or cannot be listed.
        BundleError: a manifest is unreadable or damaged, or has an unsupported format version.
    """
    if file_exists(join_path(place, MANIFEST)):
        return {str(read_manifest(place)["category"]): place}
    for root in (join_path(place, "bundles"), place):
        uris = [
            join_path(root, name) for name in list_folder_entries(root) if file_exists(join_path(root, name, MANIFEST))
        ]
        if uris:
            return {str(read_manifest(uri)["category"]): uri for uri in uris}
    runs = list_runs(place)
    if runs:
        raise DataError(
            f"{place}: this is a folder of runs: give a single run, for instance {join_path(place, runs[0])}"
        )
    raise DataError(f"{place}: no bundle here: give a bundle, or the folder of a run that `focus-ray train` made")


def read_bundle_stamps(place: str) -> dict[str, FileStat]:
    """Returns bundle URI -> stamp of its manifest file, for all bundles at an address; empty if there is none.

    A stamp is the file's time of change and size. This function reads no manifest, so a caller can poll it, compare the stamps,
    and read only the changed manifests. Times on S3 count whole seconds, so a stamp does not show two changes in a second.

    Args: place: see `find_bundles_in_folder`.

    Raises: DataError: the storage cannot be read.
    """
    if (stamp := read_file_stat(join_path(place, MANIFEST))) is not None:
        return {place: stamp}
    for root in (join_path(place, "bundles"), place):
        stamps = {join_path(root, name): stamp for name, stamp in read_stats_in_subfolders(root, MANIFEST).items()}
        if stamps:
            return stamps
    return {}


def list_runs(place: str) -> list[str]:
    """Returns the names of the runs in a folder: the names of all subfolders with a non-empty folder "bundles".

    Raises: DataError: a folder cannot be listed.
    """
    return [name for name in list_folder_entries(place) if list_folder_entries(join_path(place, name, "bundles"))]


def read_bundle(
    uri: str | Path,
    device: torch.device | str = "cpu",
    precision: str | None = None,
    max_bytes: int | None = None,
) -> Bundle:
    """Reads and verifies a bundle. Needs neither pretrained weights nor Ray, and an internet connection only for S3.

    Args:
        device: device for the detector.
        precision: auto, fp32 or bf16; overrides model.precision and density.precision. None: the bundle's settings.
        max_bytes: limit in bytes that is applied separately to the tensor files, to the tensors in memory, and to the temporary
            memory of each large step of scoring. A larger bundle is refused before its tensors are allocated. None: no limit.

    Raises: BundleError: the bundle is missing, damaged, changed, too large, or has an unsupported format version or setting.
    """
    return _read_with_retry(uri, lambda manifest: _read_bundle_of_manifest(uri, manifest, device, precision, max_bytes))


def _read_with_retry(uri: str | Path, read: Callable[[dict[str, Any]], T]) -> T:
    """Reads the manifest of a bundle, calls `read` with this manifest, and returns the result of `read`.

    If the bundle was replaced meanwhile, calls `read` again with the new manifest.

    Raises: BundleError: the manifest cannot be read, or `read` raises a BundleError although the bundle was not replaced. Any
        other error of `read`.
    """
    manifest = read_manifest(uri)
    while True:
        try:
            return read(manifest)
        except BundleError:
            current_manifest = read_manifest(uri)
            if current_manifest["sha256"] == manifest["sha256"]:
                raise  # the same bundle: the error is real
            manifest = current_manifest


def _read_bundle_of_manifest(
    uri: str | Path,
    manifest: dict[str, Any],
    device: torch.device | str,
    precision: str | None = None,
    max_bytes: int | None = None,
) -> Bundle:
    """Reads the bundle that `manifest` describes, for `read_bundle`, which explains the arguments and errors."""
    address = str(uri)
    try:
        settings = add_missing_settings(manifest)
        for part in ("model", "density") if precision is not None else ():
            settings[part] = {**settings[part], "precision": precision}
        config = parse_config(settings, f"{uri}/{MANIFEST}", is_fitted=True)
        calibration = Calibration.from_dict(manifest["calibration"]).convert_to_precision(
            describe_precision(config, device)
        )
        category = str(manifest["category"])
        entries = {part: manifest["files"][part] for part in ("network", "density")}
    except (ConfigError, DataError, KeyError, TypeError) as error:
        raise BundleError(f"{uri}: the manifest does not fit this version of focus_ray: {error}") from error
    num_bytes = sum(entry["num_bytes"] for entry in entries.values())
    if max_bytes is not None and num_bytes > max_bytes:
        raise BundleError(f"{uri}: the tensor files have {num_bytes} bytes, but the limit is {max_bytes}")
    contents = {part: _read_verified_bytes(uri, entry) for part, entry in entries.items()}
    # shapes and sizes are checked from the headers, before any tensor is allocated: the bundle may be hostile
    headers = {part: read_header(content, address) for part, content in contents.items()}
    try:
        check_tensor_shapes(config, manifest["moments"], headers["network"], headers["density"], address)
        if max_bytes is not None:
            check_memory_limit(config, headers["network"], headers["density"], max_bytes, address)
        network, density = (load_tensors(contents.pop(part)) for part in ("network", "density"))
        net = FocusNet(config.model, build_meta_backbone(config.model.backbone))
        reduction = ChannelReduction(net.backbone.spec.channels, config.density, config.train.seed)
        prefix = "reduction."
        reduction_state = {name.removeprefix(prefix): t for name, t in network.items() if name.startswith(prefix)}
        net_state = {name: value for name, value in network.items() if not name.startswith(prefix)}
        reduction.load_state_dict(reduction_state)
        missing, unexpected = net.load_state_dict(net_state, strict=False, assign=True)
        if missing or unexpected:
            raise BundleError(f"{uri}: network tensors missing {missing[:3]}, unknown {unexpected[:3]}")
        shape = manifest["moments"]
        grid = config.model.density_tile_grid
        fitted = restore_density(config.density, density, shape["height"], shape["width"], device, grid)
        region = density["region"].numpy() if category in config.data.regions else None
        frame = make_frame(config, region)
        net = net.to(device).to(memory_format=torch.channels_last)
        profile = None
        if config.scoring.image_score == "profile" and "profile.weight" in density:
            profile = ImageScoreProfile(*(density[f"profile.{name}"].to(device) for name in ImageScoreProfile._fields))
        detector = Detector(net, reduction.to(device), fitted, config.scoring, profile)
        fit_hashes = frozenset(density[_FIT_HASHES].tolist()) if _FIT_HASHES in density else frozenset()
        _, descriptors, distance = _unpack_image_relation_tensors(density)
    except BundleError:
        raise
    except (RuntimeError, LookupError, ValueError, TypeError, SafetensorError) as error:
        raise BundleError(f"{uri}: the tensors do not fit the bundle's configuration: {error}") from error
    return Bundle(manifest, config, detector, calibration, frame, fit_hashes, descriptors, distance)


def add_missing_settings(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings in a manifest. Adds the settings that did not exist in the bundle's format version.

    Before format 7, the features of DINOv2 had no norm: these backbones are now called `..._raw`. Feature alignment repeated the
    border of the features.
    """
    config = dict(manifest["config"])
    if manifest["format_version"] < 7:
        model = config["model"]
        feature_alignment = {"padding": "border", **model.get("feature_alignment", {})}
        backbone = model.get("backbone", ModelConfig.model_fields["backbone"].default)
        name = f"{backbone}_raw" if backbone.startswith("dinov2_") else backbone
        config["model"] = {**model, "backbone": name, "feature_alignment": feature_alignment}
    for section, values in _MISSING_SETTINGS[manifest["format_version"]].items():
        config[section] = {**values, **config[section]}
    return config


def read_statistics(uri: str | Path) -> NormalStatistics:
    """Reads a bundle's statistics of its training images, from which the density is built.

    Images can be added to the statistics and removed from them, and statistics of several bundles can be joined.

    Raises:
        BundleError: the bundle stores no statistics, or it is missing, damaged or changed.
        ConfigError: the manifest has a setting that this version of focus_ray cannot use.
    """
    return _read_with_retry(uri, lambda manifest: _read_statistics_of_manifest(uri, manifest))


def _read_statistics_of_manifest(uri: str | Path, manifest: dict[str, Any]) -> NormalStatistics:
    """Reads the statistics of the bundle that `manifest` describes. Raises: BundleError, ConfigError: see `read_statistics`."""
    if "moments" not in manifest["files"]:
        raise BundleError(f"{uri}: the bundle stores no moments, so it cannot be updated: train the category again")
    shape = manifest["moments"]
    content = _read_verified_bytes(uri, manifest["files"]["density"])
    read_header(content, str(uri))
    density = load_tensors(content)
    content = _read_verified_bytes(uri, manifest["files"]["moments"])
    check_moments_shapes(shape, read_header(content, str(uri)), str(uri))
    tensors = load_tensors(content)
    del content  # frees the file's bytes before the stored embeddings are assembled
    moments = restore_moments(shape["count"], shape["height"], shape["width"], tensors)
    grid = parse_config(add_missing_settings(manifest), f"{uri}/{MANIFEST}", is_fitted=True).model.density_tile_grid
    bank = restore_bank(moments, grid, tensors, density)
    scatter, shown = tensors.get("metric_scatter"), density.get("shown")
    return NormalStatistics(
        moments, bank, density.get("thetas"), scatter, shown, grid, *_unpack_image_relation_tensors(density)
    )


def _pack_image_relation_tensors(statistics: NormalStatistics) -> dict[str, Tensor]:
    """Returns name -> tensor for the tensors that tell which images show the same physical part.

    These are the relations between images, the descriptors, and `same_part_distance` (see `NormalStatistics`). Relations that
    are None are left out. Descriptors and `same_part_distance` are left out if one of the two is None.
    """
    tensors = {}
    if statistics.relations is not None:
        tensors["relations.related"] = statistics.relations.related.to(torch.uint8)
        tensors["relations.groups"] = statistics.relations.groups
    if statistics.descriptors is not None and statistics.same_part_distance is not None:
        tensors["descriptors"] = statistics.descriptors
        tensors["same_part_distance"] = torch.tensor([statistics.same_part_distance])
    return tensors


def _unpack_image_relation_tensors(
    density: dict[str, Tensor],
) -> tuple[ImageRelations | None, Tensor | None, float | None]:
    """Returns (relations, descriptors, same_part_distance) from the tensors of a density file; None for a missing value."""
    relations = None
    if "relations.related" in density:
        relations = ImageRelations(density["relations.related"].bool(), density["relations.groups"])
    distance = float(density["same_part_distance"]) if "same_part_distance" in density else None
    return relations, density.get("descriptors"), distance


def copy_bundle(uri: str | Path, manifest: dict[str, Any], output: str | Path) -> int:
    """Copies a bundle, verifies the hash of every copied file, and writes `manifest` last.

    Args:
        manifest: the bundle's manifest, or a changed manifest that lists the same tensor files.
        output: folder of the copy; if it equals `uri`, only the manifest is written and no file is verified.

    Returns: number of bytes written.

    Raises:
        BundleError: a tensor file is missing or damaged.
        DataError: the output cannot be written.
    """
    num_bytes = 0
    for entry in manifest["files"].values() if str(output) != str(uri) else ():
        content = _read_verified_bytes(uri, entry)
        write_bytes(join_path(output, str(entry["name"])), content)
        num_bytes += len(content)
    text = json.dumps(manifest, indent=1).encode()
    write_bytes(join_path(output, MANIFEST), text)
    return num_bytes + len(text)


def _read_verified_bytes(uri: str | Path, entry: dict[str, Any]) -> bytes:
    """Returns the bytes of a tensor file of the bundle after a check of its hash.

    Args:
        entry: the manifest's entry of the file, already checked by `check_manifest_entries`.

    Raises: BundleError: the file is missing, unreadable or changed. A file that is larger than the entry states is not read.
    """
    name, num_bytes = str(entry["name"]), int(entry["num_bytes"])
    try:
        content = read_bytes(join_path(uri, name), max_bytes=num_bytes)
    except FileNotFoundError:
        raise BundleError(f"{uri}: {name} is missing: copy the whole folder again") from None
    except DataError as error:
        raise BundleError(str(error)) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["sha256"]:
        raise BundleError(
            f"{uri}/{name}: the SHA-256 is {digest[:16]}..., but the manifest says {entry['sha256'][:16]}...: "
            "the file was changed or cut short; fetch the bundle again"
        )
    return content


def compute_manifest_hash(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 of a manifest. Ignores the entry "sha256", in which the manifest stores this hash."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_git_commit() -> str | None:
    """Returns the git commit of the running source code, followed by '+changes' if files were changed; None if it is unknown."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():  # an installed package: a repository in a parent folder is another project's
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip()


def read_library_versions() -> dict[str, str]:
    """Returns library -> version, for focus_ray, Python and torch, and for torchvision, numpy and ray if they are installed."""
    versions = {"focus_ray": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchvision", "numpy", "ray"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_precision(config: Config, device: torch.device | str) -> str:
    """Returns the number format in which backbone and density compute on a device, such as "bfloat16".

    If the two formats differ, the text names both, the backbone first: "float32 and bfloat16".
    """
    settings = (config.model.precision, config.density.precision)
    names = [str(choose_compute_dtype(precision, device)).removeprefix("torch.") for precision in settings]
    return names[0] if names[0] == names[1] else " and ".join(names)
