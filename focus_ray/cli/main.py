"""The `focus-ray` command; every subcommand imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from focus_ray import __version__
from focus_ray.cli.calibrate import add_calibrate
from focus_ray.cli.completion import add_completion, answer_shell
from focus_ray.cli.config import add_config
from focus_ray.cli.data import _samples, add_data
from focus_ray.cli.doctor import add_doctor
from focus_ray.cli.export import add_export
from focus_ray.cli.fit import add_fit
from focus_ray.cli.inspect import _evaluate, _inspect, _inspect_batch
from focus_ray.cli.jobs import add_jobs
from focus_ray.cli.output import EXIT_ERROR, EXIT_INTERRUPTED, accept_all_characters
from focus_ray.cli.registry import add_registry
from focus_ray.cli.serve import add_serving
from focus_ray.cli.sweep import _sweep
from focus_ray.cli.train import _metric, _train, _update
from focus_ray.cli.watch import add_watch
from focus_ray.cluster.messages import VERBOSE
from focus_ray.errors import FocusRayError
from focus_ray.extras import explain_missing_module, require_extra

# command -> the extra without which none of its work can be done; others tell what they lack when they come to it
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
    """Runs one command. Returns: its exit status: 0, 1 for an error that is told on stderr, 3 where ingest rejected."""
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
        told = explain_missing_module(error)
        if told is None:
            raise
        print(f"focus-ray: {told}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("focus-ray: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parses a command line. Settings (key=value) may also follow options, where argparse (3.11) takes none."""
    arguments, left = parser.parse_known_args(words)
    if left and hasattr(arguments, "override") and not any(word.startswith("-") for word in left):
        arguments.override = [*arguments.override, *left]
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    for name, value in vars(arguments).items():
        if name != "words":  # of `submit`: the home folder of another machine
            setattr(arguments, name, _expand_home(value))
    return arguments


