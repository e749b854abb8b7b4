"""Checks of a bundle's manifest and tensor files before any tensor is allocated: a bundle may come from a stranger.

A file's hash says that the file is the one that the manifest names. It says nothing about the sizes that both of them claim.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, Field, StrictInt, StrictStr, ValidationError, field_validator

from focus_ray.config import Config
from focus_ray.data.regions import map_cells
from focus_ray.errors import BundleError
from focus_ray.fitting.profile import SHARES
from focus_ray.model.backbones.base import build_meta_backbone
from focus_ray.model.network import FocusNet
from focus_ray.model.reduction import ChannelReduction

MAX_MANIFEST_BYTES = 16 * 2**20  # calibration scores of 700,000 images
MAX_HEADER_BYTES = 2**20  # of a tensor file; the largest backbone's header has 40 KiB
MAX_DIMENSIONS = 8
FRAMES_AT_ONCE = 32  # decoded images of a full batch, by default
_FILE_NAME = r"^[A-Za-z0-9_-]+\.safetensors$"
_MAX_COUNT = 2**40
_VALUE_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F16": 2, "BF16": 2, "I16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}
_FLOAT_BYTES = 4  # floats narrower than float32 are widened while a bundle is read
_PACKED = "precision_factor"  # end of a name: one triangle of each matrix; held as whole matrices

_Size = Annotated[StrictInt, Field(ge=1, le=_MAX_COUNT)]


class _File(BaseModel):
    name: Annotated[StrictStr, Field(pattern=_FILE_NAME)]
    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")]
    num_bytes: Annotated[StrictInt, Field(ge=0, le=_MAX_COUNT)]


class _Moments(BaseModel):
    count: Annotated[StrictInt, Field(ge=0, le=_MAX_COUNT)]
    height: _Size
    width: _Size
    channels: _Size


class _Manifest(BaseModel):
    created_at: StrictStr
    category: StrictStr
    config: dict[str, Any]
    data: dict[str, Any]
    moments: _Moments
    calibration: dict[str, Any]
    metrics: dict[str, Any]
    files: dict[str, _File]

    @field_validator("created_at")
    @classmethod
    def _is_time(cls, value: str) -> str:
        datetime.fromisoformat(value)
        return value

    @field_validator("category")
    @classmethod
    def _is_folder_name(cls, value: str) -> str:
        if not value or value in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", value):
            raise ValueError("a category names a folder, so it has no slash and no control character")
        return value


class TensorShape(NamedTuple):
    """Of a tensor in a file. value_bytes: of one value, as stored."""

    shape: tuple[int, ...]
    value_bytes: int

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)


Header = Mapping[str, TensorShape]


def check_manifest(manifest: Mapping[str, Any], uri: str) -> None:
    """Checks the types and ranges of the entries that readers of bundles rely on. Raises: BundleError: naming the entry."""
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BundleError(
            f"{uri}: the entry {place!r} of its manifest cannot be used: {first['msg']}; got {first['input']!r:.80}"
        ) from None


def read_header(content: bytes, uri: str) -> dict[str, TensorShape]:
    """Name -> shape of the tensors in a safetensors file.

    Raises: BundleError: the header is too long or malformed, or its tensors do not fill the file exactly.
    """
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > min(MAX_HEADER_BYTES, len(content) - 8):
        raise BundleError(f"{uri}: a tensor file's header of {length} bytes, expected {MAX_HEADER_BYTES} at most")
    try:
        tree = json.loads(content[8 : 8 + length])
        tree.pop("__metadata__", None)
        tensors = {name: _read_entry(entry, len(content)) for name, entry in tree.items()}
        spans = sorted((int(start), int(end)) for start, end in (entry["data_offsets"] for entry in tree.values()))
        sizes = sum(tensor.num_values * tensor.value_bytes for tensor in tensors.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BundleError(f"{uri}: the header of a tensor file is damaged: {error!r:.200}") from None
    starts, ends = [0, *(end for _, end in spans)], [*(start for start, _ in spans), len(content) - 8 - length]
    if starts != ends or sizes != ends[-1]:
        raise BundleError(f"{uri}: the tensors of its header do not fill the file of {len(content)} bytes")
    return tensors


def _read_entry(entry: Mapping[str, Any], file_bytes: int) -> TensorShape:
    """Raises: ValueError, TypeError, KeyError: an entry of a header that cannot be used."""
    shape = tuple(entry["shape"])
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size <= file_bytes for size in shape):
        raise ValueError(f"shape {shape[:MAX_DIMENSIONS]}")
    tensor = TensorShape(shape, _VALUE_BYTES[entry["dtype"]])
    start, end = entry["data_offsets"]
    if end - start != tensor.num_values * tensor.value_bytes:
        raise ValueError(f"{entry['dtype']} {shape} at offsets {start} to {end}")
    return tensor


def check_shapes(config: Config, moments: Mapping[str, int], network: Header, density: Header, uri: str) -> None:
    """Compares tensor shapes with the shapes that the configuration calls for.

    Args: moments: height and width of the density's map, as the manifest has them.

    Raises: BundleError: naming the first that differs.
    """
    places = map_cells(config)
    grid = config.model.shared_grid
    size = len(places.tops) // grid[0], len(places.lefts) // grid[1]
    if (moments["height"], moments["width"]) != size:
        raise BundleError(f"{uri}: its map has {moments['height']} x {moments['width']} places, expected {size}")
    with torch.device("meta"):  # shapes without memory
        net = FocusNet(config.model, build_meta_backbone(config.model.backbone), head=False)
        reduction = ChannelReduction(net.backbone.spec.channels, config.density, config.train.seed)
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    expected |= {f"reduction.{name}": tuple(tensor.shape) for name, tensor in reduction.state_dict().items()}
    height, width = size[0] * grid[0], size[1] * grid[1]
    expected |= {"profile.weight": (height, width), "profile.typical": (len(SHARES),)}
    expected |= {"typical": (2,), "gaussian.scale": (), "same_part_distance": (1,), "region": config.model.frame_px}
    for name, tensor in {**network, **density}.items():
        if name in expected and tensor.shape != expected[name]:
            raise BundleError(f"{uri}: tensor {name} has the shape {tensor.shape}, expected {expected[name]}")
    if "coreset.patches" in density and density["coreset.patches"].shape[:1] > (config.density.coreset,):
        raise BundleError(f"{uri}: its coreset is larger than density.coreset={config.density.coreset}")


def check_moments(moments: Mapping[str, int], header: Header, uri: str) -> None:
    """Compares the shapes of stored moments with their sizes in the manifest. Raises: BundleError: they differ."""
    num_places, channels = moments["height"] * moments["width"], moments["channels"]
    expected = {"mean": (num_places, channels), "scatter": (num_places, channels * (channels + 1) // 2)}
    for name, shape in expected.items():
        if name not in header or header[name].shape != shape:
            raise BundleError(f"{uri}: its moments lack a tensor {name} of the shape {shape}")


def check_memory(config: Config, network: Header, density: Header, max_bytes: int, uri: str) -> None:
    """Compares the memory that a model holds, and the memory of its largest steps, with a limit.

    Raises: BundleError: naming what is too large.
    """
    height, width = config.model.frame_px
    places, grid = map_cells(config), config.model.shared_grid
    rows, columns = len(places.tops), len(places.lefts)
    num_places = rows * columns // (grid[0] * grid[1])
    patches = density["coreset.patches"].shape[0] if "coreset.patches" in density else 0
    bank = density["bank"].shape if "bank" in density else (0, 0, 0)
    row_bytes = columns // grid[1] * config.density.window**2 * (bank[0] + bank[-1]) * _FLOAT_BYTES
    needs = {
        "its tensors": sum(held_bytes(name, tensor) for name, tensor in [*network.items(), *density.items()]),
        f"a batch of {FRAMES_AT_ONCE} images of {height} x {width} pixels": height * width * 4 * FRAMES_AT_ONCE,
        # float64, in three copies while they are smoothed
        "the matrices that draw its maps": 24 * (height * rows + width * columns),
        "distances to its coreset": num_places * patches * _FLOAT_BYTES,
        "distances to the memory of a row of places": row_bytes * FRAMES_AT_ONCE,
    }
    for what, num_bytes in needs.items():
        if num_bytes > max_bytes:
            raise BundleError(
                f"{uri}: {what} would take {num_bytes / 2**20:.0f} MiB of memory, and the limit is {max_bytes / 2**20:.0f} MiB"
            )


def held_bytes(name: str, tensor: TensorShape) -> int:
    """Memory of a stored tensor once a bundle is read, at most."""
    value_bytes = max(tensor.value_bytes, _FLOAT_BYTES)
    return tensor.num_values * value_bytes * (2 if name.endswith(_PACKED) else 1)
