"""On an accelerator: inspection beside the bare backbone at many batch sizes, in float32 and bfloat16, eager and compiled.

    python -m benchmarks.gpu [--data FOLDER_OF_GOOD_IMAGES] [--weights resnet18.pth] [--compile]

Needs no Ray, and nothing from a network: without --data the parts are drawn, without --weights the network is untrained, which
costs the same. Every call is waited for; inspection takes uint8 from and gives maps to the host's memory, the backbone alone has
its images on the device, in its number type. Compiled is torch.compile's default mode: from the third batch size on the code is
that for any size, and the first calls are those in which it compiles. Each figure is the median of runs that take turns.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import make_base_settings_of, make_inspector, merge_settings, print_table, save_json
from benchmarks.limits import time_interleaved
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.images import decode_batch
from focus_ray.data.importers.base import list_image_files
from focus_ray.features.alignment.congealing import CongealingAligner
from focus_ray.features.backbones.base import Backbone
from focus_ray.features.network import LAYERS, FocusNet, convert_to_float_images
from focus_ray.fitting.fit import fit
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shards import MemoryShard
from focus_ray.fitting.split import NUM_CALIBRATION_FOLDS
from focus_ray.precision import choose_compute_dtype
from focus_ray.samples.write import CATEGORIES, draw_sample


def load_training_images(arguments: argparse.Namespace) -> Tensor:
    """(N, H, W, 3) uint8."""
    size = arguments.image_size_px
    if arguments.data is None:
        drawn = [draw_sample(arguments.part, 0, "train", number, size)[0] for number in range(arguments.images)]
        return torch.from_numpy(np.stack(drawn))
    files = list_image_files(Path(arguments.data))[: arguments.images]
    if not files:
        raise SystemExit(f"{arguments.data}: no image in this folder")
    return torch.from_numpy(decode_batch([file.read_bytes() for file in files], size, 2))


def fit_inspector(config: Config, images: Tensor, device: str) -> tuple[Inspector, dict[str, float]]:
    """An inspector, and the seconds that the stages of its fit took."""
    shard = MemoryShard(images, folds=torch.arange(len(images)) % NUM_CALIBRATION_FOLDS)
    found = fit(config, shard, len(images), torch.device(device))
    return make_inspector(config, "part", found, device), found.seconds


def aligns_images(net: FocusNet) -> bool:
    aligner = net.image_aligner
    return isinstance(aligner, CongealingAligner) and bool(aligner.enabled)


def time_device_call(act: Callable[[], object], device: str) -> Callable[[], object]:
    def run() -> None:
        act()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    return run


@torch.inference_mode()
def measure_matmul_flops(side: int, dtype: torch.dtype, device: str, times: int) -> float:
    """FLOP/s of a product of two square matrices: what the backbone is held against."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    found = time_interleaved({"product": time_device_call(lambda: left @ right, device)}, times)
    return 2.0 * side**3 / found["product"]


@torch.inference_mode()
def count_flops_per_image(backbone: Backbone, image: Tensor) -> int:
    """FLOP of the convolutions, two a multiply-add, for one image (1, 3, H, W)."""
    with FlopCounterMode(display=False) as counter:
        backbone(image)
    return int(counter.get_total_flops())


def compile_layers(backbone: Backbone) -> Backbone:
    """A copy whose layers are compiled when they are first called, each by itself, as the network calls them."""
    # one code object serves all layers, types and batch sizes; past its limit torch goes on eagerly without a word
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    found = copy.deepcopy(backbone)
    for layer in LAYERS:
        getattr(found, layer).compile()
    return found


