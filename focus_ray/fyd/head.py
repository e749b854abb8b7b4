"""Module for the head of the network: projector and predictor, small networks on its features that only the training uses."""

from __future__ import annotations

from torch import Tensor, nn

from focus_ray.features.batch_norm import use_global_batch_norm
from focus_ray.features.network import FocusNet

PROJECTOR_WIDTH = 256  # channels of the projector f [kin: RegAD]


class ProjectorPredictorHead(nn.Module):
    """The projector f (the encoder of RegAD [kin]), which transforms the features of layer 3, and the predictor g after it."""

    def __init__(self, net: FocusNet) -> None:
        super().__init__()
        width, hidden = PROJECTOR_WIDTH, net.config.predictor_width
        self.projector = nn.Sequential(
            nn.Conv2d(net.backbone.spec.channels[2], width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )
        self.predictor = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, width, 1)
        )
        use_global_batch_norm(self)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Computes f(x) and g(f(x)), both (B, PROJECTOR_WIDTH, H, W), from features x (B, C, H, W) of layer 3."""
        projected = self.projector(features)
        return projected, self.predictor(projected)
