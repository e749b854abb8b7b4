"""What a training and an evaluation say to trackers, and of whom: one subject a category, and one of all where there are several.

An evaluation goes on with the subjects of the training that its bundles lie beside.
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
from focus_ray.config import Config
from focus_ray.drawings import MARK
from focus_ray.errors import FocusRayError
from focus_ray.kinds import METRICS
from focus_ray.storage import exists, join, read_bytes
from focus_ray.tracking.base import Picture, Subject, parameters_of
from focus_ray.tracking.recorder import Recorder, reason_of

CLAIM = "claim.json"  # in a run's folder; holds what no other run's does
_JPEG_QUALITY = 90
_COUNTS = ("num_normal", "num_anomalous", "threshold", "target_fpr")
_NOT_SETTINGS = ("trackers.", "storage", "name", "data.categories")  # of a run and not of what it makes


def key_of(*parts: str | bytes) -> str:
    """A subject's key, from what no other has."""
    whole = b"\n".join(part.encode() if isinstance(part, str) else part for part in parts)
    return hashlib.sha256(whole).hexdigest()[:32]


class TrainingRecord:
    """Of one run. Subjects are begun as they have something to say."""

    def __init__(
        self, recorder: Recorder, config: Config, root: str, fingerprints: Mapping[str, str], several: bool
    ) -> None:
        """
        Args:
            root: of the run, which is claimed.  fingerprints: category -> of its images.  several: whether the run has more than
                one category.
        """
        self.recorder, self.config, self.root, self.fingerprints = recorder, config, root, fingerprints
        self.group: Subject | None = None
        self._subjects: dict[str, Subject] = {}
        self._steps: dict[str, set[int]] = {}
        if recorder:
            self._claim = read_bytes(join(root, CLAIM))
            if several:
                self.group = group_subject(self._claim, config)
                recorder.begin(self.group)

    def epoch(self, category: str, figures: Mapping[str, float]) -> None:
        """Figures of an epoch, as they come, with its number."""
        steps = self._steps.setdefault(category, set())
        step = int(figures["epoch"]) + 1
        if self.recorder and step not in steps:  # a worker that was lost leads to it again
            steps.add(step)
            self.recorder.curve(self._subject(category), step, epoch_figures(figures))

    def trained(self, category: str, bundle: str) -> None:
        """The end of a category; epochs that nobody told of are told now. One that cannot be read costs its figures alone."""
        if not self.recorder:
            return
        subject = self._subject(category)
        try:
            manifest = json.loads(read_bytes(join(bundle, "manifest.json")))
        except (FocusRayError, OSError) as error:
            self.recorder.log(f"WARNING: {category}: not everything was recorded: {reason_of(error)}")
            self.recorder.end(subject)
            return
        for figures in manifest["metrics"].get("history", []):
            self.epoch(category, figures)
        for step, figures in validation_curve(manifest):
            self.recorder.curve(subject, step, figures)
        self.recorder.figures(subject, training_figures(manifest))
        self.recorder.tag(subject, {"bundle": bundle, "bundle_version": str(manifest["sha256"])})
        self.recorder.end(subject)

    def failed(self, category: str, reason: str) -> None:
        if self.recorder:
            subject = self._subject(category)
            self.recorder.tag(subject, {"error": reason})
            self.recorder.end(subject, failed=True)

    def close(self, failed: bool) -> None:
        """The end of the run. Waits for trackers, but not for long."""
        if self.group is not None:
            self.recorder.end(self.group, failed)
        self.recorder.close()

    def _subject(self, category: str) -> Subject:
        if category not in self._subjects:
            subject = category_subject(self._claim, self.config, category, self.fingerprints.get(category), self.group)
            self._subjects[category] = subject
        return self._subjects[category]


def category_subject(
    claim: bytes, config: Config, category: str, fingerprint: str | None, group: Subject | None
) -> Subject:
    """claim: what no other run has."""
    tags = {"kind": "category", **_tags(config), "category": category, "data": config.data.uri}
    if fingerprint:
        tags["data_fingerprint"] = fingerprint
    return Subject(key_of(claim, category), f"{config.name}/{category}", group, _settings(config), tags)


def group_subject(claim: bytes, config: Config) -> Subject:
    return Subject(key_of(claim), config.name, None, _settings(config), {"kind": "run", **_tags(config)})


def _settings(config: Config) -> dict[str, Any]:
    """What makes the result, flat."""
    found = parameters_of(config.model_dump(mode="json"))
    return {key: value for key, value in found.items() if not key.startswith(_NOT_SETTINGS)}


