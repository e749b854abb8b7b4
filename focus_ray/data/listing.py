"""Which files of a local folder are images to read: the one listing of all commands.

Passed over are hidden files, folders of the system or of a tool, and pictures that focus_ray drew itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from focus_ray.drawings import is_drawing_file
from focus_ray.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pnm")
# Folders that file servers and operating systems make for thumbnails, deleted files and snapshots, in lower case.
_SYSTEM_FOLDERS = frozenset(
    (
        *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"),
        *("$recycle.bin", "recycler", "system volume information", "lost+found"),
    )
)


def is_system_folder(name: str) -> bool:
    """Whether a folder of this name was made by a file server or an operating system, and not by a person."""
    return name.startswith("__MACOSX") or name.casefold() in _SYSTEM_FOLDERS


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over by every command."""
    return name.startswith(".") or is_system_folder(name)


class ImageEntry(NamedTuple):
    """image: path below the listed folder, with slashes.  entry: of `os.scandir`; it may be a broken link."""

    image: str
    entry: os.DirEntry[str]


def scan_images(
    folder: Path,
    on_error: Callable[[Path, OSError], None],
    *,
    leave_out: str = "",
    on_hidden: Callable[[Path], None] = lambda path: None,
) -> Iterator[ImageEntry]:
    """Yields the image files of a folder and of all folders below it, unordered; links to folders are not followed.

    Args:
        on_error: told of each folder below that cannot be listed.  leave_out: real path of a folder that is not listed.
        on_hidden: told of each hidden folder, and of each hidden file with the name of an image.

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
                            if not leave_out or not _is_same_folder(entry, leave_out):
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
    return entry.name == os.path.basename(real_path) and os.path.realpath(entry.path) == real_path


def images_below(folder: Path, log: Callable[[str], None] = lambda message: None) -> list[Path]:
    """Returns the image files of a local folder and of all folders below it, in the order of their paths.

    A broken link is in the list, so that reading it reports the file.

    Args: log: told how many hidden files and own pictures were passed over.

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
    passed_over = [
        *([f"{len(hidden)} hidden files or folders"] if hidden else []),
        *([f"{len(drawings)} pictures that focus_ray drew"] if drawings else []),
    ]
    note = f"passed over: {' and '.join(passed_over)}" if passed_over else ""
    if not images:
        expected = f"image files end in {', '.join(IMAGE_SUFFIXES)}"
        raise DataError(f"{folder}: no image in this folder; {expected}{f'; {note}' if note else ''}")
    if note:
        log(f"note: {folder}: {note}")
    return images
