"""ingest, samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from focus_ray.cli.output import say


def _ingest(arguments: argparse.Namespace) -> int:
    say(f"ingest: {arguments.source} -> {arguments.destination}")
    from focus_ray.data.ingest import ingest

    report = ingest(
        arguments.source,
        arguments.destination,
        format=arguments.format,
        categories=arguments.category,
        site=arguments.site,
    )
    print(report)
    return report.exit_status


def _samples(arguments: argparse.Namespace) -> int:
    from focus_ray.errors import DataError

    folder = Path(arguments.folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty: give a new folder")
    say(f"samples: drawing parts into {folder}; a minute or two")
    from focus_ray.samples.write import write_samples

    write_samples(folder, seed=arguments.seed)
    say(f"samples: {folder}")
    return 0
