"""An offline sample data set, drawn from nothing: two categories of parts with defects and exact masks.

`gear` lies at any angle on a mat, as parts on a belt do; `board` comes out of a fixture nearly upright. Light,
exposure, position, surface and solder differ from image to image. A defective part is drawn twice from the same
numbers, with and without its defect, and the mask is where the two pictures differ. Good for a first run,
demonstrations and tests; figures measured on it say nothing about real parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from focus_ray.errors import DataError

Field = NDArray[Any]  # (S, S) or (S, S, 3), float32
Points = list[tuple[float, float]]

MASK_DIFFERENCE = 10  # of 255, in any channel: what counts as changed; sensor noise is equal in both pictures
_SUPERSAMPLING = 2  # _sensor averages blocks of 2 by 2


def write_samples(
    root: Path,
    seed: int = 0,
    size_px: int = 256,
    num_train: int = 48,
    num_test_good: int = 16,
    num_bad_per_type: int = 6,
) -> None:
    """Writes `root/<category>/{train/good,test/good,test/<type>,ground_truth/<type>}` in MVTec AD's layout, as PNG.

    The same arguments write the same pictures (given the same numpy and Pillow), and picture i of a kind does not
    depend on how many are asked for. Masks are 0 or 255 and named `<picture>_mask.png`.

    Args:
        seed: 0 or more.  size_px: height and width, at least 64.

    Raises: DataError: seed, size_px or a count is too small, or the folder of a category exists and is not empty.
    """
    if size_px < 64:
        raise DataError(f"size_px={size_px}; expected at least 64: smaller parts have no visible defects")
    for name, count in (
        ("seed", seed),
        ("num_train", num_train),
        ("num_test_good", num_test_good),
        ("num_bad_per_type", num_bad_per_type),
    ):
        if count < 0:
            raise DataError(f"{name}={count}; expected 0 or more")
    root = Path(root)
    for category in CATEGORIES:
        folder = root / category
        if folder.exists() and any(folder.iterdir()):
            raise DataError(f"{folder} exists and is not empty; remove it or choose another root")
    for category, (_, types) in CATEGORIES.items():
        folder = root / category
        for index in range(num_train):
            _save(
                draw_sample(category, seed, "train", index, size_px)[0], folder / "train" / "good" / f"{index:03d}.png"
            )
        for index in range(num_test_good):
            _save(draw_sample(category, seed, "good", index, size_px)[0], folder / "test" / "good" / f"{index:03d}.png")
        for defect_type in types:
            for index in range(num_bad_per_type):
                image, mask = draw_sample(category, seed, defect_type, index, size_px)
                _save(image, folder / "test" / defect_type / f"{index:03d}.png")
                _save(mask.astype(np.uint8) * 255, folder / "ground_truth" / defect_type / f"{index:03d}_mask.png")


def draw_sample(
    category: str, seed: int, kind: str, index: int, size_px: int = 256
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One picture. kind: "train", "good" (of the test set) or a defect type of the category in `CATEGORIES`.

    Returns: (size_px, size_px, 3) uint8 and its (size_px, size_px) mask, empty unless kind is a defect type.

    Raises: DataError: the category or kind is unknown.
    """
    if category not in CATEGORIES:
        raise DataError(f"category={category!r}; expected one of {sorted(CATEGORIES)}")
    draw, types = CATEGORIES[category]
    kinds = ("train", "good", *types)
    if kind not in kinds:
        raise DataError(f"kind={kind!r}; expected one of {kinds}")
    stream = [seed, sorted(CATEGORIES).index(category), kinds.index(kind), index]
    if kind not in types:
        return _develop(draw(np.random.default_rng(stream), size_px, None, 0)), np.zeros((size_px, size_px), bool)
    for attempt in range(20):  # a defect may fall where it cannot be seen, a scratch into a hole for instance
        clean = _develop(draw(np.random.default_rng(stream), size_px, None, attempt))
        bad = _develop(draw(np.random.default_rng(stream), size_px, kind, attempt))
        mask = _changed(clean, bad)
        if mask.sum() >= 2e-4 * size_px**2:
            return bad, mask
    raise AssertionError(f"{category}/{kind}/{index}: no visible defect in 20 attempts")


# ---------------------------------------------------------------------------------------------------------------- gear

_TEETH = 20
_BOLTS = 5
_ROOT, _DEPTH = 0.352, 0.062  # radii in image widths
_BOLT_CIRCLE, _BOLT_RADIUS = 0.205, 0.031


