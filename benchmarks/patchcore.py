"""A plain PatchCore beside the default configuration: accuracy and fit time on the same images, weights and machine.

    python -m benchmarks.patchcore --data MVTEC_ROOT --weights resnet18.pth --categories screw

PatchCore as its paper describes it (arXiv 2106.08265): layers 2 and 3, averaged over 3x3, on layer 2's places; a greedy
k-centre coreset of 1 % of all patches, chosen in a random projection to 128 dimensions; distance to the nearest patch kept;
bilinear, smoothing of 4 px, maximum. It is a reference to measure against, not part of the product. Both are given every
normal training image but those held out for calibration. `benchmarks.generalise` also measures it with a larger coreset, with
reflection in the backbone's padding and with the image score of the product, to show what each of these is worth alone.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import add_arguments, make_base_settings, open_data, print_json, print_table, train_and_evaluate
from benchmarks.intervals import bootstrap_pixel_metrics
from focus_ray.data.images import decode_image, decode_mask
from focus_ray.data.read import read_test_rows
from focus_ray.density.base import choose_evenly_spaced
from focus_ray.detect.anomaly_map import AnomalyMapGenerator, build_upsampling_matrix, smooth_columns
from focus_ray.detect.detector import SMOOTHING_SIGMA_PX
from focus_ray.detect.inspection import resize_anomaly_map
from focus_ray.detect.profile import MAX_IMAGES, compute_profile_from_distances
from focus_ray.features.backbones.base import Backbone, build_backbone, set_padding_mode
from focus_ray.features.network import convert_to_float_images
from focus_ray.fitting.settings import parse_config
from focus_ray.fitting.shards import MemoryShard, build_shard
from focus_ray.fitting.split import SplitPlan, compute_split_plan
from focus_ray.metrics.evaluate import compute_evaluation_size, compute_metrics
from focus_ray.metrics.metrics import ScoredTestImages


def extract_patches(backbone: Backbone, images: Tensor) -> Tensor:
    """(B, 3, S, S) in 0..1 -> (B, (S/8)^2, C2 + C3)."""
    spec = backbone.spec
    mean = torch.tensor(spec.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=images.device).view(1, 3, 1, 1)
    _, second, third = backbone((images - mean) / std)
    second, third = (F.avg_pool2d(level, 3, 1, 1) for level in (second, third))
    third = F.interpolate(third, size=second.shape[2:], mode="bilinear", align_corners=False)
    return torch.cat([second, third], dim=1).flatten(2).transpose(1, 2)


def choose_farthest_points(bank: Tensor, share: float, seed: int) -> Tensor:
    """Row numbers of the coreset of a bank (N, C), chosen one after the other, each the farthest from those before it."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    projection = torch.randn(bank.shape[1], 128, generator=generator).to(bank.device)
    points = bank @ projection
    norms = points.square().sum(dim=1)
    chosen = [int(torch.randint(len(bank), (1,), generator=generator))]
    distance = torch.full((len(bank),), torch.inf, device=bank.device)
    for _ in range(max(1, int(share * len(bank))) - 1):
        last = chosen[-1]
        distance = torch.minimum(distance, norms - 2 * (points @ points[last]) + norms[last])
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen, device=bank.device)


def compute_nearest_distance_map(embedding: Tensor, coreset: Tensor) -> Tensor:
    """Distance of each patch (L, C) to its nearest patch of the coreset (M, C), as a square map (sqrt(L), sqrt(L))."""
    side = math.isqrt(len(embedding))
    return torch.cdist(embedding, coreset).amin(dim=1).view(side, side)


def compute_left_out_distances(embeddings: Tensor, rows: Tensor) -> Tensor:
    """Distance maps (n, H, W) of good images, each without its own patches in the coreset; n is MAX_IMAGES at most.

    Args:
        embeddings: (N, L, C) of all training images, N >= 2.
        rows: (M,), the coreset as row numbers of embeddings.flatten(0, 1).
    """
    coreset, owner = embeddings.flatten(0, 1)[rows], rows // embeddings.shape[1]
    chosen = sorted(choose_evenly_spaced(len(embeddings), MAX_IMAGES))
    return torch.stack(
        [compute_nearest_distance_map(embeddings[number], coreset[owner != number]) for number in chosen]
    )


