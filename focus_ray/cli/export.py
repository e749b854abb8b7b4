"""The command `export`."""

from __future__ import annotations

import argparse
from typing import Any

from focus_ray.cli.output import check_paths_exist, print_message


def add_parsers(commands: Any) -> None:
    """Adds the parser of `export`."""
    export = commands.add_parser(
        "export",
        help="write a bundle's whole scorer for ONNX Runtime, OpenVINO or plain PyTorch",
        description="Writes one model that takes a decoded image and returns score, p-value, verdict and anomaly map. model.json "
        "describes the model. The export is compared with PyTorch in float32 on real images, and refused if its scores differ.",
    )
    add = export.add_argument
    add("bundle", help="the bundle to export")
    add("--to", required=True, help="onnx, torch or openvino")
    add("--precision", default="fp32", help="fp32, fp16 or int8 (default: fp32)")
    add(
        "--output",
        metavar="DIR",
        help="folder of the export (default: <category>-<to>-<precision>, in the working folder)",
    )
    add(
        "--examples",
        nargs="+",
        metavar="PLACE",
        default=[],
        help="images for the check: folders with good/ and bad/, image files, or a Parquet data set (default: the data "
        "set of the bundle's training)",
    )
    add("--accept-cost", action="store_true", help="accept fp16 or int8 even if it exceeds the limits")
    export.set_defaults(run=_run_export_command)


def _run_export_command(arguments: argparse.Namespace) -> int:
    """Runs `export`: writes a bundle in another format and prints the folder. Returns the exit status."""
    check_paths_exist(arguments.bundle, *arguments.examples)
    from focus_ray.bundle.published import find_single_bundle
    from focus_ray.export.export import export_bundle

    exported = export_bundle(
        find_single_bundle(arguments.bundle),
        arguments.to,
        arguments.output,
        arguments.precision,
        arguments.examples,
        arguments.accept_cost,
        log=print_message,
    )
    check = exported.sidecar["check"]
    print_message(
        f"of {check['num_images']} examples scores differ by up to {check['score_difference']:.2g} of their spread, maps by "
        f"up to {check['map_difference']:.2g}; {check['verdict_changes']} verdicts changed"
    )
    if check["auroc_torch"] is not None:
        print_message(f"image AUROC: PyTorch {check['auroc_torch']:.4f}, the export {check['auroc_export']:.4f}")
    for failure in check["accepted_beyond_tolerance"]:
        print_message(f"WARNING: accepted: {failure}")
    for caveat in exported.sidecar["calibration"]["caveats"]:
        print_message(f"note: {caveat}")
    print(exported.folder)
    return 0
