"""anomalib's PaDiM or PatchCore through its Engine; needs anomalib and ADEval in its own environment."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

start = time.perf_counter()

import numpy as np
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator
from anomalib.models import Padim, Patchcore
from PIL import Image

imported_s = time.perf_counter() - start
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.peers.common import read_specification, time_peer

warnings.filterwarnings("ignore")
for name in ("anomalib", "lightning", "lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
asked = read_specification()
size = asked["size_px"]
made: dict[str, Any] = {}


def make_evaluator() -> Evaluator:
    return Evaluator(
        test_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
            AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
            AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_"),
        ]
    )


def fit_images() -> None:
    kind = Padim if asked["method"] == "padim" else Patchcore
    settings: dict[str, Any] = {"backbone": "resnet18", "pre_trained": False, "visualizer": False}
    if asked["method"] == "padim":
        settings["layers"] = ["layer1", "layer2", "layer3"]
    else:
        settings.update(layers=["layer2", "layer3"], coreset_sampling_ratio=0.01)
    model = kind(
        **settings, pre_processor=kind.configure_pre_processor(image_size=(size, size)), evaluator=make_evaluator()
    )
    weights = torch.load(asked["weights"], weights_only=True)
    missing, _ = model.model.feature_extractor.feature_extractor.load_state_dict(weights, strict=False)
    assert not [name for name in missing if "num_batches" not in name], missing
    folders = asked["folders"]
    made["data"] = Folder(
        name="part",
        root=folders["root"],
        normal_dir=folders["train"],
        normal_test_dir=folders["good"],
        abnormal_dir=folders["bad"],
        mask_dir=folders["masks"],
        num_workers=0,
        val_split_mode="same_as_test",
        train_batch_size=32,
        eval_batch_size=32,
    )
    made["engine"] = Engine(
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=asked["scratch"],
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    made["engine"].fit(model=model, datamodule=made["data"])
    made["model"] = model.eval()


def score_test_images() -> dict[str, float | None]:
    (found,) = made["engine"].test(model=made["model"], datamodule=made["data"], verbose=False)
    return {
        "image_auroc": float(found["image_AUROC"]),
        "pixel_auroc": float(found["pixel_AUROC"]) if "pixel_AUROC" in found else None,
        "aupro": float(found["pixel_AUPRO"]) if "pixel_AUPRO" in found else None,
    }


@torch.inference_mode()
def score_batch(batch: torch.Tensor) -> object:
    return made["model"](batch)


def score_file(name: str) -> object:
    pixels = np.asarray(Image.open(name).convert("RGB"))
    return score_batch(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)


batch = torch.rand(32, 3, size, size)

if __name__ == "__main__":
    time_peer(
        imported_s,
        fit_images,
        score_test_images,
        lambda: score_batch(batch[:1]),
        score_file,
        lambda: score_batch(batch),
    )
