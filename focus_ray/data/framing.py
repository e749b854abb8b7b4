"""Resizes photographs to the input size of the network, by stretching or padding, and marks the pixels that are scored.

The resized image is called the frame. Some of its pixels are not scored: padding beside an image that keeps its aspect ratio,
and pixels outside a region of interest. In that case a decoded image has a fourth channel that marks the scored pixels. Shards,
streams and batches contain this channel too; the network gets only the first three channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from focus_ray.errors import DataError

SCORED = 255  # value of scored pixels in the fourth channel; all other pixels have 0


class ImageRectangle(NamedTuple):
    """The rectangle, in pixels, that an image covers in the frame (the image array at the input size of the network)."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """The row slice and the column slice of the rectangle, to index an array that has the height and width of the frame."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


class AnomalyMapCells(NamedTuple):
    """The squares of image pixels that the values of the anomaly map belong to. Each value ("cell") describes one square.

    If the image is divided into tiles, the squares of all tiles are included. Positions are pixels of the frame, the image at
    the input size of the network.

    Attributes:
        tops: (rows,) first pixel row of each row of cells.
        lefts: (columns,) first pixel column of each column of cells.
        side_px: side of a square.
    """

    tops: NDArray[np.int64]
    lefts: NDArray[np.int64]
    side_px: int

    def has_scored_cell(self, scored: NDArray[np.bool_]) -> bool:
        """Returns whether at least one cell of the anomaly map is scored, i.e. at least half of its square is scored.

        Args: scored: (height, width) bool, True at the scored pixels of the frame.
        """
        # Summed-area table: the number of scored pixels in a square is a combination of the sums at its four corners.
        sums = np.pad(scored, ((1, 0), (1, 0))).cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
        bottoms, rights = self.tops + self.side_px, self.lefts + self.side_px
        sums_above, sums_below = sums[self.tops], sums[bottoms]
        counts = sums_below[:, rights] - sums_below[:, self.lefts] - sums_above[:, rights] + sums_above[:, self.lefts]
        return bool((2 * counts >= self.side_px**2).any())


