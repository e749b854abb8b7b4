"""What a driver and a worker hold of a category of a million images, without the images: index, split, plan, job."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.harness import print_table
from benchmarks.peers.common import MemoryPeak, read_memory_mb
from benchmarks.plant.watch import ROOT
from focus_ray.data.schema import INDEX_COLUMNS, SCHEMA
from focus_ray.data.store import open_data_set
from focus_ray.fitting.settings import parse_config
from focus_ray.fitting.split import compute_split_rule


def write_index_only(root: Path, count: int) -> int:
    """A category whose commit names an index of `count` rows and no part file. Returns: bytes of the index."""
    numbers = np.arange(count)
    columns: dict[str, Any] = {
        "id": [f"part/good/{number:09}" for number in numbers],
        "split": np.where(numbers % 50 == 0, "test", "train"),
        "label": np.zeros(count, np.int8),
        "defect_type": ["good"] * count,
        "width": np.full(count, 1280, np.int32),
        "height": np.full(count, 1024, np.int32),
        "site": ["a"] * count,
        "content_hash": [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers],
        "group": [""] * count,
    }
    table = pa.table({name: columns[name] for name in INDEX_COLUMNS}).cast(
        pa.schema([SCHEMA.field(name) for name in INDEX_COLUMNS])
    )
    store = open_data_set(root)
    folder = Path(store.get_category_folder("part"))
    folder.mkdir(parents=True)
    digest = store._write_parquet_table(str(folder / "_index-made.parquet"), table)
    commit = {
        "schema_version": 1,
        "category": "part",
        "run_id": "made",
        "created": "2026-01-01T00:00:00+00:00",
        "files": [],
        "index": {"name": "_index-made.parquet", "sha256": digest},
        "num_rows": count,
        "source_fingerprint": "",
        "counts": {},
    }
    (folder / "_commit.json").write_text(json.dumps(commit))
    (folder / "_commits").mkdir()
    (folder / "_commits" / "made.json").write_text(json.dumps(commit))
    return (folder / "_index-made.parquet").stat().st_size


def measure_call(act: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, its seconds, and the memory that it took above what there was, MiB."""
    base = read_memory_mb()
    with MemoryPeak() as peak:
        start = time.perf_counter()
        found = act()
        seconds = time.perf_counter() - start
    return found, seconds, peak.highest - base


def measure_count(count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = write_index_only(Path(folder), count)
        config = parse_config({"data": {"uri": folder}})
        split, split_s, split_mb = measure_call(lambda: compute_split_rule(config, "part"))
        plan, plan_s, plan_mb = measure_call(lambda: split.build_plan(config))
    return {
        "images": count,
        "index_mb": num_bytes / 2**20,
        "split_s": split_s,
        "split_mb": split_mb,
        "plan_s": plan_s,
        "plan_mb": plan_mb,
        "held_mb": sum(rows.nbytes for rows in vars(plan).values() if isinstance(rows, np.ndarray)) / 2**20,
        "job_bytes": len(pickle.dumps(split)),
        "num_fit": split.num_fit,
        "num_holdout": split.num_holdout,
    }


def measure_index_sizes(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Each number of images in a process of its own."""
    rows = []
    for count in arguments.images:
        command = [sys.executable, "-m", "benchmarks.plant.light", str(count)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        rows.append(dict(json.loads(done.stdout)))
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    return rows


if __name__ == "__main__":
    print(json.dumps(measure_count(int(sys.argv[1]))))
