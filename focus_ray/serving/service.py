"""What stands between a request and a score: who may ask, which version answers, canary and shadow, the sink."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from focus_ray.bundle.registry import Version
from focus_ray.data.images import ImageError
from focus_ray.errors import BundleError, DataError, RegistryError, ScoreError
from focus_ray.evaluation.calibration import Calibration
from focus_ray.evaluation.shift import describe_stream_shift
from focus_ray.serving.examples import Examples
from focus_ray.serving.limits import Gate
from focus_ray.serving.logs import log
from focus_ray.serving.measures import Measures
from focus_ray.serving.problems import Problem, no_such_category, not_found, unauthorised, unavailable
from focus_ray.serving.rendering import Output
from focus_ray.serving.scorer import Answer
from focus_ray.serving.settings import Route, Settings
from focus_ray.serving.sink import ImageSink
from focus_ray.serving.source import Directory, Lookups, Source, open_source
from focus_ray.serving.stream_shift import StreamShifts
from focus_ray.serving.tokens import Caller, Scope, TokenStore

T = TypeVar("T")
Role = Literal["answer", "canary"]
_READY_TIMEOUT_S = 2.0  # a load balancer's probe waits for few seconds
_MAX_SHADOWS = 8  # under way at once; more are left out, for a shadow must not slow what answers


class Scorers(Protocol):
    """What scores: a `Scorer`, or replicas of it."""

    async def inspect(
        self,
        version: Version,
        images: Sequence[bytes],
        output: Output = ...,
        include_map: bool = ...,
        max_pixels: int = ...,
    ) -> Answer: ...

    async def warm(self, version: Version) -> None: ...


class Inspected(NamedTuple):
    version: Version
    answer: Answer
    role: Role


class Service:
    """Answers for one ingress replica. Everything raises Problem where the request cannot be answered."""

    def __init__(
        self, settings: Settings, scorers: Scorers, measures: Measures | None = None, source: Source | None = None
    ) -> None:
        """Raises: ConfigError: no token file.  DataError: no bundle in the folder."""
        self.settings, self.scorers, self.measures = settings, scorers, measures or Measures()
        self.source = source or open_source(settings.registry, settings.bundles, settings.team, settings.refresh_s)
        self.lookups = Lookups()
        self.directory = Directory(self.source, settings.refresh_s, scorers.warm, log, self.lookups)
        self.examples = Examples(settings.examples)
        self.gate = Gate(settings.limits, self.measures)
        self.tokens = None
        if settings.tokens is not None:
            self.tokens = TokenStore(settings.tokens, settings.refresh_s, lambda text: log(text, level=logging.ERROR))
        self.sink = ImageSink(settings.sink, self.measures, log) if settings.sink else None
        self.shifts = StreamShifts(self.directory.manifest, self.measures, log)
        self._routes = {(route.team, route.category): route for route in settings.routes}
        self._shadows: set[asyncio.Task[None]] = set()
        self._is_ready = False
        self._readiness: asyncio.Task[None] | None = None
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        if self.sink is not None:
            self._background.append(asyncio.create_task(self._flush_regularly()))
        if self.tokens is not None:
            self._background.append(asyncio.create_task(self.tokens.refresh_regularly()))

    async def close(self) -> None:
        """Ends what runs behind the answers, and writes what the sink holds. Waits for no look-up: one may hang."""
        for task in (*self._background, *([self._readiness] if self._readiness else [])):
            task.cancel()
        self.directory.close()
        self.lookups.close()
        if self._shadows:
            await asyncio.wait(self._shadows, timeout=10)
        await self.shifts.close()
        if self.sink is not None:
            await asyncio.to_thread(self.sink.close)

    # ---- who may ask
    def authenticate(self, authorization: str | None) -> Caller:
        """The caller; without tokens anyone, who may change nothing. Raises: Problem: 401."""
        if self.tokens is None:
            return Caller(id="anonymous", team="*", scopes=("inspect", "read"))
        caller = self.tokens.authenticate(authorization)
        if caller is None:
            raise unauthorised("send a token in force: Authorization: Bearer frs_...")
        return caller

    @staticmethod
    def check(caller: Caller, team: str, category: str, scope: Scope) -> None:
        """Raises: Problem: 404 another team's (nothing is looked up: it cannot be told from what is not there), 403."""
        if caller.team not in ("*", team):
            raise (
                no_such_category(team, category) if category else not_found(f"there is no team {team!r} for this token")
            )
        if scope not in caller.scopes:
            raise Problem(403, "forbidden", f"this token has the scopes {', '.join(caller.scopes)}; this needs {scope}")

    # ---- what is there
    async def ready(self) -> None:
        """Whether there is anything to serve. Once there was, a storage that fails takes no replica from the load balancer.

        Until then it is looked up once at a time, and every `refresh_s` at most, however often it is asked.

        Raises: Problem: 503 there is nothing, or it cannot be read, or not within _READY_TIMEOUT_S.
        """
        if self._is_ready:
            return
        if self._readiness is None:
            self._readiness = asyncio.create_task(self._look_for_models())
        await asyncio.wait([self._readiness], timeout=_READY_TIMEOUT_S)
        if not self._is_ready:
            raise unavailable("there is no model to serve here, or it cannot be read: ask who runs the service", 5.0)

    async def _look_for_models(self) -> None:
        facts = {"registry": self.settings.registry, "bundles": self.settings.bundles}
        try:
            self._is_ready |= await self.lookups.call("", self._serves_something)
            reason = "there is no model"
        except Exception as error:  # whatever it is, the next probe looks again
            reason = str(error)
        if not self._is_ready:
            log("nothing to serve", level=logging.ERROR, reason=reason, **facts)
        asyncio.get_running_loop().call_later(self.settings.refresh_s, self._forget_readiness)

    def _forget_readiness(self) -> None:
        self._readiness = None

    def _serves_something(self) -> bool:
        return any(self.source.categories(team) for team in self.source.teams())

    async def teams(self, caller: Caller) -> list[str]:
        """The caller's team; all, where the service is open to all."""
        if caller.team != "*":
            return [caller.team]
        return await self._ask(self.lookups.call("", self.source.teams), "", "")

    async def categories(self, team: str) -> list[str]:
        return await self._ask(self.lookups.call(team, self.source.categories, team), team, "")

    async def versions(self, team: str, category: str) -> tuple[list[Version], dict[str, str]]:
        found = await self._ask(self.lookups.call(team, self.source.versions, team, category), team, category)
        if not found:
            raise no_such_category(team, category)
        return found, await self._ask(self.lookups.call(team, self.source.aliases, team, category), team, category)

    async def resolve(self, team: str, category: str, ref: str | None) -> Version:
        route = self._routes.get((team, category))
        wanted = ref or (route.ref if route else self.settings.default_ref)
        version = await self._ask(self.directory.resolve(team, category, wanted), team, category, ref)
        self._is_ready = True
        return version

    async def card(self, version: Version) -> dict[str, Any]:
        """What a reader may know of a version: no place of storage is among it."""
        manifest = await self._ask(self.directory.manifest(version), version.team, version.category)
        calibration = Calibration.from_dict(manifest["calibration"])
        config = manifest["config"]
        shift = self.shifts.of(version)
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

    async def example(self, version: Version, number: int) -> bytes:
        """A normal training image, as `Examples.read`."""
        if not self.settings.examples:
            raise not_found("this service shows no training images")
        team, category = version.team, version.category
        manifest = await self._ask(self.directory.manifest(version), team, category)
        data = manifest.get("data")
        uri = data.get("uri") if isinstance(data, dict) else None
        read = self._call_long(team, self.examples.read, team, category, uri, number)
        return await self._ask(read, team, category)

    async def promote(self, team: str, category: str, ref: str, alias: str) -> Version:
        version = await self._ask(
            self._call_long(team, self.source.promote, team, category, ref, alias), team, category, ref
        )
        self.directory.forget(team, category)
        log("promoted", team=team, category=category, alias=alias, version=version.name)
        return version

    async def roll_back(self, team: str, category: str, alias: str) -> Version:
        version = await self._ask(
            self._call_long(team, self.source.roll_back, team, category, alias), team, category, alias
        )
        self.directory.forget(team, category)
        log("rolled back", team=team, category=category, alias=alias, version=version.name)
        return version

    async def set_thresholds(
        self, team: str, category: str, ref: str, image: float | None, pixel: float | None, caller: Caller
    ) -> Version:
        """A new version of the same model under thresholds that the caller chose; no alias but `latest` moves to it."""
        if self.settings.registry is None:
            raise Problem(
                409,
                "not-a-registry",
                "this service serves a folder of bundles, which keeps no versions: publish to a registry and serve that, or use "
                "`focus-ray calibrate` on the bundle",
            )
        version = await self.resolve(team, category, ref)
        try:
            made = await self._ask(
                self._call_long(team, self.source.set_thresholds, version, image, pixel, f"token {caller.id}"),
                team,
                category,
                ref,
            )
        finally:
            self.directory.forget(team, category)
        log("thresholds set", team=team, category=category, version=made.name, of=version.name, by=caller.id)
        return made

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
    ) -> Inspected:
        """Scores with the version that the request, the canary's share or the route says."""
        route = self._routes.get((team, category))
        version, role = await self._choose(team, category, ref, route)
        limits = self.settings.limits
        try:
            answer = await asyncio.wait_for(
                self.scorers.inspect(version, images, output, include_map, limits.max_pixels), limits.timeout_s
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
            raise self._no_model() from None
        self.measures.stages(answer.timings_ms)
        self.measures.results(version, answer.results, role)
        self.shifts.add(version, answer.results)
        if self.sink is not None:
            self.sink.offer(version, request_id, images, answer.results, role)
        if route is not None and route.shadow and ref is None:
            self._shadow(route, version, images, answer, request_id)
        return Inspected(version, answer, role)

    async def _choose(self, team: str, category: str, ref: str | None, route: Route | None) -> tuple[Version, Role]:
        if ref is None and route is not None and route.canary and random.random() < route.canary_share:
            try:
                return await self.directory.resolve(team, category, route.canary), "canary"
            except (RegistryError, DataError) as error:
                log("no canary", level=logging.WARNING, error=str(error), team=team, category=category)
        return await self.resolve(team, category, ref), "answer"

    def _shadow(self, route: Route, version: Version, images: Sequence[bytes], answer: Answer, request_id: str) -> None:
        if random.random() >= route.shadow_share or len(self._shadows) >= _MAX_SHADOWS:
            return
        task = asyncio.create_task(self._score_in_shadow(route, version, images, answer, request_id))
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _score_in_shadow(
        self, route: Route, version: Version, images: Sequence[bytes], answer: Answer, request_id: str
    ) -> None:
        try:
            assert route.shadow is not None
            other = await self.directory.resolve(route.team, route.category, route.shadow)
            if other == version:
                return
            asked = self.scorers.inspect(other, images, "json", False, self.settings.limits.max_pixels)
            shadow = await asyncio.wait_for(asked, self.settings.limits.timeout_s)
        except Exception as error:  # whatever it is, the request has its answer
            log("shadow failed", level=logging.WARNING, error=str(error) or type(error).__name__, request_id=request_id)
            return
        self.measures.results(other, shadow.results, "shadow")
        for number, (first, second) in enumerate(zip(answer.results, shadow.results, strict=True)):
            if isinstance(first, ImageError) or isinstance(second, ImageError):
                continue
            # scores of two versions are on two scales; what can be compared is where each stands to its threshold
            change = second.score_to_threshold - first.score_to_threshold
            differs = first.anomalous != second.anomalous
            self.measures.shadow_difference(other, differs, change)
            log(
                "shadow",
                request_id=request_id,
                image=number,
                team=other.team,
                category=other.category,
                version=version.name,
                shadow=other.name,
                differs=differs,
                p_value=first.p_value,
                shadow_p_value=second.p_value,
                relative_score_change=round(change, 6),
            )
        if self.sink is not None:
            self.sink.offer(other, request_id, images, shadow.results, "shadow")

    # ---- within
    async def _ask(self, asked: Awaitable[T], team: str, category: str, ref: str | None = None) -> T:
        """Turns a source's errors into problems; what they say of the inside is logged and not told."""
        try:
            return await asked
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
            raise self._no_model() from None

    def _call_long(self, team: str, function: Callable[..., T], *arguments: Any) -> Awaitable[T]:
        """A call that writes or reads more than a look-up does, and may take as long as an answer may."""
        return self.lookups.call(team, function, *arguments, timeout_s=self.settings.limits.timeout_s)

    def _no_model(self) -> Problem:
        return unavailable("the model cannot be read at present: try again, or ask who runs the service", 5.0)

    async def _flush_regularly(self) -> None:
        assert self.sink is not None
        while True:
            await asyncio.sleep(self.sink.settings.flush_every_s)
            await asyncio.to_thread(self.sink.flush)
