"""AnomaVision's PaDiM at its own settings (two layers, 50 channels); needs AnomaVision in its own environment."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

start = time.perf_counter()

import numpy as np
import torch
from anomavision import Padim
from anomavision.algorithm.common import feature_extraction
from PIL import Image
from sklearn.metrics import roc_auc_score

imported_s = time.perf_counter() - start
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.peers.common import read_specification, time_peer

asked = read_specification()
size = asked["size_px"]
made: dict[str, Any] = {}
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def forbid_download(build: Any) -> Any:
    return lambda weights=None, progress=True: build(weights=None)


def prepare_image(name: str) -> torch.Tensor:
    image = Image.open(name).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return (torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255 - MEAN) / STD


def fit_images() -> None:
    for key, (build, weights) in list(feature_extraction.BACKBONES.items()):
        feature_extraction.BACKBONES[key] = (forbid_download(build), weights)
    model = Padim(backbone="resnet18", device=torch.device("cpu"))
    state = torch.load(asked["weights"], weights_only=True)
    model.embeddings_extractor.backbone.load_state_dict(state, strict=False)
    batches = torch.stack([prepare_image(name) for name in asked["train"]]).split(32)
    model.fit([(batch,) for batch in batches])
    made["model"] = model.eval()


@torch.inference_mode()
def score_batch(batch: torch.Tensor) -> Any:
    return made["model"].predict(batch)


def score_test_images() -> dict[str, float | None]:
    names = asked["good"] + asked["bad"]
    labels = [int(name in asked["bad"]) for name in names]
    scores, maps, masks = [], [], []
    for number in range(0, len(names), 32):
        part = names[number : number + 32]
        found = score_batch(torch.stack([prepare_image(name) for name in part]))
        scores.append(np.asarray(found[0]).reshape(-1))
        maps.append(np.asarray(found[1]))
    for name in names:
        mask = asked["masks"].get(name)
        shown = np.zeros((size, size), bool)
        if mask is not None:
            shown = np.asarray(Image.open(mask).convert("L").resize((size, size), Image.Resampling.NEAREST)) > 0
        masks.append(shown)
    return {
        "image_auroc": float(roc_auc_score(labels, np.concatenate(scores))),
        "pixel_auroc": float(roc_auc_score(np.stack(masks).ravel(), np.concatenate(maps).ravel())),
        "aupro": None,
    }


batch = torch.rand(32, 3, size, size)

if __name__ == "__main__":
    time_peer(
        imported_s,
        fit_images,
        score_test_images,
        lambda: score_batch(batch[:1]),
        lambda name: score_batch(prepare_image(name)[None]),
        lambda: score_batch(batch),
    )
