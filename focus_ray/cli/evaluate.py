"""The command `evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from focus_ray.cli.options import add_model_version_option
from focus_ray.cli.output import EXIT_ERROR, EXIT_PARTLY, check_paths_exist, print_message


def add_parsers(commands: Any) -> None:
    """Adds the parser of `evaluate`."""
    evaluate = commands.add_parser("evaluate", help="measure bundles on the labelled test images")
    add = evaluate.add_argument
    add("bundles", help="a bundle, a run's folder, a registry, or a team's folder in a registry")
    add(
        "override",
        nargs="*",
        help="trackers.KIND.KEY=value (default: the trackers of the training), trackers={} records nothing; "
        "cluster.KEY=value for nodes and resources of the workers, for instance cluster.labels.site=a",
    )
    add("--data", help="Parquet data set (default: the data set of the training)")
    add("--output", help="folder for report.html, .md and .json (default: report/ beside the bundles)")
    add(
        "--max-side-px",
        type=int,
        default=512,
        help="largest side at which maps and masks are compared; larger masks are reduced (default: 512)",
    )
    add(
        "--exact-megapixels",
        type=float,
        default=128,
        metavar="N",
        help="size of a category's maps up to which pixel metrics are exact; above, pixels are counted in bins (default: 128)",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="largest number of workers on Ray (default: none, in this process; on a cluster, as many as fit)",
    )
    add("--resume", action="store_true", help="continue the evaluation in the folder --output")
    add_model_version_option(evaluate)
    evaluate.set_defaults(run=_run_evaluate_command)


def _run_evaluate_command(arguments: argparse.Namespace) -> int:
    """Runs `evaluate`: measures all bundles of a place, prints the metrics and writes the reports. Returns the exit status."""
    place = arguments.bundles
    check_paths_exist(place, arguments.data)
    from focus_ray.cluster.settings import parse_cluster_settings

    cluster_words = [word for word in arguments.override if word.startswith(("cluster.", "cluster="))]
    cluster = parse_cluster_settings(cluster_words)
    print_message(f"evaluate: {place}")
    from focus_ray.bundle.published import find_bundles_in_folder_or_registry
    from focus_ray.evaluation.run import evaluate_bundles
    from focus_ray.storage.files import join_path

    output = arguments.output or join_path(place, "report")
    report = evaluate_bundles(
        find_bundles_in_folder_or_registry(place, arguments.version_of, print_message),
        output,
        data=arguments.data,
        max_side_px=arguments.max_side_px,
        exact_pixels=int(arguments.exact_megapixels * 1e6),
        num_workers=arguments.workers,
        cluster=cluster,
        resume=arguments.resume,
        trackers=[word for word in arguments.override if word not in cluster_words],
        log=print_message,
    )
    print(report.table)
    categories_by_caveat: dict[str, list[str]] = {}
    for category, caveats in report.caveats.items():
        for caveat in caveats:
            categories_by_caveat.setdefault(caveat, []).append(category)
    for caveat, categories in categories_by_caveat.items():
        print_message(f"note: {caveat} ({', '.join(categories)})" if len(report.results) > 1 else f"note: {caveat}")
    print_message(
        f"report: {join_path(output, 'report.html')}, report.md and report.json beside it; images/ has a row for each image"
    )
    failed = [category for category, result in report.results.items() if "error" in result]
    if len(failed) == len(report.results):
        return EXIT_ERROR
    return EXIT_PARTLY if failed else 0
