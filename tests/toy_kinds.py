"""One toy of each kind, as somebody would add it: what `test_kinds` lists in the tables and uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from focus_ray.config import DensityConfig
from focus_ray.data.importers.base import FolderImporter, ImportPlan, ImportSettings, add_folder
from focus_ray.density.base import Statistics
from focus_ray.evaluation.metrics import Measured, Metric
from focus_ray.model.backbones.base import BackboneSpec


class DistanceToMean:
    """The Euclidean distance to the mean embedding of the place."""

    def __init__(self, mean: Tensor, height: int, width: int) -> None:
        self.mean, self.height, self.width = mean, height, width

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def score(self, embedding: Tensor) -> Tensor:
        means = self.mean.t().view(-1, self.height, self.width)
        return (embedding - means).square().sum(dim=1).sqrt()


class _ToyDensity:
    keeps_bank = False

    def build(self, config: DensityConfig, statistics: Statistics) -> DistanceToMean:
        return DistanceToMean(statistics.moments.mean, statistics.moments.height, statistics.moments.width)

    def tensors(self, config: DensityConfig, statistics: Statistics) -> dict[str, Tensor]:
        return {"mean": statistics.moments.mean}

    def load(
        self, config: DensityConfig, tensors: Mapping[str, Tensor], height: int, width: int, device: torch.device | str
    ) -> DistanceToMean:
        return DistanceToMean(tensors["mean"].to(device), height, width)


DENSITY = _ToyDensity()


def _stages() -> tuple[nn.Module, nn.Module, nn.Module]:
    return nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 2, 2), nn.Conv2d(8, 8, 2, 2)


def _weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    net = nn.ModuleDict(dict(zip(("layer1", "layer2", "layer3"), _stages(), strict=True)))
    return {name: torch.randn(value.shape, generator=generator) for name, value in net.state_dict().items()}


BACKBONE = BackboneSpec((8, 8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), _stages, lambda key: key, _weights)


def _plan(root: Path, category: str, settings: ImportSettings) -> ImportPlan:
    plan = ImportPlan(category)
    add_folder(plan, root / "fine", "fine", "train", 0, "good", None, settings)
    add_folder(plan, root / "checked", "checked", "test", 0, "good", None, settings)
    add_folder(plan, root / "broken", "broken", "test", 1, "broken", None, settings)
    return plan


IMPORTER = FolderImporter("fine/, checked/ and broken/", "fine", _plan)


def _gap(measured: Measured) -> float | None:
    """Mean score of the anomalous images less that of the normal ones."""
    if not measured.has_both:
        return None
    labels: Sequence[int] = measured.labels.tolist()
    parts = [[s for s, label in zip(measured.scores.tolist(), labels, strict=True) if label == kind] for kind in (0, 1)]
    return sum(parts[1]) / len(parts[1]) - sum(parts[0]) / len(parts[0])


METRIC = Metric("mean gap", _gap)
