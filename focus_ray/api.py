"""Three lines of Python: fit good images, inspect new ones, save. The same path as the commands, without a cluster.

model = focus_ray.fit("photographs/", weights="resnet18.pth")
print(model.inspect("new.png").verdict)
model.save("model")
"""

from __future__ import annotations

import difflib
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
from pydantic import BaseModel

from focus_ray.bundle.bundle import MANIFEST, copy_bundle, find_bundles, read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.make import bundle_uri, train_locally
from focus_ray.config import Config, parse_config, read_mapping
from focus_ray.data.images import ImageError, content_hash, encode_opened, encode_png, read_image
from focus_ray.data.importers.base import list_image_files, list_subfolders
from focus_ray.data.importers.groups import GroupRule, TableRule
from focus_ray.data.ingest import ingest
from focus_ray.data.listing import IMAGE_SUFFIXES, find_image_files
from focus_ray.data.read import iter_test_records, list_categories
from focus_ray.data.schema import Row
from focus_ray.data.split import split_category
from focus_ray.errors import ConfigError, DataError
from focus_ray.evaluation.inspection import Inspection
from focus_ray.extras import require_extra
from focus_ray.fitting.fit import check_prerequisites
from focus_ray.names import is_name
from focus_ray.standard import find_config
from focus_ray.storage import join, read_bytes

Image = str | Path | bytes | NDArray[Any] | Pillow.Image
"""A path of an image file, its encoded bytes, a Pillow image, or pixels: uint8 (H, W) grey or (H, W, 3) RGB."""

_NAME = "images"  # of the category that images in no folder of a category make


