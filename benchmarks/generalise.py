"""Categories that nobody tuned for: the default configuration beside PaDiM and PatchCore, over any number of categories.

    python -m benchmarks.generalise --data ROOT [ROOT ...] --weights resnet18.pth [--seeds 0 1 2] [--shots 4 8 16]

Each ROOT is a folder of images in a shape that ingest knows, or a Parquet set. The protocol is one for all methods: the same
training images, the same test images and the same weights. By default all good training images train. `--holdout-fraction
0.2` holds a fifth of them out for calibration, for all methods alike. `--shots` adds tables with fewer training images.
`--set KEY=VALUE` changes the default configuration, for an ablation under the name that `--name` gives; a setting that would
change which images train is refused. `--methods all` adds PaDiM and PatchCore with parts of the default: with reflection in
the padding, with a larger coreset, with the image score against the profile of good images.

The output is Markdown: a table of the categories as in README, then means over data sets with their standard errors, then
paired differences by category, then costs. Intervals of 95 % are from a bootstrap over the test images, stratified by label
and paired between methods. `--output` keeps labels, scores and bootstrap draws of the test images; the JSON line at the end
has all other figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import (
    add_arguments,
    describe_environment,
    fit_category,
    make_base_settings,
    merge_settings,
    open_data,
    print_table,
    read_samples,
)
from benchmarks.intervals import (
    average_over_sets,
    bootstrap_image_auroc,
    bootstrap_pixel_metrics,
    compute_percentile_interval,
    format_interval,
    format_mean,
    group_categories_by_set,
)
from benchmarks.patchcore import fit_and_evaluate_patchcore
from benchmarks.spine import make_padim_settings
from focus_ray.bundle.bundle import read_git_commit
from focus_ray.data.read import read_test_rows
from focus_ray.density.base import choose_evenly_spaced
from focus_ray.fitting.settings import parse_config
from focus_ray.fitting.split import SplitPlan, compute_split_plan
from focus_ray.settings.sections import apply_overrides

FIGURES = ("image_auroc", "pixel_auroc", "aupro_0.3")
TEST_IMAGES = ("labels", "scores", "pixel_draws")  # of a sample, too long for the JSON line at the end
OURS, REFERENCES = "default", ("PaDiM", "PatchCore 1 %")
PADIM: dict[str, dict[str, Any]] = {"PaDiM": {}, "PaDiM, reflection": {"model": {"padding": "reflect"}}}
PATCHCORE: dict[str, dict[str, Any]] = {
    "PatchCore 1 %": {},
    "PatchCore 1 %, reflection": {"padding": "reflect"},
    "PatchCore 1 %, profile": {"image_score": "profile"},
    "PatchCore 10 %": {"share": 0.1},
}
METHODS = (*PADIM, *PATCHCORE, OURS)

Sample = dict[str, Any]
Groups = Mapping[str, Mapping[str, Sequence[Sample]]]  # category -> method -> samples of all seeds


def make_split_settings(holdout_fraction: float) -> dict[str, Any]:
    """Settings of the split that all methods share. 0: no image is held out, whatever their number."""
    method = "split" if holdout_fraction else "auto"
    return {"data": {"holdout_fraction": holdout_fraction}, "calibration": {"method": method}}


def plan_training(tree: Mapping[str, Any], category: str, shots: int | None) -> SplitPlan:
    """The training images of a category. shots: take only this many of them, evenly chosen; None takes all."""
    plan = compute_split_plan(parse_config(dict(tree)), category)
    if shots is None or shots >= len(plan.fit.rows):
        return plan
    chosen = sorted(choose_evenly_spaced(len(plan.fit.rows), shots))
    return plan.select_fit_images(chosen)


def hash_training_images(plan: SplitPlan) -> str:
    """The same for two plans if the same images train, be it that some of them first validate."""
    rows = sorted([*plan.fit.rows.tolist(), *plan.validation.rows.tolist()])
    return hashlib.sha256(json.dumps([plan.fingerprint, rows]).encode()).hexdigest()[:16]


def measure_method(
    method: str,
    tree: Mapping[str, Any],
    category: str,
    device: str,
    shots: int | None = None,
    overrides: Sequence[str] = (),
) -> Sample:
    """Fits one method on one category and evaluates it.

    Args:
        method: a reference of METHODS; any other name is the default configuration.
        tree: settings that all methods share; they choose the training images.
        overrides: KEY=VALUE, changes to the default configuration.

    Returns:
        All figures, the labels and scores of the test images, seconds of the fit and milliseconds per test image.

    Raises:
        ValueError: with the overrides, other images would train.
    """
    plan = plan_training(tree, category, shots)
    digest = hash_training_images(plan)
    if method in PATCHCORE:
        seed = parse_config(dict(tree)).train.seed
        found = fit_and_evaluate_patchcore(dict(tree), category, device, seed, plan, **PATCHCORE[method])
        return {**found, "false_positive_rate": None, "recall": None, "training_images": digest}
    if method in PADIM:
        tree = merge_settings(tree, make_padim_settings(), PADIM[method])
    else:
        tree = apply_overrides(merge_settings(tree), list(overrides))
        plan = plan_training(tree, category, shots)
        if hash_training_images(plan) != digest:
            raise ValueError(
                f"--set {' '.join(overrides)}: other images of {category!r} would train than for the other methods: use "
                "--holdout-fraction or --seeds, which hold for all methods"
            )
    config = parse_config(dict(tree))
    start = time.perf_counter()
    result, inspector = fit_category(config, category, device, plan)
    fit_s = time.perf_counter() - start
    start = time.perf_counter()
    labelled = inspector.score_labelled_images(read_test_rows(config.data.uri, category))
    figures = inspector.compute_evaluation_metrics(labelled)
    ms = 1e3 * (time.perf_counter() - start) / len(labelled.types)
    measured = labelled.measured
    labels, binned = measured.labels.tolist(), measured.bins is not None
    return {
        **figures,
        "labels": labels,
        "scores": measured.scores.tolist(),
        "pixel_draws": {} if binned else bootstrap_pixel_metrics(labels, measured.masks, measured.maps),
        "fit_s": fit_s,
        "ms": ms,
        "aligned": result.notes.alignment is not None and result.notes.alignment.enabled,
        "training_images": digest,
    }


def group_samples(samples: Sequence[Sample], methods: Sequence[str], shots: int | None) -> Groups:
    """Samples by category and method, both in order. Methods without a sample of a category are left out there.

    Raises:
        ValueError: two methods were trained or tested on different images of a category.
    """
    groups: dict[str, dict[str, list[Sample]]] = {}
    for method in methods:
        for sample in samples:
            if (sample["method"], sample["shots"]) == (method, shots):
                groups.setdefault(sample["category"], {}).setdefault(method, []).append(sample)
    for category, of_method in groups.items():
        all_samples = [sample for group in of_method.values() for sample in group]
        same_test = len({tuple(sample["labels"]) for sample in all_samples}) == 1
        training = {(sample["seed"], sample["training_images"]) for sample in all_samples}
        if not same_test or len(training) > len({seed for seed, _ in training}):
            raise ValueError(
                f"samples of {category!r} come from different {'training' if same_test else 'test'} images: "
                "measure all methods on the same data, into a new --output"
            )
    order = dict.fromkeys(sample["category"] for sample in samples)
    return {category: groups[category] for category in order if category in groups}


def average_seeds(group: Sequence[Sample], key: str) -> float | None:
    """Mean over seeds; None where no sample has the figure."""
    values = [sample[key] for sample in group if sample.get(key) is not None]
    return statistics.mean(values) if values else None


def average_bootstrap_draws(group: Sequence[Sample], key: str) -> NDArray[np.float64]:
    """Bootstrap draws (num_draws,) of a figure, averaged over the seeds."""
    if key == "image_auroc":
        return bootstrap_image_auroc(group[0]["labels"], [sample["scores"] for sample in group])
    return np.mean([sample["pixel_draws"][key] for sample in group], axis=0)


def format_metrics(group: Sequence[Sample], interval: bool = False, digits: int = 3) -> str:
    """Text 'image AUROC / pixel AUROC / AUPRO', with spread over seeds and interval of the first on demand."""
    values = (average_seeds(group, key) for key in FIGURES)
    image, pixel, aupro = ("-" if value is None else f"{value:.{digits}f}" for value in values)
    if interval:
        spread = statistics.stdev(sample["image_auroc"] for sample in group) if len(group) > 1 else None
        image += "" if spread is None else f" +- {spread:.3f}"
        image += f" {format_interval(compute_percentile_interval(average_bootstrap_draws(group, 'image_auroc')))}"
    return f"{image} / {pixel} / {aupro}"


def format_verdict_rates(group: Sequence[Sample]) -> str:
    """Text 'false positive rate / recall' at the calibrated threshold."""
    rate, recall = average_seeds(group, "false_positive_rate"), average_seeds(group, "recall")
    return "-" if rate is None or recall is None else f"{rate:.2f} / {recall:.2f}"


def format_difference(own: Sequence[Sample], other: Sequence[Sample], key: str) -> str:
    """Text of what `own` has more than `other` in a figure, with the paired interval; '-' where one has none."""
    values = average_seeds(own, key), average_seeds(other, key)
    if values[0] is None or values[1] is None:
        return "-"
    has_draws = key == "image_auroc" or all(key in sample["pixel_draws"] for sample in (*own, *other))
    draws = average_bootstrap_draws(own, key) - average_bootstrap_draws(other, key) if has_draws else None
    interval = "" if draws is None else f" {format_interval(compute_percentile_interval(draws), '+')}"
    return f"{values[0] - values[1]:+.4f}{interval}"


def find_best_reference(of_method: Mapping[str, Sequence[Sample]], ours: str) -> Sequence[Sample]:
    """Samples of the method other than ours with the highest image AUROC; none without another method."""
    others = [group for method, group in of_method.items() if method != ours]
    return max(others, key=lambda group: average_seeds(group, "image_auroc") or 0.0, default=())


def make_category_table(groups: Groups, methods: Sequence[str], ours: str) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: a row for each category, then the means over the categories."""
    references = [method for method in methods if method != ours]
    header = ["category", *references, f"{ours} [95 %]", "FPR / recall at 0.05", "image, to the better [95 %]"]
    rows: list[list[Any]] = []
    for category, of_method in groups.items():
        cells = [format_metrics(of_method.get(method, ())) for method in references]
        own = of_method.get(ours, ())
        own_cell = format_metrics(own, interval=True) if own else "-"
        gap = format_difference(own, find_best_reference(of_method, ours), "image_auroc")
        rows.append([category, *cells, own_cell, format_verdict_rates(own), gap])
    one_each = {
        method: [average_categories([of_method[method] for of_method in groups.values() if method in of_method])]
        for method in (*references, ours)
    }
    cells = [format_metrics(one_each[method], digits=4) for method in (*references, ours)]
    rows.append([f"**mean of {len(groups)}**", *cells, format_verdict_rates(one_each[ours]), ""])
    return header, rows


