"""The packages of each extra of focus_ray, and one clear error if a package is not installed.

Without an extra, focus_ray reads bundles and inspects images with them. The extra `train` adds training and evaluation, `ray`
adds clusters, sweeps and the service.
"""

from __future__ import annotations

from importlib.util import find_spec

from focus_ray.errors import MissingPackageError

# extra -> import names of its packages
EXTRA_MODULES: dict[str, tuple[str, ...]] = {
    "s3": ("boto3", "botocore"),
    "train": ("jinja2", "matplotlib", "sklearn"),
    "ray": ("aiohttp", "fastapi", "grpc", "optuna", "pebble", "python_multipart", "ray", "starlette"),
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "mlflow": ("alembic", "mlflow", "sqlalchemy"),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
}


def require_extra(extra: str, feature: str) -> None:
    """Checks that the packages of an extra are installed, without importing them.

    Args:
        extra: a key of `EXTRA_MODULES`.
        feature: what needs the packages, for the error message, as in "focus-ray train".

    Raises: MissingPackageError: a package is not installed.
    """
    absent = [name for name in EXTRA_MODULES[extra] if not _is_installed(name)]
    if absent:
        raise MissingPackageError(f"{feature} needs {', '.join(absent)}, not installed here: {_install_command(extra)}")


def _is_installed(module: str) -> bool:
    """Returns whether a module can be imported. A plain folder of that name, such as `wandb/` with runs, does not count."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def explain_missing_module(error: ModuleNotFoundError) -> MissingPackageError | None:
    """Returns the error with the missing extra for a failed import, or None if the module belongs to no extra."""
    name = (error.name or "").partition(".")[0]
    for extra, modules in EXTRA_MODULES.items():
        if name in modules:
            return MissingPackageError(f"this needs {name}, which is not installed here: {_install_command(extra)}")
    return None


def _install_command(extra: str) -> str:
    return f"pip install 'focus-ray[{extra}]'"
