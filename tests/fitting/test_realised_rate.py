"""The share of new good images above the threshold, over many draws, against what was asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.config import parse_config
from focus_ray.data.shards import MemoryShard
from focus_ray.fitting.fit import fit
from focus_ray.model.network import build_net

CPU = torch.device("cpu")
TARGET, DRAWS, FIT, HELD, NEW = 0.1, 20, 64, 19, 40


def good_images(count: int, generator: torch.Generator) -> Tensor:
    """uint8 (count, 32, 32, 3), soft noise: each as much like any other."""
    noise = F.avg_pool2d(torch.rand(count, 3, 36, 36, generator=generator), 5, stride=1)
    return (255 * (noise - 0.5).mul(3).add(0.5).clamp(0, 1)).byte().permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("coreset", [0, 64])
@pytest.mark.parametrize("kind", ["nearest", "gaussian"])
@pytest.mark.parametrize("method", ["split", "cross"])
def test_new_good_images_are_called_defective_as_often_as_was_asked(method: str, kind: str, coreset: int) -> None:
    if kind == "gaussian" and coreset:
        pytest.skip("a Gaussian has no coreset")
    config = parse_config(
        {
            "data": {"uri": "unused"},
            "model": {"weights": "random", "image_size_px": 32, "image_alignment": {"group": "none"}},
            # a memory of far fewer images than there are: what is calibrated has to be what ships
            "density": {
                "kind": kind,
                "reduction": "semi_orthogonal",
                "num_channels": 8,
                "max_images": 8,
                "coreset": coreset,
                "keep_moments": False,
            },
            "scoring": {"image_score": "maximum"},
            "calibration": {"method": method, "target_fpr": TARGET},
        }
    )
    torch.manual_seed(0)
    net = build_net(config.model)
    generator = torch.Generator().manual_seed(1)
    above = 0
    for _ in range(DRAWS):
        images, held = good_images(FIT, generator), good_images(HELD, generator)
        folds = torch.arange(FIT) % config.calibration.num_folds
        found = fit(config, MemoryShard(images, held, folds), FIT, CPU, net=net)
        scores = found.detector(good_images(NEW, generator)).score
        above += int(found.calibration.is_anomalous(scores.numpy()).sum())
    rate = above / (DRAWS * NEW)
    # of a threshold from 19 scores, the rate over draws spreads by about 0.07 a draw; cross has 64, and is cautious
    assert rate <= TARGET + 3 * 0.07 / DRAWS**0.5, rate
    assert rate >= 0.25 * TARGET, rate
