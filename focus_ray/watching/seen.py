"""Which images have a line already, in eight bytes each: millions of them fit beside the model."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_MERGED_AT = 65536  # new ones, of about 100 bytes each


def stamp_key(image: str, num_bytes: int, mtime_ns: int, ctime_ns: int = 0, inode: int = 0) -> int:
    """Key of a file as a listing of its folder shows it: of all fields of `folder.File`."""
    return _key(f"{num_bytes}/{mtime_ns}/{ctime_ns}/{inode}/{image}")


def content_key(image: str, sha256: str) -> int:
    """Of a name and the bytes under it."""
    return _key(f"{sha256}/{image}")


def _key(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


class Seen:
    """A set of keys, 64 bits each: of ten million, two that are alike by chance come about once in 400,000 such sets."""

    def __init__(self, keys: array[int] | Sequence[int] = ()) -> None:
        self._sorted: NDArray[np.uint64] = np.unique(np.asarray(keys, dtype=np.uint64))
        self._new: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._new)

    def __contains__(self, key: int) -> bool:
        return self.known([key])[0]

    def add(self, *keys: int) -> None:
        self._new.update(keys)
        if len(self._new) >= _MERGED_AT:
            self._sorted = np.union1d(self._sorted, np.fromiter(self._new, np.uint64, len(self._new)))
            self._new.clear()

    def known(self, keys: Iterable[int]) -> list[bool]:
        """Of each key whether it is in the set; quicker for many keys than one after the other."""
        keys = list(keys)
        if not len(self._sorted):
            return [key in self._new for key in keys]
        asked = np.array(keys, dtype=np.uint64)
        places = np.minimum(np.searchsorted(self._sorted, asked), len(self._sorted) - 1)
        return [
            old or key in self._new for key, old in zip(keys, (self._sorted[places] == asked).tolist(), strict=True)
        ]
