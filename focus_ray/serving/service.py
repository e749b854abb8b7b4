"""Answers requests: checks the caller, chooses the version, scores, then runs the shadow version and fills the sink."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from focus_ray.bundle.registry import Version
from focus_ray.data.images import ImageError
from focus_ray.detect.calibration import Calibration
from focus_ray.detect.pictures import Output
from focus_ray.detect.shift import describe_stream_shift
from focus_ray.errors import BundleError, DataError, RegistryError, ScoreError
from focus_ray.serving.examples import ExampleStore
from focus_ray.serving.limits import Gate
from focus_ray.serving.logs import log
from focus_ray.serving.measures import Measures
from focus_ray.serving.problems import Problem, no_such_category, not_found, unauthorised, unavailable
from focus_ray.serving.scorer import Answer
from focus_ray.serving.settings import Route, ServiceSettings
from focus_ray.serving.sink import ImageSink
from focus_ray.serving.source import Lookups, ModelSource, VersionDirectory, open_source
from focus_ray.serving.stream_shift import StreamShifts
from focus_ray.serving.tokens import Caller, Scope, TokenStore

T = TypeVar("T")
Role = Literal["answer", "canary"]
_READY_TIMEOUT_S = 2.0  # the probe of a load balancer waits for a few seconds only
_MAX_SHADOW_TASKS = 8  # at the same time; further ones are skipped, because a shadow must not slow down the answers


class ScoringBackend(Protocol):
    """Scores images: an `ImageScorer` in this process, or pools of replicas with one each."""

    async def inspect(
        self,
        version: Version,
        images: Sequence[bytes],
        output: Output = ...,
        include_map: bool = ...,
        max_pixels: int = ...,
    ) -> Answer:
        """Scores the images of a request, as `ImageScorer.inspect`."""

    async def warm(self, version: Version) -> None:
        """Loads a version, so that its first request does not wait."""


class InspectionOutcome(NamedTuple):
    """Scores of the images of a request, the version that computed them, and whether this version is the canary."""

    version: Version
    answer: Answer
    role: Role


class Service:
    """Answers the requests of one ingress replica. Methods raise Problem if they cannot answer a request."""

    def __init__(
        self,
        settings: ServiceSettings,
        backend: ScoringBackend,
        measures: Measures | None = None,
        source: ModelSource | None = None,
    ) -> None:
        """
        Args:
            backend: scores the images.
            measures: receives the metrics; None: metrics are dropped.
            source: lists and reads the models; None: the registry or folder of the settings.

        Raises:
            ConfigError: the token file cannot be read.
            DataError: the folder contains no bundle.
        """
        self.settings, self.backend, self.measures = settings, backend, measures or Measures()
        self.source = source or open_source(settings.registry, settings.bundles, settings.team, settings.refresh_s)
        self.lookups = Lookups()
        self.directory = VersionDirectory(self.source, settings.refresh_s, backend.warm, log, self.lookups)
        self.examples = ExampleStore(settings.examples)
        self.gate = Gate(settings.limits, self.measures)
        self.tokens = None
        if settings.tokens is not None:
            self.tokens = TokenStore(settings.tokens, settings.refresh_s, lambda text: log(text, level=logging.ERROR))
        self.sink = ImageSink(settings.sink, self.measures, log) if settings.sink else None
        self.shifts = StreamShifts(self.directory.manifest, self.measures, log)
        self._routes = {(route.team, route.category): route for route in settings.routes}
        self._shadow_tasks: set[asyncio.Task[None]] = set()
        self._is_ready = False
        self._readiness_task: asyncio.Task[None] | None = None
        self._background_tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts the background tasks: they write the sink and read the token file again."""
        if self.sink is not None:
            self._background_tasks.append(asyncio.create_task(self._flush_regularly()))
        if self.tokens is not None:
            self._background_tasks.append(asyncio.create_task(self.tokens.refresh_regularly()))

    async def close(self) -> None:
        """Ends the background tasks and writes the rows of the sink. Does not wait for look-ups, because one may hang."""
        for task in (*self._background_tasks, *([self._readiness_task] if self._readiness_task else [])):
            task.cancel()
        self.directory.close()
        self.lookups.close()
        if self._shadow_tasks:
            await asyncio.wait(self._shadow_tasks, timeout=10)
        await self.shifts.close()
        if self.sink is not None:
            await asyncio.to_thread(self.sink.close)

    # ---- authentication and access
    def authenticate(self, authorization: str | None) -> Caller:
        """Returns the caller of an Authorization header.

        A service without tokens accepts everyone, as a caller without the scope `admin`.

        Raises: Problem: 401, the header has no valid token.
        """
        if self.tokens is None:
            return Caller(id="anonymous", team="*", scopes=("inspect", "read"))
        caller = self.tokens.authenticate(authorization)
        if caller is None:
            raise unauthorised("send a valid token: Authorization: Bearer frs_...")
        return caller

    @staticmethod
    def check_access(caller: Caller, team: str, category: str, scope: Scope) -> None:
        """Checks that a caller may use a scope on a category of a team; the category "" stands for the whole team.

        Raises: Problem: 404, the category belongs to another team. The answer is the same for a category that does not
            exist, so that a caller cannot find out names. 403, the token does not have the scope.
        """
        if caller.team not in ("*", team):
            raise (
                no_such_category(team, category) if category else not_found(f"there is no team {team!r} for this token")
            )
        if scope not in caller.scopes:
            raise Problem(403, "forbidden", f"this token has the scopes {', '.join(caller.scopes)}; this needs {scope}")

    # ---- models and versions
    async def check_ready(self) -> None:
        """Checks that there is a model to serve.

        After the first success it always succeeds: a storage failure must not remove replicas from the load balancer.
        Before, at most one look-up runs at a time, and at most one starts every `refresh_s`, whatever the number of probes.

        Raises: Problem: 503, there is no model, or no model was read within _READY_TIMEOUT_S.
        """
        if self._is_ready:
            return
        if self._readiness_task is None:
            self._readiness_task = asyncio.create_task(self._look_up_models())
        await asyncio.wait([self._readiness_task], timeout=_READY_TIMEOUT_S)
        if not self._is_ready:
            raise unavailable("there is no model to serve here, or it cannot be read: ask who runs the service", 5.0)

    async def _look_up_models(self) -> None:
        """Looks for a model in the source and logs the reason if there is none."""
        facts = {"registry": self.settings.registry, "bundles": self.settings.bundles}
        try:
            self._is_ready |= await self.lookups.call("", self._has_models)
            reason = "there is no model"
        except Exception as error:  # any error: the next probe looks again
            reason = str(error)
        if not self._is_ready:
            log("nothing to serve", level=logging.ERROR, reason=reason, **facts)
        asyncio.get_running_loop().call_later(self.settings.refresh_s, self._allow_next_readiness_lookup)

    def _allow_next_readiness_lookup(self) -> None:
        """Forgets the last look-up of models, so that the next probe starts a new one."""
        self._readiness_task = None

    def _has_models(self) -> bool:
        """Says whether the source has a category of any team. Blocks."""
        return any(self.source.categories(team) for team in self.source.teams())

    async def list_teams(self, caller: Caller) -> list[str]:
        """Returns the team of the caller; all teams if the caller is not limited to a team."""
        if caller.team != "*":
            return [caller.team]
        return await self._call_source(self.lookups.call("", self.source.teams), "", "")

    async def list_categories(self, team: str) -> list[str]:
        """Returns the categories of a team. Raises: Problem: 503, the storage fails."""
        return await self._call_source(self.lookups.call(team, self.source.categories, team), team, "")

    async def list_versions(self, team: str, category: str) -> tuple[list[Version], dict[str, str]]:
        """Returns the versions of a category, and version names by alias.

        Raises: Problem: 404, there is no such category. 503, the storage fails.
        """
        versions = await self._call_source(
            self.lookups.call(team, self.source.versions, team, category), team, category
        )
        if not versions:
            raise no_such_category(team, category)
        return versions, await self._call_source(
            self.lookups.call(team, self.source.aliases, team, category), team, category
        )

    async def resolve(self, team: str, category: str, ref: str | None) -> Version:
        """Returns the version of a ref (version name or alias); None: the ref of the route, else the default ref.

        Raises: Problem: 404, there is no such version. 503, the storage fails.
        """
        route = self._routes.get((team, category))
        chosen_ref = ref or (route.ref if route else self.settings.default_ref)
        version = await self._call_source(self.directory.resolve(team, category, chosen_ref), team, category, ref)
        self._is_ready = True
        return version

    async def describe_version(self, version: Version) -> dict[str, Any]:
        """Returns the model card of a version, with JSON values. Readers must not learn storage paths, so it contains none."""
        manifest = await self._call_source(self.directory.manifest(version), version.team, version.category)
        calibration = Calibration.from_dict(manifest["calibration"])
        config = manifest["config"]
        shift = self.shifts.latest_shift(version)
        notice = None if shift is None else describe_stream_shift(shift)
        return {
            "team": version.team,
            "category": version.category,
            "version": version.name,
            "sha256": version.sha256,
            "created_at": manifest["created_at"],
            "published_at": version.published_at.isoformat(),
            "num_bytes": version.num_bytes,
            "num_images": manifest["moments"]["count"],
            "calibration": calibration.to_dict(),
            "caveats": [*calibration.caveats(), *([notice] if notice else [])],
            "shift": None if shift is None else shift.to_dict(),
            "model": {key: value for key, value in config["model"].items() if not key.startswith("weights")},
            "train": config["train"],
            "density": config["density"],
            "scoring": config["scoring"],
            "versions": manifest["versions"],
            "git_commit": manifest["git_commit"],
        }

    async def read_example(self, version: Version, number: int) -> bytes:
        """Returns a normal training image of a version as JPEG bytes; `number` counts the examples from 0.

        Raises: Problem: 404, the service shows no such image. 503, the storage fails.
        """
        if not self.settings.examples:
            raise not_found("this service shows no training images")
        team, category = version.team, version.category
        manifest = await self._call_source(self.directory.manifest(version), team, category)
        data = manifest.get("data")
        uri = data.get("uri") if isinstance(data, dict) else None
        example = self._start_long_call(team, self.examples.read, team, category, uri, number)
        return await self._call_source(example, team, category)

    async def promote(self, team: str, category: str, ref: str, alias: str) -> Version:
        """Moves an alias to the version of a ref and returns the version.

        Raises: Problem: 404, there is no such version, or the alias cannot be moved. 503, the storage fails.
        """
        version = await self._call_source(
            self._start_long_call(team, self.source.promote, team, category, ref, alias), team, category, ref
        )
        self.directory.forget(team, category)
        log("promoted", team=team, category=category, alias=alias, version=version.name)
        return version

    async def roll_back(self, team: str, category: str, alias: str) -> Version:
        """Moves an alias back to its previous version and returns the version. Raises: Problem: as `promote`."""
        version = await self._call_source(
            self._start_long_call(team, self.source.roll_back, team, category, alias), team, category, alias
        )
        self.directory.forget(team, category)
        log("rolled back", team=team, category=category, alias=alias, version=version.name)
        return version

    async def set_thresholds(
        self, team: str, category: str, ref: str, image: float | None, pixel: float | None, caller: Caller
    ) -> Version:
        """Publishes the same model with other thresholds and returns the new version; only the alias `latest` moves to it.

        Args:
            ref: version name or alias of the model.
            image: new image threshold; None: unchanged.
            pixel: new pixel threshold; None: unchanged.
            caller: is recorded as the author.

        Raises: Problem: 409, the service serves a folder of bundles. 404 and 503 as `resolve`.
        """
        if self.settings.registry is None:
            raise Problem(
                409,
                "not-a-registry",
                "this service serves a folder of bundles, which keeps no versions: publish to a registry and serve that, or use "
                "`focus-ray calibrate` on the bundle",
            )
        version = await self.resolve(team, category, ref)
        try:
            new_version = await self._call_source(
                self._start_long_call(team, self.source.set_thresholds, version, image, pixel, f"token {caller.id}"),
                team,
                category,
                ref,
            )
        finally:
            self.directory.forget(team, category)
        log("thresholds set", team=team, category=category, version=new_version.name, of=version.name, by=caller.id)
        return new_version

    # ---- scoring
    async def inspect(
        self,
        team: str,
        category: str,
        ref: str | None,
        images: Sequence[bytes],
        output: Output,
        include_map: bool,
        request_id: str,
    ) -> InspectionOutcome:
        """Scores images with the version of the request, else the canary (for its share), else the version of the route.

        Args:
            ref: version name or alias; None: the route decides, and canary and shadow apply.
            images: encoded files.

        Raises: Problem: 404, no such version. 500, the score is not finite. 503, the model cannot be read. 504, timeout.
        """
        route = self._routes.get((team, category))
        version, role = await self._choose_version(team, category, ref, route)
        limits = self.settings.limits
        try:
            answer = await asyncio.wait_for(
                self.backend.inspect(version, images, output, include_map, limits.max_pixels), limits.timeout_s
            )
        except asyncio.TimeoutError:
            raise Problem(
                504,
                "timeout",
                f"no answer within {self.settings.limits.timeout_s:g} s: try again",
                self.settings.limits.retry_after_s,
            ) from None
        except ScoreError as error:
            log("no finite score", level=logging.ERROR, error=error, request_id=request_id, version=version.uri)
            raise Problem(
                500, "no-score", "the model gave no finite score for an image: tell who runs the service"
            ) from None
        except (BundleError, DataError) as error:
            log("model cannot be loaded", level=logging.ERROR, error=error, request_id=request_id, version=version.uri)
            raise self._unreadable_model() from None
        self.measures.stages(answer.timings_ms)
        self.measures.results(version, answer.results, role)
        self.shifts.add(version, answer.results)
        if self.sink is not None:
            self.sink.offer(version, request_id, images, answer.results, role)
        if route is not None and route.shadow and ref is None:
            self._start_shadow(route, version, images, answer, request_id)
        return InspectionOutcome(version, answer, role)

    async def _choose_version(
        self, team: str, category: str, ref: str | None, route: Route | None
    ) -> tuple[Version, Role]:
        """Returns the version that answers, and its role. If the canary cannot be found, the normal version answers."""
        if ref is None and route is not None and route.canary and random.random() < route.canary_share:
            try:
                return await self.directory.resolve(team, category, route.canary), "canary"
            except (RegistryError, DataError) as error:
                log("no canary", level=logging.WARNING, error=str(error), team=team, category=category)
        return await self.resolve(team, category, ref), "answer"

    def _start_shadow(
        self, route: Route, version: Version, images: Sequence[bytes], answer: Answer, request_id: str
    ) -> None:
        """Starts a task that scores the images with the shadow version, for its share of the requests."""
        if random.random() >= route.shadow_share or len(self._shadow_tasks) >= _MAX_SHADOW_TASKS:
            return
        task = asyncio.create_task(self._score_in_shadow(route, version, images, answer, request_id))
        self._shadow_tasks.add(task)
        task.add_done_callback(self._shadow_tasks.discard)

    async def _score_in_shadow(
        self, route: Route, version: Version, images: Sequence[bytes], answer: Answer, request_id: str
    ) -> None:
        """Scores the images with the shadow version; logs how its results differ from the answer. Never raises."""
        try:
            assert route.shadow is not None
            shadow_version = await self.directory.resolve(route.team, route.category, route.shadow)
            if shadow_version == version:
                return
            scoring = self.backend.inspect(shadow_version, images, "json", False, self.settings.limits.max_pixels)
            shadow_answer = await asyncio.wait_for(scoring, self.settings.limits.timeout_s)
        except Exception as error:  # any error: the request already has its answer
            log("shadow failed", level=logging.WARNING, error=str(error) or type(error).__name__, request_id=request_id)
            return
        self.measures.results(shadow_version, shadow_answer.results, "shadow")
        for number, (result, shadow_result) in enumerate(zip(answer.results, shadow_answer.results, strict=True)):
            if isinstance(result, ImageError) or isinstance(shadow_result, ImageError):
                continue
            # two versions have different scales, so their scores are compared relative to their thresholds
            change = shadow_result.score_to_threshold - result.score_to_threshold
            differs = result.anomalous != shadow_result.anomalous
            self.measures.shadow_difference(shadow_version, differs, change)
            log(
                "shadow",
                request_id=request_id,
                image=number,
                team=shadow_version.team,
                category=shadow_version.category,
                version=version.name,
                shadow=shadow_version.name,
                differs=differs,
                p_value=result.p_value,
                shadow_p_value=shadow_result.p_value,
                relative_score_change=round(change, 6),
            )
        if self.sink is not None:
            self.sink.offer(shadow_version, request_id, images, shadow_answer.results, "shadow")

    # ---- helpers
    async def _call_source(self, call: Awaitable[T], team: str, category: str, ref: str | None = None) -> T:
        """Awaits a call of the source and turns its errors into problems.

        The text of an error may contain storage paths. It goes to the log, and the client gets a general message.

        Args: ref: version or alias that the client named; None: it named none.

        Raises: Problem: 404, there is no such category or version. 503, the storage fails.
        """
        try:
            return await call
        except RegistryError as error:
            log("not found", team=team, category=category, error=str(error))
            if ref is not None:
                raise not_found(
                    f"there is no version or alias {ref!r} of category {category!r} of team {team!r} that this token "
                    "opens or may move"
                ) from None
            raise no_such_category(team, category) from None
        except (BundleError, DataError) as error:
            log("storage failed", level=logging.ERROR, team=team, category=category, error=error)
            raise self._unreadable_model() from None

    def _start_long_call(self, team: str, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """Prepares a call that reads or writes more than a look-up: its time limit is the one of an answer."""
        return self.lookups.call(team, function, *arguments, timeout_s=self.settings.limits.timeout_s)

    def _unreadable_model(self) -> Problem:
        """Returns the problem for a model that cannot be read or loaded."""
        return unavailable("the model cannot be read at present: try again, or ask who runs the service", 5.0)

    async def _flush_regularly(self) -> None:
        """Writes the sink every `flush_every_s`, until it is cancelled."""
        assert self.sink is not None
        while True:
            await asyncio.sleep(self.sink.settings.flush_every_s)
            await asyncio.to_thread(self.sink.flush)