class Model:
    """A fitted model of one category. Made by `fit` or `load`.

    Attributes:
        inspector: what scores.  category: its name.
    """

    def __init__(
        self, inspector: Inspector, place: str, scratch: tempfile.TemporaryDirectory[str] | None = None
    ) -> None:
        self.inspector, self.category = inspector, inspector.bundle.category
        self._place, self._scratch = place, scratch  # the folder lives as long as the model

    @property
    def threshold(self) -> float:
        """Of image scores."""
        return self.inspector.bundle.calibration.image_threshold

    @property
    def caveats(self) -> list[str]:
        """What a reader of verdicts has to be told, in plain sentences."""
        return self.inspector.bundle.calibration.caveats()

    def inspect(self, image: Image) -> Inspection:
        """What is found in one image. Raises: DataError: it cannot be read, or is none of the kinds of `Image`."""
        return self.inspector.inspect([image if isinstance(image, (str, Path)) else _encoded(image)])[0]

    def inspect_all(self, images: str | Path | Sequence[Image] | NDArray[Any]) -> list[Inspection]:
        """One `Inspection` for each image, in order.

        Args: images: a folder; a list; an array (N, H, W, 3), or (N, H, W) of grey images; or one image, (H, W, 3) or (H, W).

        Raises: DataError: as `inspect`; the message names the image by its path or its place in the list.
        """
        if isinstance(images, (str, Path)):
            return self.inspector.inspect(find_image_files(Path(images).expanduser()))
        return self.inspector.inspect(
            [
                image if isinstance(image, (str, Path)) else _encoded(image, f"image {number}")
                for number, image in enumerate(_as_list(images))
            ]
        )

    def evaluate(
        self, images: str | Path | Sequence[Image] | None = None, labels: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Metrics on labelled images, as `focus-ray evaluate` gives them.

        Args:
            images: a folder in a shape that ingest knows, of which the test images count; or a list of images, with
                labels, 0 good or 1 bad; None: the test images that lay beside the good ones when this was fitted.

        Images that the model was trained on are left out of all metrics; "trained_on" of the result counts them.

        Raises: DataError: no labelled image that the model was not trained on, a label other than 0 and 1, or the counts differ.
        """
        if labels is not None:
            if images is None:
                raise DataError("evaluate needs images beside labels: give the images that the labels belong to")
            given = [images] if isinstance(images, (str, Path)) else _as_list(images)
            if len(given) != len(labels):
                raise DataError(f"{len(given)} images, but {len(labels)} labels: give one label an image")
            return self.inspector.evaluate(_records(given, _checked_labels(labels)))
        if images is None:
            data = str(self.inspector.bundle.config.data.uri)
            if not Path(data).expanduser().exists() and "://" not in data:
                raise DataError(
                    "the images that this model was fitted on are not here any more: give a folder, or images and labels"
                )
            return self.inspector.evaluate(iter_test_records(data, self.category))
        if not isinstance(images, (str, Path)):
            raise DataError("evaluate needs labels beside images: 0 for a good part, 1 for a bad one")
        with tempfile.TemporaryDirectory() as folder:
            data, category = _ingested(Path(images).expanduser(), Path(folder))
            return self.inspector.evaluate(iter_test_records(data, category))

    def save(self, place: str | Path) -> str:
        """Writes the bundle, which `load`, `focus-ray inspect` and `focus-ray serve` read. Returns: its place.

        Args: place: a folder's path, or an s3:// URI; a bundle that is there is replaced.
        """
        copy_bundle(self._place, read_manifest(self._place), place)
        return str(place)

    def to_files(self) -> dict[str, bytes]:
        """The bundle's files by name, for what carries bytes, such as a pickle."""
        manifest = read_manifest(self._place)
        names = [MANIFEST, *(str(entry["name"]) for entry in manifest["files"].values())]
        return {name: read_bytes(join(self._place, name)) for name in names}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Model:
        """Undoes `to_files`. Raises: BundleError: they are no bundle."""
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
    """A model of good images, fitted in this process by the standard configuration.

    Args:
        images: a folder of good images, or one in a shape that ingest knows, whose good training images count; an ingested data
            set of one category; or images: a list, or an array (N, H, W, 3), uint8.
        groups: name of the part that each image of a list or array shows; images of one part never judge each other. None or ""
            is an image that is its own part.
        group_by: the same for a folder, by a rule as of `focus-ray ingest --group-by`: name:REGEX, folder:LEVEL,
            table:FILE:COLUMN or time:SECONDS.
        log: told of each step, in a line.
        settings: of the configuration, by their key's last part where it is one setting's (`image_size_px=224`), or in full
            with `__` for the dots (`model__weights="resnet18.pth"`); `focus-ray config explain` tells of them.

    Raises:
        DataError: no usable image, or fewer than 4 images or parts; groups that do not fit the images.
        ConfigError: a setting is not known or does not fit.
        WeightsError: the backbone's weights cannot be had.
        MissingPackageError: the extra `train` is not installed.
    """
    require_extra("train", "focus_ray.fit")
    scratch = tempfile.TemporaryDirectory(prefix="focus-ray-")
    root = Path(scratch.name)
    tree = _settings(settings)
    tree.setdefault("data", {})
    config = _parse(tree, str(root / "data"))
    if config.trackers:
        raise ConfigError("trackers: fit records nothing; `focus-ray fit` and `focus-ray train` do: leave it out")
    check_prerequisites(config)
    data, category = _ingested(images, root, groups, group_by)
    config = _parse(tree, data)
    split = split_category(config, category)
    train_locally(config, [split], str(root), log or (lambda message: None), raise_at_once=True)
    place = bundle_uri(str(root), category)
    return Model(Inspector.load(place), place, scratch)


def load(place: str | Path) -> Model:
    """A model that was saved, or a bundle that `focus-ray train` made. Raises: DataError: several categories; BundleError."""
    found = find_bundles(str(place))
    if len(found) > 1:
        raise DataError(
            f"{place}: bundles of {', '.join(found)}: give one of them, for instance {next(iter(found.values()))}"
        )
    (uri,) = found.values()
    return Model(Inspector.load(uri), uri)


def _parse(tree: Mapping[str, Any], data: str) -> Config:
    return parse_config({**tree, "data": {**tree["data"], "uri": data}}, "settings")


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The standard configuration with settings by name. Raises: ConfigError: a name is no key, or several keys' end."""
    tree = read_mapping(find_config("default", "run"))
    for section in ("data", "cluster"):
        tree.pop(section, None)
    tree.pop("name", None)
    keys = list(_keys(Config))
    for name, value in given.items():
        dotted = name.replace("__", ".")
        matching = [key for key in keys if key == dotted or key.endswith(f".{dotted}")]
        if dotted in keys:
            matching = [dotted]
        if not matching:
            ends = {key.rpartition(".")[2] for key in keys}
            close = difflib.get_close_matches(dotted.rpartition(".")[2], ends, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`focus-ray config explain` lists them"
            raise ConfigError(f"{name}: no such setting; {hint}")
        if len(matching) > 1:
            raise ConfigError(f"{name}: could be {' or '.join(matching)}: write {matching[0].replace('.', '__')}")
        part = tree
        *sections, last = matching[0].split(".")
        for section in sections:
            part = part.setdefault(section, {})
        part[last] = str(value) if isinstance(value, Path) else value
    return tree


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings and sections."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _ingested(
    images: Any, root: Path, groups: Sequence[str | int | None] | None = None, group_by: str | None = None
) -> tuple[str, str]:
    """The Parquet set of these images below `root`, or the one given, and its category. Raises: DataError."""
    if groups is not None and isinstance(images, (str, Path)):
        raise DataError(f"{images}: groups belong to a list or array of images: give group_by for a folder")
    if group_by is not None and not isinstance(images, (str, Path)):
        raise DataError(f"group_by={group_by!r} belongs to a folder: give groups for a list or array of images")
    source = Path(images).expanduser() if isinstance(images, (str, Path)) and "://" not in str(images) else None
    if isinstance(images, (str, Path)) and (source is None or any(source.glob("category=*"))):
        uri = str(images)
        if group_by is not None:
            raise DataError(f"group_by={group_by!r}: {uri} is ingested already: give --group-by to `focus-ray ingest`")
        return uri, _only(list_categories(uri), uri)
    rule: str | GroupRule | None = group_by
    if source is None:
        source = _written(images, root / _NAME)
        rule = _rule_of_groups(groups, source)
    elif not source.is_dir():
        raise DataError(f"{source}: no such folder: give a folder of good images")
    else:
        source = as_good(source, root)
    report = ingest(source, root / "data", progress=False, group_by=rule)
    name = _only([category.name for category in report.categories], str(source))
    return str(root / "data"), name


def _only(categories: Sequence[str], place: str) -> str:
    if len(categories) != 1:
        raise DataError(
            f"{place}: holds {len(categories)} categories ({', '.join(categories) or 'none'}): give the folder of one, or use "
            "`focus-ray train` for all"
        )
    return categories[0]


def as_good(source: Path, root: Path) -> Path:
    """A folder of nothing but images, as one below `root` whose good/ they are, by links, or copies; any other as it is."""
    if not list_image_files(source) or list_subfolders(source):
        return source
    name = source.resolve().name
    folder = root / (name if is_name(name) else _NAME) / "good"
    folder.mkdir(parents=True)
    for path in (Path(str(item)) for item in list_image_files(source)):
        try:
            os.symlink(path.resolve(), folder / path.name)
        except OSError:
            shutil.copy(path, folder / path.name)
    return folder.parent


def _written(images: Any, folder: Path) -> Path:
    """Images, as files of folder/good/."""
    (folder / "good").mkdir(parents=True)
    for number, image in enumerate(_as_list(images)):
        name = f"{number:06}"
        if isinstance(image, (str, Path)):
            path = Path(image).expanduser()
            suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".png"
            (folder / "good" / f"{name}{suffix}").write_bytes(_encoded(path))
        else:
            (folder / "good" / f"{name}.png").write_bytes(_encoded(image, f"image {number}"))
    return folder


def _rule_of_groups(groups: Sequence[str | int | None] | None, folder: Path) -> GroupRule | None:
    """Returns the rule that gives each image of `_written` its group. Raises: DataError: another number of groups than images."""
    if groups is None:
        return None
    files = list_image_files(folder / "good")
    if len(groups) != len(files):
        raise DataError(f"{len(files)} images, but {len(groups)} groups: give one group an image")
    names: dict[str, str] = {}
    for file, group in zip(files, groups, strict=True):
        if group is not None and (isinstance(group, bool) or not isinstance(group, (str, int, np.integer))):
            raise DataError(f"group {group!r} of image {len(names)}: expected a name, a number or None")
        names[file.name] = "" if group is None else str(group)
    return TableRule("groups", names, folder) if any(names.values()) else None


_MOST_CHANNELS = 4


def _as_list(images: Any) -> list[Any]:
    """The images of a list or of an array, NumPy's or another library's; one image is a list of one."""
    if isinstance(images, (bytes, bytearray, Pillow.Image)):
        return [images]
    if hasattr(images, "__array__") and hasattr(images, "ndim"):
        array = np.asarray(images)
        if array.ndim == 2 or (array.ndim == 3 and array.shape[2] <= _MOST_CHANNELS):
            return [array]
        if array.ndim == 3 and array.shape[0] == 3:
            warnings.warn(
                f"an array of shape {array.shape} is taken as 3 grey images: if it is one RGB image with its channels first, "
                "give images.transpose(1, 2, 0)",
                stacklevel=3,
            )
        return list(array)
    return list(images)


def _is_one(image: NDArray[Any]) -> bool:
    """Whether an array is one image: (H, W), or (H, W, 3). A grey image 4 pixels wide at most is a row of pixels by mistake."""
    if image.ndim == 2:
        return image.shape[1] > _MOST_CHANNELS
    return image.ndim == 3 and image.shape[2] in (1, 3)


def _encoded(image: Any, name: str = "") -> bytes:
    """Bytes of an image file. name: of the image, for errors. Raises: DataError: none of the kinds of `Image`."""
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    prefix = f"{name}: " if name else ""
    if isinstance(image, Pillow.Image):
        try:
            return encode_opened(image)
        except ImageError as error:
            raise ImageError(error.reason, f"{prefix}{error}") from error
    if isinstance(image, (str, Path)):
        try:
            return Path(image).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"{image}: cannot be read: {error.strerror or error}") from None
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or not _is_one(pixels):
        raise DataError(
            f"{prefix}an image has shape {pixels.shape} and type {pixels.dtype}: expected uint8 of shape (H, W) or (H, W, 3), a "
            "Pillow image, or a path or the bytes of an image file"
        )
    return encode_png(pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


def _checked_labels(labels: Sequence[Any]) -> list[int]:
    """Returns the labels as 0 and 1. Raises: DataError: a label equals neither, such as a score of 0.6."""
    checked = []
    for number, label in enumerate(labels):
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = float("nan")
        if value not in (0.0, 1.0):
            raise DataError(f"label {label!r} of image {number}: expected 0 for a good part, 1 for a bad one")
        checked.append(int(value))
    return checked


def _records(images: Sequence[Image], labels: Sequence[int]) -> Iterator[Row]:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = str(image) if isinstance(image, (str, Path)) else f"image {number}"
        data = _encoded(image, name)
        try:
            info, pixels = read_image(data)
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
            "content_hash": content_hash(pixels),
        }
