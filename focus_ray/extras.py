"""Which packages come with which extra of focus_ray, and one clear error where one is not installed.

Without an extra focus_ray reads bundles and inspects with them; `train` adds what learns and measures, `ray` all the rest.
"""

from __future__ import annotations

from importlib.util import find_spec

from focus_ray.errors import MissingPackageError

# extra -> the modules that its packages are imported as
MODULES: dict[str, tuple[str, ...]] = {
    "s3": ("boto3", "botocore"),
    "train": ("jinja2", "matplotlib", "sklearn"),
    "ray": ("aiohttp", "fastapi", "grpc", "optuna", "pebble", "python_multipart", "ray", "starlette"),
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "mlflow": ("alembic", "mlflow", "sqlalchemy"),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
}


def require_extra(extra: str, what: str) -> None:
    """Looks for an extra's packages, without importing them.

    Args: what: needs them, as in "focus-ray train".

    Raises: MissingPackageError: one is not installed.
    """
    absent = [name for name in MODULES[extra] if not _is_installed(name)]
    if absent:
        raise MissingPackageError(f"{what} needs {', '.join(absent)}, not installed here: {_advice(extra)}")


def _is_installed(module: str) -> bool:
    """A mere folder of that name, such as `wandb/` with runs in the working directory, is no package."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def explained(error: ModuleNotFoundError) -> MissingPackageError | None:
    """What to say of an import that failed; None where no extra has the module."""
    name = (error.name or "").partition(".")[0]
    for extra, modules in MODULES.items():
        if name in modules:
            return MissingPackageError(f"this needs {name}, which is not installed here: {_advice(extra)}")
    return None


def _advice(extra: str) -> str:
    return f"pip install 'focus-ray[{extra}]'"
