"""How far the hot paths are from what the machine can do: the backbone alone, moving a memory once, sorting the scores once.

    python -m benchmarks.limits --data MVTEC_ROOT --categories bottle --weights resnet18.pth

Each figure is the median of interleaved runs in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from benchmarks.harness import add_arguments, fit_category, make_base_settings, open_data, print_table, save_json
from focus_ray.data.read import read_test_rows
from focus_ray.density.gaussian_capped_memory import GaussianCappedMemory
from focus_ray.density.nearest import LocationAndCoresetMemory, LocationMemory
from focus_ray.detect.detector import embed_images
from focus_ray.features.network import convert_to_float_images
from focus_ray.fitting.settings import parse_config
from focus_ray.metrics.metrics import ScoredTestImages
from focus_ray.metrics.registry import METRICS

BATCHES = (1, 4, 8, 32)


def time_interleaved(acts: Mapping[str, Callable[[], object]], times: int) -> dict[str, float]:
    """Name -> median seconds; a round runs every act once, so that what disturbs one disturbs all."""
    taken: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(times + 1):
        for name, act in acts.items():
            start = time.perf_counter()
            act()
            if number:  # the first round warms up
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


@torch.inference_mode()
def measure_limits(inspector: Any, records: list[Any], times: int) -> list[dict[str, Any]]:
    """Rows: what, images/s or seconds of ours and of the limit, the share reached."""
    detector, size = inspector.bundle.detector, inspector.bundle.config.model.image_size_px
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for count in BATCHES:
        batch = rng.integers(0, 255, (count, size, size, 3), dtype=np.uint8)
        dtype = next(detector.net.backbone.parameters()).dtype
        ready = convert_to_float_images(torch.from_numpy(batch), detector.density.device).to(dtype)
        acts: dict[str, Callable[[], object]] = {
            "ours": lambda batch=batch: inspector.score(batch),  # type: ignore[misc]
            "limit": lambda ready=ready: detector.net.backbone(ready),  # type: ignore[misc]
        }
        found = time_interleaved(acts, times)
        rows.append(
            {
                "what": f"inspection of {count}, beside the backbone alone",
                "ours": count / found["ours"],
                "limit": count / found["limit"],
                "unit": "images/s",
                "share": found["limit"] / found["ours"],
            }
        )
    density = detector.density
    if isinstance(density, GaussianCappedMemory):
        density = density.memory
    places = density.location_memory if isinstance(density, LocationAndCoresetMemory) else density
    if isinstance(places, LocationMemory):
        embedding, _ = embed_images(detector.net, detector.reduction, ready[:8].float())
        queries = embedding[:, : places.bank.shape[2]].contiguous()
        found = time_interleaved({"ours": lambda: places.score(queries), "limit": lambda: places.bank.sum()}, times)
        rows.append(
            {
                "what": f"memory of places for 8 images, beside reading its {places.bank.nbytes / 2**20:.0f} MiB once",
                "ours": found["ours"],
                "limit": found["limit"],
                "unit": "s",
                "share": found["limit"] / found["ours"],
            }
        )
    measured = inspector.score_labelled_images(records).measured
    scores = np.concatenate([one.ravel() for one in measured.maps])

    def compute_aupro() -> float | None:  # of a fresh one: it keeps its curve
        fresh = ScoredTestImages(measured.labels, measured.scores, measured.masks, measured.maps, measured.threshold)
        return METRICS["aupro_0.3"].value(fresh)

    found = time_interleaved({"ours": compute_aupro, "limit": lambda: np.sort(scores)}, 3)
    rows.append(
        {
            "what": f"AUPRO of {len(measured.maps)} maps, beside sorting their {scores.size} scores once",
            "ours": found["ours"],
            "limit": found["limit"],
            "unit": "s",
            "share": found["limit"] / found["ours"],
        }
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(image_size_px=256)
    parser.add_argument("--times", type=int, default=7)
    arguments = parser.parse_args()
    uri, categories = open_data(arguments)
    samples: dict[str, list[dict[str, Any]]] = {}
    for category in categories:
        config = parse_config(make_base_settings(arguments, uri))
        _, inspector = fit_category(config, category, arguments.device)
        rows = samples[category] = measure_limits(inspector, list(read_test_rows(uri, category)), arguments.times)
        print(f"\n{category}\n")
        print_table(
            ("what", "ours", "limit", "unit", "share of the limit"),
            [[row["what"], row["ours"], row["limit"], row["unit"], row["share"]] for row in rows],
        )
    print()
    save_json("limits", arguments, samples)


if __name__ == "__main__":
    main()
