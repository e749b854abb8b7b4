"""What lies in a watched folder, and which of it has come to rest. The folder is listed: shares tell no one of new files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from focus_ray.data.listing import scan_images


class File(NamedTuple):
    """A file as a listing shows it. image: its path below the folder, with slashes.

    ctime_ns and inode tell a file that was replaced by another of the same size and time of change, as `cp -p` does.
    """

    image: str
    num_bytes: int
    mtime_ns: int
    ctime_ns: int = 0
    inode: int = 0


def list_images(folder: Path, leave_out: Path, log: Callable[[str], None]) -> list[File]:
    """Image files of a folder and all below it, unordered.

    Passed over are hidden files and folders, links to folders, broken links, and names without the suffix of an image.

    Args:
        leave_out: a folder that is not looked into: where the verdicts go.
        log: told of a folder within that cannot be listed.

    Raises: OSError: the folder itself cannot be listed.
    """

    def tell(path: Path, error: OSError) -> None:
        log(f"{path}: cannot be listed: {error.strerror or error}")

    files = []
    for image, entry in scan_images(folder, tell, skipped_folder=os.path.realpath(leave_out)):
        try:
            if entry.is_file():
                status = entry.stat()
                files.append(File(image, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
        except FileNotFoundError:  # it was removed during the listing
            continue
        except OSError as error:
            log(f"{folder / image}: cannot be looked up: {error.strerror or error}")
    return files


@dataclass
class Awaited:
    """A file without a line. since: when it was first seen as it is.  not_before: when to try it again, s of the same clock."""

    file: File
    since: float
    not_before: float = -math.inf


@dataclass
class Waiting:
    """The files that have no line yet. settle_s: for which size and times of change have to stay the same."""

    settle_s: float
    files: dict[str, Awaited] = field(default_factory=dict)

    def look(self, found: Iterable[File], now: float) -> None:
        """Takes what is there now; a file that has changed begins to rest again, one that is gone is forgotten."""
        before = self.files
        self.files = {}
        for file in found:
            known = before.get(file.image)
            if known and known.file[:-1] == file[:-1]:  # some network shares give a resting file another inode
                known.file = file
                self.files[file.image] = known
            else:
                self.files[file.image] = Awaited(file, now)

    def ready(self, now: float) -> list[Awaited]:
        """Those at rest, in the order in which they were last written."""
        ready = [one for one in self.files.values() if now >= max(one.since + self.settle_s, one.not_before)]
        return sorted(ready, key=lambda one: (one.file.mtime_ns, one.file.image))

    def done(self, image: str) -> None:
        del self.files[image]
