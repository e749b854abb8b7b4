"""Draws synthetic defects on normal images. They make a validation set without labels, which ranks configurations.

Cut-and-paste patches and scars follow CutPaste (arXiv 2104.04015), noise-shaped stains follow DRAEM (arXiv 2108.07610). The
other kinds and all ranges are our own: sizes and contrasts range from obvious to barely visible. Real defects differ. So such
a set ranks configurations of one category, but its metrics are never reported as the detection rate of real defects.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Patch = NDArray[np.float32]  # (h, w, 3), 0 to 255

VISIBLE_CHANGE = 8
"""A pixel belongs to the mask if one of its channels changed by more than this, on a scale of 0 to 255."""

AREA_RANGE = (0.0006, 0.03)
"""Nominal share of the image that a compact defect covers, drawn log-uniformly. Most defects of MVTec AD lie in this range."""

SCAR_LENGTH_RANGE, SCAR_WIDTH_RANGE = (0.05, 0.30), (0.005, 0.018)
"""Length and width of a scar as a share of the shorter image side, drawn log-uniformly."""

CONTRAST_RANGE = (14.0, 110.0)
"""Change of brightness or colour of a stain, scar or shift, on a scale of 0 to 255, drawn log-uniformly."""

ON_OBJECT = 0.9
"""Share of defects that are centred on the object, on images whose object differs from the background."""

CUT_TO_OBJECT = 0.7
"""Share of the defects on the object that end at its edge; the others extend over the edge."""

_ATTEMPTS = 12
_GREY_CHROMA = 10.0  # a picture with a smaller mean spread of its channels (0 to 255) counts as grey
_MIN_DISTANCE_PX = 8  # between two defects that share a copy


class SegmentedImage(NamedTuple):
    """A normal image and its object.

    Attributes:
        pixels: (H, W, 3) uint8.
        foreground: (H, W) bool, pixels of the object, see `find_foreground`.
    """

    pixels: NDArray[np.uint8]
    foreground: NDArray[np.bool_]


def segment_images(images: NDArray[np.uint8]) -> list[SegmentedImage]:
    """Finds the object in each of the images (N, H, W, 3) uint8."""
    return [SegmentedImage(image, find_foreground(image)) for image in images]


def make_defective_copies(
    images: NDArray[np.uint8], seed: int, per_image: int = 1
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[str]]:
    """Makes defective copies of every image. For a validation set, add normal images as the good part.

    Args:
        images: (N, H, W, 3) uint8 normal images.
        seed, per_image: as in `draw_defective_copies`.

    Returns: copies (N * per_image, H, W, 3) uint8 in the order of the images; their masks (N * per_image, H, W), never empty;
        the kind of each defect.
    """
    pictures = segment_images(images)
    parts = [draw_defective_copies(pictures, number, seed, per_image) for number in range(len(images))]
    copies, masks, kinds = zip(*parts, strict=True)
    return np.concatenate(copies), np.concatenate(masks), list(itertools.chain(*kinds))


def draw_defective_copies(
    pictures: Sequence[SegmentedImage], number: int, seed: int, per_image: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[str]]:
    """Makes copies of one image, each with one defect. The kinds of defects take turns, so that all are equally frequent.

    Each copy takes patches from another image, drawn at random. A copy depends only on the pictures, its number and the seed.

    The kinds:
        cut_paste: a patch from another location, rotated, scaled, with a soft edge.
        scar: a long thin bent mark, filled with a patch from another location or with another brightness.
        blob: a stain of irregular shape with another colour.
        texture: added grain, a blur or a sharpening.
        colour: a shift of hue or gain that keeps the texture.
        missing: a removed piece of the object, filled with its surroundings or with the background.

    Args:
        pictures: N normal images of the category, with sides of at least 32 px.
        number: number of the image to copy.
        seed: 0 or more.
        per_image: number of copies.

    Returns: copies (per_image, H, W, 3) uint8; masks (per_image, H, W) of the pixels that changed by more than `VISIBLE_CHANGE`
        in any channel; the kind of each defect. Gaps of up to two pixels in a mask are closed, and no mask is empty. If a kind is
        not visible on the image, such as a patch on a uniform picture, the next kind is drawn.
    """
    copies, masks, kinds = [], [], []
    for index in range(number * per_image, (number + 1) * per_image):
        rng = np.random.default_rng([seed, index])
        donor = int(rng.integers(len(pictures) - 1)) if len(pictures) > 1 else 0
        donor += int(len(pictures) > 1 and donor >= number)
        # all kinds, beginning with the one whose turn it is; a blob is visible on any image
        turns = [KINDS[(index + attempt) % len(KINDS)] for attempt in range(len(KINDS))]
        attempts = ((kind, _draw_defect(pictures[number], pictures[donor], rng, kind)) for kind in [*turns, "blob"])
        kind, defect = next((kind, defect) for kind, defect in attempts if defect is not None)
        copies.append(defect[0])
        masks.append(defect[1])
        kinds.append(kind)
    return np.stack(copies), np.stack(masks), kinds


def merge_defective_copies(
    image: NDArray[np.uint8], copies: NDArray[np.uint8], masks: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Merges copies of an image with one defect each into fewer copies with several defects.

    Defects share a copy if they are more than `_MIN_DISTANCE_PX` pixels apart.

    Args:
        image: (H, W, 3) uint8.
        copies: (N, H, W, 3) uint8.
        masks: (N, H, W), mask of the defect of each copy.

    Returns: merged copies (M, H, W, 3) uint8 and the masks (M, H, W) of all their defects, 1 <= M <= N.
    """
    merged: list[NDArray[np.uint8]] = []
    merged_masks: list[NDArray[np.bool_]] = []
    occupied: list[NDArray[np.bool_]] = []  # pixels of each merged copy that are too close to one of its defects
    for copy, mask in zip(copies, masks, strict=True):
        changed = (copy != image).any(axis=2)
        index = next((index for index, area in enumerate(occupied) if not (area & changed).any()), len(merged))
        if index == len(merged):
            merged.append(image)
            merged_masks.append(np.zeros_like(mask))
            occupied.append(np.zeros_like(mask))
        merged[index] = np.where(changed[:, :, None], copy, merged[index])
        merged_masks[index] = merged_masks[index] | mask
        occupied[index] = occupied[index] | ndimage.maximum_filter(changed, 2 * _MIN_DISTANCE_PX + 1)
    return np.stack(merged), np.stack(merged_masks)


