"""Names: what one may look like, one that no other run has, and the names of kinds that are loaded when first used."""

from __future__ import annotations

import difflib
import importlib
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Generic, TypeVar, cast

T = TypeVar("T")
Log = Callable[[str], None]
"""Takes a line for people."""

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""Of a run, team, category, version or alias: fit for files, S3 keys, URLs and Ray."""

NAME_WORDS = "a letter or digit, then letters, digits, '.', '_' or '-', 100 in all at most"


def is_name(text: object) -> bool:
    """Whether a value is a name as `NAME` says."""
    return isinstance(text, str) and re.fullmatch(NAME, text) is not None and not text.endswith("\n")


def unique_name(*parts: str | None) -> str:
    """A name that no other run or job has: the parts' first 30 characters, the time (UTC) and a random part.

    Fit for files and Ray alike, and for a configuration's `name` with up to two parts.
    """
    kept = [re.sub(r"[^A-Za-z0-9._]+", "-", part)[:30] for part in parts if part]
    return "-".join([*kept, f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}", uuid.uuid4().hex[:6]])


class Kinds(Generic[T]):
    """The kinds there are of something (densities, backbones, importers), by name; each is imported when first asked for.

    A new kind is a file that defines it, and its line in the table. Knows no module itself, so that a configuration can be
    checked without torch.
    """

    def __init__(self, what: str, places: dict[str, str]) -> None:
        """
        Args:
            what: for messages, as in "density".  places: name -> "module:attribute".
        """
        self.what, self.places = what, places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def check(self, name: str) -> str:
        """Returns: the name. Raises: ValueError: there is no such kind; it names those there are."""
        if name not in self.places:
            close = difflib.get_close_matches(name, self.places, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{self.what} {name!r} is not known; {hint}choose one of {', '.join(self.places)}")
        return name

    def __getitem__(self, name: str) -> T:
        """Raises: ValueError: as `check`."""
        module, _, attribute = self.places[self.check(name)].partition(":")
        return cast(T, getattr(importlib.import_module(module), attribute))
