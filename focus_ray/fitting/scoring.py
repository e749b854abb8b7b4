"""Detector: network + channel reduction + density -> anomaly maps and scores of a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.config import ScoringConfig
from focus_ray.density.base import Density
from focus_ray.density.tiles import Tiles
from focus_ray.fitting.profile import Profile, scored_only
from focus_ray.fitting.spread import Spread
from focus_ray.model.alignment.theta import invert_theta, warp
from focus_ray.model.network import Aligned, FocusNet, common_frame, seen_mask
from focus_ray.model.reduction import ChannelReduction

# Images a forward pass on a CPU: ResNet-18 at 224 px takes 5.8 ms an image at 4 to 8, 7.1 at 16, 7.8 at 32 (two cores of
# an EPYC with 32 MiB of cache).
_CPU_IMAGES = 8
_GPU_IMAGES_ALIKE = 32
_GPU_IMAGES = 256  # bounds the memory of a batch of many tiles


class Scored(NamedTuple):
    """score (B,): the map's maximum [kin], or against the profile of good images.

    anomaly_map (B, H, W): in the frame of the images that were given.
    descriptors (B, P, K): as `describe` gives them, where they were asked for.

    If no place of an image can be inspected, its score is nan and its map is 0.
    """

    score: Tensor
    anomaly_map: Tensor
    descriptors: Tensor | None = None


class Detector:
    """Everything that turns images into scores; knows nothing of files, thresholds or Ray."""

    def __init__(
        self,
        net: FocusNet,
        reduction: ChannelReduction,
        density: Density,
        scoring: ScoringConfig,
        profile: Profile | None = None,
    ) -> None:
        """profile: what image scores are held against; None: they are the map's maximum."""
        self.profile = profile
        self.profiled: Tensor | None = None  # the distances that it was taken from, where it was fitted here
        self.net, self.reduction, self.density, self.scoring = net.eval(), reduction.eval(), density, scoring
        self.seen = seen_mask(net, density.height, density.width)
        self.tiles = Tiles.from_config(net.config)
        places = density.height // self.tiles.rows
        self.spread = Spread.of(self.tiles, places, scoring.smoothing_sigma_px, density.device)

    @torch.inference_mode()
    def __call__(self, images: Tensor, describe: bool = False) -> Scored:
        """uint8 (B, H, W, 3 or 4) or float (B, 3, H, W) in 0..1, of the size that images are brought to -> `Scored`."""
        device = self.density.device
        embedding, theta = embed(self.net, self.reduction, to_images(images, device))
        scored = self.score_embedding(embedding, theta, shown_in(images, device))
        if not describe:
            return scored
        return scored._replace(descriptors=describe_embedding(descriptor_channels(embedding, self.reduction)))

    @torch.inference_mode()
    def judge(self, aligned: Aligned, shown: Tensor | None = None) -> Scored:
        """What the network made of the tiles of B images -> `Scored`."""
        levels, theta = common_frame(aligned)
        return self.score_embedding(self.tiles.join(self.reduction(levels)), theta, shown)

    @torch.inference_mode()
    def score_embedding(self, embedding: Tensor, theta: Tensor | None, shown: Tensor | None = None) -> Scored:
        """What `embed` gave, and `shown_in` -> `Scored`."""
        distance = self.density.score(embedding)
        inspected = torch.ones_like(distance)
        if shown is not None:
            inspected = places_shown(shown, theta, self.tiles, distance.shape[1:]).to(distance.dtype)
        scored = self.score_distance(distance * inspected, theta, shown=shown)
        return scored._replace(score=score_if_inspected(scored.score, scored_only(inspected, theta, self.seen)))

    @torch.inference_mode()
    def score_distance(
        self, distance: Tensor, theta: Tensor | None, profile: Profile | None = None, shown: Tensor | None = None
    ) -> Scored:
        """What a density made of embeddings (B, H, W), and theta (B, 2, 3) or None -> `Scored`.

        Args: profile: in place of its own.  shown: (B, H, W) bool, pixels of the images, outside which distances are 0.
        """
        profile = profile or self.profile
        # what lies outside the image is made up, and what training hardly saw is not known
        distance = scored_only(distance, theta, self.seen)
        aligned_map = self.spread(distance)
        score = aligned_map.flatten(1).amax(dim=1) if profile is None else profile.score(distance, self.spread)
        if theta is not None:
            aligned_map = warp(aligned_map[:, None], invert_theta(theta), "zeros")[:, 0]
        return Scored(score, aligned_map if shown is None else aligned_map * shown)


def score_if_inspected(score: Tensor, inspected: Tensor) -> Tensor:
    """Scores (B,), nan where none of the places (B, H, W), 0 or 1, is inspected: such an image must not count as normal."""
    return torch.where(inspected.flatten(1).amax(dim=1) > 0, score, float("nan"))


def share_a_pass(first: Detector, second: Detector) -> bool:
    """Whether one backbone pass can serve both: the very same backbone, nothing moved between its layers, one size."""
    one, other = first.net, second.net
    return (
        one.backbone is other.backbone
        and one.compiled is other.compiled
        and not len(one.feature_aligners)
        and not len(other.feature_aligners)
        and one.config.image_size_px == other.config.image_size_px
    )


