"""The trained artifact: a directory of manifest.json and safetensors, local or on S3; verified byte by byte, no pickle.

The manifest is the commit point. Tensor files carry their own hash in their name and are written first; the manifest,
which lists them and carries a hash of itself, replaces the former one in a single step. A reader therefore sees the old
bundle or the new one, whole, on a disk as on S3: one that finds a file gone because the bundle was replaced while it read takes
the new one.
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

from focus_ray import __version__
from focus_ray.bundle.contents import (
    MAX_MANIFEST_BYTES,
    check_manifest,
    check_memory,
    check_moments,
    check_shapes,
    read_header,
)
from focus_ray.config import Config, parse_config
from focus_ray.data.framing import Frame
from focus_ray.data.regions import load_frame, make_frame
from focus_ray.density.base import Statistics, density_tensors, load_density
from focus_ray.density.moments import Moments, moments_tensors, unpack_lower
from focus_ray.density.nearest import restore_bank, select_unused_embeddings
from focus_ray.density.relations import Relations
from focus_ray.density.tiles import join_bank_of_tiles
from focus_ray.errors import BundleError, ConfigError, DataError
from focus_ray.evaluation.calibration import Calibration
from focus_ray.fitting.profile import Profile
from focus_ray.fitting.scoring import Detector
from focus_ray.model.backbones.base import build_meta_backbone
from focus_ray.model.network import FocusNet
from focus_ray.model.reduction import ChannelReduction
from focus_ray.precision import describe_precision
from focus_ray.storage import (
    FileStamp,
    exists,
    join,
    list_names,
    read_bytes,
    read_stamp,
    read_stamps,
    remove_file,
    write_bytes,
)

T = TypeVar("T")

FORMAT_VERSION = 6
# what bundles of a former format had no choice of, and how they were made; what is left out here was as the defaults are
_FP32 = {"precision": "fp32"}
_WHOLE = {"per_place": None}
_FORMER: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "model": {"padding": "zeros", **_FP32},
        "scoring": {"image_score": "maximum"},
        "density": {"coreset": 0, **_WHOLE, **_FP32},
    },
    2: {"model": _FP32, "density": {"coreset": 0, **_WHOLE, **_FP32}},
    3: {"model": _FP32, "density": {**_WHOLE, **_FP32}},  # without tiling, padding and regions
    4: {"model": _FP32, "density": {**_WHOLE, **_FP32}},
    5: {"density": _WHOLE},
    FORMAT_VERSION: {},
}
MANIFEST = "manifest.json"
_KNOWN = "known_images"
_NOT_FOR_SCORING = ("projector.", "predictor.")  # f and g are dropped [kin]


class Bundle(NamedTuple):
    """What a bundle holds once it is read.

    manifest: see docs/reference/bundle.md.  detector: on the device asked for.
    calibration: thresholds and p-values, moved to the precision that the detector computes in (`Calibration.at_precision`).
    frame: what images are brought to, the region of interest included.
    known: `short_hash` of the images that the density was made of; empty where that was not kept.
    descriptors, same_part_distance: of the images of the density, as of `Statistics`; None where they were not kept.
    """

    manifest: dict[str, Any]
    config: Config
    detector: Detector
    calibration: Calibration
    frame: Frame
    known: frozenset[int] = frozenset()
    descriptors: Tensor | None = None
    same_part_distance: float | None = None

    @property
    def category(self) -> str:
        return str(self.manifest["category"])

    @property
    def version(self) -> str:
        """The manifest's hash: names this very artifact."""
        return str(self.manifest["sha256"])


