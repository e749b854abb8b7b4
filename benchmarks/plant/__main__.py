"""What a plant costs: images ingested from S3 to S3, appended to, trained, evaluated and inspected, with nodes dying or not.

    python -m benchmarks.plant grow --images 10000 100000 --categories 50     # is the cost of an image the same?
    python -m benchmarks.plant categories --categories 300                    # what does a category cost to begin with?
    python -m benchmarks.plant light --images 10000 1000000               # what a driver holds of a million images
    python -m benchmarks.plant teams --categories 64                       # two teams that sweep at once
    python -m benchmarks.plant kills --times 3                                # does a plant of dying machines give the same?

Each command runs as a user would run it, against SeaweedFS on this machine; requests and bytes are the server's own counts,
memory is what no other process shares. Images are made up, small, and each its own (`made.picture`).
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import print_table, save_json
from benchmarks.plant.kills import compare_runs_with_kills
from benchmarks.plant.light import measure_index_sizes
from benchmarks.plant.made import upload_plant
from benchmarks.plant.server import BUCKET, StorageServer
from benchmarks.plant.teams import run_team_sweeps
from benchmarks.plant.watch import make_settings, measure_command

STEPS = ("ingest", "ingest again", "train", "evaluate", "inspect-batch")
COLUMNS = (
    "step",
    "images",
    "seconds",
    "ms an image",
    "requests an image",
    "KiB read an image",
    "driver MB",
    "worker MB",
)


def format_row(step: str, images: int, cost: dict[str, Any]) -> list[Any]:
    requests = sum(count for kind, count in cost["requests"].items() if " " not in kind)
    return [
        step,
        images,
        cost["seconds"],
        round(1e3 * cost["seconds"] / images, 2),
        round(requests / images, 3),
        round(cost["sent_mb"] * 1024 / images, 2),
        cost["driver_mb"],
        cost["largest_worker_mb"],
    ]


def run_all_steps(arguments: argparse.Namespace, images: int, categories: int, work: Path) -> list[dict[str, Any]]:
    """The whole way of one plant. Returns: a record a step."""
    root = f"s3://{BUCKET}/{images}-{categories}"
    raw, run = f"{root}/raw", f"{root}/runs/plant"
    each = images // categories
    start = time.perf_counter()
    made = upload_plant(f"{images}-{categories}/raw", categories, each, arguments.size)
    print(
        f"{made['images']} images, {made['bytes'] / 2**20:.0f} MiB, put in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    workers = str(arguments.workers)
    steps: list[tuple[str, int, list[str]]] = [
        ("ingest", made["images"], ["ingest", raw, f"{root}/data", "--workers", workers]),
        ("ingest again", made["images"], ["ingest", raw, f"{root}/data", "--workers", workers]),
        ("train", images, ["train", *make_settings(arguments, root)]),
        ("evaluate", made["images"] - images, ["evaluate", run, "--workers", workers]),
        (
            "inspect-batch",
            made["images"],
            ["inspect-batch", run, f"{root}/data", f"{root}/found", "--workers", workers],
        ),
    ]
    records = []
    for step, count, command in steps:
        if step in arguments.steps:
            records.append(run_step(step, count, command, work))
    added = upload_plant(f"{images}-{categories}/more", categories, 1, arguments.size, first=10**6, tests=False)
    command = ["ingest", f"{root}/more", f"{root}/data", "--append", "--workers", workers]
    records.append(run_step("append", added["images"], command, work))
    return records


def run_step(step: str, count: int, command: list[str], work: Path) -> dict[str, Any]:
    cost = measure_command(command, work / f"{step.replace(' ', '-')}.log", accept=(0, 3))
    row = format_row(step, count, cost)
    print_table(COLUMNS, [row])
    return {"step": step, "images": count, **cost}


def measure_growing_set(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    found = {str(images): run_all_steps(arguments, images, arguments.categories, work) for images in arguments.images}
    print_table(COLUMNS, [format_row(one["step"], one["images"], one) for records in found.values() for one in records])
    return found


def measure_growing_categories(arguments: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    return run_all_steps(arguments, arguments.categories * arguments.each, arguments.categories, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("grow", "categories", "light", "kills", "teams"))
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000], help="training images in all")
    parser.add_argument("--categories", type=int, default=50)
    parser.add_argument(
        "--each", type=int, default=32, help="training images of a category, for `measure_growing_categories`"
    )
    parser.add_argument("--times", type=int, default=3, help="runs with deaths, for `compare_runs_with_kills`")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, help="besides appending")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--weights", default="random")
    parser.add_argument("--work", type=Path, default=Path("scratch/plant"), help="folder of the server and the logs")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    act = {
        "grow": measure_growing_set,
        "categories": measure_growing_categories,
        "light": measure_index_sizes,
        "kills": compare_runs_with_kills,
        "teams": run_team_sweeps,
    }[arguments.what]
    with StorageServer(arguments.work.absolute()):
        found = act(arguments, arguments.work)
    save_json(f"plant_{arguments.what}", arguments, found)


if __name__ == "__main__":
    main()
