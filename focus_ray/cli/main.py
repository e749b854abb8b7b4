"""The `focus-ray` command. Every subcommand imports heavy modules only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from focus_ray import __version__
from focus_ray.cli.calibrate import add_calibrate_parser
from focus_ray.cli.completion import add_completion_parser, answer_shell
from focus_ray.cli.config import add_config_parser
from focus_ray.cli.data import _samples, add_data_parser
from focus_ray.cli.doctor import add_doctor_parser
from focus_ray.cli.export import add_export_parser
from focus_ray.cli.fit import add_fit_parser
from focus_ray.cli.inspect import _evaluate, _inspect, _inspect_batch
from focus_ray.cli.jobs import add_jobs_parser
from focus_ray.cli.output import EXIT_ERROR, EXIT_INTERRUPTED, accept_all_characters
from focus_ray.cli.registry import add_registry_parser
from focus_ray.cli.serve import add_serving_parser
from focus_ray.cli.sweep import _sweep
from focus_ray.cli.train import _metric, _train, _update
from focus_ray.cli.watch import add_watch_parser
from focus_ray.cluster.messages import VERBOSE
from focus_ray.errors import FocusRayError, explain_missing_module, require_extra

# Command -> the extra that it always needs. Other commands name a missing package when they need it.
NEEDS = {
    "fit": "train",
    "train": "train",
    "evaluate": "train",
    "calibrate": "train",
    "sweep": "ray",
    "inspect-batch": "ray",
    "serve": "ray",
    "submit": "ray",
    "jobs": "ray",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    The status is 0 after success, 1 after an error (printed on standard error), 3 after a partial failure, 130 after an
    interrupt. `submit` and `jobs follow` return the status of their job.
    """
    accept_all_characters()
    words = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    answer_shell(parser)
    if not words:
        parser.print_help()
        return 0
    arguments = parse_words(parser, words)
    if arguments.verbose:
        os.environ[VERBOSE] = "1"
    try:
        if arguments.command in NEEDS:
            require_extra(NEEDS[arguments.command], f"focus-ray {arguments.command}")
        return int(arguments.run(arguments))
    except FocusRayError as error:
        print(f"focus-ray: {error}", file=sys.stderr)
        return EXIT_ERROR
    except ModuleNotFoundError as error:
        message = explain_missing_module(error)
        if message is None:
            raise
        print(f"focus-ray: {message}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("focus-ray: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parses a command line. Settings (key=value) may also follow options, which argparse (3.11) does not allow."""
    arguments, remaining_words = parser.parse_known_args(words)
    if remaining_words and hasattr(arguments, "override") and not any(word.startswith("-") for word in remaining_words):
        arguments.override = [*arguments.override, *remaining_words]
    elif remaining_words:
        parser.error(f"unrecognized arguments: {' '.join(remaining_words)}")
    for name, value in vars(arguments).items():
        if name != "words":  # words of `submit` are for another machine with another home folder
            setattr(arguments, name, _expand_home(value))
    return arguments


def _expand_home(value: Any) -> Any:
    """Replaces a leading ~ by the home folder, because a shell does not do so in --output=~/x."""
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of `focus-ray` with all its commands."""
    parser = argparse.ArgumentParser(
        prog="focus-ray",
        description="Learns from images of good parts. For a new image it says whether the part is defective, where the "
        "defect is, and how certain that is.",
    )
    parser.add_argument("--version", action="version", version=f"focus-ray {__version__}")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own messages and all output of workers")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_data_parser(commands)

    train = commands.add_parser("train", help="train one model for each category and write its bundle")
    train.add_argument("config", nargs="?", help="a YAML file, or a name of `focus-ray config list`")
    train.add_argument("override", nargs="*", help="key=value, for instance train.epochs=10")
    train.add_argument(
        "--config", dest="named", metavar="CONFIG", help="the configuration as an option; then all words are key=value"
    )
    train.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="also show Ray's own messages")
    train.add_argument("--resume", action="store_true", help="continue the run of this name")
    train.set_defaults(run=_train)

    add_fit_parser(commands)

    sweep = commands.add_parser(
        "sweep",
        help="search settings over categories",
        description="focus-ray sweep CONFIG [key=value ...] starts a sweep; base.KEY=VALUE overrides the configuration "
        "from which trials start. `status`, `resume` and `report` take the folder of a sweep.",
    )
    sweep.add_argument(
        "what", metavar="CONFIG|status|resume|report", help="a YAML file, or a name of `focus-ray config list`"
    )
    sweep.add_argument(
        "rest", nargs="*", metavar="key=value|PLACE", help="a setting such as num_trials=20, or the folder of a sweep"
    )
    sweep.set_defaults(run=_sweep)

    evaluate = commands.add_parser("evaluate", help="measure bundles on the labelled test images")
    evaluate.add_argument("bundles", help="a bundle, a run's folder, a registry, or a team's folder in a registry")
    evaluate.add_argument(
        "override",
        nargs="*",
        help="trackers.KIND.KEY=value (default: the trackers of the training); trackers={} records nothing",
    )
    evaluate.add_argument("--data", help="Parquet data set (default: the data set of the training)")
    evaluate.add_argument(
        "--output", help="folder for report.html, .md and .json (default: report/ beside the bundles)"
    )
    evaluate.add_argument(
        "--max-side-px",
        type=int,
        default=512,
        help="largest side at which maps and masks are compared; larger masks are reduced (default: 512)",
    )
    evaluate.add_argument(
        "--exact-megapixels",
        type=float,
        default=128,
        metavar="N",
        help="size of a category's maps up to which pixel metrics are exact; above, pixels are counted in bins (default: 128)",
    )
    evaluate.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="parallel workers on Ray (default: none, in this process; on a cluster, as many as fit)",
    )
    evaluate.add_argument("--resume", action="store_true", help="continue the evaluation in the folder --output")
    _add_version(evaluate)
    evaluate.set_defaults(run=_evaluate)

    inspect = commands.add_parser("inspect", help="score images; prints JSON lines, and can draw heat maps")
    inspect.add_argument("bundle", help="a bundle")
    inspect.add_argument("images", nargs="+", help="image files, or folders of them")
    inspect.add_argument("--overlays", metavar="FOLDER", help="folder for the heat map over each image")
    inspect.add_argument(
        "--csv", metavar="FILE", help="also write a table: one row for each image, after the last image"
    )
    inspect.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    inspect.add_argument(
        "--engine",
        default="torch",
        help="engine for the features: torch, or on a CPU onnxruntime or onnxruntime-int8 (default: torch)",
    )
    inspect.add_argument(
        "--examples",
        nargs="+",
        metavar="IMAGE",
        help="image files of good parts, or folders of them, for scaling and checking another engine",
    )
    inspect.set_defaults(run=_inspect)

    add_watch_parser(commands)

    batch = commands.add_parser("inspect-batch", help="score a Parquet data set on Ray into Parquet")
    batch.add_argument("bundles", help="a bundle, a run's folder, a registry, or a team's folder in a registry")
    batch.add_argument("data", help="Parquet data set: a path or s3:// URI")
    batch.add_argument("output", help="folder of the results: a path or s3:// URI")
    batch.add_argument("--split", choices=("train", "test"), help="only these images")
    batch.add_argument("--workers", "--actors", type=int, default=1, metavar="N", help="parallel workers (default: 1)")
    _add_version(batch)
    batch.set_defaults(run=_inspect_batch)

    metric = commands.add_parser(
        "metric", help="join the discriminant projections of trained categories to one projection for new categories"
    )
    metric.add_argument("bundles", nargs="+", help="bundles, runs' folders, or folders of bundles")
    metric.add_argument(
        "--output", required=True, metavar="FILE", help="file to write, for density.metric: a path or s3:// URI"
    )
    metric.set_defaults(run=_metric)

    update = commands.add_parser(
        "update", help="add images to a bundle, remove images, or join bundles of several sites"
    )
    update.add_argument("bundle", help="the bundle to change")
    update.add_argument("output", help="folder of the changed bundle; may be the bundle itself")
    update.add_argument("--add", metavar="DATA", help="add the normal training images of this data set")
    update.add_argument("--remove", metavar="DATA", help="remove the normal training images of this data set")
    update.add_argument(
        "--join",
        nargs="+",
        metavar="BUNDLE",
        default=[],
        help="add the statistics of these bundles, which must have the same network; a shared image counts once",
    )
    update.add_argument(
        "--only",
        metavar="DATA",
        help="keep only the normal training images of this data set: a site's own bundle, for joining later",
    )
    update.add_argument(
        "--calibrate", metavar="DATA", help="set the thresholds from the normal images of this data set"
    )
    update.set_defaults(run=_update)

    add_calibrate_parser(commands)
    add_export_parser(commands)
    add_registry_parser(commands)
    add_jobs_parser(commands)
    add_config_parser(commands)
    add_doctor_parser(commands)
    add_completion_parser(commands)
    add_serving_parser(commands)

    samples = commands.add_parser(
        "samples", help="draw a small set of images of synthetic parts, in the folder layout of MVTec AD"
    )
    samples.add_argument("folder", help="a new folder")
    samples.add_argument("--seed", type=int, default=0, help="seed of the drawing (default: 0)")
    samples.set_defaults(run=_samples)
    return parser


def _add_version(parser: argparse.ArgumentParser) -> None:
    """Adds --version to a command that reads models from a registry."""
    parser.add_argument(
        "--version",
        dest="version_of",
        default="latest",
        metavar="NAME",
        help="version or alias of models in a registry (default: latest)",
    )


def command_names() -> list[str]:
    """Returns the names of the subcommands."""
    (subparsers,) = (item for item in build_parser()._actions if isinstance(item, argparse._SubParsersAction))
    return list(subparsers.choices)