def write_bundle(
    uri: str | Path,
    *,
    config: Config,
    category: str,
    detector: Detector,
    statistics: Statistics,
    calibration: Calibration,
    data: dict[str, Any],
    metrics: dict[str, Any],
    known: Sequence[int] | NDArray[np.int64] = (),
    frame: Frame | None = None,
) -> dict[str, Any]:
    """Writes everything; replaces a bundle that is there in one step.

    Args:
        frame: what images are brought to; None: as the config says.
        known: `short_hash` of the images that the density was made of, so that they are told when they are inspected, and
            counted once when bundles are joined.
        detector: as `build_detector` makes it of the statistics.
        data: provenance of the images: uri, fingerprint, num_fit, num_holdout.
        metrics: figures worth keeping: losses, collapse figures, timings.

    Returns: the manifest.

    Raises: DataError: the place cannot be written.
    """
    moments = statistics.moments
    if calibration.precision is None:
        calibration = replace(calibration, precision=describe_precision(config, detector.density.device))
    network = {
        name: value for name, value in detector.net.state_dict().items() if not name.startswith(_NOT_FOR_SCORING)
    }
    network.update({f"reduction.{name}": value for name, value in detector.reduction.state_dict().items()})
    density = density_tensors(config.density, statistics, detector.density)
    if statistics.thetas is not None:
        density["thetas"] = statistics.thetas
    if statistics.shown is not None:
        density["shown"] = statistics.shown
    density.update(_origin_tensors(statistics))
    region = (frame or load_frame(config, category)).region
    if region is not None:
        density["region"] = torch.from_numpy(region)
    if detector.profile is not None:
        density.update({f"profile.{name}": value for name, value in detector.profile._asdict().items()})
    if len(known):
        density[_KNOWN] = torch.tensor(sorted(known), dtype=torch.int64)
    parts: dict[str, dict[str, Tensor]] = {"network": network, "density": density}
    if config.density.keep_moments:
        parts["moments"] = moments_tensors(moments)
        tiles = statistics.per_tile
        if "bank.images" in density and tiles.bank is not None:
            whole = tiles.bank[:, :, : moments.channels]
            parts["moments"]["bank.rest"] = select_unused_embeddings(whole, density["bank.images"])
        if config.density.keeps_coreset and statistics.bank is not None:
            parts["moments"]["coreset_bank"] = statistics.bank[:, :, moments.channels :]
        if statistics.scatter is not None:
            parts["moments"]["metric_scatter"] = statistics.scatter
    files = {}
    for part, tensors in parts.items():
        content = save_tensors({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
        digest = hashlib.sha256(content).hexdigest()
        name = f"{part}-{digest[:16]}.safetensors"
        write_bytes(join(uri, name), content)
        files[part] = {"name": name, "sha256": digest, "num_bytes": len(content)}
    manifest: dict[str, Any] = {
        "format": "focus_ray bundle",
        "format_version": FORMAT_VERSION,
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "category": category,
        "config": config.model_dump(mode="json"),
        "data": data,
        "moments": {
            "count": moments.count,
            "height": moments.height,
            "width": moments.width,
            "channels": moments.channels,
        },
        "calibration": calibration.to_dict(),
        "metrics": metrics,
        "git_commit": git_commit(),
        "versions": library_versions(),
        "files": files,
    }
    manifest["sha256"] = manifest_hash(manifest)
    write_bytes(join(uri, MANIFEST), json.dumps(manifest, indent=1).encode())
    kept = {entry["name"] for entry in files.values()}
    for name in list_names(uri):
        if name.endswith(".safetensors") and name not in kept:
            remove_file(join(uri, name))
    return manifest


def read_manifest(uri: str | Path) -> dict[str, Any]:
    """Raises: BundleError: none there, of another format version, or changed since it was written."""
    try:
        text = read_bytes(join(uri, MANIFEST), max_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        raise BundleError(
            f"{uri}: no {MANIFEST} there, so this is no bundle: give the folder that `focus-ray train` names"
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
        raise BundleError(f"{uri}/{MANIFEST}: not the manifest of a focus_ray bundle")
    if manifest.get("format_version") not in _FORMER:
        raise BundleError(
            f"{uri}: bundle format {manifest.get('format_version')!r}, this focus_ray ({__version__}) reads "
            f"{', '.join(map(str, sorted(_FORMER)[:-1]))} and {FORMAT_VERSION}: install the version that wrote it, or train again"
        )
    if manifest.get("sha256") != manifest_hash(manifest):
        raise BundleError(f"{uri}/{MANIFEST}: changed since it was written (its hash differs): fetch the bundle again")
    check_manifest(manifest, str(uri))
    return manifest


def find_bundles(place: str) -> dict[str, str]:
    """Category -> bundle, of a bundle, a run's folder or a folder of bundles.

    Raises: DataError: none there.
    """
    if exists(join(place, MANIFEST)):
        return {str(read_manifest(place)["category"]): place}
    for root in (join(place, "bundles"), place):
        found = [join(root, name) for name in list_names(root) if exists(join(root, name, MANIFEST))]
        if found:
            return {str(read_manifest(uri)["category"]): uri for uri in found}
    runs = runs_in(place)
    if runs:
        raise DataError(f"{place}: a folder of runs: give one of them, for instance {join(place, runs[0])}")
    raise DataError(f"{place}: no bundle here: give a bundle, or the folder of a run that `focus-ray train` made")


def stamp_bundles(place: str) -> dict[str, FileStamp]:
    """Bundle -> its manifest's stamp, of the bundles that `find_bundles` finds; empty where there is none.

    Reads no manifest: asked often, it shows which have to be read again.
    """
    if (own := read_stamp(join(place, MANIFEST))) is not None:
        return {place: own}
    for root in (join(place, "bundles"), place):
        found = {join(root, name): one for name, one in read_stamps(root, MANIFEST).items()}
        if found:
            return found
    return {}


def runs_in(place: str) -> list[str]:
    """Names of the runs in a folder."""
    return [name for name in list_names(place) if list_names(join(place, name, "bundles"))]


def read_bundle(
    uri: str | Path,
    device: torch.device | str = "cpu",
    precision: str | None = None,
    max_bytes: int | None = None,
) -> Bundle:
    """Reads and verifies a bundle. Needs no weights, no Ray and no network besides the bundle's own place.

    Args:
        precision: auto, fp32 or bf16, in place of model.precision and density.precision; None: as the bundle says.
        max_bytes: of memory that the model may take; a larger bundle is refused before it is read. None: no limit.

    Raises: BundleError: missing, damaged, changed, too large, or of another format version.
    """
    return _whole(uri, lambda manifest: _read_bundle(uri, manifest, device, precision, max_bytes))


def _whole(uri: str | Path, read: Callable[[dict[str, Any]], T]) -> T:
    """What `read` makes of the bundle; once more where it was replaced meanwhile, and its former files were gone."""
    manifest = read_manifest(uri)
    while True:
        try:
            return read(manifest)
        except BundleError:
            now = read_manifest(uri)
            if now["sha256"] == manifest["sha256"]:
                raise
            manifest = now


def _read_bundle(
    uri: str | Path,
    manifest: dict[str, Any],
    device: torch.device | str,
    precision: str | None = None,
    max_bytes: int | None = None,
) -> Bundle:
    place = str(uri)
    try:
        tree = config_as_made(manifest)
        if precision is not None:
            tree = {**tree, **{part: {**tree[part], "precision": precision} for part in ("model", "density")}}
        config = parse_config(tree, source=f"{uri}/{MANIFEST}")
        calibration = Calibration.from_dict(manifest["calibration"]).at_precision(describe_precision(config, device))
        category = str(manifest["category"])
        entries = {part: manifest["files"][part] for part in ("network", "density")}
    except (ConfigError, DataError, KeyError, TypeError) as error:
        raise BundleError(f"{uri}: its manifest does not fit this version of focus_ray: {error}") from error
    num_bytes = sum(entry["num_bytes"] for entry in entries.values())
    if max_bytes is not None and num_bytes > max_bytes:
        raise BundleError(f"{uri}: its tensor files have {num_bytes} bytes, and the limit is {max_bytes}")
    contents = {part: _read_file(uri, entry) for part, entry in entries.items()}
    headers = {part: read_header(content, place) for part, content in contents.items()}
    try:
        check_shapes(config, manifest["moments"], headers["network"], headers["density"], place)
        if max_bytes is not None:
            check_memory(config, headers["network"], headers["density"], max_bytes, place)
        network, density = (load_tensors(contents.pop(part)) for part in ("network", "density"))
        net = FocusNet(config.model, build_meta_backbone(config.model.backbone), head=False)
        reduction = ChannelReduction(net.backbone.spec.channels, config.density, config.train.seed)
        prefix = "reduction."
        reduction_state = {name.removeprefix(prefix): t for name, t in network.items() if name.startswith(prefix)}
        net_state = {name: value for name, value in network.items() if not name.startswith(prefix)}
        reduction.load_state_dict(reduction_state)
        missing, unexpected = net.load_state_dict(net_state, strict=False, assign=True)
        if missing or unexpected:
            raise BundleError(f"{uri}: network tensors missing {missing[:3]}, unknown {unexpected[:3]}")
        shape = manifest["moments"]
        grid = config.model.shared_grid
        fitted = load_density(config.density, density, shape["height"], shape["width"], device, grid)
        region = density["region"].numpy() if category in config.data.regions else None
        frame = make_frame(config, region)
        net = net.to(device).to(memory_format=torch.channels_last)
        profile = None
        if config.scoring.image_score == "profile" and "profile.weight" in density:
            profile = Profile(*(density[f"profile.{name}"].to(device) for name in Profile._fields))
        detector = Detector(net, reduction.to(device), fitted, config.scoring, profile)
        known = frozenset(density[_KNOWN].tolist()) if _KNOWN in density else frozenset()
        _, descriptors, distance = _read_origins(density)
    except BundleError:
        raise
    except (RuntimeError, LookupError, ValueError, TypeError, SafetensorError) as error:
        raise BundleError(f"{uri}: its tensors do not fit its config: {error}") from error
    return Bundle(manifest, config, detector, calibration, frame, known, descriptors, distance)


def config_as_made(manifest: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a manifest, with what its format did not name yet."""
    config = dict(manifest["config"])
    for section, values in _FORMER[manifest["format_version"]].items():
        config[section] = {**values, **config[section]}
    return config


def read_statistics(uri: str | Path) -> Statistics:
    """What a bundle keeps of its images, to add images to, to take images from, or to join with another site's.

    Raises: BundleError: it keeps none, or as `read_manifest`.
    """
    return _whole(uri, lambda manifest: _read_statistics(uri, manifest))


def _read_statistics(uri: str | Path, manifest: dict[str, Any]) -> Statistics:
    if "moments" not in manifest["files"]:
        raise BundleError(f"{uri}: keeps no moments: train with density.keep_moments=true to update a bundle later")
    shape = manifest["moments"]
    content = _read_file(uri, manifest["files"]["moments"])
    check_moments(shape, read_header(content, str(uri)), str(uri))
    tensors = load_tensors(content)
    del content
    moments = Moments(0, 0, 0)
    moments.height, moments.width, moments.channels = shape["height"], shape["width"], shape["channels"]
    moments.count = shape["count"]
    moments.mean, moments.scatter = tensors["mean"], unpack_lower(tensors["scatter"], symmetric=True)
    density = _read_part(uri, manifest, "density")
    grid = parse_config(config_as_made(manifest), source=f"{uri}/{MANIFEST}").model.shared_grid
    bank = density.get("bank")
    if bank is not None and "bank.rest" in tensors:
        bank = restore_bank(bank, density["bank.images"], tensors["bank.rest"])
    if bank is not None:
        bank = join_bank_of_tiles(bank, grid, moments.height, moments.width)
    if bank is not None and "coreset_bank" in tensors:
        bank = torch.cat([bank, tensors["coreset_bank"]], dim=2)
    scatter, shown = tensors.get("metric_scatter"), density.get("shown")
    return Statistics(moments, bank, density.get("thetas"), scatter, shown, grid, *_read_origins(density))


def _origin_tensors(statistics: Statistics) -> dict[str, Tensor]:
    """What a bundle keeps to tell which images show the same part: relations, descriptors and their distance."""
    tensors = {}
    if statistics.relations is not None:
        tensors["relations.related"] = statistics.relations.related.to(torch.uint8)
        tensors["relations.groups"] = statistics.relations.groups
    if statistics.descriptors is not None and statistics.same_part_distance is not None:
        tensors["descriptors"] = statistics.descriptors
        tensors["same_part_distance"] = torch.tensor([statistics.same_part_distance])
    return tensors


def _read_origins(density: dict[str, Tensor]) -> tuple[Relations | None, Tensor | None, float | None]:
    """Inverse of `_origin_tensors`; each is None where the bundle does not keep it."""
    relations = None
    if "relations.related" in density:
        relations = Relations(density["relations.related"].bool(), density["relations.groups"])
    distance = float(density["same_part_distance"]) if "same_part_distance" in density else None
    return relations, density.get("descriptors"), distance


def copy_bundle(uri: str | Path, manifest: dict[str, Any], output: str | Path) -> int:
    """Copies the files that a manifest of a bundle lists, each verified, and the manifest last; it may say other things than
    the bundle's own. Where both places are one, only the manifest is written.

    Returns: bytes.  Raises: BundleError: a file is missing or damaged.  DataError: the place cannot be written.
    """
    num_bytes = 0
    for entry in manifest["files"].values() if str(output) != str(uri) else ():
        content = _read_file(uri, entry)
        write_bytes(join(output, str(entry["name"])), content)
        num_bytes += len(content)
    text = json.dumps(manifest, indent=1).encode()
    write_bytes(join(output, MANIFEST), text)
    return num_bytes + len(text)


def _read_part(uri: str | Path, manifest: dict[str, Any], part: str) -> dict[str, Tensor]:
    content = _read_file(uri, manifest["files"][part])
    read_header(content, str(uri))
    return load_tensors(content)


def _read_file(uri: str | Path, entry: dict[str, Any]) -> bytes:
    """A file that a checked manifest lists, verified. Its size is compared before a byte of it is read."""
    name, num_bytes = str(entry["name"]), int(entry["num_bytes"])
    try:
        content = read_bytes(join(uri, name), max_bytes=num_bytes)
    except FileNotFoundError:
        raise BundleError(f"{uri}: {name} is missing: copy the whole folder again") from None
    except DataError as error:
        raise BundleError(str(error)) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != entry["sha256"]:
        raise BundleError(
            f"{uri}/{name}: its SHA-256 is {digest[:16]}..., the manifest says {entry['sha256'][:16]}...: "
            "the file was changed or cut short; fetch the bundle again"
        )
    return content


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Of all that a manifest says but the hash itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def git_commit() -> str | None:
    """The commit of the source tree the package runs from, with '+changes' where it differs; None when unknown."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():  # installed: a repository further up would be someone else's
        return None
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder, capture_output=True, text=True, timeout=5, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")


def library_versions() -> dict[str, str]:
    """Versions of what shapes a result."""
    versions = {"focus_ray": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchvision", "numpy", "ray"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
