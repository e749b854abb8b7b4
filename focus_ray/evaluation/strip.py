"""An overlay with what was found in words: a strip below the picture, which covers nothing of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from focus_ray.evaluation.inspection import Inspection
from focus_ray.evaluation.report import heat_map, overlay

MIN_WIDTH_PX = 320  # words need so much: a narrower picture is drawn a whole number of times as large
_MAX_HEIGHT_PX = 1280  # and no higher than this: one that is still too narrow has an empty margin on its right
_MIN_TEXT_PX = 13
_WIDTH_IN_TEXT = 45  # heights of text to a picture's width
_BACK, _INK, _SOFT = (22, 27, 33), (240, 243, 246), (176, 186, 196)
_VERDICTS = {"normal": (31, 111, 67), "anomalous": (179, 38, 30)}

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def overlay_with_strip(image: NDArray[np.uint8], inspection: Inspection) -> NDArray[np.uint8]:
    """The image (H, W, 3) under its heat map, and below it verdict, score, threshold and the heat map's scale.

    Returns: (H k + strip, at least W k, 3), with `overlay` at the top left; k is 1 unless the image is narrower than
        `MIN_WIDTH_PX`.
    """
    height, width = image.shape[:2]
    factor = max(1, min(-(-MIN_WIDTH_PX // width), _MAX_HEIGHT_PX // height))
    large = image.repeat(factor, axis=0).repeat(factor, axis=1)
    picture = overlay(large, inspection.scaled(factor))
    if picture.shape[1] < MIN_WIDTH_PX:
        whole = np.full((picture.shape[0], MIN_WIDTH_PX, 3), _BACK, np.uint8)
        whole[:, : picture.shape[1]] = picture
        picture = whole
    return np.concatenate([picture, np.asarray(_strip(inspection, *picture.shape[:2]))])


def _strip(inspection: Inspection, height: int, width: int) -> Image.Image:
    """Below a picture of height x width pixels."""
    text_px = max(_MIN_TEXT_PX, round(min(width, 2 * height) / _WIDTH_IN_TEXT))
    pad, room = text_px, width - 2 * text_px
    words = (
        f"score {inspection.score:.4g}, threshold {inspection.threshold:.4g} "
        f"({inspection.score_to_threshold:.3g} times), p-value {inspection.p_value:.3g}"
    )
    strip = Image.new("RGB", (width, 8 * text_px), _BACK)
    draw = ImageDraw.Draw(strip)
    verdict, font = inspection.verdict.upper(), _font(round(1.3 * text_px))
    box = (pad, pad // 2, pad + draw.textlength(verdict, font) + pad, pad // 2 + 2 * text_px)
    draw.rectangle(box, fill=_VERDICTS[inspection.verdict])
    draw.text((pad + pad / 2, pad // 2 + text_px), verdict, fill=(255, 255, 255), font=font, anchor="lm")
    draw.text((pad, round(3.7 * text_px)), words, fill=_INK, font=_fitting(draw, words, text_px, room), anchor="lm")
    _draw_scale(draw, strip, inspection, text_px, pad, room)
    return strip


def _draw_scale(
    draw: ImageDraw.ImageDraw, strip: Image.Image, inspection: Inspection, text_px: int, left: int, room: int
) -> None:
    """The heat map's colours from 0 to twice the pixel threshold, which is marked in the middle."""
    top, thick = round(4.9 * text_px), text_px
    bar = heat_map(np.linspace(0, 1, room, dtype=np.float32)[None].repeat(thick, axis=0), 0.0, 1.0)
    strip.paste(Image.fromarray(bar), (left, top))
    line = max(1, text_px // 8)
    middle = left + room // 2
    draw.rectangle((left, top, left + room - 1, top + thick - 1), outline=_SOFT, width=max(1, line // 2))
    draw.rectangle((middle - line, top - text_px // 3, middle + line, top + thick + text_px // 3), fill=_INK)
    threshold = inspection.pixel_threshold
    labels = {
        "la": (left, "0"),
        "ma": (middle, f"pixel threshold {threshold:.3g}"),
        "ra": (left + room, f"{2 * threshold:.3g}"),
    }
    font = _font(text_px)
    for anchor, (x, text) in labels.items():
        draw.text((x, top + thick + text_px // 2), text, fill=_SOFT, font=font, anchor=anchor)


def _fitting(draw: ImageDraw.ImageDraw, words: str, text_px: int, room: int) -> Font:
    """The font of a size, or of the smaller one at which the words fit."""
    length = draw.textlength(words, _font(text_px))
    return _font(text_px if length <= room else int(text_px * room / length))


def _font(size_px: int) -> Font:
    return ImageFont.load_default(size=size_px)
