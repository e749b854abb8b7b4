"""Synthetic defects on normal images: a validation set without labels, to rank configurations by.

Cut-and-paste patches and scars follow CutPaste (arXiv 2104.04015), noise-shaped stains DRAEM (arXiv 2108.07610);
ranges and the other kinds are ours, set so that sizes and contrasts run from plain to barely visible. Real defects
differ: such a set ranks configurations of one category, and its figures are never reported as the detection rate of
real defects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from focus_ray.errors import DataError

Patch = NDArray[np.float32]  # (h, w, 3), 0 to 255

VISIBLE_CHANGE = 8
"""Of 255, in any channel: a pixel that changed by more belongs to the mask."""

AREA_RANGE = (0.0006, 0.03)
"""Nominal share of the image that a compact defect covers, drawn log-uniformly; MVTec AD's lie mostly in it."""

SCAR_LENGTH_RANGE, SCAR_WIDTH_RANGE = (0.05, 0.30), (0.005, 0.018)
"""Of the shorter image side, drawn log-uniformly."""

CONTRAST_RANGE = (14.0, 110.0)
"""Change of brightness or colour of a stain, scar or shift, of 255, drawn log-uniformly."""

ON_OBJECT = 0.9
"""Share of defects centred on the object, where one can be told from its background."""

CUT_TO_OBJECT = 0.7
"""Share of those that end where the object ends; the others spill over its edge."""

_ATTEMPTS = 12
_GREY_CHROMA = 10.0  # of 255: below this mean spread of the channels a picture counts as grey
_MIN_SIDE_PX = 32
_APART_PX = 8  # defects that share a copy


