"""Where images come from: a local folder, or an s3:// prefix that is listed once and then asked for files alone."""

from __future__ import annotations

import errno
import fnmatch
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from focus_ray.errors import DataError
from focus_ray.storage import Listed, ObjectReader, is_s3, list_objects


class SourcePath(Protocol):
    """The part of ``pathlib.Path`` that importers use. `Path` and `S3Path` have it."""

    @property
    def name(self) -> str: ...
    @property
    def stem(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def parent(self) -> SourcePath: ...
    def __truediv__(self, name: Any, /) -> SourcePath: ...
    def __lt__(self, other: Any, /) -> bool: ...
    def iterdir(self) -> Iterator[SourcePath]: ...
    def glob(self, pattern: str) -> Iterator[SourcePath]: ...
    def is_dir(self) -> bool: ...
    def is_file(self) -> bool: ...
    def is_symlink(self) -> bool: ...
    def exists(self) -> bool: ...
    def read_bytes(self) -> bytes: ...
    def is_relative_to(self, other: Any, /) -> bool: ...
    def relative_to(self, other: Any, /) -> PurePosixPath | Path: ...


class S3Tree:
    """What lies below an s3:// prefix, from one listing. Sent to another process it goes without the listing."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.files: dict[str, tuple[int, str]] = {}  # path below the prefix -> bytes, ETag
        self.folders: dict[str, list[str]] = {}  # path below the prefix -> names in it
        self.reader = ObjectReader(self.uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Tree, (self.uri,)

    def list(self) -> None:
        """Asks for everything: a request a thousand objects. Raises: DataError: it cannot be listed, or as `take`."""
        self.take(list_objects(self.uri))

    def take(self, listed: Iterable[Listed]) -> None:
        """Builds the folders of objects. Raises: DataError: there is none; a folder without a name."""
        for path, num_bytes, etag in listed:
            parts = path.rstrip("/").split("/")
            if not all(parts):
                raise DataError(f"{self.uri}/{path}: a folder's name is empty: rename the object")
            if not path.endswith("/"):
                self.files[path] = num_bytes, etag
                parts.pop()
            while parts and "/".join(parts) not in self.folders:
                self.folders["/".join(parts)] = []
                parts.pop()
        if not self.files:
            raise DataError(f"{self.uri}: nothing is there: expected images below this prefix")
        self.folders[""] = []
        for path in (*self.files, *self.folders):
            folder, _, name = path.rpartition("/")
            if name:
                self.folders[folder].append(name)


class S3Path:
    """A file or folder of an `S3Tree`, as `pathlib` would have it."""

    __slots__ = ("path", "tree")

    def __init__(self, tree: S3Tree, path: str = "") -> None:
        """
        Args: path: below the tree's prefix; empty for the prefix itself.
        """
        self.tree, self.path = tree, path

    def __str__(self) -> str:
        return f"{self.tree.uri}/{self.path}" if self.path else self.tree.uri

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Path) and (self.path, self.tree.uri) == (other.path, other.tree.uri)

    def __hash__(self) -> int:
        return hash(self.path)

    def __lt__(self, other: SourcePath) -> bool:
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
        dot = name.rfind(".")  # as pathlib has it, several times as fast: a plan asks millions of times
        return name[dot:] if 0 < dot < len(name) - 1 else ""

    @property
    def parent(self) -> S3Path:
        return S3Path(self.tree, self.path.rpartition("/")[0])

    def __truediv__(self, name: Any) -> S3Path:
        below = name if isinstance(name, str) and "/" not in name else str(PurePosixPath(name))
        return S3Path(self.tree, f"{self.path}/{below}" if self.path else below)

    def iterdir(self) -> Iterator[S3Path]:
        return (self / name for name in self.tree.folders[self.path])

    def glob(self, pattern: str) -> Iterator[S3Path]:
        """What fits a pattern without ``**``."""
        first, _, rest = pattern.partition("/")
        for item in self.iterdir() if self.is_dir() else ():
            if fnmatch.fnmatchcase(item.name, first):
                yield from item.glob(rest) if rest else [item]

    def is_dir(self) -> bool:
        return self.path in self.tree.folders

    def is_file(self) -> bool:
        return self.path in self.tree.files

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        return False

    def is_relative_to(self, other: S3Path) -> bool:
        return self == other or str(self).startswith(f"{other}/")

    def relative_to(self, other: S3Path) -> PurePosixPath:
        return PurePosixPath(str(self).removeprefix(str(other)).lstrip("/"))

    def read_bytes(self) -> bytes:
        """One request. Raises: FileNotFoundError: it has gone.  DataError: it cannot be read."""
        data = self.tree.reader.read(str(self))
        if data is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return data


def open_source(source: str | Path) -> SourcePath:
    """A local folder, or an s3:// prefix, which is listed. Raises: DataError: there is none."""
    if is_s3(source):
        tree = S3Tree(str(source))
        tree.list()
        return S3Path(tree)
    root = Path(source).expanduser()
    if not root.is_dir():
        raise DataError(f"{source}: expected a local folder of images, or an s3:// prefix")
    return root


def stamp_of(path: SourcePath) -> tuple[int, str]:
    """A file's bytes, and what changes when it is written: an ETag, or the time in ns; (-1, "") where there is none."""
    if isinstance(path, S3Path):
        return path.tree.files.get(path.path, (-1, ""))
    assert isinstance(path, Path)
    try:
        found = path.stat()
    except OSError:
        return -1, ""
    return found.st_size, str(found.st_mtime_ns)
