"""Lists the image files of a local folder. All commands use this listing.

It skips hidden files, folders that an operating system or a file server creates, and pictures that focus_ray drew itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from focus_ray.drawing.mark import is_drawing_file
from focus_ray.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pnm")
# Folders that file servers and operating systems create for thumbnails, deleted files and snapshots, in lower case.
_SYSTEM_FOLDERS = {"@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"}
_SYSTEM_FOLDERS |= {"$recycle.bin", "recycler", "system volume information", "lost+found"}


def is_system_folder(name: str) -> bool:
    """Returns whether a folder of this name was created by a file server or an operating system, not by a person."""
    return name.startswith("__MACOSX") or name.casefold() in _SYSTEM_FOLDERS


def is_hidden(name: str) -> bool:
    """Returns whether every command skips a file or folder of this name."""
    return name.startswith(".") or is_system_folder(name)


class ImageEntry(NamedTuple):
    """An image file of a listing.

    Attributes:
        image: path below the listed folder, with slashes.
        entry: of `os.scandir`; it may be a broken link.
    """

    image: str
    entry: os.DirEntry[str]


def scan_images(
    folder: Path,
    on_error: Callable[[Path, OSError], None],
    *,
    skipped_folder: str = "",
    on_hidden: Callable[[Path], None] = lambda path: None,
) -> Iterator[ImageEntry]:
    """Yields the image files of a folder and of all folders below it, unordered; links to folders are not followed.

    Args:
        folder: the folder to list.
        on_error: called with each subfolder or file that cannot be read, and the error.
        skipped_folder: real path of a folder that is not listed; empty for none.
        on_hidden: called with each hidden folder, and with each hidden file that has the suffix of an image.

    Raises: OSError: the folder itself cannot be listed.
    """
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(folder / prefix) as entries:
                for entry in entries:
                    is_image = entry.name.lower().endswith(IMAGE_SUFFIXES)
                    try:
                        is_folder = entry.is_dir(follow_symlinks=False)
                        if is_hidden(entry.name):
                            if is_folder or is_image:
                                on_hidden(Path(entry.path))
                        elif is_folder:
                            if not skipped_folder or not _is_same_folder(entry, skipped_folder):
                                pending.append(f"{prefix}{entry.name}/")
                        elif is_image and not entry.is_dir():
                            yield ImageEntry(prefix + entry.name, entry)
                    except FileNotFoundError:  # it was removed during the listing
                        continue
                    except OSError as error:
                        on_error(Path(entry.path), error)
        except OSError as error:
            if not prefix:
                raise
            if not isinstance(error, FileNotFoundError):
                on_error(folder / prefix, error)


def _is_same_folder(entry: os.DirEntry[str], real_path: str) -> bool:
    """Returns whether an entry is the folder with this real path. Compares the names first, because resolving a path is slow."""
    return entry.name == os.path.basename(real_path) and os.path.realpath(entry.path) == real_path


def find_image_files(folder: Path, log: Callable[[str], None] = lambda message: None) -> list[Path]:
    """Returns the image files of a local folder and of all folders below it, sorted by path.

    The list contains broken links, so that the attempt to read them reports the file.

    Args: log: gets a note with the number of skipped hidden files and of skipped pictures that focus_ray drew.

    Raises: DataError: there is no image, or a folder cannot be listed.
    """
    hidden: list[Path] = []

    def refuse(path: Path, error: OSError) -> None:
        raise DataError(f"{path}: cannot be listed: {error.strerror or error}") from error

    paths: list[Path] = []
    try:
        for image, entry in scan_images(folder, refuse, on_hidden=hidden.append):
            if entry.is_file() or entry.is_symlink():
                paths.append(folder / image)
    except OSError as error:
        refuse(folder, error)
    drawings = {path for path in paths if is_drawing_file(path)}
    images = sorted(path for path in paths if path not in drawings)
    counts = {"hidden files or folders": len(hidden), "pictures that focus_ray drew": len(drawings)}
    note = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    if not images:
        expected = f"image files end in {', '.join(IMAGE_SUFFIXES)}"
        raise DataError(f"{folder}: no image in this folder; {expected}{f'; skipped: {note}' if note else ''}")
    if note:
        log(f"note: {folder}: skipped: {note}")
    return images
