"""Checks before a run that the cluster has enough resources, and that all nodes can access the storage."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence

from focus_ray.cluster.connect import compute_worker_resources, do_workers_use_gpu, find_cluster_growth_limits
from focus_ray.cluster.ray_private import RESOURCE_KINDS
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.errors import DataError, TrainingError
from focus_ray.storage.files import check_folder_access, is_s3_uri, join_path, read_bytes, remove_file, write_bytes

RESERVED_RESOURCES_VARIABLE = (
    "FOCUS_RAY_RESERVED"  # JSON of the resources of the job's own process; `focus-ray submit` sets it
)

_PROBE_TIMEOUT_S = 120.0


def count_concurrent_trainings(
    config: ClusterConfig,
    is_private: bool,
    streams: bool = False,
    log: Callable[[str], None] = lambda message: None,
    *,
    share: float = 1.0,
    limit: int | None = None,
    prefix: str = "",
    count_growth: bool = False,
) -> int:
    """Returns how many trainings, each with all of its workers, fit on the cluster at the same time. Logs the calculation.

    If not all workers of one training fit but `min_workers` do, the result is 1. If the cluster has no room now but can grow,
    the function logs a warning and returns 1.

    Args:
        config: workers of one training, and their resources.
        is_private: whether the cluster belongs to this process and cannot grow.
        streams: whether images are streamed. The stream needs one more CPU. Without it, workers and stream wait for each other
            for ever (seen with Ray 2.60).
        log: called with messages.
        share: share of the cluster that the run may use.
        limit: largest result; None: no limit.
        prefix: text before the names of settings in error messages.
        count_growth: if at least one training fits now, also count resources that the autoscaler can add. For trainings that
            can
            start one by one as nodes arrive.

    Raises: TrainingError: not even the smallest allowed number of workers of one training fits, also after growth. The message
        shows the calculation.
    """
    import ray

    worker = compute_worker_resources(config, do_workers_use_gpu(config))
    needs = {kind: config.num_workers * amount for kind, amount in worker.items()}
    needs["CPU"] += streams
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total: dict[str, float] = {kind: float(ray.cluster_resources().get(kind, 0.0)) for kind in RESOURCE_KINDS}
    reserved = {
        kind: float(amount) for kind, amount in json.loads(os.environ.get(RESERVED_RESOURCES_VARIABLE) or "{}").items()
    }
    slots = sum(
        _count_fitting_workers(node["Resources"], worker)
        for node in nodes
        if labels_match_selector(node.get("Labels", {}), config.labels)
    )
    free = _subtract_resources(total, reserved)
    limits = {} if is_private else find_cluster_growth_limits(config, total)
    fits = min(_count_fitting_workers(free, needs, share), math.floor(slots * share / config.num_workers + 1e-9))
    grown = _count_fitting_workers(_subtract_resources(limits, reserved), needs, share) if limits else 0
    if fits < 1 and config.min_workers_to_start < config.num_workers:
        log(
            f"{config.num_workers} workers do not fit at the same time: starting with {config.min_workers_to_start} or more"
        )
        fewer = config.model_copy(update={"num_workers": config.min_workers_to_start, "min_workers": None})
        return min(
            1, count_concurrent_trainings(fewer, is_private, streams, log, share=share, limit=limit, prefix=prefix)
        )
    if fits < 1:
        stream_cpu = " + 1 CPU for the stream of images" if streams else ""
        message = f"{config.num_workers} worker(s) of {_format_resources(worker)}{stream_cpu} need {_format_resources(needs)}; "
        message += f"{'this machine' if is_private else 'the cluster'} has "
        message += _format_resources({kind: total[kind] for kind in needs})
        if any(reserved.values()):
            message += f", of which the job's own process uses {_format_resources(reserved)}"
        message += f", and room for {slots} such worker(s) on its {len(nodes)} node(s)"
        message += f" labelled {config.labels}" if config.labels else ""
        if limits:
            message += f", and can grow to {_format_resources({kind: limits.get(kind, 0.0) for kind in needs})}"
        advice = f"lower {prefix}cluster.num_workers or {prefix}cluster.cpus_per_worker"
        if streams:
            advice += f", raise {prefix}data.memory_budget_mb so that nothing is streamed"
        if share < 1:
            message += f", of which a share of {share:g} may be used"
            advice += ", raise cluster_share"
        if grown:
            log(f"WARNING: {message}: waiting for it to grow; otherwise stop, and {advice}")
            return 1
        if is_private:
            advice += ", or set RAY_ADDRESS to a larger cluster"
        elif not limits:
            advice += f", or set {prefix}cluster.max_cpus and {prefix}cluster.max_gpus to what its autoscaler can add"
        raise TrainingError(f"{message}: {advice}")
    if count_growth:
        fits = max(fits, grown)
    if limit is not None and limit < fits:
        log(f"side by side: {limit} as set; room for {fits}")
        return limit
    log(
        f"side by side: {fits} of {config.num_workers} worker(s) of {_format_resources(worker)}, in {share:g} of "
        f"{_format_resources({kind: free[kind] for kind in needs})}{', a CPU each for the stream of images' if streams else ''}"
    )
    return fits


def _subtract_resources(amounts: Mapping[str, float], reserved: Mapping[str, float]) -> dict[str, float]:
    """Returns kind of resource -> amount without the reserved amount."""
    return {kind: amount - reserved.get(kind, 0.0) for kind, amount in amounts.items()}


def _count_fitting_workers(available: Mapping[str, float], needs: Mapping[str, float], share: float = 1.0) -> int:
    """Returns how many times the needed resources fit into a share of the available resources.

    Args: available, needs: kind of resource -> amount.
    """
    ratio = min(available.get(kind, 0.0) / amount for kind, amount in needs.items())
    return math.floor(ratio * share + 1e-9)


def labels_match_selector(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Returns whether the labels of a node satisfy a label selector of Ray.

    Args:
        labels: name of a label -> value.
        selector: name of a label -> condition: value, !value, in(a,b) or !in(a,b).
    """
    for key, condition in selector.items():
        in_list = re.fullmatch(r"in\((.*)\)", condition.removeprefix("!"))
        values = [value.strip() for value in in_list[1].split(",")] if in_list else [condition.removeprefix("!")]
        if (labels.get(key) in values) == condition.startswith("!"):
            return False
    return True