def _draw_gear(rng: np.random.Generator, size_px: int, defect: str | None, attempt: int) -> Field:
    """A turned steel gear: toothed rim, recessed web with bolt holes, hub with bore and keyway. (S, S, 3) in [0, 1]."""
    size = size_px * _SUPERSAMPLING
    trouble = np.random.default_rng([int(rng.integers(2**31)), attempt])  # the defect draws from its own numbers
    angle = rng.uniform(0, 2 * np.pi)
    centre = 0.5 + rng.uniform(-0.03, 0.03, size=2)
    zoom = rng.uniform(0.985, 1.015)
    azimuth, elevation = math.radians(rng.uniform(-150, -90)), math.radians(rng.uniform(48, 60))
    exposure = rng.uniform(0.9, 1.12)

    y, x = np.mgrid[0:size, 0:size].astype(np.float32)
    dx = ((x + 0.5) / size - np.float32(centre[0])) / np.float32(zoom)
    dy = ((y + 0.5) / size - np.float32(centre[1])) / np.float32(zoom)
    radius = np.hypot(dx, dy) + np.float32(1e-6)
    cos_phi, sin_phi = dx / radius, dy / radius
    turned = np.mod(np.arctan2(dy, dx) - np.float32(angle), np.float32(2 * np.pi))  # angle in the gear's own frame
    gx = dx * math.cos(angle) + dy * math.sin(angle)
    gy = dy * math.cos(angle) - dx * math.sin(angle)
    edge = np.float32(1.0 / size)

    # Outline: trapezoid teeth; the slope turns the radial difference into a distance.
    wave = 0.5 + 1.35 * np.cos(_TEETH * turned)
    outline = _ROOT + _DEPTH * np.clip(wave, 0, 1)
    slope = np.where((wave > 0) & (wave < 1), _DEPTH * 1.35 * _TEETH * np.abs(np.sin(_TEETH * turned)) / radius, 0)
    if defect == "broken_tooth":
        tooth = int(trouble.integers(_TEETH)) * 2 * np.pi / _TEETH
        off = np.mod(turned - tooth + np.pi, 2 * np.pi) - np.pi
        jag = _noise(trouble, size, 0.02) * 0.010
        level = _ROOT + _DEPTH * trouble.uniform(0.02, 0.6) + off * radius * trouble.uniform(-0.6, 0.6) + jag
        outline = np.where(np.abs(off) < np.pi / _TEETH, np.minimum(outline, np.maximum(level, _ROOT - 0.004)), outline)
    inside = (outline - radius) / np.sqrt(1 + slope**2)  # > 0 in the metal, in widths
    metal = _cover(inside, edge)

    # Holes: bolts on a circle, the bore and its keyway, which gives the gear one upright position.
    sector = 2 * math.pi / _BOLTS
    bolt = np.floor(np.mod(turned, np.float32(2 * np.pi)) / sector)
    around = turned - (bolt + 0.5) * sector  # a hole in the middle of each sector
    holes = _BOLT_RADIUS - np.hypot(radius * np.cos(around) - _BOLT_CIRCLE, radius * np.sin(around))
    if defect == "missing_hole":
        holes[bolt == trouble.integers(_BOLTS)] = -1.0
    keyway = np.minimum(0.014 - np.abs(gy), np.minimum(gx, 0.078 - gx))
    holes = np.maximum(holes, np.maximum(0.060 - radius, keyway))
    open_ = _cover(holes, edge)

    # Heights in pixels of the supersampled picture, as if it were 512 wide.
    soft = np.float32(0.006)
    rim, hub = _cover(radius - 0.292, soft), _cover(0.122 - radius, soft)
    groove = _cover(0.004 - np.abs(radius - 0.327), np.float32(0.003))
    height = 9 * _cover(inside - 0.004, soft) + 7 * rim + 10 * hub - 2.5 * groove - 12 * _cover(holes + 0.004, soft)
    height -= 2.5 * _cover(0.006 - np.hypot(gx - 0.098, np.abs(gy) - 0.016), np.float32(0.004))  # two punched marks
    cast = 1 - np.clip(rim + hub, 0, 1)
    height += cast * (0.35 * _noise(rng, size, 0.008) + 0.8 * _noise(rng, size, 0.05))

    steel = np.array([0.60, 0.61, 0.63], np.float32)
    albedo: Field = (1 + 0.05 * _noise(rng, size, 0.12) + 0.04 * _noise(rng, size, 0.012)) * (1 - 0.28 * cast)
    gloss: Field = 1 - 0.75 * cast
    scratch, stain = None, None
    if defect == "scratch":
        at, start = trouble.uniform(0, 2 * np.pi), trouble.uniform(0.10, 0.30)
        centre_px = size * (centre + start * zoom * np.array([np.cos(at), np.sin(at)]))
        scratch = _stroke(
            size, _curve(trouble, centre_px, size * trouble.uniform(0.10, 0.26)), trouble.uniform(2.2, 3.8)
        )
        height -= trouble.uniform(1.4, 2.8) * ndimage.gaussian_filter(scratch, 0.8)
    if defect == "contamination":
        at, far = trouble.uniform(0, 2 * np.pi), trouble.uniform(0.13, 0.34)
        spot = _blob(
            trouble, size, centre + far * zoom * np.array([np.cos(at), np.sin(at)]), trouble.uniform(0.022, 0.06)
        )
        colour = np.array([[0.20, 0.13, 0.07], [0.10, 0.10, 0.11], [0.42, 0.22, 0.10]][trouble.integers(3)], np.float32)
        stain = (spot * trouble.uniform(0.45, 0.9), colour)
        gloss = gloss * (1 - 0.8 * spot)

    slope_y, slope_x = np.gradient(height)
    lathe = rng.normal(size=900).astype(np.float32)[np.minimum(radius * 1100, 899).astype(np.int32)] * 0.16 * (1 - cast)
    slope_x += lathe * cos_phi
    slope_y += lathe * sin_phi
    if scratch is not None:
        gloss = gloss * (1 - 0.5 * scratch)
        albedo = albedo * (1 + 0.55 * scratch)

    light = _direction(azimuth, elevation)
    diffuse, specular = _light(slope_x, slope_y, light, 30)
    half = _halfway(light)
    across = half[1] * cos_phi - half[0] * sin_phi
    bow = np.maximum(1 - across**2 * 6, 0) ** 2 * (1 - cast)  # turned faces shine in a bow tie towards the light
    shade = 0.30 + 0.72 * diffuse - 0.012 * np.clip(_blur(height, 0.02 * size) - height, 0, 20)
    shine = gloss * (0.30 * specular + 0.16 * bow)

    mat = 1 + 0.10 * _noise(rng, size, 0.006) + 0.06 * _noise(rng, size, 0.3)
    mat *= 1 + 0.35 * (dx * math.cos(azimuth) + dy * math.sin(azimuth))
    solid = metal * (1 - open_)
    fall = -0.022 * size
    shadow = _shift(_blur(solid, 0.014 * size), fall * math.sin(azimuth), fall * math.cos(azimuth))
    mat *= (1 - 0.65 * np.clip(shadow, 0, 1)) * (1 - 0.45 * open_) * (1 - solid)
    ground = np.array([0.165, 0.18, 0.20], np.float32)
    picture = np.empty((size, size, 3), np.float32)
    for channel in range(3):
        body = albedo * steel[channel]
        if stain is not None:
            body += stain[0] * (stain[1][channel] - body)
        picture[..., channel] = (body * shade + shine) * solid + mat * ground[channel]
    return _sensor(picture, rng, gain=exposure)


