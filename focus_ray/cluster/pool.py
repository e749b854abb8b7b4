"""Categories of which nothing is trained by gradient, fitted by a pool of actors, each of which takes one after the other.

A trainer of Ray Train sets up a process group, a controller and checkpoints for every category; a fit of one worker needs none of
them, and a process that is there takes the next category at once. What Ray does not do for it is small, and here: a lost actor's
category is given to another, as often as cluster.max_failures says.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from focus_ray.cluster.connect import resources_per_worker
from focus_ray.cluster.failures import reason_of, worth_another
from focus_ray.cluster.messages import Messages
from focus_ray.config import ClusterConfig
from focus_ray.errors import TrainingError

_LISTEN_S = 1.0  # between two looks at what workers tell

logger = logging.getLogger(__name__)


class Job(Protocol):
    """What an actor is given."""

    @property
    def category(self) -> str: ...


class _Fitter:
    """Runs as an actor."""

    def __init__(self, fit: Callable[[Any], None]) -> None:
        self._fit = fit

    def ready(self) -> None:
        """Answers once the process is there."""

    def fit(self, job: Any) -> None:
        self._fit(job)


@dataclass(frozen=True)
class _Task:
    """What an actor is at: a job, or None while it starts."""

    actor: Any
    job: Job | None
    since: float


def fit_in_pool(
    fit: Callable[[Any], None],
    jobs: Sequence[Job],
    config: ClusterConfig,
    use_gpu: bool,
    num_actors: int,
    messages: Messages,
    log: Callable[[str], None],
) -> dict[str, str]:
    """Calls `fit` with every job, on so many actors, which come as the cluster has room for them.

    Args: fit: what an actor calls; done twice, as after a loss, it leaves what it leaves once.

    Returns: category -> reason, of those that failed.

    Raises: TrainingError: no actor starts.
    """
    import ray

    worker = resources_per_worker(config, use_gpu)
    hired = ray.remote(
        num_cpus=worker["CPU"],
        num_gpus=worker.get("GPU", 0.0),
        memory=worker.get("memory"),
        label_selector=dict(config.labels) or None,
    )(_Fitter)
    waiting = deque(jobs)
    tasks: dict[Any, _Task] = {}
    failures: Counter[str] = Counter()
    failed: dict[str, str] = {}
    unborn = 0

    def hire() -> None:
        actor = hired.remote(fit)
        tasks[actor.ready.remote()] = _Task(actor, None, time.monotonic())

    def go_on(actor: Any) -> None:
        """Gives an actor its next job, or lets it go."""
        if waiting:
            job = waiting.popleft()
            tasks[actor.fit.remote(job)] = _Task(actor, job, time.monotonic())
        else:
            ray.kill(actor)

    def note(job: Job, error: Exception) -> None:
        failures[job.category] += 1
        if worth_another(error) and failures[job.category] <= config.max_failures:
            log(f"{job.category}: {reason_of(error)}: once more")
            waiting.append(job)
        else:
            failed[job.category] = reason_of(error)
            log(f"{job.category}: FAILED: {failed[job.category]}")

    try:
        for _ in range(min(num_actors, len(jobs))):
            hire()
        while waiting or any(task.job for task in tasks.values()):
            done, _ = ray.wait(list(tasks), num_returns=1, timeout=_LISTEN_S)
            messages.show(log)
            for reference in done:
                task = tasks.pop(reference)
                try:
                    ray.get(reference)
                except Exception as error:  # one category's failure must not end the others; it is reported at the end
                    if task.job is not None:
                        note(task.job, error)
                    elif (unborn := unborn + 1) > config.max_failures:
                        raise TrainingError(f"no process starts to fit in: {reason_of(error)}") from error
                    if isinstance(error, ray.exceptions.RayActorError):
                        ray.kill(task.actor)  # one that only does not answer is not to go on beside its successor
                        hire()
                        continue
                else:
                    if task.job is not None:
                        log(f"{task.job.category}: done in {time.monotonic() - task.since:.0f} s")
                go_on(task.actor)
    finally:
        for task in tasks.values():
            ray.kill(task.actor)
    messages.show(log)
    return failed