def _expand_home(value: Any) -> Any:
    """Text that begins with ~ as a path of the home folder: a shell leaves --output=~/x as it is."""
    if isinstance(value, list):
        return [_expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="focus-ray",
        description="Learns from images of good parts; says of a new one whether it is defective, where, and how sure it is.",
    )
    parser.add_argument("--version", action="version", version=f"focus-ray {__version__}")
    parser.add_argument("--verbose", action="store_true", help="show Ray's own lines and all that workers print")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add_data(commands)

    train = commands.add_parser("train", help="train one model a category and write their bundles")
    train.add_argument("config", nargs="?", help="a YAML file, or a name of `focus-ray config list`")
    train.add_argument("override", nargs="*", help="key=value, for instance train.epochs=10")
    train.add_argument("--config", dest="named", metavar="CONFIG", help="the same; then all words are key=value")
    train.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS, help="show Ray's own lines too")
    train.add_argument("--resume", action="store_true", help="go on with the run of this name")
    train.set_defaults(run=_train)

    add_fit(commands)

    sweep = commands.add_parser(
        "sweep",
        help="search settings over categories with Ray Tune",
        description="focus-ray sweep CONFIG [key=value ...] starts a sweep; base.KEY=VALUE overrides the configuration that "
        "trials start from. `status`, `resume` and `report` take the sweep's folder.",
    )
    sweep.add_argument(
        "what", metavar="CONFIG|status|resume|report", help="a YAML file, or a name of `focus-ray config list`"
    )
    sweep.add_argument("rest", nargs="*", metavar="key=value|PLACE", help="num_trials=20, or the sweep's folder")
    sweep.set_defaults(run=_sweep)

    evaluate = commands.add_parser("evaluate", help="measure bundles on the labelled test images")
    evaluate.add_argument("bundles", help="a bundle, a run's folder, or a registry or a team's folder of one")
    evaluate.add_argument(
        "override",
        nargs="*",
        help="trackers.KIND.KEY=value (default: recorded as the training was); trackers={} for nowhere",
    )
    evaluate.add_argument("--data", help="Parquet data set (default: the one they were trained from)")
    evaluate.add_argument(
        "--output", help="folder for report.html, .md and .json (default: report/ beside the bundles)"
    )
    evaluate.add_argument(
        "--max-side-px", type=int, default=512, help="maps are compared at the masks' size up to this"
    )
    evaluate.add_argument(
        "--exact-megapixels",
        type=float,
        default=128,
        metavar="N",
        help="of a category's maps, up to which all are kept; of more, pixels are counted in bins (default: 128)",
    )
    evaluate.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="models that score side by side on Ray (default: one in this process; on a cluster, as many as fit)",
    )
    evaluate.add_argument("--resume", action="store_true", help="go on with the evaluation that --output holds")
    _add_version(evaluate)
    evaluate.set_defaults(run=_evaluate)

    inspect = commands.add_parser("inspect", help="score images: JSON lines on stdout, overlays as PNG")
    inspect.add_argument("bundle", help="a bundle")
    inspect.add_argument("images", nargs="+", help="image files, or folders of them")
    inspect.add_argument("--overlays", metavar="FOLDER", help="write a heat-map overlay of every image here")
    inspect.add_argument("--csv", metavar="FILE", help="write a table here too: one row an image, once all are done")
    inspect.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    inspect.add_argument(
        "--engine",
        default="torch",
        help="what computes the features: torch, or on a CPU onnxruntime or onnxruntime-int8 (default: torch)",
    )
    inspect.add_argument(
        "--examples",
        nargs="+",
        metavar="IMAGE",
        help="image files of good parts, or folders of them, by which another engine is scaled and checked",
    )
    inspect.set_defaults(run=_inspect)

    add_watch(commands)

    batch = commands.add_parser("inspect-batch", help="score a Parquet data set on Ray into Parquet")
    batch.add_argument("bundles", help="a bundle, a run's folder, or a registry or a team's folder of one")
    batch.add_argument("data", help="Parquet data set: a path or s3:// URI")
    batch.add_argument("output", help="where the results go: a path or s3:// URI")
    batch.add_argument("--split", choices=("train", "test"), help="only these images")
    batch.add_argument(
        "--workers", "--actors", type=int, default=1, metavar="N", help="models that score side by side (default: 1)"
    )
    _add_version(batch)
    batch.set_defaults(run=_inspect_batch)

    metric = commands.add_parser("metric", help="join the metrics of trained categories to one for new categories")
    metric.add_argument("bundles", nargs="+", help="bundles, runs' folders, or folders of bundles")
    metric.add_argument("--output", required=True, metavar="FILE", help="for density.metric: a path or s3:// URI")
    metric.set_defaults(run=_metric)

    update = commands.add_parser("update", help="take images into or out of a bundle's density, or join other sites'")
    update.add_argument("bundle", help="the bundle that is changed")
    update.add_argument("output", help="where the changed bundle goes; may be the bundle itself")
    update.add_argument("--add", metavar="DATA", help="ingested set whose normal training images are taken in")
    update.add_argument(
        "--remove", metavar="DATA", help="ingested set whose normal training images are taken out again"
    )
    update.add_argument(
        "--join",
        nargs="+",
        metavar="BUNDLE",
        default=[],
        help="bundles of the same network whose statistics are added; an image that several hold counts once",
    )
    update.add_argument(
        "--only",
        metavar="DATA",
        help="ingested set whose normal training images take the place of all others: a site's own bundle, to be joined",
    )
    update.add_argument("--calibrate", metavar="DATA", help="ingested set of normal images for the new thresholds")
    update.set_defaults(run=_update)

    add_calibrate(commands)
    add_export(commands)
    add_registry(commands)
    add_jobs(commands)
    add_config(commands)
    add_doctor(commands)
    add_completion(commands)
    add_serving(commands)

    samples = commands.add_parser("samples", help="draw a small image set of made-up parts, in MVTec's folder shape")
    samples.add_argument("folder", help="a new folder")
    samples.add_argument("--seed", type=int, default=0, help="another number draws other parts (default: 0)")
    samples.set_defaults(run=_samples)
    return parser


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version",
        dest="version_of",
        default="latest",
        metavar="NAME",
        help="of a registry's models: a version or an alias (default: latest)",
    )


def command_names() -> list[str]:
    """Names of the subcommands."""
    (subparsers,) = (item for item in build_parser()._actions if isinstance(item, argparse._SubParsersAction))
    return list(subparsers.choices)
