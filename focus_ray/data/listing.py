"""Lists the image files of a local folder and its subfolders. All commands use this listing.

It skips hidden files, folders that an operating system or a file server creates, and pictures that focus_ray drew itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from focus_ray.drawing.mark import is_file_drawn_by_focus_ray
from focus_ray.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pnm")
# Folders that file servers and operating systems create for thumbnails, deleted files and snapshots, in lower case.
_SYSTEM_FOLDERS = {"@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "~snapshot"}
_SYSTEM_FOLDERS |= {"$recycle.bin", "recycler", "system volume information", "lost+found"}


def is_system_folder(name: str) -> bool:
    """Returns whether a folder name is one that file servers and operating systems create, such as @eaDir or __MACOSX.

    `is_hidden` also covers names that begin with a dot.
    """
    return name.startswith("__MACOSX") or name.casefold() in _SYSTEM_FOLDERS


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder of this name is skipped by every command: it begins with a dot or is a system folder."""
    return name.startswith(".") or is_system_folder(name)


def scan_image_files(
    folder: Path,
    on_error: Callable[[Path, OSError], None],
    *,
    skipped_folder: str = "",
    on_hidden: Callable[[Path], None] = lambda path: None,
) -> Iterator[str]:
    """Generator: yields the image files of a folder and of all folders below it, unordered. Links to folders are not followed.

    Args:
        folder: the folder to list.
        on_error: called with each subfolder that cannot be listed, and the error.
        skipped_folder: real path of a folder that is not listed; empty for none.
        on_hidden: called with each hidden folder, and with each hidden file that has the suffix of an image.

    Yields: the path relative to the folder, with slashes. It may be a broken link.

    Raises: OSError: the folder itself cannot be listed.
    """
    top = os.fspath(folder)

    def handle_error(error: OSError) -> None:
        """Raises the error of the top folder, and passes errors of other folders to `on_error`."""
        if error.filename == top:
            raise error
        if not isinstance(error, FileNotFoundError):  # it was removed during the listing
            on_error(Path(error.filename), error)

    for root, folders, files in os.walk(top, onerror=handle_error):
        images = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
        for name in filter(is_hidden, [*folders, *images]):
            on_hidden(Path(root, name))
        folders[:] = [name for name in folders if not is_hidden(name)]
        if os.path.basename(skipped_folder) in folders:  # compares the names first, because resolving a path is slow
            folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) != skipped_folder]
        prefix = f"{os.path.relpath(root, top)}/" if root != top else ""
        yield from (prefix + name for name in images if not is_hidden(name))


def find_image_files(folder: Path, log: Callable[[str], None] = lambda message: None) -> list[Path]:
    """Returns the image files of a local folder and of all folders below it, sorted by path.

    Pictures that focus_ray drew are left out. Broken links are in the list, so that the attempt to read them reports the file.

    Args:
        folder: the folder to list.
        log: called with a note that gives the number of skipped hidden files and of skipped pictures that focus_ray drew.

    Raises: DataError: there is no image, or a folder cannot be listed.
    """
    hidden: list[Path] = []

    def raise_listing_error(path: Path, error: OSError) -> None:
        raise DataError(f"{path}: cannot be listed: {error.strerror or error}") from error

    paths: list[Path] = []
    try:
        for path in (
            folder / image for image in scan_image_files(folder, raise_listing_error, on_hidden=hidden.append)
        ):
            if path.is_file() or path.is_symlink():
                paths.append(path)
    except OSError as error:
        raise_listing_error(folder, error)
    drawings = {path for path in paths if is_file_drawn_by_focus_ray(path)}
    images = sorted(path for path in paths if path not in drawings)
    counts = {"hidden files or folders": len(hidden), "pictures that focus_ray drew": len(drawings)}
    note = " and ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    if not images:
        expected = f"image files end in {', '.join(IMAGE_SUFFIXES)}"
        raise DataError(f"{folder}: no image in this folder; {expected}{f'; skipped: {note}' if note else ''}")
    if note:
        log(f"note: {folder}: skipped: {note}")
    return images
