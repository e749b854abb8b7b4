"""Computes how many workers of a run fit on the cluster, now and after the cluster grows."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from focus_ray.cluster.ray_private import (
    RESOURCE_KINDS,
    do_other_jobs_wait,
    has_autoscaler,
    labels_match_selector,
    read_autoscaler_limits,
    read_available_resources,
)
from focus_ray.cluster.settings import NUM_DECODE_THREADS_PER_GPU, ClusterConfig
from focus_ray.errors import TrainingError
from focus_ray.names import Log

# JSON of the resources of the job's own process; `focus-ray submit` sets it
RESERVED_RESOURCES_VARIABLE = "FOCUS_RAY_RESERVED"

# requested from an autoscaler whose limits are unknown: its own limits are usually below, and further work waits
MAX_REQUESTED = 64
# a node label with this name and the value "true", for instance on the head, says that nodes offer resources for each team
TEAM_QUOTAS_LABEL = "focus-ray/team-quotas"
TEAM_RESOURCE_PREFIX = "team-"
_RECOUNT_INTERVAL_S = 5.0
_PATIENCE_S = 5.0  # an actor that has its resources also counts as waiting while its process starts
_GROWTH_PATIENCE_S = 180.0  # a new node in a cloud usually starts in this time


def do_workers_use_gpu(config: ClusterConfig) -> bool:
    """Returns whether workers use GPUs: the value of cluster.use_gpu. For auto: whether a node for them has or can get a GPU.

    For auto, this process must be connected to the cluster, only nodes with the labels of the configuration count, and GPUs to
    which the cluster can grow count only if their number is known.
    """
    if config.use_gpu != "auto":
        return config.use_gpu
    growth = config.max_gpus if config.max_gpus is not None else read_autoscaler_limits().get("GPU", 0.0)
    return max(growth, _sum_resources(node["Resources"] for node in list_nodes(config))["GPU"]) > 0


def compute_worker_resources(config: ClusterConfig, use_gpu: bool) -> dict[str, float]:
    """Returns the resources that Ray reserves for one worker: kind ("CPU", "GPU", "memory", ...) -> amount; memory in bytes.

    On a cluster with quotas for teams, the worker also needs as many units of its team's resource as it needs CPUs.

    Args: use_gpu: whether the worker uses a GPU, the result of `do_workers_use_gpu`.

    Raises: TrainingError: the cluster has quotas for teams, and the configuration names no team, or a team without quota.
    """
    resources = {"CPU": config.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = config.gpus_per_worker
    if config.memory_gib_per_worker is not None:
        resources["memory"] = config.memory_gib_per_worker * 2**30
    quota = _find_team_resource(config)
    return {**resources, quota: config.cpus_per_worker} if quota else resources


def count_decode_threads(config: ClusterConfig, use_gpu: bool) -> int:
    """Returns how many threads of a worker decode images: cpus_per_worker, rounded down; with a GPU at least 8 for a whole GPU.

    A GPU would wait for one thread. The threads of a GPU worker may exceed the CPUs that Ray reserves, because a larger
    reservation could be more than a node with a GPU has.

    Args: use_gpu: whether the worker uses a GPU, the result of `do_workers_use_gpu`.
    """
    num_threads = max(1, int(config.cpus_per_worker))
    if not use_gpu:
        return num_threads
    return max(num_threads, math.ceil(NUM_DECODE_THREADS_PER_GPU * config.gpus_per_worker))


def make_worker_options(config: ClusterConfig, use_gpu: bool) -> dict[str, Any]:
    """Returns options of `ray.remote` with the resources and node labels that the configuration gives to one worker.

    Args: use_gpu: whether the worker uses a GPU.

    Raises: TrainingError: see `compute_worker_resources`.
    """
    resources = compute_worker_resources(config, use_gpu)
    return {
        "num_cpus": resources.pop("CPU"),
        "num_gpus": resources.pop("GPU", 0.0),
        "memory": resources.pop("memory", None),
        "resources": resources,
        "label_selector": dict(config.labels) or None,
    }


def list_nodes(config: ClusterConfig) -> list[dict[str, Any]]:
    """Returns Ray's descriptions of the running nodes that have the labels of the configuration."""
    import ray

    nodes = (node for node in ray.nodes() if node["Alive"])
    return [node for node in nodes if labels_match_selector(node.get("Labels", {}), config.labels)]


