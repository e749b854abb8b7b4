"""What a plant would cost: GPU-hours, hours and S3 requests, from figures that were measured and assumptions that are named.

    python -m benchmarks.plant.cost [--images 1000] [--decode-per-s 60] ...

A model, not a measurement: docs/operate/scale.md says where each figure comes from.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import print_table


@dataclass(frozen=True)
class CostAssumptions:
    """start_s: a process of the pool, until it takes a category.  fixed_s: of a fit, whatever the number of images.
    inspect_per_s: images that a GPU embeds and scores.  decode_per_s: images that a CPU reads, decodes and resizes.
    cpus: that decode for a GPU.  category_requests: to S3, of a fit beside its images' row groups.  mb: of an image.
    """

    start_s: float
    fixed_s: float
    inspect_per_s: float
    decode_per_s: float
    cpus: int
    category_requests: int
    mb: float

    @property
    def images_per_s(self) -> float:
        """Of a GPU: as fast as it computes, or as its CPUs decode."""
        return min(self.inspect_per_s, self.decode_per_s * self.cpus)

    def read_requests(self, images: int) -> int:
        """Row groups of 16 MiB or 64 images, whichever is more, and two for each part file of 64 MiB."""
        group = max(64, math.floor(16 / self.mb))
        return math.ceil(images / group) + 2 * math.ceil(images * self.mb / 64)


def estimate_fit_cost(assumed: CostAssumptions, gpus: int, categories: int, images: int) -> dict[str, float]:
    """Of `categories` of so many images each, none of which is trained by gradient."""
    busy = min(gpus, categories)
    each = assumed.fixed_s + images / assumed.images_per_s
    hours = (assumed.start_s + math.ceil(categories / busy) * each) / 3600
    requests = categories * (assumed.category_requests + assumed.read_requests(images))
    return {"hours": hours, "gpu_hours": busy * hours, "requests": requests}


def estimate_inspection_cost(assumed: CostAssumptions, gpus: int, images: int) -> dict[str, float]:
    """Of a batch inspection of so many images in all."""
    hours = (assumed.start_s + images / gpus / assumed.images_per_s) / 3600
    return {"hours": hours, "gpu_hours": gpus * hours, "requests": 2 * assumed.read_requests(images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="of a category")
    parser.add_argument("--start-s", type=float, default=25.0)
    parser.add_argument("--fixed-s", type=float, default=6.0)
    parser.add_argument("--inspect-per-s", type=float, default=3000.0)
    parser.add_argument("--decode-per-s", type=float, default=60.0)
    parser.add_argument("--cpus", type=int, default=8)
    parser.add_argument("--category-requests", type=int, default=35)
    parser.add_argument("--mb", type=float, default=0.5)
    given: dict[str, Any] = vars(parser.parse_args())
    images = given.pop("images")
    assumed = CostAssumptions(**given)
    rows = []
    for categories in (1, 10, 100, 300, 1000):
        for gpus in (1, 8, 64, 256):
            fit, inspect = (
                estimate_fit_cost(assumed, gpus, categories, images),
                estimate_inspection_cost(assumed, gpus, categories * images),
            )
            rows.append(
                [categories, gpus, *(round(fit[key], 3) for key in fit), *(round(inspect[key], 3) for key in inspect)]
            )
    print_table(
        ["categories", "GPUs", "fit h", "fit GPU-h", "fit requests", "inspect h", "inspect GPU-h", "inspect requests"],
        rows,
    )


if __name__ == "__main__":
    main()
