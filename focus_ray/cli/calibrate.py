"""The command `calibrate`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from focus_ray.cli.output import check_paths_exist, escape_invalid_utf8, list_image_paths, print_message


def add_parsers(commands: Any) -> None:
    """Adds the parser of `calibrate`."""
    calibrate = commands.add_parser(
        "calibrate",
        help="new thresholds for a bundle from new good images, without training",
        description="Writes a copy of a bundle with thresholds from good images that the bundle has not seen. Images of "
        "defects are optional. They set no threshold; they show the cost of each threshold. If `update` joined bundles "
        "of several sites, the embeddings of one site can set the thresholds, without image files. --target-fpr alone needs no "
        "images: the image threshold for another rate comes from the scores in the bundle.",
    )
    add = calibrate.add_argument
    add("bundle", help="the bundle that needs new thresholds")
    add("output", help="folder of the changed bundle; may be the bundle itself")
    add("--good", nargs="+", metavar="FOLDER", help="images of good parts, or folders of them")
    add(
        "--site",
        metavar="BUNDLE",
        help="instead of --good: a site's own bundle that was joined into this bundle; its images set the thresholds, by "
        "leave-one-out",
    )
    add("--bad", nargs="+", metavar="FOLDER", default=[], help="images of defective parts")
    add("--target-fpr", type=float, help="share of good parts that may be called bad (default: the bundle's)")
    add("--target-pixel-fpr", type=float, help="share of good pixels called bad (default: the bundle's)")
    add("--image-threshold", type=float, help="set this threshold by hand, instead of --good")
    add("--pixel-threshold", type=float, help="set this threshold by hand, instead of --good")
    add("--cost-false-alarm", type=float, default=1.0, help="cost of a good part called bad (default: 1)")
    add("--cost-miss", type=float, default=10.0, help="cost of a missed defect (default: 10)")
    add("--defect-rate", type=float, default=0.01, help="share of parts that are defective (default: 0.01)")
    add("--trade-off", metavar="FILE", help="with --bad: write the curve of false alarms and misses to this CSV file")
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    calibrate.set_defaults(run=_run_calibrate_command)


def _run_calibrate_command(arguments: argparse.Namespace) -> int:
    """Runs `calibrate`: writes a bundle with new thresholds and prints them. Returns the exit status."""
    from focus_ray.errors import DataError

    check_paths_exist(arguments.bundle, *(arguments.good or []), *arguments.bad, arguments.site)
    by_hand = arguments.image_threshold is not None or arguments.pixel_threshold is not None
    num_sources = by_hand + bool(arguments.good) + (arguments.site is not None)
    only_target = num_sources == 0 and arguments.target_fpr is not None and arguments.target_pixel_fpr is None
    if num_sources != 1 and not only_target:
        raise DataError(
            "give one of --good with images of good parts, --site with a site's own bundle, --image-threshold and "
            "--pixel-threshold, or --target-fpr alone"
        )
    if arguments.site is not None and arguments.bad:
        raise DataError(
            "--bad shows the cost of thresholds, which needs scores of good images: give --good, not --site"
        )
    if arguments.trade_off and not arguments.bad:
        raise DataError("--trade-off needs --bad: a curve of false alarms against misses needs images of defects")
    good, bad = list_image_paths(arguments.good or []), list_image_paths(arguments.bad)
    how = f"with {len(good)} good and {len(bad)} bad images" if good else f"for the site of {arguments.site}"
    how = "by hand" if by_hand else "from the scores in the bundle" if only_target else how
    print_message(f"calibrate: {arguments.bundle} {how}")
    from focus_ray.bundle.bundle import read_manifest
    from focus_ray.bundle.published import find_single_bundle
    from focus_ray.bundle.recalibrate import calibrate_bundle, calibrate_for_site, set_target_fpr, set_thresholds
    from focus_ray.detect.calibration import Calibration
    from focus_ray.detect.shift import describe_new_calibration_shift
    from focus_ray.storage.files import write_bytes

    bundle = find_single_bundle(arguments.bundle)
    targets = {name: getattr(arguments, name) for name in ("target_fpr", "target_pixel_fpr", "device")}
    if by_hand:
        thresholds = {name: getattr(arguments, name) for name in ("image_threshold", "pixel_threshold")}
        manifest = set_thresholds(bundle, arguments.output, **thresholds)
        calibration = Calibration.from_dict(manifest["calibration"])
    elif only_target:
        before = Calibration.from_dict(read_manifest(bundle)["calibration"])
        manifest = set_target_fpr(bundle, arguments.output, arguments.target_fpr)
        calibration = Calibration.from_dict(manifest["calibration"])
        print_message(
            f"threshold: {before.image_threshold:.4g} for a rate of {before.target_fpr:g} before, "
            f"{calibration.image_threshold:.4g} for {calibration.target_fpr:g} now"
        )
    elif arguments.site is not None:
        outcome = calibrate_for_site(bundle, arguments.output, arguments.site, **targets)
        manifest, calibration = outcome.manifest, outcome.calibration
        if outcome.is_metric_biased:
            print_message(
                "note: the metric was learnt from these few images, so their scores are slightly low, and the false "
                "alarm rate may be above the target: calibrate with new good images (--good)"
            )
    else:
        outcome = calibrate_bundle(bundle, arguments.output, good, bad, **targets)
        manifest, calibration = outcome.manifest, outcome.calibration
        for line in _describe_copied_images(outcome.copies):
            print_message(f"note: {line}")
        if outcome.num_trained_on:
            print_message(
                f"{outcome.num_trained_on} of the good images are among those that the model was trained on: left out"
            )
        if outcome.shift is not None and (notice := describe_new_calibration_shift(outcome.shift)):
            print_message(f"note: {notice}")
        if outcome.curve is not None:
            _print_threshold_trade_off(outcome.curve, calibration.image_threshold, arguments)
            if arguments.trade_off:
                write_bytes(arguments.trade_off, outcome.curve.to_csv())
                print_message(f"trade-off: {arguments.trade_off}")
    for caveat in calibration.describe_limits():
        print_message(f"note: {caveat}")
    previous = manifest["data"]["calibrations"][-1]
    print_message(
        f"image threshold {previous['image_threshold']:.4g} -> {calibration.image_threshold:.4g}, "
        f"pixel threshold {previous['pixel_threshold']:.4g} -> {calibration.pixel_threshold:.4g}"
    )
    print(f"{arguments.output}\t{calibration.image_threshold:.6g}\t{manifest['sha256']}")
    return 0


def _describe_copied_images(copies: Mapping[Path, Path]) -> list[str]:
    """Returns a line for each image that has copies, with the names of the copies.

    Args:
        copies: Path of a copy -> path of its original.
    """
    names: dict[Path, list[str]] = {}
    for path, original in copies.items():
        names.setdefault(original, []).append(escape_invalid_utf8(path))
    return [
        f"{escape_invalid_utf8(original)} counts once; left out as copies with the same pixels: {', '.join(paths)}"
        for original, paths in names.items()
    ]


def _print_threshold_trade_off(curve: Any, threshold: float, arguments: argparse.Namespace) -> None:
    """Prints a table on standard output and an explanation on standard error.

    The table has a row for each false alarm rate, for the threshold in use, and for the cheapest threshold.
    """
    cost = curve.compute_cost(arguments.cost_false_alarm, arguments.cost_miss, arguments.defect_rate)
    rows = {}
    for rate in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2):  # the lowest threshold with at most this false alarm rate
        rows[f"at most {rate:.0%} false alarms"] = curve.thresholds[int((curve.false_alarms <= rate + 1e-12).argmax())]
    rows |= {"as set": threshold, "cheapest": curve.thresholds[int(cost.argmin())]}
    print(f"{'':24}{'threshold':>10} {'good called bad':>16} {'defects missed':>15} {'cost per part':>14}")
    for name, value in rows.items():
        alarms, misses = curve.get_rates_at(value)
        price = cost[max(0, int(curve.thresholds.searchsorted(value, side="right")) - 1)]
        print(f"{name:24}{value:10.4g} {alarms:16.1%} {misses:15.1%} {price:14.4g}")
    print_message(
        f"of {curve.num_good} good and {curve.num_bad} bad images; a false alarm costs {arguments.cost_false_alarm:g}, a miss "
        f"{arguments.cost_miss:g}, and {arguments.defect_rate:g} of parts are defective. A threshold picked from this table fits "
        "these defects: set it with --image-threshold, and test it on other images."
    )
