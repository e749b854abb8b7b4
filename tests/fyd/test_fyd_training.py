"""Tests of a training epoch: its figures, and that a loss or weight that is not finite stops every worker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from places import free_port
from torch import Tensor, nn
from worker_processes import run_workers

from focus_ray.features.network import build_network
from focus_ray.features.settings import ModelConfig
from focus_ray.fyd.objective import LAST_LEVEL
from focus_ray.fyd.settings import TrainConfig
from focus_ray.fyd.training import FydTraining, build_learning_rate_schedule, format_collapse_warning, train_epoch

CPU = torch.device("cpu")


class Slope(nn.Module):
    """A model with one weight; its loss is the weight times `factor`."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.ones(())), factor

    def forward(self, images: Tensor, pairs: Tensor) -> dict[str, Tensor]:
        return {"loss": self.weight * self.factor, LAST_LEVEL: torch.randn(4, 3, 2, 2) * self.factor}


def run(slope: Slope, steps: int = 2, **settings: float) -> dict[str, float]:
    config = TrainConfig(epochs=1, **settings)
    optimizer = torch.optim.SGD(slope.parameters(), lr=config.learning_rate)
    schedule = build_learning_rate_schedule(optimizer, config, steps)
    batches = [torch.zeros(2, 8, 8, 3, dtype=torch.uint8)] * steps
    return train_epoch(slope, batches, optimizer, schedule, config, CPU, torch.Generator())


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_raises(factor: float) -> None:
    with pytest.raises(FloatingPointError, match=r"(nan|inf) after 2 steps.*train\.learning_rate"):
        run(Slope(factor))


def test_weights_that_are_not_finite_after_the_last_step_raise() -> None:
    slope = Slope(3e38)
    with pytest.raises(FloatingPointError, match=r"weights .* after 1 steps"):
        run(slope, steps=1, learning_rate=10.0)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_training_uses_bfloat16_only_on_gpus_that_do_not_emulate_it(
    has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a T4 or V100 supports bfloat16 only by emulation
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or has_bfloat16
    )
    training = FydTraining(build_network(ModelConfig(weights="random")), CPU, TrainConfig(epochs=1))
    training.device = torch.device("cuda")
    training.build_optimizer_and_schedule(steps_per_epoch=1)
    assert training.autocast == has_bfloat16


def test_the_effective_rank_is_computed_once_per_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
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
