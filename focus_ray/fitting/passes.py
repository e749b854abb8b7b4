"""One pass over images each: alignment, statistics, validation, calibration."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from focus_ray.config import CalibrationConfig
from focus_ray.density.base import Statistics
from focus_ray.density.moments import Moments
from focus_ray.density.nearest import to_bank_rows
from focus_ray.density.tiles import Tiles, split_maps
from focus_ray.evaluation.calibration import CalibrationBuilder, Method
from focus_ray.evaluation.selection import validation_figures
from focus_ray.fitting.distributed import decided_by_first, gather_objects, gather_rows, reduce_moments
from focus_ray.fitting.metric import Known
from focus_ray.fitting.scoring import Detector, Scored, embed, places_shown, shown_in, to_images
from focus_ray.model.alignment.congealing import AlignmentReport, CongealingAligner
from focus_ray.model.network import FocusNet
from focus_ray.model.reduction import ChannelReduction


@torch.no_grad()  # not inference_mode: statistics are joined in place later
def statistics_pass(
    net: FocusNet,
    reduction: ChannelReduction,
    batches: Iterable[Tensor],
    device: torch.device,
    keep_positions: Container[int] | None = None,
    offset: int = 0,
    known: Known | None = None,
) -> Statistics:
    """Statistics of every image that any worker is given, the same on every worker after the call.

    Embeddings are added up batch by batch; only those of the chosen images are kept, for a memory.

    Args:
        keep_positions: numbers, over all workers, of the images whose embeddings are kept; None keeps none.
        offset: the number of this worker's first image.
        known: what this network made of some of them already.
    """
    net.eval()
    alike = reduction.num_coreset_channels > 0
    tiles = Tiles.from_config(net.config)

    def embedding_of(batch: Tensor, position: int) -> tuple[Tensor, Tensor | None]:
        rows = {} if known is None else known.row
        new = [number for number in range(len(batch)) if position + number not in rows]
        if len(new) == len(batch):
            return embed(net, reduction, to_images(batch, device), alike)
        assert known is not None
        old = [number for number in range(len(batch)) if position + number in rows]
        embedding, theta = known.embedding([position + number for number in old], reduction.projection)
        if new:
            others, moved = embed(net, reduction, to_images(batch[new], device), alike)
            order = torch.tensor(old + new).argsort().to(device)
            embedding = torch.cat([embedding, others])[order]
            theta = None if theta is None or moved is None else torch.cat([theta, moved])[order]
        return embedding, theta

    def embedded() -> Iterator[Embedded]:
        position = offset
        for batch in batches:
            embedding, theta = embedding_of(batch, position)
            position += len(batch)
            shown = shown_in(batch, device)
            if shown is not None:
                shown = places_shown(shown, theta, tiles, embedding.shape[2:]).flatten(1)
            yield Embedded(embedding, theta, shown)

    size = net.config.image_size_px // net.config.place_px(reduction.config)
    shared = net.config.shared_grid
    places = (size, size) if shared == tiles[:2] else (tiles.rows * size, tiles.columns * size)
    return embedding_statistics(embedded(), reduction, places, device, keep_positions, offset, shared)


class Embedded(NamedTuple):
    """What `scoring.embed` gives of B images, and (B, L) bool, which of their places are scored; None: all."""

    embedding: Tensor
    theta: Tensor | None
    shown: Tensor | None = None


@torch.no_grad()
def embedding_statistics(
    embedded: Iterable[Embedded],
    reduction: ChannelReduction,
    places: tuple[int, int],
    device: torch.device,
    keep_positions: Container[int] | None = None,
    offset: int = 0,
    shared: tuple[int, int] = (1, 1),
) -> Statistics:
    """As `statistics_pass`, of embeddings (B, channels, H, W) that are there already.

    Args: places: down and across, of the moments.  shared: rows and columns of the tiles that share them.
    """
    num_channels = reduction.num_channels
    moments = Moments(*places, num_channels, device)
    kept: list[Tensor] = []
    moved: list[Tensor] = []
    scored: list[Tensor] = []
    position = offset
    for embedding, theta, shown in embedded:
        moments.update(split_maps(embedding[:, :num_channels], *shared))
        if keep_positions is not None:
            chosen = [number for number in range(len(embedding)) if position + number in keep_positions]
            if chosen:
                kept.append(to_bank_rows(embedding[chosen]))
                if theta is not None:
                    moved.append(theta[chosen].float().cpu())
                if shown is not None:
                    scored.append(shown[chosen].byte().cpu())
        position += len(embedding)
    reduce_moments(moments)
    if keep_positions is None:
        return Statistics(moments, grid=shared)
    all_channels = num_channels + reduction.num_coreset_channels
    num_places = places[0] * places[1] * shared[0] * shared[1]
    bank = torch.cat(kept) if kept else torch.empty(0, num_places, all_channels, dtype=torch.float16)
    bank = gather_rows(bank, device)
    thetas = gather_rows(torch.cat(moved) if moved else torch.empty(0, 2, 3), device)
    shown = gather_rows(torch.cat(scored) if scored else torch.empty(0, num_places, dtype=torch.uint8), device) > 0
    return Statistics(moments, bank, thetas if len(thetas) else None, shown=shown if len(shown) else None, grid=shared)


@torch.inference_mode()
def aligner_pass(net: FocusNet, batches: Iterable[Tensor], device: torch.device, seed: int) -> AlignmentReport | None:
    """Fits a congealing aligner on the images of all workers, the same on every worker; None without one."""
    aligner = net.image_aligner
    if not isinstance(aligner, CongealingAligner):
        return None
    size = aligner.FINE_PX
    prepared = [aligner.prepare(to_images(batch, device)).cpu() for batch in batches]
    rows = gather_rows(torch.cat(prepared) if prepared else torch.empty(0, size, size), device)

    def fit() -> tuple[AlignmentReport, dict[str, Tensor]]:
        report = aligner.fit(rows.to(device), seed)
        return report, {name: value.cpu() for name, value in aligner.state_dict().items()}

    report, state = decided_by_first(fit)
    aligner.load_state_dict(state)
    return report


@torch.inference_mode()
def calibration_pass(
    detector: Detector,
    batches: Iterable[Tensor],
    config: CalibrationConfig,
    method: Method,
    device: torch.device,
    groups: NDArray[np.int64] | None = None,
) -> CalibrationBuilder:
    """Scores normal images that the detector's density has not seen; the workers' results are joined.

    Args: groups: (N,) group numbers of the images of all batches; None: every image shows a part of its own.
    """
    builder = CalibrationBuilder(method, config.target_fpr, config.target_pixel_fpr)
    done = 0
    for batch in batches:
        scored = detector(batch)
        of_batch = None if groups is None else groups[done : done + len(batch)]
        builder.add(scored.score.cpu().numpy(), pixels_that_count(scored, shown_in(batch, "cpu")), of_batch)
        done += len(batch)
    return joined_by_all(builder)


def pixels_that_count(scored: Scored, shown: Tensor | None) -> NDArray[np.float32] | list[NDArray[np.float32]]:
    """Maps as a calibration takes them: (B, H, W), or of each image (1, n) the pixels that are shown (B, H, W)."""
    maps: NDArray[np.float32] = scored.anomaly_map.cpu().numpy()
    if shown is None:
        return maps
    return [one[kept][None] for one, kept in zip(maps, shown.cpu().numpy(), strict=True)]


def joined_by_all(builder: CalibrationBuilder) -> CalibrationBuilder:
    """The builders of all workers, merged on every one."""
    first, *others = gather_objects(builder)
    for other in others:
        first = first.merge(other)
    return first


@torch.inference_mode()
def validation_pass(
    detector: Detector, images: NDArray[np.uint8], masks: NDArray[np.bool_], batch_size: int = 32
) -> dict[str, float]:
    """`selection.validation_figures` of the images of all workers, the same on every worker.

    Args:
        images: (N, H, W, 3 or 4) uint8 and masks: (N, H, W) bool, this worker's, from `selection.validation_images`.
    """
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    scores, maps = collect_scores((detector(torch.from_numpy(batch)) for batch in batches), masks.shape[1:])
    return validation_figures(
        *(np.concatenate(parts) for parts in zip(*gather_objects((masks, scores, maps)), strict=True))
    )


def collect_scores(
    scored: Iterable[Scored], size_px: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores (N,) and maps (N, *size_px) of all batches."""
    scores = [np.empty(0, np.float32)]
    maps = [np.empty((0, *size_px), np.float32)]
    for batch in scored:
        scores.append(batch.score.float().cpu().numpy())
        maps.append(batch.anomaly_map.float().cpu().numpy())
    return np.concatenate(scores), np.concatenate(maps)
