"""Scores the images of requests in a replica: decodes them, waits for the next batch, scores the batch, judges the scores.

To judge a score is to turn it into a p-value, a verdict, regions and pictures. Models of several categories that share a
backbone share a forward pass. Decoding runs in processes and judging in threads, so that the event loop and the forward pass
continue. Teams get their turns one after the other, so that no team blocks the others. This module does not use Serve.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from focus_ray.bundle.inspector import Inspector
from focus_ray.bundle.registry import Version
from focus_ray.data.images import MAX_PIXELS, ImageError
from focus_ray.detect.detector import can_share_backbone_pass, score_with_shared_backbone
from focus_ray.detect.inspection import Inspection
from focus_ray.detect.pictures import (
    EncodedAnomalyMap,
    Output,
    compute_overlay_size,
    draw_inspection_png,
    encode_anomaly_map,
)
from focus_ray.device import choose_device
from focus_ray.serving.batching import DynamicBatcher
from focus_ray.serving.decoders import Decoded, DecoderPool, FairTeamSemaphore
from focus_ray.serving.metrics import MetricsRecorder
from focus_ray.serving.models import ModelCache
from focus_ray.serving.settings import MIB, ScoringPool

ImageResult = Inspection | ImageError
DEVICE_CHECK_TIMEOUT_S = 25.0  # Serve itself ends a health check after 30 s, without a reason


@dataclass(frozen=True)
class ScoringAnswer:
    """The results of the images of a request. Each list has one entry per image, in their order.

    Attributes:
        results: an inspection without its anomaly map, or an error if the image cannot be read.
        pictures: a PNG file; None if the request asks for JSON, or the image cannot be read.
        maps: values of the anomaly map; None if the request does not ask for them, or the image cannot be read.
        timings_ms: stage (load, decode, wait, score, judge) -> milliseconds.
    """

    results: list[ImageResult]
    pictures: list[bytes | None]
    maps: list[EncodedAnomalyMap | None]
    timings_ms: dict[str, float]


@dataclass(frozen=True)
class ScoringRequest:
    """Images to score with a version, and the form of the results.

    Attributes:
        images: encoded image files.
        output: json, or the kind of picture to draw: heatmap, overlay or mask.
        include_map: whether the answer includes the values of the anomaly maps.
        max_pixels: larger images are not decoded; their result is an error.
    """

    version: Version
    images: Sequence[bytes]
    output: Output = "json"
    include_map: bool = False
    max_pixels: int = MAX_PIXELS


class DecodedRequest(NamedTuple):
    """The input of a batch from one request: decoded images (B, H, W, 3 or 4) uint8, and the inspector of their model."""

    inspector: Inspector
    pixels: NDArray[np.uint8]


class RequestScores(NamedTuple):
    """The result of a batch for the images of one request.

    Attributes:
        score: (B,).
        anomaly_map: (B, H, W), in the input size of the network.
        started_at, ended_at: times of `time.perf_counter` at which scoring of the whole batch began and ended.
    """

    score: NDArray[np.float32]
    anomaly_map: NDArray[np.float32]
    started_at: float
    ended_at: float


class ImageScorer:
    """Scores images with any version of a registry, within the limits on memory and batch size of a pool."""

    def __init__(self, pool: ScoringPool, device: str = "auto", metrics: MetricsRecorder | None = None) -> None:
        """Creates an empty cache of models, the threads and the batching. On a CPU, also sets the number of torch threads.

        Args:
            pool: settings of the threads, the decoder processes and the limits.
            device: cpu or cuda; auto: `choose_device`.
            metrics: receives the metrics; None: metrics are dropped.
        """
        if device == "auto":
            device = choose_device()
        self.pool, self.device, self.metrics = pool, device, metrics or MetricsRecorder()
        self._decoders = DecoderPool(pool.num_decoders)
        self._judging_threads = ThreadPoolExecutor(pool.num_decoders, thread_name_prefix="judge")
        self._judging_slots = FairTeamSemaphore(pool.num_decoders, max(1, pool.num_decoders - 1))
        # limits the requests whose decoded images are in memory; further images of a team wait as encoded files
        self._decoding_slots = FairTeamSemaphore(pool.max_ongoing_requests, max(1, pool.max_ongoing_requests // 2))
        self._pass_thread = pass_thread = ThreadPoolExecutor(1, thread_name_prefix="pass")
        self._device_check: asyncio.Future[None] | None = None
        if device == "cpu":
            # Every thread that computes in parallel has its own OpenMP threads. More OpenMP threads than cores sleep between
            # operations, and a forward pass takes a third longer. Therefore only the thread of the pass computes in parallel.
            pass_thread.submit(_set_num_torch_threads, pool.num_threads).result()
            _set_num_torch_threads(1)
        self._batcher: DynamicBatcher[DecodedRequest, RequestScores] = DynamicBatcher(
            self._score_requests_together, pool.max_batch_images, pass_thread
        )
        self.models = ModelCache(int(pool.memory_mb * MIB), device, self.metrics)

    async def warm_up_model(self, version: Version) -> None:
        """Loads a version and scores a blank image with it. Raises: BundleError: the version cannot be loaded."""
        inspector = (await self.models.get_or_load(version)).inspector
        blank = np.zeros((1, *inspector.frame.shape), dtype=np.uint8)
        await self._decoders.wait_until_ready()
        await self._batcher.submit(DecodedRequest(inspector, blank), 1)

    async def check_device(self) -> None:
        """Checks that the GPU computes: waits for a tiny computation in the thread of the forward pass. A CPU needs no check.

        After some errors of CUDA, such as an illegal memory access, all later computations of a process fail. Only a new process
        can use the GPU again.

        Raises:
            RuntimeError: the GPU cannot be used.
            TimeoutError: the thread has not computed within DEVICE_CHECK_TIMEOUT_S.
        """
        if self.device == "cpu":
            return
        if self._device_check is None or self._device_check.done():  # a check that timed out still waits in the thread
            loop = asyncio.get_running_loop()
            self._device_check = loop.run_in_executor(self._pass_thread, _compute_on_device, self.device)
        try:
            await asyncio.wait_for(asyncio.shield(self._device_check), DEVICE_CHECK_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise TimeoutError(f"{self.device} has not computed within {DEVICE_CHECK_TIMEOUT_S:.0f} s") from None

    async def inspect_images(self, request: ScoringRequest) -> ScoringAnswer:
        """Scores the images of a request, and returns verdicts and the requested pictures; loads the version first if needed.

        An image that cannot be read does not raise an error: its result is an `ImageError`.

        Raises:
            BundleError: the version cannot be loaded.
            ScoreError: the model gives no finite score for an image.
        """
        started, team = time.perf_counter(), request.version.team
        self._decoders.start_idle_processes()  # the processes start while the model is loaded
        # loads the model before it takes a slot: a storage that hangs must not block loaded models
        await self.models.get_or_load(request.version)
        async with self._decoding_slots.acquire_slot(team):
            inspector = (await self.models.get_or_load(request.version)).inspector
            loaded = time.perf_counter()
            decoded = await self._decoders.decode_images(team, request.images, inspector.frame, request.max_pixels)
            pictures: list[bytes | NDArray[np.uint8]] = list(request.images)
            if request.output == "overlay":
                # it shows the whole image at another size than the frame: it is decoded again, also in a decoder process
                for number, entry in enumerate(decoded):
                    if not isinstance(entry, ImageError):
                        size = compute_overlay_size(entry[0].width, entry[0].height)
                        picture = await self._decoders.decode_resized_image(team, request.images[number], *size)
                        if isinstance(picture, ImageError):
                            decoded[number] = picture
                        else:
                            pictures[number] = picture
            ready = time.perf_counter()
            timings = {"load": loaded - started, "decode": ready - loaded, "wait": 0.0, "score": 0.0, "judge": 0.0}
            readable = [entry[1] for entry in decoded if not isinstance(entry, ImageError)]
            scores = None
            if readable:
                scores = await self._batcher.submit(DecodedRequest(inspector, np.stack(readable)), len(readable))
                timings.update(wait=scores.started_at - ready, score=scores.ended_at - scores.started_at)
            scored = time.perf_counter()
            arguments = (inspector, pictures, decoded, scores, request.output, request.include_map)
            async with self._judging_slots.acquire_slot(team):
                loop = asyncio.get_running_loop()
                results, drawn, maps = await loop.run_in_executor(
                    self._judging_threads, _convert_scores_to_results, *arguments
                )
        timings["judge"] = time.perf_counter() - scored
        return ScoringAnswer(
            results, drawn, maps, {stage: round(1e3 * seconds, 3) for stage, seconds in timings.items()}
        )

    def _score_requests_together(self, parts: Sequence[DecodedRequest]) -> list[RequestScores]:
        """Scores the images of several requests as one batch. Runs in the thread of the forward pass.

        Images of the same model are joined, and models that share a backbone share a forward pass.

        Args: parts: images of one request each.

        Returns: the scores of each entry of `parts`, in order.
        """
        started_at = time.perf_counter()
        groups: list[dict[int, list[int]]] = []  # each group shares a pass: id of the inspector -> indices of its parts
        for index, part in enumerate(parts):
            # a group is joined if it contains the model already, or if the model can share its backbone pass
            key, detector = id(part.inspector), part.inspector.bundle.detector
            for group in groups:
                first = parts[next(iter(group.values()))[0]].inspector.bundle.detector
                if key in group or can_share_backbone_pass(first, detector):
                    group.setdefault(key, []).append(index)
                    break
            else:
                groups.append({key: [index]})
        scores_by_part: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        for group in groups:
            detectors_and_pixels = [
                (
                    parts[indices[0]].inspector.bundle.detector,
                    torch.from_numpy(np.concatenate([parts[index].pixels for index in indices])),
                )
                for indices in group.values()
            ]
            # the scores of a model are split into the scores of its parts
            for indices, scored in zip(group.values(), score_with_shared_backbone(detectors_and_pixels), strict=True):
                cuts = np.cumsum([len(parts[index].pixels) for index in indices])[:-1]
                score = np.split(scored.score.float().cpu().numpy(), cuts)
                maps = np.split(scored.anomaly_map.float().cpu().numpy(), cuts)
                scores_by_part.update(zip(indices, zip(score, maps, strict=True), strict=True))
        ended_at = time.perf_counter()
        categories = {id(part.inspector) for part in parts}
        self.metrics.record("batch_images", sum(len(part.pixels) for part in parts))
        self.metrics.record("batch_categories", len(categories))
        self.metrics.record("passes", len(groups))
        return [RequestScores(*scores_by_part[index], started_at, ended_at) for index in range(len(parts))]


def _compute_on_device(device: str) -> None:
    """Adds two numbers on a device and waits for the sum. Raises: RuntimeError: the device cannot be used."""
    torch.ones(1, device=device).add_(1).item()


def _set_num_torch_threads(count: int) -> None:
    """Sets the number of torch threads for the calling thread, and for threads that start to compute later."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread takes the number that was set last when it first reads it; this call makes it read now


