"""Draws a strip of text below an overlay: verdict, score, thresholds and the colour scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from focus_ray.drawing.overlay import draw_heat_map

MIN_WIDTH_PX = 320  # the text needs this width; a narrower picture is enlarged by a whole number
_MAX_HEIGHT_PX = 1280  # of an enlarged picture; a picture that is still too narrow gets an empty margin on its right
_MIN_TEXT_PX = 13
_WIDTH_IN_TEXT_HEIGHTS = 45  # width of a picture divided by the height of its text
_BACKGROUND, _TEXT_COLOUR, _SCALE_COLOUR = (22, 27, 33), (240, 243, 246), (176, 186, 196)
_VERDICT_COLOURS = {"normal": (31, 111, 67), "anomalous": (179, 38, 30)}


def enlarge_narrow_image(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Enlarges an image (H, W, 3) narrower than `MIN_WIDTH_PX` by a whole number; returns other images unchanged."""
    height, width = image.shape[:2]
    factor = max(1, min(-(-MIN_WIDTH_PX // width), _MAX_HEIGHT_PX // height))
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def add_text_strip(picture: NDArray[np.uint8], verdict: str, text: str, threshold: float) -> NDArray[np.uint8]:
    """Draws a strip below a picture (H, W, 3).

    Args:
        verdict: normal or anomalous.
        text: line below the verdict.
        threshold: pixel threshold, in the middle of the colour scale.

    Returns: (H + strip height, at least W, 3) uint8, with the picture at the top left. The width is at least `MIN_WIDTH_PX`.
    """
    margin_px = max(0, MIN_WIDTH_PX - picture.shape[1])
    background = np.full((picture.shape[0], margin_px, 3), _BACKGROUND, np.uint8)
    widened = np.concatenate([picture, background], axis=1)
    height, width = widened.shape[:2]
    text_px = max(_MIN_TEXT_PX, round(min(width, 2 * height) / _WIDTH_IN_TEXT_HEIGHTS))
    strip = Image.new("RGB", (width, 8 * text_px), _BACKGROUND)
    draw = ImageDraw.Draw(strip)
    _draw_verdict_box(draw, verdict, text_px)
    available_px = width - 2 * text_px
    length = draw.textlength(text, ImageFont.load_default(text_px))
    font = ImageFont.load_default(text_px if length <= available_px else int(text_px * available_px / length))
    draw.text((text_px, round(3.7 * text_px)), text, fill=_TEXT_COLOUR, font=font, anchor="lm")
    _draw_colour_scale(draw, strip, threshold, text_px, available_px)
    return np.concatenate([widened, np.asarray(strip)])


def _draw_verdict_box(draw: ImageDraw.ImageDraw, verdict: str, text_px: int) -> None:
    """Draws the verdict in a box of its colour."""
    text, font = verdict.upper(), ImageFont.load_default(round(1.3 * text_px))
    top, bottom = text_px // 2, text_px // 2 + 2 * text_px
    right = text_px + draw.textlength(text, font) + text_px
    draw.rectangle((text_px, top, right, bottom), fill=_VERDICT_COLOURS[verdict])
    draw.text((text_px + text_px / 2, top + text_px), text, fill=(255, 255, 255), font=font, anchor="lm")


def _draw_colour_scale(
    draw: ImageDraw.ImageDraw, strip: Image.Image, threshold: float, text_px: int, available_px: int
) -> None:
    """Draws the colour scale from 0 to twice the pixel threshold, with a mark at the pixel threshold in the middle."""
    start, top = text_px, round(4.9 * text_px)
    end, bottom = start + available_px, top + text_px
    bar = draw_heat_map(np.linspace(0, 1, available_px, dtype=np.float32)[None].repeat(text_px, axis=0), 0.0, 1.0)
    strip.paste(Image.fromarray(bar), (start, top))
    line = max(1, text_px // 8)
    middle = start + available_px // 2
    draw.rectangle((start, top, end - 1, bottom - 1), outline=_SCALE_COLOUR, width=max(1, line // 2))
    draw.rectangle((middle - line, top - text_px // 3, middle + line, bottom + text_px // 3), fill=_TEXT_COLOUR)
    labels = {
        "la": (start, "0"),
        "ma": (middle, f"pixel threshold {threshold:.3g}"),
        "ra": (end, f"{2 * threshold:.3g}"),
    }
    font = ImageFont.load_default(text_px)
    for anchor, (x, text) in labels.items():
        draw.text((x, bottom + text_px // 2), text, fill=_SCALE_COLOUR, font=font, anchor=anchor)
