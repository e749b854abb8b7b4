"""Errors that a user can cause and correct. Every other exception is a bug of focus_ray."""

from __future__ import annotations


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
