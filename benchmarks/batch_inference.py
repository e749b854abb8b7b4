"""Compares two ways to inspect the images of a data set on Ray: the worker pool of inspect-batch, and Ray Data.

    python -m benchmarks.batch_inference --bundle BUNDLE --copies 8 [--workers 1 2 4]

Both ways read the same Parquet files and write Parquet files with a row for each image. With Ray Data, tasks read the files, an
actor pool inspects batches, and tasks write the results. An actor decodes and scores a batch as a worker of the pool does ("Ray
Data"), or tasks decode the images and the actors only score them ("Ray Data, decoding tasks"). Each way runs on a new private Ray
with as many CPUs as workers, plus one CPU for Ray Data's own tasks. The time is from the call to the last result, so that it
contains the start of the workers. `--copies` repeats the images of the category, shifted, under new ids.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.harness import print_table, save_json
from focus_ray.bundle.bundle import read_manifest
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.images import decode_batch
from focus_ray.data.read import read_index, read_rows
from focus_ray.evaluation.batch_inspection import inspect_dataset, inspect_records
from focus_ray.ingestion.ingest import ingest

BATCH_IMAGES = 32
PART_IMAGES = 64


def write_copies(bundle: str, folder: Path, copies: int) -> str:
    """Ingests shifted copies of a category's images, and returns the root of the new data set. The category keeps its name."""
    manifest = read_manifest(bundle)
    source, category = manifest["data"]["uri"], manifest["category"]
    index = read_index(source, category)
    inspector = Inspector.load(bundle, "cpu")
    good = folder / "images" / category / "train" / "good"
    good.mkdir(parents=True)
    for record in read_rows(source, category, index["row"].to_numpy()):
        pixels = decode_batch([record["image"]], inspector.frame, names=["image"])[0]
        for copy in range(copies):
            name = hashlib.sha256(f"{record['id']}-{copy}".encode()).hexdigest()[:16]
            Image.fromarray(np.roll(pixels, copy, axis=1)).save(good / f"{name}.png")
    ingest(folder / "images", folder / "data", progress=False)
    return str(folder / "data")


def inspect_with_pool(bundle: str, data: str, output: Path, num_workers: int) -> None:
    """Inspects the data set as the command inspect-batch does."""
    category = read_manifest(bundle)["category"]
    inspect_dataset(
        {category: bundle}, data, str(output), num_actors=num_workers, batch_size=BATCH_IMAGES, part_images=PART_IMAGES
    )


class DataActor:
    """Inspects batches of a Ray Data dataset: rows with encoded images, or with the decoded pixels of the images."""

    def __init__(self, bundle: str) -> None:
        self.inspector = Inspector.load(bundle)

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        names = list(batch)
        records = [dict(zip(names, row, strict=True)) for row in zip(*batch.values(), strict=True)]
        if "pixels" not in batch:
            return inspect_records(self.inspector, records)
        scores, maps = self.inspector.score(np.stack(list(batch["pixels"])))
        rows = []
        for record, score, anomaly_map in zip(records, scores, maps, strict=True):
            height, width = record["pixels"].shape[:2]
            inspection = self.inspector.compare_with_thresholds(float(score), anomaly_map, width, height)
            rows.append({"id": record["id"], "score": inspection.score, "anomalous": inspection.anomalous})
        return pa.Table.from_pylist(rows)


def inspect_with_ray_data(bundle: str, data: str, output: Path, num_workers: int, decodes_in_tasks: bool) -> None:
    """Inspects the data set with an actor pool of Ray Data."""
    from focus_ray.training.streams import read_ray_dataset

    frame = Inspector.load(bundle, "cpu").frame
    columns = ("id", "label", "defect_type", "site", "image")
    dataset = read_ray_dataset(data, read_manifest(bundle)["category"], columns=columns)

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        return {"id": batch["id"], "pixels": decode_batch([bytes(image) for image in batch["image"]], frame)}

    if decodes_in_tasks:
        dataset = dataset.map_batches(decode, batch_size=BATCH_IMAGES)
    dataset = dataset.map_batches(
        DataActor, fn_constructor_args=(bundle,), batch_size=BATCH_IMAGES, num_cpus=1, concurrency=num_workers
    )
    dataset.write_parquet(str(output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", required=True, help="a bundle, whose training data set is inspected")
    parser.add_argument("--copies", type=int, default=8, help="shifted copies of each image")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=2)
    parser.set_defaults(device="cpu")
    arguments = parser.parse_args()
    import ray

    from focus_ray.cluster.connect import connect_to_ray

    ways = {
        "worker pool": inspect_with_pool,
        "Ray Data": lambda *inputs: inspect_with_ray_data(*inputs, decodes_in_tasks=False),
        "Ray Data, decoding tasks": lambda *inputs: inspect_with_ray_data(*inputs, decodes_in_tasks=True),
    }
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_copies(arguments.bundle, folder, arguments.copies)
        num_images = len(read_index(data, read_manifest(arguments.bundle)["category"]))
        for num_workers in arguments.workers:
            for repeat in range(arguments.repeats):
                for way, inspect in ways.items():
                    connect_to_ray(num_cpus=num_workers + 1)
                    output = folder / f"{way}-{num_workers}-{repeat}"
                    start = time.perf_counter()
                    inspect(arguments.bundle, data, output, num_workers)
                    seconds = time.perf_counter() - start
                    ray.shutdown()
                    num_rows = sum(pq.ParquetFile(file).metadata.num_rows for file in output.rglob("*.parquet"))
                    assert num_rows == num_images, (way, num_rows, num_images)
                    samples.append({"way": way, "workers": num_workers, "seconds": seconds, "images": num_images})
    rows = [
        [
            way,
            *(
                f"{num_images / statistics.median(s['seconds'] for s in samples if (s['way'], s['workers']) == (way, n)):.1f}"
                for n in arguments.workers
            ),
        ]
        for way in ways
    ]
    print_table(["images/s, start included", *(f"{n} workers" for n in arguments.workers)], rows)
    save_json("batch_inference", arguments, samples)


if __name__ == "__main__":
    main()
