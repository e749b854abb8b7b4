"""Exports of bundles beside PyTorch in float32, in every format and precision: differences, verdicts, AUROC, sizes and times.

python -m benchmarks.exports --bundles runs/bottle/bundles/bottle runs/screw/bundles/screw    # that `train` made
python -m benchmarks.exports --data ROOT [ROOT ...] --weights resnet18.pth                    # trained first, as the default is

Each format's model is run as its users run it, one image at a time, over test images of the bundle's data set.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import add_arguments, open_data, print_table, save_json
from focus_ray.bundle.bundle import read_bundle
from focus_ray.data.images import decode_image
from focus_ray.export.check import TOLERANCE, check_export, find_check_failures, score_examples_with_pytorch
from focus_ray.export.examples import read_export_examples
from focus_ray.export.formats import (
    MODEL_FILES,
    open_exported_model,
    quantise_onnx_model,
    trace_scorer,
    write_onnx,
    write_openvino,
)
from focus_ray.export.scorer import OUTPUTS, ExportableScorer

HEADER = (
    *("category", "to", "precision", "score", "score, median", "map", "verdicts", "AUROC", "of the export"),
    *("MB", "ms torch", "ms export"),
)


def train_bundles(arguments: argparse.Namespace) -> list[str]:
    """Bundles of all categories of --data, by the default configuration."""
    from focus_ray.cli.main import main as command

    found = []
    for number, root in enumerate(arguments.data):
        one = argparse.Namespace(**{**vars(arguments), "data": root, "work": f"{arguments.work}/exports-{number}"})
        uri, categories = open_data(one)
        for category in categories:
            name = f"exports-{number}-{category}"
            words = [f"data.uri={uri}", f"data.categories=[{category}]", f"model.weights={arguments.weights}"]
            if command(["train", "default", *words, f"storage={arguments.work}", f"name={name}"]):
                raise SystemExit(f"{category}: could not be trained")
            found.append(f"{arguments.work}/{name}/bundles/{category}")
    return found


def write_all_formats(
    uri: str, folder: Path, int8_images: Sequence[NDArray[np.uint8]]
) -> Iterator[tuple[str, str, Path]]:
    """Writes a bundle in all formats, as `write_model_files` does, but traces only once for each precision.

    Yields: format, precision, folder.
    """
    for half, precision in ((False, "fp32"), (True, "fp16")):
        program = trace_scorer(ExportableScorer(read_bundle(uri, precision="fp32"), half))
        folders = {to: folder / f"{to}-{precision}" for to in MODEL_FILES}
        for folder_of_format in folders.values():
            folder_of_format.mkdir()
        torch.export.save(program, folders["torch"] / MODEL_FILES["torch"])
        backbone = write_onnx(program, folders["onnx"] / MODEL_FILES["onnx"], OUTPUTS)
        write_openvino(folders["onnx"] / MODEL_FILES["onnx"], folders["openvino"] / MODEL_FILES["openvino"])
        for to, folder_of_format in folders.items():
            yield to, precision, folder_of_format
        if precision == "fp32":
            path = folders["onnx"] / MODEL_FILES["onnx"]
            quantised = path.with_name("int8.onnx")
            quantise_onnx_model(path, quantised, int8_images, backbone)
            quantised.replace(path)
            write_openvino(folders["onnx"] / MODEL_FILES["onnx"], folders["openvino"] / MODEL_FILES["openvino"])
            for to in ("onnx", "openvino"):
                yield to, "int8", folders[to]


def compare_exports(uri: str, max_examples: int) -> list[dict[str, Any]]:
    """Exports a bundle in all formats and returns a comparison with PyTorch for each."""
    bundle = read_bundle(uri, precision="fp32")
    examples = read_export_examples(bundle, (), max_examples)
    reference = score_examples_with_pytorch(bundle, [example for example in examples if not example.is_for_int8])
    int8_images = [decode_image(example.image, None) for example in examples if example.is_for_int8]
    comparisons = []
    with tempfile.TemporaryDirectory() as folder:
        for to, precision, folder_of_format in write_all_formats(uri, Path(folder), int8_images):
            num_bytes = sum(path.stat().st_size for path in folder_of_format.iterdir())
            comparison = check_export(open_exported_model(folder_of_format, to, torch.get_num_threads()), reference)
            comparisons.append(
                {
                    "category": bundle.category,
                    "to": to,
                    "precision": precision,
                    "num_bytes": num_bytes,
                    "image_px": sorted({pixels.shape[:2] for pixels in reference.pixels})[:3],
                    "refused": find_check_failures(comparison, TOLERANCE[precision]),
                    **comparison,
                }
            )
            print(comparisons[-1], flush=True)
    return comparisons


def format_row(comparison: dict[str, Any]) -> list[Any]:
    return [
        *(comparison[key] for key in ("category", "to", "precision")),
        *(f"{comparison[key]:.1g}" for key in ("score_difference", "score_difference_median", "map_difference")),
        f"{comparison['verdict_changes']} of {comparison['num_images']}",
        *(comparison[key] for key in ("auroc_torch", "auroc_export")),
        f"{comparison['num_bytes'] / 1e6:.0f}",
        *(f"{comparison[key]:.0f}" for key in ("ms_torch", "ms_export")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, several=True, required=False)
    parser.add_argument("--bundles", nargs="+", help="in place of --data: bundles whose data sets can be read")
    parser.add_argument("--images", type=int, default=200, help="test images a category, at most, good and bad alike")
    arguments = parser.parse_args()
    if not (arguments.bundles or arguments.data):
        parser.error("give --bundles or --data")
    samples: list[dict[str, Any]] = []
    for uri in arguments.bundles or train_bundles(arguments):
        samples += compare_exports(uri, arguments.images)
        save_json("exports", arguments, samples)  # after each: they take minutes
    print_table(HEADER, [format_row(one) for one in samples])


if __name__ == "__main__":
    main()
