"""Exit statuses, messages on standard error, and image paths, for all commands."""

from __future__ import annotations

import codecs
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from focus_ray.errors import DataError
from focus_ray.names import escape_invalid_utf8 as escape_invalid_utf8  # commands share the names

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_PARTLY = 3  # a part of the work failed, and a message says so


def check_paths_exist(*places: str | None) -> None:
    """Checks that local paths exist. Commands call it before heavy imports. Ignores None and URIs.

    Raises:
        DataError: A path does not exist.
    """
    for place in places:
        if place is not None and "://" not in place and not Path(place).expanduser().exists():
            raise DataError(f"{place}: no such file or folder")


def list_image_paths(names: Sequence[str]) -> list[Path]:
    """Returns the image files for names of files and folders, in the order of the names.

    A folder stands for the image files in it and in all folders below it. If there are several names, skips system
    folders, because a shell includes them in `new/*`.

    Raises:
        DataError: A file or folder does not exist, or a folder has no image.
    """
    from focus_ray.data.listing import find_image_files, is_system_folder

    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir() and len(names) > 1 and is_system_folder(path.name):
            print_message(f"note: {escape_invalid_utf8(path)}: a system folder, skipped")
        elif path.is_dir():
            paths += find_image_files(path, print_message)
        elif path.is_file():
            paths.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return paths


def _escape_unencodable_characters(error: UnicodeError) -> tuple[str, int]:
    """Encodes characters as JSON does in ASCII (\\u00e9), so that JSON lines stay valid."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def make_stdout_accept_all_characters() -> None:
    """Makes standard output accept any text: writes \\u escapes for characters that its encoding lacks."""
    codecs.register_error("focus_ray_escape", _escape_unencodable_characters)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="focus_ray_escape")


def print_message(message: str) -> None:
    """Prints a message on standard error."""
    print(message, file=sys.stderr, flush=True)
