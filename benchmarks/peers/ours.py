"""focus_ray's default, or its plain PaDiM, as a peer: fitted and inspected in this process."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

start = time.perf_counter()

import numpy as np
import sklearn.metrics  # noqa: F401  the product imports these two when they are needed; peers import theirs here
import torch
import torchvision.models  # noqa: F401

from benchmarks.harness import make_base_settings_of, make_inspector, merge_settings
from benchmarks.peers.common import read_specification, time_peer
from benchmarks.spine import make_padim_settings
from focus_ray.data.images import decode_batch
from focus_ray.data.schema import Row
from focus_ray.fitting.fit import fit
from focus_ray.fitting.settings import parse_config
from focus_ray.fitting.shards import MemoryShard
from focus_ray.metrics.metrics import ScoredTestImages
from focus_ray.metrics.registry import METRICS

imported_s = time.perf_counter() - start

asked = read_specification()
plain = make_base_settings_of("unused", asked["weights"], asked["size_px"])
tree = merge_settings(plain, make_padim_settings()) if asked["method"] == "padim" else plain
config = parse_config(tree)
made: dict[str, Any] = {}


def fit_images() -> None:
    images = torch.from_numpy(decode_batch([Path(name).read_bytes() for name in asked["train"]], asked["size_px"], 2))
    found = fit(config, MemoryShard(images, folds=torch.arange(len(images)) % 5), len(images), torch.device("cpu"))
    made["one"] = make_inspector(config, "part", found, "cpu")


def read_test_records() -> list[Row]:
    rows: list[Row] = []
    for name in asked["good"] + asked["bad"]:
        mask = asked["masks"].get(name)
        rows.append(
            {
                "id": name,
                "image": Path(name).read_bytes(),
                "mask": None if mask is None else Path(mask).read_bytes(),
                "label": int(name in asked["bad"]),
                "defect_type": "bad" if name in asked["bad"] else "good",
                "width": asked["size_px"],
                "height": asked["size_px"],
            }
        )
    return rows


KEYS = {"image_auroc": "image_auroc", "pixel_auroc": "pixel_auroc", "aupro": "aupro_0.3"}


def score_test_images() -> dict[str, float | None]:
    measured = made["measured"] = made["one"].score_labelled_images(read_test_records(), asked["size_px"]).measured
    return {name: METRICS[key].value(measured) for name, key in KEYS.items()}


def measure_metrics_alone() -> None:
    """Writes maps and masks for a peer's metrics, and times ours: pixel AUROC and AUPRO, of a fresh set each time."""
    held: ScoredTestImages = made["measured"]
    kept = [number for number, mask in enumerate(held.masks) if mask is not None]
    np.savez(
        asked["maps"],
        maps=np.stack([held.maps[number] for number in kept]),
        masks=np.stack([held.masks[number] for number in kept]).astype(np.uint8),  # type: ignore[arg-type]
    )
    taken = []
    for _ in range(5):
        fresh = ScoredTestImages(held.labels, held.scores, held.masks, held.maps, held.threshold)
        start = time.perf_counter()
        for key in ("pixel_auroc", "aupro_0.3"):
            METRICS[key].value(fresh)
        taken.append(time.perf_counter() - start)
    print(json.dumps({"metrics_s": sorted(taken)[2]}))


batch = np.random.default_rng(0).integers(0, 255, (32, asked["size_px"], asked["size_px"], 3), dtype=np.uint8)

if __name__ == "__main__":
    sys.stdout.flush()
    time_peer(
        imported_s,
        fit_images,
        score_test_images,
        lambda: made["one"].score(batch[:1]),
        lambda name: made["one"].inspect([name]),
        lambda: made["one"].score(batch),
    )
    if "maps" in asked:
        measure_metrics_alone()
