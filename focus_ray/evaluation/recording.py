"""Records the results of an evaluation in the experiment trackers of the training or of the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from focus_ray.bundle.bundle import add_missing_settings, read_manifest
from focus_ray.errors import BundleError, ConfigError, FocusRayError
from focus_ray.fitting.settings import parse_config
from focus_ray.names import Log
from focus_ray.reporting.evaluation import EvaluationSection
from focus_ray.reporting.gallery import GalleryCard
from focus_ray.reporting.tables import compute_mean_metrics
from focus_ray.settings.sections import apply_overrides
from focus_ray.tracking.recorder import BackgroundRecorder
from focus_ray.tracking.runs import EvaluatedCategory, record_evaluation


def open_evaluation_recorder(
    bundles: Mapping[str, str], output: str, overrides: Sequence[str], log: Log
) -> BackgroundRecorder:
    """Returns a recorder for the experiment trackers of an evaluation: the trackers of the training, changed by `overrides`.

    Without overrides, a tracker that cannot be used gives only a warning, and the recorder then has no tracker. The recorder
    also has no tracker if no bundle is readable.

    Args:
        bundles: category -> URI of its bundle. The first readable manifest names the trackers of the training.
        output: folder of the evaluation. Trackers store their files below it if the bundles are not in the folder of a run.
        overrides: settings such as trackers.mlflow.uri=PLACE.

    Raises:
        ConfigError: an override is not of the section trackers, a tracker setting is invalid, or with overrides a tracker
            cannot be used.
        MissingPackageError: with overrides: the package extra of a tracker is not installed.
    """
    for override in overrides:
        if override.partition("=")[0].strip().partition(".")[0] != "trackers":
            raise ConfigError(
                f"{override!r}: an evaluation accepts only settings of trackers, such as trackers.mlflow.uri=PLACE, "
                "and of the section cluster"
            )
    for bundle in bundles.values():
        try:
            tree = read_manifest(bundle)["config"]
            break
        except (BundleError, FileNotFoundError):  # the evaluation reports this error
            continue
    else:
        return BackgroundRecorder({}, output, log)
    requested = apply_overrides({"data": {"uri": "-"}, "trackers": dict(tree.get("trackers", {}))}, list(overrides))
    trackers = parse_config(requested, "trackers").trackers
    root = bundle.rstrip("/").rpartition("/bundles/")[0]
    storage = root.rpartition("/")[0] or output
    try:
        return BackgroundRecorder(trackers, storage, log)
    except FocusRayError as error:
        if overrides:
            raise
        log(f"WARNING: the evaluation is not recorded in the trackers of the training: {error}")
        return BackgroundRecorder({}, output, log)


def record_in_trackers(
    recorder: BackgroundRecorder,
    bundles: Mapping[str, str],
    results: Mapping[str, Mapping[str, Any]],
    section_of: Callable[[str], EvaluationSection],
    log: Log,
) -> None:
    """Writes metrics and pictures of the evaluated categories to the experiment trackers, then closes the recorder.

    A `FocusRayError` gives only a warning in the log. Failed categories are left out. Nothing happens if the recorder has no
    tracker.

    Args:
        bundles: category -> URI of its bundle.
        results: category -> metrics, or a mapping with "error" for a failed category.
        section_of: function that returns a category's section of the report page, which has the pictures.
    """
    if not recorder:
        return

    def read_gallery_cards(category: str) -> list[list[GalleryCard]]:
        """Returns the gallery groups in a category's report section; each group is a list of cards (pictures)."""
        return [group.cards for group in section_of(category).gallery]

    with closing(recorder):
        try:
            measured = {}
            for category in (category for category, result in results.items() if "error" not in result):
                bundle, manifest = bundles[category], read_manifest(bundles[category])
                config = parse_config(add_missing_settings(manifest), bundle, is_fitted=True)
                cards = partial(read_gallery_cards, category)
                measured[category] = EvaluatedCategory(
                    bundle, manifest, config.model_dump(mode="json"), results[category], cards
                )
            record_evaluation(recorder, measured, compute_mean_metrics(results))
        except FocusRayError as error:
            log(f"WARNING: not everything was recorded: {error}")
