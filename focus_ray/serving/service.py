"""Answers requests: checks the caller, chooses the version of the model, and scores the images.

A category may have a canary, a version that answers a share of the requests on trial, and a shadow, a version that also scores
requests but never answers. The sink stores a sample of the images. A ref is the name of a version, or an alias for a version.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, TypeVar

from focus_ray.bundle.registry import Registry, Version
from focus_ray.data.images import ImageError
from focus_ray.detect.calibration import Calibration
from focus_ray.detect.pictures import Output
from focus_ray.detect.shift import describe_stream_shift
from focus_ray.errors import BundleError, DataError, RegistryError, ScoreError
from focus_ray.serving.examples import ExampleImageReader
from focus_ray.serving.limits import RequestLimiter
from focus_ray.serving.logs import log_event
from focus_ray.serving.metrics import MetricsRecorder
from focus_ray.serving.problems import (
    RETRY_AFTER_S,
    STORAGE_RETRY_AFTER_S,
    HttpProblem,
    create_missing_category_problem,
    create_not_found_problem,
    create_unavailable_problem,
)
from focus_ray.serving.scorer import ScoringAnswer, ScoringRequest
from focus_ray.serving.settings import ServiceSettings, VersionChoice
from focus_ray.serving.sink import FLUSH_EVERY_S, ImageSink
from focus_ray.serving.source import ModelSource, StorageThreads, VersionCache, get_version_labels, open_model_source
from focus_ray.serving.stream_shift import StreamShiftDetector
from focus_ray.serving.tokens import Caller, Scope, TokenStore

T = TypeVar("T")
Role = Literal["answer", "canary"]
_READY_TIMEOUT_S = 2.0  # the probe of a load balancer waits for a few seconds only
_UNREADABLE = "the model cannot be read at present: try again, or ask who runs the service"
_MAX_SHADOW_TASKS = 8  # at the same time; further ones are skipped, because a shadow must not slow down the answers


class ScoringBackend(Protocol):
    """The interface of an object that scores images: an `ImageScorer` in this process, or pools of replicas."""

    async def inspect_images(self, request: ScoringRequest) -> ScoringAnswer:
        """Scores the images of a request, as `ImageScorer.inspect_images`.

        Raises:
            HttpProblem: 503, no replica can score the images now.
            BundleError: the version cannot be loaded.
            ScoreError: the model gives no finite score for an image.
        """

    async def warm_up_model(self, version: Version) -> None:
        """Loads a version, so that its first request does not wait.

        Raises:
            HttpProblem: 503, no replica can load the version now.
            BundleError: the version cannot be loaded.
        """


class InspectionService:
    """Answers the requests of one ingress replica, a process that receives HTTP requests.

    Methods raise `HttpProblem` if they cannot answer a request.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        backend: ScoringBackend,
        metrics: MetricsRecorder | None = None,
        source: ModelSource | None = None,
    ) -> None:
        """Prepares the service; `start` starts its background tasks.

        Args:
            backend: scores the images.
            metrics: receives the metrics; None: metrics are dropped.
            source: lists and reads the models; None: the registry or folder of the settings.

        Raises:
            ConfigError: the token file cannot be read, or a location of the setting `examples` is invalid.
            DataError: the folder contains no bundle.
            BundleError: a bundle in the folder is damaged.
        """
        self.settings, self.backend, self.metrics = settings, backend, metrics or MetricsRecorder()
        self.source = source or open_model_source(settings)
        self.storage_threads = StorageThreads()
        self.version_cache = VersionCache(self.source, settings.refresh_s, backend.warm_up_model, self.storage_threads)
        self.examples = ExampleImageReader(settings.examples)
        self.gate = RequestLimiter(settings.limits, self.metrics)
        self.tokens = TokenStore(settings.tokens, settings.refresh_s) if settings.tokens else None
        self.sink = ImageSink(settings.sink, self.metrics) if settings.sink else None
        self.shifts = StreamShiftDetector(self.version_cache.get_manifest, self.metrics)
        self._routes = {(route.team, route.category): route for route in settings.routes}
        self._shadow_tasks: set[asyncio.Task[None]] = set()
        self._ready = asyncio.Event()
        self._background_tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts the background tasks: they look for a model, store sampled images, and read the token file again regularly."""
        self._background_tasks.append(asyncio.create_task(self._wait_for_first_model()))
        if self.sink is not None:
            self._background_tasks.append(asyncio.create_task(self._flush_sink_regularly(self.sink)))
        if self.tokens is not None:
            self._background_tasks.append(asyncio.create_task(self.tokens.refresh_regularly()))

    async def close(self) -> None:
        """Ends the background tasks, waits at most 20 s for tasks that still score or test, and stores the sampled images.

        Does not wait for running look-ups in the storage, because a look-up may hang.
        """
        for task in self._background_tasks:
            task.cancel()
        self.version_cache.close()
        self.storage_threads.close()
        if self._shadow_tasks:
            await asyncio.wait(self._shadow_tasks, timeout=10)
        await self.shifts.close()
        if self.sink is not None:
            await asyncio.to_thread(self.sink.close)

    # ---- authentication and access
    def authenticate_caller(self, authorization: str | None) -> Caller:
        """Returns the caller to whom the token in an Authorization header belongs.

        A service without tokens accepts everyone, as a caller without the scope `admin`.

        Raises: HttpProblem: 401, the header has no valid token.
        """
        if self.tokens is None:
            return Caller(id="anonymous", team="*", scopes=("inspect", "read"))
        caller = self.tokens.authenticate_caller(authorization)
        if caller is None:
            detail, headers = "send a valid token: Authorization: Bearer frs_...", {"www-authenticate": "Bearer"}
            raise HttpProblem(401, "unauthorised", detail, headers=headers)
        return caller

    @staticmethod
    def check_access(caller: Caller, team: str, category: str, scope: Scope) -> None:
        """Checks that the token of a caller has a scope and opens a team.

        Args:
            category: category of the request, for the message; "" for a request about the whole team.
            scope: inspect, read or admin.

        Raises: HttpProblem: 404, the token does not open the team. The answer is the same for a category that does not exist, so
            that a caller cannot find out names. 403, the token does not have the scope.
        """
        if caller.team not in ("*", team):
            raise (
                create_missing_category_problem(team, category)
                if category
                else create_not_found_problem(f"this token opens no team {team!r}")
            )
        if scope not in caller.scopes:
            raise HttpProblem(
                403, "forbidden", f"this token has the scopes {', '.join(caller.scopes)}; this needs {scope}"
            )

    # ---- models and versions
    async def wait_until_ready(self) -> None:
        """Waits until the service has found a model, at most _READY_TIMEOUT_S seconds.

        After the first success, every later call succeeds at once: a storage failure must not remove replicas from the load
        balancer.

        Raises: HttpProblem: 503, no model was found.
        """
        try:
            await asyncio.wait_for(self._ready.wait(), _READY_TIMEOUT_S)
        except asyncio.TimeoutError:
            detail = "there is no model to serve here, or it cannot be read: ask who runs the service"
            raise create_unavailable_problem(detail, STORAGE_RETRY_AFTER_S) from None

    async def _wait_for_first_model(self) -> None:
        """Looks for a model every `refresh_s` seconds until there is one; logs the reason if there is none."""

        def has_models() -> bool:
            """Returns whether a team has a category."""
            return any(self.source.list_categories(team) for team in self.source.list_teams())

        logged_reason = None
        while not self._ready.is_set():
            reason = "there is no model"
            try:
                if await self.storage_threads.call_function("", has_models):
                    self._ready.set()
                    return
            except Exception as error:  # any error: the next look-up must still run
                reason = str(error)
            if reason != logged_reason:
                log_event("nothing to serve", level=logging.ERROR, reason=reason, registry=self.settings.registry)
                logged_reason = reason
            await asyncio.sleep(self.settings.refresh_s)

    async def list_teams(self, caller: Caller) -> list[str]:
        """Returns the team of the caller; all teams if the caller is not limited to a team.

        Raises: HttpProblem: 503, the storage fails.
        """
        if caller.team != "*":
            return [caller.team]
        return await self._call_storage("", "", self.source.list_teams)

    async def list_categories(self, team: str) -> list[str]:
        """Returns the categories of a team. Raises: HttpProblem: 503, the storage fails."""
        return await self._call_storage(team, "", self.source.list_categories, team)

    async def list_versions(self, team: str, category: str) -> tuple[list[Version], dict[str, str]]:
        """Returns the versions of a category, and a dictionary of its aliases: alias -> version name.

        Raises: HttpProblem: 404, there is no such category. 503, the storage fails.
        """
        versions = await self._call_storage(team, category, self.source.list_versions, team, category)
        if not versions:
            raise create_missing_category_problem(team, category)
        return versions, await self._call_storage(team, category, self.source.list_aliases, team, category)

    async def resolve_version(self, team: str, category: str, ref: str | None) -> Version:
        """Returns the version of a category that a version name or an alias stands for.

        Args: ref: version name or alias; None: `ref` in the settings of the category (its route), or `default_ref`.

        Raises: HttpProblem: 404, there is no such version. 503, the storage fails.
        """
        chosen_ref = ref or self._get_version_choice(team, category).ref
        version = await self._await_source_call(
            self.version_cache.resolve_version(team, category, chosen_ref), team, category, ref
        )
        self._ready.set()
        return version

    def _get_version_choice(self, team: str, category: str) -> VersionChoice:
        """Returns the settings (the route) that choose the version of a category; without a route, they name `default_ref`."""
        default = VersionChoice(team=team, category=category, ref=self.settings.default_ref)
        return self._routes.get((team, category), default)

    async def describe_version(self, version: Version) -> dict[str, Any]:
        """Returns the model card of a version, a dictionary of JSON values that describes its training and calibration.

        It contains no storage paths, because readers must not learn them.

        Raises: HttpProblem: 503, the storage fails, or the bundle is unreadable.
        """
        manifest = await self._await_source_call(
            self.version_cache.get_manifest(version), version.team, version.category
        )
        calibration = Calibration.from_dict(manifest["calibration"])
        config = manifest["config"]
        shift = self.shifts.get_latest_shift(version)
        notice = None if shift is None else describe_stream_shift(shift)
        return {
            **get_version_labels(version),
            "sha256": version.sha256,
            "created_at": manifest["created_at"],
            "published_at": version.published_at.isoformat(),
            "num_bytes": version.num_bytes,
            "num_images": manifest["moments"]["count"],
            "calibration": calibration.to_dict(),
            "caveats": [*calibration.describe_limits(), *([notice] if notice else [])],
            "shift": None if shift is None else shift.to_dict(),
            "model": {key: value for key, value in config["model"].items() if not key.startswith("weights")},
            "train": config["train"],
            "density": config["density"],
            "scoring": config["scoring"],
            "versions": manifest["versions"],
            "git_commit": manifest["git_commit"],
        }

    async def read_example_image(self, version: Version, number: int) -> bytes:
        """Returns a normal training image of a version as JPEG bytes.

        Args: number: number of the example, from 0.

        Raises: HttpProblem: 404, there is no such example, or the settings do not allow this data set. 503, the storage fails.
        """
        if not self.settings.examples:
            raise create_not_found_problem("this service shows no training images")
        team, category = version.team, version.category
        manifest = await self._await_source_call(self.version_cache.get_manifest(version), team, category)
        data = manifest.get("data")
        uri = data.get("uri") if isinstance(data, dict) else None
        limit_s = self.settings.limits.timeout_s
        return await self._call_storage(
            team, category, self.examples.read_example_image, team, category, uri, number, timeout_s=limit_s
        )

    async def promote_version(self, team: str, category: str, ref: str, alias: str) -> Version:
        """Moves an alias to a version, and returns the version.

        Args: ref: version name, or another alias of the version.

        Raises: HttpProblem: 404, there is no such version, or the alias cannot be moved. 409, the service has no registry. 503,
            the storage fails.
        """
        version = await self._call_registry_change(team, category, ref, Registry.promote, team, category, ref, alias)
        log_event("promoted", alias=alias, **get_version_labels(version))
        return version

    async def roll_back_alias(self, team: str, category: str, alias: str) -> Version:
        """Moves an alias back to its previous version, and returns this version.

        Raises: HttpProblem: 404, there is no such alias or no previous version. 409, the service has no registry. 503, the
            storage fails.
        """
        version = await self._call_registry_change(team, category, alias, Registry.roll_back, team, category, alias)
        log_event("rolled back", alias=alias, **get_version_labels(version))
        return version

    async def set_thresholds(
        self, version: Version, image_threshold: float | None, pixel_threshold: float | None, caller: Caller
    ) -> Version:
        """Publishes the same model with other thresholds, and returns the new version. Only the alias `latest` moves to it.

        Args:
            version: version to copy.
            image_threshold, pixel_threshold: new values; None: unchanged.
            caller: the token id of the caller is stored as the author.

        Raises: HttpProblem: 404, the registry refuses the new version. 409, the service has no registry. 503, the storage fails.
        """
        change = (Registry.set_thresholds, version, image_threshold, pixel_threshold, f"token {caller.id}")
        new_version = await self._call_registry_change(version.team, version.category, version.name, *change)
        log_event("thresholds set", of=version.name, by=caller.id, **get_version_labels(new_version))
        return new_version

    async def _call_registry_change(
        self, team: str, category: str, ref: str, method: Callable[..., Version], *arguments: Any
    ) -> Version:
        """Calls a method that moves an alias of a category, returns its version, and makes the next request check the aliases.

        Args:
            team, category: whose aliases expire.
            ref: version or alias that the client named, for the message.
            method: method of `Registry`, called with `arguments` in a thread.

        Raises: HttpProblem: 404, there is no such version or alias, or the alias cannot be moved. 409, the service has a folder
            of bundles instead of a registry. 503, the storage fails.
        """
        if self.settings.registry is None:
            detail = "a folder of bundles keeps no versions and aliases: serve a registry, or use `focus-ray calibrate`"
            raise HttpProblem(409, "not-a-registry", detail)
        call, limit_s = (method, self.source, *arguments), self.settings.limits.timeout_s
        try:
            return await self._call_storage(team, category, *call, ref=ref, timeout_s=limit_s)
        finally:
            self.version_cache.expire_category(team, category)

    # ---- scoring
    async def inspect_images(
        self,
        team: str,
        category: str,
        ref: str | None,
        images: Sequence[bytes],
        output: Output,
        include_map: bool,
        request_id: str,
    ) -> tuple[Version, ScoringAnswer, Role]:
        """Scores images with the version that the request names, else with the version that the settings of the category choose.

        Without `ref`, a canary may answer on trial, and a shadow version may score the images too. Also records metrics and
        offers the images to the sink, which stores a sample.

        Args:
            ref: version name or alias; None: the settings choose.
            images: encoded files.
            output: json, or the kind of picture to draw.
            include_map: whether the answer includes the values of the anomaly maps.

        Returns: the version, its answer, and its role, "answer" or "canary".

        Raises: HttpProblem: 404, no such version. 500, the score is not finite. 503, the model cannot be read, or all replicas
            are busy. 504, timeout.
        """
        route = self._get_version_choice(team, category)
        version, role = await self._choose_version(route, ref)
        limits = self.settings.limits
        request = ScoringRequest(version, images, output, include_map, limits.max_pixels)
        facts = {"request_id": request_id, "version": version.uri}
        try:
            answer = await asyncio.wait_for(self.backend.inspect_images(request), limits.timeout_s)
        except asyncio.TimeoutError:
            detail = f"no answer within {limits.timeout_s:g} s: try again"
            raise HttpProblem(504, "timeout", detail, RETRY_AFTER_S) from None
        except ScoreError as error:
            log_event("no finite score", level=logging.ERROR, error=error, **facts)
            detail = "the model gave no finite score for an image: tell who runs the service"
            raise HttpProblem(500, "no-score", detail) from None
        except (BundleError, DataError) as error:
            log_event("model cannot be loaded", level=logging.ERROR, error=error, **facts)
            raise create_unavailable_problem(_UNREADABLE, STORAGE_RETRY_AFTER_S) from None
        for stage, milliseconds in answer.timings_ms.items():
            self.metrics.record("stage_milliseconds", milliseconds, stage=stage)
        self._record_results(request, answer, role, request_id)
        self.shifts.add_scores(version, answer.results)
        if route.shadow and ref is None:
            self._start_shadow_scoring(route, request, answer, request_id)
        return version, answer, role

    def _record_results(self, request: ScoringRequest, answer: ScoringAnswer, role: str, request_id: str) -> None:
        """Records verdicts, p-values and scores of a request as metrics, and offers its images to the sink for storage.

        Args: role: answer, canary or shadow.
        """
        tags = {**get_version_labels(request.version), "role": role}
        for result in answer.results:
            if isinstance(result, ImageError):
                self.metrics.record("images", verdict="unreadable", **tags)
                continue
            self.metrics.record("images", verdict=result.verdict, **tags)
            self.metrics.record("p_value", result.p_value, **tags)
            self.metrics.record("score_to_threshold", result.score_to_threshold, **tags)
        if self.sink is not None:
            self.sink.sample_images(request.version, request_id, request.images, answer.results, role)

    async def _choose_version(self, route: VersionChoice, ref: str | None) -> tuple[Version, Role]:
        """Returns the version that answers, and its role: "canary" if the version on trial answers, otherwise "answer".

        If the canary cannot be found, the normal version answers.

        Args: ref: version name or alias from the request; None: the route decides, with the canary for a random share.

        Raises: HttpProblem: 404, there is no such version. 503, the storage fails.
        """
        team, category = route.team, route.category
        if ref is None and route.canary and random.random() < route.canary_share:
            try:
                return await self.version_cache.resolve_version(team, category, route.canary), "canary"
            except (RegistryError, DataError) as error:
                log_event("no canary", level=logging.WARNING, error=str(error), team=team, category=category)
        return await self.resolve_version(team, category, ref), "answer"

    def _start_shadow_scoring(
        self, route: VersionChoice, request: ScoringRequest, answer: ScoringAnswer, request_id: str
    ) -> None:
        """Starts a task for a random share of the requests, which scores the images also with a second, shadow version.

        Does nothing if _MAX_SHADOW_TASKS such tasks are running.
        """
        if random.random() >= route.shadow_share or len(self._shadow_tasks) >= _MAX_SHADOW_TASKS:
            return
        task = asyncio.create_task(self._score_with_shadow_version(route, request, answer, request_id))
        self._shadow_tasks.add(task)
        task.add_done_callback(self._shadow_tasks.discard)

    async def _score_with_shadow_version(
        self, route: VersionChoice, request: ScoringRequest, answer: ScoringAnswer, request_id: str
    ) -> None:
        """Scores the images of an answered request with the shadow version. Does nothing if the same version has answered.

        The results go to the metrics and the sink, and the log gets the difference from the answer. An error of the scoring is
        logged, not raised.
        """
        try:
            assert route.shadow is not None
            version = await self.version_cache.resolve_version(route.team, route.category, route.shadow)
            if version == request.version:
                return
            shadow_request = replace(request, version=version, output="json", include_map=False)
            scoring = self.backend.inspect_images(shadow_request)
            shadow_answer = await asyncio.wait_for(scoring, self.settings.limits.timeout_s)
        except Exception as error:  # any error: the request already has its answer
            log_event(
                "shadow failed", level=logging.WARNING, error=str(error) or type(error).__name__, request_id=request_id
            )
            return
        self._record_results(shadow_request, shadow_answer, "shadow", request_id)
        for number, (result, shadow_result) in enumerate(zip(answer.results, shadow_answer.results, strict=True)):
            if isinstance(result, ImageError) or isinstance(shadow_result, ImageError):
                continue
            # two versions have different scales, so their scores are compared relative to their thresholds
            change = shadow_result.score_to_threshold - result.score_to_threshold
            differs = result.anomalous != shadow_result.anomalous
            self.metrics.record("shadow_images", differs=str(differs).lower(), **get_version_labels(version))
            log_event(
                "shadow",
                request_id=request_id,
                image=number,
                shadow=version.name,
                differs=differs,
                p_value=result.p_value,
                shadow_p_value=shadow_result.p_value,
                relative_score_change=round(change, 6),
                **get_version_labels(request.version),
            )

    # ---- helpers
    async def _await_source_call(self, call: Awaitable[T], team: str, category: str, ref: str | None = None) -> T:
        """Awaits a call that reads or changes the models, returns its result, and turns its errors into problems.

        The text of an error may contain storage paths. So the text goes to the log, and the client gets a general message.

        Args: ref: version or alias that the client named; None: the client named none.

        Raises: HttpProblem: 404, there is no such category or version. 503, the storage fails.
        """
        try:
            return await call
        except RegistryError as error:
            log_event("not found", team=team, category=category, error=str(error))
            if ref is None:
                raise create_missing_category_problem(team, category) from None
            place = f"category {category!r} of team {team!r}"
            detail = f"there is no version or alias {ref!r} of {place} that this token opens or may move"
            raise create_not_found_problem(detail) from None
        except (BundleError, DataError) as error:
            log_event("storage failed", level=logging.ERROR, team=team, category=category, error=error)
            raise create_unavailable_problem(_UNREADABLE, STORAGE_RETRY_AFTER_S) from None

    async def _call_storage(
        self,
        team: str,
        category: str,
        function: Callable[..., T],
        *arguments: Any,
        ref: str | None = None,
        timeout_s: float | None = None,
    ) -> T:
        """Calls a storage function in a thread within a time limit, and returns its result (see `StorageThreads.call_function`).

        Args:
            ref: version or alias that the client named, for the message; None: the client named none.
            timeout_s: time limit; None: LOOKUP_TIMEOUT_S.

        Raises: HttpProblem: 404, there is no such category or version. 503, the storage fails or does not answer in time.
        """
        call = self.storage_threads.call_function(team, function, *arguments, timeout_s=timeout_s)
        return await self._await_source_call(call, team, category, ref)

    async def _flush_sink_regularly(self, sink: ImageSink) -> None:
        """Writes the waiting images of a sink to the storage every FLUSH_EVERY_S seconds, until the task is cancelled."""
        while True:
            await asyncio.sleep(FLUSH_EVERY_S)
            await asyncio.to_thread(sink.flush)
