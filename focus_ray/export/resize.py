"""How an image comes to the frame, in tensors: to the last digit what `data.framing` does with Pillow.

Pillow resizes one side after the other. A pixel is the sum of some of the side's pixels, weighted by a triangle whose weights
are whole numbers of 22 bits, and is rounded to 8 bits after each side. All of that fits 32-bit integers, so no runtime rounds
otherwise. OpenVINO (2026.4) sums and divides 32-bit integers as float32, so sums and dividends stay below 2^24.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from focus_ray.data.framing import SCORED, Frame

_BITS = 22  # of Pillow's weights
_LOW = 2**6  # weights are summed in two parts, weight // _LOW and weight % _LOW, each sum below 2^24
_STEPS = (
    6,
    6,
    5,
    5,
)  # bits of a weight that are worked out at a time, so that a step stays below 2^31: see `longest_side`


class Weights(NamedTuple):
    """places: (n, T), pixels of the side that each of n pixels is made of.  weights: (n, T) int32, of sum 2^22."""

    places: Tensor
    weights: Tensor


class ToFrame(nn.Module):
    """uint8 images (B, H, W, 3) of one size -> what the network sees, what of it is scored, and where the image lies in it."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.height, self.width, self.pads = frame.height, frame.width, frame.resize == "pad"
        self.region: Tensor | None
        region = None if frame.region is None else torch.from_numpy(frame.region)
        self.register_buffer("region", region)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """
        Returns: (B, 3, height, width) float in 0..1; (height, width) bool, what is scored, None: all; top, left, height and
            width (4,) int32 of the image in the frame, None where it fills it.
        """
        tall, wide = images.shape[1], images.shape[2]
        if not self.pads:
            across = _weights_of(wide, _number(self.width), torch.arange(self.width, dtype=torch.int32), self.width)
            down = _weights_of(tall, _number(self.height), torch.arange(self.height, dtype=torch.int32), self.height)
            return _pixels(images, across, down), self.region, None
        height, width = _fitted(tall, wide, self.height, self.width)
        top, left = (self.height - height) // 2, (self.width - width) // 2
        rows, columns = _mirrored(self.height, top, height), _mirrored(self.width, left, width)
        # a pixel of the image stands for at most so many of the file: a side is at least two thirds of its share
        most = (tall - 1) // self.height + (wide - 1) // self.width + 2
        across = _weights_of(wide, width, columns, 1, 2 * most)
        down = _weights_of(tall, height, rows, 1, 2 * most)
        inside = _inside(self.height, top, height)[:, None] & _inside(self.width, left, width)
        if self.region is not None:
            inside = inside & self._region_at(height, width, rows, columns)
        return _pixels(images, across, down), inside, torch.stack([top, left, height, width])

    def _region_at(self, height: Tensor, width: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The region (height, width), stretched to the image's place in the frame."""
        assert self.region is not None
        drawn = (self.region.to(torch.uint8) * SCORED)[None, :, :, None]
        across = _weights_of(self.width, width, columns, 1, self.width)
        down = _weights_of(self.height, height, rows, 1, self.height)
        return _resized(_resized(drawn, 2, across), 1, down)[0, :, :, 0] >= 128


def _pixels(images: Tensor, across: Weights, down: Weights) -> Tensor:
    found = _resized(_resized(images, 2, across), 1, down)
    return found.permute(0, 3, 1, 2).to(torch.float32) / 255.0


def _resized(images: Tensor, side: int, by: Weights) -> Tensor:
    """One side of images (B, H, W, C), 8 bits -> int32, as it is rounded."""
    count, taps = by.places.shape
    near = images.index_select(side, by.places.flatten()).to(torch.int32)
    shape = list(images.shape)
    near = near.reshape(*shape[:side], count, taps, *shape[side + 1 :])
    weights = by.weights.reshape(count, taps, *[1] * (len(shape) - side - 1))
    high = (near * (weights // _LOW)).sum(dim=side + 1, dtype=torch.int32)
    low = (near * (weights % _LOW)).sum(dim=side + 1, dtype=torch.int32)
    # (high * _LOW + low + 2^21) // 2^22, without numbers above 2^24
    return (high + (low + 2 ** (_BITS - 1)) // _LOW) // (2**_BITS // _LOW)


def _weights_of(length: int, out: Tensor, numbers: Tensor, out_px: int, most: int | None = None) -> Weights:
    """Of the pixels `numbers` (n,) of a side that is resized from `length` to `out` pixels.

    Args:
        out: int32 scalar.  out_px: a number that it is at least.  most: pixels of the side in one of the new; None: by `out_px`.
    """
    taps = 2 * ((length - 1) // out_px + 1 if most is None else most) + 1
    longer = out.clamp_min(length)
    # places and weights are multiples of 1 / (2 out) pixels, so that they are whole numbers
    first = ((2 * numbers + 1) * length - 2 * longer + out).clamp_min(0) // (2 * out)
    places = first[:, None] + torch.arange(taps, dtype=torch.int32)
    away = (2 * places + 1) * out - ((2 * numbers + 1) * length)[:, None]
    triangle = (2 * longer - away.abs()).clamp_min(0) * (places < length).to(torch.int32)
    high, low = (part.sum(dim=1, keepdim=True, dtype=torch.int32) for part in (triangle // _LOW, triangle % _LOW))
    total = high * _LOW + low
    weights, rest = torch.zeros_like(triangle), triangle
    for bits in _STEPS:
        rest = rest * 2**bits
        digit = rest // total
        weights = weights * 2**bits + digit
        rest = (
            rest - digit * total
        )  # a digit that a runtime rounded up leaves a negative rest, which the next digit takes back
    weights = weights + (2 * rest >= total).to(torch.int32)
    return Weights(places.clamp_max(length - 1), weights)


def _fitted(tall: int, wide: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Height and width, int32 scalars, of an image scaled to fit the frame; halves are rounded to even, as Python does."""
    narrow = _number(wide) * height <= _number(tall) * width  # the height is what limits it
    height_then = torch.where(narrow, _number(height), _rounded(_number(tall) * width, _number(wide)))
    width_then = torch.where(narrow, _rounded(_number(wide) * height, _number(tall)), _number(width))
    return height_then.clamp_min(1), width_then.clamp_min(1)


def _rounded(above: Tensor, below: Tensor) -> Tensor:
    """above / below, whole numbers, rounded."""
    found = (2 * above + below) // (2 * below)
    halves = ((2 * above + below) % (2 * below) == 0) & (found % 2 == 1)
    return found - halves.to(torch.int32)


def _mirrored(length: int, start: Tensor, size: Tensor) -> Tensor:
    """(length,) int32: the pixel of an image of `size` that each of the frame's shows, where the image begins at `start`."""
    turns = (torch.arange(length, dtype=torch.int32) - start + 2 * length * size) % (2 * size)
    return torch.minimum(turns, 2 * size - 1 - turns)


def _inside(length: int, start: Tensor, size: Tensor) -> Tensor:
    numbers = torch.arange(length, dtype=torch.int32)
    return (numbers >= start) & (numbers < start + size)


def _number(value: int) -> Tensor:
    return torch.full((), value, dtype=torch.int32)
