"""Exit statuses, messages on standard error, and image paths, for all commands."""

from __future__ import annotations

import codecs
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from focus_ray.errors import DataError

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_PARTLY = 3  # a part of the work failed, and a message says so


def readable_name(path: Path | str) -> str:
    """Returns a path as text for any terminal and file: bytes that are not UTF-8 become \\xff."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def require(*places: str | None) -> None:
    """Checks that local paths exist, before heavy imports. Raises: DataError: a path does not exist."""
    for place in places:
        if place is not None and "://" not in place and not Path(place).expanduser().exists():
            raise DataError(f"{place}: no such file or folder")


def image_paths(names: Sequence[str]) -> list[Path]:
    """Returns image files, and the image files of folders and of all folders below them, in order.

    Among several names, system folders are skipped, because `new/*` includes them.

    Raises: DataError: a file or folder does not exist, or a folder has no image.
    """
    from focus_ray.data.listing import find_image_files, is_system_folder

    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir() and len(names) > 1 and is_system_folder(path.name):
            say(f"note: {readable_name(path)}: a folder of the system, passed over")
        elif path.is_dir():
            paths += find_image_files(path, say)
        elif path.is_file():
            paths.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return paths


def _escape(error: UnicodeError) -> tuple[str, int]:
    """Encodes characters as JSON does in ASCII (\\u00e9), so that JSON lines stay valid."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def accept_all_characters() -> None:
    """Makes standard output accept any text: an encoding without a character writes its escape."""
    codecs.register_error("focus_ray_escape", _escape)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="focus_ray_escape")


def say(message: str) -> None:
    """Prints a message on standard error."""
    print(message, file=sys.stderr, flush=True)