@torch.inference_mode()
def fit_and_evaluate_patchcore(
    tree: dict[str, Any],
    category: str,
    device: str,
    seed: int,
    plan: SplitPlan | None = None,
    *,
    share: float = 0.01,
    padding: str = "zeros",
    image_score: str = "maximum",
) -> dict[str, Any]:
    """Fits and evaluates PatchCore on one category.

    Args:
        tree: a configuration; its data, backbone, image size and smoothing are used.
        plan: its fit rows are the training images; None takes the plan of the configuration.
        share: of all patches, that the coreset keeps.
        padding: of the backbone's convolutions, as model.padding. The 3x3 average always counts zeros, as published.
        image_score: as scoring.image_score. The profile is taken from images that are left out of the coreset.

    Returns:
        The metrics of `compute_metrics`, labels, scores and pixel draws of the test images, seconds of the fit and
        milliseconds per test image.
    """
    config = parse_config(tree)
    plan = plan or compute_split_plan(config, category)
    shard = build_shard(config, category, plan, 0, 1)
    assert isinstance(shard, MemoryShard)
    backbone = build_backbone(config.model.backbone, config.model.weights).eval().to(device)
    set_padding_mode(backbone, padding)
    backbone = backbone.to(memory_format=torch.channels_last)
    size = config.model.image_size_px
    start = time.perf_counter()
    embeddings = torch.cat(
        [extract_patches(backbone, convert_to_float_images(batch, device)) for batch in shard.read_batches("fit")]
    )
    features_s = time.perf_counter() - start
    rows = choose_farthest_points(embeddings.flatten(0, 1), share, seed)
    coreset = embeddings.flatten(0, 1)[rows]
    side = smooth_columns(build_upsampling_matrix(size // 8, size), SMOOTHING_SIGMA_PX).float().contiguous().to(device)
    spread = AnomalyMapGenerator(side, side)
    profile = (
        compute_profile_from_distances(compute_left_out_distances(embeddings, rows), spread)
        if image_score == "profile"
        else None
    )
    fit_s = time.perf_counter() - start
    del embeddings
    labels, types, scores, maps, masks = [], [], [], [], []
    start = time.perf_counter()
    for record in read_test_rows(config.data.uri, category):
        image = torch.from_numpy(decode_image(record["image"], size))[None]
        distance = compute_nearest_distance_map(
            extract_patches(backbone, convert_to_float_images(image, device))[0], coreset
        )[None]
        anomaly_map = spread(distance)[0].cpu().numpy()
        height, width = compute_evaluation_size(record["height"], record["width"], 512)
        labels.append(int(record["label"]))
        types.append(record["defect_type"])
        scores.append(
            float(anomaly_map.max()) if profile is None else float(profile.compute_image_scores(distance, spread))
        )
        maps.append(resize_anomaly_map(anomaly_map, height, width))
        has_mask = record["mask"] is not None
        mask = decode_mask(record["mask"], height, width) if has_mask else np.zeros((height, width), dtype=bool)
        masks.append(mask if has_mask or not record["label"] else None)
    measured = ScoredTestImages(np.array(labels), np.array(scores), masks, maps, 0.0)
    metrics = compute_metrics(measured, types, 0.05)
    ms = 1e3 * (time.perf_counter() - start) / len(labels)
    images = {"labels": labels, "scores": scores, "pixel_draws": bootstrap_pixel_metrics(labels, masks, maps)}
    return {**metrics, **images, "fit_s": fit_s, "features_s": features_s, "ms": ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    uri, categories = open_data(arguments)
    tree = {**make_base_settings(arguments, uri), "train": {"seed": arguments.seed}}
    rows, samples = [], []
    for category in categories:
        result, _, ours = train_and_evaluate(tree, category, arguments.device)
        seconds = result.seconds
        other = fit_and_evaluate_patchcore(tree, category, arguments.device, arguments.seed)
        ours_s = seconds["alignment"] + seconds["statistics"]
        rows.append([category, "ours", *(ours[k] for k in ("image_auroc", "pixel_auroc", "aupro_0.3")), ours_s])
        rows.append(
            [
                category,
                "PatchCore 1 %",
                *(other[k] for k in ("image_auroc", "pixel_auroc", "aupro_0.3")),
                other["fit_s"],
            ]
        )
        other = {key: value for key, value in other.items() if key not in ("labels", "scores", "pixel_draws")}
        samples.append({"category": category, "ours": ours, "seconds": seconds, "patchcore": other})
    print()
    print_table(("category", "method", "image AUROC", "pixel AUROC", "AUPRO 0.3", "fit, s (with features)"), rows)
    print_json("patchcore", arguments, samples)


if __name__ == "__main__":
    main()
