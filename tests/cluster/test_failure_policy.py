"""Which failures of a training are retried."""

from __future__ import annotations

import pickle

import pytest

pytest.importorskip("ray")

import ray.train
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api import data_parallel_trainer
from ray.train.v2.api.exceptions import WorkerGroupError

from focus_ray.cluster.failure_policy import PermanentFailurePolicy, install
from focus_ray.cluster.failures import iter_causes
from focus_ray.errors import ConfigError, DataError, StorageError, TrainingError, WeightsError


def decide(*errors: BaseException) -> FailureDecision:
    policy = PermanentFailurePolicy(ray.train.FailureConfig(max_failures=3))
    failed = WorkerGroupError("failed", dict(enumerate(errors)))
    return policy.make_decision(pickle.loads(pickle.dumps(failed)))


def as_ray_tells(error: BaseException) -> BaseException:
    return UserExceptionWithTraceback(error, "Traceback ...")


@pytest.mark.parametrize(
    "error", [DataError("a"), ConfigError("b"), WeightsError("c"), FloatingPointError("the loss is nan")]
)
def test_permanent_errors_are_not_retried(error: BaseException) -> None:
    assert decide(as_ray_tells(error)) == FailureDecision.RAISE
    # the other workers fail of its going, which is no reason to go on
    assert decide(as_ray_tells(RuntimeError("connection closed by peer")), as_ray_tells(error)) == FailureDecision.RAISE


@pytest.mark.parametrize(
    "error",
    [
        as_ray_tells(StorageError("no connection")),
        as_ray_tells(RuntimeError("CUDA error")),
        as_ray_tells(TrainingError("the stream gave 3 of 4 batches")),
        RayActorError(),
        WorkerHealthCheckFailedError("lost", RayActorError()),
    ],
)
def test_temporary_errors_are_retried(error: BaseException) -> None:
    assert decide(error) == FailureDecision.RETRY


def test_each_cause_is_found_once_under_any_attribute_name() -> None:
    inner = DataError("inner")
    outer = RuntimeError("outer")
    outer.__cause__ = inner
    inner.__cause__ = outer  # a circle, as re-raising makes
    assert {type(cause) for cause in iter_causes(as_ray_tells(outer))} == {
        UserExceptionWithTraceback,
        RuntimeError,
        DataError,
    }


def test_trainers_use_the_policy_after_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_parallel_trainer, "create_failure_policy", None)
    install()
    assert isinstance(
        data_parallel_trainer.create_failure_policy(ray.train.FailureConfig()),  # type: ignore[misc]
        PermanentFailurePolicy,
    )
