"""The set of keys (hashes) of processed files. A key takes eight bytes, so that the keys of millions of files fit into RAM."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from focus_ray.watching.folder import ListedFile

_MAX_RECENT = 65536  # keys in a Python set, which takes about 100 bytes per key


def compute_stamp_key(file: ListedFile) -> int:
    """Returns the 64-bit stamp key of a listed file: a hash of its path, size, times and inode."""
    return _hash_text(f"{file.num_bytes}/{file.mtime_ns}/{file.ctime_ns}/{file.inode}/{file.image}")


def compute_content_key(image: str, sha256: str) -> int:
    """Returns the 64-bit content key of a file: a hash of its path and its bytes.

    Args:
        image: Path of the file relative to the folder.
        sha256: SHA-256 of the bytes.
    """
    return _hash_text(f"{sha256}/{image}")


def _hash_text(text: str) -> int:
    """Returns a 64-bit hash of a text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


class ProcessedKeySet:
    """A set of 64-bit keys, stored mainly in a sorted array.

    Two different images get the same key by chance in about 1 of 400,000 sets of ten million keys.
    """

    def __init__(self, keys: array[int] | Sequence[int] = ()) -> None:
        self._sorted: NDArray[np.uint64] = np.unique(np.asarray(keys, dtype=np.uint64))
        self._recent: set[int] = set()

    def __contains__(self, key: int) -> bool:
        return self.contains_each([key])[0]

    def add(self, *keys: int) -> None:
        """Adds keys to the set. When many keys are new, they are merged into the sorted array."""
        self._recent.update(keys)
        if len(self._recent) >= _MAX_RECENT:
            self._sorted = np.union1d(self._sorted, np.fromiter(self._recent, np.uint64, len(self._recent)))
            self._recent.clear()

    def contains_each(self, keys: Sequence[int]) -> list[bool]:
        """Returns, for each key, whether the set contains the key. One call is faster than one look-up per key."""
        is_sorted = np.zeros(len(keys), dtype=bool)
        if len(self._sorted):
            queries = np.array(keys, dtype=np.uint64)
            # Binary search: each key can only be at its insertion position in the sorted array.
            positions = np.minimum(np.searchsorted(self._sorted, queries), len(self._sorted) - 1)
            is_sorted = self._sorted[positions] == queries
        return [is_old or key in self._recent for key, is_old in zip(keys, is_sorted.tolist(), strict=True)]
