"""Module for the FYD training of a network: optimiser, schedule, and the loop over the steps of an interval.

"Collapse" means that features of different locations become nearly equal. A worker is a process of a torch.distributed group.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from focus_ray.density.tiles import TileGrid
from focus_ray.distributed import get_rank, get_world_size, join_batch
from focus_ray.errors import DataError
from focus_ray.features.alignment.transformer import SpatialTransformer
from focus_ray.features.network import FocusNet, convert_to_float_images
from focus_ray.fyd.batch_schedule import BatchSchedule, split_into_intervals
from focus_ray.fyd.head import ProjectorPredictorHead
from focus_ray.fyd.losses import compute_effective_rank, draw_image_pairs
from focus_ray.fyd.objective import LAST_LEVEL, TrainingObjective, iterate_all_parameters
from focus_ray.fyd.settings import TrainConfig
from focus_ray.precision import has_native_bfloat16
from focus_ray.seeds import derive_seed

MOMENTUM = 0.9  # of SGD [kin]
# All other parts share one rate [ours]: a head that learns much faster than the backbone absorbs the loss.
LEARNING_RATE_IMAGE_ALIGNER = 0.01  # [kin]
COLLAPSE_STD = (
    0.05  # smallest `feature_std` of a healthy run: below it, features of different locations are nearly equal
)
_MAX_STATISTICS_BATCHES = 50  # enough for the running statistics after the training, also of a large data set


class FydTraining:
    """The training of a network, in one process or on every worker (then with DistributedDataParallel).

    Attributes:
        head: projector and predictor, small networks that only the training uses; a new head has random weights.
    """

    def __init__(self, net: FocusNet, device: torch.device, config: TrainConfig) -> None:
        self.net, self.device, self.config = net, device, config
        self.head = ProjectorPredictorHead(net).to(device).to(memory_format=torch.channels_last)

    def build_optimizer_and_schedule(self, batch_schedule: BatchSchedule) -> None:
        """Builds objective, optimiser and schedule; call it before `get_state_dicts`, `restore_optimizer` and `run_intervals`.

        Parameters of the network that no loss trains are frozen.

        Raises: DataError: no loss trains a parameter.
        """
        objective = TrainingObjective(self.net, self.head, self.config)
        if not any(parameter.requires_grad for parameter in objective.parameters()):
            raise DataError(
                "train.steps is above 0, but no loss trains anything: set train.lambda_fine or lambda_ica above 0"
            )
        self.optimizer = build_optimizer(self.net, self.head, self.config)
        self.schedule = build_learning_rate_schedule(self.optimizer, self.config)
        self.batch_schedule = batch_schedule
        self.objective: nn.Module = objective
        if get_world_size() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            self.objective = nn.parallel.DistributedDataParallel(objective, device_ids=devices)
        self.autocast = self.device.type == "cuda" and has_native_bfloat16(self.device)

    def get_state_dicts(self) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """Returns three state dicts: of network and head together, of the optimiser, and of the schedule."""
        network = {**self.net.state_dict(), **self.head.state_dict()}
        return network, self.optimizer.state_dict(), self.schedule.state_dict()

    def load_network_weights(self, state: dict[str, Tensor]) -> None:
        """Loads the weights of network and head, in place, from the first state dict that `get_state_dicts` returned."""
        names = self.head.state_dict().keys()
        self.head.load_state_dict({name: state[name] for name in names})
        self.net.load_state_dict({name: value for name, value in state.items() if name not in names})

    def restore_optimizer(self, optimizer: dict[str, Any], schedule: dict[str, Any]) -> None:
        """Restores optimiser and schedule from the state dicts that `get_state_dicts` returned."""
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(schedule)

    def run_intervals(self, batches: Iterator[Tensor], first_step: int = 0) -> Iterator[dict[str, float]]:
        """Generator: trains the network for the remaining steps, and yields the metrics of each interval.

        After an interval, the caller may use the network and read the state. At the end, `batches` is at the first batch that
        no step has used.

        Args:
            batches: this worker's share of the global batch of each step, from `first_step` on.
            first_step: number of steps that the training has finished already, the end of an interval or 0.

        Yields: the metrics of `train_interval`, "step" -> number of finished steps, and "seconds" -> duration of the interval.

        Raises: see `train_interval`.
        """
        seed = self.config.seed
        for steps in split_into_intervals(self.config.steps, first_step):
            generator = torch.Generator().manual_seed(
                derive_seed(seed, "interval", steps.start)
            )  # equal on every worker
            start = time.perf_counter()
            self.net.train()
            self.head.train()
            figures = train_interval(
                self.objective,
                itertools.islice(batches, len(steps)),
                steps.start,
                self.batch_schedule,
                self.optimizer,
                self.schedule,
                self.device,
                generator,
                self.autocast,
            )
            yield {"step": float(steps.stop), **figures, "seconds": time.perf_counter() - start}


def cut_one_tile_per_image(batches: Iterable[Tensor], tiles: TileGrid, seed: int, first_step: int) -> Iterator[Tensor]:
    """Generator: cuts one tile out of each image of each batch, and yields the batches of tiles.

    The tile is the same for all images of a batch and on all workers. The next batch uses the next tile, in random order.
    Without tiling, the batches are yielded unchanged.

    Args:
        batches: images (B, H, W, C) of consecutive steps.
        seed: determines the order of the tiles.
        first_step: step of the first batch.
    """
    if tiles.num_tiles == 1:
        yield from batches
        return
    for step, batch in enumerate(batches, start=first_step):
        num_rounds, position = divmod(step, tiles.num_tiles)
        generator = torch.Generator().manual_seed(derive_seed(seed, "tiles", num_rounds))
        order = torch.randperm(tiles.num_tiles, generator=generator).tolist()
        yield tiles.cut_one_tile(batch, order[position])


def format_collapse_warning(figures: dict[str, float]) -> str | None:
    """Returns a warning if the metrics of an interval show a collapse, or None.

    Args: figures: the result of `train_interval`; without 'feature_std' there is no warning.
    """
    if figures.get("feature_std", math.inf) >= COLLAPSE_STD:
        return None
    return (
        f"the features have collapsed (std {figures['feature_std']:.3g} of an even spread, "
        f"effective rank {figures['effective_rank']:.1f}): lower train.learning_rate or train.lambda_fine"
    )


def build_optimizer(net: FocusNet, head: ProjectorPredictorHead, config: TrainConfig) -> torch.optim.SGD:
    """Builds SGD for all trainable parameters. The image aligner has its own learning rate."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in iterate_all_parameters(net, head):
        if parameter.requires_grad:
            rate = LEARNING_RATE_IMAGE_ALIGNER if name.startswith("image_aligner.") else config.learning_rate
            groups.setdefault(rate, []).append(parameter)
    # the group of the backbone first, because logs show the rate of the first group
    order = sorted(groups, key=lambda rate: rate != config.learning_rate)
    return torch.optim.SGD(
        [{"params": groups[rate], "lr": rate} for rate in order],
        momentum=MOMENTUM,
    )


