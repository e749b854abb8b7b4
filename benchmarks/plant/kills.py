"""The same plant undisturbed and with nodes dying at random: rows, statistics and bundles must be equal."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.plant.made import upload_plant
from benchmarks.plant.nodes import NodeProcesses
from benchmarks.plant.server import BUCKET
from benchmarks.plant.watch import ROOT, make_settings
from focus_ray.bundle.bundle import find_bundles_in_folder, read_manifest
from focus_ray.data.read import data_fingerprint, list_categories, read_index

NUM_CATEGORIES, EACH = 12, 250


# runs the command line with 50 instead of 3 retries of a category
MANY_RETRIES = """
import runpy
import focus_ray.cluster.settings
focus_ray.cluster.settings.MAX_FAILURES = 50
runpy.run_module("focus_ray.cli", run_name="__main__")
"""


def run_command(arguments: list[str], log: Path, address: str, accept: tuple[int, ...] = (0,)) -> float:
    """Runs a focus-ray command on the cluster. Returns: seconds. Raises: SystemExit: it failed."""
    start = time.perf_counter()
    with log.open("w") as stream:
        status = subprocess.run(
            [sys.executable, "-c", MANY_RETRIES, *arguments],
            stdout=stream,
            stderr=stream,
            cwd=ROOT,
            env={**os.environ, "RAY_ADDRESS": address},
        ).returncode
    if status not in accept:
        raise SystemExit(f"focus-ray {' '.join(arguments)} ended with {status}: {log}")
    return time.perf_counter() - start


def hash_outcome(root: str) -> dict[str, Any]:
    """What must be equal: each category's rows, images and tensors of its bundle, whatever their order."""
    bundles = find_bundles_in_folder(f"{root}/runs/plant")
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


def run_once(arguments: argparse.Namespace, work: Path, number: int) -> dict[str, Any]:
    """One run of the whole way, undisturbed where it is number 0."""
    root = f"s3://{BUCKET}/kills-{number}"
    train = ["train", *make_settings(arguments, root)]
    with NodeProcesses(3, number or None) as nodes:
        address = nodes.address
        raw = f"s3://{BUCKET}/kills/raw"
        ingest = ["ingest", raw, f"{root}/data", "--workers", "3"]
        ingest_s = run_command(ingest, work / f"kills-{number}-ingest.log", address, accept=(0, 3))
        died = nodes.deaths
        train_s = run_command(train, work / f"kills-{number}-train.log", address)
        deaths = {"ingest": died, "train": nodes.deaths - died}
    return {
        "deaths": deaths,
        "ingest_s": round(ingest_s, 1),
        "train_s": round(train_s, 1),
        "outcome": hash_outcome(root),
    }


def compare_runs_with_kills(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Raises: SystemExit: a disturbed run came out otherwise than the undisturbed."""
    upload_plant("kills/raw", NUM_CATEGORIES, EACH, arguments.size)
    runs = []
    for number in range(arguments.times + 1):
        runs.append(run_once(arguments, work, number))
        print(json.dumps({key: value for key, value in runs[-1].items() if key != "outcome"}), flush=True)
        if runs[-1]["outcome"] != runs[0]["outcome"]:
            differing = [name for name, one in runs[0]["outcome"].items() if runs[-1]["outcome"].get(name) != one]
            raise SystemExit(f"run {number} came out otherwise in {', '.join(differing)}: {runs[0]} {runs[-1]}")
    return [{key: value for key, value in one.items() if key != "outcome"} for one in runs]