def _convert_scores_to_results(
    inspector: Inspector,
    images: Sequence[bytes | NDArray[np.uint8]],
    decoded: Sequence[Decoded | ImageError],
    scores: RequestScores | None,
    output: Output,
    include_map: bool,
) -> tuple[list[ImageResult], list[bytes | None], list[EncodedAnomalyMap | None]]:
    """Turns scores into results, pictures and map values, one entry per image of a request, in order.

    Args:
        images: encoded files; for an overlay, decoded pixels (H, W, 3) of readable images.
        decoded: decoded images; an error for an image that cannot be read.
        scores: scores of the readable images, in order; None if no image is readable.
        output: json, or the kind of picture to draw.
        include_map: whether to return map values.

    Returns: as the fields `results`, `pictures` and `maps` of `ScoringAnswer`.

    Raises: ScoreError: the score or map of an image has a value that is not finite.
    """
    results: list[ImageResult] = []
    pictures: list[bytes | None] = []
    maps: list[EncodedAnomalyMap | None] = []
    row = 0
    for image, entry in zip(images, decoded, strict=True):
        result: ImageResult
        picture = values = None
        if isinstance(entry, ImageError):
            result = entry
        else:
            assert scores is not None
            score, anomaly_map = float(scores.score[row]), scores.anomaly_map[row]
            row += 1
            try:
                inspection = inspector.compare_with_thresholds(score, anomaly_map, entry[0].width, entry[0].height)
                result = inspection.copy_without_map()
                picture = None if output == "json" else draw_inspection_png(output, inspection, image)
                values = encode_anomaly_map(inspection) if include_map else None
            except ImageError as error:
                result = error
        results.append(result)
        pictures.append(picture)
        maps.append(values)
    return results, pictures, maps