def check_storage_on_nodes(reads: Sequence[str], writes: Sequence[str]) -> None:
    """Checks that every node of the cluster, with its own credentials, can read and write the storage of a run.

    It writes small test files and deletes them. If the cluster is only this node, `reads` is not checked.

    Args:
        reads: files that must be readable.
        writes: folders in which the run writes, reads, lists and deletes files. A local folder must be shared by all nodes.

    Raises: DataError: a node lacks a permission, does not share a local folder, or does not answer in time.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for folder in writes:
        check_folder_access(folder)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    this_node = ray.get_runtime_context().get_node_id()
    if [node["NodeID"] for node in nodes] == [this_node]:
        return
    tokens = {join_path(folder, f"_shared-{uuid.uuid4().hex}"): uuid.uuid4().hex.encode() for folder in writes}
    files: dict[str, bytes | None] = {**dict.fromkeys(reads), **tokens}
    task = ray.remote(num_cpus=0, max_retries=1)(_find_storage_problem)
    try:
        for file, content in tokens.items():
            write_bytes(file, content)
        answers = {}
        for node in nodes:
            on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answers[node["NodeManagerAddress"], node["NodeID"]] = task.options(scheduling_strategy=on_node).remote(
                files, list(writes)
            )
        for (address, node_id), reference in answers.items():
            try:
                reason = ray.get(reference, timeout=_PROBE_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                reason = f"no answer from its storage within {_PROBE_TIMEOUT_S:.0f} s"
            except ray.exceptions.TaskUnschedulableError:  # the node has gone, so the run will not use it
                reason = None
            except ray.exceptions.RayError as error:
                reason = None if "died" in str(error).lower() else str(error)
            if reason:
                raise DataError(f"node {address} ({node_id[:8]}): {reason}")
    finally:
        for file in tokens:
            remove_file(file)


def _find_storage_problem(files: Mapping[str, bytes | None], folders: Sequence[str]) -> str | None:
    """Checks on this node that files can be read and folders can be written. Returns the problem; None if there is none.

    Args:
        files: path of a file -> expected content; None accepts any content.
        folders: folders to write to.
    """
    try:
        for folder in folders:  # first, because only the error of a refused write gives the reason
            check_folder_access(folder)
        for file, content in files.items():
            if read_bytes(file) != content and content is not None:
                return f"{file}: differs from the file that the driver wrote"
    except FileNotFoundError as error:
        if is_s3_uri(str(error)):
            return str(error)
        return f"{error}: not a folder that all nodes share: give an s3:// URI, or the path of a shared folder"
    except DataError as error:
        return str(error)
    return None


def _format_resources(amounts: Mapping[str, float]) -> str:
    """Returns kind -> amount of resources as text, such as "4 CPU + 2 GiB memory"."""
    return " + ".join(
        f"{amount / 2**30:.3g} GiB memory" if kind == "memory" else f"{amount:g} {kind}"
        for kind, amount in amounts.items()
    )
