"""Checks before a run that nodes can access the storage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from focus_ray.cluster.ray_private import labels_match_selector
from focus_ray.errors import DataError
from focus_ray.names import Log
from focus_ray.storage.files import check_folder_access, is_s3_uri, join_path, read_bytes, remove_file, write_bytes

_PROBE_TIMEOUT_S = 60.0  # S3 requests of a node are retried for about 25 s


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
