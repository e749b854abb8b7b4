"""Batch inspection: a Parquet set through bundles into Parquet, on Ray Data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from focus_ray.cluster.connect import connect, has_gpus
from focus_ray.cluster.preflight import probe_nodes
from focus_ray.cluster.streams import ray_dataset
from focus_ray.data.read import list_categories
from focus_ray.errors import DataError
from focus_ray.storage import is_s3, join, list_names, open_filesystem, remove_file, remove_folder, write_bytes

UNFINISHED = "_unfinished"  # in a folder of results until all of them are there; readers of Parquet pass it over


class BatchScorer:
    """Holds one bundle in an actor of Ray Data and scores batches of rows."""

    def __init__(self, uri: str) -> None:
        from focus_ray.bundle.inspector import Inspector

        self.inspector = Inspector.load(uri)
        self.version = self.inspector.bundle.version

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Columns id, label, defect_type, site, image -> those without the image, and the findings.

        A row whose image cannot be decoded gets its reason in `error`, and no score.
        """
        count = len(batch["id"])
        found: list[dict[str, Any]] = []
        try:
            found = [{**one.to_dict(), "error": None} for one in self.inspector.inspect(list(batch["image"]))]
        except DataError:
            found = [self._alone(bytes(image)) for image in batch["image"]]
        return {
            **{name: batch[name] for name in ("id", "label", "defect_type", "site")},
            "score": np.array([one.get("score", np.nan) for one in found], dtype=np.float64),
            "p_value": np.array([one.get("p_value", np.nan) for one in found], dtype=np.float64),
            "anomalous": np.array([bool(one.get("anomalous", False)) for one in found]),
            "threshold": np.full(count, self.inspector.bundle.calibration.image_threshold),
            "regions": np.array([json.dumps(one.get("regions", [])) for one in found], dtype=object),
            "error": np.array([one["error"] or "" for one in found], dtype=object),
            "bundle": np.array([self.version] * count, dtype=object),
        }

    def _alone(self, image: bytes) -> dict[str, Any]:
        try:
            return {**self.inspector.inspect([image])[0].to_dict(), "error": None}
        except DataError as error:
            return {"error": str(error)}


def inspect_dataset(
    bundles: Mapping[str, str],
    uri: str,
    output: str,
    split: str | None = None,
    num_actors: int = 1,
    batch_size: int = 32,
    log: Callable[[str], None] = lambda message: None,
) -> dict[str, dict[str, int]]:
    """Inspects every image of the bundles' categories; writes <output>/category=<name>/*.parquet.

    Args:
        bundles: category -> bundle.  split: train or test; None takes both.

    Returns: category -> num_images, num_anomalous, num_errors.

    Raises: DataError: the set lacks a category, or the output holds that category's results already.
    """
    unknown = sorted(set(bundles) - set(list_categories(uri)))
    if unknown:
        raise DataError(f"{uri} has no category {', '.join(unknown)}; it has {', '.join(list_categories(uri))}")
    for category in bundles:
        place = join(output, f"category={category}")
        there = list_names(place)
        if UNFINISHED in there:
            log(f"{place}: left unfinished by an earlier run: begun anew")
            remove_folder(place)
        elif there:
            raise DataError(f"{place} holds results already: give another output folder, or remove this one")
    import ray.data

    connect()
    probe_nodes([], [output])
    gpus = 1 if has_gpus() else 0
    counts = {}
    for category, bundle in bundles.items():
        dataset = ray_dataset(uri, category, split, columns=("id", "label", "defect_type", "site", "image"))
        results = dataset.map_batches(
            BatchScorer,
            fn_constructor_args=(bundle,),
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            batch_size=batch_size,
            num_gpus=gpus,
        ).materialize()
        place = join(output, f"category={category}")
        write_bytes(join(place, UNFINISHED), b"")
        filesystem, path = open_filesystem(place)
        results.write_parquet(path, filesystem=filesystem if is_s3(output) else None)
        remove_file(join(place, UNFINISHED))
        table = results.select_columns(["anomalous", "error"]).to_pandas()
        counts[category] = {
            "num_images": len(table),
            "num_anomalous": int(table["anomalous"].sum()),
            "num_errors": int((table["error"] != "").sum()),
        }
        log(f"{category}: " + ", ".join(f"{key} {value}" for key, value in counts[category].items()))
    return counts