@dataclass(eq=False)
class InputFrame:
    """The target size of all images of a category, the resizing method, and the region of interest. All images get this size.

    Attributes:
        height, width: size of the network's input, in pixels.
        resize: "stretch" fills the frame and changes the aspect ratio. "pad" keeps the aspect ratio: it scales the image to fit,
            centres it, and fills the remaining pixels by mirroring.
        region: (height, width) bool, the scored pixels of an image that is stretched to the frame; None scores all pixels.
        cells: the squares that the values of the anomaly map describe. An image without a scored square is refused. None refuses
            an image only if it has no scored pixel.
    """

    height: int
    width: int
    resize: Literal["stretch", "pad"] = "stretch"
    region: NDArray[np.bool_] | None = None
    cells: AnomalyMapCells | None = None
    _scored_channels: dict[ImageRectangle, NDArray[np.uint8]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1:
            raise ValueError(f"size_px={min(self.height, self.width)} must be at least 1")

    @property
    def has_scored_channel(self) -> bool:
        """Whether decoded images have a fourth channel, which marks the scored pixels. False if all pixels are scored."""
        return self.resize == "pad" or self.region is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of a decoded image: (H, W, 3), or (H, W, 4) with the channel that marks the scored pixels."""
        return self.height, self.width, 4 if self.has_scored_channel else 3

    def compute_image_rectangle(self, width: int, height: int) -> ImageRectangle:
        """Returns the rectangle that an image covers in the frame (the array at the network's input size) after resizing.

        Args: width, height: size of the original image, in pixels.
        """
        if self.resize == "stretch":
            return ImageRectangle(0, 0, self.height, self.width)
        scale = min(self.width / width, self.height / height)
        box_height, box_width = max(1, round(height * scale)), max(1, round(width * scale))
        return ImageRectangle((self.height - box_height) // 2, (self.width - box_width) // 2, box_height, box_width)

    def resize_image(self, image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
        """Resizes a decoded image to the network's input size ("frame"). Pads it and adds the channel of scored pixels if needed.

        Padding is needed if `resize` is "pad", see `InputFrame`.

        Args:
            image: grey or RGB; the decoder may already have reduced it.
            width, height: size of the original image, in pixels.

        Returns:
            uint8 of `shape`.

        Raises:
            DataError: no pixel of the image can be scored.
        """
        box = self.require_scored_pixels(width, height)
        # Resize one side after the other: the order changes some pixels by one grey level, and Pillow 13 chooses it itself.
        for size in ((box.width, image.height), (box.width, box.height)):
            if image.size != size:
                image = image.resize(size, Image.Resampling.BILINEAR)
        pixels = np.array(image.convert("RGB"), dtype=np.uint8)  # after resizing, which is faster with one grey channel
        if pixels.shape[:2] != (self.height, self.width):
            below, right = self.height - box.top - box.height, self.width - box.left - box.width
            pixels = np.pad(pixels, ((box.top, below), (box.left, right), (0, 0)), mode="symmetric")
        if self.has_scored_channel:
            pixels = np.concatenate([pixels, self.make_scored_channel(box)[..., None]], axis=2)
        return pixels

    def require_scored_pixels(self, width: int, height: int) -> ImageRectangle:
        """Checks that at least one pixel of an image of this size is scored.

        Args: width, height: size of the original image, in pixels.

        Returns: the rectangle that the image covers in the frame, the array at the network's input size.

        Raises: DataError: nothing of the image can be scored, see `InputFrame.cells`. The message gives the remedy.
        """
        box = self.compute_image_rectangle(width, height)
        if not self.has_scored_channel or self._has_scored_cell(self.make_scored_channel(box) > 0):
            return box
        # Find the reason: would the image be scored without the region of interest?
        whole_image = np.zeros((self.height, self.width), np.bool_)
        whole_image[box.slices] = True
        cell = "pixel" if self.cells is None else f"place of the anomaly map ({self.cells.side_px} px square)"
        size = f"the image of {width} x {height} pixels becomes {box.width} x {box.height} px"
        frame = f"in the frame of {self.width} x {self.height} px"
        if self._has_scored_cell(whole_image):
            reason = f"its region of interest is too thin or too small there for any {cell}"
            remedy = "enlarge data.regions"
        else:
            reason = f"too thin for any {cell}"
            remedy = "cut the image into parts that are less thin"
        if self.resize == "pad":
            remedy += ", or train with a larger model.image_size_px or with model.resize=stretch"
        raise DataError(f"{size} {frame}, {reason}, so nothing would be inspected: {remedy}")

    def _has_scored_cell(self, scored: NDArray[np.bool_]) -> bool:
        """Returns whether at least one cell of the anomaly map (without `cells`: one pixel) is scored.

        Args: scored: (height, width) bool, True at the scored pixels of the frame.
        """
        return bool(scored.any()) if self.cells is None else self.cells.has_scored_cell(scored)

    def make_scored_channel(self, box: ImageRectangle) -> NDArray[np.uint8]:
        """Returns the fourth channel of an image that covers the rectangle `box`: `SCORED` at scored pixels, 0 elsewhere.

        The array is (height, width), uint8, and cached: do not change it.
        """
        if box not in self._scored_channels:
            channel = np.zeros((self.height, self.width), np.uint8)
            region = self.resize_region(box.height, box.width)
            channel[box.slices] = SCORED if region is None else region * np.uint8(SCORED)
            self._scored_channels[box] = channel
        return self._scored_channels[box]

    def resize_region(self, height: int, width: int) -> NDArray[np.bool_] | None:
        """Returns the region of interest as a bool mask, resized to (height, width); None if there is no region of interest."""
        if self.region is None or self.region.shape == (height, width):
            return self.region
        mask = Image.fromarray(self.region.astype(np.uint8) * np.uint8(255))
        return np.asarray(mask.resize((width, height), Image.Resampling.BILINEAR)) >= 128

    def select_scored_values(self, anomaly_map: NDArray[np.float32]) -> NDArray[np.float32]:
        """Returns the values of an anomaly map inside the region of interest.

        Args: anomaly_map: (H, W), of the image without padding.

        Returns:
            (1, n) values inside the region of interest, or the map itself, (H, W), if there is no region of interest.
        """
        region = self.resize_region(*anomaly_map.shape)
        return anomaly_map if region is None else anomaly_map[region][None]

    def crop_padding(self, anomaly_map: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
        """Cuts the padding off an anomaly map: returns the rectangle that the image covers in the network's input.

        Args:
            anomaly_map: (H, W), of the size of the frame.
            width, height: size of the original image, in pixels.
        """
        return anomaly_map[self.compute_image_rectangle(width, height).slices]
