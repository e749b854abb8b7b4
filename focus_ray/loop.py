"""One training epoch, one moments pass and one calibration pass over any iterable of batches.

Works alone or inside an initialised torch.distributed group, where sums and statistics run over all workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from focus_ray.calibration import CalibrationBuilder
from focus_ray.config import CalibrationConfig, TrainConfig
from focus_ray.congealing import CongealingAligner
from focus_ray.density import Statistics
from focus_ray.gaussian import Moments
from focus_ray.losses import coarse_loss, effective_rank, feature_std, fine_loss, random_pairs
from focus_ray.model import ChannelReduction, FocusNet, inside_mask
from focus_ray.nearest import keep
from focus_ray.scoring import Detector, Scored, embed, to_images
from focus_ray.selection import validation_figures

COLLAPSE_STD = 0.05  # of the L2-normalised features, relative to an even spread: below this a run has collapsed


class Objective(nn.Module):
    """FYD's total loss as one module, so that DDP sees a single forward."""

    def __init__(self, net: FocusNet, config: TrainConfig) -> None:
        super().__init__()
        self.net, self.config = net, config
        self.coarse = config.lambda_ica > 0 and has_trainable_aligner(net)
        self.fine = config.lambda_fine > 0
        if not self.fine:  # what no loss reaches must not wait for a gradient
            for name, parameter in net.named_parameters():
                if not name.startswith("image_aligner."):
                    parameter.requires_grad_(False)
        if not self.coarse and not self.fine and net.image_aligner is not None:
            net.image_aligner.requires_grad_(False)

    def forward(self, images: Tensor, pairs: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) in 0..1, pairs (B,) -> 'loss' and its parts, scalars."""
        aligned = self.net(images)
        parts: dict[str, Tensor] = {}
        total = images.new_zeros(())
        if self.coarse:
            mask = inside_mask(aligned.theta_image, aligned.image)
            parts["loss_ica"] = coarse_loss(aligned.image, pairs, mask)
            total = total + self.config.lambda_ica * parts["loss_ica"]
        if self.fine:
            projected, predicted = self.net.project(aligned)
            parts["loss_fine"] = fine_loss(
                predicted.float(), projected.float(), pairs, self.config.stop_gradient, self.config.symmetric
            )
            total = total + self.config.lambda_fine * parts["loss_fine"]
            parts["feature_std"] = feature_std(projected)
            parts["effective_rank"] = effective_rank(aligned.levels[2])
        return {"loss": total, **parts}


def has_trainable_aligner(net: FocusNet) -> bool:
    """Whether gradient descent has anything to move in the image aligner."""
    return net.image_aligner is not None and any(p.requires_grad for p in net.image_aligner.parameters())


def build_optimizer(net: FocusNet, config: TrainConfig) -> torch.optim.SGD:
    """SGD; the image aligner, the head (projector and predictor) and the rest each have their own learning rate."""
    rates = {
        "image_aligner": config.learning_rate_image_alignment,
        "projector": config.learning_rate_head,
        "predictor": config.learning_rate_head,
    }
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(rates.get(name.partition(".")[0], config.learning_rate), []).append(parameter)
    # the backbone's group first: its rate is the one that is logged
    order = sorted(groups, key=lambda rate: rate != config.learning_rate)
    return torch.optim.SGD(
        [{"params": groups[rate], "lr": rate} for rate in order],
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Cosine to zero over all steps, after a linear warm-up; stepped after every optimiser step."""
    total = max(1, config.epochs * steps_per_epoch)
    warmup = int(config.warmup_epochs * steps_per_epoch)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))

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
    """One pass. Batches: uint8 (B, H, W, 3), or (B, 3, H, W) in 0..1.

    Returns: the means of the losses and collapse figures over all steps and workers, with 'steps' and 'learning_rate'.

    Raises: FloatingPointError: the loss is not finite.
    """
    sums: dict[str, Tensor] = {}
    steps = 0
    for batch in batches:
        images = to_images(batch, device)
        pairs = random_pairs(images.shape[0], generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            parts = objective(images, pairs)
        loss = parts["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if config.gradient_clip_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, config.gradient_clip_norm)
        optimizer.step()
        schedule.step()
        for key, value in parts.items():
            sums[key] = sums.get(key, value.new_zeros((), dtype=torch.float32)) + value.detach().float()
        steps += 1
    if not steps:
        raise ValueError("no batch came: the data set is smaller than one step")
    keys = sorted(sums)
    means = torch.stack([sums[key] for key in keys]) / steps
    if world_size() > 1:
        dist.all_reduce(means)
        means /= world_size()
    result = dict(zip(keys, means.tolist(), strict=True))
    if not math.isfinite(result["loss"]):
        raise FloatingPointError(
            f"the loss is {result['loss']} after {steps} steps: lower train.learning_rate or set train.gradient_clip_norm"
        )
    return {**result, "steps": float(steps), "learning_rate": float(schedule.get_last_lr()[0])}


@torch.no_grad()  # not inference_mode: statistics are joined in place later
def statistics_pass(
    net: FocusNet,
    reduction: ChannelReduction,
    batches: Iterable[Tensor],
    device: torch.device,
    keep_positions: Container[int] | None = None,
    offset: int = 0,
) -> Statistics:
    """Statistics of every image that any worker is given, the same on every worker after the call.

    Embeddings are added up batch by batch; only those of the chosen images are kept, for a memory.

    Args:
        keep_positions: numbers, over all workers, of the images whose embeddings are kept; None keeps none.
        offset: the number of this worker's first image.
    """
    net.eval()
    embeddings = (embed(net, reduction, to_images(batch, device))[0] for batch in batches)
    size = net.config.image_size_px // reduction.config.map_stride_px
    return embedding_statistics(embeddings, size, reduction.num_channels, device, keep_positions, offset)


@torch.no_grad()
def embedding_statistics(
    embeddings: Iterable[Tensor],
    size: int,
    num_channels: int,
    device: torch.device,
    keep_positions: Container[int] | None = None,
    offset: int = 0,
) -> Statistics:
    """As `statistics_pass`, of embeddings (B, num_channels, size, size) that are there already."""
    moments = Moments(size, size, num_channels, device)
    kept: list[Tensor] = []
    position = offset
    for embedding in embeddings:
        moments.update(embedding)
        if keep_positions is not None:
            chosen = [number for number in range(len(embedding)) if position + number in keep_positions]
            if chosen:
                kept.append(keep(embedding[chosen]))
        position += len(embedding)
    reduce_moments(moments)
    if keep_positions is None:
        return Statistics(moments)
    bank = torch.cat(kept) if kept else torch.empty(0, size * size, num_channels, dtype=torch.float16)
    return Statistics(moments, gather_rows(bank, device))


@torch.no_grad()
def gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """(n, ...) of every worker -> all of them, in the order of the workers, on the CPU of each."""
    if world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=device)
    counts = [torch.zeros_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    longest = int(max(int(c) for c in counts))
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded, device=device) for _ in counts]
    dist.all_gather(parts, padded.to(device))
    return torch.cat([part[: int(c)].cpu() for part, c in zip(parts, counts, strict=True)])