@torch.inference_mode()
def score_together(parts: Sequence[tuple[Detector, Tensor]]) -> list[Scored]:
    """Scores images of several categories in one pass through the backbone that they share.

    Each category's images are aligned by its own aligner before the pass, and reduced and judged by its own reduction
    and density after it: the results are those of each detector alone, up to rounding.

    Args:
        parts: detectors of which every two `share_a_pass`, each with its images as `Detector.__call__` takes them.

    Returns: one `Scored` a part, in order.
    """
    if len(parts) == 1:
        return [parts[0][0](parts[0][1])]
    assert all(share_a_pass(parts[0][0], detector) for detector, _ in parts)
    aligned = [
        detector.net.align_image(detector.tiles.cut(to_images(images, detector.density.device)))
        for detector, images in parts
    ]
    passes = [parts[0][0].net.features(part) for part in slices(torch.cat([image for image, _ in aligned]))]
    levels, nothing = (
        tuple(torch.cat(level) for level in zip(*(found for found, _ in passes), strict=True)),
        passes[0][1],
    )
    sizes = [len(image) for image, _ in aligned]
    split = zip(*(level.split(sizes) for level in levels), strict=True)
    return [
        detector.judge(Aligned(own, nothing, image, theta), shown_in(images, detector.density.device))
        for (detector, images), own, (image, theta) in zip(parts, split, aligned, strict=True)
    ]


def to_images(batch: Tensor, device: torch.device | str) -> Tensor:
    """uint8 (B, H, W, 3 or 4) -> float (B, 3, H, W) in 0..1, channels-last in memory; a float batch passes as it is."""
    batch = batch.to(device, non_blocking=True)
    if batch.dtype != torch.uint8:
        return batch
    return batch[..., :3].permute(0, 3, 1, 2).to(torch.float32).div_(255.0)


def shown_in(batch: Tensor, device: torch.device | str) -> Tensor | None:
    """(B, H, W) bool, what the fourth channel of a uint8 batch says is scored (`data.framing`); None without one: all."""
    if batch.dtype != torch.uint8 or batch.shape[3] < 4:
        return None
    return batch[..., 3].to(device) > 0


def pixels_shown(places: Tensor, theta: Tensor | None, tiles: Tiles) -> Tensor:
    """(B, H, W) bool, pixels of the images that places (B, H, W) of the aligned frame stand for, where these alone are known."""
    spread = Spread.of(tiles, places.shape[1] // tiles.rows, 0.0, places.device)
    found = spread(places.float())
    return (found if theta is None else warp(found[:, None], invert_theta(theta), "zeros")[:, 0]) >= 0.5


def places_shown(shown: Tensor, theta: Tensor | None, tiles: Tiles, size: Sequence[int]) -> Tensor:
    """(B, *size) bool: places, of the aligned frame and of all tiles, of which at least half is shown (B, H, W) in the images."""
    pixels = shown[:, None].float()
    if theta is not None:
        pixels = warp(pixels, theta, "zeros")
    each = F.adaptive_avg_pool2d(tiles.cut(pixels), (size[0] // tiles.rows, size[1] // tiles.columns))
    return tiles.join(each)[:, 0] >= 0.5


def embed(
    net: FocusNet, reduction: ChannelReduction, images: Tensor, alike: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Images (B, 3, H, W) in 0..1 -> embedding (B, C, H/stride, W/stride) in the aligned frame, theta (B, 2, 3) or None.

    Of images in tiles, the places of the tiles lie side by side. Arguments as of `embed_tiles`.
    """
    tiles = Tiles.from_config(net.config)
    embedding, theta = embed_tiles(net, reduction, tiles.cut(images), alike)
    return tiles.join(embedding), theta


def embed_tiles(
    net: FocusNet, reduction: ChannelReduction, images: Tensor, alike: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`embed` of images, or tiles of them, that have the size of the network's input. For inference.

    Args:
        alike: so many at a time, always, the last of them with fillers. The last digits hang on how many there are, and what is
            chosen by them, a nearest neighbour or a coreset, is then the same with any number of workers.
    """
    embeddings: list[Tensor] = []
    thetas: list[Tensor] = []
    at_once = _CPU_IMAGES if images.device.type == "cpu" else _GPU_IMAGES_ALIKE
    for part in images.split(at_once) if alike else slices(images):
        count = len(part)
        if alike and count < at_once:
            part = torch.cat([part, part[:1].expand(at_once - count, *part.shape[1:])])
        levels, theta = common_frame(net(part))
        embeddings.append(reduction(levels)[:count])
        if theta is not None:
            thetas.append(theta[:count])
    return _joined(embeddings), _joined(thetas) if thetas else None


GRID = 8  # cells of a descriptor along each side; a shift by a few pixels hardly changes the average over a cell


def describe_embedding(embedding: Tensor) -> Tensor:
    """Descriptors of images from their embeddings (N, C, H, W), any float type -> (N, GRID * GRID, C) float32."""
    return F.adaptive_avg_pool2d(embedding.float(), GRID).flatten(2).transpose(1, 2).contiguous()


def descriptor_channels(embedding: Tensor, reduction: ChannelReduction) -> Tensor:
    """The channels (N, K, H, W) of an embedding (N, C + K, H, W) that descriptors are made of.

    These are the channels of the coreset, which do not depend on a learnt metric; all channels where there is no coreset.
    """
    return embedding[:, reduction.num_channels :] if reduction.num_coreset_channels else embedding


def slices(images: Tensor) -> tuple[Tensor, ...]:
    """A batch as a network takes it for inference: on a CPU a few images at a time, whose activations stay in its caches."""
    return images.split(_CPU_IMAGES if images.device.type == "cpu" else _GPU_IMAGES)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
