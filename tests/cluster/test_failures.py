"""Which failures of a training are retried."""

from __future__ import annotations

import pickle

import pytest
import ray.train
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api import data_parallel_trainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from focus_ray.cluster.failures import is_retryable
from focus_ray.errors import ConfigError, DataError, StorageError, TrainingError, WeightsError


def wrap_as_ray_does(error: BaseException) -> BaseException:
    return UserExceptionWithTraceback(error, "Traceback ...")


RETRIED = [
    wrap_as_ray_does(StorageError("no connection")),
    wrap_as_ray_does(RuntimeError("CUDA error")),
    wrap_as_ray_does(TrainingError("the stream gave 3 of 4 batches")),
    RayActorError(),
    WorkerHealthCheckFailedError("lost", RayActorError()),
]
PERMANENT = [DataError("a"), ConfigError("b"), WeightsError("c"), FloatingPointError("the loss is nan")]


@pytest.mark.ray
def test_trainers_retry_temporary_errors_and_no_permanent_errors(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from focus_ray.cluster.ray_private import patch_ray_train_retries

    monkeypatch.setattr(data_parallel_trainer, "create_failure_policy", None)
    monkeypatch.setenv("RAY_ADDRESS", "")  # the test sets it
    patch_ray_train_retries()
    policy = data_parallel_trainer.create_failure_policy(
        ray.train.FailureConfig(max_failures=30, controller_failure_limit=1)
    )  # type: ignore[misc]

    def decide(*errors: BaseException) -> FailureDecision:
        failed = WorkerGroupError("failed", dict(enumerate(errors)))
        return policy.make_decision(pickle.loads(pickle.dumps(failed)))

    assert {decide(error) for error in RETRIED} == {FailureDecision.RETRY}
    for error in PERMANENT:
        assert decide(wrap_as_ray_does(error)) == FailureDecision.RAISE
        # another worker fails because its peer has gone, which is no reason for a retry
        closed = wrap_as_ray_does(RuntimeError("connection closed by peer"))
        assert decide(closed, wrap_as_ray_does(error)) == FailureDecision.RAISE

    # Ray Train reports every minute of waiting for resources as a failure
    waits = [ControllerError(WorkerGroupStartupTimeoutError(2)) for _ in range(10)]
    assert {policy.make_decision(wait) for wait in waits} == {FailureDecision.RETRY}
    starts = [ControllerError(WorkerGroupStartupFailedError("no worker")) for _ in range(2)]
    assert [policy.make_decision(start) for start in starts] == [FailureDecision.RETRY, FailureDecision.RAISE]


def test_a_circle_of_causes_is_searched_once() -> None:
    inner, outer = DataError("inner"), RuntimeError("outer")
    outer.__cause__ = inner
    inner.__cause__ = outer  # as re-raising makes
    assert not is_retryable(wrap_as_ray_does(outer))
