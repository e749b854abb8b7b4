"""Records trainings and evaluations in trackers: one run per category, and a group run above them if there are several.

An evaluation continues the tracker runs of the training that made its bundles.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np
from PIL import Image

from focus_ray import __version__
from focus_ray.drawing.mark import MARK
from focus_ray.errors import FocusRayError
from focus_ray.fitting.settings import Config
from focus_ray.settings.kinds import METRICS
from focus_ray.storage.files import exists, join, read_bytes
from focus_ray.tracking.base import Picture, RunDescription, flatten_parameters
from focus_ray.tracking.recorder import Recorder, describe_error

CLAIM = "claim.json"  # file in the folder of a run; a hash of its unique bytes identifies the run
_JPEG_QUALITY = 90
_COUNTS = ("num_normal", "num_anomalous", "threshold", "target_fpr")
_NOT_PARAMETERS = ("trackers.", "storage", "name", "data.categories")  # places and names do not change the model


def run_key(*parts: str | bytes) -> str:
    """Returns the key of a run in trackers: a hash of parts that together are unique to the run."""
    joined = b"\n".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(joined).hexdigest()[:32]


class TrainingRecorder:
    """Records one training. A run begins in the trackers when its first record arrives."""

    def __init__(
        self, recorder: Recorder, config: Config, root: str, fingerprints: Mapping[str, str], has_group: bool
    ) -> None:
        """Reads the claim of the training and begins the group run.

        Args:
            recorder: Trackers.
            config: Configuration of the training.
            root: Folder of the training, with the file `claim.json`.
            fingerprints: Category -> fingerprint of its images.
            has_group: True if the training has several categories, which get a group run.
        """
        self.recorder, self.config, self.root, self.fingerprints = recorder, config, root, fingerprints
        self.group: RunDescription | None = None
        self._runs: dict[str, RunDescription] = {}
        self._steps: dict[str, set[int]] = {}
        if recorder:
            self._claim = read_bytes(join(root, CLAIM))
            if has_group:
                self.group = group_run(self._claim, config)
                recorder.begin(self.group)

    def log_epoch(self, category: str, metrics: Mapping[str, float]) -> None:
        """Records the metrics of an epoch, once per epoch.

        Args:
            category: Category that is trained.
            metrics: Metrics of the epoch, and "epoch" with its number from 0.
        """
        steps = self._steps.setdefault(category, set())
        step = int(metrics["epoch"]) + 1
        if self.recorder and step not in steps:  # after the loss of a worker, epochs are trained again
            steps.add(step)
            self.recorder.log_step(self._category_run(category), step, epoch_metrics(metrics))

    def finish_category(self, category: str, bundle: str) -> None:
        """Records the end of a category from its bundle, with all epochs that were not recorded yet.

        If the manifest of the bundle cannot be read, logs a warning and ends the run without these metrics.
        """
        if not self.recorder:
            return
        run = self._category_run(category)
        try:
            manifest = json.loads(read_bytes(join(bundle, "manifest.json")))
        except (FocusRayError, OSError) as error:
            self.recorder.log(
                f"WARNING: {category}: the metrics of the bundle were not recorded: {describe_error(error)}"
            )
            self.recorder.end(run)
            return
        for metrics in manifest["metrics"].get("history", []):
            self.log_epoch(category, metrics)
        for step, metrics in validation_curve(manifest):
            self.recorder.log_step(run, step, metrics)
        self.recorder.log_metrics(run, training_metrics(manifest))
        self.recorder.set_tags(run, {"bundle": bundle, "bundle_version": str(manifest["sha256"])})
        self.recorder.end(run)

    def fail_category(self, category: str, reason: str) -> None:
        """Records that the training of a category failed."""
        if self.recorder:
            run = self._category_run(category)
            self.recorder.set_tags(run, {"error": reason})
            self.recorder.end(run, failed=True)

    def close(self, failed: bool) -> None:
        """Ends the group run and waits for the trackers, at most `recorder.CLOSE_TIMEOUT_S` seconds."""
        if self.group is not None:
            self.recorder.end(self.group, failed)
        self.recorder.close()

    def _category_run(self, category: str) -> RunDescription:
        """Returns the description of a category's run; creates it at the first call."""
        if category not in self._runs:
            run = category_run(self._claim, self.config, category, self.fingerprints.get(category), self.group)
            self._runs[category] = run
        return self._runs[category]


def category_run(
    claim: bytes, config: Config, category: str, fingerprint: str | None, group: RunDescription | None
) -> RunDescription:
    """Returns the description of the tracker run for one category of a training.

    Args:
        claim: Content of the training's claim file (`CLAIM`), unique to the training.
        config: Configuration of the training.
        category: Name of the category.
        fingerprint: Fingerprint of the category's images; None if it is unknown.
        group: Run of the whole training; None for a run without a group.
    """
    tags = {"kind": "category", **_config_tags(config), "category": category, "data": config.data.uri}
    if fingerprint:
        tags["data_fingerprint"] = fingerprint
    return RunDescription(run_key(claim, category), f"{config.name}/{category}", group, _run_parameters(config), tags)


def group_run(claim: bytes, config: Config) -> RunDescription:
    """Returns the description of the tracker run for a whole training.

    Args:
        claim: Content of the training's claim file (`CLAIM`), unique to the training.
        config: Configuration of the training.
    """
    return RunDescription(
        run_key(claim), config.name, None, _run_parameters(config), {"kind": "run", **_config_tags(config)}
    )


def _run_parameters(config: Config) -> dict[str, Any]:
    """Returns dotted key -> value for all settings that are not None, without the settings in `_NOT_PARAMETERS`."""
    parameters = flatten_parameters(config.model_dump(mode="json"))
    return {key: value for key, value in parameters.items() if not key.startswith(_NOT_PARAMETERS)}


