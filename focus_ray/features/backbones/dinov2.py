"""Module for the vision transformers of DINOv2 (arXiv 2304.07193; with registers, 2309.16588), with weights from a file.

The features are the patch tokens after blocks 3, 6, 9 and 11 of 12, counted from 0, each with the final norm and L2-normalised
(as AnomalyDINO, arXiv 2405.14529, and RAD, 2601.22763). Layer 3 has the features of the last two of these blocks. The backbones
`..._raw` have the features of earlier versions: the tokens after blocks 2, 5 and 8, without a norm.
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

LAST_BLOCKS = (3, 6, 9, 11)  # of the features, as in RAD
_RAW_LAST_BLOCKS = (2, 5, 8)


def build_vit_layers(
    width: int, registers: int, patch_px: int, is_rotary: bool, last_blocks: tuple[int, ...]
) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Builds layers 1 to 3 with random weights; see `transformer_layers.build_transformer_layers`."""
    from focus_ray.features.backbones.transformer_layers import TransformerShape, build_transformer_layers

    return build_transformer_layers(TransformerShape(width, registers, patch_px, is_rotary), last_blocks)


def build_vit_norm(width: int, registers: int, patch_px: int, is_rotary: bool) -> nn.Module:
    """Builds the norm of the tokens with initial weights."""
    from focus_ray.features.backbones.transformer_layers import TokenNorm, TransformerShape

    return TokenNorm(TransformerShape(width, registers, patch_px, is_rotary))


def convert_tokens_to_feature_map(registers: int, tokens: Tensor) -> Tensor:
    """Converts tokens (B, 1 + registers + S * S, C) to a feature map of the patch tokens (B, C, S, S)."""
    patches = tokens[:, 1 + registers :].transpose(1, 2)
    side = math.isqrt(patches.shape[2])
    return patches.unflatten(2, (side, side))


def convert_vit_weight_name(last_blocks: tuple[int, ...], key: str) -> str | None:
    """Converts the name that the authors of DINOv2 and DINOv3 gave a weight to the name in `Backbone`.

    Args: last_blocks: see `transformer_layers.build_transformer_layers`.

    Returns: None if the weight is not used; an unknown name unchanged.
    """
    part, _, suffix = key.partition(".")
    if part in ("mask_token", "head", "rope_embed"):
        return None
    if part == "norm":
        return key if len(last_blocks) == 4 else None
    if part in ("cls_token", "pos_embed", "register_tokens"):
        return f"layer1.0.{part}"
    if part == "patch_embed":
        return f"layer1.0.{suffix}"
    number, _, suffix = suffix.partition(".")
    if part != "blocks" or not number.isdigit():
        return key
    starts = [0, *(block + 1 for block in last_blocks)]
    if int(number) >= starts[-1]:
        return None
    group = max(index for index, start in enumerate(starts) if start <= int(number))
    index = int(number) - starts[group] + (group == 0)  # in layer 1, the token embedding is before the blocks
    places = (
        ("layer1", "layer2", "layer3")
        if len(last_blocks) == 3
        else ("layer1", "layer2", "layer3.first", "layer3.second")
    )
    return f"{places[group]}.{index}.{suffix}"


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


def refuse_default_weights(name: str, file: str, hugging_face: str) -> Mapping[str, Tensor]:
    """Raises WeightsError always, because the model has no default weights; the message names the files to use.

    Args:
        name: name of the backbone.
        file: name of the file that the authors published.
        hugging_face: name of the repository on Hugging Face with the weights.
    """
    raise WeightsError(
        f"model.backbone={name} has no default weights: set model.weights to the authors' {file}, or to the model.safetensors "
        f"of {hugging_face} on Hugging Face"
    )


def _make_dinov2_spec(
    name: str, width: int, registers: int, hugging_face: str, last_blocks: tuple[int, ...] = LAST_BLOCKS
) -> BackboneSpec:
    """Returns the specification of a DINOv2 vision transformer.

    Args:
        width: number of channels.
        registers: number of register tokens.
        hugging_face: Hugging Face repository with the published weights, named in error messages.
        last_blocks: number of the last block of each layer; three numbers: the features have no norm.
    """
    shape = (width, registers, 14, False)
    has_norm = len(last_blocks) == 4
    file = f"{name.removesuffix('_raw').removesuffix('_reg')}{'_reg4' if registers else ''}_pretrain.pth"
    return BackboneSpec(
        (width, width, 2 * width if has_norm else width),
        IMAGENET_MEAN,
        IMAGENET_STD,
        partial(build_vit_layers, *shape, last_blocks),
        partial(convert_vit_weight_name, last_blocks),
        partial(refuse_default_weights, name, file, hugging_face),
        partial(convert_tokens_to_feature_map, registers),
        rename_hugging_face_weights,
        partial(build_vit_norm, *shape) if has_norm else None,
        strides=(14,) * 3,
        passes_feature_maps=False,
    )


VITS14 = _make_dinov2_spec("dinov2_vits14", 384, 0, "facebook/dinov2-small")
VITB14 = _make_dinov2_spec("dinov2_vitb14", 768, 0, "facebook/dinov2-base")
VITS14_REG = _make_dinov2_spec("dinov2_vits14_reg", 384, 4, "facebook/dinov2-with-registers-small")
VITB14_REG = _make_dinov2_spec("dinov2_vitb14_reg", 768, 4, "facebook/dinov2-with-registers-base")
VITS14_RAW = _make_dinov2_spec("dinov2_vits14_raw", 384, 0, "facebook/dinov2-small", _RAW_LAST_BLOCKS)
VITB14_RAW = _make_dinov2_spec("dinov2_vitb14_raw", 768, 0, "facebook/dinov2-base", _RAW_LAST_BLOCKS)
VITS14_REG_RAW = _make_dinov2_spec(
    "dinov2_vits14_reg_raw", 384, 4, "facebook/dinov2-with-registers-small", _RAW_LAST_BLOCKS
)
VITB14_REG_RAW = _make_dinov2_spec(
    "dinov2_vitb14_reg_raw", 768, 4, "facebook/dinov2-with-registers-base", _RAW_LAST_BLOCKS
)
