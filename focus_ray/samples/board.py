"""The sample part `board`: a small circuit board in a fixture."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from focus_ray.samples.painting import (
    SUPERSAMPLING,
    Colour,
    FloatImage,
    Point,
    Points,
    blur_at_quarter_resolution,
    compute_light_direction,
    compute_reflection,
    draw_noise,
    make_bent_line_points,
    shift_image,
    simulate_camera_sensor,
)

# Small parts: kind, x and y in board widths, and whether the part is rotated by 90 degrees.
_SMALL_PARTS: tuple[tuple[str, float, float, bool], ...] = (
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
_VIA_CENTRES = (
    *((0.20, 0.26), (0.30, 0.28), (0.56, 0.61), (0.60, 0.66), (0.93, 0.42), (0.17, 0.66), (0.22, 0.72)),
    *((0.30, 0.76), (0.52, 0.20), (0.57, 0.23), (0.41, 0.78), (0.70, 0.93), (0.90, 0.90), (0.13, 0.14)),
)
_LEAD_PITCH = 0.0245  # distance between two leads of the large chip, in board widths
_BUS_Y = tuple(0.335 + 0.031 * lane for lane in range(8))  # parallel traces from the connector to the large chip


def draw_board(rng: np.random.Generator, size_px: int, defect: str | None, attempt: int) -> FloatImage:
    """Draws a small green circuit board in a fixture.

    The same `rng` state gives the same board with and without a defect: the defect draws from a generator of its own.

    Args:
        rng: Source of everything except the defect.
        size_px: Side of the image in pixels.
        defect: One of the defect types of `write.CATEGORIES`; None for a good board.
        attempt: Number that selects another random defect for the same board.

    Returns:
        (size_px, size_px, 3), about [0, 1].
    """
    size = size_px * SUPERSAMPLING
    defect_rng = np.random.default_rng([int(rng.integers(2**31)), attempt])
    angle = math.radians(rng.uniform(-3, 3))
    offset = rng.uniform(-0.02, 0.02, size=2)
    azimuth, elevation = math.radians(rng.uniform(-140, -100)), math.radians(rng.uniform(50, 62))
    exposure, warmth = rng.uniform(0.9, 1.1), rng.uniform(-0.03, 0.03)

    layers = _BoardLayers(size * 2)
    _draw_traces_and_vias(layers)
    _draw_large_parts(layers, rng)
    # A placement machine scatters the parts: by about a pixel, and by up to 2 degrees.
    scatter = [
        (*rng.normal(0, 0.0013, size=2), float(rng.normal(0, 0.8)), rng.uniform(0.85, 1.15)) for _ in _SMALL_PARTS
    ]
    defective_part = int(defect_rng.integers(len(_SMALL_PARTS)))
    for index, (kind, x, y, upright) in enumerate(_SMALL_PARTS):
        offset_x, offset_y, angle_deg, tone = scatter[index]
        is_absent = index == defective_part and defect == "missing_component"
        if index == defective_part and defect == "misplaced_component":
            sign = defect_rng.choice([-1, 1], size=2)
            if defect_rng.random() < 0.5:
                angle_deg += float(sign[0] * defect_rng.uniform(25, 90))
            else:
                offset_x, offset_y = (
                    offset_x + sign[0] * defect_rng.uniform(0.014, 0.024),
                    offset_y + sign[1] * defect_rng.uniform(0.014, 0.024),
                )
        _draw_small_part(layers, kind, (x, y), (x + offset_x, y + offset_y), angle_deg + 90 * upright, tone, is_absent)
    if defect == "solder_bridge":
        _draw_solder_bridge(layers, defect_rng)
    scratch = None
    if defect == "scratch":
        scratch_middle = layers.size * defect_rng.uniform(0.2, 0.8, size=2)
        scratch = Image.new("L", (layers.size, layers.size))
        points = make_bent_line_points(defect_rng, scratch_middle, layers.size * defect_rng.uniform(0.12, 0.28))
        ImageDraw.Draw(scratch).line(
            points, fill=255, width=max(2, round(layers.size * defect_rng.uniform(0.005, 0.008)))
        )

    # From board coordinates to the image: the rotated and shifted board fills 88 % of the image.
    # PIL's affine matrix maps pixels of the result to pixels of the source.
    scale = 1 / 0.88
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    middle_x, middle_y = size * (0.5 + float(offset[0])), size * (0.5 + float(offset[1]))
    first_row = (cos, sin, size / 2 - cos * middle_x - sin * middle_y)
    matrix = (*first_row, -sin, cos, size / 2 + sin * middle_x - cos * middle_y)

    def project_to_image(layer: Image.Image) -> FloatImage:
        """Returns a layer of the board as the camera sees it, in [0, 1]."""
        small = layer.reduce(2)
        moved = small.transform(small.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        return np.asarray(moved, dtype=np.float32) / 255

    albedo = project_to_image(layers.colour)
    albedo = albedo * (0.35 + 0.65 * albedo)  # colours of the drawing -> linear light, about gamma 1.6
    surface = project_to_image(Image.merge("RGB", (layers.height, layers.metal, layers.outline)))
    height, metal, board = surface[..., 0] * 60, surface[..., 1].copy(), surface[..., 2].copy()
    weave = _draw_cloth_texture(size, angle)
    albedo *= (1 + 0.07 * draw_noise(rng, size, 0.2) + 0.05 * draw_noise(rng, size, 0.006) + 0.03 * weave)[..., None]
    if scratch is not None:
        mark = project_to_image(scratch) * (height < 20)
        bare = np.array([0.50, 0.52, 0.36], np.float32) * defect_rng.uniform(0.9, 1.2)
        albedo = albedo * (1 - 0.85 * mark[..., None]) + bare * 0.85 * mark[..., None]
        height -= 1.5 * mark
    # Solder (drawn with metal >= 230) is bumpy; metal cans and gold are smooth.
    solder = np.clip(metal * 6 - 4.6, 0, 1) * (0.5 * draw_noise(rng, size, 0.010) + 0.4 * draw_noise(rng, size, 0.025))

    # Light: slopes of the smoothed height give diffuse and specular reflection.
    height_soft = ndimage.uniform_filter(height, 5)
    slope_y, slope_x = np.gradient(0.35 * height_soft + 2.2 * solder)
    light = compute_light_direction(azimuth, elevation)
    diffuse, specular = compute_reflection(slope_x, slope_y, light, 24)
    away = (-math.sin(azimuth), -math.cos(azimuth))
    shadow_height = np.zeros_like(height)
    for step in (0.35, 0.7, 1.0):  # a pixel is in shadow if the surface towards the light is higher
        distance_px = step * 0.018 * size
        moved = shift_image(height, away[0] * distance_px, away[1] * distance_px)
        shadow_height = np.maximum(shadow_height, moved - height - 12 * step)
    shadow = ndimage.uniform_filter(np.clip(shadow_height / 14, 0, 1), 5)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    falloff = 1 + 0.16 * (x * math.cos(azimuth) + y * math.sin(azimuth))
    shade = (0.28 + 0.85 * diffuse) * (1 - 0.5 * shadow) * falloff
    shine = (0.10 + 0.75 * metal) * specular * (1 - 0.6 * shadow)

    # The table under the board, with the shadow of the board.
    table = 1 + 0.03 * draw_noise(rng, size, 0.008) + 0.04 * draw_noise(rng, size, 0.3)
    shadow_on_table = shift_image(
        blur_at_quarter_resolution(board, 0.010 * size), away[0] * 0.016 * size, away[1] * 0.016 * size
    )
    table *= falloff * (1 - 0.55 * np.clip(shadow_on_table, 0, 1)) * (1 - board)
    picture = np.empty((size, size, 3), np.float32)
    for channel, grey in enumerate((0.60, 0.59, 0.57)):
        picture[..., channel] = (albedo[..., channel] * shade + shine) * board + table * grey
    tint = exposure * np.array([1 + warmth, 1.0, 1 - warmth], np.float32)
    return simulate_camera_sensor(picture, rng, gain=tint, gamma=1.35)


class _BoardLayers:
    """Four layers on which the parts of a board are drawn. Coordinates run from 0 to 1 across the board.

    Attributes:
        size: Side of the layers in pixels.
        colour: RGB image.
        height: Height above the board, 0 to 255; 255 is 60 pixels of the supersampled image of 512 pixels.
        metal: Gloss of the surface, 0 to 255; 230 and more is solder.
        outline: 255 inside the board, 0 outside.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.colour = Image.new("RGB", (size, size), (14, 88, 52))
        self.height, self.metal, self.outline = (Image.new("L", (size, size)) for _ in range(3))
        self._colour, self._height, self._metal = (
            ImageDraw.Draw(layer) for layer in (self.colour, self.height, self.metal)
        )
        ImageDraw.Draw(self.outline).rounded_rectangle((0, 0, size - 1, size - 1), size * 0.03, fill=255)

    def draw_polygon(self, points: Points, colour: Colour, height: int, metal: int = 0) -> None:
        """Draws a filled polygon into the layers colour, height and metal."""
        scaled = [(x * self.size, y * self.size) for x, y in points]
        self._colour.polygon(scaled, fill=colour)
        self._height.polygon(scaled, fill=height)
        self._metal.polygon(scaled, fill=metal)

    def draw_rectangle(
        self,
        centre: Point,
        extent: Point,
        angle_deg: float,
        colour: Colour,
        height: int,
        metal: int = 0,
        offset: Point = (0, 0),
    ) -> None:
        """Draws a filled rectangle into the layers colour, height and metal.

        Shifts the rectangle by `offset` in its own frame, then rotates it about `centre`.
        """
        cos, sin = np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg))
        corners = [
            (offset[0] + i * extent[0] / 2, offset[1] + j * extent[1] / 2)
            for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]
        self.draw_polygon(
            [(centre[0] + cos * u - sin * v, centre[1] + sin * u + cos * v) for u, v in corners], colour, height, metal
        )

    def draw_disc(self, centre: Point, radius: float, colour: Colour, height: int, metal: int = 0) -> None:
        """Draws a filled circle into the layers colour, height and metal."""
        bounds = [(centre[axis] + side * radius) * self.size for side in (-1, 1) for axis in (0, 1)]
        self._colour.ellipse(bounds, fill=colour)
        self._height.ellipse(bounds, fill=height)
        self._metal.ellipse(bounds, fill=metal)

    def draw_line(self, points: Points, width: float, colour: Colour, height: int = 0) -> None:
        """Draws a line into the layer colour and, if `height` is not 0, into the layer height."""
        scaled = [(x * self.size, y * self.size) for x, y in points]
        self._colour.line(scaled, fill=colour, width=max(1, round(width * self.size)), joint="curve")
        if height:
            self._height.line(scaled, fill=height, width=max(1, round(width * self.size)), joint="curve")


