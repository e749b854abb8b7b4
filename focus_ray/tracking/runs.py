"""Writes trainings and evaluations to trackers, with one tracker run for each category.

A training of several categories also has a parent run for the whole training, above the runs of its categories. An evaluation
continues the tracker runs of the training that made its bundles.
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
from operator import methodcaller
from typing import Any

import numpy as np
from PIL import Image

from focus_ray.drawing.mark import MARK
from focus_ray.errors import FocusRayError
from focus_ray.metrics.registry import METRICS
from focus_ray.storage.files import file_exists, join_path, read_bytes
from focus_ray.tracking.base import CaptionedPicture, RunDescription, TrackerRun, flatten_parameters
from focus_ray.tracking.recorder import BackgroundRecorder, describe_error
from focus_ray.version import __version__

CLAIM_FILE = "claim.json"  # file in the folder of a run; a hash of its unique bytes identifies the run
MAX_PICTURES = 6  # heat maps of test images that an evaluation records for each category
_JPEG_QUALITY = 90
_COUNTS = ("num_normal", "num_anomalous", "threshold", "target_fpr")
_NOT_PARAMETERS = ("trackers.", "storage", "name", "data.categories")  # places and names do not change the model


def hash_run_key(*parts: str | bytes) -> str:
    """Returns the key of a run in trackers: a hash of texts or bytes that together identify the run."""
    joined = b"\n".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(joined).hexdigest()[:32]


@dataclass(frozen=True)
class TrainingDescription:
    """Facts about one training, from which the descriptions of its tracker runs are made.

    Attributes:
        run_token: Content of the file `CLAIM_FILE` in the folder of the training; unique to the training.
        settings: All settings of the training, as nested mappings.
        has_parent_run: True if the training has several categories, which get a parent run above them.
    """

    run_token: bytes
    settings: Mapping[str, Any]
    has_parent_run: bool

    def describe_training_run(self) -> RunDescription:
        """Returns the description of the tracker run for the whole training."""
        parameters = flatten_parameters(self.settings)
        parameters = {key: value for key, value in parameters.items() if not key.startswith(_NOT_PARAMETERS)}
        name = self.settings["name"]
        tags = make_run_tags("run", name, self.settings["storage"], self.settings["cluster"]["team"])
        return RunDescription(hash_run_key(self.run_token), name, None, parameters, tags)

    def describe_category_run(self, category: str, fingerprint: str | None) -> RunDescription:
        """Returns the description of the tracker run for a category.

        Args:
            category: Name of the category.
            fingerprint: Hash that identifies the images of the category; None if it is unknown.
        """
        whole = self.describe_training_run()
        tags = {**whole.tags, "kind": "category", "category": category, "data": self.settings["data"]["uri"]}
        if fingerprint:
            tags["data_fingerprint"] = fingerprint
        parent = whole if self.has_parent_run else None
        return RunDescription(
            hash_run_key(self.run_token, category), f"{whole.name}/{category}", parent, whole.parameters, tags
        )


class TrainingRecorder:
    """Writes the progress and results of one training to trackers. Does nothing without trackers.

    The tracker run of a category begins with the first data of the category.
    """

    def __init__(
        self, recorder: BackgroundRecorder, settings: Mapping[str, Any], root: str, fingerprints: Mapping[str, str]
    ) -> None:
        """Reads the claim file of the training, and begins the parent run if there are several categories.

        Args:
            recorder: Sends the data to the trackers.
            settings: All settings of the training, as nested mappings.
            root: Folder of the training, with the file `claim.json`.
            fingerprints: Category -> hash that identifies its images.

        Raises:
            FileNotFoundError: There are trackers, but the folder has no claim file.
            DataError: The claim file cannot be read.
        """
        self.recorder = recorder
        self.parent_run: RunDescription | None = None
        self._runs: dict[str, RunDescription] = {}
        self._recorded_steps: set[tuple[str, int]] = set()
        if not recorder:
            return
        training = TrainingDescription(read_bytes(join_path(root, CLAIM_FILE)), settings, len(fingerprints) > 1)
        if training.has_parent_run:
            self.parent_run = training.describe_training_run()
            recorder.write_to_run(self.parent_run)
        for category, fingerprint in fingerprints.items():
            self._runs[category] = training.describe_category_run(category, fingerprint)

    def log_interval(self, category: str, metrics: Mapping[str, float]) -> None:
        """Writes the metrics of an interval to the trackers. Does nothing if this object has already logged the interval.

        Args:
            category: Category that is trained.
            metrics: Metric -> value in this interval; "step" -> number of finished steps.
        """
        step = int(metrics["step"])
        if not self.recorder or (category, step) in self._recorded_steps:
            return  # after the loss of a worker, steps are trained again
        self._recorded_steps.add((category, step))
        values = {f"train/{key}": float(value) for key, value in metrics.items() if key != "step"}
        self.recorder.write_to_run(self._runs[category], lambda run: run.log_step_metrics(step, values))

    def record_finished_category(self, category: str, bundle: str) -> None:
        """Writes the metrics in a category's bundle to the trackers, with intervals that are not logged yet, and ends its run.

        If the manifest cannot be read, logs a warning and ends the run without these metrics.

        Args:
            category: Category whose training is complete.
            bundle: URI of its bundle.
        """
        if not self.recorder:
            return
        try:
            manifest = json.loads(read_bytes(join_path(bundle, "manifest.json")))
        except (FocusRayError, OSError) as error:
            self.recorder.log(
                f"WARNING: {category}: the metrics of the bundle were not recorded: {describe_error(error)}"
            )
        else:
            for metrics in manifest["metrics"].get("history", []):
                self.log_interval(category, metrics)
            self.recorder.write_to_run(self._runs[category], lambda run: _log_bundle_metrics(run, bundle, manifest))
        self.recorder.end_run(self._runs[category])

    def record_failed_category(self, category: str, reason: str) -> None:
        """Writes the reason of a category's failure to the trackers, and ends the run of the category as failed."""
        if self.recorder:
            self.recorder.write_to_run(self._runs[category], lambda run: run.set_tags({"error": reason}))
            self.recorder.end_run(self._runs[category], failed=True)

    def close(self, failed: bool) -> None:
        """Ends the parent run and waits until the trackers have all data, at most `recorder.CLOSE_TIMEOUT_S` seconds.

        Args:
            failed: True if the training failed.
        """
        if self.parent_run is not None:
            self.recorder.end_run(self.parent_run, failed)
        self.recorder.close()


