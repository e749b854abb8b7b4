"""Lists the image files in a watched folder, and finds out which files are completely written.

The folder is listed again and again, because network shares send no events about new files.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from focus_ray.data.listing import scan_image_files


class ListedFile(NamedTuple):
    """A file in a listing of the folder: its path, size, times and inode.

    ctime_ns and inode change if a file is replaced by another file of the same size and modification time (`cp -p`).

    Attributes:
        image: Path of the file relative to the folder, with slashes.
        num_bytes: Size of the file.
        mtime_ns: Time of the last change of the content.
        ctime_ns: Time of the last change of the file's metadata.
        inode: Number of the file in its file system.
    """

    image: str
    num_bytes: int
    mtime_ns: int
    ctime_ns: int = 0
    inode: int = 0

    @classmethod
    def from_status(cls, image: str, status: os.stat_result) -> ListedFile:
        """Returns the listing entry of a file from the result of its `stat`."""
        return cls(image, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def list_images(folder: Path, skipped_folder: Path, log: Callable[[str], None]) -> list[ListedFile]:
    """Lists the image files in a folder and its subfolders, in no particular order.

    Skips hidden files and folders, links to folders, broken links, and files without the suffix of an image.

    Args:
        folder: Folder to list.
        skipped_folder: Subfolder that is skipped: the output folder.
        log: Called with a message about each subfolder or file that cannot be listed.

    Raises:
        OSError: The folder itself cannot be listed.
    """

    def log_listing_error(path: Path, error: OSError) -> None:
        log(f"{path}: cannot be listed: {error.strerror or error}")

    files = []
    for image in scan_image_files(folder, log_listing_error, skipped_folder=os.path.realpath(skipped_folder)):
        try:
            status = os.stat(folder / image)
            if stat.S_ISREG(status.st_mode):
                files.append(ListedFile.from_status(image, status))
        except FileNotFoundError:  # deleted during the listing, or a broken link
            continue
        except OSError as error:
            log_listing_error(folder / image, error)
    return files


@dataclass
class PendingFile:
    """A file that is not processed yet.

    Attributes:
        file: The file in the latest listing.
        unchanged_since_s: Time of `time.monotonic` at the first listing with the current size and times.
        retry_at_s: The file is not read again before this time of `time.monotonic`.
    """

    file: ListedFile
    unchanged_since_s: float
    retry_at_s: float = -math.inf


class PendingFiles(dict[str, PendingFile]):
    """A dictionary of all files in the folder that are not processed yet: path relative to the folder -> `PendingFile`."""

    def update_from_listing(self, listing: Iterable[ListedFile], now: float) -> None:
        """Replaces the pending files by a new listing.

        A file whose size or times have changed must again stay unchanged for some time before `list_ready_files` returns it.

        Args:
            listing: Files of the folder that are not processed yet.
            now: Time of `time.monotonic` in seconds.
        """
        before = dict(self)
        self.clear()
        for file in listing:
            pending = before.get(file.image)
            if pending is None or pending.file[:-1] != file[:-1]:  # some shares change the inode of an unchanged file
                pending = PendingFile(file, now)
            pending.file = file
            self[file.image] = pending

    def list_ready_files(self, settle_s: float, now: float) -> list[PendingFile]:
        """Returns the files that may be read now, oldest modification time first: they are settled, and no retry is delayed.

        Args:
            settle_s: A file is settled when its size and times have not changed for this many seconds.
            now: Time of `time.monotonic` in seconds.
        """
        ready = [item for item in self.values() if now >= max(item.unchanged_since_s + settle_s, item.retry_at_s)]
        return sorted(ready, key=lambda item: (item.file.mtime_ns, item.file.image))
