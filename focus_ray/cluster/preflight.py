"""Whether a cluster can ever hold what a run needs, and whether its nodes reach the storage."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from focus_ray.cluster.connect import ceiling_of, resources_per_worker, uses_gpu
from focus_ray.cluster.ray_private import KINDS
from focus_ray.config import ClusterConfig
from focus_ray.errors import DataError, TrainingError
from focus_ray.storage import check_access, is_s3, join, read_bytes, remove_file, write_bytes

RESERVED = "FOCUS_RAY_RESERVED"  # JSON of resources that Ray keeps for a job's own process; set by `focus-ray submit`

_PROBE_TIMEOUT_S = 120.0


def concurrent_runs(
    config: ClusterConfig,
    private: bool,
    streams: bool = False,
    log: Callable[[str], None] = lambda message: None,
    *,
    share: float = 1.0,
    limit: int | None = None,
    prefix: str = "",
    growing: bool = False,
) -> int:
    """How many trainings, each of all of config's workers, fit side by side; the arithmetic is logged.

    Args:
        private: whether the cluster is this process's own, and so cannot grow.
        streams: whether images are streamed: what reads them needs a CPU beside the workers'. Without one, workers and
            stream wait for each other for ever (seen with Ray 2.60).
        share: of the cluster, that may be filled.  limit: no more than so many.  prefix: of the keys that advice names.
        growing: count what an autoscaler can bring too, of work that waits for it one by one.

    Raises: TrainingError: not even one ever will, on that share of what the cluster has or can grow to; with the arithmetic.
    """
    import ray

    worker = resources_per_worker(config, uses_gpu(config))
    needs = {kind: config.num_workers * amount for kind, amount in worker.items()}
    needs["CPU"] += streams
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total: dict[str, float] = {kind: float(ray.cluster_resources().get(kind, 0.0)) for kind in KINDS}
    kept = {kind: float(amount) for kind, amount in json.loads(os.environ.get(RESERVED) or "{}").items()}
    free = {kind: total[kind] - kept.get(kind, 0.0) for kind in needs}
    slots = sum(_slots(node, worker) for node in nodes if matches(node.get("Labels", {}), config.labels))
    whole = [slots / config.num_workers, *(free[kind] / amount for kind, amount in needs.items())]
    fits = math.floor(min(whole) * share + 1e-9)
    ceiling = {} if private else ceiling_of(config, total)
    if fits < 1 <= math.floor(min(whole) + 1e-9) and not _would_fit(needs, ceiling, kept, share):
        raise TrainingError(
            f"{share:g} of the cluster is too little for one of {config.num_workers} worker(s), which need "
            f"{_show(needs)} of its {_show(free)} and {config.num_workers} of its {slots} places for such a worker: "
            "raise cluster_share"
        )
    if fits < 1 and config.fewest_workers < config.num_workers:
        log(f"{config.num_workers} workers do not fit side by side: with {config.fewest_workers} or more, as they come")
        fewer = config.model_copy(update={"num_workers": config.fewest_workers, "min_workers": None})
        return min(1, concurrent_runs(fewer, private, streams, log, share=share, limit=limit, prefix=prefix))
    if growing and fits and ceiling:
        grown = min((ceiling.get(kind, 0.0) - kept.get(kind, 0.0)) / amount for kind, amount in needs.items())
        fits = max(fits, math.floor(grown * share + 1e-9))
    if fits < 1:
        message = (
            f"{config.num_workers} worker(s) of {_show(worker)}{' + 1 CPU for the stream of images' if streams else ''} "
            f"need {_show(needs)}"
        )
        labelled = f" labelled {config.labels}" if config.labels else ""
        place = "this machine" if private else "the cluster"
        there = f"{place} has {_show({kind: total[kind] for kind in needs})}"
        if any(kept.values()):
            there += f", of which {_show(kept)} for the job's own process"
        there += f", and room for {slots} such worker(s) on its {len(nodes)} node(s){labelled}"
        advice = f"lower {prefix}cluster.num_workers or {prefix}cluster.cpus_per_worker" + (
            f", raise {prefix}data.memory_budget_mb so that nothing is streamed" if streams else ""
        )
        if private:
            raise TrainingError(f"{message}; {there}: {advice}, or set RAY_ADDRESS to a larger cluster")
        if not ceiling:
            raise TrainingError(
                f"{message}; {there}, and nothing says that it grows: {advice}, or set {prefix}cluster.max_cpus and "
                f"{prefix}cluster.max_gpus to what its autoscaler can bring"
            )
        if not _would_fit(needs, ceiling, kept, share):
            most = _show({kind: ceiling.get(kind, 0.0) for kind in needs})
            part = f", of which {share:g} may be filled" if share < 1 else ""
            raise TrainingError(f"{message}; {there}, and can grow to {most}{part}: {advice}")
        log(f"WARNING: {message}; {there}: waiting for it to grow; otherwise stop, and {advice}")
        return 1
    if limit is not None and limit < fits:
        log(f"side by side: {limit} as set; room for {fits}")
        return limit
    log(
        f"side by side: {fits} of {config.num_workers} worker(s) of {_show(worker)}, in {share:g} of {_show(free)}"
        f"{', a CPU each for the stream of images' if streams else ''}"
    )
    return fits


def _would_fit(
    needs: Mapping[str, float], ceiling: Mapping[str, float], kept: Mapping[str, float], share: float
) -> bool:
    """Whether a share of what a cluster can grow to holds what is needed."""
    there = ((ceiling.get(kind, 0.0) - kept.get(kind, 0.0), amount) for kind, amount in needs.items())
    return all(most * share >= amount - 1e-9 for most, amount in there)


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels satisfy a selector, in Ray's words: value, !value, in(a,b), !in(a,b)."""
    for key, wanted in selector.items():
        listed = re.fullmatch(r"in\((.*)\)", wanted.removeprefix("!"))
        values = [value.strip() for value in listed[1].split(",")] if listed else [wanted.removeprefix("!")]
        if (labels.get(key) in values) == wanted.startswith("!"):
            return False
    return True