def find_foreground(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Finds the pixels of the object: those whose colour differs from the colour of the picture's border.

    The median colour of the border stands for the background. Otsu's threshold splits the colour distances. The split is
    accepted if most of the border is background, if the object covers 2 to 90 % of the picture, and if the two classes
    are clearly separate. Otherwise, for instance on textures, all pixels count as object.

    Args:
        image: (H, W, 3) uint8.

    Returns: (H, W) bool, never all False.
    """
    height, width = image.shape[:2]
    step = max(1, min(height, width) // 128)
    small = ndimage.uniform_filter(image[::step, ::step].astype(np.float32), (3, 3, 0))
    border = np.ones(small.shape[:2], bool)
    border[3:-3, 3:-3] = False
    distance = np.abs(small - np.median(small[border], axis=0)).max(axis=2)
    object_ = distance > _compute_otsu_threshold(distance)
    share = object_.mean()
    separation = distance[object_].mean() - distance[~object_].mean() if 0 < share < 1 else 0.0
    if (
        object_[border].mean() > 0.3
        or not 0.02 <= share <= 0.9
        or separation < max(20.0, 4.0 * float(distance[border].std()))
    ):
        return np.ones((height, width), bool)
    object_ = ndimage.binary_fill_holes(ndimage.binary_opening(ndimage.binary_closing(object_, iterations=2)))
    if not object_.any():
        return np.ones((height, width), bool)
    upsampled = np.repeat(np.repeat(object_, step, axis=0), step, axis=1)[:height, :width]
    return np.asarray(
        np.pad(upsampled, ((0, height - upsampled.shape[0]), (0, width - upsampled.shape[1])), mode="edge")
    )


def _draw_defect(
    picture: SegmentedImage, source: SegmentedImage, rng: np.random.Generator, kind: str
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
    """Draws one defect of a kind, and tries again with larger sizes while the change is not visible.

    The drawing happens in a window around the defect, so the cost does not grow with the size of the picture.

    Args:
        picture: the image to change.
        source: the image that patches come from.

    Returns: the changed image (H, W, 3) and the mask (H, W); None if no attempt was visible.
    """
    image, foreground = picture
    height, width = image.shape[:2]
    smallest = max(AREA_RANGE[0], 24 / (height * width))
    for attempt in range(_ATTEMPTS):
        if kind == "scar":
            radius = 0.5 * min(height, width) * _draw_log_uniform(rng, SCAR_LENGTH_RANGE)
        else:
            area = _draw_log_uniform(rng, (min(smallest * 1.4**attempt, AREA_RANGE[1]), AREA_RANGE[1]))
            radius = float(np.sqrt(height * width * area / np.pi))
        y, x = _draw_position(foreground, rng, 1.0 if kind == "missing" else ON_OBJECT)
        reach = int(1.8 * radius) + 4
        top, bottom = max(0, y - reach), min(height, y + reach + 1)
        left, right = max(0, x - reach), min(width, x + reach + 1)
        window = slice(top, bottom), slice(left, right)
        patch, window_foreground = image[window].astype(np.float32), foreground[window]
        filling, cover = _KINDS[kind](_DefectWindow(patch, (y - top, x - left), radius, picture, source, rng))
        if window_foreground[y - top, x - left] and rng.random() < CUT_TO_OBJECT:
            cover = cover * ndimage.uniform_filter(window_foreground.astype(np.float32), 3)
        changed_window = np.clip(np.round(patch + cover[..., None] * (filling - patch)), 0, 255).astype(np.uint8)
        mask = _find_visible_change(image[window], changed_window)
        if mask.sum() >= max(6, 1e-4 * height * width):
            changed_image, image_mask = image.copy(), np.zeros((height, width), bool)
            changed_image[window], image_mask[window] = changed_window, mask
            return changed_image, image_mask
    return None


class _DefectWindow:
    """The window in which a defect is drawn, and everything that the drawing functions use.

    Coordinates are relative to the centre of the defect. Masks of a shape are (h, w) in [0, 1].
    """

    def __init__(
        self,
        patch: Patch,
        centre: tuple[int, int],
        radius: float,
        picture: SegmentedImage,
        source: SegmentedImage,
        rng: np.random.Generator,
    ) -> None:
        self.patch, self.radius, self.picture, self.source, self.rng = patch, radius, picture, source, rng
        height, width = patch.shape[:2]
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        self.dy, self.dx = y - centre[0], x - centre[1]
        # coloured defects on grey parts are rare, and too easy to detect
        self.is_grey = float(np.ptp(patch, axis=2).mean()) < _GREY_CHROMA

    def draw_blob_mask(self, softness_px: tuple[float, float], roughness: float = 0.35) -> Patch:
        """Draws the mask of an irregular disc of about `radius`, with an edge of `softness_px` width."""
        stretch, angle = np.sqrt(_draw_log_uniform(self.rng, (0.4, 2.5))), self.rng.uniform(0, np.pi)
        u = (self.dx * np.cos(angle) + self.dy * np.sin(angle)) / stretch
        v = (self.dy * np.cos(angle) - self.dx * np.sin(angle)) * stretch
        noise = ndimage.gaussian_filter(self.rng.normal(size=self.dx.shape), max(0.8, 0.3 * self.radius))
        noise /= noise.std() + 1e-9
        inside = 1 - np.hypot(u, v) / self.radius + roughness * self.rng.uniform(0.3, 1) * noise
        # The disc must not reach the edge of the window, where it would be cut straight.
        inside = np.minimum(inside, 1.5 - np.hypot(self.dx, self.dy) / self.radius)
        return _compute_smooth_step(inside * self.radius, self.rng.uniform(*softness_px))

    def draw_rectangle_mask(self, softness_px: tuple[float, float]) -> Patch:
        """Draws the mask of a rotated rectangle, with an edge of `softness_px` width."""
        aspect, angle = np.sqrt(_draw_log_uniform(self.rng, (0.3, 3.3))), self.rng.uniform(0, np.pi)
        u = np.abs(self.dx * np.cos(angle) + self.dy * np.sin(angle)) - 0.85 * self.radius * aspect
        v = np.abs(self.dy * np.cos(angle) - self.dx * np.sin(angle)) - 0.85 * self.radius / aspect
        return _compute_smooth_step(-np.maximum(u, v), self.rng.uniform(*softness_px))

    def draw_bar_mask(self) -> Patch:
        """Draws the mask of a long thin bent shape that becomes thinner towards its ends."""
        angle, bend = self.rng.uniform(0, np.pi), self.rng.uniform(-0.35, 0.35)
        half_width = 0.5 * min(self.picture.foreground.shape) * _draw_log_uniform(self.rng, SCAR_WIDTH_RANGE)
        u = (self.dx * np.cos(angle) + self.dy * np.sin(angle)) / self.radius
        v = self.dy * np.cos(angle) - self.dx * np.sin(angle) + bend * self.radius * (u**2 - 0.4)
        width_noise = ndimage.gaussian_filter1d(self.rng.normal(size=64), 3.0) * 1.5
        local_half_width = half_width * (
            np.sqrt(np.clip(1 - u**2, 0, 1)) + np.interp(u, np.linspace(-1, 1, 64), width_noise) * 0.4
        )
        edge = _compute_smooth_step(local_half_width - np.abs(v), self.rng.uniform(1.0, 1.6))
        return np.where(np.abs(u) < 1, edge, 0).astype(np.float32)

    def copy_patch_from_elsewhere(self) -> Patch:
        """Returns a patch (h, w, 3) of the source from another location, rotated and scaled by 0.7 to 1.4."""
        y, x = _draw_position(self.source.foreground, self.rng, ON_OBJECT)
        angle, scale = self.rng.uniform(-np.pi, np.pi), _draw_log_uniform(self.rng, (0.7, 1.4))
        at_y = y + (self.dy * np.cos(angle) - self.dx * np.sin(angle)) / scale
        at_x = x + (self.dx * np.cos(angle) + self.dy * np.sin(angle)) / scale
        channels = [
            ndimage.map_coordinates(channel, (at_y, at_x), np.float32, order=1, mode="mirror")
            for channel in np.moveaxis(self.source.pixels, 2, 0)
        ]
        return np.stack(channels, axis=2)

    def compute_local_colour(self, cover: Patch) -> Patch:
        """Returns the mean colour (3,) under a mask."""
        weight = cover[..., None] + np.float32(1e-6)
        return np.asarray((self.patch * weight).sum(axis=(0, 1)) / weight.sum(axis=(0, 1)), np.float32)

    def draw_colour_change(self, cover: Patch) -> Patch:
        """Draws a change of colour (3,), grey or tinted. Its sign is inverted if the new colour would leave 0 to 255."""
        contrast = _draw_log_uniform(self.rng, CONTRAST_RANGE)
        tint = self.rng.uniform(-1, 1, size=3) * (self.rng.random() < (0.12 if self.is_grey else 0.5))
        change = self.rng.choice([-1.0, 1.0]) + tint
        change *= contrast / np.abs(change).max()
        colour = self.compute_local_colour(cover)
        loss = [np.abs(np.clip(colour + sign * change, 0, 255) - colour - sign * change).max() for sign in (1, -1)]
        return np.asarray(change if loss[0] <= loss[1] else -change, np.float32)


# Each function below draws one kind of defect. It returns the new pixels (h, w, 3) and the mask (h, w) that blends them in.


def _draw_cut_paste(window: _DefectWindow) -> tuple[Patch, Patch]:
    filling = window.copy_patch_from_elsewhere() * np.float32(window.rng.uniform(0.85, 1.15))
    return filling, window.draw_rectangle_mask((0.8, 3.0)) if window.rng.random() < 0.5 else window.draw_blob_mask(
        (0.8, 3.0)
    )


def _draw_scar(window: _DefectWindow) -> tuple[Patch, Patch]:
    cover = window.draw_bar_mask()
    if window.rng.random() < 0.35:
        return window.copy_patch_from_elsewhere(), cover
    return window.patch + window.draw_colour_change(cover), cover


def _draw_blob(window: _DefectWindow) -> tuple[Patch, Patch]:
    cover = window.draw_blob_mask((1.5, 6.0))
    colour = window.compute_local_colour(cover) + window.draw_colour_change(cover)
    opaque = np.float32(window.rng.uniform(0.0, 0.9))  # share of the texture below that the stain hides
    return (1 - opaque) * (window.patch + colour - window.compute_local_colour(cover)) + opaque * colour, cover


def _draw_texture(window: _DefectWindow) -> tuple[Patch, Patch]:
    cover = window.draw_blob_mask((1.0, 4.0))
    variant = window.rng.integers(3)
    if variant == 0:
        is_monochrome = window.rng.random() < 0.5
        grain = window.rng.normal(size=(*window.dx.shape, 1 if is_monochrome else 3))
        grain = ndimage.gaussian_filter(grain, (*[window.rng.uniform(0.4, 1.4)] * 2, 0))
        grain *= _draw_log_uniform(window.rng, (8.0, 45.0)) / (grain.std() + 1e-9)
        return (window.patch + grain).astype(np.float32), cover
    soft = ndimage.gaussian_filter(window.patch, (*[window.rng.uniform(1.2, 4.0)] * 2, 0))
    return (
        soft if variant == 1 else window.patch + np.float32(window.rng.uniform(1.0, 4.0)) * (window.patch - soft)
    ), cover


def _draw_colour_shift(window: _DefectWindow) -> tuple[Patch, Patch]:
    cover = window.draw_blob_mask((2.0, 10.0), roughness=0.2)
    if window.rng.random() < (0.7 if window.is_grey else 0.4):
        gain = 1 + window.rng.choice([-1, 1]) * _draw_log_uniform(window.rng, (0.10, 0.45))
        return window.patch * np.float32(gain), cover
    shift = window.rng.normal(size=3)
    shift -= shift.mean()
    shift *= _draw_log_uniform(window.rng, CONTRAST_RANGE) * (0.3 if window.is_grey else 0.6) / np.abs(shift).max()
    return window.patch + shift.astype(np.float32), cover


def _draw_missing_piece(window: _DefectWindow) -> tuple[Patch, Patch]:
    cover = window.draw_blob_mask((0.8, 2.5))
    outside = (1 - ndimage.grey_dilation(cover, size=(5, 5)))[..., None]
    image, foreground = window.picture
    if window.rng.random() < 0.5 and not foreground.all():
        # fill with the background: its texture from another location of the picture
        background_pixels = np.argwhere(~foreground)
        y, x = background_pixels[window.rng.integers(len(background_pixels))]
        rows = np.clip(np.round(y + window.dy).astype(int), 0, image.shape[0] - 1)
        columns = np.clip(np.round(x + window.dx).astype(int), 0, image.shape[1] - 1)
        filling = image[rows, columns].astype(np.float32)
        filling[foreground[rows, columns]] = np.median(image[~foreground], axis=0)
        return filling, cover
    sigma = (max(1.5, 0.5 * window.radius),) * 2 + (0,)
    weight = ndimage.gaussian_filter(outside, sigma) + 1e-4
    filling = (ndimage.gaussian_filter(window.patch * outside, sigma) + 1e-4 * window.patch.mean(axis=(0, 1))) / weight
    grain = (window.patch - ndimage.gaussian_filter(window.patch, (1, 1, 0))).std()
    return (filling + window.rng.normal(0, 0.5 * grain, size=filling.shape)).astype(np.float32), cover


_KINDS: dict[str, Callable[[_DefectWindow], tuple[Patch, Patch]]] = {
    "cut_paste": _draw_cut_paste,
    "scar": _draw_scar,
    "blob": _draw_blob,
    "texture": _draw_texture,
    "colour": _draw_colour_shift,
    "missing": _draw_missing_piece,
}

KINDS: tuple[str, ...] = tuple(_KINDS)
"""The kinds of defects that `draw_defective_copies` draws."""


def _find_visible_change(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Returns the mask (H, W) of visibly changed pixels, with gaps of up to two pixels closed."""
    differ = np.abs(before.astype(np.int16) - after.astype(np.int16)).max(axis=2)
    disc = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), 2)
    closed = ndimage.binary_closing(np.pad(differ > VISIBLE_CHANGE, 2), structure=disc)[2:-2, 2:-2]
    return np.asarray(closed & (differ > 0))


