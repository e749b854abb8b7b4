"""Resizes images to the frame, the input size of the network, with tensor operations that can be exported.

`data.framing`, which uses Pillow, gives exactly the same pixels.

Pillow resizes one side after the other. An output pixel is a weighted sum of input pixels along the side. The weights form a
triangle and are integers of 22 bits. The sum is rounded to 8 bits after each side. 32-bit integers hold all intermediate
values, so every runtime gives the same result. OpenVINO (2026.4) sums and divides 32-bit integers as float32, so all sums and
dividends stay below 2^24.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from focus_ray.data.framing import SCORED, InputFrame

_WEIGHT_BITS = 22  # number of bits of Pillow's weights
# products with weight // _LOW_BASE and with weight % _LOW_BASE are summed separately, to keep each sum below 2^24
_LOW_BASE = 2**6
# number of weight bits that each division step computes, so that its dividend stays below 2^31: see `compute_max_image_side_px`
_STEP_BITS = (6, 6, 5, 5)


class ResizeWeights(NamedTuple):
    """The input pixels, and their weights, of each of n output pixels along the height or the width.

    Attributes:
        input_pixels: (n, T) int32, indices of the T input pixels whose weighted sum is the output pixel.
        weights: (n, T) int32, in units of 2^-22. Each weight is rounded, so a row sums to about 2^22.
    """

    input_pixels: Tensor
    weights: Tensor


class ResizeToFrame(nn.Module):
    """A torch module that resizes uint8 images (B, H, W, 3) of one size to the frame, the input size of the network.

    It returns the resized pixels, a mask of the scored pixels, and the box of the images in the frame.
    """

    def __init__(self, frame: InputFrame) -> None:
        super().__init__()
        self.height, self.width, self.has_padding = frame.height, frame.width, frame.resize == "pad"
        self.region: Tensor | None
        region = None if frame.region is None else torch.from_numpy(frame.region)
        self.register_buffer("region", region)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Resizes uint8 images (B, H, W, 3) to the frame, the input size of the network.

        Returns:
            Pixels (B, 3, height, width), float in 0..1.
            Scored pixels (height, width), bool; None if all pixels are scored.
            Box (4,) int32 of the images in the frame: top, left, height and width; None if the frame has no padding.
        """
        image_height, image_width = images.shape[1], images.shape[2]
        if not self.has_padding:
            column_weights = _compute_all_resize_weights(image_width, self.width)
            row_weights = _compute_all_resize_weights(image_height, self.height)
            return _resize_to_float_pixels(images, column_weights, row_weights), self.region, None
        height, width = _compute_fitted_size(image_height, image_width, self.height, self.width)
        top, left = (self.height - height) // 2, (self.width - width) // 2
        rows, columns = (
            _compute_mirrored_indices(self.height, top, height),
            _compute_mirrored_indices(self.width, left, width),
        )
        # Bound on the number of input pixels per output pixel: rounding leaves a side at least two thirds of its exact length.
        max_inputs = (image_height - 1) // self.height + (image_width - 1) // self.width + 2
        column_weights = _compute_resize_weights(image_width, width, columns, 2 * max_inputs)
        row_weights = _compute_resize_weights(image_height, height, rows, 2 * max_inputs)
        inside = _mark_image_pixels(self.height, top, height)[:, None] & _mark_image_pixels(self.width, left, width)
        if self.region is not None:
            inside = inside & self._resize_region(height, width, rows, columns)
        return (
            _resize_to_float_pixels(images, column_weights, row_weights),
            inside,
            torch.stack([top, left, height, width]),
        )

    def _resize_region(self, height: Tensor, width: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Resizes the region of interest to the scaled image, and places it where the image lies in the network's input.

        Args:
            height, width: size of the scaled image, int32 scalars.
            rows, columns: row of the scaled image in each row of the network's input, and the same for columns, from
                `_compute_mirrored_indices`.

        Returns: mask of the network's input, bool, True in the region. It is also True in mirrored copies of the region.
        """
        assert self.region is not None
        region_pixels = (self.region.to(torch.uint8) * SCORED)[None, :, :, None]
        column_weights = _compute_resize_weights(self.width, width, columns, self.width)
        row_weights = _compute_resize_weights(self.height, height, rows, self.height)
        return _resize_dimension(_resize_dimension(region_pixels, 2, column_weights), 1, row_weights)[0, :, :, 0] >= 128


def _resize_to_float_pixels(images: Tensor, column_weights: ResizeWeights, row_weights: ResizeWeights) -> Tensor:
    """Resizes uint8 images (B, H, W, 3) to float pixels (B, 3, height, width) in 0..1.

    As in Pillow, the images are resized along the width first, and then along the height.
    """
    resized = _resize_dimension(_resize_dimension(images, 2, column_weights), 1, row_weights)
    return resized.permute(0, 3, 1, 2).to(torch.float32) / 255.0


def _resize_dimension(images: Tensor, side: int, resize_weights: ResizeWeights) -> Tensor:
    """Resizes the height or the width of 8-bit images (B, H, W, C).

    Args: side: dimension to resize: 1 for the height or 2 for the width.

    Returns: the images as int32, rounded to values of 0 to 255.
    """
    count, taps = resize_weights.input_pixels.shape
    inputs = images.index_select(side, resize_weights.input_pixels.flatten()).to(torch.int32)
    shape = list(images.shape)
    inputs = inputs.reshape(*shape[:side], count, taps, *shape[side + 1 :])
    weights = resize_weights.weights.reshape(count, taps, *[1] * (len(shape) - side - 1))
    high_sum = (inputs * (weights // _LOW_BASE)).sum(dim=side + 1, dtype=torch.int32)
    low_sum = (inputs * (weights % _LOW_BASE)).sum(dim=side + 1, dtype=torch.int32)
    # equals (high_sum * _LOW_BASE + low_sum + 2^21) // 2^22, but no intermediate value exceeds 2^24
    return (high_sum + (low_sum + 2 ** (_WEIGHT_BITS - 1)) // _LOW_BASE) // (2**_WEIGHT_BITS // _LOW_BASE)


def _compute_all_resize_weights(length: int, num_outputs: int) -> ResizeWeights:
    """Computes the input pixels and weights of all output pixels, to resize a height or width from `length` to `num_outputs`."""
    numbers = torch.arange(num_outputs, dtype=torch.int32)
    return _compute_resize_weights(length, _make_scalar_tensor(num_outputs), numbers, (length - 1) // num_outputs + 1)


def _compute_resize_weights(length: int, num_outputs: Tensor, numbers: Tensor, max_inputs: int) -> ResizeWeights:
    """Computes the input pixels and weights of some output pixels, to resize a height or width from `length` to `num_outputs`.

    Args:
        num_outputs: int32 scalar.
        numbers: (n,) int32, indices of the output pixels.
        max_inputs: an integer of at least `length` / `num_outputs`, known when the module is traced. Each output pixel is a sum
            of 2 * max_inputs + 1 input pixels; some weights may be 0.
    """
    taps = 2 * max_inputs + 1
    longer = num_outputs.clamp_min(length)
    # In units of 1 / (2 num_outputs) input pixels, all positions and weights are integers.
    first = ((2 * numbers + 1) * length - 2 * longer + num_outputs).clamp_min(0) // (2 * num_outputs)
    input_pixels = first[:, None] + torch.arange(taps, dtype=torch.int32)
    distance = (2 * input_pixels + 1) * num_outputs - ((2 * numbers + 1) * length)[:, None]
    triangle = (2 * longer - distance.abs()).clamp_min(0) * (input_pixels < length).to(torch.int32)
    high, low = (
        part.sum(dim=1, keepdim=True, dtype=torch.int32) for part in (triangle // _LOW_BASE, triangle % _LOW_BASE)
    )
    total = high * _LOW_BASE + low
    # Long division of 2^22 * triangle by total, a few bits per step, then rounding.
    weights, remainder = torch.zeros_like(triangle), triangle
    for bits in _STEP_BITS:
        remainder = remainder * 2**bits
        digit = remainder // total
        weights = weights * 2**bits + digit
        # a runtime may round a digit up; the remainder is then negative, and the next digit corrects it
        remainder = remainder - digit * total
    weights = weights + (2 * remainder >= total).to(torch.int32)
    return ResizeWeights(input_pixels.clamp_max(length - 1), weights)


def _compute_fitted_size(image_height: int, image_width: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns height and width, int32 scalars, of an image after scaling to the largest size that fits into `height` x `width`.

    The aspect ratio stays the same up to rounding. A half is rounded to the nearest even number. A side has at least 1 pixel.
    """
    full_height, full_width = _make_scalar_tensor(image_height), _make_scalar_tensor(image_width)
    is_limited_by_height = full_width * height <= full_height * width  # the height limits the scale
    scaled_height = _divide_and_round(full_height * width, full_width)
    scaled_width = _divide_and_round(full_width * height, full_height)
    fitted_height = torch.where(is_limited_by_height, _make_scalar_tensor(height), scaled_height)
    fitted_width = torch.where(is_limited_by_height, scaled_width, _make_scalar_tensor(width))
    return fitted_height.clamp_min(1), fitted_width.clamp_min(1)


def _divide_and_round(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Returns numerator / denominator as a rounded integer; a half is rounded to the nearest even number."""
    quotient = (2 * numerator + denominator) // (2 * denominator)
    halves = ((2 * numerator + denominator) % (2 * denominator) == 0) & (quotient % 2 == 1)
    return quotient - halves.to(torch.int32)


def _compute_mirrored_indices(length: int, start: Tensor, size: Tensor) -> Tensor:
    """Returns, for each of `length` pixels along a side, the index of the image pixel that it shows, (length,) int32.

    The image covers `size` of the pixels, beginning at pixel `start`. Pixels outside the image show the mirrored image.
    """
    positions = (torch.arange(length, dtype=torch.int32) - start + 2 * length * size) % (2 * size)
    return torch.minimum(positions, 2 * size - 1 - positions)


def _mark_image_pixels(length: int, start: Tensor, size: Tensor) -> Tensor:
    """Returns a mask (length,) bool: True for pixels inside an image that begins at pixel `start` and has `size` pixels."""
    numbers = torch.arange(length, dtype=torch.int32)
    return (numbers >= start) & (numbers < start + size)


def _make_scalar_tensor(value: int) -> Tensor:
    """Returns an integer as an int32 tensor without dimensions."""
    return torch.full((), value, dtype=torch.int32)
