"""The errors that a user can cause and mend; everything else is a bug of ours."""

from __future__ import annotations


class FocusRayError(Exception):
    """Base of the errors whose message says what came, what was expected and what to do."""


class ConfigError(FocusRayError, ValueError):
    """A configuration value that cannot be used."""


class MissingPackageError(FocusRayError, ImportError):
    """A package that is needed for what was asked, and comes with an extra that is not installed."""


class DataError(FocusRayError, ValueError):
    """An image, mask or data set that cannot be used."""


class StorageError(DataError):
    """A storage that cannot be reached or refuses; another time it may not."""


class WeightsError(FocusRayError, RuntimeError):
    """Pretrained weights that cannot be found, read or trusted."""


class BundleError(FocusRayError, RuntimeError):
    """A trained artifact that is missing, incomplete, changed or of another format version."""


class ScoreError(DataError):
    """A score that is not a finite number: the model, not the image, is to blame."""


class TrainingError(FocusRayError, RuntimeError):
    """A training run that could not be carried through."""


class RegistryError(FocusRayError, RuntimeError):
    """A team, category, version or alias of the registry that is not there, or cannot be as asked."""


class SubmissionError(FocusRayError, RuntimeError):
    """A job that cannot be sent to a cluster, followed or stopped."""


class SweepError(FocusRayError, RuntimeError):
    """A sweep that cannot be started, taken up again or carried through."""


class ExportError(FocusRayError, RuntimeError):
    """A bundle that cannot be exported as asked, or whose export does not score as it does."""
