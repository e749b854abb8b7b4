"""Draws an overlay with a strip of text below the picture: verdict, score, thresholds and the colour scale."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from focus_ray.detect.inspection import Inspection
from focus_ray.evaluation.report import heat_map, overlay

MIN_WIDTH_PX = 320  # the text needs this width; a narrower picture is enlarged by a whole number
_MAX_HEIGHT_PX = 1280  # of an enlarged picture; a picture that is still too narrow gets an empty margin on its right
_MIN_TEXT_PX = 13
_WIDTH_IN_TEXT_HEIGHTS = 45  # width of a picture divided by the height of its text
_BACKGROUND, _TEXT_COLOUR, _SCALE_COLOUR = (22, 27, 33), (240, 243, 246), (176, 186, 196)
_VERDICT_COLOURS = {"normal": (31, 111, 67), "anomalous": (179, 38, 30)}

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def overlay_with_strip(image: NDArray[np.uint8], inspection: Inspection) -> NDArray[np.uint8]:
    """Draws the overlay of an image (H, W, 3) with a strip below it: verdict, score, threshold and colour scale.

    Returns: (k * H + strip height, at least k * W, 3) uint8, with `overlay` at the top left. The enlargement k is 1 unless the
        image is narrower than `MIN_WIDTH_PX`.
    """
    height, width = image.shape[:2]
    factor = max(1, min(-(-MIN_WIDTH_PX // width), _MAX_HEIGHT_PX // height))
    enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
    picture = overlay(enlarged, inspection.scaled(factor))
    if picture.shape[1] < MIN_WIDTH_PX:
        widened = np.full((picture.shape[0], MIN_WIDTH_PX, 3), _BACKGROUND, np.uint8)
        widened[:, : picture.shape[1]] = picture
        picture = widened
    return np.concatenate([picture, np.asarray(_strip(inspection, *picture.shape[:2]))])


def _strip(inspection: Inspection, height: int, width: int) -> Image.Image:
    """Draws the strip for a picture of height x width pixels."""
    text_px = max(_MIN_TEXT_PX, round(min(width, 2 * height) / _WIDTH_IN_TEXT_HEIGHTS))
    margin_px, available_px = text_px, width - 2 * text_px
    text = (
        f"score {inspection.score:.4g}, threshold {inspection.threshold:.4g} "
        f"({inspection.score_to_threshold:.3g} times), p-value {inspection.p_value:.3g}"
    )
    strip = Image.new("RGB", (width, 8 * text_px), _BACKGROUND)
    draw = ImageDraw.Draw(strip)
    verdict, font = inspection.verdict.upper(), _font(round(1.3 * text_px))
    box = (
        margin_px,
        margin_px // 2,
        margin_px + draw.textlength(verdict, font) + margin_px,
        margin_px // 2 + 2 * text_px,
    )
    draw.rectangle(box, fill=_VERDICT_COLOURS[inspection.verdict])
    draw.text(
        (margin_px + margin_px / 2, margin_px // 2 + text_px), verdict, fill=(255, 255, 255), font=font, anchor="lm"
    )
    draw.text(
        (margin_px, round(3.7 * text_px)),
        text,
        fill=_TEXT_COLOUR,
        font=_fitting_font(draw, text, text_px, available_px),
        anchor="lm",
    )
    _draw_scale(draw, strip, inspection, text_px, margin_px, available_px)
    return strip


def _draw_scale(
    draw: ImageDraw.ImageDraw, strip: Image.Image, inspection: Inspection, text_px: int, left: int, available_px: int
) -> None:
    """Draws the colour scale from 0 to twice the pixel threshold, with a mark at the pixel threshold in the middle."""
    top, height_px = round(4.9 * text_px), text_px
    bar = heat_map(np.linspace(0, 1, available_px, dtype=np.float32)[None].repeat(height_px, axis=0), 0.0, 1.0)
    strip.paste(Image.fromarray(bar), (left, top))
    line = max(1, text_px // 8)
    middle = left + available_px // 2
    draw.rectangle(
        (left, top, left + available_px - 1, top + height_px - 1), outline=_SCALE_COLOUR, width=max(1, line // 2)
    )
    draw.rectangle(
        (middle - line, top - text_px // 3, middle + line, top + height_px + text_px // 3), fill=_TEXT_COLOUR
    )
    threshold = inspection.pixel_threshold
    labels = {
        "la": (left, "0"),
        "ma": (middle, f"pixel threshold {threshold:.3g}"),
        "ra": (left + available_px, f"{2 * threshold:.3g}"),
    }
    font = _font(text_px)
    for anchor, (x, text) in labels.items():
        draw.text((x, top + height_px + text_px // 2), text, fill=_SCALE_COLOUR, font=font, anchor=anchor)


def _fitting_font(draw: ImageDraw.ImageDraw, text: str, text_px: int, available_px: int) -> Font:
    """Returns the font at `text_px`, or at the smaller size at which the text fits into `available_px` pixels."""
    length = draw.textlength(text, _font(text_px))
    return _font(text_px if length <= available_px else int(text_px * available_px / length))


def _font(size_px: int) -> Font:
    """Returns the default font at a size."""
    return ImageFont.load_default(size=size_px)
