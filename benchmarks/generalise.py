"""Parts that nobody tuned for: the default configuration beside plain PaDiM and PatchCore 1 %, over any number of categories.

    python -m benchmarks.generalise --data ROOT [ROOT ...] --weights resnet18.pth [--seeds 0 1 2] [--shots 4 8 16]

Each ROOT is a folder of images in a shape that ingest knows, or a Parquet set. All three are given the same normal images, four
fifths of those for training, and the same weights. The last two columns hold a method against the better of the two
references on that category: what a default must not fall behind. `--shots` adds rows with so many normal images in all.
`--set KEY=VALUE` changes the default configuration, for an ablation under the name that `--name` gives.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import add_arguments, base_tree, environment, fit_category, merged, open_data, print_table
from benchmarks.patchcore import patchcore
from benchmarks.spine import padim_tree
from focus_ray.config import override_tree, parse_config
from focus_ray.data.read import iter_test_records
from focus_ray.data.split import Plan, plan_category
from focus_ray.density.base import sample_positions

FIGURES = ("image_auroc", "pixel_auroc", "aupro_0.3")
OURS, REFERENCES = "default", ("PaDiM", "PatchCore 1 %")


def few(plan: Plan, shots: int | None) -> Plan:
    """The plan with so many images to fit, evenly chosen; None keeps all."""
    if shots is None or shots >= len(plan.fit_rows):
        return plan
    chosen = sorted(sample_positions(len(plan.fit_rows), shots))
    return dataclasses.replace(plan, fit_rows=plan.fit_rows[chosen], folds=plan.folds[chosen])


def measure(
    method: str, tree: dict[str, Any], category: str, device: str, seed: int, shots: int | None
) -> dict[str, Any]:
    """One fit and its figures; seconds of the fit, milliseconds an image of the evaluation."""
    config = parse_config(tree)
    plan = few(plan_category(config, category), shots)
    if method == "PatchCore 1 %":
        found = patchcore(tree, category, device, seed, plan)
        return {**found, "false_positive_rate": None, "recall": None}
    start = time.perf_counter()
    result, inspector = fit_category(config, category, device, plan)
    fit_s = time.perf_counter() - start
    start = time.perf_counter()
    found = inspector.evaluate(iter_test_records(config.data.uri, category))
    num_images = found["num_normal"] + found["num_anomalous"]
    aligned = result.notes.alignment is not None and result.notes.alignment.enabled
    return {**found, "fit_s": fit_s, "ms": 1e3 * (time.perf_counter() - start) / num_images, "aligned": aligned}


def average(samples: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [sample[key] for sample in samples if sample.get(key) is not None]
    return statistics.mean(values) if values else None


def table(samples: list[dict[str, Any]], methods: Sequence[str], shots: int | None) -> list[list[Any]]:
    """Rows of category and method, then the means, with differences to the better reference."""
    rows: list[list[Any]] = []
    worst: dict[str, tuple[float, str]] = {}
    means: dict[tuple[str, str], list[float]] = {}
    for category in dict.fromkeys(sample["category"] for sample in samples):
        of = {
            method: [s for s in samples if (s["category"], s["method"], s["shots"]) == (category, method, shots)]
            for method in methods
        }
        better = max(
            (value for name in REFERENCES if (value := average(of.get(name, []), "image_auroc")) is not None),
            default=None,
        )
        for method, group in of.items():
            if not group:
                continue
            figures = [average(group, key) for key in FIGURES]
            for key, figure in zip(FIGURES, figures, strict=True):
                if figure is not None:
                    means.setdefault((method, key), []).append(figure)
            scores = [sample["image_auroc"] for sample in group]
            spread = statistics.stdev(scores) if len(scores) > 1 else None
            gap = None if better is None or figures[0] is None else figures[0] - better
            if gap is not None and gap < worst.get(method, (1.0, ""))[0]:
                worst[method] = (gap, category)
            rates = [average(group, key) for key in ("false_positive_rate", "recall", "fit_s", "ms")]
            rows.append([category, method, *figures, spread, *rates, gap])
    for method in methods:
        if (method, FIGURES[0]) not in means:
            continue
        figures = [statistics.mean(means[method, key]) if (method, key) in means else None for key in FIGURES]
        gap, category = worst.get(method, (None, ""))
        worst_of = None if gap is None else f"{gap:+.4f} ({category})"
        rows.append([f"**mean of {len(means[method, FIGURES[0]])}**", method, *figures, *[None] * 5, worst_of])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, several=True)
    parser.set_defaults(image_size_px=256)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--shots", nargs="*", type=int, default=[], help="few-shot rows with so many normal images")
    parser.add_argument("--methods", nargs="+", default=[*REFERENCES, OURS], help="of PaDiM, 'PatchCore 1 %%', default")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the default configuration"
    )
    parser.add_argument("--name", default=OURS, help="what the rows of the default configuration are called")
    parser.add_argument("--output", help="JSON Lines: a line a fit, as it ends; fits that are there are not run again")
    arguments = parser.parse_args()
    methods = [arguments.name if method == OURS else method for method in arguments.methods]
    sets = []
    for number, root in enumerate(arguments.data):
        one = argparse.Namespace(**{**vars(arguments), "data": root, "work": f"{arguments.work}/generalise-{number}"})
        uri, categories = open_data(one)
        sets += [(uri, category) for category in categories]
    samples: list[dict[str, Any]] = []
    if arguments.output and Path(arguments.output).is_file():
        samples = [json.loads(line) for line in Path(arguments.output).read_text().splitlines()]
    done = {(s["category"], s["method"], s["seed"], s["shots"]) for s in samples}
    for seed in arguments.seeds:  # outermost: a run that is cut short has seen every category
        for shots in (None, *arguments.shots):
            for uri, category in sets:
                for method in methods:
                    if (category, method, seed, shots) in done:
                        continue
                    plain = merged(base_tree(arguments, uri), {"train": {"seed": seed}})
                    tree = merged(plain, padim_tree()) if method == "PaDiM" else plain
                    if method == arguments.name:
                        tree = override_tree(merged(plain), arguments.set)
                    found = measure(method, tree, category, arguments.device, seed, shots)
                    sample = {"category": category, "method": method, "seed": seed, "shots": shots, **found}
                    samples.append(sample)
                    if arguments.output:
                        with Path(arguments.output).open("a") as sink:
                            sink.write(json.dumps(sample) + "\n")
                    shown = ", ".join(f"{key} {found[key]:.4f}" for key in FIGURES if found[key] is not None)
                    print(f"{category} / {method} / seed {seed} / {shots or 'all'} images: {shown}", flush=True)
    header = ("category", "method", "image AUROC", "pixel AUROC", "AUPRO 0.3", "sd over seeds", "FPR", "recall")
    header = (*header, "fit, s", "ms an image", "to the better reference")
    for shots in (None, *arguments.shots):
        print(f"\n{'All' if shots is None else shots} normal images\n")
        print_table(header, table(samples, methods, shots))
    print()
    line = {
        "benchmark": "generalise",
        **environment(arguments.device),
        "arguments": vars(arguments),
        "samples": samples,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
