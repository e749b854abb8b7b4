"""The command `evaluate`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from focus_ray.cli.options import add_model_version_option
from focus_ray.cli.output import EXIT_ERROR, EXIT_PARTLY, check_paths_exist, print_message


def add_evaluate_parser(commands: Any) -> None:
    """Adds the parser of `evaluate`."""
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
    add_model_version_option(evaluate)
    evaluate.set_defaults(run=_run_evaluate_command)


def _run_evaluate_command(arguments: argparse.Namespace) -> int:
    """Runs `evaluate` by `evaluate_bundles_of_place`. Returns the exit status."""
    check_paths_exist(arguments.bundles, arguments.data)
    return evaluate_bundles_of_place(
        arguments.bundles,
        arguments.data,
        arguments.output,
        arguments.max_side_px,
        arguments.exact_megapixels,
        version=arguments.version_of,
        num_workers=arguments.workers,
        resume=arguments.resume,
        trackers=arguments.override,
    )


def evaluate_bundles_of_place(
    place: str,
    data: str | None = None,
    output: str | None = None,
    max_side_px: int = 512,
    exact_megapixels: float = 128,
    *,
    version: str = "latest",
    num_workers: int | None = None,
    resume: bool = False,
    trackers: Sequence[str] = (),
) -> int:
    """Measures all bundles of a place, prints the metrics and writes the reports. Returns the exit status."""
    print_message(f"evaluate: {place}")
    from focus_ray.bundle.published import find_bundle_of_each_category
    from focus_ray.evaluation.run import evaluate_bundles
    from focus_ray.storage.files import join_path

    output = output or join_path(place, "report")
    report = evaluate_bundles(
        find_bundle_of_each_category(place, version, print_message),
        output,
        data=data,
        max_side_px=max_side_px,
        exact_pixels=int(exact_megapixels * 1e6),
        num_workers=num_workers,
        resume=resume,
        trackers=trackers,
        log=print_message,
    )
    print(report.table)
    for caveat, categories in _group_categories_by_caveat(report.caveats).items():
        print_message(f"note: {caveat} ({', '.join(categories)})" if len(report.results) > 1 else f"note: {caveat}")
    print_message(
        f"report: {join_path(output, 'report.html')}, report.md and report.json beside it; images/ has a row for each image"
    )
    failed = [category for category, result in report.results.items() if "error" in result]
    if len(failed) == len(report.results):
        return EXIT_ERROR
    return EXIT_PARTLY if failed else 0


def _group_categories_by_caveat(caveats: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Inverts category -> sentences to sentence -> categories."""
    categories: dict[str, list[str]] = {}
    for category, sentences in caveats.items():
        for sentence in sentences:
            categories.setdefault(sentence, []).append(category)
    return categories
