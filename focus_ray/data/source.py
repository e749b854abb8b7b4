"""The source of an ingestion: a local folder, or an s3:// prefix that is listed once and then behaves like a folder."""

from __future__ import annotations

import errno
import fnmatch
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from focus_ray.errors import DataError
from focus_ray.storage.files import ListedObject, S3ObjectReader, is_s3_uri, list_objects


class S3Listing:
    """The files and folders below an s3:// prefix, kept in memory after one request. A pickled copy has no entries."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.files: dict[str, tuple[int, str]] = {}  # path below the prefix -> (bytes, ETag)
        self.folders: dict[str, list[str]] = {}  # path below the prefix -> names of its entries
        self.reader = S3ObjectReader(self.uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Listing, (self.uri,)

    def add_objects(self, objects: Iterable[ListedObject]) -> None:
        """Adds listed objects, and the folders that contain them. Call it once.

        Raises: DataError: no object is a file, or a folder has an empty name.
        """
        for path, num_bytes, etag in objects:
            parts = path.rstrip("/").split("/")
            if not all(parts):
                raise DataError(f"{self.uri}/{path}: a folder has an empty name: rename the object")
            if not path.endswith("/"):
                self.files[path] = num_bytes, etag
                parts.pop()
            while parts and "/".join(parts) not in self.folders:
                self.folders["/".join(parts)] = []
                parts.pop()
        if not self.files:
            raise DataError(f"{self.uri}: no object found: expected images below this prefix")
        self.folders[""] = []
        for path in (*self.files, *self.folders):
            folder, _, name = path.rpartition("/")
            if name:
                self.folders[folder].append(name)


class S3Path:
    """A file or folder below an s3:// prefix, with the parts of the interface of `pathlib.Path` that importers need."""

    __slots__ = ("listing", "path")

    def __init__(self, listing: S3Listing, path: str = "") -> None:
        """Makes the path of a file or folder below the listed prefix.

        Args:
            listing: the listing that contains the file or folder.
            path: path relative to the listed prefix; empty for the prefix itself.
        """
        self.listing, self.path = listing, path

    def __str__(self) -> str:
        return f"{self.listing.uri}/{self.path}" if self.path else self.listing.uri

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Path) and (self.path, self.listing.uri) == (other.path, other.listing.uri)

    def __hash__(self) -> int:
        return hash(self.path)

    def __lt__(self, other: S3Path) -> bool:
        return self.parts < other.parts

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(str(self).removeprefix("s3://").split("/"))

    @property
    def name(self) -> str:
        return str(self).rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.removesuffix(self.suffix)

    @property
    def suffix(self) -> str:
        name = self.name
        dot = name.rfind(".")  # the result of pathlib, several times faster: a plan calls this millions of times
        return name[dot:] if 0 < dot < len(name) - 1 else ""

    @property
    def parent(self) -> S3Path:
        return S3Path(self.listing, self.path.rpartition("/")[0])

    def __truediv__(self, name: Any) -> S3Path:
        below = name if isinstance(name, str) and "/" not in name else str(PurePosixPath(name))
        return S3Path(self.listing, f"{self.path}/{below}" if self.path else below)

    def iterdir(self) -> Iterator[S3Path]:
        """Returns an iterator over the files and folders directly in this folder."""
        return (self / name for name in self.listing.folders[self.path])

    def glob(self, pattern: str) -> Iterator[S3Path]:
        """Generator: yields the files and folders whose path below this folder matches a pattern. ``**`` is not supported."""
        first, _, remainder = pattern.partition("/")
        for item in self.iterdir() if self.is_dir() else ():
            if fnmatch.fnmatchcase(item.name, first):
                yield from item.glob(remainder) if remainder else [item]

    def is_dir(self) -> bool:
        return self.path in self.listing.folders

    def is_file(self) -> bool:
        return self.path in self.listing.files

    def read_bytes(self) -> bytes:
        """Reads the file from S3 with one request, and returns its bytes.

        Raises:
            FileNotFoundError: the object was deleted after the listing.
            DataError: the object cannot be read.
        """
        data = self.listing.reader.read_object(str(self))
        if data is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return data


SourcePath = Path | S3Path
"""A file or folder of a source. Importers use the part of the interface of `Path` that `S3Path` has."""


def get_relative_path(path: SourcePath, root: SourcePath) -> str:
    """Returns a path relative to a root folder, with slashes; the complete path if it is not below the root."""
    if isinstance(path, Path):
        return path.relative_to(str(root)).as_posix() if path.is_relative_to(str(root)) else str(path)
    return str(path).removeprefix(f"{root}/")


def open_source_folder(source: str | Path) -> SourcePath:
    """Opens the source of an ingestion: returns the path of a local folder, or lists an s3:// prefix and returns its path.

    Raises: DataError: the folder does not exist, the path is no folder, or the prefix cannot be listed or contains no object.
    """
    if is_s3_uri(source):
        listing = S3Listing(str(source))
        listing.add_objects(list_objects(listing.uri))
        return S3Path(listing)
    root = Path(source).expanduser()
    if not root.is_dir():
        raise DataError(f"{source}: expected a local folder of images, or an s3:// prefix")
    return root


def read_size_and_change_mark(path: SourcePath) -> tuple[int, str]:
    """Returns size and change mark of a file, to recognise an unchanged file without reading it.

    Returns:
        The size in bytes, and the ETag (S3) or the time of the last change in ns (disk); (-1, "") if the file does not exist or
        cannot be looked up.
    """
    if isinstance(path, S3Path):
        return path.listing.files.get(path.path, (-1, ""))
    try:
        status = path.stat()
    except OSError:
        return -1, ""
    return status.st_size, str(status.st_mtime_ns)
