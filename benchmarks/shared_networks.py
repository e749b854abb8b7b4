"""Does a small network that is trained on other categories improve the default density? Plan, figures and verdict: RESULTS.md.

    python -m benchmarks.shared_networks --data ROOT [ROOT ...] --weights resnet18.pth [--variants projector decoder] [--seeds 0]

The features of the pretrained backbone are computed once. A network is trained on the features of five categories and measured on
the five others, so no category is measured with a network that has seen it. The distance of the network is added to that of the
default, each in units of its mean over good images, and both get the profile score of the default.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import print_table, save_json
from benchmarks.trained import choose_rows, find_categories
from focus_ray.data.images import decode_batch, decode_mask
from focus_ray.defects import make_defective_copies
from focus_ray.density.base import choose_evenly_spaced
from focus_ray.detect.detector import Detector, embed_images
from focus_ray.detect.profile import compute_profile_from_distances
from focus_ray.features.alignment.theta import warp_images
from focus_ray.features.network import convert_to_float_images
from focus_ray.fitting.fit import fit
from focus_ray.fitting.projection import build_reduction_with_all_channels
from focus_ray.fitting.settings import parse_config
from focus_ray.fitting.shards import build_shard
from focus_ray.fitting.split import compute_split_plan
from focus_ray.metrics.metrics import ScoredTestImages
from focus_ray.metrics.registry import METRICS

CHOICE = (
    "bottle",
    "cookie",
    "paper_brg02",
    "pill_qc",
    "circuit_board",
)  # categories that choose the weight of a distance
CONFIRMATION = ("screw", "hazelnut_toy", "elpv_mono", "paper_flr01", "paper_zpb01")
WEIGHTS = (0.1, 0.25, 0.5, 1.0)
SIZE_PX = 256
MAX_TRAIN, MAX_TEST = 64, 150  # images of a category
DEFECTS_PER_IMAGE = 3
PROJECTOR_STEPS, DECODER_STEPS = 800, 1200
FIGURES = ("image_auroc", "aupro_0.3")


@dataclass
class CategoryFeatures:
    """The features of a category, and the distances of two defaults.

    clean, defective, tests: float16 (N, C, H, W), features of good training images, of copies with synthetic defects
        (`DEFECTS_PER_IMAGE` for each image), and of test images.
    covered: (N, H, W), share of each location that the synthetic defect covers.
    thetas: (N, 2, 3), alignment of the test images; None without alignment.
    defaults: for each seed, distances of good images (left out of the density) and of test images, (n, H, W).
    """

    clean: Tensor
    defective: Tensor
    covered: Tensor
    tests: Tensor
    thetas: Tensor | None
    labels: np.ndarray[Any, Any]
    masks: list[Any]
    detector: Detector
    defaults: list[tuple[Tensor, Tensor]]


@torch.inference_mode()
def embed(detector: Detector, reduction: Any, images: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor | None]:
    """Returns the embeddings of images (N, H, W, 3), and their alignment (N, 2, 3) or None."""
    parts = [
        embed_images(detector.net, reduction, convert_to_float_images(b, "cpu"))
        for b in torch.from_numpy(images).split(16)
    ]
    thetas = [theta for _, theta in parts if theta is not None]
    return torch.cat([embedding for embedding, _ in parts]), torch.cat(thetas) if thetas else None


def load_category(uri: str, category: str, weights: str) -> CategoryFeatures:
    """Fits the default twice, with seeds 0 and 1, and computes the features of all images."""
    rows = choose_rows(uri, category, MAX_TEST)
    tests = decode_batch([row["image"] for row in rows], SIZE_PX)
    masks = [
        decode_mask(row["mask"], SIZE_PX, SIZE_PX) if row["mask"] is not None
        else None if row["label"] else np.zeros((SIZE_PX, SIZE_PX), bool)
        for row in rows
    ]  # fmt: skip
    defaults, detectors = [], []
    for seed in (0, 1):
        model = {"weights": weights, "image_size_px": SIZE_PX, "precision": "fp32"}
        config = parse_config({"data": {"uri": uri}, "model": model, "train": {"seed": seed}})
        plan = compute_split_plan(config, category)
        plan = plan.select_fit_images(sorted(choose_evenly_spaced(len(plan.fit.rows), MAX_TRAIN)))
        shard = build_shard(config, category, plan, 0, 1)
        detector = fit(config, shard, len(plan.fit.rows), torch.device("cpu")).detector
        embedding, thetas = embed(detector, detector.reduction, tests)
        with torch.inference_mode():
            distances = torch.cat([detector.density.score(part) for part in embedding.split(16)])
        assert detector.profile_distances is not None
        defaults.append((detector.profile_distances, distances))
        detectors.append((detector, shard.images[..., :3].numpy(), thetas))
    detector, images, thetas = detectors[0]
    reduction = build_reduction_with_all_channels(detector.reduction, detector.net.backbone.spec.channels)
    copies, defect_masks, _ = make_defective_copies(images, 7, DEFECTS_PER_IMAGE)
    channels = slice(0, sum(detector.net.backbone.spec.channels))
    clean, test_features = (embed(detector, reduction, part)[0][:, channels].half() for part in (images, tests))
    defective, defect_thetas = embed(detector, reduction, copies)
    defects = torch.from_numpy(defect_masks).float()[:, None]
    if defect_thetas is not None:
        defects = warp_images(defects, defect_thetas, "zeros")
    covered = F.adaptive_avg_pool2d(defects, tuple(clean.shape[2:]))[:, 0]
    labels = np.array([int(row["label"]) for row in rows])
    return CategoryFeatures(
        clean, defective[:, channels].half(), covered, test_features, thetas, labels, masks, detector, defaults
    )


def divide_by_mean(distances: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Divides distances of good images and of test images by the mean of the good images."""
    good, tests = distances
    mean = good[good > 0].mean().clamp_min(1e-9)
    return good / mean, tests / mean


