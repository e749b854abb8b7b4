"""Collects the images that check an export: from a data set, from folders good/ and bad/, or from image files without labels."""

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
from focus_ray.storage.files import is_s3

MAX_INT8_EXAMPLES = 32  # number of images that set the value ranges of int8


class ExportExample(NamedTuple):
    """An image that checks an export. image: content of the image file.  label: 0 good, 1 bad, None unknown."""

    name: str
    image: bytes
    label: int | None


class ExportExamples(NamedTuple):
    """Images for an export. to_check: images to compare scores on, in no order.  for_int8: good images that set value ranges."""

    to_check: list[ExportExample]
    for_int8: list[ExportExample]


def gather_examples(bundle: Bundle, sources: Sequence[str], max_images: int) -> ExportExamples:
    """Reads the examples from the sources, or from the data set that the bundle was trained on if there is no source.

    Args:
        sources: image files, folders or data sets.
        max_images: largest number of images to check, chosen evenly among good and among bad images.

    Raises:
        ExportError: there is no source, and the data set of the training cannot be read or has no test images.
        DataError: a source cannot be read.
    """
    if not sources:
        uri = str(bundle.manifest["data"].get("uri", ""))
        try:
            examples = _read_data_set(uri, bundle.category, max_images)
        except DataError as error:
            raise ExportError(
                f"the data set that {bundle.category!r} was trained on cannot be read ({error}), but an export is checked on "
                "images: give --examples, a folder with good/ and bad/, image files or a data set"
            ) from error
        if not examples.to_check:
            raise ExportError(
                f"{uri}: has no test images of {bundle.category!r}, but an export is checked on images that the model was not "
                "trained on: give --examples, a folder with good/ and bad/, image files or a data set"
            )
        return examples
    example_sets = [_read_source(source, bundle.category, max_images) for source in sources]
    return ExportExamples(
        [example for example_set in example_sets for example in example_set.to_check],
        [example for example_set in example_sets for example in example_set.for_int8],
    )


def _read_source(source: str, category: str, max_images: int) -> ExportExamples:
    """Reads examples from an image file, a folder or a data set. Raises: DataError: the source cannot be read."""
    if is_s3(source) or any(Path(source).glob("category=*")):
        return _read_data_set(source, category, max_images)
    path = Path(source).expanduser()
    if path.is_file():
        return _read_files([path], None, max_images)
    if not path.is_dir():
        raise DataError(f"{source}: no such file or folder: --examples takes image files, folders or a data set")
    label_rules = [(is_good_name, 0), (is_bad_name, 1)]
    labelled_folders = [
        (folder, label)
        for folder in sorted(path.iterdir())
        for matches_label, label in label_rules
        if folder.is_dir() and not is_hidden(folder.name) and matches_label(folder.name)
    ]
    if not labelled_folders:
        return _read_files(find_image_files(path), None, max_images)
    files: dict[int, list[Path]] = {0: [], 1: []}
    for folder, label in labelled_folders:
        files[label] += find_image_files(folder)
    good, bad = (_read_files(files[label], label, max_images // 2) for label in (0, 1))
    return ExportExamples(good.to_check + bad.to_check, good.for_int8)


def _read_files(paths: Sequence[Path], label: int | None, max_images: int) -> ExportExamples:
    """Reads at most `max_images` files, chosen evenly. Files without a defect label also serve int8."""

    def read_evenly(limit: int) -> list[ExportExample]:
        chosen = [paths[number] for number in sorted(sample_evenly(len(paths), limit))]
        return [ExportExample(str(path), _read_image_file(path), label) for path in chosen]

    return ExportExamples(read_evenly(max_images), [] if label else read_evenly(MAX_INT8_EXAMPLES))


def _read_image_file(path: Path) -> bytes:
    """Returns the content of an image file. Raises: DataError: it cannot be read, or it is a vector drawing."""
    try:
        content = path.read_bytes()
        refuse_drawing(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ImageError as error:
        raise DataError(f"{path}: {error}") from error
    return content


def _read_data_set(uri: str, category: str, max_images: int) -> ExportExamples:
    """Reads test images to check and good training images for int8 from a data set. Raises: DataError: no such category."""
    if category not in list_categories(uri):
        raise DataError(f"{uri}: has no category {category!r}; it has {', '.join(list_categories(uri))}")
    index = read_index(uri, category)
    version, rows = index_version(index), index.select(["row", "split", "label"]).to_pylist()

    def choose_rows(split: str, label: int, limit: int) -> list[int]:
        matching_rows = [row["row"] for row in rows if row["split"] == split and row["label"] == label]
        return [matching_rows[number] for number in sorted(sample_evenly(len(matching_rows), limit))]

    def read_chosen(chosen: list[int]) -> list[ExportExample]:
        records = read_rows(uri, category, sorted(chosen), ("id", "image", "label"), version)
        return [ExportExample(str(record["id"]), record["image"], int(record["label"])) for record in records]

    return ExportExamples(
        read_chosen(choose_rows("test", 0, max_images // 2) + choose_rows("test", 1, max_images // 2)),
        read_chosen(choose_rows("train", 0, MAX_INT8_EXAMPLES)),
    )
