"""Module for spatial transformers that a loss trains: a localisation network predicts the transform theta of each image."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from focus_ray.distributed import AllReduceSum, get_world_size
from focus_ray.features.alignment.theta import (
    TransformBounds,
    compute_theta_from_parameters,
    count_transform_parameters,
    disable_autocast,
    downsample_antialiased,
)


class SpatialTransformer(nn.Module):
    """A localisation network that predicts a geometric transform for each image from its features.

    The group (a key of `theta.GROUP_COMPONENTS`) names the allowed movements. Before training, the network predicts the
    identity. Only differences between images move them [ours]: the mean of the predicted parameters is subtracted, over the
    global batch in training, and over training images afterwards. Otherwise all images could move together, for instance zoom
    into a flat area. After training, no image moves further than the training images did.

    The layers are the same as in RegAD [kin]: two blocks of 3x3 convolution, batch norm, ReLU and 3x3 max-pooling with stride 2,
    to 64 and 16 channels; then a linear layer to 1024, ReLU, and a zero-initialised linear layer to the parameters of the
    transform.

    Args:
        channels: channels of the features.
        size: number of rows, and of columns, of the features.
        group: transform group.
        bounds: the largest transform that the network can predict.
    """

    def __init__(self, channels: int, size: int, group: str, bounds: TransformBounds) -> None:
        super().__init__()
        self.group, self.bounds = group, bounds
        reduced = (((size + 1) // 2) + 1) // 2
        self.features = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
            nn.Conv2d(64, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.head = nn.Sequential(nn.Linear(16 * reduced * reduced, 1024), nn.ReLU())
        self.parameters_out = nn.Linear(1024, count_transform_parameters(group))
        nn.init.zeros_(self.parameters_out.weight)
        nn.init.zeros_(self.parameters_out.bias)
        self.momentum: float | None = 0.1  # of the running mean, as in a batch norm; None: the mean over all batches
        num_parameters = self.parameters_out.out_features
        self.parameter_mean: Tensor
        self.parameter_limit: Tensor
        self.num_batches: Tensor
        self.register_buffer("parameter_mean", torch.zeros(num_parameters))
        self.register_buffer("parameter_limit", torch.full((num_parameters,), torch.inf))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Predicts theta (B, 2, 3) from features (B, C, H, W)."""
        hidden = self.head(self.features(x).flatten(1))
        with disable_autocast(x):
            parameters = self.parameters_out(hidden.float())
            if self.training:
                parameters = self._subtract_batch_mean(parameters)
            else:
                centred = parameters - self.parameter_mean
                parameters = torch.maximum(torch.minimum(centred, self.parameter_limit), -self.parameter_limit)
            return compute_theta_from_parameters(parameters, self.group, self.bounds)

    def reset_running_stats(self) -> None:
        """Forgets the mean and the largest movement of the images; the next batches in training mode determine them again."""
        self.parameter_mean.zero_()
        self.parameter_limit.zero_()
        self.num_batches.zero_()

    def _subtract_batch_mean(self, parameters: Tensor) -> Tensor:
        """Subtracts the mean over the global batch from parameters (b, n), and updates the running statistics."""
        sums = torch.cat([parameters.sum(dim=0), parameters.new_full((1,), len(parameters))])
        if get_world_size() > 1:
            sums = AllReduceSum.apply(sums)
        mean = sums[:-1] / sums[-1]
        centred = parameters - mean
        with torch.no_grad():
            largest = centred.abs().amax(dim=0)
            if get_world_size() > 1:
                dist.all_reduce(largest, dist.ReduceOp.MAX)
            self.num_batches += 1
            weight = 1 / float(self.num_batches) if self.momentum is None else self.momentum
            self.parameter_mean.lerp_(mean, weight)
            self.parameter_limit.copy_(torch.maximum(self.parameter_limit, largest))
        return centred

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Loads the state; a state of an earlier version has no statistics, so its predictions stay as they were."""
        for name in ("parameter_mean", "parameter_limit", "num_batches"):
            state_dict.setdefault(prefix + name, getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class LocalisationNetworkAligner(nn.Module):
    """The image aligner of the paper: a localisation network predicts theta from the image, which is resized to 64 px [ours]."""

    SIZE_PX = 64

    def __init__(self, group: str, bounds: TransformBounds) -> None:
        super().__init__()
        self.transformer = SpatialTransformer(3, self.SIZE_PX, group, bounds)

    def forward(self, images: Tensor) -> Tensor:
        """Predicts theta (B, 2, 3) from images (B, 3, H, W) in 0..1."""
        return self.transformer(downsample_antialiased(images, self.SIZE_PX) - 0.5)  # type: ignore[no-any-return]
