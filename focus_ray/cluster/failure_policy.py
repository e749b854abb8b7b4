"""Ends a training of Ray Train at once if a retry cannot succeed.

Ray Train 2.60 has no public option for a failure policy, so `install` replaces the function that creates Ray's own.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api import data_parallel_trainer

from focus_ray.cluster.failures import is_retryable


class PermanentFailurePolicy(DefaultFailurePolicy):
    """Ray's policy, except that permanent errors are never retried."""

    def make_decision(self, training_failed_error: Any) -> Any:
        if not is_retryable(training_failed_error):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def install() -> None:
    """Makes trainers that this process creates later use `PermanentFailurePolicy`."""
    data_parallel_trainer.create_failure_policy = PermanentFailurePolicy