def synthesize_defect(
    image: NDArray[np.uint8],
    rng: np.random.Generator,
    kind: str | None = None,
    donor: NDArray[np.uint8] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One defect on a copy of a normal image.

    Args:
        image: (H, W, 3) uint8, sides of at least 32.
        kind: one of `KINDS`, or None to draw one.
            cut_paste: a patch from elsewhere, turned, scaled, with a feathered edge.
            scar: a long thin bent mark, filled from elsewhere or with another brightness.
            blob: a stain of uneven shape with another colour.
            texture: added grain, a blur or a sharpening.
            colour: a shift of hue or gain that keeps the texture.
            missing: a piece of the object gone, filled with what surrounds it or with the background.
        donor: (H', W', 3) uint8, another normal image of the category to take patches from; None takes the image.

    Returns: (H, W, 3) uint8 and the (H, W) mask of pixels that changed by more than `VISIBLE_CHANGE` in any channel,
        gaps of up to two pixels between them closed. Pixels outside may have changed by less. Never empty.

    Raises: DataError: the input does not fit, or a kind was asked for that cannot be seen on this image (a patch of a
        uniform picture for instance).
    """
    _check_image(image, "image")
    if donor is not None:
        _check_image(donor, "donor")
    if kind is not None and kind not in _KINDS:
        raise DataError(f"kind={kind!r}; expected one of {KINDS}")
    places = find_foreground(image)
    source = image if donor is None else donor
    source_places = places if donor is None else find_foreground(donor)
    order = [kind] if kind else [KINDS[index] for index in rng.permutation(len(KINDS))]
    for name in [*order, *([] if kind else ["blob"])]:
        made = _attempt(image, places, source, source_places, rng, name)
        if made is not None:
            return made
    raise DataError(
        f"no visible defect of kind {kind!r} in {_ATTEMPTS} attempts on this image; use kind='blob' or kind=None"
    )


def synthetic_validation_set(
    images: NDArray[np.uint8],
    seed: int,
    per_image: int = 1,
    only: range | None = None,
    foregrounds: dict[int, NDArray[np.bool_]] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], list[str]]:
    """Defects on every image: kinds in turn, so that they are balanced, and donors drawn from the other images.

    Score them together with the images themselves, or with other normal ones, as the good part of the set.

    Args:
        images: (N, H, W, 3) uint8 normal images.  seed: 0 or more.  per_image: defective copies of each, 1 or more.
        only: of all images, whose copies are made, each as it would be with all; None makes all.
        foregrounds: image's number -> where the object is, kept from one call to the next.

    Returns: (N per_image, H, W, 3) uint8 in the order of the images, (N per_image, H, W) masks, none empty, and the
        kind of each. A kind that cannot be seen on an image gives way to the next one.

    Raises: DataError: the input does not fit.
    """
    if images.ndim != 4 or not len(images):
        raise DataError(f"images has shape {images.shape}; expected (N, H, W, 3) with N of at least 1")
    if per_image < 1 or seed < 0:
        raise DataError(f"per_image={per_image}, seed={seed}; expected at least 1 and at least 0")
    _check_image(images[0], "images[0]")
    wanted = range(len(images)) if only is None else only
    places = {} if foregrounds is None else foregrounds

    def place_of(number: int) -> NDArray[np.bool_]:
        if number not in places:
            places[number] = find_foreground(images[number])
        return places[number]

    num = len(wanted) * per_image
    made_images, masks = np.empty((num, *images.shape[1:]), np.uint8), np.empty((num, *images.shape[1:3]), bool)
    kinds: list[str] = []
    for row, index in enumerate(at * per_image + copy for at in wanted for copy in range(per_image)):
        rng = np.random.default_rng([seed, index])
        at = index // per_image
        other = int(rng.integers(len(images) - 1)) if len(images) > 1 else 0
        other += int(len(images) > 1 and other >= at)
        for turn in range(len(KINDS) + 1):
            kind = KINDS[(index + turn) % len(KINDS)] if turn < len(KINDS) else "blob"
            made = _attempt(images[at], place_of(at), images[other], place_of(other), rng, kind)
            if made is not None:
                made_images[row], masks[row] = made
                kinds.append(kind)
                break
        else:
            raise AssertionError("a blob is visible on any image")
    return made_images, masks, kinds


def overlaid(
    image: NDArray[np.uint8], copies: NDArray[np.uint8], masks: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Copies of one image with a defect each, as fewer copies with several: those that lie apart share one.

    Args:
        image: (H, W, 3) uint8.  copies: (N, H, W, 3) uint8, masks: (N, H, W), of that image.

    Returns: (M, H, W, 3) uint8 and the masks (M, H, W) of their defects together, 1 <= M <= N.
    """
    made: list[NDArray[np.uint8]] = []
    together: list[NDArray[np.bool_]] = []
    taken: list[NDArray[np.bool_]] = []
    for copy, mask in zip(copies, masks, strict=True):
        changed = (copy != image).any(axis=2)
        place = next((place for place, other in enumerate(taken) if not (other & changed).any()), len(made))
        if place == len(made):
            made.append(copy)
            together.append(mask)
            taken.append(_grown(changed))
        else:
            made[place] = np.where(changed[:, :, None], copy, made[place])
            together[place] = together[place] | mask
            taken[place] = taken[place] | _grown(changed)
    return np.stack(made), np.stack(together)


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.asarray(ndimage.maximum_filter(mask, 2 * _APART_PX + 1))


def find_foreground(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where the object is, by a rule that needs no labels: what differs in colour from the picture's border.

    The border's median colour stands for the background. A split of the colour distances (Otsu's) is believed if it
    leaves most of the border in the background, takes 2 to 90 % of the picture and separates clearly; otherwise, on
    textures for instance, all of the picture counts.

    Args:
        image: (H, W, 3) uint8.

    Returns: (H, W) bool, never all False.
    """
    height, width = image.shape[:2]
    step = max(1, min(height, width) // 128)
    small = ndimage.uniform_filter(image[::step, ::step].astype(np.float32), (3, 3, 0))
    ring = np.ones(small.shape[:2], bool)
    ring[3:-3, 3:-3] = False
    distance = np.abs(small - np.median(small[ring], axis=0)).max(axis=2)
    object_ = distance > _otsu(distance)
    share = object_.mean()
    apart = distance[object_].mean() - distance[~object_].mean() if 0 < share < 1 else 0.0
    if object_[ring].mean() > 0.3 or not 0.02 <= share <= 0.9 or apart < max(20.0, 4.0 * float(distance[ring].std())):
        return np.ones((height, width), bool)
    object_ = ndimage.binary_fill_holes(ndimage.binary_opening(ndimage.binary_closing(object_, iterations=2)))
    if not object_.any():
        return np.ones((height, width), bool)
    grown = np.repeat(np.repeat(object_, step, axis=0), step, axis=1)[:height, :width]
    return np.asarray(np.pad(grown, ((0, height - grown.shape[0]), (0, width - grown.shape[1])), mode="edge"))


def _attempt(
    image: NDArray[np.uint8],
    places: NDArray[np.bool_],
    source: NDArray[np.uint8],
    source_places: NDArray[np.bool_],
    rng: np.random.Generator,
    kind: str,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]] | None:
    """Tries until the change can be seen, the smallest sizes falling away with each attempt; None if it never can.

    Works in a window around the defect, so the cost does not grow with the picture.
    """
    height, width = image.shape[:2]
    smallest = max(AREA_RANGE[0], 24 / (height * width))
    for attempt in range(_ATTEMPTS):
        if kind == "scar":
            radius = 0.5 * min(height, width) * _log_uniform(rng, SCAR_LENGTH_RANGE)
        else:
            area = _log_uniform(rng, (min(smallest * 1.4**attempt, AREA_RANGE[1]), AREA_RANGE[1]))
            radius = float(np.sqrt(height * width * area / np.pi))
        y, x = _draw_place(places, rng, 1.0 if kind == "missing" else ON_OBJECT)
        reach = int(1.8 * radius) + 4
        top, bottom = max(0, y - reach), min(height, y + reach + 1)
        left, right = max(0, x - reach), min(width, x + reach + 1)
        patch = image[top:bottom, left:right].astype(np.float32)
        site = _Site(patch, (y - top, x - left), radius, source, source_places, image, places, rng)
        filling, cover = _KINDS[kind](site)
        here = places[top:bottom, left:right]
        if here[y - top, x - left] and rng.random() < CUT_TO_OBJECT:
            cover = cover * ndimage.uniform_filter(here.astype(np.float32), 3)
        changed = np.clip(np.round(patch + cover[..., None] * (filling - patch)), 0, 255).astype(np.uint8)
        mask = _changed(image[top:bottom, left:right], changed)
        if mask.sum() >= max(6, 1e-4 * height * width):
            made, whole = image.copy(), np.zeros((height, width), bool)
            made[top:bottom, left:right], whole[top:bottom, left:right] = changed, mask
            return made, whole
    return None


class _Site:
    """The window a defect is made in, and what it may draw on."""

    def __init__(
        self,
        patch: Patch,
        centre: tuple[int, int],
        radius: float,
        source: NDArray[np.uint8],
        source_places: NDArray[np.bool_],
        image: NDArray[np.uint8],
        places: NDArray[np.bool_],
        rng: np.random.Generator,
    ) -> None:
        self.patch, self.radius, self.rng = patch, radius, rng
        self.source, self.source_places, self.image, self.places = source, source_places, image, places
        height, width = patch.shape[:2]
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        self.dy, self.dx = y - centre[0], x - centre[1]
        self.grey = float(np.ptp(patch, axis=2).mean()) < _GREY_CHROMA  # colours on grey parts are rare, and too easy

    def blob(self, softness_px: tuple[float, float], roughness: float = 0.35) -> Patch:
        """An uneven disc of about the drawn radius. (h, w) in [0, 1], its edge softness_px wide."""
        stretch, angle = np.sqrt(_log_uniform(self.rng, (0.4, 2.5))), self.rng.uniform(0, np.pi)
        u = (self.dx * np.cos(angle) + self.dy * np.sin(angle)) / stretch
        v = (self.dy * np.cos(angle) - self.dx * np.sin(angle)) * stretch
        noise = ndimage.gaussian_filter(self.rng.normal(size=self.dx.shape), max(0.8, 0.3 * self.radius))
        noise /= noise.std() + 1e-9
        inside = 1 - np.hypot(u, v) / self.radius + roughness * self.rng.uniform(0.3, 1) * noise
        # Nothing reaches the window's edge, where it would be cut straight.
        inside = np.minimum(inside, 1.5 - np.hypot(self.dx, self.dy) / self.radius)
        return _ramp(inside * self.radius, self.rng.uniform(*softness_px))

    def rectangle(self, softness_px: tuple[float, float]) -> Patch:
        aspect, angle = np.sqrt(_log_uniform(self.rng, (0.3, 3.3))), self.rng.uniform(0, np.pi)
        u = np.abs(self.dx * np.cos(angle) + self.dy * np.sin(angle)) - 0.85 * self.radius * aspect
        v = np.abs(self.dy * np.cos(angle) - self.dx * np.sin(angle)) - 0.85 * self.radius / aspect
        return _ramp(-np.maximum(u, v), self.rng.uniform(*softness_px))

    def bar(self) -> Patch:
        """A long thin bent shape that tapers to its ends."""
        angle, bend = self.rng.uniform(0, np.pi), self.rng.uniform(-0.35, 0.35)
        half_width = 0.5 * min(self.image.shape[:2]) * _log_uniform(self.rng, SCAR_WIDTH_RANGE)
        u = (self.dx * np.cos(angle) + self.dy * np.sin(angle)) / self.radius
        v = self.dy * np.cos(angle) - self.dx * np.sin(angle) + bend * self.radius * (u**2 - 0.4)
        waver = ndimage.gaussian_filter1d(self.rng.normal(size=64), 3.0) * 1.5
        local = half_width * (np.sqrt(np.clip(1 - u**2, 0, 1)) + np.interp(u, np.linspace(-1, 1, 64), waver) * 0.4)
        return np.where(np.abs(u) < 1, _ramp(local - np.abs(v), self.rng.uniform(1.0, 1.6)), 0).astype(np.float32)

    def elsewhere(self) -> Patch:
        """What the source shows at another place, turned and scaled by 0.7 to 1.4."""
        y, x = _draw_place(self.source_places, self.rng, ON_OBJECT)
        angle, scale = self.rng.uniform(-np.pi, np.pi), _log_uniform(self.rng, (0.7, 1.4))
        at_y = y + (self.dy * np.cos(angle) - self.dx * np.sin(angle)) / scale
        at_x = x + (self.dx * np.cos(angle) + self.dy * np.sin(angle)) / scale
        channels = [
            ndimage.map_coordinates(self.source[..., c], (at_y, at_x), np.float32, order=1, mode="mirror")
            for c in range(3)
        ]
        return np.stack(channels, axis=2)

    def local_colour(self, cover: Patch) -> Patch:
        """(3,) mean under the cover."""
        weight = cover[..., None] + np.float32(1e-6)
        return np.asarray((self.patch * weight).sum(axis=(0, 1)) / weight.sum(axis=(0, 1)), np.float32)

    def other_colour(self, cover: Patch) -> Patch:
        """(3,) a change of colour of a drawn contrast, turned around where it would leave the range. Grey or tinted."""
        contrast = _log_uniform(self.rng, CONTRAST_RANGE)
        tint = self.rng.uniform(-1, 1, size=3) * (self.rng.random() < (0.12 if self.grey else 0.5))
        change = self.rng.choice([-1.0, 1.0]) + tint
        change *= contrast / np.abs(change).max()
        colour = self.local_colour(cover)
        loss = [np.abs(np.clip(colour + sign * change, 0, 255) - colour - sign * change).max() for sign in (1, -1)]
        return np.asarray(change if loss[0] <= loss[1] else -change, np.float32)


def _cut_paste(site: _Site) -> tuple[Patch, Patch]:
    filling = site.elsewhere() * np.float32(site.rng.uniform(0.85, 1.15))
    return filling, site.rectangle((0.8, 3.0)) if site.rng.random() < 0.5 else site.blob((0.8, 3.0))


def _scar(site: _Site) -> tuple[Patch, Patch]:
    cover = site.bar()
    if site.rng.random() < 0.35:
        return site.elsewhere(), cover
    return site.patch + site.other_colour(cover), cover


def _blob(site: _Site) -> tuple[Patch, Patch]:
    cover = site.blob((1.5, 6.0))
    colour = site.local_colour(cover) + site.other_colour(cover)
    opaque = np.float32(site.rng.uniform(0.0, 0.9))  # how much of the texture beneath the stain hides
    return (1 - opaque) * (site.patch + colour - site.local_colour(cover)) + opaque * colour, cover


def _texture(site: _Site) -> tuple[Patch, Patch]:
    cover = site.blob((1.0, 4.0))
    way = site.rng.integers(3)
    if way == 0:
        grain = (
            site.rng.normal(size=site.dx.shape) if site.rng.random() < 0.5 else site.rng.normal(size=site.patch.shape)
        )
        grain = grain if grain.ndim == 3 else grain[..., None]
        grain = ndimage.gaussian_filter(grain, (*[site.rng.uniform(0.4, 1.4)] * 2, 0))
        grain *= _log_uniform(site.rng, (8.0, 45.0)) / (grain.std() + 1e-9)
        return (site.patch + grain).astype(np.float32), cover
    soft = ndimage.gaussian_filter(site.patch, (*[site.rng.uniform(1.2, 4.0)] * 2, 0))
    return (soft if way == 1 else site.patch + np.float32(site.rng.uniform(1.0, 4.0)) * (site.patch - soft)), cover


def _colour(site: _Site) -> tuple[Patch, Patch]:
    cover = site.blob((2.0, 10.0), roughness=0.2)
    if site.rng.random() < (0.7 if site.grey else 0.4):
        gain = 1 + site.rng.choice([-1, 1]) * _log_uniform(site.rng, (0.10, 0.45))
        return site.patch * np.float32(gain), cover
    shift = site.rng.normal(size=3)
    shift -= shift.mean()
    shift *= _log_uniform(site.rng, CONTRAST_RANGE) * (0.3 if site.grey else 0.6) / np.abs(shift).max()
    return site.patch + shift.astype(np.float32), cover


def _missing(site: _Site) -> tuple[Patch, Patch]:
    cover = site.blob((0.8, 2.5))
    outside = (1 - ndimage.grey_dilation(cover, size=(5, 5)))[..., None]
    if site.rng.random() < 0.5 and not site.places.all():
        # The background: its texture from elsewhere in the picture.
        bare = np.argwhere(~site.places)
        y, x = bare[site.rng.integers(len(bare))]
        rows = np.clip(np.round(y + site.dy).astype(int), 0, site.image.shape[0] - 1)
        columns = np.clip(np.round(x + site.dx).astype(int), 0, site.image.shape[1] - 1)
        here = site.places[rows, columns]
        filling = site.image[rows, columns].astype(np.float32)
        if here.any():
            filling[here] = np.median(site.image[~site.places], axis=0)
        return filling, cover
    sigma = (max(1.5, 0.5 * site.radius),) * 2 + (0,)
    weight = ndimage.gaussian_filter(outside, sigma) + 1e-4
    filling = (ndimage.gaussian_filter(site.patch * outside, sigma) + 1e-4 * site.patch.mean(axis=(0, 1))) / weight
    grain = (site.patch - ndimage.gaussian_filter(site.patch, (1, 1, 0))).std()
    return (filling + site.rng.normal(0, 0.5 * grain, size=filling.shape)).astype(np.float32), cover


_KINDS: dict[str, Callable[[_Site], tuple[Patch, Patch]]] = {
    "cut_paste": _cut_paste,
    "scar": _scar,
    "blob": _blob,
    "texture": _texture,
    "colour": _colour,
    "missing": _missing,
}

KINDS: tuple[str, ...] = tuple(_KINDS)
"""What `synthesize_defect` can make."""


def _changed(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.bool_]:
    differ = np.abs(before.astype(np.int16) - after.astype(np.int16)).max(axis=2)
    disc = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), 2)
    closed = ndimage.binary_closing(np.pad(differ > VISIBLE_CHANGE, 2), structure=disc)[2:-2, 2:-2]
    return np.asarray(closed & (differ > 0))


def _draw_place(places: NDArray[np.bool_], rng: np.random.Generator, on_object: float) -> tuple[int, int]:
    height, width = places.shape
    if rng.random() < on_object:
        inside = np.flatnonzero(places)
        y, x = divmod(int(inside[rng.integers(inside.size)]), width)
        return y, x
    return int(rng.integers(height)), int(rng.integers(width))


def _ramp(distance_px: NDArray[Any], softness_px: float) -> Patch:
    t = np.clip(distance_px / softness_px + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), np.float32)


def _otsu(values: NDArray[np.float32]) -> float:
    """The threshold that parts the values into two classes of the largest variance between (Otsu, 1979)."""
    counts, edges = np.histogram(values, bins=128)
    middles = 0.5 * (edges[1:] + edges[:-1])
    below, total = np.cumsum(counts), np.cumsum(counts * middles)
    above = below[-1] - below
    safe = (below > 0) & (above > 0)
    between = np.where(
        safe, below * above * (total / np.maximum(below, 1) - (total[-1] - total) / np.maximum(above, 1)) ** 2, 0
    )
    return float(edges[int(np.argmax(between)) + 1])


def _log_uniform(rng: np.random.Generator, bounds: Sequence[float]) -> float:
    return float(np.exp(rng.uniform(np.log(bounds[0]), np.log(bounds[1]))))


def _check_image(image: Any, name: str) -> None:
    shape, dtype = getattr(image, "shape", None), getattr(image, "dtype", None)
    if dtype != np.uint8 or shape is None or len(shape) != 3 or shape[2] != 3:
        raise DataError(f"{name} is {dtype} of shape {shape}; expected uint8 of (H, W, 3)")
    if min(shape[:2]) < _MIN_SIDE_PX:
        raise DataError(f"{name} has {shape[0]}x{shape[1]} pixels; expected sides of at least {_MIN_SIDE_PX}")
