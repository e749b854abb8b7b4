"""Encodes arrays as PNG files."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from focus_ray.drawing.mark import MARK


def encode_png(array: NDArray[Any], *, drawn: bool = False) -> bytes:
    """Encodes an array as a lossless PNG and returns the bytes of the file.

    Args:
        array: (H, W, 3) or (H, W) uint8 gives an 8-bit PNG; (H, W) bool gives a 1-bit PNG.
        drawn: marks the file as a picture that focus_ray drew, so that no command uses it as a photograph.

    Raises: ValueError: the array has another shape or type.
    """
    is_colour = array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8
    if not is_colour and not (array.ndim == 2 and array.dtype in (np.uint8, np.bool_)):
        raise ValueError(f"shape {array.shape} of {array.dtype}: expected uint8 (H, W, 3) or (H, W), or bool (H, W)")
    if array.dtype == np.bool_:
        image = Image.fromarray(array.astype(np.uint8) * np.uint8(255)).convert("1", dither=Image.Dither.NONE)
    else:
        image = Image.fromarray(np.ascontiguousarray(array))
    sink = io.BytesIO()
    text = PngInfo()
    if drawn:
        text.add_text("Software", MARK)
    image.save(sink, format="PNG", pnginfo=text)
    return sink.getvalue()
