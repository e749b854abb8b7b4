"""The same plant undisturbed and with nodes dying at random: rows, statistics and bundles must be equal."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.plant.made import put_plant
from benchmarks.plant.server import BUCKET
from benchmarks.plant.watch import ROOT
from focus_ray.bundle.bundle import find_bundles, read_manifest
from focus_ray.data.read import data_fingerprint, list_categories, read_index

NUM_CATEGORIES, EACH = 12, 60
_LIVES_S = (4.0, 12.0)  # of a worker node, drawn anew for each


class Nodes:
    """A head without CPUs for work, and worker nodes of one CPU, each of which dies when its time has come and is replaced."""

    def __init__(self, num_nodes: int, seed: int | None) -> None:
        """seed: of the times; None lets all live."""
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.random = None if seed is None else random.Random(seed)
        self.deaths = 0
        self._end = threading.Event()
        self._lock = threading.Lock()  # the cluster's bookkeeping is not for several threads
        self._threads = [threading.Thread(target=self._live, daemon=True) for _ in range(num_nodes)]

    def __enter__(self) -> Nodes:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self.cluster.shutdown()

    def _live(self) -> None:
        while not self._end.is_set():
            with self._lock:
                node = self.cluster.add_node(num_cpus=1, wait=False)
            if self.random is None:
                self._end.wait()
                return
            if self._end.wait(5.0 + self.random.uniform(*_LIVES_S)):  # the first seconds it starts
                return
            with self._lock:
                self.cluster.remove_node(node, allow_graceful=False)
                self.deaths += 1


def command(arguments: list[str], log: Path, address: str, accept: tuple[int, ...] = (0,)) -> float:
    """Runs a focus-ray command on the cluster. Returns: seconds. Raises: SystemExit: it failed."""
    start = time.perf_counter()
    with log.open("w") as stream:
        status = subprocess.run(
            [sys.executable, "-m", "focus_ray.cli", *arguments],
            stdout=stream,
            stderr=stream,
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": address},
        ).returncode
    if status not in accept:
        raise SystemExit(f"focus-ray {' '.join(arguments)} ended with {status}: {log}")
    return time.perf_counter() - start


def outcome(root: str) -> dict[str, Any]:
    """What must be equal: each category's rows, images and tensors of its bundle, whatever their order."""
    bundles = find_bundles(f"{root}/runs/plant")
    found = {}
    for category in list_categories(f"{root}/data"):
        index = read_index(f"{root}/data", category)
        manifest = read_manifest(bundles[category])
        found[category] = {
            "rows": sorted(index["id"].to_pylist()),
            "images": data_fingerprint(f"{root}/data", category),
            "tensors": {part: entry["sha256"] for part, entry in manifest["files"].items()},
            "thresholds": manifest["calibration"]["image_threshold"],
        }
    return found


def once(arguments: argparse.Namespace, work: Path, number: int) -> dict[str, Any]:
    """One run of the whole way, undisturbed where it is number 0."""
    root = f"s3://{BUCKET}/kills-{number}"
    train = [
        "train",
        "default",
        "name=plant",
        f"data.uri={root}/data",
        f"storage={root}/runs",
        f"model.weights={arguments.weights}",
        f"model.image_size_px={arguments.size}",
        "cluster.local=false",
        "cluster.use_gpu=false",
        "cluster.max_failures=50",
    ]
    with Nodes(3, number or None) as nodes:
        address = nodes.cluster.address
        raw = f"s3://{BUCKET}/kills/raw"
        ingest = ["ingest", raw, f"{root}/data", "--workers", "3"]
        ingest_s = command(ingest, work / f"kills-{number}-ingest.log", address, accept=(0, 3))
        died = nodes.deaths
        train_s = command(train, work / f"kills-{number}-train.log", address)
        deaths = {"ingest": died, "train": nodes.deaths - died}
    return {"deaths": deaths, "ingest_s": round(ingest_s, 1), "train_s": round(train_s, 1), "outcome": outcome(root)}


def kills(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Raises: SystemExit: a disturbed run came out otherwise than the undisturbed."""
    put_plant("kills/raw", NUM_CATEGORIES, EACH, arguments.size)
    runs = []
    for number in range(arguments.times + 1):
        runs.append(once(arguments, work, number))
        print(json.dumps({key: value for key, value in runs[-1].items() if key != "outcome"}), flush=True)
        if runs[-1]["outcome"] != runs[0]["outcome"]:
            differing = [name for name, one in runs[0]["outcome"].items() if runs[-1]["outcome"].get(name) != one]
            raise SystemExit(f"run {number} came out otherwise in {', '.join(differing)}: {runs[0]} {runs[-1]}")
    return [{key: value for key, value in one.items() if key != "outcome"} for one in runs]