def make_run_tags(kind: str, name: str, storage: str, team: str | None) -> dict[str, str]:
    """Returns tag name -> text, for the tags that all tracker runs of a training or sweep have.

    Args:
        kind: What the run stands for, such as "run" for a whole training or "sweep".
        name: Name of the training or sweep.
        storage: Folder of all trainings or sweeps.
        team: Team that owns the training; None gives no tag.
    """
    tags = {"kind": kind, "run": name, "storage": storage, "focus_ray": __version__}
    return {**tags, "team": team} if team else tags


def _log_bundle_metrics(run: TrackerRun, bundle: str, manifest: Mapping[str, Any]) -> None:
    """Writes validation scores by step, the metrics of a training, and the address and version of its bundle to a tracker run.

    Args:
        run: Open run of the category.
        bundle: URI of the bundle.
        manifest: Manifest of the bundle.
    """
    metrics, calibration, data = manifest["metrics"], manifest["calibration"], manifest["data"]
    for entry in metrics.get("selection", []):
        if "step" in entry:  # otherwise it compares alignments; step 0 is untrained
            keys = [key for key in ("score", "image_auroc", "aupro") if key in entry]
            run.log_step_metrics(int(entry["step"]), {f"validation/{key}": float(entry[key]) for key in keys})
    seconds = {stage: float(value) for stage, value in metrics.get("seconds", {}).items()}
    values = {f"seconds/{stage}": value for stage, value in seconds.items()}
    values["seconds/total"] = sum(seconds.values())
    values.update({f"images/{key}": float(data[key]) for key in ("num_fit", "num_holdout") if key in data})
    for key in ("image_threshold", "pixel_threshold", "target_fpr"):
        values[f"calibration/{key}"] = float(calibration[key])
    values["bundle/size_mib"] = sum(file["num_bytes"] for file in manifest["files"].values()) / 2**20
    run.log_metrics(values)
    run.set_tags(_make_bundle_tags(bundle, manifest))


