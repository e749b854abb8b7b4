"""A tiny data set of synthetic parts, a configuration that trains on it in seconds, and a bundle that is made without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from focus_ray.bundle.bundle import write_bundle
from focus_ray.data.schema import SCHEMA
from focus_ray.fitting.fit import FitResult, fit
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shards import build_shard
from focus_ray.fitting.split import compute_split_plan
from focus_ray.ingestion.ingest import ingest
from focus_ray.samples.write import write_samples
from focus_ray.storage.files import join_path

CATEGORIES = ("board", "gear")
NUM_TRAIN = 24  # good training images of each category
NUM_TEST = 8  # of each category: 4 good images, and 4 images with a defect and a mask


def draw_parts(folder: Path) -> Path:
    """Draws images of 64 px in the folder layout of MVTec AD, and returns the folder."""
    write_samples(folder, size_px=64, num_train=NUM_TRAIN, num_test_good=4, num_bad_per_type=1)
    return folder


def ingest_parts(folder: Path) -> str:
    """Draws and ingests images of parts, and returns the root of the data set."""
    ingest(draw_parts(folder / "images"), folder / "data", progress=False)
    return str(folder / "data")


def small_config(uri: str, storage: Path | str, **sections: dict[str, Any]) -> Config:
    """Returns the configuration of an untrained ResNet-18 at 64 px, without alignment, metric and profile of good images.

    Args:
        sections: settings of a section, such as model={"padding": "zeros"}, which override the settings below.
    """
    settings: dict[str, Any] = {
        "name": "small",
        "storage": str(storage),
        "data": {"uri": uri, "categories": ["gear"]},
        "model": {
            "weights": "random",
            "image_size_px": 64,
            "predictor_width": 8,
            "image_alignment": {"group": "none"},  # aligning takes most of the time of a small training
            "precision": "fp32",  # so that results do not depend on the machine
        },
        "train": {"steps": 0, "batch_size": 4, "learning_rate": 1e-3},
        "density": {"num_channels": 32, "reduction": "semi_orthogonal", "precision": "fp32"},
        "scoring": {"image_score": "maximum"},
        "calibration": {"method": "split"},
        "cluster": {"use_gpu": False, "local": False},
    }
    for name, section in sections.items():
        settings[name] = {**settings.get(name, {}), **section}
    return parse_config(settings, is_fitted=True)  # tests change values that are fixed for users


def fit_alone(config: Config, category: str = "gear") -> FitResult:
    """Trains a category in this process."""
    plan = compute_split_plan(config, category)
    shard = build_shard(config, category, plan, 0, 1)
    return fit(config, shard, len(plan.fit.rows), torch.device("cpu"))


def make_bundle(
    config: Config,
    category: str = "gear",
    place: Path | str | None = None,
    fingerprint: str = "",
    fit_hashes: Sequence[int] = (),
    result: FitResult | None = None,
) -> str:
    """Writes the bundle of a category and returns its address.

    Args:
        place: address of the bundle; None: the address that the command `train` uses.
        fit_hashes: hashes of the training images, for the bundle.
        result: result of the training; None trains the category in this process.
    """
    result = result or fit_alone(config, category)
    place = join_path(config.storage, config.name, "bundles", category) if place is None else str(place)
    write_bundle(
        place,
        config=config,
        category=category,
        detector=result.detector,
        statistics=result.statistics,
        calibration=result.calibration,
        data={
            "uri": config.data.uri,
            "fingerprint": fingerprint,
            "num_fit": result.statistics.num_images,
            "num_holdout": 0,
        },
        metrics={"history": result.notes.history},
        fit_hashes=fit_hashes,
    )
    return place


def corrupt_image(uri: str, category: str, row: int) -> None:
    """Replaces the encoded image of a row by bytes that are no image."""
    (path,) = (Path(uri) / f"category={category}").glob("part-*.parquet")
    table = pq.read_table(path, partitioning=None)
    images = table["image"].to_pylist()
    images[row] = b"not an image"
    table = table.set_column(table.schema.get_field_index("image"), SCHEMA.field("image"), [images])
    pq.write_table(table, path, compression="none")
