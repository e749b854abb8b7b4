"""Checks of what a configuration names: its storage, its data set, its weights."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

from focus_ray.config import ModelConfig
from focus_ray.data.framing import Frame
from focus_ray.data.images import decode_batch
from focus_ray.data.read import list_categories, read_rows
from focus_ray.data.regions import frame_of
from focus_ray.data.store import Store, open_store
from focus_ray.doctor.finding import Asked, Result, failed, ok
from focus_ray.doctor.machine import there
from focus_ray.kinds import TRACKERS
from focus_ray.storage import is_s3, open_filesystem, probe

TIMEOUT_S = 5.0


def storage(asked: Asked) -> Result:
    """Writes, reads, lists and deletes a small file. Raises: DataError: one of these is not allowed."""
    uri = asked.config.storage
    if is_s3(uri):
        probe(uri)
        return ok(f"{uri} can be written, read, listed and deleted in")
    place = there(uri)
    if not place.is_dir():
        return failed(f"{uri}: {place} is a file", "set storage to a folder")
    probe(str(place))  # above a folder that is not there yet, so that none is left behind
    if str(place) != open_filesystem(uri)[1]:
        return ok(f"{uri} can be made in {place}")
    return ok(f"{uri} can be written, read, listed and deleted in")


def data(asked: Asked) -> Result | None:
    """Every category that is to be trained: its files, its counts, and its first image. Raises: DataError: one is amiss."""
    if not asked.has_data:
        return None
    settings = asked.config.data
    store = open_store(settings.uri)
    categories = settings.categories or tuple(list_categories(settings.uri))
    told = [_category(store, category, frame_of(asked.config, category)) for category in categories]
    damaged = [text for whole, text in told if not whole]
    if damaged:
        return failed(f"{settings.uri}: {'; '.join(damaged)}", "ingest these categories again")
    return ok(f"{settings.uri}: {len(told)} categories: {'; '.join(text for _, text in told)}")


def trackers(asked: Asked) -> Result:
    """Every tracker that is asked for. Raises: ConfigError: one's package is missing, or its place is not to be had."""
    settings, uri = asked.config.trackers, asked.config.storage
    if not settings:
        return ok("none is asked for")
    return ok("; ".join(f"{kind}: {TRACKERS[kind].check(one, uri)}" for kind, one in settings.items()))


def _category(store: Store, category: str, frame: Frame) -> tuple[bool, str]:
    """Whether it is whole and can be trained on, and its counts in words."""
    commit = store.need_commit(category)
    if not store.is_whole(category, commit):
        return False, f"{category}: files of its data are missing or damaged"
    counts = commit["counts"]
    if not counts["num_train"]:
        return False, f"{category}: no normal training image"
    (first,) = read_rows(store.uri, category, [0], columns=("image",))
    decode_batch([first["image"]], frame)
    return True, (
        f"{category} {counts['num_train']} train, {counts['num_test_normal']} normal and {counts['num_test_anomalous']} "
        "anomalous test images"
    )


def weights(asked: Asked) -> Result:
    """The backbone's weights, loaded; where they are not at hand, whether they could be.

    Raises: WeightsError: they cannot be read, or do not fit.
    """
    from focus_ray.model.backbones.base import build_backbone

    model = asked.config.model
    named = f"model.backbone={model.backbone}, model.weights={model.weights}"
    if model.weights == "random":
        return ok(f"{named}: nothing to load")
    url, file = _download(model)
    if url and file is not None and not file.is_file():
        reason = _unreachable(url)
        if not reason:
            return ok(f"{named}: not on this machine yet, and {url} can be reached: the first run downloads them")
        return (
            asked.trouble,
            f"{named}: not on this machine ({file}), and {url} cannot be reached ({reason})",
            "set model.weights to a file, put the downloaded file in that place, or set model.backbone=efficientnet_lite0, "
            "whose weights come in a package",
        )
    build_backbone(model.backbone, model.weights, model.weights_sha256)
    return ok(f"{named}: they load and fit")


def _download(model: ModelConfig) -> tuple[str | None, Path | None]:
    """Where weights would be downloaded from and to; None, None where they are at hand or not to be had so."""
    from focus_ray.model.backbones.weights import download_path, find_hub_weights, hub_cache_path

    if model.weights.startswith(("http://", "https://")):
        return model.weights, download_path(model.weights)
    known = find_hub_weights(model.backbone) if model.weights == "default" else None
    return (None, None) if known is None else (known.url, hub_cache_path(Path(known.url).name))


def _unreachable(url: str) -> str:
    """Why a file cannot be had, through the proxies that the environment names; empty where it can."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except OSError as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""