_TRACE, _GOLD, _TIN, _SILK = (34, 122, 74), (206, 170, 92), (186, 188, 190), (222, 226, 220)  # RGB colours


def _draw_traces_and_vias(layers: _BoardLayers) -> None:
    """Draws traces, vias, mounting holes and silkscreen, which are the same on every board."""
    for lane, y in enumerate(_BUS_Y):
        end = 0.443 + _LEAD_PITCH * (lane - 3.5)
        layers.draw_line([(0.10, y), (0.20, y), (0.20 + abs(y - end), end), (0.33, end)], 0.0085, _TRACE, 3)
    for lane in range(6):
        x = 0.39 + _LEAD_PITCH * lane
        drop = 0.018 * lane
        layers.draw_line([(x, 0.56), (x, 0.64 + drop), (x + 0.07, 0.71 + drop), (0.70, 0.71 + drop)], 0.0075, _TRACE, 3)
    for lane in range(5):
        y = 0.394 + _LEAD_PITCH * lane
        right = 0.012 * lane
        layers.draw_line([(0.56, y), (0.60 + right, y), (0.65 + right, y - 0.05), (0.70, y - 0.05)], 0.0075, _TRACE, 3)
    for _, x, y, upright in (_SMALL_PARTS[index] for index in (0, 2, 4, 10, 12, 8)):
        stub = [(-0.07, -0.03), (-0.06, 0.0), (0.06, 0.0), (0.09, 0.03)]
        stub = [(v, u) for u, v in stub] if upright else stub
        layers.draw_line([(x + u, y + v) for u, v in stub], 0.0085, _TRACE, 3)
    layers.draw_line([(0.04, 0.18), (0.18, 0.18), (0.30, 0.26), (0.36, 0.26), (0.36, 0.33)], 0.013, _TRACE, 3)
    layers.draw_line([(0.95, 0.35), (0.90, 0.45), (0.90, 0.60), (0.86, 0.64)], 0.013, _TRACE, 3)
    for x, y in _VIA_CENTRES:
        layers.draw_disc((x, y), 0.0105, _GOLD, 4, 160)
        layers.draw_disc((x, y), 0.0045, (10, 16, 12), 0)
    for x in (0.055, 0.945):
        for y in (0.055, 0.945):
            layers.draw_disc((x, y), 0.036, _GOLD, 4, 140)
            layers.draw_disc((x, y), 0.021, (22, 22, 22), 0)
    for kind, x, y, upright in _SMALL_PARTS:
        wide, high = (0.040, 0.026) if kind != "led" else (0.044, 0.034)
        wide, high = (high, wide) if upright else (wide, high)
        frame = [(x - wide, y - high), (x + wide, y - high), (x + wide, y + high), (x - wide, y + high)]
        layers.draw_line([*frame, frame[0]], 0.003, _SILK)
    _draw_digits(layers, "1110", (0.70, 0.065), 0.017)
    _draw_digits(layers, "45", (0.15, 0.245), 0.013)
    _draw_digits(layers, "2038", (0.13, 0.795), 0.015)
    layers.draw_line([(0.315, 0.315), (0.345, 0.315)], 0.005, _SILK)
    layers.draw_line([(0.315, 0.315), (0.315, 0.345)], 0.005, _SILK)