def count_batches_to_read(config: TrainConfig, schedule: BatchSchedule) -> int:
    """Returns the number of global batches of a training: one for each step, and some for `recompute_running_statistics`."""
    return config.steps + min(_MAX_STATISTICS_BATCHES, schedule.count_batches_in_pass())


@torch.no_grad()
def recompute_running_statistics(net: FocusNet, batches: Iterable[Tensor], device: torch.device) -> None:
    """Computes the running statistics of batch norms and spatial transformers again, as means over batches, in place.

    During the training, running statistics mix the statistics of older weights, and after a short training also the initial
    values. Frozen batch norms do not change. A network without running statistics does not read a batch.

    Args: batches: this worker's shares of global batches, as for `train_interval`.
    """
    net.train()
    layers = [
        module
        for module in net.modules()
        if isinstance(module, (nn.BatchNorm2d, SpatialTransformer)) and module.training
    ]
    if not layers:
        net.eval()
        return
    momentums = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    for batch in batches:
        net(convert_to_float_images(batch, device))
    for layer, momentum in zip(layers, momentums, strict=True):
        layer.momentum = momentum
    net.eval()


def build_learning_rate_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig
) -> torch.optim.lr_scheduler.LambdaLR:
    """Builds a learning rate schedule that falls to zero over all steps like a cosine. Step it after every optimiser step."""
    total = max(1, config.steps)

    def compute_rate_factor(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, compute_rate_factor)


