"""Smaller memories of places: what a fitted category loses when each place keeps less, by what is left out; and the bytes.

    python -m benchmarks.smaller --data ROOT [ROOT ...] --weights resnet18.pth [--seeds 0 1] [--shares 2 4 8]
    python -m benchmarks.smaller --sizes 200 320 512

A category is fitted once with all embeddings; of those every way makes its memory, its typical distances and its profile anew. A
share of 4 keeps a quarter. Ways: `images` keeps whole images, every n-th; `spread images` those that lie far apart, by their mean
embeddings; `turns` lets images take turns over neighbouring places, so that a window meets them all; `greedy` is
`density.per_place`. Beside them, with all images: rounding to 8 and 4 bits a channel, and fewer channels, by the principal
directions of the normal embeddings. `--sizes` tells the bytes of models and bundles of so many made-up images.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import (
    add_arguments,
    fit_category,
    make_base_settings,
    make_base_settings_of,
    merge_settings,
    open_data,
    print_json,
    print_table,
)
from focus_ray.bundle.bundle import read_bundle, write_bundle
from focus_ray.data.read import read_test_rows
from focus_ray.density.base import NormalStatistics, choose_evenly_spaced
from focus_ray.density.coreset import choose_farthest_points
from focus_ray.density.moments import Moments
from focus_ray.density.nearest import (
    LocationAndCoresetMemory,
    LocationMemory,
    measure_typical_distances,
    subsample_location_coresets,
)
from focus_ray.density.reduction import ChannelReduction
from focus_ray.detect.calibration import CalibrationBuilder
from focus_ray.detect.profile import fit_profile
from focus_ray.features.network import build_network
from focus_ray.fitting.fit import build_detector
from focus_ray.fitting.settings import parse_config
from focus_ray.serving.models import iterate_non_backbone_tensors

FIGURES = ("image_auroc", "pixel_auroc", "aupro_0.3")
Part = tuple[Tensor, Tensor | None]  # as `subsample_location_coresets` returns it
Way = Callable[[Tensor, NormalStatistics], Part]  # of a whole bank (L, N, C)


def select_images(bank: Tensor, numbers: Tensor) -> Part:
    """numbers: (M,) at every place, or (L, M)."""
    images = numbers.expand(len(bank), -1)
    return bank[torch.arange(len(bank))[:, None], images], images


def keep_every_nth(share: int) -> Way:
    return lambda bank, _: select_images(
        bank, torch.tensor(sorted(choose_evenly_spaced(bank.shape[1], -(-bank.shape[1] // share))))
    )


def keep_spread_images(share: int) -> Way:
    def way(bank: Tensor, found: NormalStatistics) -> Part:
        side = found.moments.height // 4
        blocks = bank.float().view(4, side, 4, -1, *bank.shape[1:]).mean(dim=(1, 3))  # (4, 4, N, C)
        rows = blocks.permute(2, 0, 1, 3).flatten(1)
        return select_images(
            bank, choose_farthest_points(rows - rows.mean(dim=0), -(-len(rows) // share)).sort().values
        )

    return way


def keep_rotating_images(share: int) -> Way:
    """Place (r, c) keeps images n with n = slope r + c, modulo the share: up to 9, a window of 3 x 3 meets every remainder."""

    def way(bank: Tensor, found: NormalStatistics) -> Part:
        place, count = torch.arange(len(bank)), bank.shape[1]
        phase = (math.isqrt(share + 1) * (place // found.moments.width) + place % found.moments.width) % share
        return select_images(bank, (phase[:, None] + share * torch.arange(-(-count // share))) % count)

    return way


def keep_greedy_coreset(share: int) -> Way:
    return lambda bank, _: subsample_location_coresets(bank, -(-bank.shape[1] // share), "cpu")


def round_values(bits: int) -> Way:
    def way(bank: Tensor, _: NormalStatistics) -> Part:
        centre = bank.float().mean(dim=1, keepdim=True)
        apart = bank.float() - centre
        step = apart.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
        return (apart / step).round() * step + centre, None

    return way


def keep_everything(bank: Tensor, _: NormalStatistics) -> Part:
    return bank, None


def compute_principal_projection(bank: Tensor, mean: Tensor, count: int) -> Tensor:
    """(C, C), the projection onto the directions in which embeddings (L, N, C) differ most from their places' mean (L, C)."""
    channels = bank.shape[2]
    scatter = torch.zeros(channels, channels)
    for place, around in zip(bank.float(), mean.float(), strict=True):
        scatter += (place - around).t() @ (place - around)
    directions = torch.linalg.eigh(scatter).eigenvectors[:, -count:]
    return directions @ directions.t()


def list_reductions(shares: Sequence[int]) -> dict[str, tuple[Way, int | None]]:
    """Name -> way, and channels; None: all."""
    found: dict[str, tuple[Way, int | None]] = {"all": (keep_everything, None)}
    kinds = {
        "images": keep_every_nth,
        "spread images": keep_spread_images,
        "turns": keep_rotating_images,
        "greedy": keep_greedy_coreset,
    }
    found.update({f"{name}, 1/{share}": (kind(share), None) for name, kind in kinds.items() for share in shares})
    found.update({f"{bits} bits": (round_values(bits), None) for bits in (8, 4)})
    found.update({f"{count} channels": (keep_everything, count) for count in (64, 50)})
    return found


