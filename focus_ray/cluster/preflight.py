"""Checks before a run that the cluster has enough resources, and that nodes can access the storage."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from focus_ray.cluster.connect import compute_worker_resources, do_workers_use_gpu, find_cluster_growth_limits
from focus_ray.cluster.ray_private import RESOURCE_KINDS, labels_match_selector
from focus_ray.cluster.settings import ClusterConfig
from focus_ray.errors import DataError, TrainingError
from focus_ray.names import Log
from focus_ray.storage.files import check_folder_access, is_s3_uri, join_path, read_bytes, remove_file, write_bytes

# JSON of the resources of the job's own process; `focus-ray submit` sets it
RESERVED_RESOURCES_VARIABLE = "FOCUS_RAY_RESERVED"

_PROBE_TIMEOUT_S = 60.0  # S3 requests of a node are retried for about 25 s


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
        streams: whether images are streamed. The stream needs one more CPU. Without this CPU, workers and stream wait for each
            other for ever (seen with Ray 2.60).
        log: called with messages.
        share: share of the cluster that the run may use.
        limit: largest result; None: no limit.
        prefix: text before the names of settings in error messages.
        count_growth: if at least one training fits now, also count resources that the autoscaler can add. Use it for trainings
            that can start one by one as nodes arrive.

    Raises: TrainingError: one training does not fit with its smallest allowed number of workers, not even after growth. The
        message shows the calculation.
    """
    import ray

    worker = compute_worker_resources(config, do_workers_use_gpu(config))
    needs = {kind: config.num_workers * amount for kind, amount in worker.items()}
    needs["CPU"] += streams
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total: dict[str, float] = {kind: float(ray.cluster_resources().get(kind, 0.0)) for kind in RESOURCE_KINDS}
    reserved: dict[str, float] = json.loads(os.environ.get(RESERVED_RESOURCES_VARIABLE) or "{}")
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


def check_storage_on_nodes(
    reads: Sequence[str],
    writes: Sequence[str],
    labels: Mapping[str, str],
    log: Log,
    timeout_s: float = _PROBE_TIMEOUT_S,
) -> None:
    """Checks that the nodes of workers can read and write the storage of a run, with the credentials of each node.

    Writes small test files and deletes them. Nodes with other labels, or without CPUs and GPUs, are not checked. If workers
    can run only on this node, `reads` is not checked. A node that leaves the cluster during the check is not checked.

    Args:
        reads: files that must be readable.
        writes: folders in which the run writes, reads, lists and deletes files. A local folder must be shared by all nodes.
        labels: label selector of the workers, the setting cluster.labels.
        log: called with a warning for each node that does not answer while another node does; pieces of work that fail on
            this node are repeated on other nodes. Also called if the cluster has no node for workers yet.
        timeout_s: time in which all nodes must answer.

    Raises: DataError: a node lacks a permission or does not share a local folder, no node answers in time, or this process
        cannot use a folder in `writes`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for folder in writes:
        check_folder_access(folder)
    nodes = {
        node["NodeID"]: f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"
        for node in ray.nodes()
        if node["Alive"]
        and any(node["Resources"].get(kind) for kind in ("CPU", "GPU"))
        and labels_match_selector(node.get("Labels", {}), labels)
    }
    if not nodes:
        labelled = f" with the labels {dict(labels)}" if labels else ""
        log(f"note: the cluster has no node for workers{labelled} yet, so no node has tested the storage")
    if nodes.keys() <= {ray.get_runtime_context().get_node_id()}:
        return
    tokens = {join_path(folder, f"_shared-{uuid.uuid4().hex}"): uuid.uuid4().hex.encode() for folder in writes}
    files: dict[str, bytes | None] = {**dict.fromkeys(reads), **tokens}
    task = ray.remote(num_cpus=0, max_retries=1)(_find_storage_problem)
    names_by_answer: dict[Any, str] = {}  # of the nodes that have not answered
    num_usable = 0
    try:
        for file, content in tokens.items():
            write_bytes(file, content)
        for node_id, name in nodes.items():
            on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
            names_by_answer[task.options(scheduling_strategy=on_node).remote(files, list(writes))] = name
        deadline = time.monotonic() + timeout_s
        while names_by_answer:
            answers, _ = ray.wait(list(names_by_answer), timeout=max(0.0, deadline - time.monotonic()))
            if not answers:
                break
            name = names_by_answer.pop(answers[0])
            try:
                reason = ray.get(answers[0])
                num_usable += not reason
            except ray.exceptions.TaskUnschedulableError:  # the node has gone, so the run will not use it
                reason = None
            except ray.exceptions.RayError as error:
                reason = None if "died" in str(error).lower() else str(error)
            if reason:
                advice = "; cluster.labels keeps workers off nodes with other labels" if len(nodes) > 1 else ""
                raise DataError(f"{name}: {reason}{advice}")
        silent_nodes = ", ".join(names_by_answer.values())
        if silent_nodes and not num_usable:
            raise DataError(
                f"{silent_nodes}: no answer from the storage within {timeout_s:g} s, and no other node answered"
            )
        if silent_nodes:
            log(
                f"WARNING: {silent_nodes}: no answer from the storage within {timeout_s:g} s; work that fails there is "
                "repeated on other nodes"
            )
    finally:
        for answer in names_by_answer:
            ray.cancel(answer, force=True)
        for file in tokens:
            remove_file(file)


def _find_storage_problem(files: Mapping[str, bytes | None], folders: Sequence[str]) -> str | None:
    """Checks that this node can use the storage. Returns the first problem as text; None if there is none.

    Args:
        files: files that must be readable: path -> content that the file must have; None accepts any content.
        folders: folders in which this node must be able to write, read, list and delete files.
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