def _tags(config: Config) -> dict[str, str]:
    tags = {"run": config.name, "storage": config.storage, "focus_ray": __version__}
    return {**tags, "team": config.cluster.team} if config.cluster.team else tags


def epoch_figures(figures: Mapping[str, float]) -> dict[str, float]:
    return {f"train/{key}": float(value) for key, value in figures.items() if key != "epoch"}


def validation_curve(manifest: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, float]]]:
    """Scores on good images held out and synthetic defects, by epoch; 0 is untrained."""
    for entry in manifest["metrics"].get("selection", []):
        if "epoch" in entry:
            found = {
                f"validation/{key}": float(entry[key]) for key in ("score", "image_auroc", "aupro") if key in entry
            }
            yield int(entry["epoch"]), found


def training_figures(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Seconds by stage, counts of images, thresholds and the size of the bundle."""
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
        "bundle/size_mib": sum(part["num_bytes"] for part in manifest["files"].values()) / 2**20,
    }


@dataclass(frozen=True)
class Measured:
    """A category of an evaluation. config: of its bundle.  result: as `evaluate` gives it.

    cards: gives the galleries of its page, each with its images' cards.
    """

    bundle: str
    manifest: Mapping[str, Any]
    config: Config
    result: Mapping[str, Any]
    cards: Callable[[], Sequence[Sequence[Any]]]


def record_evaluation(recorder: Recorder, measured: Mapping[str, Measured], means: Mapping[str, float | None]) -> None:
    """means: of the metrics, over the categories."""
    claims = {category: _claim_of(one.bundle, one.manifest) for category, one in measured.items()}
    group = None
    if len(claims) > 1 and len(set(claims.values())) == 1:  # several, of one run
        group = group_subject(next(iter(claims.values())), next(iter(measured.values())).config)
        recorder.figures(group, evaluation_figures(means))
        recorder.end(group)
    for category, one in measured.items():
        fingerprint = one.manifest["data"].get("fingerprint")
        subject = category_subject(claims[category], one.config, category, fingerprint, group)
        tested = {"test_data": str(one.result["data"])}
        recorder.tag(subject, {"bundle": one.bundle, "bundle_version": str(one.manifest["sha256"]), **tested})
        recorder.figures(subject, evaluation_figures(one.result))
        if recorder.num_images:
            recorder.pictures(subject, list(islice(pictures_of(one.cards()), recorder.num_images)))
        recorder.end(subject)


def _claim_of(bundle: str, manifest: Mapping[str, Any]) -> bytes:
    """What no other run has: of the run that a bundle lies in; of one that was taken elsewhere, the bundle's own hash."""
    place = join(bundle.rstrip("/").rpartition("/bundles/")[0] or bundle, CLAIM)
    return read_bytes(place) if exists(place) else str(manifest["sha256"]).encode()


def evaluation_figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Metrics, those of each defect type too; what cannot be had is left out."""
    keys = [*METRICS, *_COUNTS]
    found = {f"test/{key}": float(result[key]) for key in keys if result.get(key) is not None}
    for kind, own in result.get("defect_types", {}).items():
        for key in METRICS:
            if own.get(key) is not None:
                found[f"test_of_{_plain(kind)}/{key}"] = float(own[key])
    return found


def pictures_of(galleries: Sequence[Sequence[Any]]) -> Iterator[Picture]:
    """Image and heat map side by side, of each gallery's first card, then of each one's second."""
    cards = [card for card in chain.from_iterable(zip_longest(*galleries)) if card is not None]
    for number, card in enumerate(cards, start=1):
        verdict = card.mistake or card.verdict
        yield Picture(
            f"{number:02d}-{_plain(card.defect_type)}-{_plain(verdict)}",
            f"{card.name}: {card.defect_type}, {verdict}, score {card.score_to_threshold:.3g} times the threshold",
            _side_by_side([card.views["image"], card.views["heat map"]]),
        )


def _plain(text: str) -> str:
    """Fit for a file and for every tracker's names."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.") or "unnamed"


def _side_by_side(uris: Sequence[str]) -> bytes:
    """JPEG data URIs of one size -> JPEG."""
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")) for uri in uris
    ]
    sink = io.BytesIO()
    Image.fromarray(np.concatenate(images, axis=1)).save(sink, "JPEG", quality=_JPEG_QUALITY, comment=MARK)
    return sink.getvalue()
