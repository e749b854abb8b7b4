"""Module with the table of the backbones, by name. A new backbone is one file in this folder and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from focus_ray.settings.kinds import LazyRegistry

if TYPE_CHECKING:
    from focus_ray.features.backbones.spec import BackboneSpec

BACKBONES: LazyRegistry[BackboneSpec] = LazyRegistry(
    "backbone",
    {
        "resnet18": "focus_ray.features.backbones.resnet:RESNET18",
        "resnet34": "focus_ray.features.backbones.resnet:RESNET34",
        "resnet50": "focus_ray.features.backbones.resnet:RESNET50",
        "wide_resnet50_2": "focus_ray.features.backbones.resnet:WIDE_RESNET50_2",
        "convnext_tiny": "focus_ray.features.backbones.convnext:CONVNEXT_TINY",
        "efficientnet_lite0": "focus_ray.features.backbones.efficientnet_lite:LITE0",
        "efficientnet_lite1": "focus_ray.features.backbones.efficientnet_lite:LITE1",
        "efficientnet_lite2": "focus_ray.features.backbones.efficientnet_lite:LITE2",
        "dinov2_vits14": "focus_ray.features.backbones.dinov2:VITS14",
        "dinov2_vitb14": "focus_ray.features.backbones.dinov2:VITB14",
        "dinov2_vits14_reg": "focus_ray.features.backbones.dinov2:VITS14_REG",
        "dinov2_vitb14_reg": "focus_ray.features.backbones.dinov2:VITB14_REG",
        "dinov2_vits14_raw": "focus_ray.features.backbones.dinov2:VITS14_RAW",
        "dinov2_vitb14_raw": "focus_ray.features.backbones.dinov2:VITB14_RAW",
        "dinov2_vits14_reg_raw": "focus_ray.features.backbones.dinov2:VITS14_REG_RAW",
        "dinov2_vitb14_reg_raw": "focus_ray.features.backbones.dinov2:VITB14_REG_RAW",
        "dinov3_vits16": "focus_ray.features.backbones.dinov3:VITS16",
        "dinov3_vitb16": "focus_ray.features.backbones.dinov3:VITB16",
    },
)