def _draw_position(foreground: NDArray[np.bool_], rng: np.random.Generator, on_object: float) -> tuple[int, int]:
    """Draws row and column of a pixel: of the object with probability `on_object`, otherwise of the whole picture."""
    height, width = foreground.shape
    if rng.random() < on_object:
        inside = np.flatnonzero(foreground)
        y, x = divmod(int(inside[rng.integers(inside.size)]), width)
        return y, x
    return int(rng.integers(height)), int(rng.integers(width))


def _compute_smooth_step(distance_px: NDArray[Any], softness_px: float) -> Patch:
    """Maps signed distances to the edge of a shape (positive inside) to mask values in [0, 1] with a smooth step."""
    t = np.clip(distance_px / softness_px + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _compute_otsu_threshold(values: NDArray[np.float32]) -> float:
    """Returns the threshold that splits the values into two classes with the largest variance between them (Otsu, 1979)."""
    counts, edges = np.histogram(values, bins=128)
    middles = 0.5 * (edges[1:] + edges[:-1])
    below, total = np.cumsum(counts), np.cumsum(counts * middles)
    above = below[-1] - below
    difference_of_means = total / np.maximum(below, 1) - (total[-1] - total) / np.maximum(above, 1)
    variance_between = below * above * difference_of_means**2  # 0 if a class is empty
    return float(edges[int(np.argmax(variance_between)) + 1])


def _draw_log_uniform(rng: np.random.Generator, bounds: Sequence[float]) -> float:
    """Draws a number between two bounds, uniform on a logarithmic scale."""
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))