def _config_tags(config: Config) -> dict[str, str]:
    """Returns the tags that all runs of a training have."""
    tags = {"run": config.name, "storage": config.storage, "focus_ray": __version__}
    return {**tags, "team": config.cluster.team} if config.cluster.team else tags


def epoch_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics of an epoch as `train/<metric>` -> value. Drops the number of the epoch."""
    return {f"train/{key}": float(value) for key, value in metrics.items() if key != "epoch"}


def validation_curve(manifest: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yields (epoch, validation scores), measured on held-out good images and synthetic defects; epoch 0 is untrained."""
    for entry in manifest["metrics"].get("selection", []):
        if "epoch" in entry:
            metrics = {
                f"validation/{key}": float(entry[key]) for key in ("score", "image_auroc", "aupro") if key in entry
            }
            yield int(entry["epoch"]), metrics


def training_metrics(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of a training from its bundle's manifest: seconds, image counts, calibration and bundle size."""
    seconds = {stage: float(value) for stage, value in manifest["metrics"].get("seconds", {}).items()}
    calibration, data = manifest["calibration"], manifest["data"]
    return {
        **{f"seconds/{stage}": value for stage, value in seconds.items()},
        "seconds/total": sum(seconds.values()),
        **{f"images/{key}": float(data[key]) for key in ("num_fit", "num_holdout") if key in data},
        **{
            f"calibration/{key}": float(calibration[key])
            for key in ("image_threshold", "pixel_threshold", "target_fpr")
        },
        "bundle/size_mib": sum(file["num_bytes"] for file in manifest["files"].values()) / 2**20,
    }


@dataclass(frozen=True)
class EvaluatedCategory:
    """One category of an evaluation.

    Attributes:
        bundle: URI of the bundle.
        manifest: Manifest of the bundle.
        config: Configuration of the bundle.
        result: Result of `evaluate`.
        cards: Function that returns the galleries of the report's page; each gallery is a list of image cards.
    """

    bundle: str
    manifest: Mapping[str, Any]
    config: Config
    result: Mapping[str, Any]
    cards: Callable[[], Sequence[Sequence[Any]]]


def record_evaluation(
    recorder: Recorder, categories: Mapping[str, EvaluatedCategory], means: Mapping[str, float | None]
) -> None:
    """Records an evaluation in trackers. Adds the metrics to the runs of the training that made the bundles.

    Args:
        recorder: Recorder of the trackers.
        categories: Category -> its evaluated bundle.
        means: Metric -> mean over the categories. Recorded in the group run if several bundles come from one training.
    """
    claims = {category: _read_claim(evaluated.bundle, evaluated.manifest) for category, evaluated in categories.items()}
    group = None
    if len(claims) > 1 and len(set(claims.values())) == 1:  # several categories of the same training
        group = group_run(next(iter(claims.values())), next(iter(categories.values())).config)
        recorder.log_metrics(group, evaluation_metrics(means))
        recorder.end(group)
    for category, evaluated in categories.items():
        fingerprint = evaluated.manifest["data"].get("fingerprint")
        run = category_run(claims[category], evaluated.config, category, fingerprint, group)
        data_tag = {"test_data": str(evaluated.result["data"])}
        recorder.set_tags(
            run, {"bundle": evaluated.bundle, "bundle_version": str(evaluated.manifest["sha256"]), **data_tag}
        )
        recorder.log_metrics(run, evaluation_metrics(evaluated.result))
        if recorder.num_images:
            recorder.log_pictures(run, list(islice(gallery_pictures(evaluated.cards()), recorder.num_images)))
        recorder.end(run)


def _read_claim(bundle: str, manifest: Mapping[str, Any]) -> bytes:
    """Returns the claim of the training that made a bundle; for a bundle outside a training's folder, the bundle's hash."""
    claim_file = join(bundle.rstrip("/").rpartition("/bundles/")[0] or bundle, CLAIM)
    return read_bytes(claim_file) if exists(claim_file) else str(manifest["sha256"]).encode()


def evaluation_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of an evaluation and of each defect type. Metrics without a value are left out."""
    keys = [*METRICS, *_COUNTS]
    metrics = {f"test/{key}": float(result[key]) for key in keys if result.get(key) is not None}
    for defect_type, type_result in result.get("defect_types", {}).items():
        for key in METRICS:
            if type_result.get(key) is not None:
                metrics[f"test_of_{_to_name(defect_type)}/{key}"] = float(type_result[key])
    return metrics


def gallery_pictures(galleries: Sequence[Sequence[Any]]) -> Iterator[Picture]:
    """Yields pictures of image and heat map side by side: the first card of each gallery, then the second cards, and so on."""
    cards = [card for card in chain.from_iterable(zip_longest(*galleries)) if card is not None]
    for number, card in enumerate(cards, start=1):
        verdict = card.mistake or card.verdict
        yield Picture(
            f"{number:02d}-{_to_name(card.defect_type)}-{_to_name(verdict)}",
            f"{card.name}: {card.defect_type}, {verdict}, score {card.score_to_threshold:.3g} times the threshold",
            _join_pictures([card.views["image"], card.views["heat map"]]),
        )


def _to_name(text: str) -> str:
    """Replaces characters that file names or trackers do not allow."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.") or "unnamed"


def _join_pictures(uris: Sequence[str]) -> bytes:
    """Returns JPEG data URIs of the same size side by side as one JPEG."""
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")) for uri in uris
    ]
    sink = io.BytesIO()
    Image.fromarray(np.concatenate(images, axis=1)).save(sink, "JPEG", quality=_JPEG_QUALITY, comment=MARK)
    return sink.getvalue()
