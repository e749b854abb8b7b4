"""Python interface: fit a model on good images, inspect new images, save the model. Same code as the commands, without a cluster.

model = focus_ray.fit("photographs/", weights="resnet18.pth")
print(model.inspect("new.png").verdict)
model.save("model")
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from focus_ray.bundle.bundle import MANIFEST, copy_bundle, read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.published import find_single_bundle
from focus_ray.data.images import ImageError, decode_image_with_info, encode_pillow_image, hash_pixels
from focus_ray.data.importers.base import list_image_files, list_subfolders
from focus_ray.data.importers.groups import GroupByTable, GroupRule
from focus_ray.data.listing import IMAGE_SUFFIXES, find_image_files
from focus_ray.data.read import list_categories, read_test_rows
from focus_ray.data.schema import Row
from focus_ray.detect.inspection import Inspection
from focus_ray.drawing.png import encode_png
from focus_ray.errors import ConfigError, DataError, check_extra_is_installed
from focus_ray.fitting.fit import check_fit_prerequisites
from focus_ray.fitting.settings import Config, find_setting_key, parse_config
from focus_ray.fitting.split import compute_split_rule
from focus_ray.ingestion.ingest import ingest
from focus_ray.names import make_valid_name
from focus_ray.settings.sections import read_yaml_mapping
from focus_ray.settings.standard import find_config_file
from focus_ray.storage.files import join_path, read_bytes
from focus_ray.training.category import fit_category, get_bundle_uri, train_network_of_plant

Image = str | Path | bytes | NDArray[Any] | Pillow.Image
"""An image: the path or the bytes of an image file, a Pillow image, or pixels as uint8 (H, W) grey or (H, W, 3) RGB."""

_DEFAULT_CATEGORY = "images"  # name of a category whose images have no folder with a name


class Model:
    """A fitted model of one category. `fit` and `load` return it.

    Attributes:
        inspector: scores images with the bundle.
        category: name of the category.
    """

    def __init__(
        self, inspector: Inspector, place: str, scratch: tempfile.TemporaryDirectory[str] | None = None
    ) -> None:
        self.inspector, self.category = inspector, inspector.bundle.category
        self._place, self._scratch = place, scratch  # the temporary folder must live as long as the model

    def __repr__(self) -> str:
        """Returns one line with category, backbone, number of photographs and threshold."""
        bundle = self.inspector.bundle
        model, calibration = bundle.config.model, bundle.calibration
        return (
            f"Model({self.category!r}: {model.backbone} at {model.image_size_px} px, {bundle.manifest['data']['num_fit']} "
            f"photographs, threshold {calibration.image_threshold:.4g} for {100 * calibration.target_fpr:g} % false alarms)"
        )

    @property
    def threshold(self) -> float:
        """The image threshold: an image with a higher score is anomalous."""
        return self.inspector.bundle.calibration.image_threshold

    @property
    def caveats(self) -> list[str]:
        """Sentences about the limits of the verdicts for the user."""
        return self.inspector.bundle.calibration.describe_limits()

    def inspect(self, image: Image) -> Inspection:
        """Inspects one image. Raises: DataError: the image cannot be read, or has none of the types of `Image`."""
        return self.inspector.inspect([image if isinstance(image, (str, Path)) else _encode_image_file(image)])[0]

    def inspect_all(self, images: str | Path | Sequence[Image] | NDArray[Any]) -> list[Inspection]:
        """Inspects images and returns one `Inspection` for each, in order.

        Args: images: a folder; a list; an array (N, H, W, 3), or (N, H, W) of grey images; or one image, (H, W, 3) or (H, W).

        Raises: DataError: as `inspect`; the message names the path or the number of the image.
        """
        if isinstance(images, (str, Path)):
            return self.inspector.inspect(find_image_files(Path(images).expanduser()))
        return self.inspector.inspect(
            [
                image if isinstance(image, (str, Path)) else _encode_image_file(image, f"image {number}")
                for number, image in enumerate(_convert_to_image_list(images))
            ]
        )

    def evaluate(
        self, images: str | Path | Sequence[Image] | None = None, labels: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Computes metrics on labelled images, as `focus-ray evaluate` does.

        Args:
            images: the test images of a folder that `focus-ray ingest` can read; or a list of images; None: the test images
                of the folder that the model was fitted on.
            labels: 0 good or 1 bad for each image of a list.

        Images that the model was trained on are left out of all metrics. "trained_on" of the result has their number.

        Raises:
            DataError: there is no labelled image that the model was not trained on, a label is not 0 or 1, or the numbers of
                images and labels differ.
        """
        if labels is not None:
            if images is None:
                raise DataError("evaluate got labels without images: give the images that the labels belong to")
            image_list = [images] if isinstance(images, (str, Path)) else _convert_to_image_list(images)
            if len(image_list) != len(labels):
                raise DataError(f"{len(image_list)} images, but {len(labels)} labels: give one label for each image")
            return self.inspector.evaluate(_iterate_test_records(image_list, _parse_labels(labels)))
        if images is None:
            data = str(self.inspector.bundle.config.data.uri)
            if not Path(data).expanduser().exists() and "://" not in data:
                raise DataError(
                    f"{data}: the images that this model was fitted on do not exist any more: give a folder, or images and labels"
                )
            return self.inspector.evaluate(read_test_rows(data, self.category))
        if not isinstance(images, (str, Path)):
            raise DataError("evaluate needs labels for a list of images: 0 for a good part, 1 for a bad part")
        with tempfile.TemporaryDirectory() as folder:
            data, category = _ensure_ingested(Path(images).expanduser(), Path(folder))
            return self.inspector.evaluate(read_test_rows(data, category))

    def save(self, place: str | Path) -> str:
        """Writes the model as a bundle for `load`, `focus-ray inspect` and `focus-ray serve`. Returns the place as text.

        Args: place: path of a folder, or an s3:// URI. An existing bundle is replaced.
        """
        copy_bundle(self._place, read_manifest(self._place), place)
        return str(place)

    def to_files(self) -> dict[str, bytes]:
        """Returns the content of all files of the bundle by name, for instance to pickle the model."""
        manifest = read_manifest(self._place)
        names = [MANIFEST, *(str(entry["name"]) for entry in manifest["files"].values())]
        return {name: read_bytes(join_path(self._place, name)) for name in names}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Model:
        """Makes a model from the result of `to_files`. Raises: BundleError: the files are no bundle."""
        scratch = tempfile.TemporaryDirectory(prefix="focus-ray-")
        for name, content in files.items():
            (Path(scratch.name) / Path(name).name).write_bytes(content)
        return cls(Inspector.load(scratch.name), scratch.name, scratch)


