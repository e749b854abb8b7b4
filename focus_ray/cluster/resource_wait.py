"""Reports that a run waits for resources of the cluster, and ends the run after a limit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from focus_ray.cluster.capacity import ClusterCapacity, format_resources
from focus_ray.errors import TrainingError
from focus_ray.names import Log

MAX_WAIT_S = (
    24 * 3600.0
)  # without any running worker; long enough for another team's night run, and for a weekend's first day
_CHECK_INTERVAL_S = 5.0
_NOTICE_INTERVAL_S = 60.0


class ResourceWait:
    """Watches the workers, trainers and trials of this process that have requested resources and have not started.

    Log lines have the form "waiting for 2 x (1 CPU + 1 GPU) for 4 min; the cluster has 8 CPU + 0 GPU, of which
    4 CPU + 0 GPU are free".
    """

    def __init__(self, capacity: ClusterCapacity, log: Log, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts to watch. clock: returns a time in seconds."""
        self._capacity, self._log, self._clock = capacity, log, clock
        self._checked_at = self._noticed_at = self._began_at = clock()

    def check(self, num_starting: int = 0, is_working: bool = False) -> None:
        """Logs a line each minute while nothing of the run works and something waits for resources.

        Args:
            num_starting: number of workers that were requested and have not started.
            is_working: whether a worker of the run works.

        Raises: TrainingError: nothing of the run has worked for `MAX_WAIT_S`.
        """
        now = self._clock()
        if now - self._checked_at < _CHECK_INTERVAL_S:
            return
        self._checked_at = now
        requests, num_placed = _count_placement_groups()
        if num_starting:
            requests[format_resources(self._capacity.worker)] += num_starting
        if is_working or num_placed or not requests:
            self._began_at = self._noticed_at = now
            return
        waited_s = now - self._began_at
        if now - self._noticed_at >= _NOTICE_INTERVAL_S or waited_s >= MAX_WAIT_S:
            self._noticed_at = now
            wanted = " and ".join(f"{count} x ({text})" for text, count in requests.items())
            notice = f"waiting for {wanted} for {waited_s / 60:.0f} min; {self._capacity.describe_present()}"
            if waited_s >= MAX_WAIT_S:
                raise TrainingError(
                    f"{notice}: the run ends, because it waits for at most {MAX_WAIT_S / 3600:.0f} h. Check the limits of the "
                    "autoscaler and the other runs on the cluster, and run again with --resume"
                )
            self._log(notice)


def _count_placement_groups() -> tuple[Counter[str], int]:
    """Returns resources as text -> number of bundles that wait for these resources, and the number of placed groups, of this job.

    Ray Train reserves the resources of its workers in a placement group, and Ray Tune the resources of a trial.
    """
    import ray

    job = ray.get_runtime_context().get_job_id()
    groups = [group for name, group in ray.util.placement_group_table().items() if name.endswith(job)]
    waiting: Counter[str] = Counter()
    for group in groups:
        if group["state"] in ("PENDING", "RESCHEDULING"):
            bundles: list[Mapping[str, float]] = list(group["bundles"].values())
            waiting.update(format_resources(bundle) for bundle in bundles)
    return waiting, sum(group["state"] == "CREATED" for group in groups)