def _draw_large_parts(layers: _BoardLayers, rng: np.random.Generator) -> None:
    """Draws two chips, the connector, the capacitor and the quartz, each with a small random displacement."""
    tone = int(rng.integers(-6, 7))
    black, pins = (34 + tone, 35 + tone, 38 + tone), range(-4, 4)
    # Quad flat package with eight leads on each side.
    centre, angle_deg = (0.443 + rng.normal(0, 0.001), 0.443 + rng.normal(0, 0.001)), float(rng.normal(0, 0.3))
    for side in range(4):
        for pin in pins:
            layers.draw_rectangle(
                centre, (0.036, 0.0125), angle_deg + 90 * side, _TIN, 16, 230, offset=(0.112, (pin + 0.5) * _LEAD_PITCH)
            )
    layers.draw_rectangle(centre, (0.198, 0.198), angle_deg, black, 70)
    layers.draw_disc((centre[0] - 0.075, centre[1] - 0.075), 0.010, (24, 24, 26), 64)
    _draw_digits(layers, "7210", (centre[0] - 0.055, centre[1] - 0.012), 0.020, (112, 112, 114), 70)
    # Small outline package: four leads on each long side.
    centre, angle_deg = (0.765 + rng.normal(0, 0.001), 0.300 + rng.normal(0, 0.001)), float(rng.normal(0, 0.4))
    for side in (-1, 1):
        for pin in range(-2, 2):
            layers.draw_rectangle(
                centre, (0.030, 0.016), angle_deg, _TIN, 16, 230, offset=(side * 0.072, (pin + 0.5) * 0.036)
            )
    layers.draw_rectangle(centre, (0.116, 0.158), angle_deg, black, 62)
    layers.draw_disc((centre[0] - 0.040, centre[1] - 0.060), 0.008, (24, 24, 26), 56)
    _draw_digits(layers, "358", (centre[0] - 0.032, centre[1] - 0.010), 0.017, (108, 108, 110), 62)
    # Connector with eight gold pins.
    layers.draw_rectangle((0.062, 0.443), (0.088, 0.286), float(rng.normal(0, 0.2)), (214, 208, 190), 120)
    layers.draw_rectangle((0.066, 0.443), (0.058, 0.262), 0.0, (176, 170, 152), 80)
    for y in _BUS_Y:
        layers.draw_rectangle((0.070, y), (0.044, 0.011), 0.0, _GOLD, 100, 220)
    # Electrolytic capacitor, whose dark half marks the minus side; then a quartz in a metal can.
    centre = (0.800 + rng.normal(0, 0.0015), 0.765 + rng.normal(0, 0.0015))
    layers.draw_rectangle(centre, (0.180, 0.180), 0.0, (40, 40, 44), 40)
    layers.draw_disc(centre, 0.083, (196, 198, 202), 165, 120)
    minus = np.deg2rad(np.linspace(110, 250, 24) + rng.normal(0, 2.0))
    layers.draw_polygon(
        [(centre[0] + 0.078 * np.cos(a), centre[1] + 0.078 * np.sin(a)) for a in minus], (38, 38, 44), 165
    )
    centre = (0.235 + rng.normal(0, 0.0012), 0.640)
    for side in (-1, 1):
        layers.draw_disc((centre[0] + side * 0.048, centre[1]), 0.027, (190, 192, 194), 80, 170)
    layers.draw_rectangle(centre, (0.096, 0.054), 0.0, (190, 192, 194), 80, 170)
    _draw_digits(layers, "160", (centre[0] - 0.03, centre[1] - 0.010), 0.016, (120, 122, 124), 80)