def fit(
    images: str | Path | NDArray[Any] | Sequence[Image],
    *,
    groups: Sequence[str | int | None] | None = None,
    group_by: str | None = None,
    log: Callable[[str], None] | None = None,
    **settings: Any,
) -> Model:
    """Fits a model on good images in this process, with the standard configuration.

    Args:
        images: a folder of good images; the good training images of a folder that `focus-ray ingest` can read; an ingested data
            set of one category; a list of images; or an array (N, H, W, 3), uint8.
        groups: name of the part that each image of a list or array shows. Images of a part never judge each other. None or "":
            the only image of its part.
        group_by: rule that gives the parts of the images of a folder, as for `focus-ray ingest --group-by`: name:REGEX,
            folder:LEVEL, table:FILE:COLUMN or time:SECONDS.
        log: receives a line for each step.
        settings: settings of the configuration. The name is the last part of the key if only one key ends with it
            (`image_size_px=224`), or the full key with `__` for the dots (`model__weights="resnet18.pth"`).
            `focus-ray config explain` explains all settings.

    Raises:
        DataError: there are fewer than 4 usable images or parts, or the groups do not fit the images.
        ConfigError: a setting is unknown or has a wrong value.
        WeightsError: the weights of the backbone are not available.
        MissingPackageError: the extra `train` is not installed.
    """
    check_extra_is_installed("train", "focus_ray.fit")
    scratch = tempfile.TemporaryDirectory(prefix="focus-ray-")
    root = Path(scratch.name)
    tree = _override_standard_settings(settings)
    tree.setdefault("data", {})
    config = _parse_settings(tree, str(root / "data"))
    if config.trackers:
        raise ConfigError(
            "trackers: focus_ray.fit supports no trackers: leave them out, or use `focus-ray fit` or `focus-ray train`"
        )
    check_fit_prerequisites(config)
    data, category = _ensure_ingested(images, root, groups, group_by)
    config = _parse_settings(tree, data)
    split = compute_split_rule(config, category)
    log = log or (lambda message: None)
    if config.train.trains_plant:
        train_network_of_plant(config, [split], str(root), log)
    fit_category(config, split, str(root), log)
    place = get_bundle_uri(str(root), category)
    return Model(Inspector.load(place), place, scratch)


