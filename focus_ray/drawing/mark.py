"""Marks the pictures that focus_ray draws (heat maps, overlays, plots), so that no command inspects one as a photograph."""

from __future__ import annotations

from pathlib import Path

MARK = "focus_ray drawing"  # value of the text field "Software" of a PNG, or the comment of a JPEG
MARK_WITHIN_BYTES = 4096  # encoders write the mark before the pixels, so it is near the start of the file
_SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff")


def is_drawn_by_focus_ray(data: bytes) -> bool:
    """Whether the bytes of a file, or its first `MARK_WITHIN_BYTES`, carry the mark."""
    return data.startswith(_SIGNATURES) and MARK.encode() in data[:MARK_WITHIN_BYTES]


def is_file_drawn_by_focus_ray(path: Path) -> bool:
    """Whether a local file carries the mark; False for a file that cannot be read."""
    try:
        with path.open("rb") as stream:
            return is_drawn_by_focus_ray(stream.read(MARK_WITHIN_BYTES))
    except OSError:
        return False
