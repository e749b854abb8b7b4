"""Names of runs, categories and versions: which names are valid, and how to make a unique name."""

from __future__ import annotations

import difflib
import hashlib
import re
import unicodedata
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime, timezone

Log = Callable[[str], None]
"""A function that shows one line of text to the user."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""Pattern of the name of a run, team, category, version or alias. Such names are valid in files, S3 keys, URLs and Ray."""

# the pattern in words, for error messages
NAME_WORDS = "a letter or digit, then letters, digits, '.', '_' or '-', 100 in all at most"


def is_valid_name(text: object) -> bool:
    """Returns whether a value is a text that matches `NAME_PATTERN`."""
    return isinstance(text, str) and re.fullmatch(NAME_PATTERN, text) is not None and not text.endswith("\n")


_GERMAN_LETTERS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "ß": "ss"})


def make_valid_name(title: str) -> str:
    """Returns a valid name that resembles a title: Deckel-Fotos for "Deckel Fotos", Mueller for "Müller".

    A valid name is returned unchanged. If the title has no Latin letters and no digits, the name is made of its hash.
    """
    if is_valid_name(title):
        return title
    latin = unicodedata.normalize("NFKD", title.translate(_GERMAN_LETTERS)).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._]+", "-", latin).strip("-._")[:100]
    return name or f"name-{hashlib.sha256(title.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


def make_unique_name(*parts: str | None) -> str:
    """Returns a unique name: the first 30 characters of each part, the time (UTC) and a random part, joined by hyphens.

    The name is valid in files and in Ray. With at most two parts it is also short enough for the `name` of a configuration.

    Args: parts: texts for the start of the name. Invalid characters become hyphens; None and empty texts are skipped.
    """
    prefixes = [re.sub(r"[^A-Za-z0-9._]+", "-", part)[:30] for part in parts if part]
    return "-".join([*prefixes, f"{datetime.now(timezone.utc):%Y%m%d-%H%M%S}", uuid.uuid4().hex[:6]])


def suggest_similar_name(name: str, choices: Iterable[str], min_similarity: float = 0.6) -> str:
    """Returns "did you mean 'x'?" with the choice that is most similar to a misspelt name, or "" if none is similar.

    Args: min_similarity: ratio of `difflib.SequenceMatcher`, 0 to 1.
    """
    similar = difflib.get_close_matches(name, choices, n=1, cutoff=min_similarity)
    return f"did you mean {similar[0]!r}?" if similar else ""


def is_valid_utf8(name: str) -> bool:
    """Returns whether a file name is valid UTF-8. Python represents invalid bytes of a file name as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def escape_invalid_utf8(path: object) -> str:
    """Returns a path or name as valid UTF-8 text: a byte that is not UTF-8 becomes an escape such as \\xff."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
