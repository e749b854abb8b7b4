"""Builds the HTML report page of a training from the manifests of its bundles alone, so it also works for an old run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from focus_ray.bundle.bundle import read_manifest
from focus_ray.detect.calibration import Calibration
from focus_ray.drawing import plots
from focus_ray.reporting.page import render_page
from focus_ray.storage.files import join_path, write_bytes

REPORT = "report.html"
_NO_CURVE = ("step", "seconds", "steps")  # figures of an interval that get no plot


@dataclass(frozen=True)
class TrainingReportSection:
    """The content of a category's section on the report page of a training.

    Attributes:
        bundle: URI of the bundle.
        num_fit: number of images in the density.
        calibration: thresholds, and the scores of the calibration images.
        caveats: sentences that limit what the thresholds promise, and warnings of the training.
        seconds: duration of the training.
        plots: diagrams of scores, losses and validation results.
        facts: heading of a table -> its rows. The rows are a mapping label -> value.
        selection: validation results, usually one entry for each interval, from which the training chose the network.
        config: the configuration as YAML text.
    """

    bundle: str
    num_fit: int
    calibration: Calibration
    caveats: list[str]
    seconds: float
    plots: list[plots.Plot]
    facts: dict[str, dict[str, Any]]
    selection: list[dict[str, Any]]
    config: str


def write_training_report(bundles: Mapping[str, str], place: str) -> str:
    """Writes the report page of a training as report.html, and returns the path or URI of the file.

    Args:
        bundles: category -> URI of its bundle.
        place: folder for report.html, usually the folder of the run; a path or an s3:// URI.

    Raises:
        BundleError: a bundle is missing or damaged.
        DataError: the calibration in a manifest is invalid, or the file cannot be written.
    """
    trained = {category: build_report_section(uri, read_manifest(uri)) for category, uri in bundles.items()}
    target = join_path(place, REPORT)
    write_bytes(target, render_training_report(trained, place))
    return target


def render_training_report(trained: Mapping[str, TrainingReportSection], place: str) -> bytes:
    """Returns the HTML report page of a training as bytes.

    Args:
        trained: category -> its section.
        place: folder of the run, shown in the title.
    """
    return render_page(
        "training.html",
        title=f"Training: {str(place).rstrip('/').rpartition('/')[2]}",
        place=place,
        trained=trained,
        caveats={category: section.caveats for category, section in trained.items()},
        seconds=sum(section.seconds for section in trained.values()),
    )


def build_report_section(uri: str, manifest: Mapping[str, Any]) -> TrainingReportSection:
    """Builds the section of a bundle for the report page of a training.

    Args:
        uri: URI of the bundle, shown on the page.
        manifest: manifest of the bundle.

    Raises: DataError: the calibration in the manifest is invalid.
    """
    calibration = Calibration.from_dict(manifest["calibration"])
    metrics, data = manifest["metrics"], manifest["data"]
    seconds = {stage: float(value) for stage, value in metrics.get("seconds", {}).items()}
    history = [_count_epochs_as_steps(entry, 1) for entry in metrics.get("history", [])]
    selection = [_count_epochs_as_steps(entry, 0) for entry in metrics.get("selection", [])]
    return TrainingReportSection(
        bundle=uri,
        num_fit=int(data.get("num_fit", manifest["moments"]["count"])),
        calibration=calibration,
        caveats=[*calibration.describe_limits(), *metrics.get("warnings", [])],
        seconds=sum(seconds.values()),
        plots=_draw_plots(calibration, history, selection),
        facts={
            "Calibration": _list_calibration_facts(calibration),
            "Image alignment": _list_alignment_facts(metrics.get("alignment"), manifest["config"]),
            "Seconds": {stage: f"{value:.1f}" for stage, value in seconds.items()},
            "Where it comes from": _list_origin_facts(uri, manifest),
        },
        selection=selection,
        config=yaml.safe_dump(manifest["config"], sort_keys=False, allow_unicode=True),
    )


def _count_epochs_as_steps(entry: Mapping[str, Any], first: int) -> dict[str, Any]:
    """Renames "epoch" to "step" in an entry that an earlier version wrote. Returns any other entry unchanged.

    Args: first: added to the number of the epoch.
    """
    if "epoch" not in entry:
        return dict(entry)
    return {"step": entry["epoch"] + first, **{key: value for key, value in entry.items() if key != "epoch"}}


def _draw_plots(
    calibration: Calibration, history: Sequence[Mapping[str, float]], selection: Sequence[Mapping[str, Any]]
) -> list[plots.Plot]:
    """Draws the plots of a section: the calibration scores; for a trained network, losses and validation results by step.

    Args:
        history: metrics of each training interval, such as losses; empty if the network was not trained.
        selection: validation results; entries without "step" are not drawn.
    """
    drawn = [
        plots.plot_score_histograms(
            {"calibration: good images": calibration.image_scores},
            calibration.image_threshold,
            "Calibration scores",
            f"Scores of {_describe_calibration_images(calibration)}; right of the dashed threshold an image is called bad.",
        )
    ]
    if not history:
        return drawn
    steps = [figures["step"] for figures in history]
    curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for key in dict.fromkeys(key for figures in history for key in figures):
        if key not in _NO_CURVE:
            points = [(e, float(figures[key])) for e, figures in zip(steps, history, strict=True) if key in figures]
            panel = "loss" if key.startswith("loss") else key
            curves.setdefault(panel, {})[key] = ([e for e, _ in points], [value for _, value in points])
    for panel, lines in curves.items():
        if len(lines) == 2 and len({tuple(values) for _, values in lines.values()}) == 1:
            lines = {panel: next(iter(lines.values()))}  # the loss has a single term, which equals the total
        drawn.append(plots.plot_values_by_step(panel.replace("_", " "), "", lines))
    validated = [entry for entry in selection if "step" in entry]
    if validated:
        numbers = [float(entry["step"]) for entry in validated]
        lines = {
            name: (numbers, [float(entry[key]) for entry in validated])
            for key, name in (("score", "score"), ("image_auroc", "image AUROC"), ("aupro", "AUPRO"))
            if all(key in entry for entry in validated)
        }
        caption = "Against synthetic defects in held-out good images; step 0 is untrained. No label is looked at."
        drawn.append(plots.plot_values_by_step("validation score", caption, lines))
    return drawn


def _describe_calibration_images(calibration: Calibration) -> str:
    """Returns a phrase for the images that set the threshold, such as 'good images that the density has not seen'."""
    return {
        "split": "good images that the density has not seen",
        "cross": "training images, each scored without its fold",
        "leave_one_out": "training images, each scored with itself left out",
    }[calibration.method]


def _list_calibration_facts(calibration: Calibration) -> dict[str, Any]:
    """Returns label -> value for the report's table about the calibration."""
    return {
        "calibrated with": f"{calibration.num_images} {_describe_calibration_images(calibration)} ({calibration.method})",
        "image threshold": f"{calibration.image_threshold:.6g}",
        "good images called bad, asked for": f"{100 * calibration.target_fpr:.3g} %",
        "pixel threshold": f"{calibration.pixel_threshold:.6g}",
        "good pixels called bad, asked for": f"{100 * calibration.target_pixel_fpr:.3g} %",
    }


