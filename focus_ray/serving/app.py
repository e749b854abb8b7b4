"""The Ray Serve application: ingress replicas (processes that receive HTTP requests), and pools of replicas that score images.

In the YAML of Serve, `import_path` is focus_ray.serving.app:build, and `args` are the fields of `ServiceSettings`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from focus_ray.bundle.registry import Version
from focus_ray.errors import FocusRayError
from focus_ray.retries import compute_retry_pause_s
from focus_ray.serving.api import create_api
from focus_ray.serving.logs import configure_logging, log_event
from focus_ray.serving.metrics import MetricsRecorder, RayMetricsRecorder
from focus_ray.serving.problems import RETRY_AFTER_S, create_unavailable_problem
from focus_ray.serving.scorer import ImageScorer, ScoringAnswer, ScoringRequest
from focus_ray.serving.serve_private import check_private_serve_api, unregister_model
from focus_ray.serving.service import InspectionService, ScoringBackend
from focus_ray.serving.settings import ReplicaScaling, ScoringPool, ServiceSettings, parse_service_settings
from focus_ray.serving.source import get_version_key, open_model_source

COMMON_POOL = "scorer"  # name of the pool for all categories without their own pool
_MAX_ATTEMPTS = 4  # of a call whose replica dies; a lost node ends several replicas at the same time
MAX_QUEUED_REQUESTS = 512  # that wait for a replica; an answer would take many seconds, so further ones are refused
GRACEFUL_SHUTDOWN_S = 30.0  # a replica that stops may work on its requests for this long
_METRICS_INTERVAL_S = 2.0  # how often replicas report their load; Serve's own 10 s would delay a new replica
_ENVIRONMENT = {
    "env_vars": {
        # no code here blocks an event loop for long, so requests need no separate loop, which would cost time
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        # Ray 2.60 waits 1 to 2 s for a replica with the requested model before it chooses any other replica; this wait
        # is useless after the model was dropped from memory
        "RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S": "0.05",
    }
}


def _prepare_replica_process() -> None:
    """Sets up the logs of a replica's process, and keeps its decoder processes from importing Ray's worker script again."""
    configure_logging()
    # `multiprocessing` does not import a main module of this name in new processes
    sys.modules["__main__"].__spec__ = ModuleSpec("__main__", None)


@serve.deployment
class ScorerReplica:
    """A Serve replica that scores images: an `ImageScorer`, which also tells Serve which models are in memory."""

    def __init__(self, pool: ScoringPool, device: str, preload: Sequence[Version] = ()) -> None:
        """Creates the scorer; `check_health` loads the models of `preload`.

        Args:
            device: cpu, cuda or auto, as for `ImageScorer`.
            preload: versions to load before the first request.
        """
        _prepare_replica_process()
        self._scorer = ImageScorer(pool, device, RayMetricsRecorder())
        self._scorer.models.on_drop = self._handle_model_drop
        self._versions: dict[str, Version] = {}
        self._versions_to_preload = list(preload)

    async def check_health(self) -> None:
        """Checks the device, and loads the versions of `preload` (see the constructor) that are not loaded yet.

        Serve calls this method before it sends the first request to the replica, and every 5 s afterwards. After three failures
        in a row, Serve replaces the replica.

        Raises:
            RuntimeError, TimeoutError: the GPU cannot be used.
            BundleError: a version cannot be loaded.
        """
        await self._scorer.check_device()
        while self._versions_to_preload:
            await self._scorer.warm_up_model(self._versions_to_preload[-1])
            self._versions_to_preload.pop()

    async def inspect_images(self, request: ScoringRequest) -> ScoringAnswer:
        """Scores images as `ImageScorer.inspect_images`. The time `load` of the answer includes `_announce_model`.

        Raises: BundleError, ScoreError: as `ImageScorer.inspect_images`.
        """
        started = time.perf_counter()
        await self._announce_model(request.version)
        announced_ms = 1e3 * (time.perf_counter() - started)
        answer = await self._scorer.inspect_images(request)
        answer.timings_ms["load"] = round(answer.timings_ms["load"] + announced_ms, 3)
        return answer

    async def warm_up_model(self, version: Version) -> None:
        """Loads a version and scores a blank image with it. Raises: BundleError: the version cannot be loaded."""
        await self._announce_model(version)
        await self._scorer.warm_up_model(version)

    async def _announce_model(self, version: Version) -> None:
        """Loads a version and tells Serve that this replica has it, so that Serve prefers this replica for later requests.

        Raises: BundleError: the version cannot be loaded.
        """
        key = get_version_key(version)
        self._versions[key] = version
        await self._register_model(key)

    # Serve's limit on the number of models is off: `ModelCache` has a limit in bytes instead
    @serve.multiplexed(max_num_models_per_replica=-1)
    async def _register_model(self, key: str) -> str:
        """Loads a model by its `get_version_key`. The decorator then adds the key to Serve's list of this replica's models."""
        await self._scorer.models.get_or_load(self._versions[key])
        return key

    def _handle_model_drop(self, version: Version) -> None:
        """Removes a version that was dropped from memory from Serve's list of this replica's models.

        Serve then sends requests for the version to replicas that still have it.
        """
        key = get_version_key(version)
        self._versions.pop(key, None)
        unregister_model(self, key)


class RemoteScoringBackend:
    """Scores images in the pool of replicas of their category, and repeats a call if its replica was lost.

    Raises `HttpProblem` if all replicas are busy.
    """

    def __init__(
        self,
        common_pool: DeploymentHandle,
        pinned_pools: dict[tuple[str, str], DeploymentHandle],
        metrics: MetricsRecorder,
    ) -> None:
        """Stores the handles of the pools.

        Args:
            common_pool: scores all categories without their own pool.
            pinned_pools: (team, category) -> the category's own pool.
            metrics: receives the number of repeated calls.
        """
        self._common_pool, self._pinned_pools, self._metrics = common_pool, pinned_pools, metrics

    async def inspect_images(self, request: ScoringRequest) -> ScoringAnswer:
        """Scores images in a replica of the pool of their category, as `ImageScorer.inspect_images`.

        Raises:
            HttpProblem: 503, all replicas are busy or were lost.
            BundleError, ScoreError: as `ImageScorer.inspect_images`.
        """
        answer: ScoringAnswer = await self._call_replica("inspect_images", request.version, request)
        return answer

    async def warm_up_model(self, version: Version) -> None:
        """Loads a version in one replica of the pool of its category.

        Raises:
            HttpProblem: 503, all replicas are busy or were lost.
            BundleError: the version cannot be loaded.
        """
        await self._call_replica("warm_up_model", version, version)

    async def _call_replica(self, method: str, version: Version, argument: Any) -> Any:
        """Calls a method of a replica, preferably one that has the model of the version in memory.

        Args: argument: the argument of the method.

        Raises:
            HttpProblem: 503, all replicas are busy, or no replica could answer in _MAX_ATTEMPTS attempts.
            BundleError: the model cannot be loaded.
            ScoreError: the model gives no finite score.
            FocusRayError, RayError: any other error of the method in the replica.
        """
        handle = self._pinned_pools.get((version.team, version.category), self._common_pool)
        target = getattr(handle.options(multiplexed_model_id=get_version_key(version)), method)
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                return await target.remote(argument)
            except BackPressureError:
                raise create_unavailable_problem("all replicas are busy: try again") from None
            except FocusRayError:
                raise
            except (RayActorError, DeploymentUnavailableError) as error:
                log_event("replica lost", level=logging.WARNING, error=str(error)[:500], attempt=attempt)
                self._metrics.record("retries")
                await asyncio.sleep(compute_retry_pause_s(attempt))  # scoring has no side effects, so a retry is safe
            except RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, FocusRayError):
                    raise cause from None
                raise
        raise create_unavailable_problem("the scoring replicas were lost: try again")


@serve.deployment
@serve.ingress()
class IngressReplica:
    """A Serve replica that receives HTTP requests. It has models only if there are no separate scoring replicas."""

    def __init__(
        self, settings: ServiceSettings, common_pool: DeploymentHandle | None, pinned_pools: dict[str, DeploymentHandle]
    ) -> None:
        """Creates the service of this replica, with the scoring in this process or in the pools.

        Args:
            common_pool: pool of all categories without their own pool; None: this replica scores all images itself.
            pinned_pools: name of a pin (categories with their own replicas) -> its pool.

        Raises:
            ConfigError: the token file cannot be read, or a location of `examples` is invalid.
            DataError, BundleError: the folder with bundles contains no bundle, or a damaged one.
        """
        _prepare_replica_process()
        metrics = RayMetricsRecorder()
        backend: ScoringBackend
        self._scorer: ImageScorer | None = None
        if common_pool is None:
            backend = self._scorer = ImageScorer(settings.pool, settings.device, metrics)
        else:
            by_category = {
                (pin.team, category): pinned_pools[pin.name] for pin in settings.pins for category in pin.categories
            }
            backend = RemoteScoringBackend(common_pool, by_category, metrics)
        self._service = InspectionService(settings, backend, metrics)

    async def check_health(self) -> None:
        """Checks the device if this replica scores images itself. Serve calls this method every 5 s.

        Raises: RuntimeError, TimeoutError: the GPU cannot be used.
        """
        if self._scorer is not None:
            await self._scorer.check_device()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Creates the HTTP application; Serve calls it once."""
        return create_api(self._service)