# --------------------------------------------------------------------------------------------------------------- board

# Small parts: name, x, y (board widths), turned by 90 degrees or not.
_SMALL: tuple[tuple[str, float, float, bool], ...] = (
    ("resistor", 0.235, 0.130, False),
    ("resistor", 0.345, 0.130, False),
    ("capacitor", 0.455, 0.130, False),
    ("resistor", 0.235, 0.205, False),
    ("capacitor", 0.590, 0.110, True),
    ("capacitor", 0.640, 0.110, True),
    ("resistor", 0.640, 0.520, True),
    ("resistor", 0.700, 0.520, True),
    ("resistor", 0.760, 0.520, True),
    ("capacitor", 0.840, 0.520, True),
    ("resistor", 0.250, 0.865, False),
    ("capacitor", 0.370, 0.865, False),
    ("resistor", 0.490, 0.865, False),
    ("led", 0.590, 0.865, False),
    ("capacitor", 0.620, 0.300, True),
    ("resistor", 0.480, 0.720, False),
)
_VIAS = (
    *((0.20, 0.26), (0.30, 0.28), (0.56, 0.61), (0.60, 0.66), (0.93, 0.42), (0.17, 0.66), (0.22, 0.72)),
    *((0.30, 0.76), (0.52, 0.20), (0.57, 0.23), (0.41, 0.78), (0.70, 0.93), (0.90, 0.90), (0.13, 0.14)),
)
_LEAD_PITCH = 0.0245
_BUS_Y = tuple(0.335 + 0.031 * lane for lane in range(8))  # parallel traces from the connector to the large chip


