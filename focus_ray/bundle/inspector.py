"""Inspector: scores encoded images with a bundle, and evaluates labelled images.

The result of an image has a score, a p-value, a verdict, an anomaly map and regions. Command line, evaluation, batch
inspection and serving all use this class, so that their results agree to the last digit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from focus_ray.bundle.bundle import Bundle, read_bundle
from focus_ray.bundle.engine import (
    MAX_EXAMPLES,
    MIN_EXAMPLES,
    TOLERANCE,
    TORCH,
    check_engine_support,
    compile_feature_extractor,
)
from focus_ray.cluster.settings import NUM_DECODE_THREADS_PER_GPU
from focus_ray.data.images import ImageError, ImageInfo, decode_batch, decode_batch_with_info, decode_mask
from focus_ray.data.prefetch import prefetch_items
from focus_ray.data.schema import Row
from focus_ray.density.base import choose_evenly_spaced
from focus_ray.detect.inspection import Inspection, find_regions, resize_anomaly_map
from focus_ray.detect.shift import compare_with_calibration_scores, describe_test_shift
from focus_ray.device import choose_device
from focus_ray.errors import ConfigError, DataError, ScoreError
from focus_ray.features.batch_norm import fuse_batch_norms, prepare_backbone_for_inference
from focus_ray.features.network import convert_to_float_images
from focus_ray.fitting.duplicates import RepeatedPartFinder, format_repeat_warning
from focus_ray.fitting.split import shorten_hash
from focus_ray.metrics.evaluate import (
    EXACT_PIXELS,
    MAX_SIDE_PX,
    EvaluationCollector,
    UnseenTestImages,
    compute_evaluation_size,
    compute_metrics,
    describe_training_images,
)
from focus_ray.precision import choose_compute_dtype

_NUM_CPU_DECODE_THREADS = 2  # decode the next batch during a forward pass on a CPU


class Inspector:
    """Scores encoded images (bytes of PNG or other image files) with a bundle on a device, and evaluates labelled images."""

    def __init__(
        self,
        bundle: Bundle,
        device: torch.device | str = "cpu",
        batch_size: int = 32,
        engine: str = TORCH,
        examples: Sequence[bytes | str | Path] = (),
    ) -> None:
        """Prepares the network of the bundle, in place, for inference with an engine.

        Args:
            bundle: loaded on `device`.
            batch_size: images in a forward pass.
            engine: library that computes the features: torch, or on a CPU also onnxruntime or onnxruntime-int8
                (`bundle.engine`).
            examples: encoded images of good parts, or their paths. An engine other than torch needs them, to compare its scores
                with the scores of torch, and to choose the scales that convert floats to int8.

        Raises:
            ConfigError: the engine cannot be used here, there are too few examples that the model was not trained on, or the
                scores of the engine differ from the scores of torch.
            MissingPackageError: the engine needs the package extra `onnx`, which is not installed.
            DataError: an example cannot be read or decoded.
        """
        self.bundle, self.device, self.batch_size = bundle, device, batch_size
        on_gpu = torch.device(device).type == "cuda"
        self._num_decode_threads = NUM_DECODE_THREADS_PER_GPU if on_gpu else _NUM_CPU_DECODE_THREADS
        self.frame = bundle.frame
        net = bundle.detector.net
        check_engine_support(engine, net, device, len(examples))
        if engine != TORCH:
            fuse_batch_norms(net.backbone)
            self._compile_backbone(engine, examples)
        prepare_backbone_for_inference(net.backbone, choose_compute_dtype(net.config.precision, device))

    @classmethod
    def load(cls, uri: str | Path, device: torch.device | str = "auto", **options: Any) -> Inspector:
        """Reads and verifies a bundle, and returns an inspector for it.

        Args:
            device: such as cpu or cuda:0; 'auto' takes a GPU if this process may use one (`choose_device`).
            options: further arguments of the constructor.

        Raises:
            BundleError: the bundle is missing or damaged.
            ConfigError, MissingPackageError, DataError: as the constructor.
        """
        if device == "auto":
            device = choose_device()
        return cls(read_bundle(uri, device), device, **options)

    def _score_images(
        self, images: Iterable[tuple[str, bytes]], hashed: bool = False, repeats: RepeatedPartFinder | None = None
    ) -> Iterator[tuple[ImageInfo, float, NDArray[np.float32], bool]]:
        """Generator: scores images in batches. The next batch is decoded while the current batch is scored.

        Args:
            images: (name for messages, encoded image) of each image.
            hashed: whether to compute the `content_hash` of each image.
            repeats: recognises new photographs of parts that training images show; None: no search.

        Yields: (info, score, anomaly map (H, W), is_repeat) of each image, in the order of `images`. is_repeat: whether a
            training image shows the same part; False without `repeats`.

        Raises: DataError: an image cannot be decoded, no pixel of an image is scored, or a score is not finite.
        """

        def decode_batches() -> Iterator[tuple[list[str], list[ImageInfo], NDArray[np.uint8]]]:
            """Generator: yields (names, infos, pixels uint8 (B, H, W, 3 or 4)) of each batch of images."""
            stream = iter(images)
            while batch := list(islice(stream, self.batch_size)):
                names, encoded = [name for name, _ in batch], [data for _, data in batch]
                yield names, *decode_batch_with_info(encoded, self.frame, self._num_decode_threads, hashed, names)

        for names, infos, pixels in prefetch_items(decode_batches(), max_waiting=1):
            scored = self.bundle.detector(torch.from_numpy(pixels), describe=repeats is not None)
            scores, maps = scored.score.float().tolist(), scored.anomaly_map.float().cpu().numpy()
            repeated = [False] * len(names)
            if repeats is not None:
                assert scored.descriptors is not None
                repeated = repeats.find_repeats(scored.descriptors).tolist()
            for name, info, score, anomaly_map, repeat in zip(names, infos, scores, maps, repeated, strict=True):
                try:
                    self._check_finite(score, anomaly_map, info.width, info.height)
                except DataError as error:
                    raise DataError(f"{name}: {error}") from error
                yield info, score, anomaly_map, repeat

    def score(self, batch: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Returns (scores (B,), anomaly maps (B, H, W)) of B decoded images.

        Args:
            batch: uint8 (B, H, W, 3 or 4), from `images.decode_batch` with `self.frame`.
        """
        scored = self.bundle.detector(torch.from_numpy(batch))
        return scored.score.float().cpu().numpy(), scored.anomaly_map.float().cpu().numpy()

    def inspect(self, images: Sequence[bytes | str | Path]) -> list[Inspection]:
        """Inspects a list of images (encoded bytes or paths), and returns an `Inspection` for each image in the same order.

        Raises:
            DataError: `images` is a single image instead of a list, an image cannot be read or decoded, no pixel of an image is
                scored, or a score is not finite. An error in one image means that no image gets a result.
        """
        if isinstance(images, (bytes, bytearray, str, Path)):
            raise DataError(
                f"inspect takes a list of images, got a single {type(images).__name__}: put it into brackets"
            )
        return [inspection for inspection, _ in self.inspect_with_hashes(images, hashed=bool(self.bundle.fit_hashes))]

    def inspect_with_hashes(
        self, images: Sequence[bytes | str | Path], hashed: bool = True
    ) -> Iterator[tuple[Inspection, str | None]]:
        """Generator: inspects images and yields (inspection, `content_hash`) of each image. Equal pixels have equal hashes.

        Args:
            images: as for `inspect`.
            hashed: False computes no hashes: each hash is None, and each `trained_on` of an inspection is False.

        Raises: DataError: as `inspect`; the errors appear during iteration.
        """
        fit_hashes = self.bundle.fit_hashes
        named_images = (
            (_get_image_name(image, number), _read_image_bytes(image, number)) for number, image in enumerate(images)
        )
        for info, score, anomaly_map, _ in self._score_images(named_images, hashed):
            inspection = self.compare_with_thresholds(score, anomaly_map, info.width, info.height)
            trained_on = info.content_hash is not None and shorten_hash(info.content_hash) in fit_hashes
            yield replace(inspection, trained_on=trained_on), info.content_hash

    def inspect_or_return_errors(self, images: Sequence[bytes]) -> list[Inspection | DataError]:
        """Inspects encoded images, and returns for each image its inspection or its error. Raises no `DataError` itself.

        An image has an error if it cannot be decoded, has no scored pixel, or has a score that is not finite.
        """
        try:
            return list(self.inspect(images))
        except DataError as error:
            if len(images) == 1:
                return [_find_innermost_error(error)]
            # the batch has an unusable image: inspect the images one by one
            return [outcome for image in images for outcome in self.inspect_or_return_errors([image])]

    def compare_with_thresholds(
        self, score: float, anomaly_map: NDArray[np.float32], width: int, height: int
    ) -> Inspection:
        """Compares the score and the anomaly map of an image with the thresholds, and returns the inspection.

        The inspection has the verdict, the p-value and the regions above the pixel threshold.

        Args:
            anomaly_map: (H, W), in the size of `self.frame`.
            width, height: size of the original image in pixels.

        Raises:
            ScoreError: the score or a value of the map is not a finite number.
            ImageError: no location of the map shows a pixel of the image.
        """
        calibration = self.bundle.calibration
        self._check_finite(score, anomaly_map, width, height)
        anomaly_map = self.frame.crop_padding(anomaly_map, width, height)
        regions = find_regions(anomaly_map, calibration.pixel_threshold, width, height)
        return Inspection(
            score=score,
            p_value=float(calibration.compute_conformal_p_values(score)),
            anomalous=bool(calibration.is_anomalous(score)),
            threshold=calibration.image_threshold,
            pixel_threshold=calibration.pixel_threshold,
            anomaly_map=anomaly_map,
            width=width,
            height=height,
            regions=regions,
        )

    def _check_finite(self, score: float, anomaly_map: NDArray[np.float32], width: int, height: int) -> None:
        """Checks that the score and all values of the anomaly map of an image are finite.

        Args: width, height: size of the original image in pixels, for messages.

        Raises: ImageError, ScoreError: as `compare_with_thresholds`.
        """
        if math.isfinite(score) and np.isfinite(anomaly_map).all():
            return
        if math.isnan(score) and not anomaly_map.any():  # the `ScoredImages` of an image without an inspected location
            raise ImageError(
                "unsupported",
                f"after alignment, no location of the anomaly map shows a part of the image of {width} x {height} pixels, so "
                "there is no verdict: give an image that shows the part as the training images do, or train with a larger "
                "model.image_size_px or with model.image_alignment.group=none",
            )
        raise ScoreError(
            f"the model of {self.bundle.category!r} (version {self.bundle.version[:16]}) gave no finite score for an image: "
            "the tensors of the model overflow or are damaged; train it again"
        )

    def evaluate(
        self, records: Iterable[Row], max_side_px: int = MAX_SIDE_PX, exact_pixels: int = EXACT_PIXELS
    ) -> dict[str, Any]:
        """Scores labelled images and returns metrics such as AUROC. The labels do not influence scores or thresholds.

        Images that the model was trained on are left out of the metrics.

        Args: as `score_labelled_images`.

        Returns: the metrics of `compute_metrics`, and:
            "trained_on": number of training images among the records, and a notice (a sentence, or None).
            "reduced": whether masks were compared at a reduced size.
            "shift": compares scores of good images with the calibration scores: counts, p-value, direction and notice (a
                sentence, or None). None without the comparison: for fewer than 5 good images that the model was not trained
                on, or if a score is not finite.
            "repeats": number of other images that show the same part as a training image, and a notice.

        Raises: DataError: as `score_labelled_images`.
        """
        return self.compute_evaluation_metrics(self.score_labelled_images(records, max_side_px, exact_pixels))

    def compute_evaluation_metrics(self, labelled: UnseenTestImages) -> dict[str, Any]:
        """Returns the metrics and notices that `evaluate` returns, for images that `score_labelled_images` has scored."""
        metrics = compute_metrics(labelled.measured, labelled.types, self.bundle.calibration.target_fpr)
        try:
            shift = compare_with_calibration_scores(self.bundle.calibration.image_scores, labelled.good_scores)
        except DataError as error:
            shift, metrics["reasons"]["shift"] = None, str(error)
        shift_entry = None if shift is None else {**shift.to_dict(), "notice": describe_test_shift(shift)}
        repeats_notice = format_repeat_warning(labelled.num_repeats, len(labelled.types))
        repeats_entry = {"num_images": labelled.num_repeats, "notice": repeats_notice}
        num_trained_on = labelled.num_trained_on
        notice = describe_training_images(num_trained_on, num_trained_on + len(labelled.types))
        return {
            "trained_on": {"num_images": num_trained_on, "notice": notice},
            **metrics,
            "reduced": labelled.reduced,
            "shift": shift_entry,
            "repeats": repeats_entry,
        }

    def score_labelled_images(
        self, records: Iterable[Row], max_side_px: int = MAX_SIDE_PX, exact_pixels: int = EXACT_PIXELS
    ) -> UnseenTestImages:
        """Scores labelled images, and returns their scores with their maps and masks, or with pixel counts in bins.

        Images that the model was trained on are counted and left out of the result.

        Args:
            records: mappings with the bytes of image and mask, label, defect_type, width and height. The mask is None for a
                normal image, or if it is unknown. id and content_hash are optional; without content_hash, a training image is
                not recognised.
            max_side_px: longest side at which maps and masks are compared. Smaller images are compared at their own size.
            exact_pixels: if all maps together have more pixels, the pixels are counted in bins (ranges of values). Otherwise
                maps and masks stay in RAM.

        Raises: DataError: there is no record, the model was trained on all images, an image or mask cannot be decoded, no pixel
            of an image is scored, or a score is not finite.
        """
        collector = EvaluationCollector(exact_pixels)
        for _ in self.score_records(records, collector, max_side_px):
            pass
        return collector.select_unseen_images(float(self.bundle.calibration.image_threshold))

    def score_records(
        self, records: Iterable[Row], into: EvaluationCollector, max_side_px: int = MAX_SIDE_PX
    ) -> Iterator[Row]:
        """Generator: scores labelled images, adds each image to the collector `into`, and yields the record with its score.

        Args:
            records, max_side_px: see `score_labelled_images`.
            into: collects the scores, maps and masks; changed in place.

        Yields: each record without image, mask and content_hash, but with `score` and `trained_on`.

        Raises: DataError: an image or mask cannot be decoded, no pixel of an image is scored, or a score is not finite.
        """
        unscored: deque[Row] = deque()  # records that were read but have no score yet, in the order of the images

        def name_images() -> Iterator[tuple[str, bytes]]:
            """Generator: yields (name, encoded image) of each record, and adds the record without its image to `unscored`."""
            for number, record in enumerate(records):
                unscored.append({key: value for key, value in record.items() if key != "image"})
                yield str(record.get("id", f"image {number}")), record["image"]

        for _, score, anomaly_map, repeat in self._score_images(name_images(), repeats=self._repeat_finder):
            record = unscored.popleft()
            encoded_mask, content_hash = record.pop("mask"), record.pop("content_hash", None)
            image_height, image_width, label = record["height"], record["width"], int(record["label"])
            height, width = compute_evaluation_size(image_height, image_width, max_side_px)
            mask = None if label else np.zeros((height, width), dtype=bool)
            if encoded_mask is not None:
                mask = decode_mask(encoded_mask, height, width)
            resized_map = resize_anomaly_map(
                self.frame.crop_padding(anomaly_map, image_width, image_height), height, width
            )
            region = self.frame.resize_region(height, width)
            trained_on = bool(content_hash) and shorten_hash(content_hash) in self.bundle.fit_hashes
            into.reduced |= encoded_mask is not None and max(image_height, image_width) > max_side_px
            into.num_repeats += repeat and not trained_on
            into.add(label, str(record["defect_type"]), score, resized_map, mask, region, trained_on)
            yield {**record, "score": score, "trained_on": trained_on}

    @cached_property
    def _repeat_finder(self) -> RepeatedPartFinder | None:
        """Finder of images that show the same part as a training image; None if the bundle stores no descriptors."""
        bundle = self.bundle
        if bundle.descriptors is None or bundle.same_part_distance is None:
            return None
        return RepeatedPartFinder(
            bundle.descriptors.to(bundle.detector.density.device).float(), bundle.same_part_distance
        )

    @torch.inference_mode()
    def align_images(self, image: bytes) -> NDArray[np.uint8] | None:
        """Returns the pixels (H, W, 3) of an encoded image after alignment; None if the model does not align images.

        Raises: ImageError: the image cannot be decoded.
        """
        batch = convert_to_float_images(
            torch.from_numpy(decode_batch([image], self.frame)), self.bundle.detector.density.device
        )
        aligned, theta = self.bundle.detector.net.align_images(batch)
        if theta is None:
            return None
        return (aligned[0].permute(1, 2, 0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()

    @torch.inference_mode()
    def _compile_backbone(self, engine: str, examples: Sequence[bytes | str | Path]) -> None:
        """Lets an engine compute the features of the network, if the engine and torch give the same scores to example images.

        Training images among the examples are not compared.

        Raises:
            ConfigError: too few examples are new to the model, or the scores differ by more than `TOLERANCE`.
            DataError: an example cannot be read or decoded.
        """
        detector, fit_hashes = self.bundle.detector, self.bundle.fit_hashes
        numbers = sorted(choose_evenly_spaced(len(examples), MAX_EXAMPLES))
        encoded = [_read_image_bytes(examples[number], number) for number in numbers]
        names = [_get_image_name(examples[number], number) for number in numbers]
        infos, pixels = decode_batch_with_info(
            encoded, self.frame, self._num_decode_threads, with_hash=True, names=names
        )
        # training images score near 0, where a relative change has no meaning
        is_new = [info.content_hash is None or shorten_hash(info.content_hash) not in fit_hashes for info in infos]
        if sum(is_new) < MIN_EXAMPLES:
            raise ConfigError(
                f"engine={engine}: the model was not trained on {sum(is_new)} of {len(is_new)} examples, but the check of the "
                f"engine needs {MIN_EXAMPLES} such examples: give other images of the category"
            )
        batch = torch.from_numpy(pixels)
        expected = detector(batch).score
        tiles = detector.tiles.cut_images(convert_to_float_images(batch, "cpu"))
        compiled = compile_feature_extractor(
            detector.net, engine, detector.net.align_images(tiles[:MAX_EXAMPLES])[0].contiguous()
        )
        detector.net.compiled = compiled
        change = float((detector(batch).score / expected - 1).abs()[torch.tensor(is_new)].median())
        if not change <= TOLERANCE[engine]:
            detector.net.compiled = None
            raise ConfigError(
                f"engine={engine}: the median difference of the scores of {sum(is_new)} examples from torch's scores is "
                f"{change:.1%}, more than {TOLERANCE[engine]:.0%}, so the thresholds would not be valid: give engine=torch"
            )


def _find_innermost_error(error: DataError) -> DataError:
    """Returns the original error of an image, without the outer errors that add the position of the image in its batch."""
    while isinstance(error.__cause__, DataError):
        error = error.__cause__
    return error


def _get_image_name(image: object, number: int) -> str:
    """Returns the name of an image for messages: its path, or "image 3" with its position if it has no path."""
    return str(image) if isinstance(image, (str, Path)) else f"image {number}"


def _read_image_bytes(image: object, number: int) -> bytes:
    """Returns the bytes of an image file, from bytes or a path. number: position of the image, for messages.

    Raises: DataError: the file cannot be read, or `image` is neither bytes nor a path.
    """
    if isinstance(image, (str, Path)):
        try:
            return Path(image).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"{image}: the file cannot be read: {error.strerror or error}") from None
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    raise DataError(
        f"image {number} is {type(image).__module__}.{type(image).__name__}: expected the bytes of an image file, or its path; "
        "`focus_ray.data.images.encode_png` makes bytes of an array"
    )
