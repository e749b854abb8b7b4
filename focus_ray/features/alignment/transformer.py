"""Module for spatial transformers that a loss trains: a localisation network predicts the transform theta of each image."""

from __future__ import annotations

from torch import Tensor, nn

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
    identity.

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

    def forward(self, x: Tensor) -> Tensor:
        """Predicts theta (B, 2, 3) from features (B, C, H, W)."""
        hidden = self.head(self.features(x).flatten(1))
        with disable_autocast(x):
            return compute_theta_from_parameters(self.parameters_out(hidden.float()), self.group, self.bounds)


class LocalisationNetworkAligner(nn.Module):
    """The image aligner of the paper: a localisation network predicts theta from the image, which is resized to 64 px [ours]."""

    SIZE_PX = 64

    def __init__(self, group: str, bounds: TransformBounds) -> None:
        super().__init__()
        self.transformer = SpatialTransformer(3, self.SIZE_PX, group, bounds)

    def forward(self, images: Tensor) -> Tensor:
        """Predicts theta (B, 2, 3) from images (B, 3, H, W) in 0..1."""
        return self.transformer(downsample_antialiased(images, self.SIZE_PX) - 0.5)  # type: ignore[no-any-return]
