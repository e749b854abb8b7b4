"""What each backbone costs: parameters, arithmetic, time of an image and of a fit, its bundle. Random weights cost the same.

    python -m benchmarks.backbones [--backbones resnet18 dinov2_vits14] [--train-images 12]

Times are of the CPU on one thread, not of the clock, so that a busy machine changes them less: the median of several passes of
four images through layers 1 to 3, prepared as for inspection. Multiplications, each with its addition, are counted by torch.
The fit is the default configuration's over made-up parts (`focus-ray samples`) of the input's size.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import make_base_settings_of, print_table, save_json
from focus_ray.bundle.bundle import write_bundle
from focus_ray.features.backbones.base import build_backbone, build_meta_backbone
from focus_ray.features.backbones.registry import BACKBONES
from focus_ray.features.batch_norm import use_inference_backbone
from focus_ray.features.network import FocusNet
from focus_ray.features.settings import ModelConfig
from focus_ray.fitting.fit import fit
from focus_ray.fitting.settings import parse_config
from focus_ray.fitting.shards import build_shard
from focus_ray.fitting.split import compute_split_plan
from focus_ray.ingestion.ingest import ingest
from focus_ray.samples.write import write_samples

_AT_ONCE = 4


def choose_input_size(backbone: str) -> int:
    """The multiple of its stride that is nearest to 256 px."""
    stride = BACKBONES[backbone].strides[2]
    return round(256 / stride) * stride


def count_billion_multiplications(name: str, size_px: int) -> float:
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        build_meta_backbone(name).eval()(torch.empty(1, 3, size_px, size_px))
    return float(counted.get_total_flops()) / 2e9


@torch.inference_mode()
def measure_ms_per_image(net: FocusNet, dtype: torch.dtype, images: Tensor, repeats: int) -> float:
    """Median time of the CPU."""
    with use_inference_backbone(net, dtype):
        times = []
        for _ in range(repeats + 1):  # the first warms up
            start = time.process_time()
            net.compute_features(images)
            times.append(time.process_time() - start)
    return 1e3 * statistics.median(times[1:]) / len(images)


def measure_backbone(name: str, repeats: int) -> dict[str, Any]:
    size = choose_input_size(name)
    net = FocusNet(ModelConfig(backbone=name, image_size_px=size), build_backbone(name, "random")).eval()
    net = net.to(memory_format=torch.channels_last)
    images = torch.rand(_AT_ONCE, 3, size, size).to(memory_format=torch.channels_last)
    state = net.backbone.state_dict().values()
    return {
        "backbone": name,
        "size_px": size,
        "parameters": sum(value.numel() for value in net.backbone.parameters()),
        "bytes": sum(value.numel() * value.element_size() for value in state),
        "channels": net.backbone.spec.channels,
        "places": (size // net.backbone.spec.strides[1]) ** 2,
        "multiplications_e9": count_billion_multiplications(name, size),
        "ms_fp32": measure_ms_per_image(net, torch.float32, images, repeats),
        "ms_bf16": measure_ms_per_image(net, torch.bfloat16, images, repeats),
    }


def measure_fit(name: str, num_images: int, folder: Path) -> dict[str, Any]:
    """Seconds of the CPU for a fit, and its bundle's bytes."""
    size = choose_input_size(name)
    uri = folder / f"data-{size}"
    if not uri.is_dir():
        write_samples(
            folder / f"images-{size}", size_px=size, num_train=num_images, num_test_good=1, num_bad_per_type=1
        )
        ingest(folder / f"images-{size}", uri, categories=["gear"], progress=False)
    config = parse_config(make_base_settings_of(str(uri), "random", size, name))
    plan = compute_split_plan(config, "gear")
    shard = build_shard(config, "gear", plan, rank=0, num_workers=1)
    start = time.process_time()
    found = fit(config, shard, len(plan.fit.rows), torch.device("cpu"))
    seconds = time.process_time() - start
    place = folder / name
    write_bundle(
        str(place), config=config, category="gear", detector=found.detector, statistics=found.statistics,
        calibration=found.calibration, data={"uri": "samples"}, metrics={}, fit_hashes=(),
    )  # fmt: skip
    return {"fit_s": seconds, "bundle_bytes": sum(file.stat().st_size for file in place.rglob("*") if file.is_file())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--train-images", type=int, default=12, help="of the fit; 0: none")
    arguments = parser.parse_args()
    arguments.device = "cpu"
    torch.set_num_threads(1)
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.backbones:
            samples.append(measure_backbone(name, arguments.repeats))
            if arguments.train_images:
                samples[-1].update(measure_fit(name, arguments.train_images, Path(folder)))
            print(samples[-1], flush=True)
    header = ("backbone", "input, px", "parameters, 10^6", "weights, MB", "channels", "places", "multiplications, 10^9")
    rows = [
        (
            one["backbone"], one["size_px"], f"{one['parameters'] / 1e6:.2f}", f"{one['bytes'] / 1e6:.1f}",
            " + ".join(map(str, one["channels"])), one["places"], f"{one['multiplications_e9']:.2f}",
            f"{one['ms_fp32']:.0f}", f"{one['ms_bf16']:.0f}",
            f"{one['fit_s']:.0f}" if "fit_s" in one else None,
            f"{one['bundle_bytes'] / 1e6:.1f}" if "fit_s" in one else None,
        )
        for one in samples
    ]  # fmt: skip
    print_table((*header, "fp32, ms", "bf16, ms", "fit, s", "bundle, MB"), rows)
    save_json("backbones", arguments, samples)


if __name__ == "__main__":
    main()
