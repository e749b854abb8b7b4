"""Where weights come from: a hub, a package, a file or a URI."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

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
