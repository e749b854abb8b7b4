"""focus_ray's default, or its plain PaDiM, as a peer: fitted and inspected in this process."""

from __future__ import annotations

import sys
import time
from pathlib import Path

start = time.perf_counter()

import numpy as np
import torch

from benchmarks.harness import base_tree_of, merged
from benchmarks.peers.common import run, spec
from benchmarks.spine import padim_tree
from focus_ray.bundle.bundle import Bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.config import parse_config
from focus_ray.data.images import decode_batch
from focus_ray.data.regions import frame_of
from focus_ray.data.schema import Row
from focus_ray.data.shards import MemoryShard
from focus_ray.evaluation.metrics import Measured
from focus_ray.fitting.fit import fit
from focus_ray.kinds import METRICS

imported_s = time.perf_counter() - start

asked = spec()
plain = base_tree_of("unused", asked["weights"], asked["size_px"])
tree = merged(plain, padim_tree()) if asked["method"] == "padim" else plain
config = parse_config(tree)
made: dict[str, Inspector] = {}


def fit_images() -> None:
    images = torch.from_numpy(decode_batch([Path(name).read_bytes() for name in asked["train"]], asked["size_px"], 2))
    found = fit(config, MemoryShard(images, folds=torch.arange(len(images)) % 5), len(images), torch.device("cpu"))
    bundle = Bundle(
        {"category": "part", "sha256": ""}, config, found.detector, found.calibration, frame_of(config, "part")
    )
    made["one"] = Inspector(bundle)


def records() -> list[Row]:
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


def test() -> dict[str, float | None]:
    labelled = made["one"].measure(records(), asked["size_px"])
    measured: Measured = labelled.measured
    keys = {"image_auroc": "image_auroc", "pixel_auroc": "pixel_auroc", "aupro": "aupro_0.3"}
    return {name: METRICS[key].value(measured) for name, key in keys.items()}


batch = np.random.default_rng(0).integers(0, 255, (32, asked["size_px"], asked["size_px"], 3), dtype=np.uint8)

if __name__ == "__main__":
    sys.stdout.flush()
    run(
        imported_s,
        fit_images,
        test,
        lambda: made["one"].score(batch[:1]),
        lambda name: made["one"].inspect([name]),
        lambda: made["one"].score(batch),
    )
