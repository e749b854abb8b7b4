"""Spatial transformers that a loss trains: a localisation net reads theta off features or images."""

from __future__ import annotations

from torch import Tensor, nn

from focus_ray.model.alignment.theta import Bounds, full_precision, num_parameters, shrink, theta_from_parameters


class SpatialTransformer(nn.Module):
    """A localisation net that starts at the identity, and the transform group it moves in.

    [kin, RegAD]: two blocks of 3x3 convolution, BN, ReLU and 3x3 max-pooling with stride 2, to 64 and 16 channels; a
    fully connected layer to 1024, ReLU, and one to the parameters, zero-initialised.
    """

    def __init__(self, channels: int, size: int, group: str, bounds: Bounds) -> None:
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
        self.parameters_out = nn.Linear(1024, num_parameters(group))
        nn.init.zeros_(self.parameters_out.weight)
        nn.init.zeros_(self.parameters_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> theta (B, 2, 3)."""
        found = self.head(self.features(x).flatten(1))
        with full_precision(x):
            return theta_from_parameters(self.parameters_out(found.float()), self.group, self.bounds)


class LocalisedAligner(nn.Module):
    """The paper's way: a localisation net reads theta off the image, here off a copy of 64 px [ours]."""

    SIZE_PX = 64

    def __init__(self, group: str, bounds: Bounds) -> None:
        super().__init__()
        self.transformer = SpatialTransformer(3, self.SIZE_PX, group, bounds)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), 0..1 -> theta (B, 2, 3)."""
        return self.transformer(shrink(images, self.SIZE_PX) - 0.5)  # type: ignore[no-any-return]
