"""Inspector: a bundle and encoded images -> scores, p-values, verdicts, maps and regions; and the evaluation of a set.

Command line, evaluation, batch inspection and serving all go through it, so that they agree to the last digit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from focus_ray import metrics
from focus_ray.bundle import Bundle, read_bundle
from focus_ray.errors import DataError
from focus_ray.images import ImageInfo, decode_mask, read_batch
from focus_ray.scoring import fuse_batch_norms

MAX_SIDE_PX = 512  # maps and masks are compared at the mask's own size up to this


@dataclass(frozen=True)
class Region:
    """A connected area of the map above the pixel threshold.

    x, y, width, height: bounding box, pixels of the original image.  area: pixels.  peak: highest value of the map in it.
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float

    def to_dict(self) -> dict[str, float]:
        return dict(vars(self))


@dataclass(frozen=True)
class Inspection:
    """What is known of one image.

    score: higher is more anomalous.  p_value: conformal, see docs/CALIBRATION.md.  anomalous: the verdict.
    threshold: of the score.  pixel_threshold: of the map.  anomaly_map: (S, S), S the network's input size, in the
    image's own frame, stretched to a square.  regions: in pixels of the original, width x height.
    """

    score: float
    p_value: float
    anomalous: bool
    threshold: float
    pixel_threshold: float
    anomaly_map: NDArray[np.float32]
    width: int
    height: int
    regions: tuple[Region, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON types; without the map."""
        return {
            "score": self.score,
            "p_value": self.p_value,
            "anomalous": self.anomalous,
            "threshold": self.threshold,
            "pixel_threshold": self.pixel_threshold,
            "width": self.width,
            "height": self.height,
            "regions": [region.to_dict() for region in self.regions],
        }


class Inspector:
    """Scores encoded images with one bundle, on one device."""

    def __init__(
        self, bundle: Bundle, device: torch.device | str = "cpu", batch_size: int = 32, num_threads: int = 2
    ) -> None:
        """
        Args:
            batch_size: images a forward pass.  num_threads: that decode, beside the pass.
        """
        self.bundle, self.device, self.batch_size, self.num_threads = bundle, device, batch_size, num_threads
        self.size_px = bundle.config.model.image_size_px
        fuse_batch_norms(bundle.detector.net.backbone)

    @classmethod
    def load(cls, uri: str | Path, device: torch.device | str = "auto", **options: Any) -> Inspector:
        """Reads and verifies a bundle. device: 'auto' takes a GPU where there is one. Raises: BundleError."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(read_bundle(uri, device), device, **options)

    def score_batches(self, images: Iterable[bytes]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Scores (B,) and maps (B, S, S) batch by batch; the next batch is decoded while one is scored.

        Raises: DataError: an image cannot be decoded; its place in the stream is named.
        """
        for _, scores, maps in self._scored(images):
            yield scores, maps

    def _scored(
        self, images: Iterable[bytes]
    ) -> Iterator[tuple[list[ImageInfo], NDArray[np.float32], NDArray[np.float32]]]:
        stream = iter(images)
        with ThreadPoolExecutor(max_workers=1) as ahead:
            done = 0
            pending = ahead.submit(self._decode, list(islice(stream, self.batch_size)), done)
            while (decoded := pending.result()) is not None:
                infos, batch = decoded
                done += len(batch)
                pending = ahead.submit(self._decode, list(islice(stream, self.batch_size)), done)
                yield infos, *self.score(batch)

    def score(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """uint8 (B, S, S, 3), as `images.decode_batch` gives -> scores (B,) and maps (B, S, S)."""
        scored = self.bundle.detector(torch.from_numpy(batch))
        return scored.score.float().cpu().numpy(), scored.anomaly_map.float().cpu().numpy()

    def inspect(self, images: Sequence[bytes]) -> list[Inspection]:
        """Encoded images -> one `Inspection` each, in order. Raises: DataError: an image cannot be decoded."""
        found: list[Inspection] = []
        for infos, scores, maps in self._scored(images):
            for info, score, anomaly_map in zip(infos, scores, maps, strict=True):
                found.append(self.judge(float(score), anomaly_map, info.width, info.height))
        return found

    def judge(self, score: float, anomaly_map: NDArray[np.float32], width: int, height: int) -> Inspection:
        """Verdict, p-value and regions of a scored image of `width` x `height` pixels."""
        calibration = self.bundle.calibration
        regions = find_regions(anomaly_map, calibration.pixel_threshold, width, height)
        return Inspection(
            score=score,
            p_value=float(calibration.conformal_p_value(score)),
            anomalous=bool(calibration.is_anomalous(score)),
            threshold=calibration.image_threshold,
            pixel_threshold=calibration.pixel_threshold,
            anomaly_map=anomaly_map,
            width=width,
            height=height,
            regions=regions,
        )

    def evaluate(self, records: Iterable[Mapping[str, Any]], max_side_px: int = MAX_SIDE_PX) -> dict[str, Any]:
        """Metrics over labelled images; labels are compared with, never used to choose anything.

        Args:
            records: mappings with image and mask bytes (mask None: unknown, or normal), label, defect_type, width, height.
            max_side_px: maps and masks are compared at the image's size, at most this long a side.

        Returns: see `summarise`.  Raises: DataError: no record, or an image cannot be decoded.
        """
        kept: list[dict[str, Any]] = []

        def image_bytes() -> Iterator[bytes]:
            for record in records:
                kept.append({key: record[key] for key in ("label", "defect_type", "mask", "width", "height")})
                yield record["image"]

        scores: list[float] = []
        maps: list[NDArray[np.float32]] = []
        masks: list[NDArray[np.bool_] | None] = []
        for batch_scores, batch_maps in self.score_batches(image_bytes()):
            for score, anomaly_map in zip(batch_scores, batch_maps, strict=True):
                record = kept[len(scores)]
                height, width = evaluation_size(record["height"], record["width"], max_side_px)
                scores.append(float(score))
                maps.append(resize_map(anomaly_map, height, width))
                if record["mask"] is not None:
                    masks.append(decode_mask(record["mask"], height, width))
                else:
                    masks.append(None if record["label"] else np.zeros((height, width), dtype=bool))
                record["mask"] = None
        if not scores:
            raise DataError("there is no test image to evaluate: ingest a set that has some")
        labels = [int(record["label"]) for record in kept]
        types = [str(record["defect_type"]) for record in kept]
        return summarise(
            labels,
            types,
            scores,
            maps,
            masks,
            self.bundle.calibration.image_threshold,
            self.bundle.calibration.target_fpr,
        )

    def _decode(self, images: list[bytes], start: int) -> tuple[list[ImageInfo], NDArray[np.uint8]] | None:
        if not images:
            return None
        try:
            return read_batch(images, self.size_px, self.num_threads)
        except DataError as error:
            raise DataError(f"of images {start} to {start + len(images) - 1}: {error}") from error


def summarise(
    labels: Sequence[int],
    types: Sequence[str],
    scores: Sequence[float],
    maps: Sequence[NDArray[np.float32]],
    masks: Sequence[NDArray[np.bool_] | None],
    threshold: float,
    target_fpr: float,
) -> dict[str, Any]:
    """All metrics of one category; a metric that the set cannot give (one class only, no mask) is None.

    masks: None where an anomalous image has none; such an image counts in image metrics alone.
    """
    label = np.asarray(labels)
    score = np.asarray(scores)
    known = [index for index, mask in enumerate(masks) if mask is not None]
    both = 0 < label.sum() < len(label)
    anomalous = score > threshold
    result: dict[str, Any] = {
        "num_normal": int((label == 0).sum()),
        "num_anomalous": int((label == 1).sum()),
        "num_masks": sum(1 for index in known if label[index]),
        "image_auroc": metrics.image_auroc(label, score) if both else None,
        "image_average_precision": metrics.average_precision(label, score) if both else None,
        "image_f1_max": metrics.f1_max(label, score)[0] if both else None,
        "threshold": float(threshold),
        "target_fpr": float(target_fpr),
        "false_positive_rate": float(anomalous[label == 0].mean()) if (label == 0).any() else None,
        "recall": float(anomalous[label == 1].mean()) if (label == 1).any() else None,
    }
    result.update(_pixel_metrics([masks[i] for i in known], [maps[i] for i in known]))
    by_type: dict[str, Any] = {}
    for kind in sorted({kind for kind, value in zip(types, labels, strict=True) if value}):
        chosen = np.array([t == kind and bool(v) for t, v in zip(types, labels, strict=True)])
        use = chosen | (label == 0)
        with_mask = [index for index in known if chosen[index]]
        by_type[kind] = {
            "num_images": int(chosen.sum()),
            "image_auroc": metrics.image_auroc(label[use], score[use]) if both else None,
            "recall": float(anomalous[chosen].mean()),
            **_pixel_metrics([masks[i] for i in with_mask], [maps[i] for i in with_mask]),
        }
    result["defect_types"] = by_type
    return result


def _pixel_metrics(masks: Sequence[Any], maps: Sequence[NDArray[np.float32]]) -> dict[str, float | None]:
    if not any(mask.any() for mask in masks):
        return {"pixel_auroc": None, "pixel_average_precision": None, "aupro_0.3": None, "aupro_0.05": None}
    return dict(metrics.pixel_metrics(masks, maps, (0.3, 0.05)))


def find_regions(anomaly_map: NDArray[np.float32], threshold: float, width: int, height: int) -> tuple[Region, ...]:
    """Connected areas (8 neighbours) above the threshold, highest peak first, in pixels of a width x height image."""
    full = resize_map(anomaly_map, height, width)
    numbered, _ = ndimage.label(full > threshold, structure=np.ones((3, 3)))
    regions = []
    for number, box in enumerate(ndimage.find_objects(numbered), start=1):
        inside = numbered[box] == number
        rows, columns = box
        regions.append(
            Region(
                x=int(columns.start),
                y=int(rows.start),
                width=int(columns.stop - columns.start),
                height=int(rows.stop - rows.start),
                area=int(inside.sum()),
                peak=float(full[box][inside].max()),
            )
        )
    return tuple(sorted(regions, key=lambda region: -region.peak))


def resize_map(anomaly_map: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """(S, S) -> (height, width), bilinear."""
    if anomaly_map.shape == (height, width):
        return anomaly_map
    resized = F.interpolate(torch.from_numpy(anomaly_map)[None, None], size=(height, width), mode="bilinear")
    return resized[0, 0].numpy()


def evaluation_size(height: int, width: int, max_side_px: int) -> tuple[int, int]:
    """The size at which a map and a mask are compared: the image's own, scaled down to `max_side_px` a side at most."""
    scale = min(1.0, max_side_px / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