def train_interval(
    objective: Callable[[Tensor, Tensor, int], dict[str, Tensor]],
    batches: Iterable[Tensor],
    first_step: int,
    batch_schedule: BatchSchedule,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    device: torch.device,
    generator: torch.Generator,
    autocast: bool = False,
) -> dict[str, float]:
    """Trains the parameters of the optimiser, in place, for the steps of an interval, and returns the metrics of the interval.

    Args:
        objective: computes the losses from images and pairs, see `TrainingObjective.forward`.
        batches: this worker's share of each global batch, uint8 (B, H, W, 3 or 4), or float (B, 3, H, W) in 0..1.
        first_step: number of the first step, from 0.
        batch_schedule: the global batches of the training.
        generator: draws the pairs of images. It must be in the same state on every worker.
        autocast: compute the losses in bfloat16 where torch allows it.

    Returns: name of a metric -> value. Losses and 'feature_std' are means over all steps. 'effective_rank' is
        computed from the last step only, because it needs an eigen-decomposition; it is missing without the fine loss.
        'learning_rate' is the learning rate of the last step.

    Raises:
        ValueError: there is no batch, or a global batch has fewer than two images.
        FloatingPointError: on every worker, if the loss, or a weight after the last step, is not finite on any worker.
    """
    sums: dict[str, Tensor] = {}
    steps, rate = 0, 0.0
    level: Tensor | None = None
    first, batch_size, rank, num_workers = 0, 0, get_rank(), get_world_size()
    for batch in batches:
        first = batch_schedule.get_share(first_step + steps, rank, num_workers).start
        batch_size = batch_schedule.get_batch_size(first_step + steps)
        images = convert_to_float_images(batch, device)
        pairs = draw_image_pairs(batch_size, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            parts = objective(images, pairs, first)
        level = parts.pop(LAST_LEVEL, None)
        loss = parts["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate = float(schedule.get_last_lr()[0])
        schedule.step()
        for key, value in parts.items():
            sums[key] = sums.get(key, value.new_zeros((), dtype=torch.float32)) + value.detach().float()
        steps += 1
    if not steps:
        raise ValueError("an interval needs at least 1 batch, got 0")
    keys = sorted(sums)
    means = _average_over_workers(torch.stack([sums[key] for key in keys]) / steps)
    result = dict(zip(keys, means.tolist(), strict=True))
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    broken = _average_over_workers(torch.stack([~p.detach().isfinite().all() for p in weights]).any().float())
    if not math.isfinite(result["loss"]) or float(broken) > 0:
        problem = f"the loss is {result['loss']}" if not math.isfinite(result["loss"]) else "weights are not finite"
        raise FloatingPointError(f"{problem} after step {first_step + steps}: lower train.learning_rate")
    if level is not None:
        result["effective_rank"] = float(compute_effective_rank(join_batch(level, first, batch_size)))
    return {**result, "learning_rate": rate}


def _average_over_workers(figures: Tensor) -> Tensor:
    """Averages a tensor over all workers. With several workers, the argument is overwritten."""
    if get_world_size() > 1:
        dist.all_reduce(figures)
        figures = figures / get_world_size()
    return figures
