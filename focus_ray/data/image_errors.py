"""The error of an image file that cannot be used."""

from __future__ import annotations

from typing import Literal

from focus_ray.errors import DataError

# too_slow: decoding took longer than the limit of the service; see `serving.decoders`
Reason = Literal["empty", "not_an_image", "unsupported", "truncated", "too_large", "too_slow"]


class ImageError(DataError):
    """The error for bytes that cannot be used as an image or mask. The message gives the problem and the remedy.

    Attributes: reason: kind of the problem, one of `Reason`; lists of rejected files contain this code.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(reason, message)  # both in args, so that it survives pickle
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])
