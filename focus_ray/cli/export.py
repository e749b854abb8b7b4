"""export."""

from __future__ import annotations

import argparse
from typing import Any

from focus_ray.cli.output import require, say


def add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a bundle's whole scorer for ONNX Runtime, OpenVINO or plain PyTorch",
        description="Writes one model that takes a decoded image and gives score, p-value, verdict and anomaly map, and "
        "model.json, which describes it. It is checked against PyTorch in float32 on real images, and refused where it scores "
        "otherwise.",
    )
    export.add_argument("bundle", help="the bundle that is exported")
    export.add_argument("--to", required=True, help="onnx, torch or openvino")
    export.add_argument("--precision", default="fp32", help="fp32, fp16 or int8 (default: fp32)")
    export.add_argument("--output", metavar="DIR", help="default: <category>-<to>-<precision>, here")
    export.add_argument(
        "--examples",
        nargs="+",
        metavar="PLACE",
        default=[],
        help="by which it is checked: folders with good/ and bad/, image files, or a Parquet data set (default: the one that "
        "the bundle was trained from)",
    )
    export.add_argument("--accept-cost", action="store_true", help="take fp16 or int8 whatever it costs")
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    require(arguments.bundle, *arguments.examples)
    from focus_ray.export.export import export_bundle

    done = export_bundle(
        arguments.bundle,
        arguments.to,
        arguments.output,
        arguments.precision,
        arguments.examples,
        arguments.accept_cost,
        log=say,
    )
    found = done.check
    say(
        f"of {found.num_images} examples scores differ by up to {found.score_difference:.2g} of their spread, maps by up to "
        f"{found.map_difference:.2g}; {found.verdict_changes} verdicts changed"
    )
    if found.auroc_torch is not None:
        say(f"image AUROC: PyTorch {found.auroc_torch:.4f}, the export {found.auroc_export:.4f}")
    for failure in done.sidecar["check"]["accepted_beyond_tolerance"]:
        say(f"WARNING: accepted: {failure}")
    for caveat in done.sidecar["calibration"]["caveats"]:
        say(f"note: {caveat}")
    print(done.folder)
    return 0
