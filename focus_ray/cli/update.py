"""The commands `update` and `metric`."""

from __future__ import annotations

import argparse
from typing import Any

from focus_ray.cli.output import check_paths_exist, print_message
from focus_ray.errors import DataError


def _run_metric_command(arguments: argparse.Namespace) -> int:
    """Runs `metric`: joins discriminant projections and writes the joined projection to a file. Returns the exit status."""
    check_paths_exist(*arguments.bundles)
    from focus_ray.bundle.metric import average_projections

    categories = average_projections(arguments.bundles, arguments.output)
    print(f"{arguments.output}\t{len(categories)} categories\t{', '.join(categories)}")
    return 0


def add_parsers(commands: Any) -> None:
    """Adds the parsers of `metric` and `update`."""
    metric = commands.add_parser(
        "metric", help="join the discriminant projections of trained categories to one projection for new categories"
    )
    metric.add_argument("bundles", nargs="+", help="bundles, runs' folders, or folders of bundles")
    metric.add_argument(
        "--output", required=True, metavar="FILE", help="file to write, for density.metric: a path or s3:// URI"
    )
    metric.set_defaults(run=_run_metric_command)

    update = commands.add_parser(
        "update", help="add images to a bundle, remove images, or join bundles of several sites"
    )
    add = update.add_argument
    add("bundle", help="the bundle to change")
    add("output", help="folder of the changed bundle; may be the bundle itself")
    add("--add", metavar="DATA", help="add the normal training images of this data set")
    add("--remove", metavar="DATA", help="remove the normal training images of this data set")
    add(
        "--join",
        nargs="+",
        metavar="BUNDLE",
        default=[],
        help="add the statistics of these bundles, which must have the same network; a shared image counts once",
    )
    add(
        "--only",
        metavar="DATA",
        help="keep only the normal training images of this data set: a site's own bundle, for joining later",
    )
    add("--calibrate", metavar="DATA", help="set the thresholds from the normal images of this data set")
    update.set_defaults(run=_run_update_command)


def _run_update_command(arguments: argparse.Namespace) -> int:
    """Runs `update`: changes the images of a bundle and prints the new number of images. Returns the exit status."""
    check_paths_exist(
        arguments.bundle, arguments.add, arguments.remove, *arguments.join, arguments.only, arguments.calibrate
    )
    changes = {key: getattr(arguments, key) for key in ("add", "remove", "join", "only")}
    if not any(changes.values()):
        raise DataError("nothing to change: give --add, --remove, --join or --only")
    print_message(f"update: {arguments.bundle} -> {arguments.output}")
    from focus_ray.bundle.published import find_single_bundle
    from focus_ray.bundle.update import update_bundle

    bundle = find_single_bundle(arguments.bundle)
    manifest = update_bundle(bundle, arguments.output, **changes, calibrate=arguments.calibrate, log=print_message)
    print(f"{arguments.output}\t{manifest['data']['num_fit']} images\t{manifest['sha256']}")
    return 0
