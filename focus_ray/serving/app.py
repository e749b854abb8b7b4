"""The Serve application: ingress replicas that take requests in, and pools of replicas that score.

import_path: focus_ray.serving.app:build
args: the fields of `Settings`
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
from focus_ray.data.images import MAX_PIXELS
from focus_ray.errors import FocusRayError
from focus_ray.serving.api import create_api
from focus_ray.serving.logs import log, set_up
from focus_ray.serving.metrics import RayMeasures
from focus_ray.serving.problems import unavailable
from focus_ray.serving.rendering import Output
from focus_ray.serving.scorer import Answer, Scorer
from focus_ray.serving.serve_private import check_serve_parts, forget_model
from focus_ray.serving.service import Scorers, Service
from focus_ray.serving.settings import Limits, Pool, Scaling, Settings, parse_settings
from focus_ray.serving.source import open_source, version_key

COMMON = "scorer"  # the pool of all categories that have none of their own
_ATTEMPTS = 4  # of a call whose replica is lost; a lost node takes several replicas at once
_ENVIRONMENT = {
    "env_vars": {
        # nothing here holds an event loop for long, so a request need not cross from one to another in a process
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
        # a request for a model that went out of memory since the last one would wait 1 to 2 s for a replica to have it
        # again before it is sent to any other (Ray 2.60)
        "RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S": "0.05",
    }
}


def _set_up() -> None:
    """Prepares the process of a replica: logs, and decoders that do not run Ray's worker script again, which imports Ray."""
    set_up()
    sys.modules["__main__"].__spec__ = ModuleSpec(
        "__main__", None
    )  # `multiprocessing` passes over a main module of that name


@serve.deployment
class ScorerReplica:
    """A replica of a pool."""

    def __init__(self, pool: dict[str, Any], device: str, preload: Sequence[Version] = ()) -> None:
        _set_up()
        self._measures = RayMeasures()
        self._scorer = Scorer(Pool.model_validate(pool), device, self._measures)
        self._scorer.models.on_drop = self._on_drop
        self._versions: dict[str, Version] = {}
        self._preload: asyncio.Task[None] | None = None
        self._first = list(preload)

    async def check_health(self) -> None:
        """Serve calls this before the first request and from time to time; pinned models are loaded by then."""
        if self._first:
            for version in self._first:
                await self._scorer.warm(version)
            self._first = []

    async def inspect(
        self, version: Version, images: Sequence[bytes], output: Output, include_map: bool, max_pixels: int
    ) -> Answer:
        started = time.perf_counter()
        await self._announce(version)
        announced_ms = 1e3 * (time.perf_counter() - started)
        answer = await self._scorer.inspect(version, images, output, include_map, max_pixels)
        answer.timings_ms["load"] = round(answer.timings_ms["load"] + announced_ms, 3)
        return answer

    async def warm(self, version: Version) -> None:
        await self._announce(version)
        await self._scorer.warm(version)

    async def _announce(self, version: Version) -> None:
        """Tells Serve's router that this version is here, so that later requests for it come here too."""
        key = version_key(version)
        self._versions[key] = version
        await self._hold(key)

    # how many are held is the byte budget's affair (`ModelCache`), so Serve's own count has no limit
    @serve.multiplexed(max_num_models_per_replica=-1)
    async def _hold(self, key: str) -> str:
        await self._scorer.models.get(self._versions[key])
        return key

    def _on_drop(self, version: Version) -> None:
        """Takes a version that had to go off Serve's list too, so that requests for it go where it still is."""
        key = version_key(version)
        self._versions.pop(key, None)
        forget_model(self, key)
        self._measures.dropped(version)


class RemoteScorers:
    """The pools, as `Service` asks them: by model, again where a replica is lost, refused where all are full."""

    def __init__(
        self,
        common: DeploymentHandle,
        pinned: dict[tuple[str, str], DeploymentHandle],
        limits: Limits,
        measures: RayMeasures,
    ) -> None:
        self._common, self._pinned, self._limits, self._measures = common, pinned, limits, measures

    async def inspect(
        self,
        version: Version,
        images: Sequence[bytes],
        output: Output = "json",
        include_map: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> Answer:
        answer: Answer = await self._call("inspect", version, list(images), output, include_map, max_pixels)
        return answer

    async def warm(self, version: Version) -> None:
        await self._call("warm", version)

    async def _call(self, method: str, version: Version, *arguments: Any) -> Any:
        """Raises: Problem: 503.  BundleError: the model cannot be loaded."""
        handle = self._pinned.get((version.team, version.category), self._common)
        target = getattr(handle.options(multiplexed_model_id=version_key(version)), method)
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await target.remote(version, *arguments)
            except BackPressureError:
                raise unavailable(
                    "all replicas have as much as they can take: try again", self._limits.retry_after_s
                ) from None
            except FocusRayError:
                raise
            except (RayActorError, DeploymentUnavailableError) as error:
                log("replica lost", level=logging.WARNING, error=str(error)[:500], attempt=attempt)
                self._measures.retried()
                await asyncio.sleep(0.1 * 2**attempt)  # scoring changes nothing, so it may be done again
            except RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, FocusRayError):
                    raise cause from None
                raise
        raise unavailable("the replicas that score were lost: try again", self._limits.retry_after_s)