def measure(data: CategoryFeatures, good: Tensor, tests: Tensor) -> dict[str, float]:
    """Returns image AUROC and, with masks, AUPRO of test images from distances of good images and of test images."""
    profile = compute_profile_from_distances(good, data.detector.map_generator)
    scored = data.detector.score_distances(tests, data.thetas, profile)
    has_mask = np.array([mask is not None for mask in data.masks])
    figures = {}
    for name, chosen in ((FIGURES[0], np.ones(len(has_mask), bool)), (FIGURES[1], has_mask)):
        masks = [data.masks[i] for i in np.flatnonzero(chosen)]
        scores, maps = scored.score.numpy()[chosen].astype(float), list(scored.anomaly_map.numpy()[chosen])
        measured = ScoredTestImages(data.labels[chosen], scores, masks, maps, 0.0)
        value = METRICS[name].value(measured) if data.labels[chosen].any() else None
        if value is not None:
            figures[name] = value
    return figures


# Variants: a function of (categories to train on, seed) that returns a function from features to distances


Distance = Callable[[Tensor], Tensor]


def compute_scale(training: Sequence[CategoryFeatures]) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation (1, C, 1, 1) of the channels over the good images of some categories."""
    features = torch.cat([data.clean[::4].float().permute(1, 0, 2, 3).flatten(1) for data in training], dim=1)
    return features.mean(1).view(1, -1, 1, 1), features.std(1).clamp_min(0.05).view(1, -1, 1, 1)


def build_projector(channels: int) -> nn.Module:
    """Builds a network for single locations, (N, C) -> (N, C)."""
    return nn.Sequential(nn.Linear(channels, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, channels))


def make_projector_distance(projector: nn.Module, mean: Tensor, std: Tensor) -> Distance:
    """Returns the length of the predicted movement to the features of the image without a defect."""
    return lambda features: projector(((features - mean) / std).permute(0, 2, 3, 1)).norm(dim=3)


def train_projector(training: Sequence[CategoryFeatures], seed: int) -> Distance:
    """Trains the projector to predict what a synthetic defect changes at a location (as FoundAD and SuperSimpleNet)."""
    mean, std = compute_scale(training)
    generator = torch.Generator().manual_seed(seed)
    projector = build_projector(mean.shape[1])
    optimizer = torch.optim.AdamW(projector.parameters(), 1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PROJECTOR_STEPS)
    for step in range(PROJECTOR_STEPS):
        data = training[step % len(training)]
        images = torch.randint(len(data.defective), (16,), generator=generator)
        pairs = [data.defective[images], data.clean[images // DEFECTS_PER_IMAGE]]
        defective, clean = (((part.float() - mean) / std).permute(0, 2, 3, 1).flatten(0, 2) for part in pairs)
        shares = torch.where(data.covered[images] > 0.3, 1.0, 0.03).flatten()
        chosen = torch.multinomial(shares, 2048, generator=generator)
        loss = F.smooth_l1_loss(projector(defective[chosen]), (defective - clean)[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return make_projector_distance(projector, mean, std)


def leave_projector_untrained(training: Sequence[CategoryFeatures], seed: int) -> Distance:
    """Returns the distance of a projector with random weights, as a control."""
    mean, std = compute_scale(training)
    return make_projector_distance(build_projector(mean.shape[1]), mean, std)


class Decoder(nn.Module):
    """Reconstructs features (B, C, 32, 32) through a coarse bottleneck with dropout (as Dinomaly, arXiv 2405.14325)."""

    def __init__(self, channels: int, width: int = 192) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(channels, width, 1), nn.GELU(), nn.Conv2d(width, width, 4, 4), nn.Dropout(0.3)
        )
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, width))
        layers = (
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.layers = nn.Sequential(*layers)
        self.decode = nn.Sequential(
            nn.ConvTranspose2d(width, width, 4, 4), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, channels, 1),
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        coarse = self.encode(features)
        tokens = self.layers(coarse.flatten(2).transpose(1, 2) + self.position)
        return self.decode(tokens.transpose(1, 2).unflatten(2, coarse.shape[2:]))  # type: ignore[no-any-return]


def train_decoder(training: Sequence[CategoryFeatures], seed: int) -> Distance:
    """Trains the decoder on good images. The distance is the sum over the layers of one minus the cosine similarity."""
    mean, std = compute_scale(training)
    generator = torch.Generator().manual_seed(seed)
    channels = training[0].detector.net.backbone.spec.channels
    decoder = Decoder(mean.shape[1])
    optimizer = torch.optim.AdamW(decoder.parameters(), 1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, DECODER_STEPS)

    def compute_distance(features: Tensor) -> Tensor:
        scaled = (features - mean) / std
        pairs = zip(decoder(scaled).split(channels, dim=1), scaled.split(channels, dim=1), strict=True)
        return sum((1 - F.cosine_similarity(*pair, dim=1) for pair in pairs), torch.zeros(()))

    for step in range(DECODER_STEPS):
        data = training[step % len(training)]
        images = torch.randint(len(data.clean), (12,), generator=generator)
        loss = compute_distance(data.clean[images].float()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    decoder.eval()
    return compute_distance


VARIANTS: dict[str, Callable[[Sequence[CategoryFeatures], int], Distance]] = {
    "untrained projector": leave_projector_untrained,
    "projector": train_projector,
    "decoder": train_decoder,
}


def compute_unseen_distances(
    data: Mapping[str, CategoryFeatures], variant: str, seed: int, trains_on_all: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns category -> distances of good and of test images, from a network that has not seen the category.

    Args: trains_on_all: True: one network has seen all categories.
    """
    everything = (*CHOICE, *CONFIRMATION)
    halves = [(everything, everything)] if trains_on_all else [(CONFIRMATION, CHOICE), (CHOICE, CONFIRMATION)]
    distances = {}
    for training, measured in halves:
        torch.manual_seed(seed)
        distance = VARIANTS[variant]([data[category] for category in training if category in data], seed)
        with torch.inference_mode():
            for category in measured:
                if category in data:
                    parts = (data[category].clean, data[category].tests)
                    distances[category] = divide_by_mean(
                        tuple(torch.cat([distance(b.float()) for b in part.split(16)]) for part in parts)  # type: ignore[arg-type]
                    )
    return distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="folders of images, or data sets")
    parser.add_argument("--weights", default="default", help="weights of ResNet-18")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--all", action="store_true", help="train the decoder on all categories, also on the measured one"
    )
    parser.add_argument("--work", default="scratch/shared_networks")
    parser.set_defaults(device="cpu")
    arguments = parser.parse_args()
    places = find_categories(arguments.data, Path(arguments.work))
    data = {}
    for category in (*CHOICE, *CONFIRMATION):
        data[category] = load_category(places[category], category, arguments.weights)
        print(
            f"{category}: features of {len(data[category].clean)} good and {len(data[category].tests)} test images",
            flush=True,
        )
    defaults = [{category: divide_by_mean(d.defaults[seed]) for category, d in data.items()} for seed in (0, 1)]
    added: dict[str, dict[str, tuple[Tensor, Tensor]]] = {"second default": defaults[1]}
    for variant in arguments.variants:
        for seed in arguments.seeds:
            added[f"{variant}, seed {seed}"] = compute_unseen_distances(data, variant, seed, False)
        if arguments.all and variant == "decoder":
            added["decoder of all categories"] = compute_unseen_distances(data, variant, arguments.seeds[0], True)
    arms = {"default": (defaults[0], 0.0)}
    arms |= {f"+ {weight} {name}": (distances, weight) for name, distances in added.items() for weight in WEIGHTS}
    samples, rows = [], []
    for arm, (distances, weight) in arms.items():
        figures = {}
        for category, base in defaults[0].items():
            good, tests = (first + weight * second for first, second in zip(base, distances[category], strict=True))
            figures[category] = measure(data[category], good, tests)
        samples.append({"arm": arm, "figures": figures})
        means = [
            float(np.mean([figures[category][name] for category in group if name in figures[category]]))
            for group in (CHOICE, CONFIRMATION)
            for name in FIGURES
        ]
        rows.append([arm, *means])
        print(rows[-1], flush=True)
    names = [f"{name}, {group}" for group in ("choice", "confirmation") for name in ("image AUROC", "AUPRO 0.3")]
    print_table(("default and a further distance", *names), rows)
    save_json("shared_networks", arguments, samples)


if __name__ == "__main__":
    main()
