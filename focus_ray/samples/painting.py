"""Light, camera, noise and shapes: the image operations that all sample parts use."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

FloatImage = NDArray[Any]  # (S, S) or (S, S, 3), float32; S is the side of the supersampled image in pixels
Point = tuple[float, float]  # (x, y)
Points = list[Point]
Colour = tuple[int, int, int]  # RGB, 0 to 255

SUPERSAMPLING = 2  # parts are drawn at twice the size; `simulate_camera_sensor` averages blocks of 2 by 2 pixels


def compute_reflection(
    slope_x: FloatImage, slope_y: FloatImage, light: tuple[float, float, float], shininess: int
) -> tuple[FloatImage, FloatImage]:
    """Returns Lambert's diffuse and Blinn's specular reflection of a surface that is seen from above.

    Args:
        slope_x, slope_y: (S, S), slope of the surface along x and y.
        light: Unit vector from the surface to the light.
        shininess: Exponent of Blinn's term: a higher value gives a smaller highlight.

    Returns:
        diffuse, specular: (S, S) each, in [0, 1].
    """
    norm = np.sqrt(slope_x**2 + slope_y**2 + 1)
    half = compute_halfway_vector(light)
    diffuse = np.maximum(-slope_x * light[0] - slope_y * light[1] + light[2], 0) / norm
    specular = np.exp(shininess * np.log(np.maximum(half[2] - slope_x * half[0] - slope_y * half[1], 1e-3) / norm))
    return diffuse, specular


def compute_light_direction(azimuth: float, elevation: float) -> tuple[float, float, float]:
    """Returns the unit vector (x, y, z) to a light. Azimuth and elevation are in radians."""
    return (math.cos(azimuth) * math.cos(elevation), math.sin(azimuth) * math.cos(elevation), math.sin(elevation))


def compute_halfway_vector(light: tuple[float, float, float]) -> tuple[float, float, float]:
    """Returns the unit vector halfway between the light and the camera, which looks straight down."""
    norm = math.hypot(light[0], light[1], light[2] + 1)
    return light[0] / norm, light[1] / norm, (light[2] + 1) / norm


def simulate_camera_sensor(picture: FloatImage, rng: np.random.Generator, gain: Any, gamma: float = 1.0) -> FloatImage:
    """Returns the image that a camera sees: averaged over blocks of 2 by 2 pixels, amplified, with gamma and noise.

    Args:
        picture: (S, S, 3), linear light.
        rng: Source of the sensor noise.
        gain: Exposure: a number, or (3,) for one factor per colour channel.
        gamma: The averaged light is raised to 1 / gamma.

    Returns:
        (S / 2, S / 2, 3), about [0, 1].
    """
    small = 0.25 * (picture[::2, ::2] + picture[1::2, ::2] + picture[::2, 1::2] + picture[1::2, 1::2])
    small = gain * np.maximum(small, 0) ** (1 / gamma)
    return np.asarray(small + 0.006 * rng.standard_normal(small.shape, np.float32), np.float32)


def convert_to_uint8(picture: FloatImage) -> NDArray[np.uint8]:
    """Returns an image with values in [0, 1] as uint8 in [0, 255]; values outside are clipped."""
    return np.clip(np.round(picture * 255), 0, 255).astype(np.uint8)


def apply_smooth_step(distance: FloatImage, width: Any) -> FloatImage:
    """Returns a smooth step: 0 for negative and 1 for positive distances, with a cubic transition around 0.

    Args:
        distance: Any shape.
        width: Width of the transition, a number or an array, in the unit of `distance`.
    """
    t = np.clip(distance / width + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def draw_noise(rng: np.random.Generator, size: int, cell: float) -> FloatImage:
    """Returns (size, size) smooth random noise: normal values on a coarse grid, enlarged bicubically.

    Args:
        rng: Source of the values.
        size: Side of the result in pixels.
        cell: Distance between grid points, as a share of the image width.
    """
    knots = max(2, round(1 / cell))
    coarse = Image.fromarray(rng.standard_normal((knots, knots), np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def blur_at_quarter_resolution(image: FloatImage, sigma_px: float) -> FloatImage:
    """Returns the (S, S) image after a Gaussian blur at a quarter of the resolution: fast, and good enough for shadows."""
    size = image.shape[0]
    full_size = Image.fromarray(np.ascontiguousarray(image, dtype=np.float32))
    blurred = np.asarray(full_size.resize((size // 4, size // 4), Image.Resampling.BOX))
    blurred = ndimage.gaussian_filter(blurred, sigma_px / 4)
    return np.asarray(Image.fromarray(blurred).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)


def shift_image(image: FloatImage, down_px: float, right_px: float) -> FloatImage:
    """Returns the (H, W) image moved by whole pixels. Fills the uncovered border with zeros.

    Args:
        image: (H, W).
        down_px: Shift down, rounded to whole pixels; negative values move up.
        right_px: Shift to the right, rounded to whole pixels; negative values move left.
    """
    down, right = round(down_px), round(right_px)
    height, width = image.shape
    moved = np.zeros_like(image)
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = image[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return moved


def make_bent_line_points(rng: np.random.Generator, middle: NDArray[np.float64], length: float) -> Points:
    """Returns 40 points of a slightly bent and slightly shaky line.

    Args:
        rng: Source of the direction, the bend and the shake.
        middle: (2,), x and y of the middle of the line.
        length: Length of the line, in the unit of `middle`.
    """
    heading = rng.uniform(0, 2 * np.pi)
    t = np.linspace(-0.5, 0.5, 40)
    bend = rng.uniform(-0.35, 0.35) * t**2 * 2 + np.cumsum(rng.normal(0, 0.004, size=t.size))
    x = middle[0] + length * (t * np.cos(heading) - bend * np.sin(heading))
    y = middle[1] + length * (t * np.sin(heading) + bend * np.cos(heading))
    return list(zip(x.tolist(), y.tolist(), strict=True))


def draw_antialiased_line(size: int, points: Points, width_px: float) -> FloatImage:
    """Returns a (size, size) anti-aliased line through points, in [0, 1].

    Args:
        size: Side of the image in pixels.
        points: (x, y) of the line in pixels.
        width_px: Width of the line if `size` is 512; the width scales with `size`.
    """
    canvas = Image.new("L", (size * 2, size * 2))
    ImageDraw.Draw(canvas).line(
        [(2 * x, 2 * y) for x, y in points], fill=255, width=max(2, round(width_px * size / 256))
    )
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255


def draw_stain(rng: np.random.Generator, size: int, centre: NDArray[np.float64], radius: float) -> FloatImage:
    """Returns a (size, size) stain in [0, 1]: an uneven disc with soft edges and an uneven inside.

    Args:
        rng: Source of the shape.
        size: Side of the image in pixels.
        centre: (2,), x and y of the centre, as shares of the image width.
        radius: Radius of the disc, as a share of the image width.
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    stretch, axis_angle = rng.uniform(0.65, 1.5), rng.uniform(0, np.pi)
    u = (x - centre[0]) * np.cos(axis_angle) + (y - centre[1]) * np.sin(axis_angle)
    v = (y - centre[1]) * np.cos(axis_angle) - (x - centre[0]) * np.sin(axis_angle)
    distance = np.hypot(u / stretch, v * stretch) / radius
    roughness = 0.22 * draw_noise(rng, size, radius * 0.9) + 0.10 * draw_noise(rng, size, radius * 0.35)
    return apply_smooth_step((1 - distance + roughness).astype(np.float32), np.float32(0.35)) * np.clip(
        0.85 + 0.15 * draw_noise(rng, size, radius * 0.5), 0, 1
    )