@torch.inference_mode()
def measure_reductions(
    tree: dict[str, Any], category: str, device: str, shares: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Name of a way -> figures of one fit of the category."""
    config = parse_config(merge_settings(tree, {"density": {"per_place": None, "gaussian_share": 0.0}}), is_fitted=True)
    result, inspector = fit_category(config, category, device)
    detector, found = result.detector, result.statistics
    joint = detector.density
    assert isinstance(joint, LocationAndCoresetMemory)
    assert found.bank is not None
    places, bank = joint.location_memory, found.bank[:, :, : found.moments.channels].transpose(0, 1)
    figures = {}
    for name, (way, channels) in list_reductions(shares).items():
        projection = places.whitening
        kept, images = way(bank, found)
        if channels is not None:
            projection = compute_principal_projection(bank, found.moments.mean.cpu(), channels).to(projection)
            kept = kept.float() @ projection.cpu()
        sizes = places.height, places.width, places.window, places.bank.dtype
        memory = LocationMemory(kept, projection, *sizes, images)
        detector.density = LocationAndCoresetMemory(
            memory, joint.coreset, measure_typical_distances(memory, joint.coreset, found)
        )
        detector.profile, _ = fit_profile(detector.density, found, detector.coverage_mask, detector.map_generator)
        measured = inspector.evaluate(read_test_rows(config.data.uri, category))
        figures[name] = {"kept": memory.bank.shape[1], **{key: measured[key] for key in FIGURES}}
        print(f"{category} / {name}: {figures[name]}", flush=True)
    return figures


def compute_sizes(num_images: int, per_place: int | None, precision: str) -> dict[str, int]:
    """Bytes of a loaded model without its backbone, and of its bundle's parts; what the values are does not matter."""
    tree = merge_settings(
        make_base_settings_of("unused", "random", 256), {"density": {"per_place": per_place, "precision": precision}}
    )
    config = parse_config(tree, is_fitted=True)
    net = build_network(config.model)
    reduction = ChannelReduction(net.backbone.spec.channels, config.density, 0)
    side = config.model.image_size_px // config.model.location_side_px(config.density.map_layer)
    channels = reduction.num_channels
    moments = Moments(side, side, channels)
    generator = torch.Generator().manual_seed(0)
    moments.add_embeddings(torch.randn(8, channels, side, side, generator=generator))
    width = channels + reduction.num_coreset_channels
    bank = torch.randn(num_images, side * side, width, generator=generator).half()
    found = NormalStatistics(moments, bank)
    detector = build_detector(config, net, reduction, found)
    builder = CalibrationBuilder("split", 0.05, 0.001)
    builder.add(np.linspace(1, 2, 20), np.ones((20, 8, 8), np.float32))
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_bundle(
            Path(folder) / "bundle",
            config=config,
            category="made-up",
            detector=detector,
            statistics=found,
            calibration=builder.build_calibration(),
            data={},
            metrics={},
        )
        read = read_bundle(Path(folder) / "bundle").detector
    files = {part: entry["num_bytes"] for part, entry in manifest["files"].items()}
    return {"model": sum(one.numel() * one.element_size() for one in iterate_non_backbone_tensors(read)), **files}


def print_size_table(counts: Sequence[int]) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = [
        {"images": count, "per_place": per_place, "precision": precision, **compute_sizes(count, per_place, precision)}
        for count in counts
        for precision in ("bf16", "fp32")
        for per_place in (None, 128, 64)
    ]
    keys = ("model", "network", "density", "moments")
    rows = [
        [one["images"], one["precision"], one["per_place"] or "all", *(round(one[key] / 1e6, 1) for key in keys)]
        for one in samples
    ]
    print_table(("images", "precision", "per place", "model, MB", *(f"{key} file, MB" for key in keys[1:])), rows)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, several=True, required=False)
    parser.set_defaults(image_size_px=256)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--shares", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--sizes", nargs="+", type=int, help="images of made-up models, in place of --data")
    arguments = parser.parse_args()
    if arguments.sizes:
        print_json("smaller", arguments, print_size_table(arguments.sizes))
        return
    if not arguments.data:
        parser.error("give --data or --sizes")
    samples = []
    for number, root in enumerate(arguments.data):
        one = argparse.Namespace(**{**vars(arguments), "data": root, "work": f"{arguments.work}/smaller-{number}"})
        uri, categories = open_data(one)
        for category in categories:
            for seed in arguments.seeds:
                tree = merge_settings(make_base_settings(arguments, uri), {"train": {"seed": seed}})
                for name, figures in measure_reductions(tree, category, arguments.device, arguments.shares).items():
                    samples.append({"category": category, "seed": seed, "way": name, **figures})
    rows: list[list[Any]] = []
    for category in [*dict.fromkeys(sample["category"] for sample in samples), None]:
        for name in dict.fromkeys(sample["way"] for sample in samples):
            group = [s for s in samples if s["way"] == name and category in (s["category"], None)]
            values = [[s[key] for s in group if s[key] is not None] for key in FIGURES]
            means = [statistics.mean(one) if one else None for one in values]
            rows.append([category or "**mean**", name, group[0]["kept"] if category else None, *means])
    print_table(("category", "kept", "embeddings a place", "image AUROC", "pixel AUROC", "AUPRO 0.3"), rows)
    print_json("smaller", arguments, samples)


if __name__ == "__main__":
    main()
