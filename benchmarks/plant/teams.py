"""Two teams that sweep at once on one cluster, each over categories of its own, in half of it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.plant.made import make_category_name, upload_plant
from benchmarks.plant.nodes import NodeProcesses
from benchmarks.plant.server import BUCKET
from benchmarks.plant.watch import ROOT, measure_command
from focus_ray.storage.files import list_folder_entries
from focus_ray.sweep.records import read_trial_records

EACH = 12  # training images of a category: twelve are enough to sweep on
SPACE = {"density.reduction": ["discriminant", "semi_orthogonal"]}


def run_sweep(team: str, categories: list[str], root: str, arguments: argparse.Namespace) -> list[str]:
    settings = {
        "data.uri": f"{root}/data",
        "data.categories": categories,
        "storage": f"{root}/sweeps",
        "name": team,
        "cluster.team": team,
        "cluster.use_gpu": False,
        "model.weights": arguments.weights,
        "model.image_size_px": arguments.size,
        "model.image_alignment.group": "none",
    }
    words = [f"base.{key}={json.dumps(value)}" for key, value in settings.items()]
    return ["sweep", "sweep", *words, f"space={json.dumps(SPACE)}", "cluster_share=0.5"]


def run_team_sweeps(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Raises: SystemExit: a sweep failed, or a trial of it."""
    count = arguments.categories
    root = f"s3://{BUCKET}/teams"
    upload_plant("teams/raw", 2 * count, EACH, arguments.size)
    ingest = measure_command(["ingest", f"{root}/raw", f"{root}/data"], work / "teams-ingest.log", accept=(0, 3))
    names = [make_category_name(number) for number in range(2 * count)]
    found: dict[str, Any] = {"categories": count, "ingest_s": ingest["seconds"]}
    with NodeProcesses(2, None) as nodes:
        start = time.perf_counter()
        environment = {**os.environ, "RAY_ADDRESS": nodes.address}
        running = {}
        for team, own in (("press", names[:count]), ("mill", names[count:])):
            command = [sys.executable, "-m", "focus_ray.cli", *run_sweep(team, own, root, arguments)]
            log = (work / f"teams-{team}.log").open("w")
            running[team] = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)
        for team, process in running.items():
            if process.wait():
                raise SystemExit(f"the sweep of {team} ended with {process.returncode}: {work}/teams-{team}.log")
            (place,) = (name for name in list_folder_entries(f"{root}/sweeps") if name.startswith(f"{team}-"))
            records = read_trial_records(f"{root}/sweeps/{place}")
            judged = sorted({category for record in records for category in record.categories})
            if [record.status for record in records] != ["finished", "finished"] or len(judged) != count:
                raise SystemExit(f"{team}: {[(record.number, record.status, record.reason) for record in records]}")
            found[team] = {
                "seconds": round(time.perf_counter() - start, 1),
                "trials": len(records),
                "categories": len(judged),
            }
    return found