def probe_nodes(reads: Sequence[str], writes: Sequence[str]) -> None:
    """Tries, on every node and with its own credentials, what a run will do in its storage, before the run starts.

    Args:
        reads: files that must be readable.  writes: folders in which files are written, read, listed and deleted; a
            local one must be the same folder on all nodes.

    Raises: DataError: what a node may not do, or a local folder that a node does not see.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for place in writes:
        check_access(place)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    here = ray.get_runtime_context().get_node_id()
    if [node["NodeID"] for node in nodes] == [here]:
        return
    tokens = {join(place, f"_shared-{uuid.uuid4().hex}"): uuid.uuid4().hex.encode() for place in writes}
    files: dict[str, bytes | None] = {**dict.fromkeys(reads), **tokens}
    task = ray.remote(num_cpus=0, max_retries=1)(_probe_here)
    try:
        for file, content in tokens.items():
            write_bytes(file, content)
        waiting = {}
        for node in nodes:
            place_on = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            waiting[node["NodeManagerAddress"], node["NodeID"]] = task.options(scheduling_strategy=place_on).remote(
                files, list(writes)
            )
        for (address, node_id), reference in waiting.items():
            try:
                reason = ray.get(reference, timeout=_PROBE_TIMEOUT_S)
            except ray.exceptions.GetTimeoutError:
                reason = f"no answer from its storage within {_PROBE_TIMEOUT_S:.0f} s"
            except ray.exceptions.TaskUnschedulableError:  # the node has gone: the run will do without it
                reason = None
            except ray.exceptions.RayError as error:
                reason = None if "died" in str(error).lower() else str(error)
            if reason:
                raise DataError(f"node {address} ({node_id[:8]}): {reason}")
    finally:
        for file in tokens:
            remove_file(file)


def _probe_here(files: Mapping[str, bytes | None], folders: Sequence[str]) -> str | None:
    """Runs on a node. Returns: what is wrong there."""
    try:
        for folder in folders:  # first: what refuses a write says why, a look-up does not
            check_access(folder)
        for file, content in files.items():
            if read_bytes(file) != content and content is not None:
                return f"{file}: not the file that the driver wrote"
    except FileNotFoundError as error:
        if is_s3(str(error)):
            return str(error)
        return f"{error}: not a folder that all nodes share: give an s3:// URI, or a shared folder's path"
    except DataError as error:
        return str(error)
    return None


def _slots(node: Mapping[str, Any], worker: Mapping[str, float]) -> int:
    """How many workers a node can hold."""
    there = node["Resources"]
    return min(math.floor(there.get(kind, 0.0) / amount + 1e-9) for kind, amount in worker.items())


def _show(amounts: Mapping[str, float]) -> str:
    return " + ".join(
        f"{amount / 2**30:.3g} GiB memory" if kind == "memory" else f"{amount:g} {kind}"
        for kind, amount in amounts.items()
    )
