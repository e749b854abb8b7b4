"""A gear that lies at any angle on a mat."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from focus_ray.samples.painting import (
    SUPERSAMPLING,
    Field,
    blob,
    blur,
    cover,
    curve,
    direction,
    halfway,
    lambert_and_blinn,
    noise,
    sensor,
    shifted,
    stroke,
)

_TEETH = 20
_BOLTS = 5
_ROOT, _DEPTH = 0.352, 0.062  # radii in image widths
_BOLT_CIRCLE, _BOLT_RADIUS = 0.205, 0.031


def draw_gear(rng: np.random.Generator, size_px: int, defect: str | None, attempt: int) -> Field:
    """A turned steel gear: toothed rim, recessed web with bolt holes, hub with bore and keyway. (S, S, 3) in [0, 1]."""
    size = size_px * SUPERSAMPLING
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
        jag = noise(trouble, size, 0.02) * 0.010
        level = _ROOT + _DEPTH * trouble.uniform(0.02, 0.6) + off * radius * trouble.uniform(-0.6, 0.6) + jag
        outline = np.where(np.abs(off) < np.pi / _TEETH, np.minimum(outline, np.maximum(level, _ROOT - 0.004)), outline)
    inside = (outline - radius) / np.sqrt(1 + slope**2)  # > 0 in the metal, in widths
    metal = cover(inside, edge)

    # Holes: bolts on a circle, the bore and its keyway, which gives the gear one upright position.
    sector = 2 * math.pi / _BOLTS
    bolt = np.floor(np.mod(turned, np.float32(2 * np.pi)) / sector)
    around = turned - (bolt + 0.5) * sector  # a hole in the middle of each sector
    holes = _BOLT_RADIUS - np.hypot(radius * np.cos(around) - _BOLT_CIRCLE, radius * np.sin(around))
    if defect == "missing_hole":
        holes[bolt == trouble.integers(_BOLTS)] = -1.0
    keyway = np.minimum(0.014 - np.abs(gy), np.minimum(gx, 0.078 - gx))
    holes = np.maximum(holes, np.maximum(0.060 - radius, keyway))
    open_ = cover(holes, edge)

    # Heights in pixels of the supersampled picture, as if it were 512 wide.
    soft = np.float32(0.006)
    rim, hub = cover(radius - 0.292, soft), cover(0.122 - radius, soft)
    groove = cover(0.004 - np.abs(radius - 0.327), np.float32(0.003))
    height = 9 * cover(inside - 0.004, soft) + 7 * rim + 10 * hub - 2.5 * groove - 12 * cover(holes + 0.004, soft)
    height -= 2.5 * cover(0.006 - np.hypot(gx - 0.098, np.abs(gy) - 0.016), np.float32(0.004))  # two punched marks
    cast = 1 - np.clip(rim + hub, 0, 1)
    height += cast * (0.35 * noise(rng, size, 0.008) + 0.8 * noise(rng, size, 0.05))

    steel = np.array([0.60, 0.61, 0.63], np.float32)
    albedo: Field = (1 + 0.05 * noise(rng, size, 0.12) + 0.04 * noise(rng, size, 0.012)) * (1 - 0.28 * cast)
    gloss: Field = 1 - 0.75 * cast
    scratch, stain = None, None
    if defect == "scratch":
        at, start = trouble.uniform(0, 2 * np.pi), trouble.uniform(0.10, 0.30)
        centre_px = size * (centre + start * zoom * np.array([np.cos(at), np.sin(at)]))
        scratch = stroke(size, curve(trouble, centre_px, size * trouble.uniform(0.14, 0.28)), trouble.uniform(3.2, 5.0))
        height -= trouble.uniform(2.0, 3.2) * ndimage.gaussian_filter(scratch, 0.8)
    if defect == "contamination":
        at, far = trouble.uniform(0, 2 * np.pi), trouble.uniform(0.13, 0.34)
        spot = blob(
            trouble, size, centre + far * zoom * np.array([np.cos(at), np.sin(at)]), trouble.uniform(0.032, 0.06)
        )
        colour = np.array([[0.20, 0.13, 0.07], [0.10, 0.10, 0.11], [0.42, 0.22, 0.10]][trouble.integers(3)], np.float32)
        stain = (spot * trouble.uniform(0.7, 0.95), colour)
        gloss = gloss * (1 - 0.8 * spot)

    slope_y, slope_x = np.gradient(height)
    lathe = rng.normal(size=900).astype(np.float32)[np.minimum(radius * 1100, 899).astype(np.int32)] * 0.16 * (1 - cast)
    slope_x += lathe * cos_phi
    slope_y += lathe * sin_phi
    if scratch is not None:
        gloss = gloss * (1 - 0.5 * scratch)
        albedo = albedo * (1 + 0.9 * scratch)

    light = direction(azimuth, elevation)
    diffuse, specular = lambert_and_blinn(slope_x, slope_y, light, 30)
    half = halfway(light)
    across = half[1] * cos_phi - half[0] * sin_phi
    bow = np.maximum(1 - across**2 * 6, 0) ** 2 * (1 - cast)  # turned faces shine in a bow tie towards the light
    shade = 0.30 + 0.72 * diffuse - 0.012 * np.clip(blur(height, 0.02 * size) - height, 0, 20)
    shine = gloss * (0.30 * specular + 0.16 * bow)

    mat = 1 + 0.10 * noise(rng, size, 0.006) + 0.06 * noise(rng, size, 0.3)
    mat *= 1 + 0.35 * (dx * math.cos(azimuth) + dy * math.sin(azimuth))
    solid = metal * (1 - open_)
    fall = -0.022 * size
    shadow = shifted(blur(solid, 0.014 * size), fall * math.sin(azimuth), fall * math.cos(azimuth))
    mat *= (1 - 0.65 * np.clip(shadow, 0, 1)) * (1 - 0.45 * open_) * (1 - solid)
    ground = np.array([0.165, 0.18, 0.20], np.float32)
    picture = np.empty((size, size, 3), np.float32)
    for channel in range(3):
        body = albedo * steel[channel]
        if stain is not None:
            body += stain[0] * (stain[1][channel] - body)
        picture[..., channel] = (body * shade + shine) * solid + mat * ground[channel]
    return sensor(picture, rng, gain=exposure)
