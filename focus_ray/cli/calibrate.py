"""calibrate."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from focus_ray.cli.output import image_paths, readable_name, require, say


def add_calibrate(commands: Any) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="new thresholds for a bundle from new good images, without training",
        description="Writes a copy of a bundle whose thresholds come from good images that it has not seen. Images of "
        "defects, where there are some, set nothing: they show what each threshold would cost. Of a bundle that was joined of "
        "several sites' with `update`, one site's own images can set them, without the images.",
    )
    calibrate.add_argument("bundle", help="the bundle whose thresholds are set anew")
    calibrate.add_argument("output", help="where the changed bundle goes; may be the bundle itself")
    calibrate.add_argument("--good", nargs="+", metavar="FOLDER", help="images of good parts, or folders of them")
    calibrate.add_argument(
        "--site",
        metavar="BUNDLE",
        help="in place of --good: a site's own bundle that was joined into this one; its images set them, each left out in turn",
    )
    calibrate.add_argument("--bad", nargs="+", metavar="FOLDER", default=[], help="images of defective parts")
    calibrate.add_argument(
        "--target-fpr", type=float, help="share of good parts that may be called bad (default: the bundle's)"
    )
    calibrate.add_argument(
        "--target-pixel-fpr", type=float, help="share of good pixels called bad (default: the bundle's)"
    )
    calibrate.add_argument("--image-threshold", type=float, help="set it by hand, in place of --good")
    calibrate.add_argument("--pixel-threshold", type=float, help="set it by hand, in place of --good")
    calibrate.add_argument("--cost-false-alarm", type=float, default=1.0, help="of a good part called bad (default: 1)")
    calibrate.add_argument("--cost-miss", type=float, default=10.0, help="of a defect let through (default: 10)")
    calibrate.add_argument(
        "--defect-rate", type=float, default=0.01, help="share of parts that are defective (default: 0.01)"
    )
    calibrate.add_argument("--trade-off", metavar="FILE", help="with --bad: write the curve here, as CSV")
    calibrate.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    calibrate.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> int:
    from focus_ray.errors import DataError

    require(arguments.bundle, *(arguments.good or []), *arguments.bad, arguments.site)
    by_hand = arguments.image_threshold is not None or arguments.pixel_threshold is not None
    if by_hand + bool(arguments.good) + (arguments.site is not None) != 1:
        raise DataError(
            "give one of --good with images of good parts, --site with a site's own bundle, or --image-threshold and "
            "--pixel-threshold"
        )
    if arguments.site is not None and arguments.bad:
        raise DataError("--bad shows what thresholds cost beside good images that were scored: give --good, not --site")
    if arguments.trade_off and not arguments.bad:
        raise DataError("--trade-off needs --bad: a curve of false alarms against misses needs images of defects")
    good, bad = image_paths(arguments.good or []), image_paths(arguments.bad)
    how = f"with {len(good)} good and {len(bad)} bad images" if good else f"for the site of {arguments.site}"
    say(f"calibrate: {arguments.bundle} {'by hand' if by_hand else how}")
    from focus_ray.bundle.recalibrate import calibrate_bundle, calibrate_for_site, set_thresholds
    from focus_ray.evaluation.calibration import Calibration
    from focus_ray.evaluation.shift import describe_new_calibration
    from focus_ray.storage import write_bytes

    if by_hand:
        manifest = set_thresholds(
            arguments.bundle,
            arguments.output,
            image_threshold=arguments.image_threshold,
            pixel_threshold=arguments.pixel_threshold,
        )
        calibration = Calibration.from_dict(manifest["calibration"])
    elif arguments.site is not None:
        done = calibrate_for_site(
            arguments.bundle,
            arguments.output,
            arguments.site,
            target_fpr=arguments.target_fpr,
            target_pixel_fpr=arguments.target_pixel_fpr,
            device=arguments.device,
        )
        manifest, calibration = done.manifest, done.calibration
        if done.taught:
            say(
                "note: the metric was learnt from these few images, so their scores are a little low, and more good parts may be "
                "called bad than asked for: new good images (--good) tell better"
            )
    else:
        done = calibrate_bundle(
            arguments.bundle,
            arguments.output,
            good,
            bad,
            target_fpr=arguments.target_fpr,
            target_pixel_fpr=arguments.target_pixel_fpr,
            device=arguments.device,
        )
        manifest, calibration = done.manifest, done.calibration
        for line in _describe_copies(done.copies):
            say(f"note: {line}")
        if done.num_known:
            say(f"{done.num_known} of the good images are among those that the model was trained on: left out")
        if done.shift is not None and (notice := describe_new_calibration(done.shift)):
            say(f"note: {notice}")
        if done.curve is not None:
            _tell_trade_off(done.curve, calibration.image_threshold, arguments)
            if arguments.trade_off:
                write_bytes(arguments.trade_off, done.curve.to_csv())
                say(f"trade-off: {arguments.trade_off}")
    for caveat in calibration.caveats():
        say(f"note: {caveat}")
    former = manifest["data"]["calibrations"][-1]
    say(
        f"image threshold {former['image_threshold']:.4g} -> {calibration.image_threshold:.4g}, "
        f"pixel threshold {former['pixel_threshold']:.4g} -> {calibration.pixel_threshold:.4g}"
    )
    print(f"{arguments.output}\t{calibration.image_threshold:.6g}\t{manifest['sha256']}")
    return 0


def _describe_copies(copies: Mapping[Path, Path]) -> list[str]:
    """Returns a line for each image of which there are copies, with the names of the copies."""
    names: dict[Path, list[str]] = {}
    for path, original in copies.items():
        names.setdefault(original, []).append(readable_name(path))
    return [
        f"{readable_name(original)} counts once; left out as copies with the same pixels: {', '.join(paths)}"
        for original, paths in names.items()
    ]


def _tell_trade_off(curve: Any, threshold: float, arguments: argparse.Namespace) -> None:
    """A row a false alarm rate, the threshold that was set, and the cheapest; on stdout."""
    cost = curve.cost(arguments.cost_false_alarm, arguments.cost_miss, arguments.defect_rate)
    cheapest = float(curve.thresholds[int(cost.argmin())])
    print(f"{'':24}{'threshold':>10} {'good called bad':>16} {'defects missed':>15} {'cost a part':>12}")
    rows = [(f"at most {rate:.0%} false alarms", _lowest(curve, rate)) for rate in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)]
    for name, value in [*rows, ("as set", threshold), ("cheapest", cheapest)]:
        alarms, misses = curve.at(value)
        price = float(
            curve.cost(arguments.cost_false_alarm, arguments.cost_miss, arguments.defect_rate)[_place(curve, value)]
        )
        print(f"{name:24}{value:10.4g} {alarms:16.1%} {misses:15.1%} {price:12.4g}")
    say(
        f"of {curve.num_good} good and {curve.num_bad} bad images; a false alarm costs {arguments.cost_false_alarm:g}, a miss "
        f"{arguments.cost_miss:g}, and {arguments.defect_rate:g} of parts are defective. A threshold picked from this table fits "
        "these defects: set it with --image-threshold, and judge it on others."
    )


def _lowest(curve: Any, rate: float) -> float:
    """The lowest threshold that calls no more than that share of the good images bad."""
    return float(curve.thresholds[int((curve.false_alarms <= rate + 1e-12).argmax())])


def _place(curve: Any, threshold: float) -> int:
    return max(0, int(curve.thresholds.searchsorted(threshold, side="right")) - 1)
