"""What of a good image can be seen in a bundle: pixels whose embedding comes near one that the bundle's memory keeps.

    python -m benchmarks.readable BUNDLE OUT.png [--image 0] [--steps 300]

Nothing but the bundle is used: gradient descent on the pixels, from grey, with a penalty on the difference of neighbouring ones.
Of images that are aligned the picture is in the aligned frame. OUT.png is what came out, to be looked at.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from focus_ray.bundle.bundle import read_bundle, read_statistics
from focus_ray.data.images import encode_png

SMOOTHNESS = 0.5  # of the mean difference of neighbouring pixels, in 0..1


def read_stored_embedding(place: str, number: int) -> Tensor:
    """(1, C, H, W), what the memory keeps of an image."""
    statistics = read_statistics(place)
    assert statistics.bank is not None, f"{place}: keeps no embeddings"
    height, width = statistics.moments.height, statistics.moments.width
    return statistics.bank[number].float().t().unflatten(1, (height, width))[None]


def reconstruct_pixels(place: str, number: int, steps: int) -> Tensor:
    """(1, 3, S, S) in 0..1."""
    detector = read_bundle(place).detector
    detector.net.requires_grad_(False)
    kept = read_stored_embedding(place, number)
    scale = kept.std(dim=(0, 2, 3), keepdim=True)
    size = detector.net.config.image_size_px
    pixels = (0.5 + 0.01 * torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))).requires_grad_()
    optimizer = torch.optim.Adam([pixels], 0.03)
    for step in range(steps):
        found = detector.reduction(detector.net.compute_features(pixels)[0])
        apart = ((found - kept) / scale).square().mean()
        rough = pixels.diff(dim=2).abs().mean() + pixels.diff(dim=3).abs().mean()
        optimizer.zero_grad()
        (apart + SMOOTHNESS * rough).backward()
        optimizer.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
        if step % 50 == 0 or step + 1 == steps:
            print(
                f"step {step + 1}: mean square of what is left, in the embeddings' own variance: {apart.item():.3f}",
                flush=True,
            )
    return pixels.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("output")
    parser.add_argument("--image", type=int, default=0, help="its number in the memory (default: 0)")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    pixels = reconstruct_pixels(arguments.bundle, arguments.image, arguments.steps)
    Path(arguments.output).write_bytes(encode_png((pixels[0].permute(1, 2, 0) * 255).round().byte().numpy()))


if __name__ == "__main__":
    main()