def average_categories(groups: Sequence[Sequence[Sample]]) -> Sample:
    """The mean of each figure over categories that have it."""
    keys = (*FIGURES, "false_positive_rate", "recall")
    values = {key: [value for group in groups if (value := average_seeds(group, key)) is not None] for key in keys}
    return {key: statistics.mean(found) if found else None for key, found in values.items()}


def make_data_set_table(
    groups: Groups, methods: Sequence[str], ours: str, sets: Mapping[str, str]
) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: for each method, means over data sets and the mean differences from it to ours, with standard errors."""
    header = ["method", "image AUROC", "pixel AUROC", "AUPRO 0.3", f"{ours}: image", "pixel", "AUPRO", "sets"]
    rows: list[list[Any]] = []
    for method in methods:
        means, gaps, counts = [], [], []
        for key in FIGURES:
            values, differences = {}, {}
            for category, of_method in groups.items():
                value, own = (average_seeds(of_method.get(name, ()), key) for name in (method, ours))
                if value is not None:
                    values[category] = value
                if value is not None and own is not None and method != ours:
                    differences[category] = own - value
            means.append(format_mean(average_over_sets(values, sets)) if values else None)
            gaps.append(format_mean(average_over_sets(differences, sets), "+") if differences else None)
            counts.append(str(average_over_sets(values, sets).num_sets if values else 0))
        rows.append([method, *means, *gaps, " / ".join(counts)])
    return header, rows


def make_difference_table(groups: Groups, ours: str) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: what ours has more than each other method, by category, with paired intervals."""
    header = ["category", "method", "image AUROC [95 %]", "pixel AUROC [95 %]", "AUPRO 0.3 [95 %]"]
    rows = [
        [category, method, *(format_difference(of_method.get(ours, ()), group, key) for key in FIGURES)]
        for category, of_method in groups.items()
        for method, group in of_method.items()
        if method != ours
    ]
    return header, rows


