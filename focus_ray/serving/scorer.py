"""What a replica does with images: decode, wait for the next pass, one pass over all categories of a backbone, judge.

Knows nothing of Serve. Decoding runs in processes and judging in threads of their own, so the event loop and the pass go on
meanwhile. Teams take turns, so that the images of one do not hold up the others.
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
from focus_ray.evaluation.inspection import Inspection
from focus_ray.fitting.scoring import can_share_backbone_pass, score_together
from focus_ray.serving.batching import Batcher
from focus_ray.serving.decoders import Decoded, Decoders, Turns
from focus_ray.serving.decoders import decode_images as _decode  # noqa: F401
from focus_ray.serving.measures import Measures
from focus_ray.serving.models import ModelCache
from focus_ray.serving.rendering import MapValues, Output, draw, map_values, picture_size
from focus_ray.serving.settings import MIB, Pool

Result = Inspection | ImageError


@dataclass(frozen=True)
class Answer:
    """What became of the images of one request, in order.

    results: without their maps; an error where an image cannot be read.  pictures: PNG where one was asked for and can be.
    maps: of the images that could be read, where they were asked for.  timings_ms: by stage.
    """

    results: list[Result]
    pictures: list[bytes | None]
    maps: list[MapValues | None]
    timings_ms: dict[str, float]


class Part(NamedTuple):
    """Decoded images (B, H, W, 3 or 4) of one model, for a pass."""

    inspector: Inspector
    pixels: NDArray[np.uint8]


class Scores(NamedTuple):
    """Scores (B,), maps (B, H, W) of the frame, and when their pass began and ended (`time.perf_counter`)."""

    score: NDArray[np.float32]
    anomaly_map: NDArray[np.float32]
    began: float
    ended: float


class Scorer:
    """Scores images with any version of a registry, within a pool's limits."""

    def __init__(self, pool: Pool, device: str = "auto", measures: Measures | None = None) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pool, self.device, self.measures = pool, device, measures or Measures()
        self._decoders = Decoders(pool.num_decoders)
        self._workers = ThreadPoolExecutor(pool.num_decoders, thread_name_prefix="judge")
        self._judging = Turns(pool.num_decoders, max(1, pool.num_decoders - 1))
        # requests with decoded images, which take memory; a team has half of them, and its others wait encoded
        self._places = Turns(pool.max_ongoing_requests, max(1, pool.max_ongoing_requests // 2))
        passes = ThreadPoolExecutor(1, thread_name_prefix="pass")
        if device == "cpu":
            # every thread that computes in parallel has OpenMP threads of its own; with more of them than cores they go to
            # sleep between operations, and a pass takes a third longer: so only the pass does
            passes.submit(_take_threads, pool.num_threads).result()
            _take_threads(1)
        self._batcher: Batcher[Part, Scores] = Batcher(self._pass, pool.max_batch_images, passes)
        self.models = ModelCache(
            int(pool.memory_mb * MIB),
            device,
            ThreadPoolExecutor(1, thread_name_prefix="load"),
            on_load=self._loaded,
            on_drop=self.measures.dropped,
        )

    async def warm(self, version: Version) -> None:
        """Loads a version and lets it score once. Raises: BundleError: it cannot be loaded."""
        inspector = (await self.models.get(version)).inspector
        blank = np.zeros((1, *inspector.frame.shape), dtype=np.uint8)
        await self._decoders.start()
        await self._batcher.submit(Part(inspector, blank), 1)

    async def inspect(
        self,
        version: Version,
        images: Sequence[bytes],
        output: Output = "json",
        include_map: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> Answer:
        """Returns the answer to the images of one request.

        Args: max_pixels: an image that claims more is not decoded.

        Raises: BundleError: the version cannot be loaded.
        """
        started = time.perf_counter()
        self._decoders.launch()  # while the model is loaded
        await self.models.get(version)  # before a place is taken: while the storage hangs, loaded models go on scoring
        async with self._places.hold(version.team):
            return await self._inspect(version, images, output, include_map, max_pixels, started)

    async def _inspect(
        self,
        version: Version,
        images: Sequence[bytes],
        output: Output,
        include_map: bool,
        max_pixels: int,
        started: float,
    ) -> Answer:
        inspector = (await self.models.get(version)).inspector
        loaded = time.perf_counter()
        loop = asyncio.get_running_loop()
        decoded = await self._decoders.decode(version.team, images, inspector.frame, max_pixels)
        pictures: list[bytes | NDArray[np.uint8]] = list(images)
        if output == "overlay":
            for number, one in enumerate(decoded):
                if not isinstance(one, ImageError):
                    size = picture_size(one[0].width, one[0].height)
                    picture = await self._decoders.decode_picture(version.team, images[number], *size)
                    if isinstance(picture, ImageError):
                        decoded[number] = picture
                    else:
                        pictures[number] = picture
        ready = time.perf_counter()
        timings = {"load": loaded - started, "decode": ready - loaded, "wait": 0.0, "score": 0.0, "judge": 0.0}
        readable = [one for one in decoded if not isinstance(one, ImageError)]
        scores = None
        if readable:
            pixels = np.stack([pixels for _, pixels in readable])
            scores = await self._batcher.submit(Part(inspector, pixels), len(pixels))
            timings.update(wait=scores.began - ready, score=scores.ended - scores.began)
        scored = time.perf_counter()
        async with self._judging.hold(version.team):
            results, drawn, maps = await loop.run_in_executor(
                self._workers, _judge, inspector, pictures, decoded, scores, output, include_map
            )
        timings["judge"] = time.perf_counter() - scored
        return Answer(results, drawn, maps, {stage: round(1e3 * seconds, 3) for stage, seconds in timings.items()})

    def _pass(self, parts: Sequence[Part]) -> list[Scores]:
        """Scores what waited: parts of one model as one, models that share a backbone in one pass."""
        began = time.perf_counter()
        groups: list[dict[int, list[int]]] = []  # of models that share a pass: model -> its parts' places
        for place, part in enumerate(parts):
            key, detector = id(part.inspector), part.inspector.bundle.detector
            for group in groups:
                first = parts[next(iter(group.values()))[0]].inspector.bundle.detector
                if key in group or can_share_backbone_pass(first, detector):
                    group.setdefault(key, []).append(place)
                    break
            else:
                groups.append({key: [place]})
        found: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        for group in groups:
            together = [
                (
                    parts[places[0]].inspector.bundle.detector,
                    torch.from_numpy(np.concatenate([parts[place].pixels for place in places])),
                )
                for places in group.values()
            ]
            for places, scored in zip(group.values(), score_together(together), strict=True):
                cuts = np.cumsum([len(parts[place].pixels) for place in places])[:-1]
                score = np.split(scored.score.float().cpu().numpy(), cuts)
                maps = np.split(scored.anomaly_map.float().cpu().numpy(), cuts)
                found.update(zip(places, zip(score, maps, strict=True), strict=True))
        ended = time.perf_counter()
        categories = {id(part.inspector) for part in parts}
        self.measures.batch(sum(len(part.pixels) for part in parts), len(categories), len(groups))
        return [Scores(*found[place], began, ended) for place in range(len(parts))]

    def _loaded(self, version: Version, seconds: float) -> None:
        self.measures.loaded(version, seconds)
        self.measures.held(len(self.models.keys), self.models.num_bytes)


def _take_threads(count: int) -> None:
    """Threads of torch for the calling thread, and for those that begin to compute after it."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread takes the number that was set last when it first asks: this one asks now


def _judge(
    inspector: Inspector,
    images: Sequence[bytes | NDArray[np.uint8]],
    decoded: Sequence[Decoded | ImageError],
    scores: Scores | None,
    output: Output,
    include_map: bool,
) -> tuple[list[Result], list[bytes | None], list[MapValues | None]]:
    results: list[Result] = []
    pictures: list[bytes | None] = []
    maps: list[MapValues | None] = []
    row = 0
    for image, one in zip(images, decoded, strict=True):
        if isinstance(one, ImageError):
            results.append(one)
            pictures.append(None)
            maps.append(None)
            continue
        assert scores is not None
        info = one[0]
        score, anomaly_map = float(scores.score[row]), scores.anomaly_map[row]
        row += 1
        try:
            found = inspector.judge(score, anomaly_map, info.width, info.height)
        except ImageError as error:
            results.append(error)
            pictures.append(None)
            maps.append(None)
            continue
        results.append(found.without_map())
        pictures.append(None if output == "json" else draw(output, found, image))
        maps.append(map_values(found) if include_map else None)
    return results, pictures, maps