def _draw_board(rng: np.random.Generator, size_px: int, defect: str | None, attempt: int) -> Field:
    """A small green circuit board in a fixture. (S, S, 3) in [0, 1]."""
    size = size_px * _SUPERSAMPLING
    trouble = np.random.default_rng([int(rng.integers(2**31)), attempt])
    angle = math.radians(rng.uniform(-3, 3))
    shift = rng.uniform(-0.02, 0.02, size=2)
    azimuth, elevation = math.radians(rng.uniform(-140, -100)), math.radians(rng.uniform(50, 62))
    exposure, warmth = rng.uniform(0.9, 1.1), rng.uniform(-0.03, 0.03)

    sheet = _Sheet(size * 2)
    _draw_copper(sheet)
    _draw_large_parts(sheet, rng)
    # Pick-and-place scatter: a pixel or so, and up to 2 degrees.
    places = [(*rng.normal(0, 0.0013, size=2), float(rng.normal(0, 0.8)), rng.uniform(0.85, 1.15)) for _ in _SMALL]
    victim = int(trouble.integers(len(_SMALL)))
    for index, (kind, x, y, upright) in enumerate(_SMALL):
        off_x, off_y, turn, tone = places[index]
        absent = index == victim and defect == "missing_component"
        if index == victim and defect == "misplaced_component":
            sign = trouble.choice([-1, 1], size=2)
            if trouble.random() < 0.5:
                turn += float(sign[0] * trouble.uniform(14, 90))
            else:
                off_x, off_y = (
                    off_x + sign[0] * trouble.uniform(0.008, 0.018),
                    off_y + sign[1] * trouble.uniform(0.008, 0.018),
                )
        _draw_small_part(sheet, kind, (x, y), (x + off_x, y + off_y), turn + 90 * upright, tone, absent)
    if defect == "solder_bridge":
        _draw_bridge(sheet, trouble)
    scratch = None
    if defect == "scratch":
        middle = sheet.size * trouble.uniform(0.2, 0.8, size=2)
        scratch = Image.new("L", (sheet.size, sheet.size))
        points = _curve(trouble, middle, sheet.size * trouble.uniform(0.08, 0.22))
        ImageDraw.Draw(scratch).line(points, fill=255, width=max(2, round(sheet.size * trouble.uniform(0.003, 0.0055))))

    # From the sheet to the picture: the board fills 88 % of the frame, turned and shifted.
    scale = 1 / 0.88
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    middle_x, middle_y = size * (0.5 + float(shift[0])), size * (0.5 + float(shift[1]))
    across = (cos, sin, size / 2 - cos * middle_x - sin * middle_y)
    matrix = (*across, -sin, cos, size / 2 + sin * middle_x - cos * middle_y)

    def photograph(layer: Image.Image) -> Field:
        small = layer.reduce(2)
        moved = small.transform(small.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        return np.asarray(moved, dtype=np.float32) / 255

    albedo = photograph(sheet.colour)
    albedo = albedo * (0.35 + 0.65 * albedo)  # the drawing's colours as light, about gamma 1.6
    layers = photograph(Image.merge("RGB", (sheet.height, sheet.metal, sheet.outline)))
    height, metal, board = layers[..., 0] * 60, layers[..., 1].copy(), layers[..., 2].copy()
    weave = _weave(size, angle)
    albedo *= (1 + 0.07 * _noise(rng, size, 0.2) + 0.05 * _noise(rng, size, 0.006) + 0.03 * weave)[..., None]
    if scratch is not None:
        mark = photograph(scratch) * (height < 20)
        bare = np.array([0.46, 0.50, 0.30], np.float32) * trouble.uniform(0.5, 1.0)
        albedo = albedo * (1 - 0.75 * mark[..., None]) + bare * 0.75 * mark[..., None]
        height -= 1.5 * mark
    # Solder (drawn 230 and up) is bumpy, cans and gold are smooth.
    solder = np.clip(metal * 6 - 4.6, 0, 1) * (0.5 * _noise(rng, size, 0.010) + 0.4 * _noise(rng, size, 0.025))

    height_soft = ndimage.uniform_filter(height, 5)
    slope_y, slope_x = np.gradient(0.35 * height_soft + 2.2 * solder)
    light = _direction(azimuth, elevation)
    diffuse, specular = _light(slope_x, slope_y, light, 24)
    away = (-math.sin(azimuth), -math.cos(azimuth))
    cast = np.zeros_like(height)
    for step in (0.35, 0.7, 1.0):  # shadows: what stands higher towards the light
        reach = step * 0.018 * size
        moved = _shift(height, away[0] * reach, away[1] * reach)
        cast = np.maximum(cast, moved - height - 12 * step)
    shadow = ndimage.uniform_filter(np.clip(cast / 14, 0, 1), 5)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    falloff = 1 + 0.16 * (x * math.cos(azimuth) + y * math.sin(azimuth))
    shade = (0.28 + 0.85 * diffuse) * (1 - 0.5 * shadow) * falloff
    shine = (0.10 + 0.75 * metal) * specular * (1 - 0.6 * shadow)

    table = 1 + 0.03 * _noise(rng, size, 0.008) + 0.04 * _noise(rng, size, 0.3)
    under = _shift(_blur(board, 0.010 * size), away[0] * 0.016 * size, away[1] * 0.016 * size)
    table *= falloff * (1 - 0.55 * np.clip(under, 0, 1)) * (1 - board)
    picture = np.empty((size, size, 3), np.float32)
    for channel, grey in enumerate((0.60, 0.59, 0.57)):
        picture[..., channel] = (albedo[..., channel] * shade + shine) * board + table * grey
    tint = exposure * np.array([1 + warmth, 1.0, 1 - warmth], np.float32)
    return _sensor(picture, rng, gain=tint, gamma=1.35)


class _Sheet:
    """Layers in board coordinates (0 to 1 across): colour, height (255 is 60 px of 512), bare metal, outline."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.colour = Image.new("RGB", (size, size), (14, 88, 52))
        self.height, self.metal, self.outline = (Image.new("L", (size, size)) for _ in range(3))
        self._colour, self._height, self._metal = (
            ImageDraw.Draw(layer) for layer in (self.colour, self.height, self.metal)
        )
        ImageDraw.Draw(self.outline).rounded_rectangle((0, 0, size - 1, size - 1), size * 0.03, fill=255)

    def polygon(self, points: Points, colour: tuple[int, int, int], height: int, metal: int = 0) -> None:
        scaled = [(x * self.size, y * self.size) for x, y in points]
        self._colour.polygon(scaled, fill=colour)
        self._height.polygon(scaled, fill=height)
        self._metal.polygon(scaled, fill=metal)

    def box(
        self, at: tuple[float, float], extent: tuple[float, float], turn_deg: float,
        colour: tuple[int, int, int], height: int, metal: int = 0, off: tuple[float, float] = (0.0, 0.0),
    ) -> None:  # fmt: skip
        """A rectangle of the given extent, `off` from `at` in its own frame, turned about `at`."""
        cos, sin = np.cos(np.deg2rad(turn_deg)), np.sin(np.deg2rad(turn_deg))
        corners = [
            (off[0] + i * extent[0] / 2, off[1] + j * extent[1] / 2) for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        self.polygon(
            [(at[0] + cos * u - sin * v, at[1] + sin * u + cos * v) for u, v in corners], colour, height, metal
        )

    def disc(
        self, at: tuple[float, float], radius: float, colour: tuple[int, int, int], height: int, metal: int = 0
    ) -> None:
        bounds = [(at[0] - radius) * self.size, (at[1] - radius) * self.size]
        bounds += [(at[0] + radius) * self.size, (at[1] + radius) * self.size]
        self._colour.ellipse(bounds, fill=colour)
        self._height.ellipse(bounds, fill=height)
        self._metal.ellipse(bounds, fill=metal)

    def line(self, points: Points, width: float, colour: tuple[int, int, int], height: int = 0) -> None:
        scaled = [(x * self.size, y * self.size) for x, y in points]
        self._colour.line(scaled, fill=colour, width=max(1, round(width * self.size)), joint="curve")
        if height:
            self._height.line(scaled, fill=height, width=max(1, round(width * self.size)), joint="curve")


_TRACE, _GOLD, _TIN, _SILK = (34, 122, 74), (206, 170, 92), (186, 188, 190), (222, 226, 220)


def _draw_copper(sheet: _Sheet) -> None:
    """Traces, vias, mounting holes and silkscreen: the same on every board."""
    for lane, y in enumerate(_BUS_Y):
        end = 0.443 + _LEAD_PITCH * (lane - 3.5)
        sheet.line([(0.10, y), (0.20, y), (0.20 + abs(y - end), end), (0.33, end)], 0.0085, _TRACE, 3)
    for lane in range(6):
        x = 0.39 + _LEAD_PITCH * lane
        sheet.line(
            [(x, 0.56), (x, 0.64 + 0.018 * lane), (x + 0.07, 0.71 + 0.018 * lane), (0.70, 0.71 + 0.018 * lane)],
            0.0075,
            _TRACE,
            3,
        )
    for lane in range(5):
        y = 0.394 + _LEAD_PITCH * lane
        sheet.line(
            [(0.56, y), (0.60 + 0.012 * lane, y), (0.65 + 0.012 * lane, y - 0.05), (0.70, y - 0.05)], 0.0075, _TRACE, 3
        )
    for _, x, y, upright in (_SMALL[index] for index in (0, 2, 4, 10, 12, 8)):
        stub = [(-0.07, -0.03), (-0.06, 0.0), (0.06, 0.0), (0.09, 0.03)]
        stub = [(v, u) for u, v in stub] if upright else stub
        sheet.line([(x + u, y + v) for u, v in stub], 0.0085, _TRACE, 3)
    sheet.line([(0.04, 0.18), (0.18, 0.18), (0.30, 0.26), (0.36, 0.26), (0.36, 0.33)], 0.013, _TRACE, 3)
    sheet.line([(0.95, 0.35), (0.90, 0.45), (0.90, 0.60), (0.86, 0.64)], 0.013, _TRACE, 3)
    for x, y in _VIAS:
        sheet.disc((x, y), 0.0105, _GOLD, 4, 160)
        sheet.disc((x, y), 0.0045, (10, 16, 12), 0)
    for x in (0.055, 0.945):
        for y in (0.055, 0.945):
            sheet.disc((x, y), 0.036, _GOLD, 4, 140)
            sheet.disc((x, y), 0.021, (22, 22, 22), 0)
    for kind, x, y, upright in _SMALL:
        wide, high = (0.040, 0.026) if kind != "led" else (0.044, 0.034)
        wide, high = (high, wide) if upright else (wide, high)
        frame = [(x - wide, y - high), (x + wide, y - high), (x + wide, y + high), (x - wide, y + high)]
        sheet.line([*frame, frame[0]], 0.003, _SILK)
    _digits(sheet, "1110", (0.70, 0.065), 0.017)
    _digits(sheet, "45", (0.15, 0.245), 0.013)
    _digits(sheet, "2038", (0.13, 0.795), 0.015)
    sheet.line([(0.315, 0.315), (0.345, 0.315)], 0.005, _SILK)
    sheet.line([(0.315, 0.315), (0.315, 0.345)], 0.005, _SILK)


def _draw_large_parts(sheet: _Sheet, rng: np.random.Generator) -> None:
    tone = int(rng.integers(-6, 7))
    black, pins = (34 + tone, 35 + tone, 38 + tone), range(-4, 4)
    # Quad flat pack with eight leads a side.
    at, turn = (0.443 + rng.normal(0, 0.001), 0.443 + rng.normal(0, 0.001)), float(rng.normal(0, 0.3))
    for side in range(4):
        for pin in pins:
            sheet.box(at, (0.036, 0.0125), turn + 90 * side, _TIN, 16, 230, off=(0.112, (pin + 0.5) * _LEAD_PITCH))
    sheet.box(at, (0.198, 0.198), turn, black, 70)
    sheet.disc((at[0] - 0.075, at[1] - 0.075), 0.010, (24, 24, 26), 64)
    _digits(sheet, "7210", (at[0] - 0.055, at[1] - 0.012), 0.020, (112, 112, 114), 70)
    # Small outline package: four leads on each long side.
    at, turn = (0.765 + rng.normal(0, 0.001), 0.300 + rng.normal(0, 0.001)), float(rng.normal(0, 0.4))
    for side in (-1, 1):
        for pin in range(-2, 2):
            sheet.box(at, (0.030, 0.016), turn, _TIN, 16, 230, off=(side * 0.072, (pin + 0.5) * 0.036))
    sheet.box(at, (0.116, 0.158), turn, black, 62)
    sheet.disc((at[0] - 0.040, at[1] - 0.060), 0.008, (24, 24, 26), 56)
    _digits(sheet, "358", (at[0] - 0.032, at[1] - 0.010), 0.017, (108, 108, 110), 62)
    # Connector with eight gold pins.
    sheet.box((0.062, 0.443), (0.088, 0.286), float(rng.normal(0, 0.2)), (214, 208, 190), 120)
    sheet.box((0.066, 0.443), (0.058, 0.262), 0.0, (176, 170, 152), 80)
    for y in _BUS_Y:
        sheet.box((0.070, y), (0.044, 0.011), 0.0, _GOLD, 100, 220)
    # Electrolytic capacitor, its dark half marks the minus side; and a quartz can.
    at = (0.800 + rng.normal(0, 0.0015), 0.765 + rng.normal(0, 0.0015))
    sheet.box(at, (0.180, 0.180), 0.0, (40, 40, 44), 40)
    sheet.disc(at, 0.083, (196, 198, 202), 165, 120)
    minus = np.deg2rad(np.linspace(110, 250, 24) + rng.normal(0, 2.0))
    sheet.polygon([(at[0] + 0.078 * np.cos(a), at[1] + 0.078 * np.sin(a)) for a in minus], (38, 38, 44), 165)
    at = (0.235 + rng.normal(0, 0.0012), 0.640)
    for side in (-1, 1):
        sheet.disc((at[0] + side * 0.048, at[1]), 0.027, (190, 192, 194), 80, 170)
    sheet.box(at, (0.096, 0.054), 0.0, (190, 192, 194), 80, 170)
    _digits(sheet, "160", (at[0] - 0.03, at[1] - 0.010), 0.016, (120, 122, 124), 80)


def _draw_small_part(
    sheet: _Sheet, kind: str, pads: tuple[float, float], at: tuple[float, float], turn: float, tone: float, absent: bool
) -> None:
    """Pads stay where the copper is; the part sits on them, or is absent."""
    upright = 90.0 * (round(turn / 90) % 2) if not absent else turn
    pad_turn = upright if kind != "led" else 0.0
    for side in (-1, 1):
        sheet.box(pads, (0.020, 0.030), pad_turn, _TIN, 6, 235, off=(side * 0.024, 0.0))
    if absent:
        return
    body = {"resistor": (38, 38, 42), "capacitor": (168, 132, 92), "led": (226, 222, 206)}[kind]
    colour = (int(body[0] * tone), int(body[1] * tone), int(body[2] * tone))
    height = {"resistor": 34, "capacitor": 52, "led": 48}[kind]
    for side in (-1, 1):
        sheet.box(at, (0.015, 0.029), turn, (202, 204, 206), height, 235, off=(side * 0.0235, 0.0))
    sheet.box(at, (0.036, 0.029), turn, colour, height)
    if kind == "resistor":
        for mark in (-0.009, 0.0, 0.009):
            sheet.box(at, (0.0042, 0.013), turn, (206, 206, 206), height, off=(mark, 0.0))
    if kind == "led":
        sheet.disc(at, 0.011, (236, 196, 70), height + 10)


def _draw_bridge(sheet: _Sheet, rng: np.random.Generator) -> None:
    """Solder across two or three neighbours: traces of the bus, or leads of the large chip."""
    if rng.random() < 0.5:
        lane = int(rng.integers(len(_BUS_Y) - 1))
        x, first, last = rng.uniform(0.13, 0.19), _BUS_Y[lane], _BUS_Y[lane + 1]
        ends = ((x, first - 0.004), (x + rng.uniform(-0.006, 0.006), last + 0.004))
    else:
        along = 0.443 + _LEAD_PITCH * (rng.integers(-4, 3) + 0.5)
        far = 0.443 + rng.choice([-1, 1]) * rng.uniform(0.114, 0.128)
        ends = ((along, far), (along + _LEAD_PITCH, far))
        if rng.random() < 0.5:
            ends = ((far, along), (far, along + _LEAD_PITCH))
    thick = rng.uniform(0.0055, 0.0095)
    for step in np.linspace(0, 1, 9):
        x, y = (ends[0][axis] * (1 - step) + ends[1][axis] * step + rng.normal(0, 0.0008) for axis in (0, 1))
        sheet.disc((x, y), thick * (1 + 0.35 * abs(2 * step - 1)) * rng.uniform(0.9, 1.1), (198, 200, 202), 22, 235)


_SEGMENTS = {
    **{"a": (0, 0, 1, 0), "b": (1, 0, 1, 1), "c": (1, 1, 1, 2), "d": (0, 2, 1, 2)},
    **{"e": (0, 1, 0, 2), "f": (0, 0, 0, 1), "g": (0, 1, 1, 1)},
}
_LIT = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


def _digits(
    sheet: _Sheet,
    text: str,
    at: tuple[float, float],
    high: float,
    colour: tuple[int, int, int] = _SILK,
    height: int = 0,
) -> None:
    """Seven-segment figures, so that no font file is needed and the picture is the same everywhere."""
    for index, digit in enumerate(text):
        for segment in _LIT[int(digit)]:
            x0, y0, x1, y1 = _SEGMENTS[segment]
            left = at[0] + index * high * 1.45
            points = [
                (left + x0 * high * 0.9, at[1] + y0 * high * 0.9),
                (left + x1 * high * 0.9, at[1] + y1 * high * 0.9),
            ]
            sheet.line(points, 0.0038, colour, height)


# ------------------------------------------------------------------------------------------------------- light and film


def _light(slope_x: Field, slope_y: Field, light: tuple[float, float, float], shininess: int) -> tuple[Field, Field]:
    """Lambert's and Blinn's terms of a surface seen from above, both in [0, 1]."""
    norm = np.sqrt(slope_x**2 + slope_y**2 + 1)
    half = _halfway(light)
    diffuse = np.maximum(-slope_x * light[0] - slope_y * light[1] + light[2], 0) / norm
    specular = np.exp(shininess * np.log(np.maximum(half[2] - slope_x * half[0] - slope_y * half[1], 1e-3) / norm))
    return diffuse, specular


def _direction(azimuth: float, elevation: float) -> tuple[float, float, float]:
    return (
        math.cos(azimuth) * math.cos(elevation),
        math.sin(azimuth) * math.cos(elevation),
        math.sin(elevation),
    )


def _halfway(light: tuple[float, float, float]) -> tuple[float, float, float]:
    """The unit vector between the light and the camera, which looks straight down."""
    norm = math.hypot(light[0], light[1], light[2] + 1)
    return light[0] / norm, light[1] / norm, (light[2] + 1) / norm


def _sensor(picture: Field, rng: np.random.Generator, gain: Any, gamma: float = 1.0) -> Field:
    """Averages the supersampled picture down and adds the camera's response and noise."""
    small = 0.25 * (picture[::2, ::2] + picture[1::2, ::2] + picture[::2, 1::2] + picture[1::2, 1::2])
    small = gain * np.maximum(small, 0) ** (1 / gamma)
    return np.asarray(small + 0.006 * rng.standard_normal(small.shape, np.float32), np.float32)


def _develop(picture: Field) -> NDArray[np.uint8]:
    return np.clip(np.round(picture * 255), 0, 255).astype(np.uint8)


def _changed(clean: NDArray[np.uint8], bad: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where two pictures differ by more than MASK_DIFFERENCE; specks dropped, small gaps and holes closed."""
    differ = np.abs(clean.astype(np.int16) - bad.astype(np.int16)).max(axis=2) > MASK_DIFFERENCE
    reach = max(1, clean.shape[0] // 128)
    disc = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), reach)
    closed = ndimage.binary_closing(np.pad(differ, reach), structure=disc)[reach:-reach, reach:-reach]
    filled = ndimage.binary_fill_holes(closed)
    labelled, count = ndimage.label(filled, structure=np.ones((3, 3), bool))
    if not count:
        return np.zeros(differ.shape, bool)
    areas = np.bincount(labelled.ravel())
    areas[0] = 0
    return np.asarray((areas >= max(4, 0.04 * areas.max()))[labelled])


def _cover(distance: Field, width: Any) -> Field:
    """1 where distance > 0, 0 where it is < 0, smooth over `width`."""
    t = np.clip(distance / width + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def _noise(rng: np.random.Generator, size: int, cell: float) -> Field:
    """Smooth noise of unit deviation at its knots, which lie `cell` widths apart."""
    knots = max(2, round(1 / cell))
    coarse = Image.fromarray(rng.standard_normal((knots, knots), np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def _blur(field: Field, sigma_px: float) -> Field:
    """A Gaussian blur done at a quarter of the resolution: for soft shadows."""
    size = field.shape[0]
    whole = Image.fromarray(np.ascontiguousarray(field, dtype=np.float32))
    soft = np.asarray(whole.resize((size // 4, size // 4), Image.Resampling.BOX))
    soft = ndimage.gaussian_filter(soft, sigma_px / 4)
    return np.asarray(Image.fromarray(soft).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)


def _shift(field: Field, down_px: float, right_px: float) -> Field:
    """Moved by whole pixels, zeros coming in."""
    down, right = round(down_px), round(right_px)
    height, width = field.shape
    moved = np.zeros_like(field)
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = field[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return moved


def _weave(size: int, angle: float) -> Field:
    """The glass cloth under the solder mask."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return np.asarray(np.sin(u * 2 * np.pi * 62) + np.sin(v * 2 * np.pi * 62), dtype=np.float32)


def _curve(rng: np.random.Generator, middle: NDArray[np.float64], length: float) -> Points:
    """A slightly bent, slightly shaky line about its middle."""
    along = rng.uniform(0, 2 * np.pi)
    t = np.linspace(-0.5, 0.5, 40)
    bend = rng.uniform(-0.35, 0.35) * t**2 * 2 + np.cumsum(rng.normal(0, 0.004, size=t.size))
    x = middle[0] + length * (t * np.cos(along) - bend * np.sin(along))
    y = middle[1] + length * (t * np.sin(along) + bend * np.cos(along))
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _stroke(size: int, points: Points, width_px: float) -> Field:
    """A line of round width, anti-aliased, in [0, 1]. The width is for a supersampled picture of 512."""
    canvas = Image.new("L", (size * 2, size * 2))
    ImageDraw.Draw(canvas).line(
        [(2 * x, 2 * y) for x, y in points], fill=255, width=max(2, round(width_px * size / 256))
    )
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255


def _blob(rng: np.random.Generator, size: int, at: NDArray[np.float64], radius: float) -> Field:
    """A stain: an uneven disc with soft edges and an uneven inside, in [0, 1]."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    stretch, along = rng.uniform(0.65, 1.5), rng.uniform(0, np.pi)
    u = (x - at[0]) * np.cos(along) + (y - at[1]) * np.sin(along)
    v = (y - at[1]) * np.cos(along) - (x - at[0]) * np.sin(along)
    distance = np.hypot(u / stretch, v * stretch) / radius
    rough = 0.22 * _noise(rng, size, radius * 0.9) + 0.10 * _noise(rng, size, radius * 0.35)
    return _cover((1 - distance + rough).astype(np.float32), np.float32(0.35)) * np.clip(
        0.85 + 0.15 * _noise(rng, size, radius * 0.5), 0, 1
    )


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=3)


CATEGORIES: dict[str, tuple[Callable[[np.random.Generator, int, str | None, int], Field], tuple[str, ...]]] = {
    "board": (_draw_board, ("missing_component", "misplaced_component", "scratch", "solder_bridge")),
    "gear": (_draw_gear, ("broken_tooth", "contamination", "missing_hole", "scratch")),
}
"""Each category's painter and defect types."""