@torch.inference_mode()
def aligner_pass(
    net: FocusNet, batches: Iterable[Tensor], device: torch.device, positions: Container[int], offset: int, seed: int
) -> dict[str, Any] | None:
    """Fits a congealing aligner on the chosen images of all workers, the same on every worker; None without one.

    Args:
        positions, offset: as `statistics_pass`'s keep_positions and offset.
    """
    aligner = net.image_aligner
    if not isinstance(aligner, CongealingAligner):
        return None
    size = aligner.FINE_PX
    prepared: list[Tensor] = []
    position = offset
    for batch in batches:
        chosen = [number for number in range(len(batch)) if position + number in positions]
        if chosen:
            prepared.append(aligner.prepare(to_images(batch[chosen], device)).cpu())
        position += len(batch)
    rows = gather_rows(torch.cat(prepared) if prepared else torch.empty(0, size, size), device)
    return aligner.fit(rows.to(device), seed)


@torch.no_grad()
def reduce_moments(moments: Moments) -> None:
    """Joins the moments of all workers, in place: the exact pooled mean and scatter."""
    if world_size() == 1:
        return
    count = torch.tensor([moments.count], dtype=torch.float64, device=moments.mean.device)
    total_sum = moments.mean.double() * moments.count
    dist.all_reduce(count)
    dist.all_reduce(total_sum)
    mean = (total_sum / count).to(moments.mean.dtype)
    difference = moments.mean - mean
    moments.scatter.baddbmm_(difference[:, :, None], difference[:, None, :], alpha=float(moments.count))
    dist.all_reduce(moments.scatter)
    moments.mean = mean
    moments.count = int(count.item())


@torch.inference_mode()
def calibration_pass(
    detector: Detector, batches: Iterable[Tensor], config: CalibrationConfig, device: torch.device
) -> CalibrationBuilder:
    """Scores normal images that the detector's density has not seen; the workers' results are joined."""
    builder = CalibrationBuilder(config.method, config.target_fpr, config.target_pixel_fpr)
    for batch in batches:
        scored = detector(to_images(batch, device))
        builder.add(scored.score.cpu().numpy(), scored.anomaly_map.cpu().numpy())
    first, *others = gather_objects(builder)
    for other in others:
        first = first.merge(other)
    return first


@torch.inference_mode()
def validation_pass(
    detector: Detector, images: NDArray[np.uint8], masks: NDArray[np.bool_], batch_size: int = 32
) -> dict[str, float]:
    """`selection.validation_figures` of the images of all workers, the same on every worker.

    Args:
        images: (N, S, S, 3) uint8 and masks: (N, S, S) bool, this worker's, from `selection.validation_images`.
    """
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    scores, maps = collect_scores((detector(torch.from_numpy(batch)) for batch in batches), masks.shape[1])
    return validation_figures(
        *(np.concatenate(parts) for parts in zip(*gather_objects((masks, scores, maps)), strict=True))
    )


def collect_scores(scored: Iterable[Scored], size_px: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scores (N,) and maps (N, size_px, size_px) of all batches."""
    scores = [np.empty(0, np.float32)]
    maps = [np.empty((0, size_px, size_px), np.float32)]
    for batch in scored:
        scores.append(batch.score.float().cpu().numpy())
        maps.append(batch.anomaly_map.float().cpu().numpy())
    return np.concatenate(scores), np.concatenate(maps)


_T = TypeVar("_T")


def gather_objects(value: _T) -> list[_T]:
    """What each worker brings, in the order of the workers, the same on every one."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def epoch_batches(images: Tensor, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` shuffled batches of (N, ...) images held in memory; a small set is gone through more than once."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        yield images[order[:batch_size]]
        order = order[batch_size:]


def collapsed(log: dict[str, float]) -> bool:
    """Whether an epoch's figures show that the features no longer tell images apart."""
    return "feature_std" in log and log["feature_std"] < COLLAPSE_STD


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
