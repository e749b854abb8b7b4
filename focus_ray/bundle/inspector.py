"""Inspector: a bundle and encoded images -> scores, p-values, verdicts, maps and regions; and the evaluation of a set.

Command line, evaluation, batch inspection and serving all go through it, so that they agree to the last digit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from focus_ray.bundle.bundle import Bundle, read_bundle
from focus_ray.bundle.engine import FEWEST_EXAMPLES, MOST_EXAMPLES, TOLERANCE, TORCH, check_engine, compile_features
from focus_ray.data.images import ImageError, ImageInfo, decode_batch, decode_mask, read_batch
from focus_ray.data.schema import Row
from focus_ray.data.split import short_hash
from focus_ray.density.base import sample_evenly
from focus_ray.errors import ConfigError, DataError, ScoreError
from focus_ray.evaluation.evaluate import (
    EXACT_PIXELS,
    MAX_SIDE_PX,
    EvaluationCollector,
    LabelledImages,
    compute_metrics,
    describe_training_images,
    evaluation_size,
)
from focus_ray.evaluation.inspection import Inspection, find_regions, resize_map
from focus_ray.evaluation.shift import compare_scores, describe_test_shift
from focus_ray.fitting.duplicates import RepeatFinder, describe_repeats
from focus_ray.fitting.scoring import to_images
from focus_ray.model.batch_norm import fuse_batch_norms, prepare_for_inference
from focus_ray.precision import compute_dtype


class Inspector:
    """Scores encoded images with one bundle, on one device."""

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        num_threads: int = 2,
        engine: str = TORCH,
        examples: Sequence[bytes | str | Path] = (),
    ) -> None:
        """
        Args:
            batch_size: images a forward pass.  num_threads: that decode, beside the pass.
            engine: what computes the features: torch, or on a CPU onnxruntime or onnxruntime-int8 (`bundle.engine`).
            examples: encoded images of good parts, or their paths, by which another engine than torch is scaled and checked.

        Raises: ConfigError: the engine cannot be used here, or scores the examples otherwise than torch does.
            DataError: an example cannot be read.
        """
        self.bundle, self.device, self.batch_size, self.num_threads = bundle, device, batch_size, num_threads
        self.frame = bundle.frame
        net = bundle.detector.net
        check_engine(engine, net, device, len(examples))
        if engine != TORCH:
            fuse_batch_norms(net.backbone)
            self._compile(engine, examples)
        prepare_for_inference(net.backbone, compute_dtype(net.config.precision, device))

    @classmethod
    def load(cls, uri: str | Path, device: torch.device | str = "auto", **options: Any) -> Inspector:
        """Reads and verifies a bundle. device: 'auto' takes a GPU where there is one. Raises: BundleError."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(read_bundle(uri, device), device, **options)

    def score_batches(self, images: Iterable[bytes]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Scores (B,) and maps (B, H, W), of the frame, batch by batch; the next batch is decoded while one is scored.

        Raises: DataError: an image cannot be decoded, or nothing of it can be inspected; its place in the stream is named.
        """
        for _, scores, maps, _ in self._scored((_name(image, number), image) for number, image in enumerate(images)):
            yield scores, maps

    def _scored(
        self, images: Iterable[tuple[str, bytes]], hashed: bool = False, repeats: RepeatFinder | None = None
    ) -> Iterator[tuple[list[ImageInfo], NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]]:
        """Infos, scores (B,), maps (B, H, W) and whether images repeat training images (B,); False without a finder."""
        stream = iter(images)
        with ThreadPoolExecutor(max_workers=1) as ahead:
            batch = list(islice(stream, self.batch_size))
            pending = ahead.submit(self._decode, batch, hashed)
            while batch:
                infos, pixels = pending.result()
                names = [name for name, _ in batch]
                batch = list(islice(stream, self.batch_size))
                pending = ahead.submit(self._decode, batch, hashed)
                scored = self.bundle.detector(torch.from_numpy(pixels), describe=repeats is not None)
                scores, maps = scored.score.float().cpu().numpy(), scored.anomaly_map.float().cpu().numpy()
                for name, info, score, anomaly_map in zip(names, infos, scores, maps, strict=True):
                    try:
                        self._check_score(float(score), anomaly_map, info.width, info.height)
                    except DataError as error:
                        raise DataError(f"{name}: {error}") from error
                repeated = np.zeros(len(pixels), dtype=bool)
                if repeats is not None:
                    assert scored.descriptors is not None
                    repeated = repeats.find(scored.descriptors).numpy()
                yield infos, scores, maps, repeated

    def score(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """uint8 (B, H, W, 3 or 4), as `images.decode_batch` gives for the frame -> scores (B,) and maps (B, H, W)."""
        scored = self.bundle.detector(torch.from_numpy(batch))
        return scored.score.float().cpu().numpy(), scored.anomaly_map.float().cpu().numpy()

    def inspect(self, images: Sequence[bytes | str | Path]) -> list[Inspection]:
        """Encoded images, or paths of image files -> one `Inspection` each, in order.

        Raises: DataError: an image cannot be read or decoded, or is neither bytes nor a path; or as `judge`.
        """
        if isinstance(images, (bytes, bytearray, str, Path)):
            raise DataError(f"inspect takes a list of images, got one {type(images).__name__}: put it into brackets")
        return [found for found, _ in self._inspected(images, hashed=bool(self.bundle.known))]

    def inspect_hashed(self, images: Sequence[bytes | str | Path]) -> list[tuple[Inspection, str]]:
        """As `inspect`, each with the image's `content_hash`, which is the same for copies of one image."""
        return [(found, str(content)) for found, content in self._inspected(images, hashed=True)]

    def _inspected(self, images: Sequence[bytes | str | Path], hashed: bool) -> Iterator[tuple[Inspection, str | None]]:
        """Yields the inspection and, if asked for, the content hash of each image, in order."""
        known = self.bundle.known
        named = ((_name(image, number), _encoded(image, number)) for number, image in enumerate(images))
        for infos, scores, maps, _ in self._scored(named, hashed=hashed):
            for info, score, anomaly_map in zip(infos, scores, maps, strict=True):
                one = self.judge(float(score), anomaly_map, info.width, info.height)
                trained_on = info.content_hash is not None and short_hash(info.content_hash) in known
                yield (replace(one, trained_on=True) if trained_on else one), info.content_hash

    def inspect_each(self, images: Sequence[bytes]) -> list[Inspection | DataError]:
        """As `inspect`; where an image cannot be used, the reason stands in place of its inspection."""
        try:
            return list(self.inspect(images))
        except DataError as error:
            if len(images) == 1:
                return [_own_reason(error)]
            return [found for image in images for found in self.inspect_each([image])]

    def judge(self, score: float, anomaly_map: NDArray[np.float32], width: int, height: int) -> Inspection:
        """Verdict, p-value and regions of a scored image of `width` x `height` pixels, whose map is the frame's.

        Raises: ScoreError: the score, or a value of the map, is not a finite number.  ImageError: no place of the map was
            inspected.
        """
        calibration = self.bundle.calibration
        self._check_score(score, anomaly_map, width, height)
        anomaly_map = self.frame.crop_map(anomaly_map, width, height)
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

    def _check_score(self, score: float, anomaly_map: NDArray[np.float32], width: int, height: int) -> None:
        if math.isfinite(score) and np.isfinite(anomaly_map).all():
            return
        if math.isnan(score) and not anomaly_map.any():  # `ScoredImages` of an image of which no place is inspected
            raise ImageError(
                "unsupported",
                f"once the image of {width} x {height} pixels is aligned, no place of the anomaly map shows a part of it to "
                "inspect, so there is no verdict: give an image that shows the part as the training images do, or train with a "
                "larger model.image_size_px or with model.image_alignment.group=none",
            )
        raise ScoreError(
            f"the model of {self.bundle.category!r} (version {self.bundle.version[:16]}) gave no finite score for an image: "
            "its tensors overflow or are damaged; train it again"
        )

    def evaluate(
        self, records: Iterable[Row], max_side_px: int = MAX_SIDE_PX, exact_pixels: int = EXACT_PIXELS
    ) -> dict[str, Any]:
        """Metrics over labelled images; labels are compared with, never used to choose anything. Arguments as of `measure`.

        Images that the model was trained on are left out; "trained_on" holds their number and a notice (a sentence, or None).

        Returns: see `evaluation.compute_metrics`; besides "trained_on", "reduced", whether maps were compared at a reduced size,
            and "shift", whether good images score as those that set the threshold: counts, p-value, direction and notice (a
            sentence, or None); None for fewer than 5 good images that the model was not trained on.

        Raises: DataError: no record that the model was not trained on, or an image cannot be decoded.
        """
        return self.figures(self.measure(records, max_side_px, exact_pixels))

    def figures(self, labelled: LabelledImages) -> dict[str, Any]:
        """What `evaluate` returns, of images that `measure` scored."""
        found = compute_metrics(labelled.measured, labelled.types, self.bundle.calibration.target_fpr)
        try:
            shift = compare_scores(self.bundle.calibration.image_scores, labelled.good_scores)
        except DataError as error:
            shift, found["reasons"]["shift"] = None, str(error)
        told = None if shift is None else {**shift.to_dict(), "notice": describe_test_shift(shift)}
        repeats = describe_repeats(labelled.num_repeats, len(labelled.types))
        repeated = {"num_images": labelled.num_repeats, "notice": repeats}
        left_out = labelled.num_trained_on
        notice = describe_training_images(left_out, left_out + len(labelled.types))
        return {
            "trained_on": {"num_images": left_out, "notice": notice},
            **found,
            "reduced": labelled.reduced,
            "shift": told,
            "repeats": repeated,
        }

    def measure(
        self, records: Iterable[Row], max_side_px: int = MAX_SIDE_PX, exact_pixels: int = EXACT_PIXELS
    ) -> LabelledImages:
        """Scores labelled images, and keeps maps and masks at the size at which they are compared, while they fit.

        Images that the model was trained on are left out and counted.

        Args:
            records: mappings with image and mask bytes (mask None: unknown, or normal), label, defect_type, width, height,
                and id and content_hash where they are known.
            max_side_px: maps and masks are compared at the image's size, at most this long a side.
            exact_pixels: of all maps; where there are more, they are counted in bins, and memory grows no further with them.

        Raises: DataError: no record, or an image cannot be decoded.
        """
        gathered, ids = EvaluationCollector(exact_pixels), []
        for record, _ in self.gather(records, gathered, max_side_px):
            ids.append(str(record.get("id", "")))
        return gathered.labelled(float(self.bundle.calibration.image_threshold), tuple(ids))

    def gather(
        self, records: Iterable[Row], into: EvaluationCollector, max_side_px: int = MAX_SIDE_PX
    ) -> Iterator[tuple[Row, float]]:
        """Scores labelled images one after the other, and adds each to what was gathered. Records as of `measure`.

        Yields: each record, with `trained_on` in place of image, mask and content hash, and its score.

        Raises: DataError: an image cannot be decoded.
        """
        waiting: deque[Row] = deque()
        known = self.bundle.known

        def named_images() -> Iterator[tuple[str, bytes]]:
            for number, record in enumerate(records):
                waiting.append({key: value for key, value in record.items() if key != "image"})
                yield str(record.get("id", f"image {number}")), record["image"]

        for _, scores, maps, repeated in self._scored(named_images(), repeats=self._repeats):
            for score, anomaly_map, repeat in zip(scores.tolist(), maps, repeated.tolist(), strict=True):
                record = waiting.popleft()
                encoded = record.pop("mask")
                own_height, own_width, label = record["height"], record["width"], int(record["label"])
                height, width = evaluation_size(own_height, own_width, max_side_px)
                mask = None if label else np.zeros((height, width), dtype=bool)
                if encoded is not None:
                    mask = decode_mask(encoded, height, width)
                own_map = resize_map(self.frame.crop_map(anomaly_map, own_width, own_height), height, width)
                into.reduced |= max(own_height, own_width) > max_side_px
                inside = self.frame.resize_region(height, width)
                content = record.pop("content_hash", None)
                record["trained_on"] = bool(content) and short_hash(content) in known
                into.num_repeats += repeat and not record["trained_on"]
                kind = str(record["defect_type"])
                into.add(label, kind, score, own_map, mask, inside, record["trained_on"])
                yield record, score

    @cached_property
    def _repeats(self) -> RepeatFinder | None:
        """Finds images that repeat training images; None where the bundle keeps no descriptors."""
        bundle = self.bundle
        if bundle.descriptors is None or bundle.same_part_distance is None:
            return None
        return RepeatFinder(bundle.descriptors.to(bundle.detector.density.device).float(), bundle.same_part_distance)

    @torch.inference_mode()
    def aligned(self, image: bytes) -> NDArray[np.uint8] | None:
        """An encoded image as the network sees it, (H, W, 3); None where images are not aligned."""
        batch = to_images(torch.from_numpy(decode_batch([image], self.frame)), self.bundle.detector.density.device)
        found, theta = self.bundle.detector.net.align_image(batch)
        if theta is None:
            return None
        return (found[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()

    @torch.inference_mode()
    def _compile(self, engine: str, examples: Sequence[bytes | str | Path]) -> None:
        """Gives the network another engine. Raises: ConfigError: the examples' scores are not those of torch."""
        detector, known = self.bundle.detector, self.bundle.known
        numbers = sorted(sample_evenly(len(examples), MOST_EXAMPLES))
        chosen = [_encoded(examples[number], number) for number in numbers]
        names = [_name(examples[number], number) for number in numbers]
        infos, pixels = read_batch(chosen, self.frame, self.num_threads, hashed=True, names=names)
        # images that the memory holds score near 0, of which a share is nothing to go by
        new = [info.content_hash is None or short_hash(info.content_hash) not in known for info in infos]
        if sum(new) < FEWEST_EXAMPLES:
            raise ConfigError(
                f"engine={engine}: {sum(new)} of {len(new)} examples are not among the images that the model was trained on, and "
                f"{FEWEST_EXAMPLES} are needed to check it: give others of the category"
            )
        batch = torch.from_numpy(pixels)
        expected = detector(batch).score
        tiles = detector.tiles.cut(to_images(batch, "cpu"))
        compiled = compile_features(
            detector.net, engine, detector.net.align_image(tiles[:MOST_EXAMPLES])[0].contiguous()
        )
        detector.net.compiled = compiled
        change = float((detector(batch).score / expected - 1).abs()[torch.tensor(new)].median())
        if not change <= TOLERANCE[engine]:
            detector.net.compiled = None
            raise ConfigError(
                f"engine={engine}: scores of {sum(new)} examples differ from torch's by {change:.1%} at the median, more than "
                f"{TOLERANCE[engine]:.0%}: thresholds would not hold; give engine=torch"
            )

    def _decode(self, images: list[tuple[str, bytes]], hashed: bool) -> tuple[list[ImageInfo], NDArray[np.uint8]]:
        names, encoded = [name for name, _ in images], [data for _, data in images]
        return read_batch(encoded, self.frame, self.num_threads, hashed, names)


def _own_reason(error: DataError) -> DataError:
    """What is said of an image itself, without its place among others."""
    while isinstance(error.__cause__, DataError):
        error = error.__cause__
    return error


def _name(image: object, number: int) -> str:
    return str(image) if isinstance(image, (str, Path)) else f"image {number}"


def _encoded(image: object, number: int) -> bytes:
    """The bytes of an image file, given as they are or by path."""
    if isinstance(image, (str, Path)):
        try:
            return Path(image).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"{image}: cannot be read: {error.strerror or error}") from None
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    raise DataError(
        f"image {number} is {type(image).__module__}.{type(image).__name__}: expected the bytes of an image file, or its path; "
        "`focus_ray.data.images.encode_png` makes bytes of an array"
    )
