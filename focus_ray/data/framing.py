"""How a photograph is brought to the size that is scored, and what of it is: stretched or padded, with a region of interest.

Where something is not to be scored, filler beside an image that keeps its shape or what lies outside a region, a decoded image
carries a fourth channel that marks what is. Images go through shards, streams and batches with it; the network sees three.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from focus_ray.errors import DataError

SHOWN = 255  # in the fourth channel: scored; 0: not


class Box(NamedTuple):
    """Where an image lies in its frame, pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def inside(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


class Places(NamedTuple):
    """The squares of a frame that the places of an anomaly map stand for, of all tiles.

    tops, lefts: (rows,) and (columns,) first pixel of each row and column of places.  side_px: of a square.
    """

    tops: NDArray[np.int64]
    lefts: NDArray[np.int64]
    side_px: int

    def any_inside(self, shown: NDArray[np.bool_]) -> bool:
        """Returns whether at least half of any square lies in the pixels (height, width): else no place is scored."""
        sums = np.pad(shown, ((1, 0), (1, 0))).cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
        bottoms, rights = self.tops + self.side_px, self.lefts + self.side_px
        upper, lower = sums[self.tops], sums[bottoms]
        counts = lower[:, rights] - lower[:, self.lefts] - upper[:, rights] + upper[:, self.lefts]
        return bool((2 * counts >= self.side_px**2).any())


class Frame:
    """The size that every image of a category is brought to, and how.

    Attributes:
        height, width: pixels.
        resize: stretch to the frame, or pad: scaled to fit, in the middle, and mirrored outwards to fill it.
        region: (height, width) bool, what is scored of an image that is stretched to that size; None: all of it.
        places: of the anomaly map. An image that covers none of them is refused; None: only one without a pixel to score is.
    """

    def __init__(
        self,
        height: int,
        width: int,
        resize: Literal["stretch", "pad"] = "stretch",
        region: NDArray[np.bool_] | None = None,
        places: Places | None = None,
    ) -> None:
        if min(height, width) < 1:
            raise ValueError(f"size_px={min(height, width)} must be at least 1")
        assert region is None or region.shape == (height, width)
        self.height, self.width, self.resize, self.region, self.places = height, width, resize, region, places
        self._shown: dict[Box, NDArray[np.uint8]] = {}

    @property
    def marks(self) -> bool:
        """Whether decoded images have the fourth channel."""
        return self.resize == "pad" or self.region is not None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a decoded image, (H, W, 3) or (H, W, 4)."""
        return self.height, self.width, 4 if self.marks else 3

    def box(self, width: int, height: int) -> Box:
        """Where an image of `width` x `height` pixels lies."""
        if self.resize == "stretch":
            return Box(0, 0, self.height, self.width)
        scale = min(self.width / width, self.height / height)
        tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
        return Box((self.height - tall) // 2, (self.width - wide) // 2, tall, wide)

    def place(self, image: Image.Image, width: int, height: int) -> NDArray[np.uint8]:
        """A decoded image, grey or RGB, whose file has `width` x `height` pixels -> uint8 of `shape`.

        Raises: DataError: nothing of the image can be scored.
        """
        box = self.check_size(width, height)
        # one side after the other: which comes first moves some pixels by a grey level, and Pillow 13 chooses for itself
        for size in ((box.width, image.height), (box.width, box.height)):
            if image.size != size:
                image = image.resize(size, Image.Resampling.BILINEAR)
        pixels = np.array(image.convert("RGB"), dtype=np.uint8)  # last: grey is resized as one channel
        if pixels.shape[:2] != (self.height, self.width):
            below, right = self.height - box.top - box.height, self.width - box.left - box.width
            pixels = np.pad(pixels, ((box.top, below), (box.left, right), (0, 0)), mode="symmetric")
        if self.marks:
            pixels = np.concatenate([pixels, self.shown(box)[..., None]], axis=2)
        return pixels

    def check_size(self, width: int, height: int) -> Box:
        """Returns where an image of `width` x `height` pixels lies.

        Raises: DataError: nothing of the image can be scored; the message tells the remedy.
        """
        box = self.box(width, height)
        if not self.marks or self._is_scored(self.shown(box) > 0):
            return box
        whole = np.zeros((self.height, self.width), np.bool_)
        whole[box.inside] = True
        place = "pixel" if self.places is None else f"place of the anomaly map ({self.places.side_px} px square)"
        size = f"the image of {width} x {height} pixels becomes {box.width} x {box.height} px"
        frame = f"in the frame of {self.width} x {self.height} px"
        if self._is_scored(whole):
            reason = f"its region of interest is too thin or too small there for any {place}"
            remedy = "enlarge data.regions"
        else:
            reason = f"too thin for any {place}"
            remedy = "cut the image into parts that are less thin"
        if self.resize == "pad":
            remedy += ", or train with a larger model.image_size_px or with model.resize=stretch"
        raise DataError(f"{size} {frame}, {reason}, so nothing would be inspected: {remedy}")

    def _is_scored(self, shown: NDArray[np.bool_]) -> bool:
        return bool(shown.any()) if self.places is None else self.places.any_inside(shown)

    def shown(self, box: Box) -> NDArray[np.uint8]:
        """(height, width), the fourth channel of an image that lies there."""
        if box not in self._shown:
            found = np.zeros((self.height, self.width), np.uint8)
            region = self.region_at(box.height, box.width)
            found[box.inside] = SHOWN if region is None else region * np.uint8(SHOWN)
            self._shown[box] = found
        return self._shown[box]

    def region_at(self, height: int, width: int) -> NDArray[np.bool_] | None:
        """The region (height, width) in an image of that size; None: all of it."""
        if self.region is None or self.region.shape == (height, width):
            return self.region
        drawn = Image.fromarray(self.region.astype(np.uint8) * np.uint8(255))
        return np.asarray(drawn.resize((width, height), Image.Resampling.BILINEAR)) >= 128

    def inside(self, anomaly_map: NDArray[np.float32]) -> NDArray[np.float32]:
        """An image's own map (H, W) -> the pixels that count, (1, n) of the region or all as they are."""
        region = self.region_at(*anomaly_map.shape)
        return anomaly_map if region is None else anomaly_map[region][None]

    def crop(self, anomaly_map: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
        """A map (height, width) of the frame -> that of the image of `width` x `height` pixels alone."""
        return anomaly_map[self.box(width, height).inside]
