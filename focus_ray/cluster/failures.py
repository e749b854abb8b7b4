"""The cause of a failure without the layers that Ray wraps around it, and whether a retry can succeed. Works without Ray."""

from __future__ import annotations

from collections.abc import Iterator

from focus_ray.errors import BundleError, ConfigError, DataError, StorageError, WeightsError

# the same settings and data lead to these errors every time; StorageError is a DataError, but the storage may come back
PERMANENT_ERRORS = (ConfigError, DataError, WeightsError, BundleError, FloatingPointError)


def is_retryable(error: BaseException) -> bool:
    """Returns whether another attempt may succeed."""
    causes = list(iter_causes(error))
    if any(isinstance(cause, StorageError) for cause in causes):
        return True
    return not any(isinstance(cause, PERMANENT_ERRORS) for cause in causes)


def reason_of(error: BaseException) -> str:
    """Returns the type and the last line of the innermost cause, without Ray's traces."""
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


def iter_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error and every error behind it, each once, under all attribute names that Ray uses."""
    queue, visited = [error], set()
    while queue:
        cause = queue.pop()
        if cause is None or id(cause) in visited:
            continue
        visited.add(id(cause))
        yield cause
        queue += getattr(cause, "worker_failures", {}).values()
        queue += [getattr(cause, name, None) for name in ("cause", "_base_exc", "controller_failure", "__cause__")]
