"""Module for the vision transformers of DINOv2 (arXiv 2304.07193; with registers, 2309.16588), with weights from a file.

Layers 1, 2 and 3 are blocks 1 to 3, 4 to 6 and 7 to 9 of 12; the last three blocks are not used. Tokens are feature vectors: a
class token for the whole image, register tokens (additional ones, without position), and a patch token for each 14 x 14 pixels.
The features of a layer are the patch tokens after it, without the final norm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from focus_ray.errors import WeightsError
from focus_ray.features.backbones.spec import IMAGENET_MEAN, IMAGENET_STD, BackboneSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

PATCH_PX = 14
BLOCKS_PER_LAYER = 3


def build_vit_layers(width: int, registers: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds layers 1 to 3 with random weights; see `dinov2_layers.build_dinov2_layers`."""
    from focus_ray.features.backbones.dinov2_layers import build_dinov2_layers

    return build_dinov2_layers(width, registers)


def convert_tokens_to_feature_map(registers: int, tokens: Tensor) -> Tensor:
    """Converts tokens (B, 1 + registers + S * S, C) to a feature map of the patch tokens (B, C, S, S)."""
    patches = tokens[:, 1 + registers :].transpose(1, 2)
    side = math.isqrt(patches.shape[2])
    return patches.unflatten(2, (side, side))


def convert_dinov2_weight_name(key: str) -> str | None:
    """Converts the name that DINOv2's authors gave a weight to the name in `Backbone`.

    Returns: None if the weight is not used; an unknown name unchanged.
    """
    part, _, suffix = key.partition(".")
    if part in ("mask_token", "norm", "head"):
        return None
    if part in ("cls_token", "pos_embed", "register_tokens"):
        return f"layer1.0.{part}"
    if part == "patch_embed":
        return f"layer1.0.{suffix}"
    number, _, suffix = suffix.partition(".")
    if part != "blocks" or not number.isdigit():
        return key
    layer, index = divmod(int(number), BLOCKS_PER_LAYER)
    return f"layer{layer + 1}.{index + (layer == 0)}.{suffix}" if layer < 3 else None


# from names of Hugging Face to the authors' names; query, key and value are then merged into the authors' single tensor
_HUGGING_FACE = (
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


def rename_hugging_face_weights(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Renames weights of Hugging Face to the names of DINOv2's authors; merges query, key and value into one tensor.

    Args: state: name -> weight. Weights that already have the authors' names are returned unchanged.
    """
    import torch

    if not any("encoder.layer." in key for key in state):
        return state
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in _HUGGING_FACE:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    for key in [key for key in renamed if ".attn.query." in key]:
        names = [key.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if all(name in renamed for name in names):
            renamed[key.replace(".query.", ".qkv.")] = torch.cat([renamed.pop(name) for name in names])
    return renamed


def refuse_default_weights(name: str, hugging_face: str) -> Mapping[str, Tensor]:
    """Raises WeightsError always, because DINOv2 has no default weights; the message names the files to use.

    Args:
        name: name of the backbone.
        hugging_face: name of the repository on Hugging Face with the weights.
    """
    raise WeightsError(
        f"model.backbone={name} has no default weights: set model.weights to the {name.removesuffix('_reg')}"
        f"{'_reg4' if name.endswith('_reg') else ''}_pretrain.pth of DINOv2's authors, or to the model.safetensors of "
        f"{hugging_face} on Hugging Face"
    )


def _make_dinov2_spec(name: str, width: int, registers: int, hugging_face: str) -> BackboneSpec:
    """Returns the specification of a DINOv2 vision transformer.

    Args:
        width: number of channels.
        registers: number of register tokens.
        hugging_face: Hugging Face repository with the published weights, named in error messages.
    """
    return BackboneSpec(
        (width, width, width),
        IMAGENET_MEAN,
        IMAGENET_STD,
        partial(build_vit_layers, width, registers),
        convert_dinov2_weight_name,
        partial(refuse_default_weights, name, hugging_face),
        partial(convert_tokens_to_feature_map, registers),
        rename_hugging_face_weights,
        strides=(PATCH_PX,) * 3,
        passes_feature_maps=False,
    )


VITS14 = _make_dinov2_spec("dinov2_vits14", 384, 0, "facebook/dinov2-small")
VITB14 = _make_dinov2_spec("dinov2_vitb14", 768, 0, "facebook/dinov2-base")
VITS14_REG = _make_dinov2_spec("dinov2_vits14_reg", 384, 4, "facebook/dinov2-with-registers-small")
VITB14_REG = _make_dinov2_spec("dinov2_vitb14_reg", 768, 4, "facebook/dinov2-with-registers-base")
