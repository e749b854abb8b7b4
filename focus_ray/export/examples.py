"""The images by which an export is checked: of a data set, of folders good/ and bad/, or files that nothing is known of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from focus_ray.bundle.bundle import Bundle
from focus_ray.data.images import ImageError, refuse_drawing
from focus_ray.data.importers.vocabulary import is_bad_name, is_good_name
from focus_ray.data.listing import find_image_files, is_hidden
from focus_ray.data.read import index_version, list_categories, read_index, read_rows
from focus_ray.density.base import sample_evenly
from focus_ray.errors import DataError, ExportError
from focus_ray.storage import is_s3

MOST_SCALING = 32  # images that int8 is scaled by


class Example(NamedTuple):
    """image: an encoded file.  label: 0 good, 1 bad, None: not told."""

    name: str
    image: bytes
    label: int | None


class Examples(NamedTuple):
    """checking: in no order.  scaling: images of good parts."""

    checking: list[Example]
    scaling: list[Example]


def gather_examples(bundle: Bundle, places: Sequence[str], most: int) -> Examples:
    """Of the places given, or of the data set that the bundle was trained from.

    Args: most: images that check, evenly chosen among the good and among the bad ones.

    Raises: ExportError: no place is given and that data set cannot be read, or has no test images.
        DataError: a place cannot be read.
    """
    if not places:
        uri = str(bundle.manifest["data"].get("uri", ""))
        try:
            found = _of_data_set(uri, bundle.category, most)
        except DataError as error:
            raise ExportError(
                f"the data set that {bundle.category!r} was trained from cannot be read ({error}), and an export is checked by "
                "images: give --examples, a folder with good/ and bad/, image files or a data set"
            ) from error
        if not found.checking:
            raise ExportError(
                f"{uri}: has no test images of {bundle.category!r}, and an export is checked by images that the model was not "
                "trained on: give --examples, a folder with good/ and bad/, image files or a data set"
            )
        return found
    parts = [_of_place(place, bundle.category, most) for place in places]
    return Examples([one for part in parts for one in part.checking], [one for part in parts for one in part.scaling])


def _of_place(place: str, category: str, most: int) -> Examples:
    if is_s3(place) or any(Path(place).glob("category=*")):
        return _of_data_set(place, category, most)
    path = Path(place).expanduser()
    if path.is_file():
        return _of_files([path], None, most)
    if not path.is_dir():
        raise DataError(f"{place}: no such file or folder: --examples takes image files, folders or a data set")
    kinds = [(is_good_name, 0), (is_bad_name, 1)]
    named = [
        (item, label)
        for item in sorted(path.iterdir())
        for is_kind, label in kinds
        if item.is_dir() and not is_hidden(item.name) and is_kind(item.name)
    ]
    if not named:
        return _of_files(find_image_files(path), None, most)
    files: dict[int, list[Path]] = {0: [], 1: []}
    for folder, label in named:
        files[label] += find_image_files(folder)
    good, bad = (_of_files(files[label], label, most // 2) for label in (0, 1))
    return Examples(good.checking + bad.checking, good.scaling)


def _of_files(paths: Sequence[Path], label: int | None, most: int) -> Examples:
    def read(limit: int) -> list[Example]:
        chosen = [paths[number] for number in sorted(sample_evenly(len(paths), limit))]
        return [Example(str(path), _read(path), label) for path in chosen]

    return Examples(read(most), [] if label else read(MOST_SCALING))


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        refuse_drawing(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ImageError as error:
        raise DataError(f"{path}: {error}") from error
    return content


def _of_data_set(uri: str, category: str, most: int) -> Examples:
    """Its test images check, and its good training images scale."""
    if category not in list_categories(uri):
        raise DataError(f"{uri}: has no category {category!r}; it has {', '.join(list_categories(uri))}")
    index = read_index(uri, category)
    version, rows = index_version(index), index.select(["row", "split", "label"]).to_pylist()

    def numbers(split: str, label: int, limit: int) -> list[int]:
        found = [one["row"] for one in rows if one["split"] == split and one["label"] == label]
        return [found[number] for number in sorted(sample_evenly(len(found), limit))]

    def read(chosen: list[int]) -> list[Example]:
        records = read_rows(uri, category, sorted(chosen), ("id", "image", "label"), version)
        return [Example(str(one["id"]), one["image"], int(one["label"])) for one in records]

    return Examples(
        read(numbers("test", 0, most // 2) + numbers("test", 1, most // 2)), read(numbers("train", 0, MOST_SCALING))
    )