def _make_bundle_tags(bundle: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tags "bundle" (its URI) and "bundle_version" (hash of its manifest)."""
    return {"bundle": bundle, "bundle_version": str(manifest["sha256"])}


@dataclass(frozen=True)
class EvaluatedCategory:
    """The evaluation of one category, with all data that a tracker gets.

    Attributes:
        bundle: URI of the bundle.
        manifest: Manifest of the bundle.
        settings: All settings of the bundle, as nested mappings.
        result: Metric -> value, from the evaluation; "data" -> URI of the test images.
        cards: Function that returns the galleries of the report page. A gallery is a list of cards; a card shows one image.
    """

    bundle: str
    manifest: Mapping[str, Any]
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    cards: Callable[[], Sequence[Sequence[Any]]]


def record_evaluation(
    recorder: BackgroundRecorder, categories: Mapping[str, EvaluatedCategory], means: Mapping[str, float | None]
) -> None:
    """Writes metrics and pictures of an evaluation to the tracker runs of the training that made the bundles, and ends the runs.

    Args:
        recorder: Sends the data to the trackers.
        categories: Category -> its evaluation.
        means: Metric -> mean over the categories. The parent run gets the means if all bundles, at least two, come from the same
            training.

    Raises:
        DataError: The claim file of a training cannot be read.
    """
    run_tokens = {
        category: _read_run_token(evaluated.bundle, evaluated.manifest) for category, evaluated in categories.items()
    }
    has_parent_run = (
        len(run_tokens) > 1 and len(set(run_tokens.values())) == 1
    )  # several categories of the same training
    for category, evaluated in categories.items():
        training = TrainingDescription(run_tokens[category], evaluated.settings, has_parent_run)
        run = training.describe_category_run(category, evaluated.manifest["data"].get("fingerprint"))
        tags = {**_make_bundle_tags(evaluated.bundle, evaluated.manifest), "test_data": str(evaluated.result["data"])}
        recorder.write_to_run(run, methodcaller("set_tags", tags))
        recorder.write_to_run(run, methodcaller("log_metrics", name_evaluation_metrics(evaluated.result)))
        pictures = list(islice(make_gallery_pictures(evaluated.cards()), MAX_PICTURES))
        recorder.write_to_run(run, methodcaller("log_pictures", pictures))
        recorder.end_run(run)
    if has_parent_run:
        recorder.write_to_run(
            training.describe_training_run(), methodcaller("log_metrics", name_evaluation_metrics(means))
        )
        recorder.end_run(training.describe_training_run())


def _read_run_token(bundle: str, manifest: Mapping[str, Any]) -> bytes:
    """Returns the content of the claim file of the training that made a bundle.

    For a bundle outside the folder of a training, returns the hash of the bundle's manifest, as bytes.

    Raises:
        DataError: The file cannot be read.
    """
    claim_file = join_path(bundle.rstrip("/").rpartition("/bundles/")[0] or bundle, CLAIM_FILE)
    return read_bytes(claim_file) if file_exists(claim_file) else str(manifest["sha256"]).encode()


def name_evaluation_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns name in trackers -> value, for the metrics of an evaluation and of each defect type.

    The names are "test/METRIC" and "test_of_DEFECT/METRIC". Metrics without a value are left out.
    """
    keys = [*METRICS, *_COUNTS]
    metrics = {f"test/{key}": float(result[key]) for key in keys if result.get(key) is not None}
    for defect_type, type_result in result.get("defect_types", {}).items():
        for key in METRICS:
            if type_result.get(key) is not None:
                metrics[f"test_of_{_sanitize_name(defect_type)}/{key}"] = float(type_result[key])
    return metrics


def make_gallery_pictures(galleries: Sequence[Sequence[Any]]) -> Iterator[CaptionedPicture]:
    """Generator: yields a picture for each card, with the image and its heat map side by side.

    The order is: the first card of each gallery, then the second card of each gallery, and so on.
    """
    cards = [card for card in chain.from_iterable(zip_longest(*galleries)) if card is not None]
    for number, card in enumerate(cards, start=1):
        verdict = card.mistake or card.verdict
        yield CaptionedPicture(
            f"{number:02d}-{_sanitize_name(card.defect_type)}-{_sanitize_name(verdict)}",
            f"{card.name}: {card.defect_type}, {verdict}, score {card.score_to_threshold:.3g} times the threshold",
            _join_side_by_side([card.views["image"], card.views["heat map"]]),
        )


def _sanitize_name(text: str) -> str:
    """Returns a text in which "-" replaces all characters that file names or trackers do not allow; never an empty text."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.") or "unnamed"


def _join_side_by_side(uris: Sequence[str]) -> bytes:
    """Returns the bytes of a JPEG that shows several pictures side by side. uris: data URIs of pictures with equal heights."""
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")) for uri in uris
    ]
    sink = io.BytesIO()
    Image.fromarray(np.concatenate(images, axis=1)).save(sink, "JPEG", quality=_JPEG_QUALITY, comment=MARK)
    return sink.getvalue()
