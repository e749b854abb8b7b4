"""Whether photographs of one part are found without labels, and whether different parts are joined by mistake.

    python -m benchmarks.duplicates --data ROOT [ROOT ...] --weights resnet18.pth [--draws 10]

Good images of each category are drawn at random. As they are, no two of them should be joined, unless some are real duplicates.
Then some parts are photographed several times in simulation (`benchmarks.bursts`): all pairs of photographs of a part should be
joined, and no pair of different parts.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.bursts import simulate_photographs
from benchmarks.harness import add_arguments, make_base_settings, open_data, print_json, print_table
from benchmarks.verdicts import load_images
from focus_ray.density.reduction import ChannelReduction
from focus_ray.features.batch_norm import use_inference_backbone
from focus_ray.features.network import build_network, convert_to_float_images
from focus_ray.fitting.duplicates import (
    SHIFTS_PX,
    ImageGroupsAndOrder,
    compute_descriptor_distances,
    compute_image_descriptors,
    find_related_images,
    group_near_duplicates,
    measure_same_part_distance,
)
from focus_ray.fitting.settings import parse_config
from focus_ray.precision import choose_compute_dtype

COUNTS = (10, 20, 40, 100)  # images of a draw without bursts
BURSTS = ((10, 2), (10, 4), (20, 2), (6, 6))  # parts, photographs of each
POOL = 20  # parts that are photographed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, several=True)
    parser.set_defaults(image_size_px=256)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--shift-px", type=int, default=1, help="largest shift of a simulated photograph")
    parser.add_argument("--noise", type=float, default=2.0, help="standard deviation in grey levels of 255")
    arguments = parser.parse_args()
    samples: list[dict[str, Any]] = []
    for number, root in enumerate(arguments.data):
        one = argparse.Namespace(**{**vars(arguments), "data": root, "work": f"{arguments.work}/duplicates-{number}"})
        uri, categories = open_data(one)
        for category in categories:
            samples.append(measure_category(one, uri, category))
            print(samples[-1], flush=True)
    header = [
        "category",
        *(f"{n} images" for n in COUNTS),
        *(f"{n} parts x {times}" for n, times in BURSTS),
        "sequence",
    ]
    print_table(header, [list(sample.values()) for sample in samples])
    print_json("duplicates", arguments, samples)


def measure_category(arguments: argparse.Namespace, uri: str, category: str) -> dict[str, Any]:
    """Cells of a category's row: draws with a join / largest number of images joined; recall / wrong pairs of bursts."""
    config = parse_config(make_base_settings(arguments, uri))
    net = build_network(config.model).eval().to(memory_format=torch.channels_last)
    reduction = ChannelReduction(net.backbone.spec.channels, config.density, 0)
    images = load_images(uri, category, 0, arguments.image_size_px)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(images), generator=generator)[:POOL]
    most = max(times for _, times in BURSTS)
    bursts = simulate_photographs(
        images[chosen], most, 1, shift_px=arguments.shift_px, noise=arguments.noise, brightness=0.0
    )
    with use_inference_backbone(net, choose_compute_dtype(config.model.precision, "cpu")), torch.no_grad():
        limit = measure_same_part_distance(net, reduction, images[: len(SHIFTS_PX)], "cpu")
        assert limit is not None
        single, photographed = (_compute_descriptors(net, reduction, part) for part in (images, bursts))
    row: dict[str, Any] = {"category": category}
    distances = compute_descriptor_distances(single, single)
    for count in COUNTS:
        joined = []
        for _ in range(arguments.draws if count <= len(images) else 0):
            part = torch.randperm(len(images), generator=generator)[:count]
            joined.append(count - len(group_near_duplicates(distances[part][:, part], limit).unique()))
        row[f"{count} images"] = f"{sum(n > 0 for n in joined)} / {max(joined)}" if joined else None
    distances = compute_descriptor_distances(photographed, photographed)
    for num_parts, times in BURSTS:
        found, wrong, pairs = 0, 0, 0
        for _ in range(arguments.draws if num_parts <= len(chosen) else 0):
            parts = torch.randperm(len(chosen), generator=generator)[:num_parts]
            part = (parts[:, None] * most + torch.arange(times)).flatten()
            groups = group_near_duplicates(distances[part][:, part], limit)
            same, true = groups[:, None] == groups, part[:, None] // most == part // most
            found, pairs = found + int((same & true).sum()) - len(part), pairs + int(true.sum()) - len(part)
            wrong += int((same & ~true).sum()) // 2
        row[f"{num_parts} x {times}"] = f"{found / pairs:.2f} / {wrong}" if pairs else None
    order = torch.arange(len(images))
    relations = find_related_images(single, ImageGroupsAndOrder(order, order, None))
    row["sequence"] = "no" if relations is None else f"blocks of {int(relations.related.sum(dim=1).max())}"
    return row


def _compute_descriptors(net: Any, reduction: ChannelReduction, images: Tensor) -> Tensor:
    return torch.cat(
        [compute_image_descriptors(net, reduction, convert_to_float_images(part, "cpu")) for part in images.split(16)]
    )


if __name__ == "__main__":
    main()
