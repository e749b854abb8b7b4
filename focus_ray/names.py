"""Names: what one may look like, and one that no other run has."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from datetime import datetime, timezone

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


def is_utf8(name: str) -> bool:
    """Whether a file's name is valid UTF-8; others come with surrogates in place of their odd bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