def make_cost_table(groups: Groups) -> tuple[list[str], list[list[Any]]]:
    """Header and rows: spread over seeds and costs of each category and method."""
    header = ["category", "method", "sd over seeds", "fit, s", "ms per image"]
    rows: list[list[Any]] = []
    for category, of_method in groups.items():
        for method, group in of_method.items():
            spread = statistics.stdev(sample["image_auroc"] for sample in group) if len(group) > 1 else None
            rows.append([category, method, spread, average_seeds(group, "fit_s"), average_seeds(group, "ms")])
    return header, rows


def print_tables(
    samples: Sequence[Sample], methods: Sequence[str], ours: str, shots: int | None, same_set: Sequence[Sequence[str]]
) -> None:
    groups = group_samples(samples, methods, shots)
    if not groups:
        return
    sets = group_categories_by_set(
        list(groups), [[category for category in group if category in groups] for group in same_set]
    )
    print(f"\n{'All training images' if shots is None else f'{shots} training images'}\n")
    print_table(*make_category_table(groups, methods, ours))
    print(
        f"\nMean and standard error over data sets, and what {ours} has more than the method (sets with image / pixel / "
        "AUPRO figures)\n"
    )
    print_table(*make_data_set_table(groups, methods, ours, sets))
    print(f"\nWhat {ours} has more than the method, by category\n")
    print_table(*make_difference_table(groups, ours))
    print("\nCosts\n")
    print_table(*make_cost_table(groups))


