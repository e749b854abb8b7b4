"""The training objective of FYD, its optimiser and schedule, and the loop over one epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from focus_ray.detect.detector import to_images
from focus_ray.distributed import world_size
from focus_ray.features.network import FocusNet, inside_mask
from focus_ray.fyd.losses import coarse_loss, draw_pairs, effective_rank, feature_std, fine_loss
from focus_ray.fyd.settings import TrainConfig

LAST_LEVEL = "last level"  # key of the features (B, C, H, W) whose effective rank is computed once an epoch
MOMENTUM = 0.9  # of SGD [kin]
# Projector and predictor start at random and are dropped after training, so they learn at SimSiam's rate [kin], while the
# backbone is only fine-tuned [ours]. The feature aligners start at zero and would not move at the backbone's rate [ours].
LEARNING_RATE_HEAD = 0.05
LEARNING_RATE_FEATURE_ALIGNERS = 0.05
LEARNING_RATE_IMAGE_ALIGNER = 0.01  # [kin]
COLLAPSE_STD = 0.05  # smallest `feature_std` of a healthy run: below it, features of different images are nearly equal


class TrainingObjective(nn.Module):
    """Computes the total loss of FYD in one module, because DDP needs a single `forward`.

    It also freezes the parameters that no loss reaches.
    """

    def __init__(self, net: FocusNet, config: TrainConfig) -> None:
        super().__init__()
        self.net, self.config = net, config
        self.coarse = config.lambda_ica > 0 and has_trainable_aligner(net)
        self.fine = config.lambda_fine > 0
        if (
            not self.fine
        ):  # DDP expects a gradient for every parameter that requires one, so freeze those that no loss reaches
            for name, parameter in net.named_parameters():
                if not name.startswith("image_aligner."):
                    parameter.requires_grad_(False)
        if not self.coarse and not self.fine and net.image_aligner is not None:
            net.image_aligner.requires_grad_(False)

    def forward(self, images: Tensor, pairs: Tensor) -> dict[str, Tensor]:
        """Computes the losses of a batch.

        Args:
            images: (B, 3, H, W) in 0..1.
            pairs: (B,), number of the partner of each image.

        Returns: scalars 'loss' (the weighted sum) and its parts by name; with the fine loss, also the features `LAST_LEVEL`.
        """
        aligned = self.net(images)
        parts: dict[str, Tensor] = {}
        total = images.new_zeros(())
        if self.coarse:
            mask = inside_mask(aligned.theta_image, aligned.image)
            parts["loss_ica"] = coarse_loss(aligned.image, pairs, mask)
            total = total + self.config.lambda_ica * parts["loss_ica"]
        if self.fine:
            projected, predicted = self.net.project(aligned)
            parts["loss_fine"] = fine_loss(predicted.float(), projected.float(), pairs)
            total = total + self.config.lambda_fine * parts["loss_fine"]
            parts["feature_std"] = feature_std(projected)
            parts[LAST_LEVEL] = aligned.levels[2].detach()
        return {"loss": total, **parts}


def has_trainable_aligner(net: FocusNet) -> bool:
    """Returns whether the image aligner has parameters that gradient descent can change."""
    return net.image_aligner is not None and any(p.requires_grad for p in net.image_aligner.parameters())


def build_optimizer(net: FocusNet, config: TrainConfig) -> torch.optim.SGD:
    """Builds SGD with separate learning rates for image aligner, feature aligners, head (projector, predictor) and backbone."""
    rates = {
        "image_aligner": LEARNING_RATE_IMAGE_ALIGNER,
        "feature_aligners": LEARNING_RATE_FEATURE_ALIGNERS,
        "projector": LEARNING_RATE_HEAD,
        "predictor": LEARNING_RATE_HEAD,
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(rates.get(name.partition(".")[0], config.learning_rate), []).append(parameter)
    # the group of the backbone first, because logs show the rate of the first group
    order = sorted(groups, key=lambda rate: rate != config.learning_rate)
    return torch.optim.SGD(
        [{"params": groups[rate], "lr": rate} for rate in order],
        momentum=MOMENTUM,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Builds a cosine schedule to zero over all steps. Step it after every optimiser step."""
    total = max(1, config.epochs * steps_per_epoch)

    def factor(step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_epoch(
    objective: Callable[[Tensor, Tensor], dict[str, Tensor]],
    batches: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    config: TrainConfig,
    device: torch.device,
    generator: torch.Generator,
    autocast: bool = False,
) -> dict[str, float]:
    """Trains for one epoch.

    Args:
        batches: uint8 (B, H, W, 3), or float (B, 3, H, W) in 0..1.
        generator: draws the pairs of images.
        autocast: compute the losses in bfloat16 where torch allows it.

    Returns: the means of losses and collapse figures over all steps and workers, 'steps', and 'learning_rate' of the last step.
        'effective_rank' is computed from the last step only, because it needs an eigen-decomposition.

    Raises:
        ValueError: there is no batch.
        FloatingPointError: on every worker, if the loss, or a weight after the last step, is not finite on any worker.
    """
    sums: dict[str, Tensor] = {}
    steps, rate = 0, 0.0
    level: Tensor | None = None
    for batch in batches:
        images = to_images(batch, device)
        pairs = draw_pairs(images.shape[0], generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            parts = objective(images, pairs)
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
        raise ValueError(
            "an epoch needs at least 1 batch, got 0: add training images or lower train.batch_size_per_worker"
        )
    keys = sorted(sums)
    means = _mean_over_workers(torch.stack([sums[key] for key in keys]) / steps)
    result = dict(zip(keys, means.tolist(), strict=True))
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    broken = _mean_over_workers(torch.stack([~p.detach().isfinite().all() for p in weights]).any().float())
    if not math.isfinite(result["loss"]) or float(broken) > 0:
        problem = f"the loss is {result['loss']}" if not math.isfinite(result["loss"]) else "weights are not finite"
        raise FloatingPointError(f"{problem} after {steps} steps: lower train.learning_rate")
    if level is not None:
        result["effective_rank"] = float(_mean_over_workers(effective_rank(level)))
    return {**result, "steps": float(steps), "learning_rate": rate}


def _mean_over_workers(figures: Tensor) -> Tensor:
    """Averages a tensor over all workers; a group may change the input in place."""
    if world_size() > 1:
        dist.all_reduce(figures)
        figures = figures / world_size()
    return figures


def has_collapsed(log: dict[str, float]) -> bool:
    """Returns whether the figures of an epoch show a collapse: features of different images are nearly equal."""
    return "feature_std" in log and log["feature_std"] < COLLAPSE_STD
