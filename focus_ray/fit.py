"""From normal images to everything a bundle holds: train, add up the moments, calibrate. No files, no Ray.

Runs alone or on every worker of an initialised torch.distributed group; each worker brings its own shard of the images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from focus_ray.calibration import Calibration, CalibrationBuilder
from focus_ray.config import Config
from focus_ray.density import Statistics, build_density, sample_positions
from focus_ray.errors import DataError
from focus_ray.gaussian import Moments
from focus_ray.loop import (
    Objective,
    aligner_pass,
    build_optimizer,
    build_schedule,
    calibration_pass,
    collapsed,
    epoch_batches,
    statistics_pass,
    train_epoch,
    world_size,
)
from focus_ray.model import ChannelReduction, FocusNet
from focus_ray.scoring import Detector


class Shard(Protocol):
    """One worker's share of the normal images; batches are uint8 (B, S, S, 3)."""

    def train_batches(self, batch_size: int, steps: int, generator: torch.Generator) -> Iterable[Tensor]:
        """Exactly `steps` shuffled batches of exactly `batch_size` images."""

    def fit_batches(self, fold: int | None = None) -> Iterable[Tensor]:
        """Every image of the share once, or those of one fold of the cross calibration."""

    def holdout_batches(self) -> Iterable[Tensor]:
        """Every held-out image of the share once."""