def load(place: str | Path) -> Model:
    """Loads a saved model, a bundle, the folder of a run with a single bundle, or the only bundle of a registry.

    Raises:
        DataError: the place has no bundle, or bundles of several categories.
        BundleError: the bundle is missing or damaged.
    """
    uri = find_single_bundle(str(place))
    return Model(Inspector.load(uri), uri)


def _parse_settings(tree: Mapping[str, Any], data: str) -> Config:
    """Parses a tree of settings with the data set `data`."""
    return parse_config({**tree, "data": {**tree["data"], "uri": data}}, "settings")


def _override_standard_settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the standard configuration with changed settings. Raises: ConfigError: a name matches no key, or several keys."""
    tree = read_yaml_mapping(find_config_file("default", "run"))
    for section in ("data", "cluster"):
        tree.pop(section, None)
    tree.pop("name", None)
    for name, value in changes.items():
        section_tree = tree
        *sections, last_part = find_setting_key(name.replace("__", ".")).split(".")
        for section in sections:
            section_tree = section_tree.setdefault(section, {})
        section_tree[last_part] = str(value) if isinstance(value, Path) else value
    return tree


def _ensure_ingested(
    images: Any, root: Path, groups: Sequence[str | int | None] | None = None, group_by: str | None = None
) -> tuple[str, str]:
    """Ingests images into a data set below `root`. An ingested data set is used directly.

    Returns: URI of the data set, name of its category.

    Raises: DataError: the images cannot be ingested, or there are several categories.
    """
    rule: str | GroupRule | None = group_by
    if not isinstance(images, (str, Path)):
        if group_by is not None:
            raise DataError(f"group_by={group_by!r} is for a folder: give groups for a list or array of images")
        source = _write_image_files(images, root / _DEFAULT_CATEGORY)
        rule = _make_group_rule(groups, source)
    elif groups is not None:
        raise DataError(f"{images}: groups is for a list or array of images: give group_by for a folder")
    else:
        source = Path(images).expanduser()
        if "://" in str(images) or any(source.glob("category=*")):
            if group_by is not None:
                raise DataError(
                    f"group_by={group_by!r}: {images} is already ingested: give --group-by to `focus-ray ingest`"
                )
            return str(images), _require_single_category(list_categories(str(images)), str(images))
        if not source.is_dir():
            raise DataError(f"{source}: no such folder: give a folder of good images")
        source = link_images_into_good_folder(source, root)
    report = ingest(source, root / "data", progress=False, group_by=rule)
    name = _require_single_category([category.name for category in report.categories], str(source))
    return str(root / "data"), name


def _require_single_category(categories: Sequence[str], place: str) -> str:
    """Returns the only category. Raises: DataError: there is none, or there are several."""
    if len(categories) != 1:
        raise DataError(
            f"{place}: has {len(categories)} categories ({', '.join(categories) or 'none'}): give the folder of one category, or "
            "use `focus-ray train` for all categories"
        )
    return categories[0]


def link_images_into_good_folder(source: Path, root: Path) -> Path:
    """Returns a folder with the images of a flat folder in good/, made below `root` with links or copies.

    A source folder with subfolders, or without images, is returned unchanged.
    """
    if not list_image_files(source) or list_subfolders(source):
        return source
    name = source.resolve().name
    folder = root / make_valid_name(name) / "good"
    folder.mkdir(parents=True)
    for path in (Path(str(item)) for item in list_image_files(source)):
        try:
            os.symlink(path.resolve(), folder / path.name)
        except OSError:
            shutil.copy(path, folder / path.name)
    return folder.parent


def _write_image_files(images: Any, folder: Path) -> Path:
    """Writes images as files into folder/good/ and returns the folder."""
    (folder / "good").mkdir(parents=True)
    for number, image in enumerate(_convert_to_image_list(images)):
        suffix = Path(image).suffix if isinstance(image, (str, Path)) else ""
        name = f"{number:06}{suffix if suffix.lower() in IMAGE_SUFFIXES else '.png'}"
        (folder / "good" / name).write_bytes(_encode_image_file(image, f"image {number}"))
    return folder


def _make_group_rule(groups: Sequence[str | int | None] | None, folder: Path) -> GroupRule | None:
    """Returns the rule that gives each written image file its group. Raises: DataError: the groups do not fit the images."""
    if groups is None:
        return None
    files = list_image_files(folder / "good")
    if len(groups) != len(files):
        raise DataError(f"{len(files)} images, but {len(groups)} groups: give one group for each image")
    names: dict[str, str] = {}
    for file, group in zip(files, groups, strict=True):
        if group is not None and (isinstance(group, bool) or not isinstance(group, (str, int, np.integer))):
            raise DataError(f"group {group!r} of image {len(names)}: expected a name, a number or None")
        names[file.name] = "" if group is None else str(group)
    return GroupByTable("groups", names, folder) if any(names.values()) else None


_MAX_CHANNELS = 4


def _convert_to_image_list(images: Any) -> list[Any]:
    """Returns the images of a list or an array of any library as a list. A single image becomes a list with one item."""
    if isinstance(images, (bytes, bytearray, Pillow.Image)):
        return [images]
    if hasattr(images, "__array__") and hasattr(images, "ndim"):
        array = np.asarray(images)
        if array.ndim == 2 or (array.ndim == 3 and array.shape[2] <= _MAX_CHANNELS):
            return [array]
        if array.ndim == 3 and array.shape[0] == 3:
            warnings.warn(
                f"an array of shape {array.shape} is read as 3 grey images: for one RGB image with the channels first, "
                "give images.transpose(1, 2, 0)",
                stacklevel=3,
            )
        return list(array)
    return list(images)


def _is_single_image(image: NDArray[Any]) -> bool:
    """Returns whether an array is one image: (H, W), (H, W, 1) or (H, W, 3).

    An array (H, W) with W up to 4 is more likely a row of pixels, so it does not count as an image.
    """
    if image.ndim == 2:
        return image.shape[1] > _MAX_CHANNELS
    return image.ndim == 3 and image.shape[2] in (1, 3)


def _encode_image_file(image: Any, name: str = "") -> bytes:
    """Returns the bytes of an image file for an image of any type. Raises: DataError: the type is none of `Image`.

    Args: name: name of the image for error messages.
    """
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    prefix = f"{name}: " if name else ""
    if isinstance(image, Pillow.Image):
        try:
            return encode_pillow_image(image)
        except ImageError as error:
            raise ImageError(error.reason, f"{prefix}{error}") from error
    if isinstance(image, (str, Path)):
        try:
            return Path(image).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"{image}: cannot be read: {error.strerror or error}") from None
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or not _is_single_image(pixels):
        raise DataError(
            f"{prefix}an image has shape {pixels.shape} and type {pixels.dtype}: expected uint8 of shape (H, W) or (H, W, 3), a "
            "Pillow image, or a path or the bytes of an image file"
        )
    return encode_png(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _parse_labels(labels: Sequence[Any]) -> list[int]:
    """Returns the labels as 0 and 1. Raises: DataError: a label equals neither, such as a score of 0.6."""
    checked = []
    for number, label in enumerate(labels):
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = float("nan")
        if value not in (0.0, 1.0):
            raise DataError(f"label {label!r} of image {number}: expected 0 for a good part, 1 for a bad part")
        checked.append(int(value))
    return checked


def _iterate_test_records(images: Sequence[Image], labels: Sequence[int]) -> Iterator[Row]:
    """Yields images with labels as test records without masks. Raises: DataError: an image cannot be read."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = str(image) if isinstance(image, (str, Path)) else f"image {number}"
        data = _encode_image_file(image, name)
        try:
            info, pixels = decode_image_with_info(data)
        except ImageError as error:
            raise DataError(f"{name}: {error}") from error
        yield {
            "id": name,
            "image": data,
            "mask": None,
            "label": label,
            "defect_type": "bad" if label else "good",
            "width": info.width,
            "height": info.height,
            "content_hash": hash_pixels(pixels),
        }
