"""ingest, samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from focus_ray.cli.output import say


def _ingest(arguments: argparse.Namespace) -> int:
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
    from focus_ray.samples.write import write_samples

    folder = Path(arguments.folder)
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty: give a new folder")
    write_samples(folder, seed=arguments.seed)
    say(f"samples: {folder}")
    return 0