class ClusterCapacity:
    """Counts the trainings of a run, each with all of its workers, that can run on the cluster at the same time.

    A training can also be another piece of work of one worker, such as the evaluation of some images. `count_trainings` looks at
    the cluster again and again, because nodes come and go and other runs end.

    Attributes:
        use_gpu: whether workers use GPUs.
        worker: resources of one worker: kind -> amount.
    """

    def __init__(
        self,
        config: ClusterConfig,
        is_private: bool,
        log: Log = lambda message: None,
        *,
        streams: bool = False,
        share: float = 1.0,
        limit: int | None = None,
        prefix: str = "",
    ) -> None:
        """Checks that a training fits on the cluster, now or after the cluster grows. Logs the calculation.

        If not all workers of a training fit but `min_workers` do, one training at a time is started with fewer workers.

        Args:
            config: workers of one training, and their resources.
            is_private: whether the cluster belongs to this process and cannot grow.
            log: called with messages.
            streams: whether images are streamed. The stream needs one more CPU. Without this CPU, workers and stream wait for
                each other for ever (seen with Ray 2.60).
            share: share of the cluster that the run may use.
            limit: largest number of trainings; None: no limit.
            prefix: text before the names of settings in error messages.

        Raises: TrainingError: one training does not fit with its smallest allowed number of workers, not even after growth. The
            message shows the calculation. Or the team has no quota: see `compute_worker_resources`.
        """
        self.config, self.share, self.limit, self._is_private = config, share, limit, is_private
        self.use_gpu = do_workers_use_gpu(config)
        self.worker = compute_worker_resources(config, self.use_gpu)
        self._num_workers, self._stream_cpus, self._prefix = config.num_workers, int(streams), prefix
        self._reserved: dict[str, float] = json.loads(os.environ.get(RESERVED_RESOURCES_VARIABLE) or "{}")
        self._has_autoscaler = not is_private and has_autoscaler()
        self._num_allowed, self._counted_at = 1, -math.inf
        self._others_checked_at, self._others_wait_since = -math.inf, math.inf
        if config.use_gpu == "auto" and not self.use_gpu and self._has_autoscaler and config.max_gpus is None:
            log("no node has a GPU now, so workers use CPUs: set cluster.use_gpu=true to request nodes with GPUs")
        if self._count_fixed() < 1 and self._count_grown() < 1 and config.min_workers_to_start < config.num_workers:
            self._num_workers = config.min_workers_to_start
            self.limit = 1
            log(f"{config.num_workers} workers do not fit at the same time: starting with {self._num_workers} or more")
        num_fitting, num_grown = self._count_fixed(), self._count_grown()
        if max(num_fitting, num_grown) < 1:
            raise TrainingError(f"{self._describe_calculation()}: {self._give_advice()}")
        if num_fitting < 1:
            log(
                f"{self._describe_calculation()}: the run waits until it grows; to run without growth, {self._give_advice()}"
            )
        log(f"side by side: {self._describe_count(self.count_trainings(0), num_fitting)}")

    @property
    def needs(self) -> dict[str, float]:
        """Resources of one training: kind -> amount."""
        needs = {kind: self._num_workers * amount for kind, amount in self.worker.items()}
        return {**needs, "CPU": needs["CPU"] + self._stream_cpus}

    def count_trainings(self, num_running: int) -> int:
        """Returns how many trainings can run at the same time, the running ones included; at least 1.

        The cluster is asked at most every `_RECOUNT_INTERVAL_S` seconds, so the result may be some seconds old.

        On a cluster that can grow, trainings for which the autoscaler would add nodes are counted too, so that their requests
        make it add the nodes. On any other shared cluster, only resources that no other run uses are counted.

        Args: num_running: number of trainings of this run that are running.
        """
        if time.monotonic() - self._counted_at < _RECOUNT_INTERVAL_S:
            return self._num_allowed
        count = self._count_grown()
        if count == 0:
            count = self._count_fixed()
            if not self._is_private:
                count = min(count, num_running + self._count_in(self._list_resources(read_available_resources())))
        if count == math.inf:
            count = MAX_REQUESTED
        self._num_allowed = max(1, int(count) if self.limit is None else min(int(count), self.limit))
        self._counted_at = time.monotonic()
        return self._num_allowed

    def has_room_on_nodes(self) -> bool:
        """Returns whether a training fits on the present nodes, if no other run uses them."""
        return self._count_fixed() > 0

    def do_others_wait(self) -> bool:
        """Returns whether another run has waited for resources for a while, so that this run should give way.

        On a cluster with an autoscaler, this run gives way later, because a new node may come for the other run.
        """
        now = time.monotonic()
        if not self._is_private and now - self._others_checked_at >= _RECOUNT_INTERVAL_S:
            self._others_checked_at = now
            if not do_other_jobs_wait():
                self._others_wait_since = math.inf
            elif self._others_wait_since == math.inf:
                self._others_wait_since = now
        return now - self._others_wait_since >= (_GROWTH_PATIENCE_S if self._has_autoscaler else _PATIENCE_S)

    def describe_present(self) -> str:
        """Returns what the nodes for this run have now and what is free, as text."""
        total = _sum_resources(self._list_resources())
        free = _sum_resources(self._list_resources(read_available_resources()))
        has, is_free = (
            format_resources({kind: amounts.get(kind, 0.0) for kind in self.worker}) for amounts in (total, free)
        )
        nodes = f"its nodes labelled {self.config.labels} have" if self.config.labels else "the cluster has"
        return f"{nodes} {has}, of which {is_free} are free"

    def _count_fixed(self) -> int:
        """Returns how many trainings fit on the present nodes, if no other run uses them."""
        return self._count_in(self._list_resources(), self.share)

    def _count_grown(self) -> float:
        """Returns how many trainings fit after the cluster grew; infinity if its limit is unknown, 0 if it cannot grow."""
        limits = self._find_growth_limits()
        return self._count_fitting(limits, self.needs, self.share) if limits else 0

    def _list_resources(self, available: Mapping[str, Mapping[str, float]] | None = None) -> list[dict[str, float]]:
        """Returns kind -> amount for each node with the labels of the configuration.

        Args: available: id of a node -> free resources; None: all resources of the nodes.
        """
        return [
            dict(node["Resources"] if available is None else available.get(node["NodeID"], {}))
            for node in list_nodes(self.config)
        ]

    def _count_in(self, nodes: list[dict[str, float]], share: float = 1.0) -> int:
        """Returns how many trainings fit into a share of nodes. nodes: kind -> amount of each node."""
        slots = sum(int(self._count_fitting(node, self.worker)) for node in nodes)
        total = self._count_fitting(self._subtract_reserved(_sum_resources(nodes)), self.needs, share)
        return min(int(total), math.floor(slots * share / self._num_workers + 1e-9))

    def _count_fitting(self, amounts: Mapping[str, float], needs: Mapping[str, float], share: float = 1.0) -> float:
        """Returns how many times `needs` fits into a share of amounts of resources; it may be infinite."""
        ratio = share * min(amounts.get(kind, 0.0) / amount for kind, amount in needs.items())
        return ratio if ratio == math.inf else max(0, math.floor(ratio + 1e-9))

    def _subtract_reserved(self, amounts: Mapping[str, float]) -> dict[str, float]:
        """Returns kind -> amount without the resources of the job's own process."""
        return {kind: amount - self._reserved.get(kind, 0.0) for kind, amount in amounts.items()}

    def _find_growth_limits(self) -> dict[str, float]:
        """Returns the resources that the cluster can grow to: kind -> amount, infinite if unknown; empty if it cannot grow.

        The settings max_cpus and max_gpus override the limits of the autoscaler. A limit is never below the present amount.
        """
        configured = {"CPU": self.config.max_cpus, "GPU": self.config.max_gpus}
        known = {kind: amount for kind, amount in configured.items() if amount is not None}
        if self._is_private or not (known or self._has_autoscaler):
            return {}
        total = _sum_resources(self._list_resources())
        unknown = dict.fromkeys(self.needs, math.inf) if self._has_autoscaler else {**total, "memory": math.inf}
        limits = {**unknown, **({} if not self._has_autoscaler else read_autoscaler_limits()), **known}
        return self._subtract_reserved({kind: max(amount, total.get(kind, 0.0)) for kind, amount in limits.items()})

    def _describe_calculation(self) -> str:
        """Returns what a training needs and what the cluster has and can get, as text."""
        nodes = self._list_resources()
        total, limits = _sum_resources(nodes), self._find_growth_limits()
        stream_cpu = " + 1 CPU for the stream of images" if self._stream_cpus else ""
        text = f"{self._num_workers} worker(s) of {format_resources(self.worker)}{stream_cpu} need "
        text += f"{format_resources(self.needs)}; {'this machine' if self._is_private else 'the cluster'} has "
        text += format_resources({kind: total.get(kind, 0.0) for kind in self.needs})
        if any(self._reserved.values()):
            text += f", of which the job's own process uses {format_resources(self._reserved)}"
        slots = sum(int(self._count_fitting(node, self.worker)) for node in nodes)
        text += f", and room for {slots} such worker(s) on its {len(nodes)} node(s)"
        text += f" labelled {self.config.labels}" if self.config.labels else ""
        if limits and math.inf in [limits.get(kind) for kind in ("CPU", "GPU")]:
            text += ", and can grow, as far as its autoscaler allows"
        elif limits:
            text += f", and can grow to {format_resources({kind: limits.get(kind, 0.0) for kind in self.needs})}"
        return text + (f", of which a share of {self.share:g} may be used" if self.share < 1 else "")

    def _give_advice(self) -> str:
        """Returns which settings to change so that a training fits."""
        prefix = self._prefix
        advice = f"lower {prefix}cluster.num_workers or {prefix}cluster.cpus_per_worker"
        if self._stream_cpus:
            advice += f", raise {prefix}data.memory_budget_mb so that nothing is streamed"
        if self.share < 1:
            advice += ", raise cluster_share"
        if self._is_private:
            return advice + ", or set RAY_ADDRESS to a larger cluster"
        if self._find_growth_limits():
            return advice
        return advice + f", or set {prefix}cluster.max_cpus and {prefix}cluster.max_gpus to what its autoscaler can add"

    def _describe_count(self, count: int, num_fitting: int) -> str:
        """Returns how many trainings may run side by side, and how many of them have room now, as text."""
        share = f" in a share of {self.share:g} of the cluster" if self.share < 1 else ""
        growth = ", and the cluster can grow" if count > num_fitting else ""
        workers = f"{self._num_workers} worker(s) of {format_resources(self.worker)}"
        return f"up to {count}, each with {workers}{share}; room for {num_fitting} now{growth}"


