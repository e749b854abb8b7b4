"""Tests of an interval of the training: its figures, and that a loss or weight that is not finite stops every worker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from places import free_port
from torch import Tensor, nn
from worker_processes import run_workers

from focus_ray.features.network import build_network, convert_to_float_images
from focus_ray.features.settings import ModelConfig
from focus_ray.fyd.batch_schedule import BatchSchedule, split_into_intervals
from focus_ray.fyd.objective import LAST_LEVEL
from focus_ray.fyd.settings import TrainConfig
from focus_ray.fyd.training import (
    FydTraining,
    build_learning_rate_schedule,
    format_collapse_warning,
    recompute_running_statistics,
    train_interval,
)

CPU = torch.device("cpu")


class Slope(nn.Module):
    """A model with one weight; its loss is the weight times `factor`."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(())), factor

    def forward(self, images: Tensor, pairs: Tensor, first: int) -> dict[str, Tensor]:
        return {"loss": self.weight * self.factor, LAST_LEVEL: torch.randn(4, 3, 2, 2) * self.factor}


def run(slope: Slope, steps: int = 2, **settings: float) -> dict[str, float]:
    config = TrainConfig(steps=steps, **settings)
    optimizer = torch.optim.SGD(slope.parameters(), lr=config.learning_rate)
    schedule = build_learning_rate_schedule(optimizer, config)
    batches = [torch.zeros(4, 8, 8, 3, dtype=torch.uint8)] * steps
    plan = BatchSchedule((4 * steps,), 4, seed=0)
    return train_interval(slope, batches, 0, plan, optimizer, schedule, CPU, torch.Generator())


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises(factor: float) -> None:
    with pytest.raises(FloatingPointError, match=r"(nan|inf) after step 2.*train\.learning_rate"):
        run(Slope(factor))


def test_weights_that_are_not_finite_after_the_last_step_raise() -> None:
    slope = Slope(3e38)
    with pytest.raises(FloatingPointError, match=r"weights .* after step 1"):
        run(slope, steps=1, learning_rate=10.0)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_training_uses_bfloat16_only_on_gpus_that_do_not_emulate_it(
    has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a T4 or V100 supports bfloat16 only by emulation
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or has_bfloat16
    )
    training = FydTraining(build_network(ModelConfig(weights="random")), CPU, TrainConfig(steps=1))
    training.device = torch.device("cuda")
    training.build_optimizer_and_schedule(BatchSchedule(num_images=(2,), batch_size=2, seed=0))
    assert training.autocast == has_bfloat16


def test_the_effective_rank_is_computed_once_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    monkeypatch.setattr(
        "focus_ray.fyd.training.compute_effective_rank", lambda level: levels.append(level) or torch.tensor(2.0)
    )
    assert run(Slope(), steps=5)["effective_rank"] == 2.0
    assert len(levels) == 1


def test_the_reported_learning_rate_is_the_rate_of_the_last_step() -> None:
    assert run(Slope(), steps=1, learning_rate=0.25)["learning_rate"] == 0.25
    half_way_down_the_cosine = run(Slope(), steps=2, learning_rate=0.25)["learning_rate"]
    assert half_way_down_the_cosine == pytest.approx(0.125)


def test_features_that_are_nearly_equal_give_a_warning() -> None:
    assert format_collapse_warning({"feature_std": 0.9, "effective_rank": 20.0}) is None
    assert "0.01" in str(format_collapse_warning({"feature_std": 0.01, "effective_rank": 1.0}))


def _as_worker(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        run(Slope(float("nan") if rank else 1.0))
        outcome = "no error"
    except Exception as error:
        outcome = type(error).__name__
    Path(folder, str(rank)).write_text(outcome)
    dist.barrier()
    dist.destroy_process_group()


def test_a_loss_that_is_not_finite_on_one_worker_raises_on_every_worker(tmp_path: Path) -> None:
    run_workers(_as_worker, (free_port(), str(tmp_path)), 2)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["FloatingPointError"] * 2


def test_a_training_writes_after_every_tenth_of_its_steps_but_at_least_every_50_steps() -> None:
    lengths = {steps: [len(interval) for interval in split_into_intervals(steps)] for steps in (0, 3, 25, 1000)}
    assert lengths == {0: [], 3: [1, 1, 1], 25: [3] * 8 + [1], 1000: [50] * 20}
    assert list(split_into_intervals(25, 21)) == [range(21, 24), range(24, 25)]


def test_running_statistics_after_the_training_are_those_of_the_batches() -> None:
    torch.manual_seed(0)
    config = ModelConfig(weights="random", image_size_px=64, batch_norm="train")
    net = build_network(config)
    batches = [torch.randint(0, 255, (6, 64, 64, 3), dtype=torch.uint8) for _ in range(3)]
    recompute_running_statistics(net, batches, CPU)
    norm = next(module for module in net.backbone.modules() if isinstance(module, nn.BatchNorm2d))
    outputs = []
    convolution = next(module for module in net.backbone.modules() if isinstance(module, nn.Conv2d))
    convolution.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    for batch in batches:
        net(convert_to_float_images(batch, CPU))
    means = torch.stack([output.mean(dim=(0, 2, 3)) for output in outputs])
    torch.testing.assert_close(norm.running_mean, means.mean(dim=0), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1


def test_frozen_batch_norms_keep_their_statistics() -> None:
    net = build_network(ModelConfig(weights="random", image_size_px=64))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    recompute_running_statistics(net, iter(()), CPU)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
