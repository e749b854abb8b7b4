"""Module for the vision transformers of DINOv3 (arXiv 2508.10104), with weights from a file.

The features are the patch tokens after blocks 3, 6, 9 and 11 of 12, counted from 0, each with the final norm and L2-normalised
(as RAD, arXiv 2601.22763). Layer 3 has the features of the last two of these blocks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from focus_ray.features.backbones.dinov2 import (
    LAST_BLOCKS,
    build_vit_layers,
    build_vit_norm,
    convert_tokens_to_feature_map,
    convert_vit_weight_name,
    refuse_default_weights,
)
from focus_ray.features.backbones.spec import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec

if TYPE_CHECKING:
    from torch import Tensor

PATCH_PX = 16
NUM_REGISTERS = 4

# from names of Hugging Face to the authors' names; query, key and value are then merged into the authors' single tensor
_HUGGING_FACE = (
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^(model\.)?layer\.", "blocks."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


def rename_dinov3_weights(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Renames weights of the authors or of Hugging Face to names that `convert_vit_weight_name` expects.

    Keys have no bias: the authors' files mask it, and files of Hugging Face leave it out. Here it is 0.

    Args: state: name -> weight.
    """
    import torch

    renamed = {}
    for key, value in state.items():
        if key.startswith("rope_embeddings."):
            continue
        for pattern, replacement in _HUGGING_FACE:
            key = re.sub(pattern, replacement, key)
        renamed[key.replace("storage_tokens", "register_tokens")] = value
    for key in [key for key in renamed if key.endswith(".attn.q.weight")]:
        block = key.removesuffix("q.weight")
        query_bias = renamed.pop(f"{block}q.bias")
        biases = [query_bias, torch.zeros_like(query_bias), renamed.pop(f"{block}v.bias")]
        renamed[f"{block}qkv.weight"] = torch.cat([renamed.pop(f"{block}{part}.weight") for part in "qkv"])
        renamed[f"{block}qkv.bias"] = torch.cat(biases)
    for key in [key for key in renamed if key.endswith(".attn.qkv.bias_mask")]:
        query_bias, key_bias, value_bias = renamed[key.removesuffix("_mask")].chunk(3)
        renamed[key.removesuffix("_mask")] = torch.cat([query_bias, torch.zeros_like(key_bias), value_bias])
        del renamed[key]
    return renamed


def _make_dinov3_spec(name: str, width: int, hugging_face: str) -> BackboneSpec:
    """Returns the specification of a DINOv3 vision transformer.

    Args:
        width: number of channels.
        hugging_face: Hugging Face repository with the published weights, named in error messages.
    """
    shape = (width, NUM_REGISTERS, PATCH_PX, True)
    return BackboneSpec(
        (width, width, 2 * width),
        IMAGENET_MEAN,
        IMAGENET_STD,
        partial(build_vit_layers, *shape, LAST_BLOCKS),
        partial(convert_vit_weight_name, LAST_BLOCKS),
        partial(refuse_default_weights, name, f"{name}_pretrain_lvd1689m-*.pth", hugging_face),
        partial(convert_tokens_to_feature_map, NUM_REGISTERS),
        rename_dinov3_weights,
        partial(build_vit_norm, *shape),
        strides=(PATCH_PX,) * 3,
        passes_feature_maps=False,
    )


VITS16 = _make_dinov3_spec("dinov3_vits16", 384, "facebook/dinov3-vits16-pretrain-lvd1689m")
VITB16 = _make_dinov3_spec("dinov3_vitb16", 768, "facebook/dinov3-vitb16-pretrain-lvd1689m")
