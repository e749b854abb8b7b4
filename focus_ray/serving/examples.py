"""Reads normal training images that the service shows as examples, from data sets that the settings allow."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence

from PIL import Image

from focus_ray.data.images import decode_image
from focus_ray.data.read import index_version, read_index, read_rows
from focus_ray.errors import ConfigError, DataError, RegistryError
from focus_ray.storage.files import is_below, is_s3_uri, join_path, leads_outside_root, open_filesystem

MAX_EXAMPLES = 24
_EXAMPLE_SIDE_PX = 512


class ExampleImageReader:
    """Reads example images from the data sets that are named in the manifests of the models.

    The author of a manifest may have fewer rights than the service. The reader therefore reads only below allowed locations.
    """

    def __init__(self, allowed: bool | Mapping[str, Sequence[str]]) -> None:
        """Stores the allowed locations in normal form.

        Args: allowed: value of the setting `examples`: team -> locations. True allows every location, False none.

        Raises: ConfigError: a location is not a path or URI.
        """
        self._allows_all = allowed is True
        try:
            allowed_by_team = allowed if isinstance(allowed, Mapping) else {}
            self._allowed_roots = {
                team: [normalise_location(location) for location in locations]
                for team, locations in allowed_by_team.items()
            }
        except DataError as error:
            raise ConfigError(f"examples: {error}") from None

    def read_example_image(self, team: str, category: str, uri: object, number: int) -> bytes:
        """Returns a normal training image as JPEG with sides of at most 512 pixels. Blocks while it reads the data set.

        Args:
            uri: location of the data set, from the manifest of the model.
            number: number of the example, from 0; the examples are evenly spread over the normal training images.

        Raises:
            RegistryError: the team may not show this data set, or there is no example of this number.
            DataError: the data set or the image cannot be read, or the image cannot be decoded.
        """
        location = str(uri) if self._allows_all else self._resolve_allowed_location(team, category, uri)
        index = read_index(location, category, split="train")
        labels = zip(index["row"].to_pylist(), index["label"].to_pylist(), strict=True)
        rows = [row for row, label in labels if label == 0]
        count = min(MAX_EXAMPLES, len(rows))
        if not 0 <= number < count:
            raise RegistryError(f"there is no example {number}: category {category!r} has {count}, numbered from 0")
        chosen_rows = [rows[number * len(rows) // count]]
        (record,) = read_rows(location, category, chosen_rows, columns=("image",), version=index_version(index))
        image = Image.fromarray(decode_image(record["image"], None))
        image.thumbnail((_EXAMPLE_SIDE_PX, _EXAMPLE_SIDE_PX))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=90)
        return jpeg.getvalue()

    def _resolve_allowed_location(self, team: str, category: str, uri: object) -> str:
        """Returns the location of a data set in normal form.

        Raises: RegistryError: the location is invalid, or the setting `examples` does not allow it for the team.
        """
        try:
            location = normalise_location(uri)
        except DataError as error:
            raise RegistryError(f"examples of team {team!r}: {error}") from None
        root = next((root for root in self._allowed_roots.get(team, ()) if is_below(location, root)), None)
        if root is None or leads_outside_root(join_path(location, f"category={category}"), root):
            raise RegistryError(
                f"examples of team {team!r}: {uri!r} is not below an allowed location: add it to the setting `examples`"
            )
        return location


def normalise_location(uri: object) -> str:
    """Returns a location in normal form: an absolute path without links and `..`, or an s3:// URI without a closing slash.

    Raises: DataError: `uri` is neither a path nor an s3:// URI, or the s3:// URI has a query, `.`, `..` or an empty name.
    """
    try:
        if not isinstance(uri, str):
            raise DataError(f"{uri!r}: expected a path or an s3:// URI")
        if not is_s3_uri(uri):
            return os.path.realpath(open_filesystem(uri)[1])
    except (RuntimeError, ValueError) as error:  # `~` with an unknown user, or a zero byte in the path
        raise DataError(f"{uri!r} is not a path: {error}") from None
    names = uri.removeprefix("s3://").strip("/").split("/")
    if any(name in ("", ".", "..") or "?" in name for name in names):
        raise DataError(f"{uri!r}: expected s3://bucket/prefix without a query, `.` or `..`")
    return "s3://" + "/".join(names)