@torch.inference_mode()
def measure_inspector(
    inspector: Inspector, arguments: argparse.Namespace, ceiling: float
) -> tuple[list[dict[str, Any]], str]:
    """Rows, one a batch size and mode; and why compiling did not work, '' where it did or was not asked for."""
    detector, device, size = inspector.bundle.detector, arguments.device, arguments.image_size_px
    net = detector.net
    dtype = next(net.backbone.parameters()).dtype
    backbones = {"eager": net.backbone}
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 255, (count, size, size, 3), dtype=np.uint8) for count in arguments.batches]
    flops = count_flops_per_image(
        net.backbone, convert_to_float_images(torch.from_numpy(batches[0][:1]), device).to(dtype)
    )
    if arguments.compile:
        backbones["compiled"] = compile_layers(net.backbone)
    trouble = ""
    rows: list[dict[str, Any]] = []
    for batch in batches:
        ready = convert_to_float_images(torch.from_numpy(batch), device).to(dtype)
        acts: dict[str, Callable[[], object]] = {}
        first: dict[str, float] = {}
        scores: dict[str, Any] = {}
        for mode, backbone in list(backbones.items()):

            def inspection(backbone: Backbone = backbone, batch: Any = batch) -> Any:
                net.backbone = backbone
                return inspector.score(batch)[0]

            def alone(backbone: Backbone = backbone, ready: Tensor = ready) -> object:
                return backbone(ready)

            bare = time_device_call(alone, device)
            try:
                start = time.perf_counter()
                scores[mode] = inspection()
                bare()
                first[mode] = time.perf_counter() - start
            except Exception as error:
                if mode == "eager":
                    raise
                trouble = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error)
                del backbones[mode]
                continue
            acts[f"{mode} inspection"], acts[f"{mode} backbone"] = inspection, bare
        found = time_interleaved(acts, arguments.times)
        for mode in first:
            inspected, alone_s = found[f"{mode} inspection"], found[f"{mode} backbone"]
            rate = len(batch) * flops / alone_s
            rows.append(
                {
                    "batch": len(batch),
                    "mode": mode,
                    "inspection_per_s": len(batch) / inspected,
                    "backbone_per_s": len(batch) / alone_s,
                    "share": alone_s / inspected,
                    "backbone_tflops": rate / 1e12,
                    "share_of_product": rate / ceiling,
                    "first_s": first[mode],
                    "score_difference": float(np.abs(scores[mode] / scores["eager"] - 1).max()),
                }
            )
    net.backbone = backbones["eager"]
    return rows, trouble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images of good parts")
    parser.add_argument("--part", choices=sorted(CATEGORIES), default="gear", help="what is drawn without --data")
    parser.add_argument("--images", type=int, default=60, help="so many are fitted; a memory's cost grows with them")
    parser.add_argument("--weights", default="random", help="model.weights")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size-px", type=int, default=256)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[2**power for power in range(9)])
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--product-side", type=int, help="of the matrices; default: 8192 on a GPU, 1024 on a CPU")
    parser.add_argument("--tf32", action="store_true", help="let float32 convolutions and products round to TF32")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile: minutes")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: torch finds no GPU here; --device cpu tries the benchmark out")
    side = arguments.product_side or (8192 if arguments.device.startswith("cuda") else 1024)
    # torch's own default is True for convolutions and False for products
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = arguments.tf32
    images = load_training_images(arguments)
    samples: dict[str, Any] = {}
    for precision in arguments.precisions:
        tree = make_base_settings_of("unused", arguments.weights, arguments.image_size_px, arguments.backbone)
        config = parse_config(merge_settings(tree, {key: {"precision": precision} for key in ("model", "density")}))
        ceiling = measure_matmul_flops(
            side, choose_compute_dtype(precision, arguments.device), arguments.device, arguments.times
        )
        inspector, stages = fit_inspector(config, images, arguments.device)
        fit_s = sum(stages.values())
        aligned = aligns_images(inspector.bundle.detector.net)
        rows, trouble = measure_inspector(inspector, arguments, ceiling)
        samples[precision] = {
            "product_tflops": ceiling / 1e12,
            "fit_s": fit_s,
            "stages_s": stages,
            "aligned": aligned,
            "rows": rows,
            "compile_error": trouble,
        }
        print(
            f"\n{precision}: fit of {len(images)} images in {fit_s:.1f} s, image alignment {'on' if aligned else 'off'}; "
            f"product of {side} x {side} matrices at {ceiling / 1e12:.2f} TFLOP/s\n"
        )
        print_table(
            (
                *("batch", "mode", "inspection, images/s", "backbone, images/s", "inspection / backbone"),
                *("backbone, TFLOP/s", "of the product's", "first call, s", "scores off eager's"),
            ),
            [[row[key] for key in rows[0]] for row in rows],
        )
        if trouble:
            print(f"\ntorch.compile does not work here: {trouble}")
    print()
    save_json("gpu", arguments, samples)


if __name__ == "__main__":
    main()
