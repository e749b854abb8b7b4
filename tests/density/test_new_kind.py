"""A density, or a backbone, that is defined in one file works from settings to export, with one line in its registry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import REPOSITORY
from small_set import make_bundle, small_config
from torch import Tensor, nn

from focus_ray.bundle.bundle import read_bundle
from focus_ray.bundle.inspector import Inspector
from focus_ray.data.read import read_test_rows
from focus_ray.density.kinds.base import DensityKind
from focus_ray.density.kinds.shared import SharedDensitySettings
from focus_ray.density.registry import DENSITIES
from focus_ray.export.export import export_bundle
from focus_ray.features.backbones.registry import BACKBONES
from focus_ray.features.backbones.spec import BackboneSpec
from focus_ray.fitting.settings import Config, parse_config


class ToyDensity(DensityKind[SharedDensitySettings]):
    """The distance to the mean of the normal images: the kind, and the fitted density."""

    def build(self, config: Any, statistics: Any) -> Any:
        moments = statistics.moments
        return self.restore(config, self.collect_tensors(config, statistics, None), moments.height, moments.width)

    def collect_tensors(self, config: Any, statistics: Any, density: Any) -> dict[str, Tensor]:
        return {"toy.mean": statistics.moments.mean}

    def restore(self, config: Any, tensors: Mapping[str, Tensor], height: int, width: int) -> Any:
        density = ToyDensity()
        density.mean, density.height, density.width = tensors["toy.mean"], height, width
        density.device = density.mean.device
        return density

    def score(self, embedding: Tensor) -> Tensor:
        mean = self.mean.t().unflatten(1, (self.height, self.width))
        return (embedding - mean).square().mean(dim=1)


def toy_layers() -> tuple[nn.Module, nn.Module, nn.Module]:
    """Strides 2, 4 and 20."""
    layers = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 12, 2, 2), nn.Conv2d(12, 16, 5, 5)
    for number, layer in enumerate(layers):
        nn.init.normal_(layer.weight, std=0.2, generator=torch.Generator().manual_seed(number))
    return layers


TOY = ToyDensity()
STATS = (0.5,) * 3
TOY_NET = BackboneSpec(
    (8, 12, 16), STATS, STATS, toy_layers, lambda key: key, dict, strides=(2, 4, 20), min_reflected_px=40
)


def inspect_and_export(config: Config, folder: Path) -> None:
    """Checks that a new bundle and its ONNX export give useful scores; `export_bundle` compares the two."""
    place = make_bundle(config)
    uri = config.data.uri
    measured = Inspector(read_bundle(place)).score_labelled_images(read_test_rows(uri, "gear")).measured
    assert np.isfinite(measured.scores).all()
    assert len(set(measured.scores)) == len(measured.scores) == 8
    assert (export_bundle(place, "onnx", folder / "export").folder / "model.onnx").is_file()


def test_a_new_density_is_fitted_stored_scored_and_exported(parts: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(DENSITIES.import_paths, "toy", f"{__name__}:TOY")
    inspect_and_export(small_config(parts, tmp_path, density={"kind": "toy", "num_channels": 16}), tmp_path)


def test_a_new_backbone_is_fitted_stored_scored_and_exported(parts: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(BACKBONES.import_paths, "toy", f"{__name__}:TOY_NET")
    model = {"backbone": "toy", "image_size_px": 60}
    inspect_and_export(small_config(parts, tmp_path, model=model, density={"num_channels": 16}), tmp_path)
    for size, message in ((64, "multiple of 20"), (20, "32")):
        with pytest.raises(Exception, match=message):
            parse_config({"data": {"uri": parts}, "model": {"backbone": "toy", "image_size_px": size}})


OWN_SETTINGS = """
from pydantic import Field
from focus_ray.density.kinds.base import DensityKind
from focus_ray.density.kinds.shared import SharedDensitySettings

class ToySettings(SharedDensitySettings):
    power: float = Field(default=2.0, gt=0.0, description="toy: power of the differences.")

class Toy(DensityKind[ToySettings]):
    settings = ToySettings

TOY = Toy()
"""
CHECK = """
from focus_ray.density.registry import DENSITIES
DENSITIES.import_paths["toy"] = "toy:TOY"
from focus_ray.cli.config_reference import explain_key
from focus_ray.fitting.settings import parse_config
from focus_ray.settings.sections import config_to_yaml, parse_yaml_mapping
config = parse_config({"data": {"uri": "x"}, "density": {"kind": "toy", "power": 3}})
assert parse_config(parse_yaml_mapping(config_to_yaml(config), "yaml")).density.power == 3.0
assert "toy: power" in explain_key("density.power")
assert "power" in DENSITIES["nearest"].find_unused_settings(config.density)
assert {"pooling", "window"} & set(DENSITIES["toy"].find_unused_settings(config.density)) == {"pooling"}
"""


def test_settings_of_a_new_density_become_settings_of_the_section_density(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(OWN_SETTINGS)
    code = f"import sys; sys.path[:0] = {[str(tmp_path), str(REPOSITORY)]}\n{CHECK}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
