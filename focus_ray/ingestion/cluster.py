"""Ingests images on a Ray cluster: tasks read, check and write pieces of the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from focus_ray.cluster.capacity import ClusterCapacity, make_worker_options
from focus_ray.cluster.connect import connect_to_ray
from focus_ray.cluster.failures import describe_root_cause
from focus_ray.cluster.preflight import check_storage_on_nodes
from focus_ray.cluster.resource_wait import ResourceWait
from focus_ray.cluster.settings import DEFAULT_CLUSTER, ClusterConfig, check_settings_have_effect
from focus_ray.errors import DataError, TrainingError
from focus_ray.ingestion.ingest import ingest
from focus_ray.ingestion.report import IngestReport
from focus_ray.names import Log
from focus_ray.storage.files import is_s3_uri

# settings of ClusterConfig that `ingest` uses
INGEST_SETTINGS = ("team", "labels", "cpus_per_worker", "memory_gib_per_worker", "max_cpus")
_RECOUNT_INTERVAL_S = 2.0  # between two looks at the number of tasks
MAX_RETRIES = 5  # of a piece after the loss of its worker or node


def map_in_ray_tasks(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    count_tasks: Callable[[int], int],
    task_options: Mapping[str, Any],
) -> Iterator[tuple[int, Any]]:
    """Generator: calls a function for each item in a separate Ray task, and yields (position, result) as the tasks finish.

    It may run several times at once, for several categories. Tasks share the CPUs of the cluster; the actors of a pool would
    keep them while another pool waits. Ray Data does not fit here either: each attempt of a task writes part files under its own
    names, and the caller must count exactly the attempt that answered. Ray Data yields the blocks of an item singly, and a
    repeated item may mix blocks of two attempts.

    Args:
        function: the function; it may run again after the loss of its worker.
        items: arguments of the calls.
        count_tasks: receives the number of tasks that run or wait, and returns the largest number of tasks at the same time.
        task_options: options of `ray.remote` for each task, from `make_worker_options`.

    Raises: DataError: the function raised it. TrainingError: the workers of an item died on every attempt. Another error of the
        function becomes Ray's RayTaskError.
    """
    import ray

    # Ray repeats a task after the loss of its worker or node, but not after an error of the function
    task = ray.remote(**task_options, max_retries=MAX_RETRIES)(function)
    item_numbers: dict[Any, int] = {}  # of the running tasks
    remaining = iter(enumerate(items))
    try:
        while True:
            num_new = max(0, count_tasks(len(item_numbers)) - len(item_numbers))
            for number, item in islice(remaining, num_new):
                item_numbers[task.remote(item)] = number
            if not item_numbers:
                return
            answers, _ = ray.wait(list(item_numbers), num_returns=1, timeout=_RECOUNT_INTERVAL_S)
            for answer in answers:
                yield item_numbers.pop(answer), ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise TrainingError(
            f"the workers of one piece of the source died on all {MAX_RETRIES + 1} attempts "
            f"({describe_root_cause(error)}): if memory "
            "is short, lower --workers. Published data stays, and the same command continues"
        ) from error
    finally:
        for unfinished_task in item_numbers:
            ray.cancel(unfinished_task, force=True)


def ingest_on_cluster(
    source: str | Path,
    destination: str | Path,
    num_workers: int | str = "auto",
    cluster: ClusterConfig = DEFAULT_CLUSTER,
    log: Log = lambda message: None,
    **options: Any,
) -> IngestReport:
    """Runs `ingest` in tasks on a Ray cluster. Report and data are the same as without a cluster.

    It joins or starts a cluster, see `cluster.connect.connect_to_ray`.

    Args:
        source: a local folder that all nodes share, or an s3:// prefix.
        destination: root of the data set, which all nodes can access.
        num_workers: largest number of tasks at the same time; auto: as many as the cluster has room for.
        cluster: resources and nodes of the tasks. Only the settings in `INGEST_SETTINGS` may differ from the defaults.
        log: called with messages.
        options: further arguments of `ingest`.

    Raises:
        DataError: as `ingest`, or `num_workers` is invalid, or a node cannot access the source or the destination.
        TrainingError: Ray does not start or answer, the cluster has no room for a task, or the workers died on every attempt.
        ConfigError: a setting in `cluster` has no effect on an ingestion.
    """
    check_settings_have_effect(cluster, INGEST_SETTINGS, "ingest")
    if num_workers != "auto" and (not isinstance(num_workers, int) or num_workers < 1):
        raise DataError(f"num_workers={num_workers!r}: expected a number of tasks, 1 or more, or auto")
    is_private = connect_to_ray(namespace=cluster.ray_namespace)
    files = () if is_s3_uri(source) else (path for path in Path(source).absolute().rglob("*") if path.is_file())
    check_storage_on_nodes([str(path) for path in islice(files, 1)], [str(destination)], cluster.labels, log)
    capacity = ClusterCapacity(cluster.model_copy(update={"use_gpu": False}), is_private, log)
    wait = ResourceWait(capacity, log)

    def count_tasks(num_tasks: int) -> int:
        """Returns the largest number of tasks now: the number that the user gave, or as many as the cluster has room for.

        A number above the present room is not lowered: waiting tasks make an autoscaler add nodes.
        """
        wait.check(num_tasks, is_working=capacity.has_room_on_nodes())
        return capacity.count_trainings(num_tasks) if num_workers == "auto" else int(num_workers)

    map_in_tasks = partial(
        map_in_ray_tasks, count_tasks=count_tasks, task_options=make_worker_options(capacity.config, use_gpu=False)
    )
    return ingest(source, destination, run=map_in_tasks, **options)
