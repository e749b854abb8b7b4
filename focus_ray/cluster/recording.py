"""Experiment trackers of an evaluation: those of its bundles' training, or what is asked for; and what they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from focus_ray.bundle.bundle import complete_settings, read_manifest
from focus_ray.config import override_tree, parse_config
from focus_ray.errors import BundleError, ConfigError, FocusRayError
from focus_ray.evaluation.report import mean_metrics
from focus_ray.names import Log
from focus_ray.reporting.evaluation import EvaluationSection
from focus_ray.tracking.recorder import Recorder
from focus_ray.tracking.runs import EvaluatedCategory, record_evaluation


def evaluation_recorder(bundles: Mapping[str, str], output: str, overrides: Sequence[str], log: Log) -> Recorder:
    """
    Args:
        bundles: category -> bundle; the first that can be read says what its training recorded to.
        output: of the evaluation, beside which trackers keep their files where the bundles are in no run's folder.
        overrides: trackers.KIND.KEY=value.

    Raises: ConfigError, MissingPackageError: one is of another section, or does not fit, or a tracker that one asks for cannot be
        used. One that only the training asked for is told of, and done without.
    """
    wrong = [word for word in overrides if word.partition("=")[0].strip().partition(".")[0] != "trackers"]
    if wrong:
        raise ConfigError(
            f"{wrong[0]!r}: an evaluation takes settings of trackers alone, as in trackers.mlflow.uri=PLACE"
        )
    for bundle in bundles.values():
        try:
            tree = read_manifest(bundle)["config"]
            break
        except (BundleError, FileNotFoundError):  # the evaluation tells of it
            continue
    else:
        return Recorder({}, output, log)
    asked = override_tree({"data": {"uri": "-"}, "trackers": dict(tree.get("trackers", {}))}, list(overrides))
    trackers = parse_config(asked, "trackers").trackers
    root = bundle.rstrip("/").rpartition("/bundles/")[0]
    storage = root.rpartition("/")[0] or output
    try:
        return Recorder(trackers, storage, log)
    except FocusRayError as error:
        if overrides:
            raise
        log(f"WARNING: not recorded as the training was: {error}")
        return Recorder({}, output, log)


def record_results(
    recorder: Recorder, bundles: Mapping[str, str], results: Mapping[str, Mapping[str, Any]], section: Any, log: Log
) -> None:
    """section: gives a category's part of the page. What fails here is told, and fails nothing else."""
    if not recorder:
        return
    with recorder:
        try:
            measured = {
                category: _measured(bundles[category], result, lambda category=category: _cards(section(category)))
                for category, result in results.items()
                if "error" not in result
            }
            record_evaluation(recorder, measured, mean_metrics(results))
        except FocusRayError as error:
            log(f"WARNING: not everything was recorded: {error}")


def _measured(bundle: str, result: Mapping[str, Any], cards: Any) -> EvaluatedCategory:
    manifest = read_manifest(bundle)
    return EvaluatedCategory(bundle, manifest, parse_config(complete_settings(manifest), bundle), result, cards)


def _cards(section: EvaluationSection) -> list[list[Any]]:
    return [list(part.cards) for part in section.gallery]
