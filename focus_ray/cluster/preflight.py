"""Checks before a run that all nodes can access the storage."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from focus_ray.errors import DataError
from focus_ray.storage.files import check_folder_access, is_s3_uri, join_path, read_bytes, remove_file, write_bytes

_PROBE_TIMEOUT_S = 120.0


def check_storage_on_nodes(reads: Sequence[str], writes: Sequence[str]) -> None:
    """Checks that every node of the cluster can read and write the storage of a run, with the credentials of the node.

    Writes small test files and deletes them. If the cluster is only this node, `reads` is not checked. A node that leaves the
    cluster during the check is not checked.

    Args:
        reads: files that must be readable.
        writes: folders in which the run writes, reads, lists and deletes files. A local folder must be shared by all nodes.

    Raises: DataError: a node lacks a permission, does not share a local folder, or does not answer in time; or this process
        cannot use a folder in `writes`.
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
