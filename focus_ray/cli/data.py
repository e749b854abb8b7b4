"""The commands `ingest`, `data remove`, `data compact` and `samples`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from focus_ray.cli.options import add_cluster_settings_argument
from focus_ray.cli.output import print_message
from focus_ray.errors import ConfigError


def add_parsers(commands: Any) -> None:
    """Adds the parsers of `ingest`, `data remove`, `data compact` and `samples`."""
    ingest = commands.add_parser("ingest", help="read a folder of images into a Parquet data set")
    add = ingest.add_argument
    add("source", help="folder or s3:// prefix: MVTec AD (also AD 2, LOCO), BTAD, VisA, or good/ bad/ masks/")
    add("destination", help="root of the Parquet data set: a path or s3:// URI")
    add_cluster_settings_argument(ingest)
    add("--format", default="auto", help="auto, mvtec, btad, visa or folder (default: auto)")
    add("--category", action="append", help="ingest only this category (may be repeated)")
    add("--site", default="default", help="name of the site of the images (default: default)")
    add_group_by_option(ingest)
    add("--append", action="store_true", help="add new images to a category, and keep its existing images")
    add(
        "--workers",
        metavar="N|auto",
        type=_parse_num_tasks,
        help="largest number of tasks at the same time on the Ray cluster of RAY_ADDRESS, or on this machine; auto: as many "
        "as the cluster has room for (default: no tasks, in this process)",
    )
    ingest.set_defaults(run=_run_ingest_command)

    data = commands.add_parser("data", help="change a Parquet data set: remove images, join small files")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    remove = actions.add_parser("remove", help="remove images from a category")
    remove.add_argument("data", help="root of the Parquet data set: a path or s3:// URI")
    remove.add_argument("--category", required=True, help="the category of the images")
    which = remove.add_mutually_exclusive_group(required=True)
    which.add_argument("--id", action="append", metavar="ID", help="remove the image with this id (may be repeated)")
    which.add_argument("--ids", metavar="FILE", help="remove the images with the ids in a text file, one in each line")
    which.add_argument(
        "--content-hash",
        action="append",
        metavar="HASH",
        help="remove the images with this pixel hash (may be repeated)",
    )
    which.add_argument("--site", help="remove all images of this site")
    remove.set_defaults(run=_run_data_remove_command)
    compact = actions.add_parser(
        "compact", help="join small part files, and delete files that no reader can use any more"
    )
    compact.add_argument("data", help="root of the Parquet data set: a path or s3:// URI")
    compact.add_argument("--category", action="append", help="only this category (may be repeated)")
    compact.set_defaults(run=_run_data_compact_command)

    samples = commands.add_parser(
        "samples", help="draw a small set of images of synthetic parts, in the folder layout of MVTec AD"
    )
    samples.add_argument("folder", help="a new folder")
    samples.add_argument("--seed", type=int, default=0, help="seed of the drawing (default: 0)")
    samples.set_defaults(run=_run_samples_command)


def add_group_by_option(parser: argparse.ArgumentParser) -> None:
    """Adds the option --group-by to the parser of a command that ingests images."""
    parser.add_argument(
        "--group-by",
        metavar="RULE",
        help="rule for photographs of the same part, which must not judge each other: name:REGEX (on the file name; the "
        "first group in parentheses, or the whole match), folder:LEVEL (1: the subfolder of good/ that contains the "
        "file), table:FILE:COLUMN (CSV or JSON) or time:SECONDS (EXIF time; a burst) (default: each photograph is its own part)",
    )


def _parse_num_tasks(text: str) -> int | str:
    """Parses the value of --workers: a positive integer, or "auto".

    Raises:
        ArgumentTypeError: The value is neither of them.
    """
    if text == "auto":
        return text
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of tasks, 1 or more, or auto")
    return int(text)


def _run_ingest_command(arguments: argparse.Namespace) -> int:
    """Runs `ingest`: reads images into a Parquet data set and prints the report. Returns the exit status."""
    if arguments.override and arguments.workers is None:
        raise ConfigError(f"{' '.join(arguments.override)}: has an effect only with --workers: add --workers N or auto")
    print_message(f"ingest: {arguments.source} -> {arguments.destination}")
    options = {
        "format": arguments.format,
        "categories": arguments.category,
        "site": arguments.site,
        "append": arguments.append,
        "group_by": arguments.group_by,
    }
    if arguments.workers is None:
        from focus_ray.ingestion.ingest import ingest

        report = ingest(arguments.source, arguments.destination, **options)
    else:
        from focus_ray.cluster.settings import parse_cluster_settings
        from focus_ray.ingestion.cluster import ingest_on_cluster

        cluster = parse_cluster_settings(arguments.override)
        report = ingest_on_cluster(
            arguments.source, arguments.destination, arguments.workers, cluster, print_message, **options
        )
    print(report)
    return report.exit_status


def _run_data_remove_command(arguments: argparse.Namespace) -> int:
    """Runs `data remove`: removes images from a category and prints the report. Returns the exit status."""
    from focus_ray.ingestion.change import remove_rows

    ids = _read_image_ids(arguments.ids) if arguments.ids is not None else arguments.id or ()
    hashes = arguments.content_hash or ()
    print(remove_rows(arguments.data, arguments.category, ids=ids, content_hashes=hashes, site=arguments.site))
    return 0


def _read_image_ids(name: str) -> list[str]:
    """Reads image ids from a text file with one id per line. Ignores empty lines.

    Raises:
        DataError: The file cannot be read, or has no id.
    """
    from focus_ray.errors import DataError

    try:
        lines = [line.strip() for line in Path(name).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: cannot read the ids: {error}") from error
    ids = [line for line in lines if line]
    if not ids:
        raise DataError(f"{name}: no id in the file: expected one in each line")
    return ids


def _run_data_compact_command(arguments: argparse.Namespace) -> int:
    """Runs `data compact`: joins small part files and prints a report per category. Returns the exit status."""
    from focus_ray.ingestion.change import compact_part_files

    for report in compact_part_files(arguments.data, arguments.category):
        print(report)
    return 0


def _run_samples_command(arguments: argparse.Namespace) -> int:
    """Runs `samples`: draws the sample data set into a new folder. Returns the exit status."""
    from focus_ray.errors import DataError

    folder = Path(arguments.folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty: give a new folder")
    print_message(f"samples: drawing parts into {folder}; this takes a minute or two")
    from focus_ray.samples.write import write_samples

    write_samples(folder, seed=arguments.seed)
    print_message(f"samples: {folder}")
    return 0
