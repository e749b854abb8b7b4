"""Normal training images that the service shows, and the places that it may show them from."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence

from PIL import Image

from focus_ray.data.images import decode_image
from focus_ray.data.read import index_version, read_index, read_rows
from focus_ray.errors import ConfigError, DataError, RegistryError
from focus_ray.storage import is_below, is_s3, join, leads_out, open_filesystem

MAX_EXAMPLES = 24
_EXAMPLE_SIDE_PX = 512


class Examples:
    """Reads examples of data sets that manifests name. A manifest's author may not be allowed what the service may read."""

    def __init__(self, allowed: bool | Mapping[str, Sequence[str]]) -> None:
        """allowed: as the setting `examples`. Raises: ConfigError: one is no path or URI."""
        self._allows_all = allowed is True
        try:
            named = allowed if isinstance(allowed, Mapping) else {}
            self._allowed = {team: [normalise_place(place) for place in places] for team, places in named.items()}
        except DataError as error:
            raise ConfigError(f"examples: {error}") from None

    def read(self, team: str, category: str, uri: object, number: int) -> bytes:
        """A normal training image as JPEG, at most 512 px a side; evenly chosen among all. Blocks.

        Args: uri: the data set that the model's manifest names.

        Raises: RegistryError: the team may not show the place, or has no such number.  DataError: it cannot be read.
        """
        place = str(uri) if self._allows_all else self._allowed_place(team, category, uri)
        index = read_index(place, category, split="train")
        labels = zip(index["row"].to_pylist(), index["label"].to_pylist(), strict=True)
        rows = [row for row, label in labels if label == 0]
        count = min(MAX_EXAMPLES, len(rows))
        if not 0 <= number < count:
            raise RegistryError(f"example {number} of {count}")
        chosen = [rows[number * len(rows) // count]]
        (record,) = read_rows(place, category, chosen, columns=("image",), version=index_version(index))
        image = Image.fromarray(decode_image(record["image"], None))
        image.thumbnail((_EXAMPLE_SIDE_PX, _EXAMPLE_SIDE_PX))
        target = io.BytesIO()
        image.save(target, "JPEG", quality=90)
        return target.getvalue()

    def _allowed_place(self, team: str, category: str, uri: object) -> str:
        try:
            place = normalise_place(uri)
        except DataError as error:
            raise RegistryError(f"examples of team {team!r}: {error}") from None
        root = next((root for root in self._allowed.get(team, ()) if is_below(place, root)), None)
        if root is None or leads_out(join(place, f"category={category}"), root):
            raise RegistryError(f"examples of team {team!r}: {uri!r} is not below the places that the setting names")
        return place


def normalise_place(uri: object) -> str:
    """A path without links and `..`, or an s3:// URI. Raises: DataError: it is neither."""
    try:
        if not isinstance(uri, str):
            raise DataError(f"{uri!r}: expected a path or an s3:// URI")
        if not is_s3(uri):
            return os.path.realpath(open_filesystem(uri)[1])
    except (RuntimeError, ValueError) as error:  # ~ of an unknown user, a zero byte
        raise DataError(f"{uri!r}: no path: {error}") from None
    names = uri.removeprefix("s3://").strip("/").split("/")
    if any(name in ("", ".", "..") or "?" in name for name in names):
        raise DataError(f"{uri!r}: expected s3://bucket/prefix, without a query, `.` and `..`")
    return "s3://" + "/".join(names)
