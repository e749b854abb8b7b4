"""Which failures of a training are worth another attempt: a lost machine is, an error that will come again is not.

Ray Train has no public place for a policy of one's own (2.60), so this one is put where it makes its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api import data_parallel_trainer

from focus_ray.errors import BundleError, ConfigError, DataError, StorageError, WeightsError

# what the same settings and data lead to every time, but for a storage, which may be back
CERTAIN = (ConfigError, DataError, WeightsError, BundleError, FloatingPointError)


class CertainFailurePolicy(DefaultFailurePolicy):
    """Ray's, but for errors of `CERTAIN`, which end the training at once."""

    def make_decision(self, training_failed_error: Any) -> Any:
        found = list(causes(training_failed_error))
        away = any(isinstance(error, StorageError) for error in found)
        if not away and any(isinstance(error, CERTAIN) for error in found):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def install() -> None:
    """Lets trainers that this process makes from now on use the policy."""
    data_parallel_trainer.create_failure_policy = CertainFailurePolicy


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
