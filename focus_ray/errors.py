"""Errors that a user can cause and correct. Every other exception is a bug of focus_ray.

The packages of each extra are listed here too: a missing package is such an error.
"""

from __future__ import annotations

from importlib.util import find_spec


class FocusRayError(Exception):
    """Base class of all errors of focus_ray. The message states the value, the expected value and the remedy."""


class ConfigError(FocusRayError, ValueError):
    """A configuration has an unusable value."""


class MissingPackageError(FocusRayError, ImportError):
    """A command needs a package of an extra that is not installed."""


class DataError(FocusRayError, ValueError):
    """An image, a mask or a data set cannot be used."""


class StorageError(DataError):
    """A storage cannot be reached or refuses a request. A later attempt may succeed."""


class WeightsError(FocusRayError, RuntimeError):
    """Pretrained weights are missing, unreadable or have the wrong checksum."""


class BundleError(FocusRayError, RuntimeError):
    """A bundle is missing, incomplete, changed or of another format version."""


class ScoreError(DataError):
    """A score is not a finite number. The cause is the model, not the image."""


class TrainingError(FocusRayError, RuntimeError):
    """A training run failed."""


class RegistryError(FocusRayError, RuntimeError):
    """A team, category, version or alias does not exist in the registry, or the requested change is not possible."""


class SubmissionError(FocusRayError, RuntimeError):
    """A job cannot be submitted to a cluster, followed or stopped."""


class SweepError(FocusRayError, RuntimeError):
    """A sweep cannot be started, resumed or finished."""


class ExportError(FocusRayError, RuntimeError):
    """A bundle cannot be exported with these options, or the exported model gives other scores than the bundle."""


# extra -> import names of its packages
EXTRA_MODULES: dict[str, tuple[str, ...]] = {
    "s3": ("boto3", "botocore"),
    "train": ("jinja2", "matplotlib", "sklearn"),
    "ray": ("aiohttp", "fastapi", "grpc", "optuna", "pebble", "python_multipart", "ray", "requests", "starlette"),
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "mlflow": ("alembic", "mlflow", "sqlalchemy"),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
}


def check_extra_is_installed(extra: str, feature: str) -> None:
    """Checks that the packages of an extra are installed, without importing them.

    Args:
        extra: a key of `EXTRA_MODULES`.
        feature: what needs the packages, for the error message, as in "focus-ray train".

    Raises: MissingPackageError: a package is not installed.
    """
    absent = [name for name in EXTRA_MODULES[extra] if not _is_module_installed(name)]
    if absent:
        raise MissingPackageError(
            f"{feature} needs {', '.join(absent)}, not installed here: {_format_install_command(extra)}"
        )


def _is_module_installed(module: str) -> bool:
    """Returns whether a module can be imported. A plain folder of that name, such as `wandb/` with runs, does not count."""
    spec = find_spec(module)
    return spec is not None and spec.origin is not None


def find_missing_package_error(error: ModuleNotFoundError) -> MissingPackageError | None:
    """Returns the error with the missing extra for a failed import, or None if the module belongs to no extra."""
    name = (error.name or "").partition(".")[0]
    for extra, modules in EXTRA_MODULES.items():
        if name in modules:
            return MissingPackageError(
                f"this needs {name}, which is not installed here: {_format_install_command(extra)}"
            )
    return None


def _format_install_command(extra: str) -> str:
    return f"pip install 'focus-ray[{extra}]'"