def _draw_small_part(
    layers: _BoardLayers, kind: str, pads: Point, centre: Point, angle_deg: float, tone: float, is_absent: bool
) -> None:
    """Draws the pads of a small part and, unless it is absent, the part itself.

    Args:
        layers: Layers to draw on.
        kind: "resistor", "capacitor" or "led".
        pads: x and y of the middle between both pads: a misplaced part does not move its pads.
        centre: x and y of the part.
        angle_deg: Rotation of the part in degrees.
        tone: Factor of the part's brightness.
        is_absent: True if the part is missing and only its pads are drawn.
    """
    pad_base_deg = 90.0 * (round(angle_deg / 90) % 2) if not is_absent else angle_deg
    pad_angle_deg = pad_base_deg if kind != "led" else 0.0
    for side in (-1, 1):
        layers.draw_rectangle(pads, (0.020, 0.030), pad_angle_deg, _TIN, 6, 235, offset=(side * 0.024, 0.0))
    if is_absent:
        return
    body = {"resistor": (38, 38, 42), "capacitor": (168, 132, 92), "led": (226, 222, 206)}[kind]
    colour = (int(body[0] * tone), int(body[1] * tone), int(body[2] * tone))
    height = {"resistor": 34, "capacitor": 52, "led": 48}[kind]
    for side in (-1, 1):
        layers.draw_rectangle(
            centre, (0.015, 0.029), angle_deg, (202, 204, 206), height, 235, offset=(side * 0.0235, 0.0)
        )
    layers.draw_rectangle(centre, (0.036, 0.029), angle_deg, colour, height)
    if kind == "resistor":
        for stripe_x in (-0.009, 0.0, 0.009):
            layers.draw_rectangle(centre, (0.0042, 0.013), angle_deg, (206, 206, 206), height, offset=(stripe_x, 0.0))
    if kind == "led":
        layers.draw_disc(centre, 0.011, (236, 196, 70), height + 10)


