"""What the benchmarks share: one category trained and measured in this process, without Ray, and how results are printed."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from focus_ray.bundle.bundle import Bundle, read_git_commit, read_library_versions
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.read import list_categories, read_test_rows
from focus_ray.fitting.fit import FitResult, fit
from focus_ray.fitting.regions import load_frame
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shards import build_shard
from focus_ray.fitting.split import SplitPlan, compute_split_plan
from focus_ray.ingestion.ingest import ingest

RESULTS = Path(__file__).resolve().parent / "results"


def add_arguments(parser: argparse.ArgumentParser, several: bool = False, required: bool = True) -> None:
    """several: whether --data takes more than one.  required: whether it must be given."""
    parser.add_argument(
        "--data",
        required=required,
        nargs="+" if several else None,
        help="folder of images in a shape that ingest knows, or a Parquet set",
    )
    parser.add_argument("--categories", nargs="+", help="only these")
    parser.add_argument("--weights", default="default", help="model.weights: 'default', a file or a URI")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size-px", type=int, default=224)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", default="scratch/benchmarks", help="where a folder of images is ingested to")


def open_data(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """The Parquet set, ingested first where a folder of images was given, and the categories to run."""
    uri = arguments.data
    if "://" not in uri and not any(Path(uri).glob("category=*")):
        uri = str(Path(arguments.work) / "data")
        report = ingest(arguments.data, uri, categories=arguments.categories, progress=False)
        print(report)
    return uri, list(arguments.categories or list_categories(uri))


def make_base_settings(arguments: argparse.Namespace, uri: str) -> dict[str, Any]:
    return make_base_settings_of(uri, arguments.weights, arguments.image_size_px, arguments.backbone)


def make_base_settings_of(uri: str, weights: str, size_px: int, backbone: str = "resnet18") -> dict[str, Any]:
    return {"data": {"uri": uri}, "model": {"backbone": backbone, "weights": weights, "image_size_px": size_px}}


def merge_settings(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings joined, later ones over earlier ones."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merge_settings(result[key], value) if both else value
    return result


def fit_category(
    config: Config, category: str, device: str, plan: SplitPlan | None = None
) -> tuple[FitResult, Inspector]:
    """Trains one category in this process and gives an inspector of it."""
    plan = plan or compute_split_plan(config, category)
    shard = build_shard(config, category, plan, rank=0, num_workers=1)
    result = fit(config, shard, len(plan.fit.rows), torch.device(device), log=print)
    return result, make_inspector(config, category, result, device)


def make_inspector(config: Config, category: str, found: FitResult, device: str) -> Inspector:
    """What was fitted, as it would be read from its bundle."""
    frame = load_frame(config, category)
    return Inspector(
        Bundle({"category": category, "sha256": ""}, config, found.detector, found.calibration, frame), device
    )


def train_and_evaluate(
    tree: Mapping[str, Any], category: str, device: str
) -> tuple[FitResult, Inspector, dict[str, Any]]:
    """Trains and evaluates one category."""
    config = parse_config(dict(tree))
    result, inspector = fit_category(config, category, device)
    return result, inspector, inspector.evaluate(read_test_rows(config.data.uri, category))


def read_samples(path: str | None) -> list[dict[str, Any]]:
    """The samples that an earlier run wrote to a JSON Lines file; none without a file."""
    if path is None or not Path(path).is_file():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def describe_environment(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "commit": read_git_commit(),
        "device": name,
        "num_threads": torch.get_num_threads(),
        "versions": read_library_versions(),
    }


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        cells = (f"{cell:.4f}" if isinstance(cell, float) else "-" if cell is None else str(cell) for cell in row)
        print("| " + " | ".join(cells) + " |", flush=True)


def print_json(benchmark: str, arguments: argparse.Namespace, samples: Any) -> str:
    """The one JSON line that closes a benchmark's output. Returns: it."""
    line = json.dumps(
        {
            "benchmark": benchmark,
            **describe_environment(arguments.device),
            "arguments": vars(arguments),
            "samples": samples,
        }
    )
    print(line)
    return line


def save_json(benchmark: str, arguments: argparse.Namespace, samples: Any) -> None:
    """As `print_json`, with paths by their last part; kept in results/, in place of a former run's."""
    named = {
        key: [_shorten_path(one) for one in value] if isinstance(value, list) else _shorten_path(value)
        for key, value in vars(arguments).items()
    }
    line = print_json(benchmark, argparse.Namespace(**named), samples)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{benchmark}.json").write_text(line + "\n")


def _shorten_path(value: Any) -> Any:
    """A path's last part; anything else as it is."""
    return Path(value).name if isinstance(value, (str, Path)) and "/" in str(value) else value
