"""Light, film, noise and shapes that the painters share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

Field = NDArray[Any]  # (S, S) or (S, S, 3), float32
Points = list[tuple[float, float]]

SUPERSAMPLING = 2  # sensor averages blocks of 2 by 2


def lambert_and_blinn(
    slope_x: Field, slope_y: Field, light: tuple[float, float, float], shininess: int
) -> tuple[Field, Field]:
    """Lambert's and Blinn's terms of a surface seen from above, both in [0, 1]."""
    norm = np.sqrt(slope_x**2 + slope_y**2 + 1)
    half = halfway(light)
    diffuse = np.maximum(-slope_x * light[0] - slope_y * light[1] + light[2], 0) / norm
    specular = np.exp(shininess * np.log(np.maximum(half[2] - slope_x * half[0] - slope_y * half[1], 1e-3) / norm))
    return diffuse, specular


def direction(azimuth: float, elevation: float) -> tuple[float, float, float]:
    return (
        math.cos(azimuth) * math.cos(elevation),
        math.sin(azimuth) * math.cos(elevation),
        math.sin(elevation),
    )


def halfway(light: tuple[float, float, float]) -> tuple[float, float, float]:
    """The unit vector between the light and the camera, which looks straight down."""
    norm = math.hypot(light[0], light[1], light[2] + 1)
    return light[0] / norm, light[1] / norm, (light[2] + 1) / norm


def sensor(picture: Field, rng: np.random.Generator, gain: Any, gamma: float = 1.0) -> Field:
    """Averages the supersampled picture down and adds the camera's response and noise."""
    small = 0.25 * (picture[::2, ::2] + picture[1::2, ::2] + picture[::2, 1::2] + picture[1::2, 1::2])
    small = gain * np.maximum(small, 0) ** (1 / gamma)
    return np.asarray(small + 0.006 * rng.standard_normal(small.shape, np.float32), np.float32)


def develop(picture: Field) -> NDArray[np.uint8]:
    return np.clip(np.round(picture * 255), 0, 255).astype(np.uint8)


def cover(distance: Field, width: Any) -> Field:
    """1 where distance > 0, 0 where it is < 0, smooth over `width`."""
    t = np.clip(distance / width + 0.5, 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def noise(rng: np.random.Generator, size: int, cell: float) -> Field:
    """Smooth noise of unit deviation at its knots, which lie `cell` widths apart."""
    knots = max(2, round(1 / cell))
    coarse = Image.fromarray(rng.standard_normal((knots, knots), np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)


def blur(field: Field, sigma_px: float) -> Field:
    """A Gaussian blur done at a quarter of the resolution: for soft shadows."""
    size = field.shape[0]
    whole = Image.fromarray(np.ascontiguousarray(field, dtype=np.float32))
    soft = np.asarray(whole.resize((size // 4, size // 4), Image.Resampling.BOX))
    soft = ndimage.gaussian_filter(soft, sigma_px / 4)
    return np.asarray(Image.fromarray(soft).resize((size, size), Image.Resampling.BILINEAR), dtype=np.float32)


def shifted(field: Field, down_px: float, right_px: float) -> Field:
    """Moved by whole pixels, zeros coming in."""
    down, right = round(down_px), round(right_px)
    height, width = field.shape
    moved = np.zeros_like(field)
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = field[
        max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
    ]
    return moved


def curve(rng: np.random.Generator, middle: NDArray[np.float64], length: float) -> Points:
    """A slightly bent, slightly shaky line about its middle."""
    along = rng.uniform(0, 2 * np.pi)
    t = np.linspace(-0.5, 0.5, 40)
    bend = rng.uniform(-0.35, 0.35) * t**2 * 2 + np.cumsum(rng.normal(0, 0.004, size=t.size))
    x = middle[0] + length * (t * np.cos(along) - bend * np.sin(along))
    y = middle[1] + length * (t * np.sin(along) + bend * np.cos(along))
    return list(zip(x.tolist(), y.tolist(), strict=True))


def stroke(size: int, points: Points, width_px: float) -> Field:
    """A line of round width, anti-aliased, in [0, 1]. The width is for a supersampled picture of 512."""
    canvas = Image.new("L", (size * 2, size * 2))
    ImageDraw.Draw(canvas).line(
        [(2 * x, 2 * y) for x, y in points], fill=255, width=max(2, round(width_px * size / 256))
    )
    return np.asarray(canvas.reduce(2), dtype=np.float32) / 255


def blob(rng: np.random.Generator, size: int, at: NDArray[np.float64], radius: float) -> Field:
    """A stain: an uneven disc with soft edges and an uneven inside, in [0, 1]."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    stretch, along = rng.uniform(0.65, 1.5), rng.uniform(0, np.pi)
    u = (x - at[0]) * np.cos(along) + (y - at[1]) * np.sin(along)
    v = (y - at[1]) * np.cos(along) - (x - at[0]) * np.sin(along)
    distance = np.hypot(u / stretch, v * stretch) / radius
    rough = 0.22 * noise(rng, size, radius * 0.9) + 0.10 * noise(rng, size, radius * 0.35)
    return cover((1 - distance + rough).astype(np.float32), np.float32(0.35)) * np.clip(
        0.85 + 0.15 * noise(rng, size, radius * 0.5), 0, 1
    )
