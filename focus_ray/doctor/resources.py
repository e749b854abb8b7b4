"""Checks of the resources of a configuration: storage, data set, weights, trackers."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

from focus_ray.data.images import decode_batch
from focus_ray.data.read import list_categories, read_rows
from focus_ray.data.store import open_data_set
from focus_ray.doctor.diagnosis import CheckContext, CheckResult, report_failure, report_ok
from focus_ray.doctor.machine import find_nearest_existing_folder
from focus_ray.errors import DataError
from focus_ray.features.settings import ModelConfig
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import Config
from focus_ray.storage.files import check_folder_access, is_s3_uri, open_filesystem
from focus_ray.tracking.registry import TRACKERS

TIMEOUT_S = 5.0


def check_storage_access(context: CheckContext) -> CheckResult:
    """Checks the storage: writes, reads, lists and deletes a small file.

    Raises:
        DataError: One of these operations is not allowed.
    """
    uri = context.config.storage
    # If the storage does not exist yet, this is its nearest existing parent: the check must not create folders.
    place = uri if is_s3_uri(uri) else str(find_nearest_existing_folder(uri))
    if not is_s3_uri(uri) and not Path(place).is_dir():
        return report_failure(f"{uri}: {place} is a file", "set storage to a folder")
    check_folder_access(place)
    if place not in (uri, open_filesystem(uri)[1]):
        return report_ok(f"{uri} can be created in {place}")
    return report_ok(f"{uri}: files can be written, read, listed and deleted")


def check_data_set(context: CheckContext) -> CheckResult | None:
    """Checks every category of the run: its files exist, it has training images, and its first image can be decoded.

    Does not apply if the user named no data set.

    Raises:
        DataError: The data set or a category does not exist, or an image cannot be read.
    """
    if not context.has_data:
        return None
    settings = context.config.data
    categories = settings.categories or tuple(list_categories(settings.uri))
    counts = "; ".join(_check_category(context.config, category) for category in categories)
    return report_ok(f"{settings.uri}: {len(categories)} categories: {counts}")


def check_trackers(context: CheckContext) -> CheckResult:
    """Checks every experiment tracker of the configuration.

    Raises:
        ConfigError: The package of a tracker is not installed, or its folder or server cannot be used.
    """
    trackers, storage = context.config.trackers, context.config.storage
    if not trackers:
        return report_ok("the configuration names none")
    return report_ok(
        "; ".join(f"{kind}: {TRACKERS[kind].check(settings, storage)}" for kind, settings in trackers.items())
    )


def _check_category(config: Config, category: str) -> str:
    """Checks that a category can be used for training, and returns its numbers of images.

    Raises:
        DataError: The category does not exist, its files are damaged, or it has no training image.
    """
    store = open_data_set(config.data.uri)
    commit = store.require_commit(category)
    counts = commit["counts"]
    problem = "" if counts["num_train"] else "it has no normal training image"
    if not store.has_all_files(category, commit):
        problem = "data files are missing or damaged"
    if problem:
        raise DataError(f"{config.data.uri}: {category}: {problem}: ingest this category again")
    (first,) = read_rows(store.uri, category, [0], columns=("image",))
    decode_batch([first["image"]], load_frame(config, category))
    return (
        f"{category} {counts['num_train']} train, {counts['num_test_normal']} normal and {counts['num_test_anomalous']} "
        "anomalous test images"
    )


def check_backbone_weights(context: CheckContext) -> CheckResult:
    """Loads the weights of the backbone. If they are not on this machine, checks that their URL answers.

    Raises:
        WeightsError: The file cannot be read, or the weights do not fit the backbone.
    """
    from focus_ray.features.backbones.base import build_backbone

    model = context.config.model
    settings = f"model.backbone={model.backbone}, model.weights={model.weights}"
    if model.weights == "random":
        return report_ok(f"{settings}: nothing to load")
    url, file = _find_download_location(model)
    if url and file is not None and not file.is_file():
        reason = _find_url_problem(url)
        if not reason:
            return report_ok(f"{settings}: not on this machine yet, but {url} answers: the first run downloads them")
        return (
            "FAILED" if context.has_config else "warning",
            f"{settings}: not on this machine ({file}), and {url} cannot be reached ({reason})",
            f"set model.weights to a file, download the weights to {file}, or set model.backbone=efficientnet_lite0, "
            "whose weights come with a package",
        )
    build_backbone(model.backbone, model.weights, model.weights_sha256)
    return report_ok(f"{settings}: they load and fit")


def _find_download_location(model: ModelConfig) -> tuple[str | None, Path | None]:
    """Returns (URL, local file) of weights that are downloaded; (None, None) for weights that are not downloaded."""
    from focus_ray.features.backbones.weights import (
        find_torchvision_weights,
        get_download_cache_path,
        get_hub_cache_path,
    )

    if model.weights.startswith(("http://", "https://")):
        return model.weights, get_download_cache_path(model.weights)
    hub_weights = model.backbone_spec.hub_weights
    if model.weights != "default" or hub_weights is None:
        return None, None
    url = find_torchvision_weights(hub_weights).url
    return url, get_hub_cache_path(Path(url).name)


def _find_url_problem(url: str) -> str:
    """Returns the reason why a URL cannot be read, through the proxies of the environment; empty if it can be read."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except OSError as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""
