"""Collects the images that check an export: from a data set, from folders good/ and bad/, or from image files without labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from focus_ray.bundle.bundle import Bundle
from focus_ray.data.images import ImageError, refuse_generated_picture
from focus_ray.data.importers.vocabulary import means_defective_parts, means_good_parts
from focus_ray.data.listing import find_image_files, is_hidden
from focus_ray.data.read import index_version, list_categories, read_index, read_rows
from focus_ray.density.base import choose_evenly_spaced
from focus_ray.errors import DataError, ExportError
from focus_ray.storage.files import is_s3_uri

MAX_INT8_EXAMPLES = 32  # number of images that set the value ranges of int8


class ExportExample(NamedTuple):
    """An image that checks an export, or that sets the value ranges of an int8 export.

    Attributes:
        name: path or id of the image, for messages.
        image: content of the image file.
        label: 0 good, 1 bad, None unknown.
        is_for_int8: True: a good image that sets the value ranges of int8. False: an image to compare scores on.
    """

    name: str
    image: bytes
    label: int | None
    is_for_int8: bool = False


def read_export_examples(bundle: Bundle, sources: Sequence[str], max_images: int) -> list[ExportExample]:
    """Reads the examples from the sources, or from the data set that the bundle was trained on if there is no source.

    Args:
        sources: image files, folders or data sets.
        max_images: largest number of images to check from each source. If images have labels, at most `max_images` / 2 are good
            and at most `max_images` / 2 are bad. Up to `MAX_INT8_EXAMPLES` images for int8 come in addition.

    Raises:
        ExportError: there is no source, and the data set of the training cannot be read or has no test images.
        DataError: a source does not exist, cannot be read, has no image or no such category, or contains a picture that
            focus_ray drew.
    """
    if sources:
        return [example for source in sources for example in _read_source_examples(source, bundle.category, max_images)]
    uri = str(bundle.manifest["data"].get("uri", ""))
    try:
        examples = _read_data_set_examples(uri, bundle.category, max_images)
        if all(example.is_for_int8 for example in examples):
            raise DataError(f"{uri}: has no test images of {bundle.category!r}")
    except DataError as error:
        raise ExportError(
            f"the data set that {bundle.category!r} was trained on cannot be used ({error}), but an export is checked on images "
            "that the model was not trained on: give --examples, a folder with good/ and bad/, image files or a data set"
        ) from error
    return examples


def _read_source_examples(source: str, category: str, max_images: int) -> list[ExportExample]:
    """Reads examples from an image file, a folder or a data set.

    A folder may have subfolders for good and bad images (such as good/ and bad/). Without them, its images have no labels.

    Raises: DataError: the source does not exist, cannot be read, or has no image or no such category.
    """
    if is_s3_uri(source) or any(Path(source).glob("category=*")):
        return _read_data_set_examples(source, category, max_images)
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file_examples([path], None, max_images)
    if not path.is_dir():
        raise DataError(f"{source}: no such file or folder: --examples takes image files, folders or a data set")
    files: dict[int, list[Path]] = {}
    for folder in sorted(path.iterdir()):
        for label, matches_label in enumerate((means_good_parts, means_defective_parts)):
            if folder.is_dir() and not is_hidden(folder.name) and matches_label(folder.name):
                files.setdefault(label, []).extend(find_image_files(folder))
    if not files:
        return _read_file_examples(find_image_files(path), None, max_images)
    return [example for label in sorted(files) for example in _read_file_examples(files[label], label, max_images // 2)]


def _read_file_examples(paths: Sequence[Path], label: int | None, max_images: int) -> list[ExportExample]:
    """Reads up to `max_images` of the files as examples for the check, evenly spread over `paths`.

    If the label is not bad, also reads up to `MAX_INT8_EXAMPLES` of the files as examples that set the value ranges of int8.

    Raises: DataError: a file cannot be read, or is a picture that focus_ray drew (a heat map or a plot).
    """
    examples = []
    for is_for_int8, limit in ((False, max_images), (True, 0 if label else MAX_INT8_EXAMPLES)):
        for number in sorted(choose_evenly_spaced(len(paths), limit)):
            path = paths[number]
            try:
                content = path.read_bytes()
                refuse_generated_picture(content)
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
            except ImageError as error:
                raise DataError(f"{path}: {error}") from error
            examples.append(ExportExample(str(path), content, label, is_for_int8))
    return examples


def _read_data_set_examples(uri: str, category: str, max_images: int) -> list[ExportExample]:
    """Reads test images for the check and good training images for int8 from a data set.

    Raises: DataError: the data set cannot be read or has no such category.
    """
    if category not in list_categories(uri):
        raise DataError(f"{uri}: has no category {category!r}; it has {', '.join(list_categories(uri))}")
    index = read_index(uri, category)
    version, rows = index_version(index), index.select(["row", "split", "label"]).to_pylist()
    examples = []
    for split, label, limit in (
        ("test", 0, max_images // 2),
        ("test", 1, max_images // 2),
        ("train", 0, MAX_INT8_EXAMPLES),
    ):
        matching_rows = [row["row"] for row in rows if row["split"] == split and row["label"] == label]
        chosen = [matching_rows[number] for number in sorted(choose_evenly_spaced(len(matching_rows), limit))]
        for record in read_rows(uri, category, chosen, ("id", "image"), version):
            examples.append(ExportExample(str(record["id"]), record["image"], label, split == "train"))
    return examples