@serve.deployment
@serve.ingress()
class Ingress:
    """Takes requests in: who may ask, limits, which version. Holds no model, unless it scores too."""

    def __init__(
        self, settings: dict[str, Any], common: DeploymentHandle | None, pinned: dict[str, DeploymentHandle]
    ) -> None:
        """common: the pool of all categories that are not pinned; None: this replica is one of it."""
        _set_up()
        parsed = parse_settings(settings)
        measures = RayMeasures()
        scorers: Scorers
        if common is None:
            scorers = Scorer(parsed.pool, parsed.device, measures)
        else:
            by_category = {(pin.team, category): pinned[pin.name] for pin in parsed.pins for category in pin.categories}
            scorers = RemoteScorers(common, by_category, parsed.limits, measures)
        self._service = Service(parsed, scorers, measures)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._service)


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application. `serve deploy` and `serve run` call it with a YAML's `args`.

    Raises: ConfigError: a key or value is wrong; it is named.
    """
    check_serve_parts()
    settings = parse_settings(arguments, "args of the application")
    source = open_source(settings.registry, settings.bundles, settings.team, settings.refresh_s)
    refs = {(route.team, route.category): route.ref for route in settings.routes}
    pinned = {}
    for pin in settings.pins:
        preload = [
            source.resolve(pin.team, category, refs.get((pin.team, category), settings.default_ref))
            for category in pin.categories
        ]
        pinned[pin.name] = _pool(f"pinned-{pin.name}", pin.pool, settings, preload)
    limits, pool = settings.limits, settings.pool
    together = settings.is_together
    actor: dict[str, Any] = {"num_cpus": settings.ingress_num_cpus, "runtime_env": _ENVIRONMENT}
    if together:
        actor.update(num_cpus=settings.ingress_num_cpus + pool.num_cpus, num_gpus=pool.num_gpus)
    ingress = Ingress.options(  # type: ignore[attr-defined]
        name="ingress",
        autoscaling_config=_autoscaling(pool.scaling if together else settings.ingress),
        max_ongoing_requests=limits.max_in_flight + 64,  # above the gate's, which answers with a problem document
        max_queued_requests=4 * limits.max_in_flight,
        backpressure_config={"status_code": 503, "retry_after_s": limits.retry_after_s},
        ray_actor_options=actor,
        graceful_shutdown_timeout_s=max(limits.timeout_s, pool.graceful_shutdown_s if together else 0.0),
        health_check_period_s=5,
    )
    common = None if together else _pool(COMMON, pool, settings)
    return ingress.bind(settings.model_dump(mode="json"), common, pinned)


def _pool(name: str, pool: Pool, settings: Settings, preload: Sequence[Version] = ()) -> serve.Application:
    # all that the gates let in: where more requests wait than `pool.max_ongoing_requests`, `Scorer` lets teams take turns,
    # whereas Serve's queue would let one team hold up the others
    num_admitted = settings.ingress.max_replicas * settings.limits.max_in_flight
    return ScorerReplica.options(  # type: ignore[attr-defined]
        name=name,
        autoscaling_config=_autoscaling(pool.scaling),
        max_ongoing_requests=pool.max_ongoing_requests + num_admitted,
        max_queued_requests=pool.max_queued_requests,
        ray_actor_options={"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus, "runtime_env": _ENVIRONMENT},
        graceful_shutdown_timeout_s=pool.graceful_shutdown_s,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
    ).bind(pool.model_dump(mode="json"), settings.device, list(preload))


def _autoscaling(scaling: Scaling) -> dict[str, Any]:
    return {
        "min_replicas": scaling.min_replicas,
        "max_replicas": scaling.max_replicas,
        "target_ongoing_requests": scaling.target_ongoing_requests,
        "upscale_delay_s": scaling.upscale_delay_s,
        "downscale_delay_s": scaling.downscale_delay_s,
        "downscale_to_zero_delay_s": scaling.downscale_to_zero_delay_s,
        "metrics_interval_s": scaling.metrics_interval_s,
        "look_back_period_s": max(scaling.metrics_interval_s * 5, scaling.upscale_delay_s),
    }