def build(arguments: dict[str, Any]) -> serve.Application:
    """Creates the Serve application. `serve deploy` and `serve run` call this function with the `args` of a YAML file.

    Args: arguments: fields of `ServiceSettings`.

    Raises:
        ConfigError: a key or value is wrong; the message names it.
        TrainingError: the installed Ray lacks a private function that the service uses.
        DataError: the folder with bundles contains no bundle, or the storage fails.
        BundleError: a bundle in the folder is damaged.
        RegistryError: there is no version to preload for a pinned category.
    """
    check_private_serve_api()
    settings = parse_service_settings(arguments, "args of the application")
    source = open_model_source(settings)
    refs = {(route.team, route.category): route.ref for route in settings.routes}
    pinned_pools = {}
    for pin in settings.pins:
        preload = [
            source.resolve(pin.team, category, refs.get((pin.team, category), settings.default_ref))
            for category in pin.categories
        ]
        pinned_pools[pin.name] = _create_scoring_pool(f"pinned-{pin.name}", pin.pool, settings, preload)
    limits, pool = settings.limits, settings.pool
    together = settings.has_single_replica
    if together:
        actor = _create_actor_options(settings.ingress_num_cpus + pool.num_cpus, pool.num_gpus, settings, pool.labels)
    else:
        actor = _create_actor_options(settings.ingress_num_cpus, 0.0, settings, {})
    scaling = pool.scaling if together else settings.ingress
    ingress = IngressReplica.options(  # type: ignore[attr-defined]
        name="ingress",
        autoscaling_config=_create_autoscaling_config(scaling),
        max_replicas_per_node=scaling.max_replicas_per_node,
        # above the limit of `RequestLimiter`, so that `RequestLimiter` refuses first, with a problem document
        max_ongoing_requests=limits.max_in_flight + 64,
        max_queued_requests=4 * limits.max_in_flight,
        backpressure_config={"status_code": 503, "retry_after_s": float(RETRY_AFTER_S)},
        ray_actor_options=actor,
        graceful_shutdown_timeout_s=max(limits.timeout_s, GRACEFUL_SHUTDOWN_S if together else 0.0),
        health_check_period_s=5,
    )
    common_pool = None if together else _create_scoring_pool(COMMON_POOL, pool, settings)
    return ingress.bind(settings, common_pool, pinned_pools)


