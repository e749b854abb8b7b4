"""Finds the cause of a failure inside the errors of Ray, and decides whether a retry can succeed. Works without Ray."""

from __future__ import annotations

from focus_ray.errors import BundleError, ConfigError, DataError, StorageError, WeightsError

# the same settings and data lead to these errors every time; StorageError is a DataError, but the storage may come back
PERMANENT_ERRORS = (ConfigError, DataError, WeightsError, BundleError, FloatingPointError)
_CAUSE_ATTRIBUTES = ("cause", "_base_exc", "controller_failure", "__cause__")  # of Ray's errors


def is_retryable(error: BaseException) -> bool:
    """Returns whether another attempt may succeed.

    True if a cause is a failure of the storage. Otherwise False if a cause is permanent, such as wrong settings or data.
    Otherwise True.
    """
    causes = [error]
    for cause in causes:  # the list grows during the loop
        worker_errors = getattr(cause, "worker_failures", {}).values()
        next_causes = [*worker_errors, *(getattr(cause, name, None) for name in _CAUSE_ATTRIBUTES)]
        causes += [error for error in next_causes if error is not None and error not in causes]
    return any(isinstance(cause, StorageError) for cause in causes) or not any(
        isinstance(cause, PERMANENT_ERRORS) for cause in causes
    )


def describe_root_cause(error: BaseException) -> str:
    """Returns the original error inside Ray's errors as one line of text: its type and the last line of its message."""
    visited: set[int] = set()
    while id(error) not in visited:
        visited.add(id(error))
        worker_errors = getattr(error, "worker_failures", None)
        if worker_errors:
            error = next(iter(worker_errors.values()))
        elif getattr(error, "cause", None) is not None:
            error = error.cause  # type: ignore[attr-defined]
        elif error.__cause__ is not None and type(error).__module__.startswith("ray."):
            error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