def check_equal_settings(samples: Sequence[Sample], settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses samples of an earlier run with other settings. settings: of this run, by method.

    Raises:
        ValueError: a sample of one of the methods has other settings, or none.
    """
    for sample in samples:
        expected = settings.get(sample["method"])
        if expected is not None and sample.get("settings") != expected:
            raise ValueError(
                f"--output has a sample of {sample['method']!r} with the settings {sample.get('settings')}, this run has "
                f"{dict(expected)}: choose another --output, or another --name"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, several=True)
    parser.set_defaults(image_size_px=256)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--shots", nargs="*", type=int, default=[], help="also with only this many training images")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[*REFERENCES, OURS],
        choices=[*METHODS, "all"],
        metavar="METHOD",
        help=f"'all', or some of: {', '.join(METHODS).replace('%', '%%')}",
    )
    parser.add_argument(
        "--holdout-fraction",
        type=float,
        default=0.0,
        help="share of the good training images that no method trains on; the default is calibrated on them",
    )
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the default configuration"
    )
    parser.add_argument("--name", default=OURS, help="name of the default configuration in the tables")
    parser.add_argument(
        "--same-set",
        nargs="+",
        action="append",
        default=[],
        metavar="CATEGORY",
        help="categories of one data set, which counts once in the means over data sets; may be given several times",
    )
    parser.add_argument("--output", help="JSON Lines, a line for each fit; fits that the file has are not run again")
    arguments = parser.parse_args()
    ours = arguments.name
    if ours != OURS and ours in METHODS:
        parser.error(f"--name {ours!r} is the name of a reference: choose another")
    methods = [ours if name == OURS else name for name in METHODS if {name, "all"} & set(arguments.methods)]
    categories_of = []
    for number, root in enumerate(arguments.data):
        one = argparse.Namespace(**{**vars(arguments), "data": root, "work": f"{arguments.work}/generalise-{number}"})
        uri, categories = open_data(one)
        categories_of += [(uri, category) for category in categories]
    shared = {
        "holdout_fraction": arguments.holdout_fraction,
        "image_size_px": arguments.image_size_px,
        "backbone": arguments.backbone,
        "weights": Path(arguments.weights).name,
    }
    settings = {method: {**shared, **({"set": arguments.set} if method == ours else {})} for method in methods}
    samples = read_samples(arguments.output)
    try:
        group_categories_by_set([category for _, category in categories_of], arguments.same_set)
        check_equal_settings(samples, settings)
    except ValueError as error:
        parser.error(str(error))
    done = {(s["category"], s["method"], s["seed"], s["shots"]) for s in samples}
    for seed in arguments.seeds:  # the outermost loop: a run that is cut short has seen every category
        for shots in (None, *arguments.shots):
            for uri, category in categories_of:
                tree = merge_settings(
                    make_base_settings(arguments, uri),
                    make_split_settings(arguments.holdout_fraction),
                    {"train": {"seed": seed}},
                )
                for method in methods:
                    if (category, method, seed, shots) in done:
                        continue
                    figures = measure_method(method, tree, category, arguments.device, shots, arguments.set)
                    key = {"category": category, "method": method, "seed": seed, "shots": shots}
                    sample = {**key, "commit": read_git_commit(), "settings": settings[method], **figures}
                    samples.append(sample)
                    if arguments.output:
                        with Path(arguments.output).open("a") as sink:
                            sink.write(json.dumps(sample) + "\n")
                    text = ", ".join(f"{name} {figures[name]:.4f}" for name in FIGURES if figures[name] is not None)
                    print(f"{category} / {method} / seed {seed} / {shots or 'all'} images: {text}", flush=True)
    held = arguments.holdout_fraction
    print(
        f"\n{arguments.backbone}, {arguments.image_size_px} px, stretched; the same training images for all methods, "
        + (f"{held:g} of the good ones held out" if held else "no good one held out")
        + f"; seeds {' '.join(map(str, arguments.seeds))}. Image AUROC / pixel AUROC / AUPRO up to a false positive rate of 0.3. "
        "'To the better': against the best other method of the category, by image AUROC. An interval without width "
        "means that no two test images are ranked wrongly: the bootstrap cannot show an uncertainty there."
    )
    for shots in (None, *arguments.shots):
        print_tables(samples, methods, ours, shots, arguments.same_set)
    print()
    line = {
        "benchmark": "generalise",
        **describe_environment(arguments.device),
        "arguments": vars(arguments),
        "samples": [{k: v for k, v in sample.items() if k not in TEST_IMAGES} for sample in samples],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