def _create_scoring_pool(
    name: str, pool: ScoringPool, settings: ServiceSettings, preload: Sequence[Version] = ()
) -> serve.Application:
    """Creates a pool: a Serve deployment of replicas that score images, and load `preload` before their first request.

    Args: name: name of the deployment.
    """
    # A replica accepts every request that the gates admit. `ImageScorer` then serves waiting teams in turn. In Serve's
    # queue, one team could block the others.
    num_admitted = settings.ingress.max_replicas * settings.limits.max_in_flight
    return ScorerReplica.options(  # type: ignore[attr-defined]
        name=name,
        autoscaling_config=_create_autoscaling_config(pool.scaling),
        max_replicas_per_node=pool.scaling.max_replicas_per_node,
        max_ongoing_requests=pool.max_ongoing_requests + num_admitted,
        max_queued_requests=MAX_QUEUED_REQUESTS,
        ray_actor_options=_create_actor_options(pool.num_cpus, pool.num_gpus, settings, pool.labels),
        graceful_shutdown_timeout_s=GRACEFUL_SHUTDOWN_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
    ).bind(pool, settings.device, list(preload))


def _create_actor_options(
    num_cpus: float, num_gpus: float, settings: ServiceSettings, labels: dict[str, str]
) -> dict[str, Any]:
    """Returns the `ray_actor_options` of a deployment.

    Args: labels: labels of its nodes, in addition to those of the settings.
    """
    return {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "label_selector": {**settings.labels, **labels},
        "runtime_env": _ENVIRONMENT,
    }


def _create_autoscaling_config(scaling: ReplicaScaling) -> dict[str, Any]:
    """Returns the settings of a `ReplicaScaling` as an `autoscaling_config` of Serve."""
    return {
        **scaling.model_dump(exclude={"max_replicas_per_node"}),  # an option of the deployment itself
        "metrics_interval_s": _METRICS_INTERVAL_S,
        "look_back_period_s": max(5 * _METRICS_INTERVAL_S, scaling.upscale_delay_s),
    }
