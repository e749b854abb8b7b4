"""What went wrong, told from all that Ray wraps around it, and whether another attempt may end otherwise. No Ray."""

from __future__ import annotations

from collections.abc import Iterator

from focus_ray.errors import BundleError, ConfigError, DataError, StorageError, WeightsError

# what the same settings and data lead to every time, but for a storage, which may be back
CERTAIN = (ConfigError, DataError, WeightsError, BundleError, FloatingPointError)


def is_retryable(error: BaseException) -> bool:
    """Whether another attempt may end otherwise."""
    found = list(causes(error))
    away = any(isinstance(one, StorageError) for one in found)
    return away or not any(isinstance(one, CERTAIN) for one in found)


def reason_of(error: BaseException) -> str:
    """The innermost cause's own words, without the traces that Ray wraps around it."""
    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        failures = getattr(error, "worker_failures", None)
        if failures:
            error = next(iter(failures.values()))
        elif getattr(error, "cause", None) is not None:
            error = error.cause  # type: ignore[attr-defined]
        elif error.__cause__ is not None and type(error).__module__.startswith("ray."):
            error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no message'}"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and all that stands behind it, under any of the names that Ray gives it."""
    waiting, seen = [error], set()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += getattr(one, "worker_failures", {}).values()
        waiting += [getattr(one, name, None) for name in ("cause", "_base_exc", "controller_failure", "__cause__")]
