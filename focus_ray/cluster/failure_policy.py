"""Which failures of a training are worth another attempt: a lost machine is, an error that will come again is not.

Ray Train has no public place for a policy of one's own (2.60), so this one is put where it makes its own.
"""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api import data_parallel_trainer

from focus_ray.cluster.failures import is_retryable


class CertainFailurePolicy(DefaultFailurePolicy):
    """Ray's, but for errors of `CERTAIN`, which end the training at once."""

    def make_decision(self, training_failed_error: Any) -> Any:
        if not is_retryable(training_failed_error):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def install() -> None:
    """Lets trainers that this process makes from now on use the policy."""
    data_parallel_trainer.create_failure_policy = CertainFailurePolicy