def _draw_solder_bridge(layers: _BoardLayers, rng: np.random.Generator) -> None:
    """Draws a solder bridge between two neighbours: traces of the bus, or leads of the large chip."""
    if rng.random() < 0.5:
        lane = int(rng.integers(len(_BUS_Y) - 1))
        x, first, last = rng.uniform(0.13, 0.19), _BUS_Y[lane], _BUS_Y[lane + 1]
        ends = ((x, first - 0.004), (x + rng.uniform(-0.006, 0.006), last + 0.004))
    else:
        position = 0.443 + _LEAD_PITCH * (rng.integers(-4, 3) + 0.5)
        edge = 0.443 + rng.choice([-1, 1]) * rng.uniform(0.120, 0.132)
        ends = ((position, edge), (position + _LEAD_PITCH, edge))
        if rng.random() < 0.5:
            ends = ((edge, position), (edge, position + _LEAD_PITCH))
    radius = rng.uniform(0.009, 0.013)
    for step in np.linspace(0, 1, 9):
        x, y = (ends[0][axis] * (1 - step) + ends[1][axis] * step + rng.normal(0, 0.0008) for axis in (0, 1))
        layers.draw_disc(
            (x, y), radius * (1 + 0.35 * abs(2 * step - 1)) * rng.uniform(0.9, 1.1), (198, 200, 202), 22, 235
        )


# Segment -> x and y of its two ends.
_SEGMENTS: dict[str, tuple[Point, Point]] = {
    **{"a": ((0, 0), (1, 0)), "b": ((1, 0), (1, 1)), "c": ((1, 1), (1, 2)), "d": ((0, 2), (1, 2))},
    **{"e": ((0, 1), (0, 2)), "f": ((0, 0), (0, 1)), "g": ((0, 1), (1, 1))},
}
_SEGMENTS_OF_DIGIT = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


def _draw_digits(
    layers: _BoardLayers, text: str, corner: Point, half_height: float, colour: Colour = _SILK, height: int = 0
) -> None:
    """Draws digits of seven segments. They need no font file, so the image is the same on every machine.

    Args:
        layers: Layers to draw on.
        text: Digits.
        corner: x and y of the top left corner.
        half_height: Height of half a digit, in board widths.
        colour: RGB colour.
        height: Height above the board, 0 to 255.
    """
    for index, digit in enumerate(text):
        left_x = corner[0] + index * half_height * 1.45
        for segment in _SEGMENTS_OF_DIGIT[int(digit)]:
            segment_ends = _SEGMENTS[segment]
            ends = [(left_x + x * half_height * 0.9, corner[1] + y * half_height * 0.9) for x, y in segment_ends]
            layers.draw_line(ends, 0.0038, colour, height)


def _draw_cloth_texture(size: int, angle: float) -> FloatImage:
    """Returns the texture of the glass cloth under the solder mask.

    Args:
        size: Side of the image in pixels.
        angle: Rotation of the board in radians.

    Returns:
        (size, size), in [-2, 2].
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    return np.asarray(np.sin(u * 2 * np.pi * 62) + np.sin(v * 2 * np.pi * 62), dtype=np.float32)