def _sum_resources(nodes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Returns kind -> total amount of nodes; 0 for missing kinds of `RESOURCE_KINDS`."""
    total = dict.fromkeys(RESOURCE_KINDS, 0.0)
    for node in nodes:
        for kind, amount in node.items():
            total[kind] = total.get(kind, 0.0) + amount
    return total


def _find_team_resource(config: ClusterConfig) -> str | None:
    """Returns the name of the custom resource that limits the team of a run; None on a cluster without quotas for teams.

    A cluster has quotas if a node offers a custom resource whose name begins with `TEAM_RESOURCE_PREFIX`, or has the label
    `TEAM_QUOTAS_LABEL`. The label is for clusters whose nodes start later.

    Raises: TrainingError: the cluster has quotas, and the configuration names no team, or a team without quota.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    quotas = sorted({kind for node in nodes for kind in node["Resources"] if kind.startswith(TEAM_RESOURCE_PREFIX)})
    is_declared = any(node.get("Labels", {}).get(TEAM_QUOTAS_LABEL) == "true" for node in nodes)
    if not quotas and not is_declared:
        return None
    quota = f"{TEAM_RESOURCE_PREFIX}{config.team}"
    if config.team is None or (quota not in quotas and not is_declared):
        teams = ", ".join(name.removeprefix(TEAM_RESOURCE_PREFIX) for name in quotas) or "a team"
        raise TrainingError(
            f"cluster.team={config.team or 'null'}: this cluster has quotas for teams: set cluster.team to {teams}"
        )
    return quota


def format_resources(amounts: Mapping[str, float]) -> str:
    """Returns kind -> amount of resources as text, such as "4 CPU + 2 GiB memory"."""
    return " + ".join(
        f"{amount / 2**30:.3g} GiB memory" if kind == "memory" else f"{amount:g} {kind}"
        for kind, amount in amounts.items()
    )
