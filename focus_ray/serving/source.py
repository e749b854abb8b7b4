"""Where models come from: a registry, or a folder of bundles that is served as if it were one; and what is known of both."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakValueDictionary

from focus_ray.bundle.bundle import find_bundles, read_manifest, stamp_bundles
from focus_ray.bundle.registry import LATEST, Registry, Version
from focus_ray.errors import BundleError, DataError, RegistryError
from focus_ray.storage import FileStamp

T = TypeVar("T")
TRUST_S = 600.0  # older look-ups are made again whatever the marks say: an older focus_ray publishes without any
LOOKUP_TIMEOUT_S = 10.0  # a request waits this long for the storage; the storage itself may try for minutes
LOOKUPS_PER_TEAM, _LOOKUP_THREADS = 4, 32  # at once
_REFRESH_THREADS = 4
_SETTLED_S = 60.0  # a stamp tells a change once its file is older than what clocks differ by and S3's seconds hide


class Source(Protocol):
    """What the service asks of a registry. Raises: RegistryError: not there.  DataError: the storage fails."""

    def teams(self) -> list[str]: ...

    def categories(self, team: str) -> list[str]: ...

    def versions(self, team: str, category: str) -> list[Version]: ...

    def aliases(self, team: str, category: str) -> dict[str, str]: ...

    def resolve(self, team: str, category: str, ref: str = ...) -> Version: ...

    def marks(self, team: str) -> dict[str, str]:
        """Category -> what stays the same while its names stand for what they did; without those that must be looked up."""

    def promote(self, team: str, category: str, ref: str, alias: str) -> Version: ...

    def roll_back(self, team: str, category: str, alias: str) -> Version: ...

    def set_thresholds(
        self, version: Version, image_threshold: float | None, pixel_threshold: float | None, by: str
    ) -> Version: ...


class FolderSource:
    """A bundle, or a run's folder, as a registry of one team; a category's one version is named by its hash.

    One listing answers for all categories until it is `refresh_s` old; manifests are read once, and again where one has changed.
    """

    def __init__(self, place: str, team: str, refresh_s: float = 0.0) -> None:
        """Raises: DataError: no bundle there."""
        self.place, self.team, self.refresh_s = place, team, refresh_s
        self._lock = threading.Lock()  # threads that ask at once share a listing
        self._read: dict[str, _Read] = {}
        self._versions: dict[str, Version] = {}
        self._listed = float("-inf")
        find_bundles(place)  # looks no deeper than bundles lie, so that a place named by mistake fails at once

    def teams(self) -> list[str]:
        return [self.team]

    def categories(self, team: str) -> list[str]:
        return sorted(self._known(self.refresh_s)) if team == self.team else []

    def versions(self, team: str, category: str) -> list[Version]:
        version = self._known(self.refresh_s).get(category) if team == self.team else None
        return [version] if version else []

    def aliases(self, team: str, category: str) -> dict[str, str]:
        versions = self.versions(team, category)
        return {LATEST: versions[0].name} if versions else {}

    def resolve(self, team: str, category: str, ref: str = LATEST) -> Version:
        for version in self.versions(team, category):
            if ref in (LATEST, version.name):
                return version
        raise RegistryError(f"{self.place}: there is no {ref!r} of category {category!r}")

    def marks(self, team: str) -> dict[str, str]:
        """Looks now: who keeps the marks counts from when they were asked for."""
        known = self._known(0.0) if team == self.team else {}
        return {category: version_key(version) for category, version in known.items()}

    def promote(self, team: str, category: str, ref: str, alias: str) -> Version:
        raise RegistryError("a folder of bundles has no aliases to move: serve a registry")

    def roll_back(self, team: str, category: str, alias: str) -> Version:
        raise RegistryError("a folder of bundles has no aliases to move: serve a registry")

    def set_thresholds(
        self, version: Version, image_threshold: float | None, pixel_threshold: float | None, by: str
    ) -> Version:
        raise RegistryError(
            "a folder of bundles keeps no versions, so thresholds are not saved in it: serve a registry"
        )

    def _known(self, max_age_s: float) -> dict[str, Version]:
        """Category -> version, of a listing that is younger. Raises: DataError: no bundle there, or one is damaged."""
        with self._lock:
            now = time.monotonic()
            if now - self._listed >= max_age_s:
                found = stamp_bundles(self.place)
                if not found:
                    find_bundles(self.place)  # says what is wrong with the place
                self._read = {uri: self._read_again(uri, stamp) for uri, stamp in found.items()}
                self._versions = {one.version.category: one.version for one in self._read.values()}
                self._listed = now
            return self._versions

    def _read_again(self, uri: str, stamp: FileStamp) -> _Read:
        former = self._read.get(uri)
        if former is not None and former.is_settled and former.stamp == stamp:
            return former
        is_settled = time.time() - stamp.mtime_ns / 1e9 > _SETTLED_S
        manifest = read_manifest(uri)
        size = sum(int(entry["num_bytes"]) for entry in manifest["files"].values())
        made, sha256 = datetime.fromisoformat(manifest["created_at"]), str(manifest["sha256"])
        version = Version(self.team, str(manifest["category"]), sha256[:16], uri, sha256, made, size)
        return _Read(stamp, is_settled, version)


class _Read(NamedTuple):
    """A manifest that was read. is_settled: with this stamp it cannot have changed since."""

    stamp: FileStamp
    is_settled: bool
    version: Version


def open_source(registry: str | None, bundles: str | None, team: str, refresh_s: float) -> Source:
    """Raises: DataError: no bundle in the folder."""
    if registry is not None:
        return Registry(registry)
    assert bundles is not None
    return FolderSource(bundles, team, refresh_s)


def version_key(version: Version) -> str:
    """Names one artifact in one place: what a model is cached, routed and told apart by."""
    return f"{version.team}/{version.category}/{version.name}/{version.sha256[:16]}"


class Lookups:
    """Calls of the storage that requests wait for: on threads of their own, bounded in time and for each team."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="lookup")
        self._places: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()  # of teams that wait

    async def call(self, team: str, function: Callable[..., T], *arguments: Any, timeout_s: float | None = None) -> T:
        """Calls a function that blocks. A call that hangs keeps its place, so that a team never has more threads.

        Args: timeout_s: None takes LOOKUP_TIMEOUT_S.

        Raises: DataError: no answer in time, the wait for a place included.
        """
        limit_s, loop = timeout_s or LOOKUP_TIMEOUT_S, asyncio.get_running_loop()
        places = self._places.get(team)
        if places is None:
            places = self._places[team] = asyncio.Semaphore(LOOKUPS_PER_TEAM)

        def leave(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop ended before the call
                loop.call_soon_threadsafe(places.release)

        async def ask() -> T:
            await places.acquire()
            future = self._threads.submit(function, *arguments)
            future.add_done_callback(leave)
            return await asyncio.wrap_future(future)

        try:
            return await asyncio.wait_for(ask(), limit_s)
        except asyncio.TimeoutError:
            raise DataError(f"the storage did not answer within {limit_s:g} s") from None

    def close(self) -> None:
        """Waits for no call: one may hang."""
        self._threads.shutdown(wait=False, cancel_futures=True)


@dataclass
class _Entry:
    """mark: its category's, from before it was looked up; None: there was none.  resolved: when it was looked up.
    checked: when it was last asked whether it holds."""

    version: Version
    mark: str | None
    resolved: float
    checked: float
    task: asyncio.Task[None] | None = None


class _Marks(NamedTuple):
    asked: float
    of: dict[str, str]


class Directory:
    """Which version an alias stands for, checked every `refresh_s` behind the answers.

    A check asks for the team's marks, once for all its categories, and looks up again what these say has changed. A request
    never waits for a look-up that has been made before, and goes on with what is known while the storage fails.
    When an alias has moved, the new version is warmed first and answers only then, so that a promotion costs no request.
    """

    def __init__(
        self,
        source: Source,
        refresh_s: float,
        warm: Callable[[Version], Awaitable[None]],
        log: Callable[..., None] = lambda message, **facts: None,
        lookups: Lookups | None = None,
    ) -> None:
        """lookups: for what requests wait for; refreshes have threads of their own."""
        self.source, self.refresh_s, self.warm, self.log = source, refresh_s, warm, log
        self.lookups = lookups or Lookups()
        self._threads = ThreadPoolExecutor(_REFRESH_THREADS, thread_name_prefix="refresh")
        self._entries: dict[tuple[str, str, str], _Entry] = {}
        self._manifests: dict[str, dict[str, Any]] = {}
        self._marks: dict[str, _Marks] = {}  # of teams that have something: others are never asked for
        self._asking: dict[str, asyncio.Task[_Marks]] = {}

    async def resolve(self, team: str, category: str, ref: str) -> Version:
        """Raises: RegistryError: nothing of that name.  DataError: the storage fails, and nothing is known yet."""
        key = (team, category, ref)
        entry = self._entries.get(key)
        if entry is None:
            known, now = self._marks.get(team), time.monotonic()
            mark, checked = (known.of.get(category), known.asked) if known else (None, float("-inf"))
            version = await self.lookups.call(team, self.source.resolve, team, category, ref)
            entry = self._entries[key] = _Entry(version, mark, now, checked)
        elif entry.task is None and time.monotonic() - entry.checked >= self.refresh_s:
            entry.task = asyncio.create_task(self._refresh(key, entry))
        return entry.version

    async def _refresh(self, key: tuple[str, str, str], entry: _Entry) -> None:
        facts = dict(zip(("team", "category", "ref"), key, strict=True))
        now = checked = time.monotonic()
        try:
            marks = await self._marks_of(key[0])
            mark = marks.of.get(key[1])
            if mark is None or mark != entry.mark or now - entry.resolved >= TRUST_S:
                version = await self._call(self.source.resolve, *key)
                if version_key(version) != version_key(entry.version):
                    await self.warm(version)
                    self.log("alias moved", former=entry.version.name, version=version.name, **facts)
                    entry.version = version
                entry.mark, entry.resolved = mark, now
            else:
                checked = marks.asked  # what has changed since is not in them
        except RegistryError:
            self._entries.pop(key, None)  # gone: the next request is told so
        except Exception as error:  # whatever it is, what is known goes on answering
            self.log("version not refreshed", error=str(error), **facts)
        finally:
            entry.checked, entry.task = checked, None

    async def _marks_of(self, team: str) -> _Marks:
        """The team's marks, not older than `refresh_s`; those who ask at once share an answer."""
        known = self._marks.get(team)
        if known is not None and time.monotonic() - known.asked < self.refresh_s:
            return known
        task = self._asking.get(team)
        if task is None:
            task = self._asking[team] = asyncio.create_task(self._ask_for_marks(team))
            task.add_done_callback(lambda _: self._asking.pop(team, None))
        return await asyncio.shield(task)

    async def _ask_for_marks(self, team: str) -> _Marks:
        marks = _Marks(time.monotonic(), await self._call(self.source.marks, team))
        self._marks[team] = marks
        return marks

    def forget(self, team: str, category: str) -> None:
        """Lets the next look-up of a category come at once, after its alias was moved through this very process."""
        for (of_team, of_category, _), entry in self._entries.items():
            if (of_team, of_category) == (team, category):
                entry.checked, entry.mark = float("-inf"), None

    async def manifest(self, version: Version) -> dict[str, Any]:
        """The bundle's manifest. Raises: BundleError: not what was published, or unreadable."""
        key = version_key(version)
        found = self._manifests.get(key)
        if found is None:
            found = await self.lookups.call(version.team, read_manifest, version.uri)
            if found["sha256"] != version.sha256:
                raise BundleError(f"{version.uri}: not the bundle that was published as {version.name}")
            while len(self._manifests) >= 256:
                self._manifests.pop(next(iter(self._manifests)))
            self._manifests[key] = found
        return found

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def close(self) -> None:
        """Waits for no call: one may hang."""
        self._threads.shutdown(wait=False, cancel_futures=True)
