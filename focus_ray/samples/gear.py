"""The sample part `gear`: a steel gear that lies at any angle on a mat."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from focus_ray.samples.painting import (
    SUPERSAMPLING,
    FloatImage,
    apply_smooth_step,
    blur_at_quarter_resolution,
    compute_halfway_vector,
    compute_light_direction,
    compute_reflection,
    draw_antialiased_line,
    draw_noise,
    draw_stain,
    make_bent_line_points,
    shift_image,
    simulate_camera_sensor,
)

_NUM_TEETH = 20
_NUM_BOLTS = 5
_ROOT, _DEPTH = 0.352, 0.062  # radius of the root of the teeth, and depth of the teeth, in image widths
_BOLT_CIRCLE, _BOLT_RADIUS = 0.205, 0.031


def draw_gear(rng: np.random.Generator, size_px: int, defect: str | None, attempt: int) -> FloatImage:
    """Draws a steel gear: a toothed rim, a recessed web with bolt holes, and a hub with bore and keyway.

    The same `rng` state gives the same gear with and without a defect: the defect draws from a generator of its own.

    Args:
        rng: Source of everything except the defect.
        size_px: Side of the image in pixels.
        defect: One of the defect types of `write.CATEGORIES`; None for a good gear.
        attempt: Number that selects another random defect for the same gear.

    Returns:
        (size_px, size_px, 3), about [0, 1].
    """
    size = size_px * SUPERSAMPLING
    defect_rng = np.random.default_rng([int(rng.integers(2**31)), attempt])
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
    gear_angle = np.mod(np.arctan2(dy, dx) - np.float32(angle), np.float32(2 * np.pi))  # angle in the frame of the gear
    gx = dx * math.cos(angle) + dy * math.sin(angle)
    gy = dy * math.cos(angle) - dx * math.sin(angle)
    edge = np.float32(1.0 / size)

    # Outline: trapezoid teeth. Division by sqrt(1 + slope^2) makes a distance of the radial difference.
    wave = 0.5 + 1.35 * np.cos(_NUM_TEETH * gear_angle)
    outline = _ROOT + _DEPTH * np.clip(wave, 0, 1)
    slope = np.where(
        (wave > 0) & (wave < 1), _DEPTH * 1.35 * _NUM_TEETH * np.abs(np.sin(_NUM_TEETH * gear_angle)) / radius, 0
    )
    if defect == "broken_tooth":
        tooth = int(defect_rng.integers(_NUM_TEETH)) * 2 * np.pi / _NUM_TEETH
        tooth_angle = np.mod(gear_angle - tooth + np.pi, 2 * np.pi) - np.pi
        roughness = draw_noise(defect_rng, size, 0.02) * 0.010
        level = (
            _ROOT
            + _DEPTH * defect_rng.uniform(0.02, 0.6)
            + tooth_angle * radius * defect_rng.uniform(-0.6, 0.6)
            + roughness
        )
        outline = np.where(
            np.abs(tooth_angle) < np.pi / _NUM_TEETH, np.minimum(outline, np.maximum(level, _ROOT - 0.004)), outline
        )
    inside = (outline - radius) / np.sqrt(1 + slope**2)  # distance to the outline in image widths, > 0 in the metal
    metal = apply_smooth_step(inside, edge)

    # Holes: bolts on a circle, the bore, and a keyway. The keyway makes the orientation of the gear unique.
    sector = 2 * math.pi / _NUM_BOLTS
    bolt = np.floor(np.mod(gear_angle, np.float32(2 * np.pi)) / sector)
    bolt_angle = gear_angle - (bolt + 0.5) * sector  # a hole in the middle of each sector
    holes = _BOLT_RADIUS - np.hypot(radius * np.cos(bolt_angle) - _BOLT_CIRCLE, radius * np.sin(bolt_angle))
    if defect == "missing_hole":
        holes[bolt == defect_rng.integers(_NUM_BOLTS)] = -1.0
    keyway = np.minimum(0.014 - np.abs(gy), np.minimum(gx, 0.078 - gx))
    holes = np.maximum(holes, np.maximum(0.060 - radius, keyway))
    hole_mask = apply_smooth_step(holes, edge)

    # Heights in pixels of a supersampled image of 512 pixels.
    blend = np.float32(0.006)
    rim, hub = apply_smooth_step(radius - 0.292, blend), apply_smooth_step(0.122 - radius, blend)
    groove = apply_smooth_step(0.004 - np.abs(radius - 0.327), np.float32(0.003))
    height = (
        9 * apply_smooth_step(inside - 0.004, blend)
        + 7 * rim
        + 10 * hub
        - 2.5 * groove
        - 12 * apply_smooth_step(holes + 0.004, blend)
    )
    marks = apply_smooth_step(0.006 - np.hypot(gx - 0.098, np.abs(gy) - 0.016), np.float32(0.004))  # two punched marks
    height -= 2.5 * marks
    cast = 1 - np.clip(rim + hub, 0, 1)
    height += cast * (0.35 * draw_noise(rng, size, 0.008) + 0.8 * draw_noise(rng, size, 0.05))

    # Reflectivity and gloss of the metal, then the defects of its surface.
    steel = np.array([0.60, 0.61, 0.63], np.float32)
    albedo: FloatImage = (1 + 0.05 * draw_noise(rng, size, 0.12) + 0.04 * draw_noise(rng, size, 0.012)) * (
        1 - 0.28 * cast
    )
    gloss: FloatImage = 1 - 0.75 * cast
    scratch, stain = None, None
    if defect == "scratch":
        scratch_angle, scratch_radius = defect_rng.uniform(0, 2 * np.pi), defect_rng.uniform(0.10, 0.30)
        centre_px = size * (centre + scratch_radius * zoom * np.array([np.cos(scratch_angle), np.sin(scratch_angle)]))
        scratch = draw_antialiased_line(
            size,
            make_bent_line_points(defect_rng, centre_px, size * defect_rng.uniform(0.14, 0.28)),
            defect_rng.uniform(3.2, 5.0),
        )
        height -= defect_rng.uniform(2.0, 3.2) * ndimage.gaussian_filter(scratch, 0.8)
    if defect == "contamination":
        stain_angle, stain_radius = defect_rng.uniform(0, 2 * np.pi), defect_rng.uniform(0.13, 0.34)
        stain_cover = draw_stain(
            defect_rng,
            size,
            centre + stain_radius * zoom * np.array([np.cos(stain_angle), np.sin(stain_angle)]),
            defect_rng.uniform(0.032, 0.06),
        )
        colour = np.array(
            [[0.20, 0.13, 0.07], [0.10, 0.10, 0.11], [0.42, 0.22, 0.10]][defect_rng.integers(3)], np.float32
        )
        stain = (stain_cover * defect_rng.uniform(0.7, 0.95), colour)
        gloss = gloss * (1 - 0.8 * stain_cover)

    # Slopes of the surface, with the fine circular marks of a lathe on all faces that are not cast.
    slope_y, slope_x = np.gradient(height)
    lathe_marks = (
        rng.normal(size=900).astype(np.float32)[np.minimum(radius * 1100, 899).astype(np.int32)] * 0.16 * (1 - cast)
    )
    slope_x += lathe_marks * cos_phi
    slope_y += lathe_marks * sin_phi
    if scratch is not None:
        gloss = gloss * (1 - 0.5 * scratch)
        albedo = albedo * (1 + 0.9 * scratch)

    light = compute_light_direction(azimuth, elevation)
    diffuse, specular = compute_reflection(slope_x, slope_y, light, 30)
    halfway = compute_halfway_vector(light)
    across_light = halfway[1] * cos_phi - halfway[0] * sin_phi
    # Faces from a lathe shine in the shape of a bow tie towards the light.
    bow_tie = np.maximum(1 - across_light**2 * 6, 0) ** 2 * (1 - cast)
    shade = 0.30 + 0.72 * diffuse - 0.012 * np.clip(blur_at_quarter_resolution(height, 0.02 * size) - height, 0, 20)
    shine = gloss * (0.30 * specular + 0.16 * bow_tie)

    # The mat under the gear, with the shadow of the gear.
    mat = 1 + 0.10 * draw_noise(rng, size, 0.006) + 0.06 * draw_noise(rng, size, 0.3)
    mat *= 1 + 0.35 * (dx * math.cos(azimuth) + dy * math.sin(azimuth))
    solid = metal * (1 - hole_mask)
    shadow_offset = -0.022 * size
    shadow = shift_image(
        blur_at_quarter_resolution(solid, 0.014 * size),
        shadow_offset * math.sin(azimuth),
        shadow_offset * math.cos(azimuth),
    )
    mat *= (1 - 0.65 * np.clip(shadow, 0, 1)) * (1 - 0.45 * hole_mask) * (1 - solid)
    ground = np.array([0.165, 0.18, 0.20], np.float32)
    picture = np.empty((size, size, 3), np.float32)
    for channel in range(3):
        body = albedo * steel[channel]
        if stain is not None:
            body += stain[0] * (stain[1][channel] - body)
        picture[..., channel] = (body * shade + shine) * solid + mat * ground[channel]
    return simulate_camera_sensor(picture, rng, gain=exposure)