def _list_alignment_facts(alignment: Mapping[str, Any] | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns label -> value for the report's table about the image alignment.

    Args:
        alignment: results of the image alignment, from the manifest's entry "metrics"; None if the manifest has none.
        config: the settings in the manifest.
    """
    settings = config["model"]["image_alignment"]
    if alignment is None:
        return {"group": settings["group"], "method": settings["method"], "found": "nothing is noted of it"}
    movement = ", ".join(f"{value:.3g}" for value in alignment["shift_bound"])
    return {
        "group": settings["group"],
        "images are aligned": "yes"
        if alignment["enabled"]
        else "no: it does not bring held-out images closer by enough",
        "held-out images come closer by": f"{100 * alignment['drop']:.3g} % (pairwise L2 {alignment['l2_identity']:.4g}, "
        f"aligned {alignment['l2_aligned']:.4g}; at least {100 * settings['min_drop']:.3g} % is asked for)",
        "movement seen in training, with a margin": f"turns up to {alignment['angle_bound_deg']:.3g} degrees, "
        f"shifts up to {movement} half widths",
    }


def _list_origin_facts(uri: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Returns label -> value for the report's table about the origin of a bundle: images, software and machines.

    Args:
        uri: URI of the bundle.
        manifest: manifest of the bundle.
    """
    data, metrics = manifest["data"], manifest["metrics"]
    return {
        "bundle": uri,
        "version": manifest["sha256"],
        "made": manifest["created_at"],
        "images": data.get("uri", "-"),
        "fingerprint of the images": data.get("fingerprint") or "-",
        "good images learnt from": data.get("num_fit", manifest["moments"]["count"]),
        "good images held out": data.get("num_holdout", "-"),
        "workers": f"{metrics.get('num_workers', '-')} on {metrics.get('device', 'unknown')}",
        "source commit": manifest.get("git_commit") or "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items()),
        "size": f"{sum(part['num_bytes'] for part in manifest['files'].values()) / 2**20:.1f} MiB",
    }
