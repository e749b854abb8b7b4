"""Tests of fits with every density and calibration method, with 1 to 200 images, and with several photographs of one part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from focus_ray.fitting.fit import FitResult, fit
from focus_ray.fitting.settings import Config, parse_config
from focus_ray.fitting.shards import MemoryShard

CPU = torch.device("cpu")
NUM_FOLDS = 5


def small_config(**sections: dict[str, Any]) -> Config:
    tree: dict[str, Any] = {
        "data": {"uri": "unused"},
        "model": {"weights": "random", "image_size_px": 32, "image_alignment": {"group": "none"}, "precision": "fp32"},
        "density": {
            "layers": ["layer1"],
            "num_channels": 8,
            "coreset": 16,
            "coreset_channels": 8,
            "keep_moments": False,
            "precision": "fp32",
        },
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return parse_config(tree)


def good_parts(count: int, seed: int = 0) -> Tensor:
    """Makes uint8 (count, 32, 32, 3) of smooth noise: each part differs from all others."""
    noise = F.avg_pool2d(torch.rand(count, 3, 36, 36, generator=torch.Generator().manual_seed(seed)), 5, stride=1)
    return (255 * (noise - 0.5).mul(3).add(0.5).clamp(0, 1)).byte().permute(0, 2, 3, 1).contiguous()


def photograph(parts: Tensor, times: int, seed: int = 0) -> Tensor:
    """Repeats each part several times in a row, with a little noise."""
    noise = 2 * torch.randn(len(parts) * times, *parts.shape[1:], generator=torch.Generator().manual_seed(seed))
    return (parts.repeat_interleave(times, dim=0) + noise).clamp(0, 255).byte()


def fit_shard(config: Config, images: Tensor, holdout: Tensor | None = None, **numbers: Any) -> FitResult:
    folds = torch.arange(len(images)) % NUM_FOLDS
    shard = MemoryShard(images, holdout, folds, **numbers)
    return fit(config, shard, len(images), CPU)


@pytest.mark.parametrize("count", [1, 2, 5, 10, 64, 65, 200])
@pytest.mark.parametrize("method", ["split", "cross", "leave_one_out"])
@pytest.mark.parametrize("kind", ["nearest", "gaussian"])
def test_a_fit_calibrates_or_refuses_too_few_images(kind: str, method: str, count: int) -> None:
    config = small_config(density={"kind": kind}, calibration={"method": method})
    holdout = good_parts(6, seed=2) if method == "split" else None
    min_images = {"split": 2, "cross": 5, "leave_one_out": 3 if kind == "gaussian" else 2}[method]
    if count < min_images:
        with pytest.raises(ValueError, match="at least"):
            fit_shard(config, good_parts(count), holdout)
        return
    calibration = fit_shard(config, good_parts(count), holdout).calibration
    expected = (
        6 if method == "split" else min(count, 128 if kind == "gaussian" and method == "leave_one_out" else count)
    )
    assert calibration.method == method
    assert calibration.num_images == expected
    assert calibration.num_groups is None
    assert np.isfinite(calibration.image_threshold)


@pytest.mark.parametrize("kind", ["nearest", "gaussian"])
@pytest.mark.parametrize("method", ["cross", "leave_one_out"])
def test_two_photographs_of_each_part_calibrate_like_one_photograph_of_each_part(kind: str, method: str) -> None:
    parts = good_parts(20)
    config = small_config(density={"kind": kind}, calibration={"method": method})
    once, twice = fit_shard(config, photograph(parts, 1)), fit_shard(config, photograph(parts, 2))
    assert twice.notes.parts == {"num_images": 40, "num_parts": 20}
    assert twice.calibration.num_groups == 20
    new = photograph(good_parts(40, seed=9), 1, seed=4)
    rates = [
        float(result.calibration.is_anomalous(result.detector(new).score.numpy()).mean()) for result in (once, twice)
    ]
    assert rates[1] <= max(0.15, rates[0] + 0.1), rates


def test_images_of_a_named_group_are_left_out_together_even_if_they_look_different() -> None:
    parts = good_parts(20)
    config = small_config(calibration={"method": "leave_one_out"})
    groups = np.arange(20) // 2
    ungrouped, grouped = fit_shard(config, parts), fit_shard(config, parts, groups=groups)
    assert ungrouped.calibration.num_groups is None
    assert grouped.calibration.num_groups == 10
    assert grouped.calibration.image_scores != ungrouped.calibration.image_scores


def test_held_out_photographs_of_training_parts_do_not_set_the_threshold() -> None:
    photographs = photograph(good_parts(20), 2)
    config = small_config(calibration={"method": "split"})
    same_parts = fit_shard(config, photographs[0::2], photographs[1::2])
    assert same_parts.calibration.method == "leave_one_out"
    assert any("20 of 20 held-out photographs" in warning for warning in same_parts.notes.warnings)
    new_parts = fit_shard(config, photographs[0::2], good_parts(12, seed=7))
    assert new_parts.calibration.method == "split"
    assert new_parts.calibration.num_images == 12


def test_validation_images_calibrate_with_the_projection_of_their_fold() -> None:
    config = small_config(selection={"enabled": True}, calibration={"method": "leave_one_out"}, train={"epochs": 0})
    images = good_parts(24)
    shard = MemoryShard(images[:16], None, torch.arange(16) % NUM_FOLDS, validation=images[16:])
    result = fit(config, shard, 16, CPU)
    assert result.calibration.num_images == 24
    without_validation = fit_shard(small_config(calibration={"method": "leave_one_out"}), images)
    assert result.calibration.image_scores == without_validation.calibration.image_scores