class MemoryShard:
    """A share that is held decoded in memory.

    Args:
        images: (N, S, S, 3) uint8, for training and density.  folds: (N,) their fold numbers, for cross calibration.
        holdout: (M, S, S, 3) uint8, for calibration.
    """

    def __init__(
        self, images: Tensor, holdout: Tensor | None = None, folds: Tensor | None = None, batch_size: int = 32
    ) -> None:
        self.images, self.batch_size = images, batch_size
        self.holdout = images[:0] if holdout is None else holdout
        self.folds = folds

    def train_batches(self, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
        return epoch_batches(self.images, batch_size, steps, generator)

    def fit_batches(self, fold: int | None = None) -> Iterator[Tensor]:
        images = self.images
        if fold is not None:
            if self.folds is None:
                raise ValueError("cross calibration needs the images' fold numbers")
            images = images[self.folds == fold]
        yield from (batch for batch in images.split(self.batch_size) if len(batch))

    def holdout_batches(self) -> Iterator[Tensor]:
        yield from (batch for batch in self.holdout.split(self.batch_size) if len(batch))


@dataclass
class FitResult:
    """What came out, the same on every worker."""

    net: FocusNet
    reduction: ChannelReduction
    statistics: Statistics
    calibration: Calibration
    alignment: dict[str, Any] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Steps:
    """What every worker agrees on before it starts: batch size and steps, from counts alone."""

    batch_size: int
    steps: int

    @classmethod
    def agree(cls, num_images: int, num_workers: int, batch_size_per_worker: int) -> Steps:
        """Raises: DataError: a worker would have fewer than two images."""
        share = num_images // num_workers
        if share < 2:
            raise DataError(
                f"{num_images} training images over {num_workers} workers leave fewer than 2 for one: "
                "lower cluster.num_workers or add images"
            )
        size = min(batch_size_per_worker, share)
        return cls(size, share // size)


def fit(
    config: Config,
    shard: Shard,
    num_images: int,
    device: torch.device,
    *,
    net: FocusNet | None = None,
    rank: int = 0,
    wrap: Callable[[torch.nn.Module], Any] | None = None,
    state: dict[str, Any] | None = None,
    on_epoch: Callable[[int, dict[str, float], Callable[[], dict[str, Any]]], None] | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> FitResult:
    """Trains, adds up the moments and calibrates.

    Args:
        num_images: training images of all workers together.
        wrap: makes the objective data-parallel (DDP), when there are several workers.
        state: what `on_epoch`'s third argument gave at an earlier epoch, to go on from there.
        on_epoch: called by every worker after every epoch with its number, its figures and a function that gives the
            state to keep.

    Raises: DataError: too few images.  FloatingPointError: the loss is not finite.
    """
    torch.manual_seed(config.train.seed)
    net = FocusNet(config.model) if net is None else net
    net = net.to(device).to(memory_format=torch.channels_last)
    history: list[dict[str, float]] = []
    seconds: dict[str, float] = {}
    warnings: list[str] = []
    offset = num_images * rank // world_size()
    start = time.perf_counter()
    alignment = None
    if state is None:
        chosen = sample_positions(num_images, config.model.image_alignment.max_images)
        alignment = aligner_pass(net, shard.fit_batches(), device, chosen, offset, config.train.seed)
    else:
        net.load_state_dict(state["net"])
        alignment = state["alignment"]
    if alignment is not None:
        turned = "on" if alignment["enabled"] else "off: no gain worth it"
        log(f"image alignment {turned} (pairwise L2 of held-out images falls by {alignment['drop']:.0%})")
    seconds["alignment"] = time.perf_counter() - start
    start = time.perf_counter()
    if config.train.epochs:
        keep_alignment = {"alignment": alignment}
        _train(
            config, net, shard, num_images, device, rank, wrap, state, on_epoch, log, history, warnings, keep_alignment
        )
    seconds["train"] = time.perf_counter() - start
    net.eval()
    reduction = ChannelReduction(net.backbone.spec.channels, config.density, config.train.seed).to(device)
    start = time.perf_counter()
    bank = sample_positions(num_images, config.density.max_images) if config.density.kind == "nearest" else None
    cross = config.calibration.method == "cross"
    if cross:
        folds = [
            statistics_pass(net, reduction, shard.fit_batches(fold), device, None if bank is None else _Everything())
            for fold in range(config.calibration.num_folds)
        ]
        folds = [part for part in folds if part.moments.count]
        statistics = _join_all(folds)
    else:
        statistics = statistics_pass(net, reduction, shard.fit_batches(), device, bank, offset)
    seconds["statistics"] = time.perf_counter() - start
    start = time.perf_counter()
    if cross:
        builder = _cross_calibrate(config, net, reduction, shard, folds, device)
    else:
        detector = build_detector(config, net, reduction, statistics)
        builder = calibration_pass(detector, shard.holdout_batches(), config.calibration, device)
    seconds["calibration"] = time.perf_counter() - start
    return FitResult(net, reduction, statistics, builder.finish(), alignment, history, seconds, warnings)


def build_detector(config: Config, net: FocusNet, reduction: ChannelReduction, statistics: Statistics) -> Detector:
    """A detector of the density that the statistics give."""
    return Detector(net, reduction, build_density(config.density, statistics), config.scoring)


def _train(
    config: Config,
    net: FocusNet,
    shard: Shard,
    num_images: int,
    device: torch.device,
    rank: int,
    wrap: Callable[[torch.nn.Module], Any] | None,
    state: dict[str, Any] | None,
    on_epoch: Callable[[int, dict[str, float], Callable[[], dict[str, Any]]], None] | None,
    log: Callable[[str], None],
    history: list[dict[str, float]],
    warnings: list[str],
    keep: dict[str, Any],
) -> None:
    train = config.train
    steps = Steps.agree(num_images, world_size(), train.batch_size_per_worker)
    objective = Objective(net, train)
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise DataError(
            "train.epochs is above 0, but no loss trains anything: set train.lambda_fine or lambda_ica above 0"
        )
    optimizer = build_optimizer(net, train)
    schedule = build_schedule(optimizer, train, steps.steps)
    first = 0
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = int(state["epoch"]) + 1
        history.extend(state["history"])
    parallel = objective if wrap is None else wrap(objective)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    autocast = train.precision == "bf16" or (train.precision == "auto" and bf16)
    for epoch in range(first, train.epochs):
        net.train()
        generator = torch.Generator().manual_seed((train.seed * 1_000_003 + epoch) * 4099 + rank)
        start = time.perf_counter()
        batches = shard.train_batches(steps.batch_size, steps.steps, generator)
        figures = train_epoch(parallel, batches, optimizer, schedule, train, device, generator, autocast)
        figures = {"epoch": float(epoch), **figures, "seconds": time.perf_counter() - start}
        history.append(figures)
        log(f"epoch {epoch + 1}/{train.epochs}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
        if collapsed(figures):
            message = (
                f"epoch {epoch + 1}: the features have collapsed (std {figures['feature_std']:.3g} of an even spread, "
                f"effective rank {figures['effective_rank']:.1f}): lower train.learning_rate or train.lambda_fine"
            )
            warnings.append(message)
            log(f"WARNING: {message}")
        if on_epoch is not None:

            def snapshot(epoch: int = epoch) -> dict[str, Any]:
                return {
                    "net": net.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "epoch": epoch,
                    "history": list(history),
                    **keep,
                }

            on_epoch(epoch, figures, snapshot)


def _cross_calibrate(
    config: Config,
    net: FocusNet,
    reduction: ChannelReduction,
    shard: Shard,
    folds: list[Statistics],
    device: torch.device,
) -> CalibrationBuilder:
    """Every training image is scored by the density of the other folds."""
    joined: CalibrationBuilder | None = None
    for fold in range(config.calibration.num_folds):
        others = [part for number, part in enumerate(folds) if number != fold]
        detector = build_detector(config, net, reduction, _join_all(others))
        builder = calibration_pass(detector, shard.fit_batches(fold), config.calibration, device)
        joined = builder if joined is None else joined.merge(builder)
    assert joined is not None
    return joined


class _Everything:
    """Contains every number."""

    def __contains__(self, number: object) -> bool:
        return True


def _join_all(parts: list[Statistics]) -> Statistics:
    """The statistics of all parts together; the parts stay as they are."""
    first = parts[0].moments
    total = Statistics(
        Moments(first.height, first.width, first.channels, first.mean.device),
        None if parts[0].bank is None else parts[0].bank[:0],
    )
    for part in parts:
        total.join(part)
    return total
